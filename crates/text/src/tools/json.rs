//! JSON inside generated text: where it ends, and a reading that forgives nothing.
//!
//! `serde_json` alone would keep the last of two equal keys in silence, and it needs the whole text. The scan
//! finds the end while the text still grows; [`members`] then reads it strictly.

use std::ops::Range;

use serde_json::Value;

use super::CallFault;

/// Deepest nesting; `serde_json` refuses more than 127.
const MAX_DEPTH: usize = 100;

/// Finds the end of one object or list, byte by byte.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scan {
    /// Brackets that will close what is open.
    closers: Vec<u8>,
    in_string: bool,
    escaped: bool,
}

/// What one byte did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scanned {
    /// The value goes on.
    More,
    /// This byte was its last.
    End,
    /// No JSON has this byte here.
    Bad(&'static str),
}

impl Scan {
    /// Goes on by one byte; the first one opens the value.
    pub(crate) fn advance(&mut self, byte: u8) -> Scanned {
        if self.in_string {
            return self.in_string(byte);
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.closers.len() == MAX_DEPTH => {
                return Scanned::Bad("too many nested brackets");
            }
            b'{' => self.closers.push(b'}'),
            b'[' => self.closers.push(b']'),
            b'}' | b']' => {
                if self.closers.pop() != Some(byte) {
                    return Scanned::Bad("a bracket that closes nothing");
                }
                if self.closers.is_empty() {
                    return Scanned::End;
                }
            }
            b',' | b':' | b' ' | b'\t' | b'\n' | b'\r' | b'+' | b'-' | b'.' => {}
            _ if byte.is_ascii_alphanumeric() => {}
            _ => return Scanned::Bad("a character outside of strings"),
        }
        Scanned::More
    }

    fn in_string(&mut self, byte: u8) -> Scanned {
        if byte < 0x20 {
            return Scanned::Bad("a control character in a string");
        }
        match (self.escaped, byte) {
            (true, _) => self.escaped = false,
            (false, b'\\') => self.escaped = true,
            (false, b'"') => self.in_string = false,
            (false, _) => {}
        }
        Scanned::More
    }
}

/// Keys of an object with the byte range of their values, in order; every key of every level comes once.
///
/// # Errors
/// [`CallFault::NotJson`] if `text` is not exactly one object.
pub(crate) fn members(text: &str) -> Result<Vec<(String, Range<usize>)>, CallFault> {
    let mut reader = Reader { text, at: 0 };
    let members = reader.object(0)?;
    reader.end()?;
    Ok(members)
}

/// Byte ranges of the items of a list, in order.
///
/// # Errors
/// [`CallFault::NotJson`] if `text` is not exactly one list.
pub(crate) fn items(text: &str) -> Result<Vec<Range<usize>>, CallFault> {
    let mut reader = Reader { text, at: 0 };
    let items = reader.list(0)?;
    reader.end()?;
    Ok(items)
}

