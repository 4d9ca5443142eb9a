//! Which bytes of a rendered prompt came out of message contents.
//!
//! A chat template is a program, so its output does not say what came from where. We render
//! three times and compare:
//!
//! 1. *plain*: the messages as they are. This is the prompt.
//! 2. *marked*: every content stands between two marks that nobody can guess. If removing the
//!    marks gives the plain prompt and they are properly paired, the bytes between them are
//!    untrusted. Marks stand inside the outer whitespace of a content, because templates trim.
//! 3. *masked*: every visible character of a content is replaced by a filler, so each control
//!    literal in the output is the template's own. The trusted control tokens of the plain prompt
//!    must be exactly these; this catches contents that the template cut up (`split('</think>')`)
//!    so that a piece escaped from between its marks.
//!
//! What cannot be proven is not an error yet: it becomes one in `encode_prompt`, and only if a
//! content contains a control literal.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::ops::Range;

/// Private-use characters, so that `trim`, `upper` or `tojson` leave marks as they are.
const MARK: char = '\u{E000}';
const OPEN: char = '\u{E001}';
const CLOSE: char = '\u{E002}';
const FILLER: char = '\u{E003}';
/// Sixteen digits of the nonce are U+E010 to U+E01F.
const DIGITS: u32 = 0xE010;

/// A pair of marks for one rendering.
#[derive(Debug)]
pub(crate) struct Marks {
    open: String,
    close: String,
}

impl Marks {
    /// Draws marks that occur in none of `contents`.
    pub(crate) fn draw<'a>(contents: impl Iterator<Item = &'a str> + Clone) -> Marks {
        loop {
            // The keys of `RandomState` come from the operating system, once per thread, and
            // every new one differs; SipHash keeps them secret.
            let nonce = RandomState::new().build_hasher().finish();
            let digits: String = (0..16)
                .map(|place| {
                    let digit = u32::try_from((nonce >> (4 * place)) & 0xF).expect("four bits");
                    char::from_u32(DIGITS + digit).expect("a private-use character")
                })
                .collect();
            let marks = Marks {
                open: format!("{MARK}{digits}{OPEN}"),
                close: format!("{MARK}{digits}{CLOSE}"),
            };
            let stem = format!("{MARK}{digits}");
            if !contents.clone().any(|content| content.contains(&stem)) {
                return marks;
            }
        }
    }

    /// `content` with marks around its visible part; unchanged if nothing is visible.
    pub(crate) fn around(&self, content: &str) -> String {
        let core = content.trim();
        if core.is_empty() {
            return content.to_owned();
        }
        let before = &content[..content.len() - content.trim_start().len()];
        let after = &content[content.trim_end().len()..];
        format!("{before}{}{core}{}{after}", self.open, self.close)
    }

    /// Ranges of `plain` that lay between marks in `marked`, in order; `None` if the marks are
    /// not properly paired or `marked` is not `plain` with marks.
    pub(crate) fn locate(&self, marked: &str, plain: &str) -> Option<Vec<Range<usize>>> {
        let mut bare = String::with_capacity(plain.len());
        let mut ranges = Vec::new();
        let mut rest = marked;
        while let Some(at) = rest.find(&self.open) {
            bare.push_str(&rest[..at]);
            rest = &rest[at + self.open.len()..];
            let end = rest.find(&self.close)?;
            let start = bare.len();
            bare.push_str(&rest[..end]);
            ranges.push(start..bare.len());
            rest = &rest[end + self.close.len()..];
        }
        bare.push_str(rest);
        // A mark left over is in `bare` and not in `plain`, so this also proves the pairing.
        (bare == plain).then_some(ranges)
    }
}

/// `content` with every visible character replaced, so that no literal can be in it.
pub(crate) fn masked(content: &str) -> String {
    content.chars().map(|char| if char.is_whitespace() { char } else { FILLER }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> Marks {
        Marks::draw(std::iter::empty())
    }

    #[test]
    fn ranges_are_those_of_the_contents() {
        let marks = marks();
        let marked = format!("<u>{}</u><a>{}", marks.around(" hi "), marks.around("é"));
        assert_eq!(marks.locate(&marked, "<u> hi </u><a>é"), Some(vec![4..6, 14..16]));
    }

    #[test]
    fn a_lost_mark_is_no_proof() {
        let marks = marks();
        let marked = marks.around("one</think>two");
        let cut = marked.split("</think>").last().unwrap();
        assert_eq!(marks.locate(cut, "two"), None);
        assert_eq!(marks.locate(&format!("{}{}", marks.open, marks.around("x")), "x"), None);
    }

    #[test]
    fn two_draws_differ_and_a_mask_keeps_only_whitespace() {
        assert_ne!(marks().open, marks().open);
        assert_eq!(masked("a <|b|>\n"), "\u{E003} \u{E003}\u{E003}\u{E003}\u{E003}\u{E003}\n");
    }
}
