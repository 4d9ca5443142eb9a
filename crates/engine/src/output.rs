//! From token bytes to text that may be shown: whole UTF-8 characters, never a piece of a stop
//! string.

use exrail_text::{Detokenizer, StopMatcher};

/// Streams one answer.
#[derive(Clone, Debug)]
pub(crate) struct AnswerText {
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

/// Text that became certain, and the stop string that ended the answer, if one did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Index in the request's stop strings.
    pub(crate) stopped: Option<usize>,
}

impl AnswerText {
    pub(crate) fn new(stops: Vec<String>) -> AnswerText {
        AnswerText { detokenizer: Detokenizer::new(), stops: StopMatcher::new(stops) }
    }

    /// Adds the bytes of one token.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Piece {
        let text = self.detokenizer.push(bytes);
        let released = self.stops.push(&text);
        Piece { text: released.text, stopped: released.stopped }
    }

    /// The answer ended: releases what was held back. An unfinished character becomes U+FFFD.
    pub(crate) fn finish(&mut self) -> Piece {
        let tail = self.detokenizer.finish();
        let released = self.stops.push(&tail);
        let mut text = released.text;
        if released.stopped.is_none() {
            text.push_str(&self.stops.finish());
        }
        Piece { text, stopped: released.stopped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], tokens: &[&[u8]]) -> (String, Option<usize>) {
        let mut answer = AnswerText::new(stops.iter().map(ToString::to_string).collect());
        let mut text = String::new();
        for token in tokens {
            let piece = answer.push(token);
            text.push_str(&piece.text);
            if piece.stopped.is_some() {
                return (text, piece.stopped);
            }
        }
        let tail = answer.finish();
        (text + &tail.text, tail.stopped)
    }

    #[test]
    fn i3_a_stop_string_over_three_tokens_never_leaks() {
        assert_eq!(run(&["<START>"], &[b"a<", b"STA", b"RT>b"]), ("a".into(), Some(0)));
        assert_eq!(run(&["<START>"], &[b"a<", b"STA", b"Y>"]), ("a<STAY>".into(), None));
        assert_eq!(run(&["."], &[b"wait", b"..."]), ("wait".into(), Some(0)));
    }

    #[test]
    fn what_was_held_is_released_at_the_end() {
        assert_eq!(run(&["\n\nUser:"], &[b"fine\n", b"\nUs"]), ("fine\n\nUs".into(), None));
    }

    /// I1 of the field faults: an answer may end inside a character.
    #[test]
    fn i1_a_character_over_four_tokens_comes_whole_and_a_cut_one_is_replaced() {
        let crab = "🦀".as_bytes();
        let split: Vec<&[u8]> = crab.chunks(1).collect();
        assert_eq!(run(&[], &split), ("🦀".into(), None));
        assert_eq!(run(&[], &split[..2]), ("\u{FFFD}".into(), None));
        assert_eq!(run(&["🦀"], &split), (String::new(), Some(0)));
    }
}