/// The value of a text that [`members`] or [`items`] has found.
///
/// # Errors
/// [`CallFault::NotJson`].
pub(crate) fn value(text: &str) -> Result<Value, CallFault> {
    serde_json::from_str(text)
        .map_err(|error| CallFault::NotJson { what: "no value", at: error.column() })
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    fn fault<T>(&self, what: &'static str) -> Result<T, CallFault> {
        Err(CallFault::NotJson { what, at: self.at })
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Steps over `byte` behind blanks, or stays in front of what is there.
    fn takes(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn end(&mut self) -> Result<(), CallFault> {
        self.skip_space();
        if self.at == self.text.len() { Ok(()) } else { self.fault("more than one value") }
    }

    fn object(&mut self, depth: usize) -> Result<Vec<(String, Range<usize>)>, CallFault> {
        if !self.takes(b'{') {
            return self.fault("no object");
        }
        let mut members: Vec<(String, Range<usize>)> = Vec::new();
        let mut known = std::collections::HashSet::new();
        if self.takes(b'}') {
            return Ok(members);
        }
        loop {
            self.skip_space();
            let key = self.string()?;
            if !known.insert(key.clone()) {
                return self.fault("a key that comes twice");
            }
            if !self.takes(b':') {
                return self.fault("a key without a colon");
            }
            let span = self.value(depth + 1)?;
            members.push((key, span));
            if self.takes(b'}') {
                return Ok(members);
            }
            if !self.takes(b',') {
                return self.fault("a value without a comma behind it");
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Range<usize>>, CallFault> {
        if !self.takes(b'[') {
            return self.fault("no list");
        }
        let mut items = Vec::new();
        if self.takes(b']') {
            return Ok(items);
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.takes(b']') {
                return Ok(items);
            }
            if !self.takes(b',') {
                return self.fault("an item without a comma behind it");
            }
        }
    }

    fn value(&mut self, depth: usize) -> Result<Range<usize>, CallFault> {
        if depth > MAX_DEPTH {
            return self.fault("too many nested brackets");
        }
        self.skip_space();
        let start = self.at;
        match self.peek() {
            Some(b'{') => drop(self.object(depth)?),
            Some(b'[') => drop(self.list(depth)?),
            Some(b'"') => drop(self.string()?),
            Some(_) | None => self.word()?,
        }
        Ok(start..self.at)
    }

    fn string(&mut self) -> Result<String, CallFault> {
        let start = self.at;
        if self.peek() != Some(b'"') {
            return self.fault("no string");
        }
        self.at += 1;
        loop {
            match self.peek() {
                None => return self.fault("a string without an end"),
                // What is escaped is for `serde_json` to judge; here only a quote must be passed over.
                Some(b'\\') => self.at += 2,
                Some(b'"') => break,
                Some(_) => self.at += 1,
            }
        }
        self.at += 1;
        let literal = self.text.get(start..self.at);
        let decoded = literal.and_then(|literal| serde_json::from_str(literal).ok());
        decoded.map_or_else(|| self.fault("a string that is not JSON"), Ok)
    }

    /// A number, `true`, `false` or `null`.
    fn word(&mut self) -> Result<(), CallFault> {
        let rest = &self.text[self.at..];
        let is_part = |char: char| char.is_ascii_alphanumeric() || matches!(char, '+' | '-' | '.');
        let len = rest.find(|char| !is_part(char)).unwrap_or(rest.len());
        if serde_json::from_str::<Value>(&rest[..len]).is_err() {
            return self.fault("no value");
        }
        self.at += len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanned(text: &str) -> (usize, Scanned) {
        let mut scan = Scan::default();
        for (at, byte) in text.bytes().enumerate() {
            let scanned = scan.advance(byte);
            if scanned != Scanned::More {
                return (at + 1, scanned);
            }
        }
        (text.len(), Scanned::More)
    }

    #[test]
    fn a_value_ends_at_its_own_bracket() {
        assert_eq!(scanned(r#"{"a": "}\"]", "b": [{}]} }"#), (24, Scanned::End));
        assert_eq!(scanned(r#"{"a": [1"#), (8, Scanned::More));
        assert!(matches!(scanned("{]").1, Scanned::Bad(_)));
        assert!(matches!(scanned("{<").1, Scanned::Bad(_)));
        assert!(matches!(scanned("{\"a\n").1, Scanned::Bad(_)));
        assert!(matches!(scanned(&"[".repeat(101)), (101, Scanned::Bad(_))));
    }

    #[test]
    fn members_are_found_with_their_text() {
        let text = r#" { "a" : 1.50 , "b\n":[1,{"a":2}], "":"\ud83d\ude00" } "#;
        let found = members(text).unwrap();
        let shown: Vec<(&str, &str)> =
            found.iter().map(|(key, span)| (key.as_str(), &text[span.clone()])).collect();
        let expected = [("a", "1.50"), ("b\n", r#"[1,{"a":2}]"#), ("", r#""\ud83d\ude00""#)];
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_json_forbids_is_no_call() {
        for text in [
            r#"{"a": 1,}"#,
            r#"{"a": 1 "b": 2}"#,
            r#"{"a": 1, "a": 2}"#,
            r#"{"a": {"b": 1, "\u0062": 2}}"#,
            r#"{"a": [1,]}"#,
            r#"{"a": 01}"#,
            r#"{"a": NaN}"#,
            r#"{"a": 1e999}"#,
            r#"{"a": "\x"}"#,
            r#"{"a": "\ud800"}"#,
            r#"{'a': 1}"#,
            r#"{"a": 1} {}"#,
            r#"{"a": "b\"#,
            r#"{"a""#,
            "{",
            "",
        ] {
            assert!(matches!(members(text), Err(CallFault::NotJson { .. })), "{text}");
        }
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(MAX_DEPTH + 1), "]".repeat(MAX_DEPTH + 1));
        assert!(members(&deep).is_err());
        assert_eq!(items("[1, {\"a\": []}]").unwrap(), [1..2, 4..13]);
        assert!(items("[1").is_err());
    }
}
