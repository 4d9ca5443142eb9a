//! Coverage of the evidence by what entered the prompt, over token positions (§1.2).
//!
//! Text is not tokenised here: the caller passes the byte range of each token of the *index*
//! tokenizer in the canonical document, never the generator's.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A set of token positions, each within a document that the caller numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet(BTreeSet<(usize, usize)>);

impl TokenSet {
    /// The tokens of document `document` of which at least half of the bytes lie in the union of
    /// `ranges`. `tokens[i]` is the byte range of token i; empty tokens belong to nothing.
    #[must_use]
    pub fn covered(document: usize, tokens: &[Range<usize>], ranges: &[Range<usize>]) -> TokenSet {
        let union = union(ranges);
        let positions = tokens.iter().enumerate().filter_map(|(token_idx, token)| {
            let inside: usize = union.iter().map(|range| overlap(range, token)).sum();
            (!token.is_empty() && 2 * inside >= token.len()).then_some((document, token_idx))
        });
        TokenSet(positions.collect())
    }

    /// Adds the positions of `other`.
    pub fn extend(&mut self, other: TokenSet) {
        self.0.extend(other.0);
    }

    /// Number of positions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no position.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The positions as stretches `(document, first token, token behind the last)`, in order.
    #[must_use]
    pub fn runs(&self) -> Vec<(usize, usize, usize)> {
        let mut runs: Vec<(usize, usize, usize)> = Vec::new();
        for &(document, token) in &self.0 {
            match runs.last_mut() {
                Some(last) if (last.0, last.2) == (document, token) => last.2 += 1,
                _ => runs.push((document, token, token + 1)),
            }
        }
        runs
    }

    fn shared_with(&self, other: &TokenSet) -> usize {
        self.0.intersection(&other.0).count()
    }
}

/// The evidence of a gold item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// Every span is needed: the anchor is their union.
    All(TokenSet),
    /// The spans are alternatives: the best covered one counts.
    Any(Vec<TokenSet>),
}

/// What share of the evidence was retrieved, and what else was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// Share of the anchor's tokens in the prompt, in [0, 1]; none without an anchor.
    pub value: Option<f64>,
    /// The same for the cited chunks only.
    pub cited: Option<f64>,
    /// Share of the prompt's evidence tokens outside the anchor's sections, in [0, 1]; none when
    /// nothing was retrieved.
    pub bleed: Option<f64>,
}

/// Coverage of an item. `retrieved` are the tokens of the chunks in the final prompt, after
/// truncation, `cited` those of the cited chunks, `sections` those of the anchor's sections.
/// Overlapping chunks count once, so no share exceeds 1.
#[must_use]
pub fn coverage_of(
    anchor: &Anchor,
    retrieved: &TokenSet,
    cited: &TokenSet,
    sections: &TokenSet,
) -> Coverage {
    Coverage {
        value: share_of(anchor, retrieved),
        cited: share_of(anchor, cited),
        bleed: ratio(retrieved.len() - retrieved.shared_with(sections), retrieved.len()),
    }
}

/// Coverage within one document: the share of the tokens of `anchor` that `retrieved` holds, all
/// as byte ranges; none when no token belongs to the anchor.
#[must_use]
pub fn coverage(
    anchor: &[Range<usize>],
    retrieved: &[Range<usize>],
    tokens: &[Range<usize>],
) -> Option<f64> {
    let anchor = Anchor::All(TokenSet::covered(0, tokens, anchor));
    share_of(&anchor, &TokenSet::covered(0, tokens, retrieved))
}

/// Whether k chunks of at most `max_chunk_tokens` can hold the evidence with a tenth to spare
/// (§1.2.6); a gold item that fails this cannot pass whatever the retriever does.
#[must_use]
pub fn gold_span_fits(n_anchor_tokens: usize, k: usize, max_chunk_tokens: usize) -> bool {
    10 * n_anchor_tokens <= 9 * k * max_chunk_tokens
}

fn share_of(anchor: &Anchor, found: &TokenSet) -> Option<f64> {
    match anchor {
        Anchor::All(tokens) => ratio(tokens.shared_with(found), tokens.len()),
        Anchor::Any(alternatives) => alternatives
            .iter()
            .filter_map(|tokens| ratio(tokens.shared_with(found), tokens.len()))
            .max_by(f64::total_cmp),
    }
}

