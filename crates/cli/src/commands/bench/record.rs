//! What `--json` prints of a model.

use anyhow::Result;
use exrail_metrics::median;
use serde::Serialize;

use super::{
    first_token::FirstToken,
    guards::{self, Guards},
    process::Resident,
    speed::{Rates, Speed, StepOutput},
    weights::Weights,
};

/// A model's row.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum ModelRecord {
    /// It ran.
    Measured(Box<Measured>),
    /// Only what guards cost was asked for.
    Guards(GuardsCost),
    /// It cannot be measured.
    Refused {
        /// The file's name, or the name as given.
        model: String,
        /// Why.
        refused: String,
    },
}

/// Everything that was measured of a model.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    /// The file's name.
    pub(super) model: String,
    /// Hex sha256 of the file.
    pub(super) sha256: String,
    /// Architecture in the file.
    pub(super) architecture: String,
    /// Format of the largest part of the weights.
    pub(super) quant: String,
    /// Device, threads and instruction set.
    pub(super) kernels: String,
    /// Bytes of all tensors of the file.
    pub(super) weight_bytes: u64,
    /// KLD between prefill and decode of the same tokens, nats: the check before the timing.
    pub(super) kld_prefill_decode: f64,
    /// Bytes per second that the same threads read from memory in the same run.
    pub(super) read_bytes_per_s: Spread,
    /// Prefill tests.
    pub(super) prefill: Vec<PrefillRecord>,
    /// Decode tests.
    pub(super) decode: Vec<DecodeRecord>,
    /// Load times.
    pub(super) first_token: FirstTokens,
    /// Memory with one sequence of one KV page, after the first token.
    pub(super) memory: Memory,
    /// Memory with the sequences of the decode tests.
    pub(super) memory_at_speed: Memory,
}

/// What the inline guards cost, each number of pairs that were measured in turns.
#[derive(Clone, Debug, Serialize)]
pub(super) struct GuardsCost {
    /// The file's name.
    pub(super) model: String,
    /// Device, threads and instruction set.
    pub(super) kernels: String,
    /// Prompts.
    pub(super) first_token: Vec<FirstTokenCost>,
    /// Answers.
    pub(super) decode: Vec<DecodeCost>,
}

/// What guards add to the first token.
#[derive(Clone, Debug, Serialize)]
pub(super) struct FirstTokenCost {
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// Milliseconds without guards, the median.
    pub(super) unguarded_ms: f64,
    /// Milliseconds that guards add.
    pub(super) added_ms: Spread,
    /// Whether the median is within the limit.
    pub(super) within_limit: bool,
}

/// Which share of decode guards take.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DecodeCost {
    /// Sequences at once.
    pub(super) batch: usize,
    /// Whether tokens are drawn.
    pub(super) sampled: bool,
    /// Tokens of all sequences a second without guards, the median.
    pub(super) unguarded_tokens_per_s: f64,
    /// Share of them that guards take.
    pub(super) share_taken: Spread,
    /// Whether the median is within the limit.
    pub(super) within_limit: bool,
}

impl GuardsCost {
    /// # Errors
    /// Nothing was measured, or a sample is not finite.
    pub(super) fn new(model: String, guards: Guards) -> Result<Self> {
        let first_token = guards.first_token_ms.iter().map(|test| {
            let added_ms = test.turns.added()?;
            let within_limit = added_ms.median <= guards::FIRST_TOKEN_LIMIT_MS;
            let unguarded_ms = test.turns.without()?;
            Ok(FirstTokenCost { prompt: test.prompt, unguarded_ms, added_ms, within_limit })
        });
        let decode = guards.decode.iter().map(|test| {
            let share_taken = test.turns.share_taken()?;
            Ok(DecodeCost {
                batch: test.batch,
                sampled: test.sampled,
                unguarded_tokens_per_s: test.turns.without()?,
                within_limit: share_taken.median <= guards::DECODE_LIMIT,
                share_taken,
            })
        });
        Ok(Self {
            model,
            first_token: first_token.collect::<Result<_>>()?,
            decode: decode.collect::<Result<_>>()?,
            kernels: guards.kernels,
        })
    }
}

/// Median, smallest and largest of some samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    /// The middle one.
    pub(super) median: f64,
    /// The smallest.
    pub(super) min: f64,
    /// The largest.
    pub(super) max: f64,
    /// All, in order of time.
    pub(super) samples: Vec<f64>,
}

impl Spread {
    /// # Errors
    /// No samples, or one that is not finite.
    pub(super) fn of(samples: Vec<f64>) -> Result<Self> {
        let median = median(&samples)?;
        let min = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let max = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Ok(Self { median, min, max, samples })
    }
}

/// A prefill test.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PrefillRecord {
    /// Tokens of the prompt, into an empty cache.
    pub(super) tokens: usize,
    /// Tokens per second.
    pub(super) tokens_per_s: Spread,
    /// What the batch-invariant mode costs it.
    #[serde(flatten)]
    pub(super) cost: Option<Cost>,
}

/// What the batch-invariant mode costs a test, where it is asked for and the device has another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Cost {
    /// Tokens per second in the other mode, in turns with this one.
    pub(super) batch_dependent_tokens_per_s: Spread,
    /// Speed of this mode over that, of the medians.
    pub(super) batch_invariant_ratio: f64,
}

