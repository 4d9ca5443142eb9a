//! Stop strings in streamed text.
//!
//! A stop string may begin in one token and end five tokens later. Text that could still turn out
//! to be the start of a stop string is held back; everything else is released at once.

/// What one [`StopMatcher::push`] lets out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Text that is certainly not part of a stop string.
    pub text: String,
    /// Index, in the list given to [`StopMatcher::new`], of the stop string that has been met.
    pub stopped: Option<usize>,
}

/// One stop string with its Knuth–Morris–Pratt failure table.
#[derive(Clone, Debug)]
struct Needle {
    index: usize,
    bytes: Vec<u8>,
    /// `failure[n]`: length of the longest proper border of the first n + 1 bytes.
    failure: Vec<usize>,
    /// Length of the longest suffix of the text seen that begins this stop string.
    matched: usize,
}

impl Needle {
    fn new(index: usize, text: String) -> Needle {
        let bytes = text.into_bytes();
        let mut failure = vec![0; bytes.len()];
        let mut border = 0;
        for n in 1..bytes.len() {
            while border > 0 && bytes[n] != bytes[border] {
                border = failure[border - 1];
            }
            if bytes[n] == bytes[border] {
                border += 1;
            }
            failure[n] = border;
        }
        Needle { index, bytes, failure, matched: 0 }
    }

    /// Advances by one byte and says whether the stop string ends here. Amortised constant time,
    /// so a hostile stop string such as `aaaa…b` costs no more than any other.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.failure[self.matched - 1];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

/// Finds the first stop string in a stream, holding back what may still become one.
///
/// The stop string that *ends* first wins; of two that end together the longer one. This depends
/// on the text alone, so how the text is cut into pushes never changes what is released.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    needles: Vec<Needle>,
    held: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// Takes the stop strings. Empty ones can never be met and are ignored; indices in
    /// [`Released::stopped`] still count them.
    #[must_use]
    pub fn new(stops: Vec<String>) -> StopMatcher {
        let needles = stops
            .into_iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Needle::new(index, stop))
            .collect();
        StopMatcher { needles, held: String::new(), stopped: None }
    }

    /// Takes the next piece of text. After a stop string has been met nothing more is released.
    pub fn push(&mut self, text: &str) -> Released {
        if self.stopped.is_some() {
            return Released { text: String::new(), stopped: self.stopped };
        }
        let seen = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let met = self
                .needles
                .iter_mut()
                .filter_map(|needle| {
                    needle.advance(byte).then_some((needle.bytes.len(), needle.index))
                })
                .max_by_key(|&(len_bytes, index)| (len_bytes, std::cmp::Reverse(index)));
            if let Some((len_bytes, index)) = met {
                self.stopped = Some(index);
                let mut released = std::mem::take(&mut self.held);
                released.truncate(seen + at + 1 - len_bytes);
                return Released { text: released, stopped: self.stopped };
            }
        }
        let hold = self.needles.iter().map(|needle| needle.matched).max().unwrap_or(0);
        // A stop string starts with the first byte of a character, hence so does the held part.
        let kept = self.held.split_off(self.held.len() - hold);
        Released { text: std::mem::replace(&mut self.held, kept), stopped: None }
    }

    /// Ends the stream and returns the text held back; empty if a stop string has been met.
    pub fn finish(&mut self) -> String {
        for needle in &mut self.needles {
            needle.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Definition, by trying every end position.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let met = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| {
                    !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes())
                })
                .max_by_key(|(index, stop)| (stop.len(), std::cmp::Reverse(*index)));
            if let Some((index, stop)) = met {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    fn stream(stops: &[String], pieces: &[&str]) -> (String, Option<usize>, Vec<String>) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut released = Vec::new();
        let mut stopped = None;
        for piece in pieces {
            let out = matcher.push(piece);
            released.push(out.text);
            stopped = out.stopped;
        }
        released.push(matcher.finish());
        (released.concat(), stopped, released)
    }

    proptest! {
        #[test]
        fn i3_every_split_releases_what_the_definition_says(
            stops in proptest::collection::vec("[abé\u{1F600}]{0,4}", 0..4),
            text in "[abcé\u{1F600}]{0,16}",
        ) {
            let (expected, met) = naive(&stops, &text);
            let cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            for &first in &cuts {
                for &second in cuts.iter().filter(|&&at| at >= first) {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    let (released, stopped, parts) = stream(&stops, &pieces);
                    prop_assert_eq!(&released, &expected);
                    prop_assert_eq!(stopped, met);
                    let mut so_far = String::new();
                    for part in parts {
                        so_far.push_str(&part);
                        prop_assert!(expected.starts_with(&so_far), "released part of a stop string");
                    }
                }
            }
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = letters.iter().map(String::as_str).collect();
            prop_assert_eq!(&stream(&stops, &pieces).0, &expected);
        }
    }

    /// Field fault I3, with its own stop strings over all ways to cut a text.
    #[test]
    fn i3_no_cut_of_the_text_of_the_field_shows_any_of_a_stop_string() {
        let stops = ["<START>", "\n\nUser:", ".", "é…"].map(String::from);
        for (text, expected) in [
            ("a<START>b", "a"),
            ("a<STAR", "a<STAR"),
            ("wait...", "wait"),
            ("x\n\nUser: y", "x"),
            ("x\n\nUse y", "x\n\nUse y"),
            ("<<START>", "<"),
            ("\n\n\nUser:z", "\n"),
            ("né…", "n"),
        ] {
            let bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).skip(1).collect();
            for cuts in 0..1_u32 << bounds.len().min(12) {
                let chosen = bounds.iter().enumerate().filter(|(n, _)| cuts >> n & 1 == 1);
                let mut ends: Vec<usize> = chosen.map(|(_, at)| *at).collect();
                ends.push(text.len());
                let mut start = 0;
                let pieces = ends.iter().map(|&end| &text[std::mem::replace(&mut start, end)..end]);
                let (released, ..) = stream(&stops, &pieces.collect::<Vec<_>>());
                assert_eq!(released, expected, "{text:?} {cuts:b}");
            }
        }
    }

    #[test]
    fn text_that_cannot_begin_a_stop_string_is_not_held() {
        let mut matcher = StopMatcher::new(vec!["\n\nQ:".into()]);
        assert_eq!(matcher.push("one").text, "one");
        assert_eq!(matcher.push("\n").text, "");
        assert_eq!(matcher.push("\n").text, "");
        assert_eq!(matcher.push("\n").text, "\n");
        assert_eq!(matcher.push("Q").text, "");
        assert_eq!(matcher.push(": two"), Released { text: String::new(), stopped: Some(0) });
        assert_eq!(matcher.push("more").text, "");
        assert_eq!(matcher.finish(), "");
    }
}
