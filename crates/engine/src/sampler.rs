//! From logits to a token. The order of operations is documented at [`Sampling`].

use std::collections::BTreeMap;

use exrail_grammar::Mask;
use exrail_kernels::{Draw, DrawScratch};

use crate::distribution::Summary;
use crate::philox::numerator;
use crate::request::Sampling;

/// What a repetition penalty is raised by behind a loop: that of Keskar et al. 2019, section 4.1.
const RAISED_PENALTY: f32 = 1.2;
/// Tokens that it looks at then, at least: those whose 4-grams the loop monitor counts.
const RAISED_WINDOW: usize = 256;

/// Buffers that all sequences of an engine share; they grow to the vocabulary once.
#[derive(Debug, Default)]
pub(crate) struct SamplerScratch {
    adjusted: Vec<f32>,
    draw: DrawScratch,
    /// Tokens that a mask allows, and their logits.
    ids: Vec<u32>,
    allowed: Vec<f32>,
}

/// A token that was drawn under a mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Allowed {
    pub(crate) id: u32,
    /// Share of the model's probability on what the mask allows.
    pub(crate) mass: f32,
    /// Whether the model's first choice is among it.
    pub(crate) has_first_choice: bool,
}

/// Why nothing was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotDrawn {
    /// A logit is no number.
    NotFinite,
    /// The mask allows no token that has a logit.
    NothingAllowed,
}

/// The sampling state of one sequence: its options and what its answer holds so far.
#[derive(Clone, Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    /// Occurrences in the answer, for presence and frequency penalties.
    counts: BTreeMap<u32, u32>,
    step: u64,
}

impl Sampler {
    /// State before the first token. The options were validated.
    #[must_use]
    pub(crate) fn new(sampling: Sampling) -> Sampler {
        Sampler { sampling, counts: BTreeMap::new(), step: 0 }
    }

    /// Draws the next token; `logits` cover exactly the tokenizer's vocabulary, and `tokens` are prompt and
    /// answer so far. `None` when a logit, as adjusted, is no number.
    pub(crate) fn sample(
        &mut self,
        logits: &[f32],
        tokens: &[u32],
        scratch: &mut SamplerScratch,
    ) -> Option<u32> {
        let SamplerScratch { adjusted, draw, .. } = scratch;
        let values = if self.sampling.adjusts() {
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            self.adjust(adjusted, tokens);
            adjusted
        } else {
            logits
        };
        let drawn = self.draw(0).of(values, draw);
        if drawn.value.is_nan() {
            return None;
        }
        self.note(drawn.index);
        Some(drawn.index)
    }

    /// Draws among the tokens that a mask allows. The others are not there at all, so that no filter and no
    /// bias brings one back; of two logits that are equal the lower id comes first, as ever. `summary` is of
    /// all logits. The token is not noted: a grammar may still want another.
    pub(crate) fn draw_allowed(
        &self,
        (logits, summary): (&[f32], &Summary),
        tokens: &[u32],
        mask: &Mask,
        scratch: &mut SamplerScratch,
    ) -> Result<Allowed, NotDrawn> {
        let SamplerScratch { adjusted, draw, ids, allowed } = scratch;
        ids.clear();
        ids.extend(mask.ids().filter(|&id| (id as usize) < logits.len()));
        if ids.is_empty() {
            return Err(NotDrawn::NothingAllowed);
        }
        allowed.clear();
        allowed.extend(ids.iter().map(|&id| logits[id as usize]));
        let inside = Summary::of(allowed).ok_or(NotDrawn::NotFinite)?;
        let share = inside.max + inside.log_sum - summary.max - summary.log_sum;
        if self.sampling.adjusts() {
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            self.adjust(adjusted, tokens);
            allowed.clear();
            allowed.extend(ids.iter().map(|&id| adjusted[id as usize]));
        }
        let drawn = self.draw(0).of(allowed, draw);
        if drawn.value.is_nan() {
            return Err(NotDrawn::NotFinite);
        }
        Ok(Allowed {
            id: ids[drawn.index as usize],
            mass: share.exp().min(1.0),
            has_first_choice: inside.max >= summary.max,
        })
    }