/// The rate of a test, and what its mode costs.
fn rates(rates: Rates) -> Result<(Spread, Option<Cost>)> {
    let tokens_per_s = Spread::of(rates.tokens_per_s)?;
    if rates.batch_dependent.is_empty() {
        return Ok((tokens_per_s, None));
    }
    let dependent = Spread::of(rates.batch_dependent)?;
    let batch_invariant_ratio = tokens_per_s.median / dependent.median;
    let cost = Cost { batch_dependent_tokens_per_s: dependent, batch_invariant_ratio };
    Ok((tokens_per_s, Some(cost)))
}

/// A decode test.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DecodeRecord {
    /// Cached positions before.
    pub(super) depth: usize,
    /// Sequences at once.
    pub(super) batch: usize,
    /// What comes out of every step: `logits`, `token` for the most likely one alone, or `drawn` for one
    /// that is drawn.
    pub(super) output: StepOutput,
    /// Tokens of all sequences per second.
    pub(super) tokens_per_s: Spread,
    /// Bytes of weights that a step reads; that one token may need fewer is not counted.
    pub(super) weight_step_bytes: f64,
    /// Bytes of keys and values that a step reads on average.
    pub(super) kv_step_bytes: f64,
    /// Both, times steps per second at the median.
    pub(super) bytes_per_s: f64,
    /// That over the fastest read of memory; above 1 when a cache holds part of the model.
    pub(super) share_of_read: f64,
    /// What the batch-invariant mode costs it.
    #[serde(flatten)]
    pub(super) cost: Option<Cost>,
}

/// Load times in seconds, files in the page cache.
#[derive(Clone, Debug, Serialize)]
pub(super) struct FirstTokens {
    /// From the start of a process to its end, the first token in between.
    pub(super) process_s: Spread,
    /// Inside it, until weights and tokenizer were loaded.
    pub(super) load_s: Spread,
    /// Inside it, until the first token.
    pub(super) first_token_s: Spread,
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Memory {
    /// Weights as the file stores them.
    pub(super) weight_bytes: u64,
    /// The KV pool.
    pub(super) kv_bytes: u64,
    /// Of the whole process; none where the system does not tell.
    pub(super) resident: Option<Resident>,
    /// Resident memory over weights and KV pool.
    pub(super) resident_ratio: Option<f64>,
}

impl Memory {
    fn new(weight_bytes: u64, kv_bytes: u64, resident: Option<Resident>) -> Self {
        let needed = (weight_bytes + kv_bytes) as f64;
        let resident_ratio = resident.map(|resident| resident.now as f64 / needed);
        Self { weight_bytes, kv_bytes, resident, resident_ratio }
    }
}

impl Measured {
    pub(super) fn new(
        model: String,
        weights: &Weights,
        first_token: FirstTokens,
        inside: FirstToken,
        speed: Speed,
    ) -> Result<Self> {
        let read = Spread::of(speed.read_bytes_per_s)?;
        let prefill = speed.prefill.into_iter().map(|test| {
            let (tokens_per_s, cost) = rates(test.rates)?;
            Ok(PrefillRecord { tokens: test.tokens, tokens_per_s, cost })
        });
        let decode = speed.decode.into_iter().map(|test| {
            let (tokens_per_s, cost) = rates(test.rates)?;
            let weight_step_bytes = weights.step_bytes(test.batch);
            let steps_per_s = tokens_per_s.median / test.batch as f64;
            let bytes_per_s = (weight_step_bytes + test.kv_step_bytes) * steps_per_s;
            Ok(DecodeRecord {
                depth: test.depth,
                batch: test.batch,
                output: test.output,
                tokens_per_s,
                weight_step_bytes,
                kv_step_bytes: test.kv_step_bytes,
                bytes_per_s,
                share_of_read: bytes_per_s / read.max,
                cost,
            })
        });
        let total = weights.total_bytes;
        Ok(Self {
            model,
            sha256: speed.sha256,
            architecture: inside.architecture,
            quant: inside.quant,
            kernels: inside.kernels,
            weight_bytes: total,
            kld_prefill_decode: speed.kld,
            prefill: prefill.collect::<Result<_>>()?,
            decode: decode.collect::<Result<_>>()?,
            read_bytes_per_s: read,
            first_token,
            memory: Memory::new(total, inside.kv_bytes, inside.resident),
            memory_at_speed: Memory::new(total, speed.kv_bytes, speed.resident),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_keeps_all_samples_and_refuses_none() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 3.0));
        assert_eq!(spread.samples, [3.0, 1.0, 2.0]);
        assert!(Spread::of(Vec::new()).is_err());
        assert!(Spread::of(vec![f64::NAN]).is_err());
    }

    #[test]
    fn what_a_mode_costs_is_its_speed_over_that_of_the_other() {
        let both =
            Rates { tokens_per_s: vec![3.0, 4.0, 5.0], batch_dependent: vec![8.0, 7.0, 9.0] };
        let (rate, cost) = rates(both).unwrap();
        let cost = cost.unwrap();
        assert_eq!((rate.median, cost.batch_invariant_ratio), (4.0, 0.5));
        assert_eq!(cost.batch_dependent_tokens_per_s.samples, [8.0, 7.0, 9.0]);
        let one = Rates { tokens_per_s: vec![3.0], batch_dependent: Vec::new() };
        assert_eq!(rates(one).unwrap().1, None);
    }

    #[test]
    fn the_memory_ratio_is_absent_where_memory_is() {
        let resident = Resident { now: 150, peak: 400, anonymous: 120 };
        assert_eq!(Memory::new(90, 10, Some(resident)).resident_ratio, Some(1.5));
        assert_eq!(Memory::new(90, 10, None).resident_ratio, None);
    }
}
