//! The monitor of one answer (G-19): does it go round in a circle?
//!
//! Two signs, and either is enough:
//! - **Exact period.** The last [`PERIOD_WINDOW`] tokens repeat themselves with a period of at most
//!   [`MAX_PERIOD`], token by token: three times at least. It needs the tokens alone, and runs wherever
//!   they were drawn.
//! - **Collapse.** The entropy of the model's distribution has fallen below [`COLLAPSE`] of what the route's
//!   answers usually have, while [`MIN_REP4`] of the last 4-grams are repeated. It needs the entropy, which
//!   is measured where the request asks for it, and a baseline.
//!
//! Exact means exact: a list whose lines are numbered, a table with other cells, code with other names has
//! no period. What is exactly the same a thousand tokens long is a loop, or was asked for; who asks for that
//! turns the monitor off, or exempts code blocks and tables, whose tokens are then passed over.
//!
//! What follows is the request's choice, see [`OnLoop`]; `roll_back.rs` says how an answer goes back.
//!
//! # Cost
//! A token is appended to a buffer that is cut once in a thousand tokens. Each [`CHECK_EVERY`] tokens the
//! window is compared with itself, at most 333 times; text without a period differs at the first token or
//! two. The 4-grams are counted as they enter and leave, and only where there is an entropy to go with them.

use std::collections::BTreeMap;

use crate::spans::{Exempt, Spans};

/// Tokens that must repeat themselves.
pub(crate) const PERIOD_WINDOW: usize = 1000;
/// Longest period: three times in the window.
pub(crate) const MAX_PERIOD: usize = 333;
/// Tokens between two searches for a period.
const CHECK_EVERY: usize = 16;
/// Tokens whose 4-grams are counted.
const REP4_WINDOW: usize = 256;
const GRAM: usize = 4;
/// Share of repeated 4-grams of a collapse.
const MIN_REP4: f32 = 0.30;
/// Entropy of a collapse, as a share of the baseline.
const COLLAPSE: f32 = 0.25;
/// Tokens over which the entropy is averaged: the weight of the newest is 2 / (n + 1).
const EWMA_TOKENS: u8 = 64;

/// Whether and how an answer is watched for going round in a circle (G-19).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoopGuard {
    /// Mean entropy in nats of the answers that the route usually gives. With it a collapse is a loop, too;
    /// every logit is needed then.
    pub entropy_baseline: Option<f32>,
    /// What happens to an answer that does.
    pub on_loop: OnLoop,
    /// What is not judged.
    pub exempt: Exempt,
}

/// What happens to an answer that goes round in a circle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnLoop {
    /// It ends as [`crate::Finish::Degenerate`].
    #[default]
    End,
    /// Once it goes back to before the loop and on from there with a raised repetition penalty; what it said
    /// since is taken back. The second time it ends.
    RollBack,
}

/// A loop that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loop {
    /// Tokens of the answer that it takes up at least, exempt ones left out.
    pub(crate) n_tokens: usize,
}

/// The monitor's state.
#[derive(Debug)]
pub(crate) struct LoopMonitor {
    /// The last tokens of the answer, [`PERIOD_WINDOW`] at least once there are so many.
    recent: Vec<u32>,
    n_tokens: usize,
    collapse: Option<Collapse>,
    spans: Spans,
}

/// What a collapse is told by.
#[derive(Debug)]
struct Collapse {
    /// Entropy in nats below which it is one.
    limit: f32,
    entropy: Option<f32>,
    grams: BTreeMap<[u32; GRAM], u32>,
}

impl LoopMonitor {
    pub(crate) fn new(guard: LoopGuard) -> LoopMonitor {
        let collapse = guard.entropy_baseline.map(|baseline| Collapse {
            limit: COLLAPSE * baseline,
            entropy: None,
            grams: BTreeMap::new(),
        });
        let spans = Spans::new(guard.exempt);
        LoopMonitor { recent: Vec::new(), n_tokens: 0, collapse, spans }
    }

    /// Whether it wants the entropy of each distribution.
    pub(crate) fn wants_entropy(&self) -> bool {
        self.collapse.is_some()
    }

    /// Takes the next token of the answer with what it shows, and the entropy of the distribution that it comes
    /// from; says whether the answer goes round in a circle by now.
    pub(crate) fn note(&mut self, id: u32, bytes: &[u8], entropy: Option<f32>) -> Option<Loop> {
        if self.spans.exempts(bytes) {
            return None;
        }
        if self.recent.len() == 2 * PERIOD_WINDOW {
            self.recent.drain(..PERIOD_WINDOW);
        }
        self.recent.push(id);
        self.n_tokens += 1;
        let has_collapsed = match (&mut self.collapse, entropy) {
            (Some(collapse), Some(entropy)) => collapse.note(&self.recent, self.n_tokens, entropy),
            (Some(_), None) | (None, _) => false,
        };
        if has_collapsed {
            return Some(Loop { n_tokens: REP4_WINDOW + usize::from(EWMA_TOKENS) });
        }
        let has_period = self.n_tokens.is_multiple_of(CHECK_EVERY) && self.has_period();
        has_period.then_some(Loop { n_tokens: PERIOD_WINDOW })
    }

    fn has_period(&self) -> bool {
        let Some(from) = self.recent.len().checked_sub(PERIOD_WINDOW) else { return false };
        let window = &self.recent[from..];
        (1..=MAX_PERIOD).any(|period| window[period..] == window[..PERIOD_WINDOW - period])
    }
}

