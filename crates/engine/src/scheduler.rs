//! Which rows go into the next step. Pure: sequence lengths in, a plan out.
//!
//! One step is one batch that mixes one decode row of every generating sequence with up to
//! `prefill_chunk` rows of prompts. Decode rows are always in, so a long prompt slows running answers by
//! one chunk a step and never stops them, and prompts never wait behind answers. Tenants whose prompts are
//! read share the chunk in equal parts, each with its oldest prompt first; what one does not need is the
//! others'. A short prompt therefore waits behind its own tenant's long one, and not behind anybody else's.
//!
//! # Why nothing can wedge
//! A sequence is admitted only with every page that its prompt and its `max_tokens` can need, so a
//! running sequence never waits for memory: each step feeds it at least one row, it ends after a
//! bounded number of steps, and its pages return. Nobody passes the head of the queue ([`crate::queue`]),
//! and a request that needs more pages than the pool has is refused at submit; so the head
//! needs at most the whole pool and is admitted at the latest when all running sequences ended.
//! The price is memory that short answers never use; preemption with recompute could win it back.

/// What the planner needs to know of one running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Tokens known but not yet fed: 1 while generating, more while in the prompt.
    pub(crate) unfed: usize,
    /// Which rows need logits.
    pub(crate) logits: LogitRows,
    /// Which tenant's it is: one of [`lanes`].
    pub(crate) lane: usize,
    /// Whether the unfed tokens are of an answer, which gets a row each step whatever prompts take: a grammar
    /// may have forced more than one.
    pub(crate) is_answer: bool,
}

/// Rows of a sequence whose logits are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogitRows {
    /// Only the row of the last known token: generation.
    Last,
    /// Every row: scoring.
    All,
    /// None, of one known token that is fed as that of an answer is: scoring where nobody reads the row.
    None,
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
    let mut chunk_left = shares(demands, limits);
    let mut score_left = limits.score_rows;
    let mut spans = Vec::with_capacity(demands.len());
    for (sequence_idx, demand) in demands.iter().enumerate() {
        let n_rows = match demand.logits {
            LogitRows::None => demand.unfed.min(1),
            LogitRows::Last if demand.unfed == 1 => 1,
            LogitRows::Last => {
                demand.unfed.min(chunk_left[demand.lane]).max(usize::from(demand.is_answer))
            }
            LogitRows::All => demand.unfed.min(chunk_left[demand.lane]).min(score_left),
        };
        if n_rows == 0 {
            continue;
        }
        let n_logit_rows = match demand.logits {
            LogitRows::None => 0,
            LogitRows::Last => usize::from(n_rows == demand.unfed),
            LogitRows::All => {
                score_left -= n_rows;
                n_rows
            }
        };
        if demand.unfed > 1 {
            chunk_left[demand.lane] = chunk_left[demand.lane].saturating_sub(n_rows);
        }
        spans.push(PlannedSpan { sequence_idx, n_rows, n_logit_rows });
    }
    spans
}

/// For each sequence the first one of the same tenant: equal numbers share a lane.
#[must_use]
pub(crate) fn lanes<T: Eq>(tenants: &[T]) -> Vec<usize> {
    let mut lanes: Vec<usize> = Vec::with_capacity(tenants.len());
    for (at, tenant) in tenants.iter().enumerate() {
        // Few tenants, and mostly the one of the sequence before.
        let before = at.checked_sub(1).filter(|&before| tenants[before] == *tenant);
        let lane = before.map(|before| lanes[before]);
        let first = || tenants.iter().position(|other| other == tenant).unwrap_or(at);
        lanes.push(lane.unwrap_or_else(first));
    }
    lanes
}

