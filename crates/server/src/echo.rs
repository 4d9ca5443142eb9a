//! What of a client's own text is told back to it, and goes into logs and traces with that (field fault L9).

use std::fmt::{self, Display, Formatter, Write as _};

/// Most characters that are told of one text.
const LIMIT: usize = 200;
/// Of a longer one: so many of its beginning, and as many of its end as the rest allows.
const HEAD: usize = 120;
/// What stands for those between.
const GAP: &str = " … ";

#[cfg(test)]
thread_local! {
    /// Switches the guard off in a test's own thread, to show what it is for.
    static IS_OFF: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A text of a client, as it may be repeated: at most 200 characters, and none that a terminal obeys or that
/// turns the text after it around.
pub(crate) struct Brief<'a>(pub(crate) &'a str);

impl Display for Brief<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        #[cfg(test)]
        if IS_OFF.get() {
            return f.write_str(self.0);
        }
        let n_chars = self.0.chars().map(len_told).sum::<usize>();
        if n_chars <= LIMIT {
            return self.0.chars().try_for_each(|char| tell(f, char));
        }
        let mut room = HEAD;
        for char in self.0.chars() {
            match room.checked_sub(len_told(char)) {
                Some(left) => room = left,
                None => break,
            }
            tell(f, char)?;
        }
        f.write_str(GAP)?;
        let mut room = LIMIT - HEAD - GAP.chars().count();
        let fits = |char: &char| {
            let left = room.checked_sub(len_told(*char));
            room = left.unwrap_or_default();
            left.is_some()
        };
        let tail: Vec<char> = self.0.chars().rev().take_while(fits).collect();
        tail.into_iter().rev().try_for_each(|char| tell(f, char))
    }
}

/// [`Brief`] as a text.
pub(crate) fn brief(text: &str) -> String {
    Brief(text).to_string()
}

fn tell(f: &mut Formatter<'_>, char: char) -> fmt::Result {
    if is_unsafe(char) { write!(f, "{}", char.escape_unicode()) } else { f.write_char(char) }
}

fn len_told(char: char) -> usize {
    if is_unsafe(char) { char.escape_unicode().count() } else { 1 }
}

/// Control characters, and those that change the direction of what follows or have no width.
fn is_unsafe(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}')
}

#[cfg(test)]
mod tests {
    use exrail_grammar::GrammarError;

    use super::*;
    use crate::error::ApiError;

    /// The mutation: a name of a megabyte comes back whole, with what its reader's terminal obeys.
    #[test]
    fn mutation_l9_without_the_limit_a_megabyte_and_its_escapes_are_told() {
        let found = format!("\u{1b}[2J{}", "Q".repeat(1 << 20));
        let grammar =
            GrammarError::Unsupported { pointer: format!("/{found}"), reason: found.clone() };
        let failures = [
            ApiError::UnknownModel { found: found.clone(), known: "tiny".into() },
            ApiError::Constraint { field: "json_schema".into(), error: grammar },
            ApiError::ContractMismatch {
                field: "tools[0]".into(),
                expected: "0".repeat(64),
                found: found.clone(),
            },
        ];
        let told = |failure: &ApiError| serde_json::to_string(&failure.body()).unwrap();
        for failure in &failures {
            let guarded = told(failure);
            assert!(guarded.matches('Q').count() <= 2 * LIMIT, "{guarded}");
            assert!(!guarded.contains("\\u001b"), "{guarded}");
            IS_OFF.set(true);
            let broken = told(failure);
            IS_OFF.set(false);
            assert!(broken.len() > 1 << 20 && broken.contains("\\u001b[2J"));
        }
    }

    #[test]
    fn l9_a_long_text_is_told_by_its_ends() {
        assert_eq!(brief("expected one"), "expected one");
        let long = format!("begin {} end", "é".repeat(1_000_000));
        let told = brief(&long);
        assert!(told.starts_with("begin é") && told.ends_with("é end"), "{told}");
        assert_eq!(told.chars().count(), LIMIT);
        assert_eq!(brief(&"x".repeat(LIMIT)), "x".repeat(LIMIT));
    }

    #[test]
    fn l9_what_a_terminal_would_obey_is_told_in_words() {
        assert_eq!(brief("a\u{1b}[2J\0b\u{202e}c\n"), "a\\u{1b}[2J\\u{0}b\\u{202e}c\\u{a}");
        assert!(brief(&"\u{7}".repeat(500)).chars().count() <= LIMIT);
    }
}
