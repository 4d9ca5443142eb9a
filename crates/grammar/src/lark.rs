//! What a client's Lark grammar may not ask, and how its regular expressions are read.
//!
//! Nothing is parsed here; strings, regular expressions and comments are told apart as the automaton's lexer does, and
//! what stands between them is looked at.

use llguidance::derivre::RegexAst;

use crate::GrammarError;
use crate::screen::pattern::{readable, set_of};

/// The grammar with `\d`, `\w` and `\s` of its regular expressions as in a pattern of JSON Schema.
///
/// # Errors
/// A control token, as untrusted text never becomes one; a schema inside, as that would not be screened; options that
/// open the mask; and what is no regular expression.
pub(crate) fn rewrite(text: &str) -> Result<String, GrammarError> {
    let mut out = String::with_capacity(text.len());
    let (mut at, mut attributes_end) = (0, 0);
    while let Some(found) = text[at..].chars().next() {
        let rest = &text[at..];
        let n_bytes = match found {
            '#' => line_len(rest),
            '/' if rest.starts_with("//") => line_len(rest),
            '"' => quoted_len(rest),
            '/' => {
                let regex = Regex::at_start_of(rest).ok_or_else(|| {
                    refused(text, at, "a regular expression is not closed: expected `/`")
                })?;
                out.push_str(&regex.in_ascii().map_err(|reason| refused(text, at, reason))?);
                at += regex.len();
                continue;
            }
            '[' if at >= attributes_end => {
                let inside = rest.split(']').next().unwrap_or_default();
                refuse_attributes(inside).map_err(|reason| refused(text, at, reason))?;
                attributes_end = at + inside.len();
                1
            }
            _ => {
                refuse_word(rest).map_err(|reason| refused(text, at, reason))?;
                found.len_utf8()
            }
        };
        out.push_str(&rest[..n_bytes]);
        at += n_bytes;
    }
    Ok(out)
}

fn refuse_word(rest: &str) -> Result<(), &'static str> {
    if rest.starts_with('<') {
        return Err("a control token cannot be part of an answer; quote `<` if text is meant");
    }
    if rest.starts_with("%json") {
        return Err("a schema inside a grammar is not taken; ask for it as a schema");
    }
    if rest.starts_with("%llguidance") {
        return Err("options of the automaton are not the client's to set");
    }
    Ok(())
}

/// Attributes that change sampling or how long a rule may be; the engine has none of them per rule.
fn refuse_attributes(inside: &str) -> Result<(), &'static str> {
    if ["temperature", "capture", "max_tokens"].iter().any(|it| inside.contains(it)) {
        return Err(
            "attributes of rules (`temperature`, `capture`, `max_tokens`) are not honoured",
        );
    }
    Ok(())
}

fn line_len(rest: &str) -> usize {
    rest.find('\n').unwrap_or(rest.len())
}

/// A string does not go over lines; one that is not closed is none to the automaton either.
fn quoted_len(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, found)) = chars.next() {
        match found {
            '\\' => drop(chars.next()),
            '\n' => return at,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// `/body/flags`. It may go over lines: to stop at one would take its end for a beginning, and hide what follows.
struct Regex<'a> {
    body: &'a str,
    flags: &'a str,
}

impl Regex<'_> {
    fn at_start_of(rest: &str) -> Option<Regex<'_>> {
        let bytes = rest.as_bytes();
        let mut end = 1;
        loop {
            match bytes.get(end)? {
                b'/' => break,
                b'\\' => end += 2,
                _ => end += 1,
            }
        }
        let behind = &rest[end + 1..];
        let n_flags = behind.bytes().take_while(|it| b"imslux".contains(it)).count();
        Some(Regex { body: &rest[1..end], flags: &behind[..n_flags] })
    }

    fn len(&self) -> usize {
        self.body.len() + self.flags.len() + 2
    }

    /// A set stands for each class, inside another one, too. Only what could be read before is rewritten: in
    /// `[+-\d]`, which is none, the set's bracket would be the end of a range.
    fn in_ascii(&self) -> Result<String, String> {
        let flags = self.flags;
        let flagged = if flags.is_empty() { String::new() } else { format!("(?{flags})") };
        let ast = RegexAst::Regex(format!("{flagged}{}", self.body));
        readable(&ast).map_err(|error| {
            let error = error.lines().last().unwrap_or_default().to_owned();
            format!("a regular expression that cannot be compiled: {error}")
        })?;
        let mut out = String::from("/");
        let mut chars = self.body.chars();
        while let Some(found) = chars.next() {
            if found != '\\' {
                out.push(found);
                continue;
            }
            let escape = chars.next().unwrap_or_default();
            match set_of(escape) {
                Some(set) => out.push_str(&set),
                None => out.extend(['\\', escape]),
            }
        }
        out.push('/');
        out.push_str(flags);
        Ok(out)
    }
}