impl Collapse {
    /// `recent` ends with the new token, the `n_tokens`th.
    fn note(&mut self, recent: &[u32], n_tokens: usize, entropy: f32) -> bool {
        let weight = 2.0 / (f32::from(EWMA_TOKENS) + 1.0);
        let mean = self.entropy.map_or(entropy, |mean| mean + weight * (entropy - mean));
        self.entropy = Some(mean);
        if let Some(new) = recent.last_chunk::<GRAM>() {
            *self.grams.entry(*new).or_default() += 1;
        }
        if let Some(from) = recent.len().checked_sub(REP4_WINDOW + 1)
            && let Some(old) = recent[from..].first_chunk::<GRAM>()
            && let Some(count) = self.grams.get_mut(old)
        {
            *count -= 1;
            if *count == 0 {
                self.grams.remove(old);
            }
        }
        n_tokens >= REP4_WINDOW && mean < self.limit && self.rep4() >= MIN_REP4
    }

    /// Share of the window's 4-grams that were in it before.
    fn rep4(&self) -> f32 {
        let n = REP4_WINDOW - GRAM + 1;
        #[expect(clippy::cast_precision_loss, reason = "at most 253 of each")]
        let share = (n - self.grams.len().min(n)) as f32 / n as f32;
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The token at which a monitor without a baseline speaks up.
    fn caught_at(tokens: impl IntoIterator<Item = u32>) -> Option<usize> {
        let mut monitor = LoopMonitor::new(LoopGuard::default());
        tokens.into_iter().position(|id| monitor.note(id, b"x", None).is_some())
    }

    /// Ordinary tokens that do not repeat themselves.
    fn noise(n: u32) -> impl Iterator<Item = u32> {
        (0..n).map(|i| i.wrapping_mul(2_654_435_761) >> 12)
    }

    fn cycle(period: u32, n: usize) -> impl Iterator<Item = u32> {
        (0..period).cycle().take(n)
    }

    #[test]
    fn an_exact_period_is_caught_within_a_window_and_a_check() {
        for period in [1, 2, 7, 40, 332, 333] {
            for n_before in [0, 5, 700, 5000] {
                let at = caught_at(noise(n_before).chain(cycle(period, 2000)));
                let loop_len = at.expect("a loop") + 1 - n_before as usize;
                // A period of it may have begun in the noise by chance of its last token.
                let expected = PERIOD_WINDOW - 1..PERIOD_WINDOW + CHECK_EVERY;
                assert!(expected.contains(&loop_len), "period {period}: {loop_len}");
            }
        }
    }

    #[test]
    fn what_is_not_exact_or_too_short_goes_on() {
        assert_eq!(caught_at(noise(20_000)), None);
        assert_eq!(caught_at(cycle(334, 20_000)), None, "fewer than three times");
        assert_eq!(caught_at(cycle(1, 999)), None, "a long line of dashes");
        // A numbered list, a table of other cells: nine of ten tokens are the same.
        let list = (0..20_000_u32).map(|i| if i % 10 == 0 { 1_000 + i } else { i % 10 });
        assert_eq!(caught_at(list), None);
        // One other token within each window, as in a list that counts its hundreds.
        let counted = (0..20_000_u32).map(|i| if i % 900 == 0 { 1_000 + i } else { i % 10 });
        assert_eq!(caught_at(counted), None);
    }

    #[test]
    fn a_collapse_needs_repetition_and_an_entropy_far_below_the_baseline() {
        let caught = |entropy: f32, period: u32| {
            let guard = LoopGuard { entropy_baseline: Some(2.0), ..LoopGuard::default() };
            let mut monitor = LoopMonitor::new(guard);
            // It begins as usual.
            assert!(!noise(100).any(|id| monitor.note(id, b"x", Some(2.0)).is_some()));
            let repeated = (0..600_u32).map(|i| i % period + 1_000_000 * (i % 15 / 14) * i);
            repeated.take(600).position(|id| monitor.note(id, b"x", Some(entropy)).is_some())
        };
        // Not exact, since every fifteenth token is new: only the collapse catches it.
        let at = caught(0.1, 20).expect("a collapse");
        assert!((64..=256).contains(&at), "{at}");
        assert_eq!(caught(0.6, 20), None, "0.6 of 2 nats is more than a quarter");
        assert_eq!(caught(0.1, 600), None, "nothing is repeated");
    }

    #[test]
    fn the_counted_four_grams_are_those_of_the_window() {
        let guard = LoopGuard { entropy_baseline: Some(1.0), ..LoopGuard::default() };
        let mut monitor = LoopMonitor::new(guard);
        let tokens: Vec<u32> = noise(3000).map(|id| id % 5).collect();
        for (at, &id) in tokens.iter().enumerate() {
            monitor.note(id, b"x", Some(9.0));
            let window = &tokens[(at + 1).saturating_sub(REP4_WINDOW)..=at];
            let mut grams: Vec<&[u32]> = window.windows(GRAM).collect();
            let n_grams = grams.len();
            grams.sort_unstable();
            grams.dedup();
            let counted = &monitor.collapse.as_ref().unwrap().grams;
            assert_eq!(counted.len(), grams.len(), "token {at}");
            assert_eq!(counted.values().sum::<u32>() as usize, n_grams, "token {at}");
        }
    }
}
