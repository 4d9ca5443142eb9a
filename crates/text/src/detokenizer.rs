//! Bytes of tokens in, whole UTF-8 characters out.
//!
//! A token of a byte-level vocabulary may end in the middle of a character. The detokenizer keeps
//! the unfinished tail until the next token completes it, so a client never sees half an emoji.
//! It knows nothing of tokens, stop strings or control ids.

/// Streaming counterpart of [`String::from_utf8_lossy`].
///
/// For every way of cutting a byte string into pushes, the concatenation of all returned strings
/// and of [`Detokenizer::finish`] equals `String::from_utf8_lossy` of the whole.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// Start of a character whose continuation has not arrived, at most 3 bytes.
    pending: Vec<u8>,
    /// One space at the start of the stream is not part of the text.
    drops_space: bool,
}

impl Detokenizer {
    /// Returns a detokenizer with nothing pending.
    #[must_use]
    pub fn new() -> Detokenizer {
        Detokenizer::default()
    }

    /// Returns a detokenizer that leaves out one space, if the stream begins with it: the one that
    /// sentencepiece and `WordPiece` vocabularies have before the first word of a text.
    #[must_use]
    pub fn without_first_space() -> Detokenizer {
        Detokenizer { drops_space: true, ..Detokenizer::default() }
    }

    /// Takes the bytes of the next token and returns the text that is complete now.
    ///
    /// Bytes that can never become UTF-8 turn into U+FFFD at once, one per maximal invalid
    /// sequence (Unicode Standard §3.9, "substitution of maximal subparts").
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let mut bytes = bytes;
        if self.drops_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.drops_space = false;
        }
        self.pending.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.pending.len());
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(invalid_len) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid_len..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// Ends the stream: an unfinished character becomes one U+FFFD. The detokenizer is empty after.
    pub fn finish(&mut self) -> String {
        let tail = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        tail
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(pieces: &[&[u8]]) -> String {
        let mut detokenizer = Detokenizer::new();
        let mut text: String = pieces.iter().map(|piece| detokenizer.push(piece)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    proptest! {
        #[test]
        fn every_split_in_two_equals_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            for at in 0..=bytes.len() {
                let (head, tail) = bytes.split_at(at);
                prop_assert_eq!(&stream(&[head, tail]), &whole);
            }
        }

        #[test]
        fn i1_byte_by_byte_equals_the_whole_and_releases_only_whole_characters(text in ".{0,40}") {
            let mut detokenizer = Detokenizer::new();
            let mut released = String::new();
            for byte in text.bytes() {
                let piece = detokenizer.push(&[byte]);
                prop_assert!(!piece.contains(char::REPLACEMENT_CHARACTER) || text.contains(char::REPLACEMENT_CHARACTER));
                released.push_str(&piece);
                prop_assert!(text.starts_with(&released));
            }
            prop_assert_eq!(detokenizer.finish(), "");
            prop_assert_eq!(released, text);
        }
    }

    #[test]
    fn one_space_at_the_start_is_left_out_if_that_is_asked_for() {
        let mut detokenizer = Detokenizer::without_first_space();
        let pieces = ["", "  ", " a"].map(|piece| detokenizer.push(piece.as_bytes()));
        assert_eq!(pieces, ["", " ", " a"]);
        assert_eq!(Detokenizer::without_first_space().push(b"a "), "a ");
        assert_eq!(Detokenizer::new().push(b" a"), " a");
    }

    /// Field fault I1, with its own bytes: what is no text becomes one mark, and nothing panics.
    #[test]
    fn i1_bytes_that_are_no_text_are_replaced_however_they_come() {
        for bytes in [&b"a\xC0\x80b"[..], b"\xED\xA0\x80", b"\xF0\x9F\xA6", b"\x80", b"ok\xF0\x9F"]
        {
            let whole = String::from_utf8_lossy(bytes).into_owned();
            for size in 1..=bytes.len() {
                let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
                assert_eq!(stream(&pieces), whole, "{bytes:x?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn an_unfinished_character_is_held_and_then_replaced() {
        let mut detokenizer = Detokenizer::new();
        assert_eq!(detokenizer.push("a€".as_bytes().split_last().unwrap().1), "a");
        assert_eq!(detokenizer.finish(), "\u{FFFD}");
        assert_eq!(detokenizer.finish(), "");
    }
}