/// A fault at a byte of a text, as line and column.
pub(crate) fn refused(text: &str, at: usize, reason: impl Into<String>) -> GrammarError {
    let before = &text[..at];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|&it| it != '\n').count() + 1;
    GrammarError::Unsupported {
        pointer: format!("line {line}, column {column}"),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_names_no_control_token_and_no_schema_that_nobody_screened() {
        for (text, pointer) in [
            ("start: \"a\" <|im_start|>", "line 1, column 12"),
            ("start: a\na: %json {\"type\": \"x\"}", "line 2, column 4"),
            ("start: a%json {\"type\": \"x\"}", "line 1, column 9"),
            ("%llguidance {\"no_forcing\": true}\nstart: \"a\"", "line 1, column 1"),
            ("start[max_tokens=3]: /a+/", "line 1, column 6"),
            ("start: [a]\na[stop=\"x\", capture]: /a+/", "line 2, column 2"),
            // The lexer of the automaton reads on behind the end of the line.
            ("start: /a\n/ <|im_start|>", "line 2, column 3"),
            ("start: /a\n/ %json {\"type\": \"x\"}", "line 2, column 3"),
            ("start: /a\\/b", "line 1, column 8"),
            ("start: /[+-\\d]/", "line 1, column 8"),
            ("start: /(?=a)/", "line 1, column 8"),
        ] {
            let Err(GrammarError::Unsupported { pointer: found, reason }) = rewrite(text) else {
                panic!("{text}")
            };
            assert_eq!(found, pointer, "{text}: {reason}");
        }
    }

    #[test]
    fn the_same_signs_as_text_are_text() {
        for text in [
            "start: \"<|im_start|>\" // <a>\n# %json",
            r#"start: /<[a-z]+>%json/ "\"<" /\/</"#,
            "start: a*\na: \"x\" | \"y\"~2..3",
            "start: /a\n<b>/x \"c\"i",
        ] {
            assert_eq!(rewrite(text).as_deref(), Ok(text), "{text}");
        }
    }

    #[test]
    fn b17_the_classes_of_a_regular_expression_are_those_of_a_pattern() {
        let space = set_of('s').unwrap();
        for (text, expected) in [
            (r"start: /\d+/", "start: /[0-9]+/".to_owned()),
            (r"start: /[-\d.]\D/i", "start: /[-[0-9].][^0-9]/i".to_owned()),
            (r"start: /\w\\d\s/ # \d", format!(r"start: /[0-9A-Za-z_]\\d{space}/ # \d")),
            (r#"start: "\\d" /\//"#, r#"start: "\\d" /\//"#.to_owned()),
        ] {
            assert_eq!(rewrite(text), Ok(expected), "{text}");
        }
    }

    /// B14: a megabyte of open brackets is looked at once, and not once for each of them.
    #[test]
    fn b14_brackets_that_nothing_closes_are_read_in_one_pass() {
        let text = "[".repeat(1 << 20);
        assert_eq!(rewrite(&text), Ok(text));
    }
}