    /// How a token is drawn: the next one, or with `n_pending` tokens in front of it that were drawn
    /// elsewhere and are not noted yet.
    pub(crate) fn draw(&self, n_pending: u64) -> Draw {
        let Sampling { temperature, top_k, top_p, min_p, seed, sequence, .. } = self.sampling;
        if temperature <= 0.0 {
            return Draw::LARGEST;
        }
        // More than a vocabulary has is all of it.
        let top_k = top_k.map_or(0, |k| u32::try_from(k).unwrap_or(u32::MAX));
        let numerator = numerator(seed, sequence, self.step + n_pending);
        Draw { temperature, top_k, top_p, min_p, numerator }
    }

    /// Counts a token that was chosen elsewhere: by the device where nothing else is needed, or by a grammar.
    pub(crate) fn note(&mut self, id: u32) {
        self.step += 1;
        *self.counts.entry(id).or_default() += 1;
    }

    /// Goes back to the counts of an earlier state, with a repetition penalty that is raised. Random numbers go
    /// on, or else the same draws would lead to the same loop.
    pub(crate) fn go_back(&mut self, to: Sampler) {
        self.counts = to.counts;
        let sampling = &mut self.sampling;
        sampling.repetition_penalty = (sampling.repetition_penalty * RAISED_PENALTY).min(10.0);
        sampling.repetition_window = sampling.repetition_window.max(RAISED_WINDOW);
    }

