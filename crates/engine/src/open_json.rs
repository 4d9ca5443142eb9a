//! Whether a text stands inside a JSON object or array.
//!
//! It reads a text as it comes. What turns out to be no JSON, such as a brace of a program or a bracket of
//! prose, is left at the byte that shows it, and the next `{` or `[` begins anew.

/// A reader of one text.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenJson {
    /// What is open, outermost first.
    open: Vec<Container>,
    expects: Expects,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Object,
    Array,
}

/// What may come next inside a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expects {
    #[default]
    Value,
    /// A value, or the end of an array that just began.
    ValueOrEnd,
    Key,
    /// A key, or the end of an object that just began.
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    /// The rest of a string, and what comes behind it.
    String(Behind),
    /// The character behind a backslash.
    Escaped(Behind),
    /// The rest of a number or a name.
    Literal,
}

/// What comes behind a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Key,
    Value,
}

impl OpenJson {
    /// Adds text, cut anywhere.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if !self.open.is_empty() && self.step(byte).is_none() {
                self.open.clear();
            }
            if self.open.is_empty() {
                self.begin(byte);
            }
        }
    }

    /// Whether an object or array has begun and not ended.
    pub(crate) fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    fn begin(&mut self, byte: u8) {
        match byte {
            b'{' => self.enter(Container::Object, Expects::KeyOrEnd),
            b'[' => self.enter(Container::Array, Expects::ValueOrEnd),
            _ => {}
        }
    }

    fn enter(&mut self, container: Container, expects: Expects) {
        self.open.push(container);
        self.expects = expects;
    }

    /// One byte inside a container; `None`: this is no JSON.
    fn step(&mut self, byte: u8) -> Option<()> {
        let next = match self.expects {
            Expects::String(behind) => in_string(behind, byte)?,
            Expects::Escaped(behind) => Expects::String(behind),
            Expects::Literal if byte.is_ascii_alphanumeric() || b"+-.".contains(&byte) => {
                Expects::Literal
            }
            Expects::Literal if byte.is_ascii_whitespace() => Expects::CommaOrEnd,
            same if byte.is_ascii_whitespace() => same,
            Expects::Literal | Expects::CommaOrEnd => self.comma_or_end(byte)?,
            Expects::Key | Expects::KeyOrEnd if byte == b'"' => Expects::String(Behind::Key),
            Expects::KeyOrEnd if byte == b'}' => self.leave(),
            Expects::Key | Expects::KeyOrEnd => return None,
            Expects::Colon => (byte == b':').then_some(Expects::Value)?,
            Expects::ValueOrEnd if byte == b']' => self.leave(),
            Expects::Value | Expects::ValueOrEnd => self.value(byte)?,
        };
        self.expects = next;
        Some(())
    }

    fn comma_or_end(&mut self, byte: u8) -> Option<Expects> {
        match (byte, self.open.last()?) {
            (b',', Container::Object) => Some(Expects::Key),
            (b',', Container::Array) => Some(Expects::Value),
            (b'}', Container::Object) | (b']', Container::Array) => Some(self.leave()),
            (_, Container::Object | Container::Array) => None,
        }
    }

    fn leave(&mut self) -> Expects {
        self.open.pop();
        Expects::CommaOrEnd
    }

    fn value(&mut self, byte: u8) -> Option<Expects> {
        match byte {
            b'"' => Some(Expects::String(Behind::Value)),
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => Some(Expects::Literal),
            b'{' => {
                self.open.push(Container::Object);
                Some(Expects::KeyOrEnd)
            }
            b'[' => {
                self.open.push(Container::Array);
                Some(Expects::ValueOrEnd)
            }
            _ => None,
        }
    }
}

fn in_string(behind: Behind, byte: u8) -> Option<Expects> {
    match (byte, behind) {
        (b'"', Behind::Key) => Some(Expects::Colon),
        (b'"', Behind::Value) => Some(Expects::CommaOrEnd),
        (b'\\', _) => Some(Expects::Escaped(behind)),
        (0..0x20, _) => None,
        (_, Behind::Key | Behind::Value) => Some(Expects::String(behind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_open(text: &str) -> bool {
        let mut whole = OpenJson::default();
        whole.push(text.as_bytes());
        let mut cut = OpenJson::default();
        text.bytes().for_each(|byte| cut.push(&[byte]));
        assert_eq!(whole.is_open(), cut.is_open(), "{text}");
        whole.is_open()
    }

    #[test]
    fn every_beginning_of_a_value_is_open_and_the_whole_is_not() {
        let text = r#"{"a": [1, -2.5e3, true, null], "b\"}": {"c": "\\", "d": []}, "e": "é]}"}"#;
        for (at, _) in text.char_indices().skip(1) {
            assert!(is_open(&text[..at]), "{}", &text[..at]);
        }
        assert!(!is_open(text));
        assert!(is_open(&format!("Here: {text} and {{\"x\"")));
        assert!(is_open("[\n  {\"a\": 1},"));
    }

    #[test]
    fn what_is_no_json_is_not_waited_for() {
        for text in [
            "fn main() { println!(\"{}\", 1);",
            "a set {1, 2",
            "see [the page](http",
            "cited [1] and [2",
            "{\"a\": 1\n\"b\"",
            "{\"a line\nbreak",
            "{'a': 1",
            ":{ sad",
        ] {
            let ends_in_number = text.ends_with("[2");
            assert_eq!(is_open(text), ends_in_number, "{text}");
        }
        assert!(is_open("{ {\"a\":"), "what begins anew");
    }
}
