//! Which rows go into the next step. Pure: sequence lengths in, a plan out.
//!
//! One step is one batch that mixes one decode row of every generating sequence with up to
//! `prefill_chunk` rows of prompts, oldest sequence first. Decode rows are always in, so a long
//! prompt slows running answers by one chunk a step and never stops them; a prompt always gets at
//! least one row a step, so it never waits behind answers.
//!
//! # Why nothing can wedge
//! A sequence is admitted only with every page that its prompt and its `max_tokens` can need, so a
//! running sequence never waits for memory: each step feeds it at least one row, it ends after a
//! bounded number of steps, and its pages return. Admission is strictly first in, first out, and a
//! request that needs more pages than the pool has is refused at submit; so the head of the queue
//! needs at most the whole pool and is admitted at the latest when all running sequences ended.
//! The price is memory that short answers never use; preemption with recompute could win it back.

/// What the planner needs to know of one running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Tokens known but not yet fed: 1 while generating, more while in the prompt.
    pub(crate) unfed: usize,
    /// Which rows need logits.
    pub(crate) logits: LogitRows,
}

/// Rows of a sequence whose logits are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogitRows {
    /// Only the row of the last known token: generation.
    Last,
    /// Every row: scoring.
    All,
}

/// Limits of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StepLimits {
    /// Prompt rows a step, at least 1.
    pub(crate) prefill_chunk: usize,
    /// Score rows a step, at least 1: their logits are V floats each.
    pub(crate) score_rows: usize,
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlannedSpan {
    /// Index into the demands.
    pub(crate) sequence_idx: usize,
    /// Rows, at least 1.
    pub(crate) n_rows: usize,
    /// Rows at the end of the span whose logits are read.
    pub(crate) n_logit_rows: usize,
}

/// Plans one step over running sequences in admission order.
#[must_use]
pub(crate) fn plan(demands: &[Demand], limits: StepLimits) -> Vec<PlannedSpan> {
    let mut chunk_left = limits.prefill_chunk;
    let mut score_left = limits.score_rows;
    let mut spans = Vec::with_capacity(demands.len());
    for (sequence_idx, demand) in demands.iter().enumerate() {
        let n_rows = match demand.logits {
            LogitRows::Last if demand.unfed == 1 => 1,
            LogitRows::Last => demand.unfed.min(chunk_left),
            LogitRows::All => demand.unfed.min(chunk_left).min(score_left),
        };
        if n_rows == 0 {
            continue;
        }
        let n_logit_rows = match demand.logits {
            LogitRows::Last => usize::from(n_rows == demand.unfed),
            LogitRows::All => {
                score_left -= n_rows;
                n_rows
            }
        };
        if demand.unfed > 1 {
            chunk_left -= n_rows;
        }
        spans.push(PlannedSpan { sequence_idx, n_rows, n_logit_rows });
    }
    spans
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: StepLimits = StepLimits { prefill_chunk: 8, score_rows: 4 };

    fn generate(unfed: usize) -> Demand {
        Demand { unfed, logits: LogitRows::Last }
    }

    fn span(sequence_idx: usize, n_rows: usize, n_logit_rows: usize) -> PlannedSpan {
        PlannedSpan { sequence_idx, n_rows, n_logit_rows }
    }

    #[test]
    fn decode_rows_join_a_chunk_of_prefill() {
        let spans = plan(&[generate(1), generate(20), generate(1)], LIMITS);
        assert_eq!(spans, [span(0, 1, 1), span(1, 8, 0), span(2, 1, 1)]);
    }

    #[test]
    fn short_prompts_share_a_chunk_and_late_ones_wait() {
        let spans = plan(&[generate(3), generate(4), generate(3), generate(2)], LIMITS);
        assert_eq!(spans, [span(0, 3, 1), span(1, 4, 1), span(2, 1, 0)]);
    }

    #[test]
    fn scoring_reads_every_row_within_its_own_limit() {
        let score = Demand { unfed: 9, logits: LogitRows::All };
        assert_eq!(plan(&[score, generate(6)], LIMITS), [span(0, 4, 4), span(1, 4, 0)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn every_step_stays_in_its_limits_and_progresses(
            unfed in prop::collection::vec((1..40_usize, any::<bool>()), 1..20),
        ) {
            let mut demands: Vec<Demand> = unfed.iter().map(|&(unfed, score)| Demand {
                unfed,
                logits: if score { LogitRows::All } else { LogitRows::Last },
            }).collect();
            let total: usize = unfed.iter().map(|u| u.0).sum();
            for _ in 0..=total {
                let spans = plan(&demands, LIMITS);
                let rows: usize = spans.iter().map(|s| s.n_rows).sum();
                prop_assert!(rows <= LIMITS.prefill_chunk + demands.len());
                let logit_rows: usize = spans.iter().map(|s| s.n_logit_rows).sum();
                prop_assert!(logit_rows <= LIMITS.score_rows + demands.len());
                prop_assert!(demands.is_empty() || rows > 0);
                for s in &spans {
                    demands[s.sequence_idx].unfed -= s.n_rows;
                }
                demands.retain(|d| d.unfed > 0);
            }
            prop_assert!(demands.is_empty());
        }
    }
}