/// Rows of the chunk for each lane: equal parts, and what one does not need goes to those that need more.
fn shares(demands: &[Demand], limits: StepLimits) -> Vec<usize> {
    let n_lanes = demands.iter().map(|demand| demand.lane + 1).max().unwrap_or(0);
    let mut needs = vec![0; n_lanes];
    for demand in demands {
        needs[demand.lane] += match demand.logits {
            LogitRows::None => 0,
            LogitRows::Last if demand.unfed == 1 => 0,
            LogitRows::Last => demand.unfed,
            LogitRows::All => demand.unfed.min(limits.score_rows),
        };
    }
    let mut by_need: Vec<usize> = (0..needs.len()).filter(|&lane| needs[lane] > 0).collect();
    by_need.sort_by_key(|&lane| needs[lane]);
    let mut left = limits.prefill_chunk;
    let mut shares = vec![0; n_lanes];
    for (at, &lane) in by_need.iter().enumerate() {
        shares[lane] = needs[lane].min(left.div_ceil(by_need.len() - at));
        left -= shares[lane];
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: StepLimits = StepLimits { prefill_chunk: 8, score_rows: 4 };

    fn generate(unfed: usize) -> Demand {
        in_lane(0, unfed)
    }

    fn in_lane(lane: usize, unfed: usize) -> Demand {
        Demand { unfed, logits: LogitRows::Last, lane, is_answer: false }
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
        let score = Demand { logits: LogitRows::All, ..generate(9) };
        assert_eq!(plan(&[score, generate(6)], LIMITS), [span(0, 4, 4), span(1, 4, 0)]);
    }

    #[test]
    fn a_step_whose_row_nobody_reads_takes_nothing_of_the_chunk() {
        let step = Demand { logits: LogitRows::None, ..generate(1) };
        assert_eq!(plan(&[step, generate(8)], LIMITS), [span(0, 1, 0), span(1, 8, 1)]);
    }

    #[test]
    fn tenants_share_a_chunk_and_leave_what_they_do_not_need() {
        // K1: the long prompt of one does not keep the others waiting.
        assert_eq!(
            plan(&[in_lane(0, 900), in_lane(1, 900)], LIMITS),
            [span(0, 4, 0), span(1, 4, 0)]
        );
        let mixed = [in_lane(0, 900), in_lane(0, 5), in_lane(2, 3), in_lane(2, 1)];
        assert_eq!(plan(&mixed, LIMITS), [span(0, 5, 0), span(2, 3, 1), span(3, 1, 1)]);
        // The mutation: prompts of nobody in particular are read one by one.
        assert_eq!(plan(&[generate(900), generate(3)], LIMITS), [span(0, 8, 0)]);
    }

    /// Tokens that a grammar forced are read in a chunk like prompts, and never wait behind one.
    #[test]
    fn an_answer_of_several_unfed_tokens_gets_a_row_beside_any_prompt() {
        let forced = Demand { is_answer: true, ..generate(5) };
        assert_eq!(plan(&[forced, generate(900)], LIMITS), [span(0, 5, 1), span(1, 3, 0)]);
        assert_eq!(plan(&[generate(900), forced], LIMITS), [span(0, 8, 0), span(1, 1, 0)]);
        // The mutation: taken for a prompt it waits as long as the prompt in front of it is read.
        let prompt = Demand { is_answer: false, ..forced };
        assert_eq!(plan(&[generate(900), prompt], LIMITS), [span(0, 8, 0)]);
    }

    #[test]
    fn a_lane_is_the_first_sequence_of_its_tenant() {
        let tenants = [None, Some("a"), None, Some("a"), Some("a"), Some("b")];
        assert_eq!(lanes(&tenants), [0, 1, 0, 1, 1, 5]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn every_step_stays_in_its_limits_and_progresses(
            unfed in prop::collection::vec(
                (1..40_usize, any::<bool>(), 0..4_usize, any::<bool>()), 1..20
            ),
        ) {
            // The lanes that are there as numbers of the first sequences in them.
            let mut demands: Vec<Demand> = unfed.iter().map(|&(rows, score, tenant, is_answer)| Demand {
                unfed: rows,
                is_answer: is_answer && !score,
                logits: if score { LogitRows::All } else { LogitRows::Last },
                lane: unfed.iter().position(|other| other.2 == tenant).unwrap(),
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
