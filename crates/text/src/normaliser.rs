//! Text as sentencepiece models see it: spaces written as U+2581, characters mapped, runs cut.
//!
//! The rules are those of `normalizer.cc` of google/sentencepiece. For every byte of the result
//! the place in the text that it came from is kept, so that tokens can say what they cover.

use std::ops::Range;

use crate::charsmap::CharsMap;

/// Stands for a space in sentencepiece vocabularies.
pub(crate) const SPACE: char = '\u{2581}';

/// What a vocabulary asks to be done to text.
#[derive(Debug)]
pub(crate) struct Normaliser {
    /// A space goes before the text.
    pub(crate) space_prefix: bool,
    /// Spaces at both ends go away, and runs of them become one.
    pub(crate) collapse_spaces: bool,
    /// Replaces characters (NFKC and more); `None` leaves them.
    pub(crate) charsmap: Option<CharsMap>,
}

/// A normalised text with its origin.
#[derive(Debug, Default)]
pub(crate) struct Normalised {
    pub(crate) text: String,
    /// For each byte of `text`, where the characters that it stands for start in the original.
    starts: Vec<usize>,
    /// Bytes of the original.
    original_len: usize,
}

impl Normaliser {
    /// Applies the rules to `text`.
    pub(crate) fn apply(&self, text: &str) -> Normalised {
        let mut out = Normalised { original_len: text.len(), ..Normalised::default() };
        let mut at = 0;
        if self.collapse_spaces {
            while at < text.len() {
                let (replacement, consumed) = self.replacement(&text[at..]);
                if replacement != " " {
                    break;
                }
                at += consumed;
            }
        }
        if at == text.len() {
            return out;
        }
        if self.space_prefix {
            out.push(' ', at);
        }
        let mut after_space = self.collapse_spaces;
        while at < text.len() {
            let (replacement, consumed) = self.replacement(&text[at..]);
            let kept = if after_space { replacement.trim_start_matches(' ') } else { replacement };
            for char in kept.chars() {
                out.push(char, at);
            }
            if self.collapse_spaces && !kept.is_empty() {
                after_space = kept.ends_with(' ');
            }
            at += consumed;
        }
        if self.collapse_spaces {
            let len = out.text.trim_end_matches(SPACE).len();
            out.text.truncate(len);
            out.starts.truncate(len);
        }
        out
    }

    /// What the start of `rest` becomes, and how many of its bytes that takes.
    fn replacement<'a>(&'a self, rest: &'a str) -> (&'a str, usize) {
        if let Some((replacement, consumed)) =
            self.charsmap.as_ref().and_then(|map| map.longest(rest))
        {
            return (replacement, consumed);
        }
        let len = rest.chars().next().map_or(0, char::len_utf8);
        (&rest[..len], len)
    }
}

impl Normalised {
    fn push(&mut self, char: char, start: usize) {
        self.text.push(if char == ' ' { SPACE } else { char });
        self.starts.resize(self.text.len(), start);
    }

    /// The part of the original that `span`, which is not empty, came from. It starts and ends
    /// between characters.
    pub(crate) fn origin(&self, span: Range<usize>) -> Range<usize> {
        let start = self.starts[span.start];
        let last = self.starts[span.end - 1];
        let next = self.starts[span.end..].iter().find(|&&start| start != last);
        start..next.copied().unwrap_or(self.original_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(text: &str, space_prefix: bool, collapse_spaces: bool) -> Normalised {
        Normaliser { space_prefix, collapse_spaces, charsmap: None }.apply(text)
    }

    #[test]
    fn spaces_are_written_as_sentencepiece_does() {
        assert_eq!(apply(" a  b ", false, false).text, "▁a▁▁b▁");
        assert_eq!(apply(" a  b ", true, false).text, "▁▁a▁▁b▁");
        assert_eq!(apply("  a  b ", true, true).text, "▁a▁b");
        assert_eq!(apply("  ", true, true).text, "");
        assert_eq!(apply("", true, false).text, "");
    }

    #[test]
    fn origins_are_whole_characters_and_leave_no_gap() {
        let normalised = apply("é b", true, false);
        assert_eq!(normalised.text, "▁é▁b");
        assert_eq!(normalised.origin(0..3), 0..2);
        assert_eq!(normalised.origin(3..4), 0..2);
        assert_eq!(normalised.origin(5..9), 2..4);
    }
}
