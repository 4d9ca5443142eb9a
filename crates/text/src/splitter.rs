//! Cutting text into words by a pattern, in time that grows with the text and not faster.
//!
//! The patterns of the model families are regular except for their end, `\s+(?!\S)|\s+`: a run of
//! white space without its last character, unless the text ends there. A backtracking engine
//! needs a step for every character of a run, and the one in the `tokenizers` crate stops in
//! silence after a million, with the rest of the text as one word. Here an automaton finds the
//! matches and the end is cut by hand.

use regex_automata::{Input, PatternID, meta};
use tokenizers::tokenizer::pattern::Pattern;

use crate::TokenizerError;

/// The end of every pattern with a look-ahead that is in use.
const RUN_WITHOUT_LAST: &str = r"|\s+(?!\S)|\s+";
/// Which pattern of the automaton is that end.
const RUN: PatternID = PatternID::new_unchecked(1);
/// Most memory of a compiled pattern; those of the families take below 1 MB.
const MAX_AUTOMATON_BYTES: usize = 10 << 20;

/// A compiled pattern. Matches are words, and so is what lies between them.
#[derive(Clone, Debug)]
pub(crate) struct Splitter {
    automaton: meta::Regex,
}

impl Splitter {
    /// Compiles `pattern`.
    ///
    /// # Errors
    /// [`TokenizerError::UnsupportedPattern`] if it needs more than an automaton, apart from the
    /// end that is known.
    pub(crate) fn new(pattern: &str) -> Result<Splitter, TokenizerError> {
        let patterns = match pattern.strip_suffix(RUN_WITHOUT_LAST) {
            // Possessive repetition only tells a backtracking engine what an automaton does
            // anyway, where, as in these two, what follows cannot start with what is repeated.
            Some(body) => vec![body.replace("?+", "?").replace("++", "+"), r"\s+".to_owned()],
            None => vec![pattern.to_owned()],
        };
        let config = meta::Config::new().nfa_size_limit(Some(MAX_AUTOMATON_BYTES));
        match meta::Builder::new().configure(config).build_many(&patterns) {
            Ok(automaton) => Ok(Splitter { automaton }),
            Err(source) => Err(TokenizerError::UnsupportedPattern {
                pattern: pattern.to_owned(),
                source: Box::new(source),
            }),
        }
    }

    /// The next match at or after `from`, never empty.
    fn next(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let mut from = from;
        loop {
            let found = self.automaton.search(&Input::new(text).range(from..))?;
            let (start, mut end) = (found.start(), found.end());
            if found.pattern() == RUN && end < text.len() {
                let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
                if start + last < end {
                    end -= last;
                }
            }
            if start < end {
                return Some((start, end));
            }
            from = end + text[end..].chars().next()?.len_utf8();
        }
    }
}

impl Pattern for &Splitter {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<((usize, usize), bool)>> {
        let mut words = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = self.next(inside, at) {
            if at < start {
                words.push(((at, start), false));
            }
            words.push(((start, end), true));
            at = end;
        }
        if at < inside.len() || inside.is_empty() {
            words.push(((at, inside.len()), false));
        }
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pre_tokenizer::{GPT2, LLAMA3};

    fn words<'a>(pattern: &str, text: &'a str) -> Vec<&'a str> {
        let found = (&Splitter::new(pattern).unwrap()).find_matches(text).unwrap();
        found.into_iter().map(|((start, end), _)| &text[start..end]).collect()
    }

    #[test]
    fn runs_of_white_space_leave_their_last_character_to_the_word() {
        assert_eq!(words(GPT2, "a   b"), ["a", "  ", " b"]);
        assert_eq!(words(GPT2, "a   "), ["a", "   "]);
        assert_eq!(words(GPT2, "a\u{3000}b"), ["a", "\u{3000}", "b"]);
        assert_eq!(words(GPT2, "a\u{3000} b"), ["a", "\u{3000}", " b"]);
        assert_eq!(
            words(LLAMA3, "a \n  b I'LL 1234"),
            ["a", " \n", " ", " b", " I", "'LL", " ", "123", "4"]
        );
    }

    #[test]
    fn a_long_run_is_cut_whole() {
        let run = " ".repeat(3 << 20);
        let text = format!("{run}x y");
        let words = words(LLAMA3, &text);
        assert_eq!(words.iter().map(|it| it.len()).collect::<Vec<_>>(), [run.len() - 1, 2, 2]);
    }

    #[test]
    fn what_an_automaton_cannot_do_is_refused_by_name() {
        for pattern in [r"(a)\1", r"(?<=a)b", "("] {
            let error = Splitter::new(pattern).unwrap_err().to_string();
            assert!(error.contains(pattern), "{error}");
        }
    }
}
