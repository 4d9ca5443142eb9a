//! What a client's Lark grammar may not ask.
//!
//! Nothing is parsed here; strings, regular expressions and comments are skipped, and what stands between them is
//! looked at.

use crate::GrammarError;

/// Refuses a control token in a client's grammar, as untrusted text never becomes one; a schema inside it, as that
/// would not be screened; and options that open the mask.
pub(crate) fn screen(text: &str) -> Result<(), GrammarError> {
    let mut chars = text.char_indices().peekable();
    let mut before = '\n';
    while let Some((at, found)) = chars.next() {
        match found {
            '#' => skip_line(&mut chars),
            '/' if chars.peek().is_some_and(|it| it.1 == '/') => skip_line(&mut chars),
            '"' | '/' => skip_quoted(&mut chars, found),
            '<' => {
                let reason =
                    "a control token cannot be part of an answer; quote `<` if text is meant";
                return Err(refused(text, at, reason));
            }
            '%' if !before.is_alphanumeric() => {
                let rest = &text[at..];
                if rest.starts_with("%json") {
                    let reason = "a schema inside a grammar is not taken; ask for it as a schema";
                    return Err(refused(text, at, reason));
                }
                if rest.starts_with("%llguidance") {
                    let reason = "options of the automaton are not the client's to set";
                    return Err(refused(text, at, reason));
                }
            }
            '[' if has_attribute(&text[at..]) => {
                let reason =
                    "attributes of rules (`temperature`, `capture`, `max_tokens`) are not honoured";
                return Err(refused(text, at, reason));
            }
            _ => {}
        }
        before = found;
    }
    Ok(())
}

type Chars<'a> = std::iter::Peekable<std::str::CharIndices<'a>>;

fn skip_line(chars: &mut Chars<'_>) {
    while chars.next_if(|it| it.1 != '\n').is_some() {}
}

fn skip_quoted(chars: &mut Chars<'_>, quote: char) {
    while let Some((_, found)) = chars.next() {
        match found {
            '\\' => drop(chars.next()),
            '\n' => return,
            _ if found == quote => return,
            _ => {}
        }
    }
}

/// Attributes that change sampling or how long a rule may be; the engine has none of them per rule.
fn has_attribute(rest: &str) -> bool {
    let inside = rest.split(']').next().unwrap_or_default();
    ["temperature", "capture", "max_tokens"].iter().any(|it| inside.contains(it))
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
            ("%llguidance {\"no_forcing\": true}\nstart: \"a\"", "line 1, column 1"),
            ("start[max_tokens=3]: /a+/", "line 1, column 6"),
        ] {
            let Err(GrammarError::Unsupported { pointer: found, .. }) = screen(text) else {
                panic!("{text}")
            };
            assert_eq!(found, pointer, "{text}");
        }
    }

    #[test]
    fn the_same_signs_as_text_are_text() {
        for text in [
            "start: \"<|im_start|>\" // <a>\n# %json",
            r#"start: /<[a-z]+>%json/ "\"<" /\/</"#,
            "start: a*\na: \"x\" | \"y\"~2..3",
        ] {
            assert_eq!(screen(text), Ok(()), "{text}");
        }
    }
}