    fn adjust(&self, logits: &mut [f32], tokens: &[u32]) {
        let s = &self.sampling;
        let mut window = tokens[tokens.len().saturating_sub(s.repetition_window)..].to_vec();
        window.sort_unstable();
        window.dedup();
        for id in window {
            let x = &mut logits[id as usize];
            *x = if *x > 0.0 { *x / s.repetition_penalty } else { *x * s.repetition_penalty };
        }
        for (&id, &count) in &self.counts {
            #[expect(clippy::cast_precision_loss, reason = "answers are far below 2^24 tokens")]
            let count = count as f32;
            logits[id as usize] -= s.presence_penalty + s.frequency_penalty * count;
        }
        for &(id, bias) in &s.logit_bias {
            logits[id as usize] += bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn once(sampling: Sampling, logits: &[f32], tokens: &[u32]) -> u32 {
        let drawn = Sampler::new(sampling).sample(logits, tokens, &mut SamplerScratch::default());
        drawn.expect("finite logits")
    }

    /// Ids that 400 draws with different seeds give.
    fn support(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let mut ids: Vec<u32> =
            (0..400).map(|seed| once(Sampling { seed, ..sampling.clone() }, logits, &[])).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// ln of these probabilities.
    const P: [f32; 5] = [0.05, 0.4, 0.1, 0.3, 0.15];

    fn logits() -> Vec<f32> {
        P.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn greedy_takes_the_most_likely_and_the_lowest_id_on_a_tie() {
        assert_eq!(once(Sampling::greedy(), &logits(), &[]), 1);
        assert_eq!(once(Sampling::greedy(), &[0.0, 2.0, 2.0], &[]), 1);
    }

    #[test]
    fn filters_keep_exactly_their_sets() {
        let base = Sampling::default();
        assert_eq!(support(&base, &logits()), [0, 1, 2, 3, 4]);
        let top_k = Sampling { top_k: Some(2), ..base.clone() };
        assert_eq!(support(&top_k, &logits()), [1, 3]);
        // 0.4 + 0.3 = 0.7 reaches 0.69; 0.71 needs the third.
        let top_p = Sampling { top_p: 0.69, ..base.clone() };
        assert_eq!(support(&top_p, &logits()), [1, 3]);
        let top_p = Sampling { top_p: 0.71, ..base.clone() };
        assert_eq!(support(&top_p, &logits()), [1, 3, 4]);
        // 0.3 / 0.4 = 0.75 stays, 0.15 / 0.4 = 0.375 goes.
        let min_p = Sampling { min_p: 0.5, ..base.clone() };
        assert_eq!(support(&min_p, &logits()), [1, 3]);
        // top-p counts the mass that top-k left: 0.4 of 0.7 = 0.571.
        let both = Sampling { top_k: Some(2), top_p: 0.57, ..base };
        assert_eq!(support(&both, &logits()), [1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let n = 20_000_u32;
        let mut counts = [0_u32; 5];
        let mut scratch = SamplerScratch::default();
        let mut sampler = Sampler::new(Sampling { seed: 9, ..Sampling::default() });
        for _ in 0..n {
            counts[sampler.sample(&logits(), &[], &mut scratch).unwrap() as usize] += 1;
        }
        for (p, count) in P.iter().zip(counts) {
            let p = f64::from(*p);
            let sigma = (f64::from(n) * p * (1.0 - p)).sqrt();
            assert!((f64::from(count) - f64::from(n) * p).abs() < 5.0 * sigma, "{p}: {count}");
        }
    }

    #[test]
    fn temperature_sharpens_and_tiny_temperature_is_greedy() {
        let cold = Sampling { temperature: 1e-30, ..Sampling::default() };
        assert_eq!(support(&cold, &logits()), [1]);
    }

    #[test]
    fn repetition_penalty_looks_at_its_window_only() {
        let penalised =
            Sampling { repetition_penalty: 2.0, repetition_window: 2, ..Sampling::greedy() };
        let logits = [1.0, 1.5, -1.0];
        assert_eq!(once(penalised.clone(), &logits, &[1, 2, 1]), 0); // 1.5 / 2 < 1.0
        assert_eq!(once(penalised, &logits, &[1, 2, 2]), 1); // outside the window
        let negative =
            Sampling { repetition_penalty: 2.0, repetition_window: 8, ..Sampling::greedy() };
        assert_eq!(once(negative, &[-1.0, -1.5], &[0]), 1); // -1.0 * 2 < -1.5
    }

    #[test]
    fn presence_and_frequency_count_the_answer_not_the_prompt() {
        let logits = [1.0, 1.5, 0.0];
        let mut scratch = SamplerScratch::default();
        let presence = Sampling { presence_penalty: 0.7, ..Sampling::greedy() };
        let mut sampler = Sampler::new(presence);
        assert_eq!(sampler.sample(&logits, &[1, 1], &mut scratch), Some(1));
        assert_eq!(sampler.sample(&logits, &[1, 1, 1], &mut scratch), Some(0)); // 1.5 - 0.7 < 1.0
        let frequency = Sampling { frequency_penalty: 0.3, ..Sampling::greedy() };
        let mut sampler = Sampler::new(frequency);
        let ids: Vec<u32> =
            (0..4).map(|_| sampler.sample(&logits, &[], &mut scratch).unwrap()).collect();
        assert_eq!(ids, [1, 1, 0, 1]); // 1.5, 1.2, then 0.9 < 1.0, then 0.9 > 0.7
    }

    #[test]
    fn bias_comes_after_penalties_and_can_force_or_ban() {
        let force = Sampling { logit_bias: vec![(2, 100.0)], ..Sampling::greedy() };
        assert_eq!(once(force, &[1.0, 1.5, 0.0], &[]), 2);
        let ban = Sampling { logit_bias: vec![(1, -100.0)], ..Sampling::default() };
        assert!(!support(&ban, &logits()).contains(&1));
        // Bias first would give (1.0 + 0.6) / 2 = 0.8; penalties first give 1.0 / 2 + 0.6 = 1.1.
        let order =
            Sampling { repetition_penalty: 2.0, logit_bias: vec![(0, 0.6)], ..Sampling::greedy() };
        assert_eq!(once(order, &[1.0, 1.0], &[0]), 0);
    }

    #[test]
    fn a_draw_depends_on_seed_sequence_and_step_only() {
        let sampling = Sampling { seed: 5, sequence: 2, ..Sampling::default() };
        let run = |noise: bool| {
            let mut scratch = SamplerScratch::default();
            let mut own = Sampler::new(sampling.clone());
            let mut other = Sampler::new(Sampling { seed: 6, ..Sampling::default() });
            (0..50)
                .map(|_| {
                    if noise {
                        other.sample(&[0.0; 9], &[], &mut scratch);
                    }
                    own.sample(&logits(), &[], &mut scratch).unwrap()
                })
                .collect::<Vec<u32>>()
        };
        assert_eq!(run(false), run(true));
        let second = Sampling { sequence: 3, ..sampling.clone() };
        let mut scratch = SamplerScratch::default();
        let mut sampler = Sampler::new(second);
        let other: Vec<u32> =
            (0..50).map(|_| sampler.sample(&logits(), &[], &mut scratch).unwrap()).collect();
        assert_ne!(run(false), other);
    }
}