#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
fn ratio(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> usize {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// Merges ranges into disjoint ascending ones, so that overlapping chunks count a byte once.
fn union(ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut sorted: Vec<Range<usize>> = ranges.iter().filter(|r| !r.is_empty()).cloned().collect();
    sorted.sort_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ten tokens of four bytes.
    fn tokens() -> Vec<Range<usize>> {
        (0..10).map(|i| 4 * i..4 * i + 4).collect()
    }

    #[test]
    fn overlapping_chunks_never_exceed_one() {
        let retrieved = [0..24, 8..32, 0..40, 0..40];
        assert_eq!(coverage(&[4..20], &retrieved, &tokens()), Some(1.0));
    }

    #[test]
    fn half_of_a_token_is_enough_and_less_is_not() {
        // The anchor is tokens 0 and 1; the chunk ends after 2 bytes of token 1, then after 1.
        assert_eq!(coverage(&[0..8], &[0..6], &tokens()), Some(1.0));
        assert_eq!(coverage(&[0..8], &[0..5], &tokens()), Some(0.5));
    }

    #[test]
    fn two_overlapping_halves_do_not_count_a_byte_twice() {
        // Byte 4 alone, given twice, is a quarter of token 1.
        assert_eq!(coverage(&[4..8], &[4..5, 4..5], &tokens()), Some(0.0));
    }

    #[test]
    fn no_anchor_is_none_not_zero() {
        assert_eq!(coverage(&[], &[0..40], &tokens()), None);
        assert_eq!(coverage(&[0..40], &[], &tokens()), Some(0.0));
    }

    #[test]
    fn any_takes_the_best_alternative_and_all_the_union() {
        let set = |range: Range<usize>| TokenSet::covered(0, &tokens(), &[range]);
        let found = set(0..8);
        let none = TokenSet::default();
        let any = Anchor::Any(vec![set(0..8), set(20..40)]);
        assert_eq!(coverage_of(&any, &found, &none, &none).value, Some(1.0));
        let mut union = set(0..8);
        union.extend(set(32..40));
        assert_eq!(coverage_of(&Anchor::All(union), &found, &none, &none).value, Some(0.5));
    }

    #[test]
    fn bleed_counts_tokens_outside_the_sections() {
        let set = |range: Range<usize>| TokenSet::covered(0, &tokens(), &[range]);
        let mut retrieved = set(0..20);
        retrieved.extend(TokenSet::covered(1, &tokens(), &[0..20]));
        let anchor = Anchor::All(set(0..8));
        let result = coverage_of(&anchor, &retrieved, &set(0..4), &set(0..20));
        assert_eq!(result, Coverage { value: Some(1.0), cited: Some(0.5), bleed: Some(0.5) });
        let none = TokenSet::default();
        assert_eq!(coverage_of(&anchor, &none, &none, &none).bleed, None);
    }

    #[test]
    fn sections_above_857_tokens_cannot_reach_the_gate() {
        // §1.2.6: five chunks of 120 tokens hold at most 600 = 0.70 · 857 tokens.
        assert!(gold_span_fits(540, 5, 120));
        assert!(!gold_span_fits(541, 5, 120));
    }

    proptest! {
        #[test]
        fn shares_are_in_range_and_grow_with_what_is_retrieved(
            anchor in prop::collection::vec((0usize..40, 1usize..20), 1..4),
            chunks in prop::collection::vec((0usize..40, 1usize..20), 0..8),
        ) {
            let ranges = |spans: &[(usize, usize)]| -> Vec<Range<usize>> {
                spans.iter().map(|&(start, len)| start..start + len).collect()
            };
            let (anchor, chunks) = (ranges(&anchor), ranges(&chunks));
            let mut last = 0.0;
            for k in 0..=chunks.len() {
                if let Some(value) = coverage(&anchor, &chunks[..k], &tokens()) {
                    prop_assert!((0.0..=1.0).contains(&value) && value >= last);
                    last = value;
                }
            }
        }
    }
}
