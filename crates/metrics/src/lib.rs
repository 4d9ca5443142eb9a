//! The mathematics of the guardrails: ΔS and its calibration, coverage, λ, and their statistics.
//!
//! Numbers in, numbers out. Nothing here reads a file, runs a model or knows a threshold that the
//! specification does not state. A value that cannot be computed is a named state or an error,
//! never a number that looks like one.
//!
//! Section numbers (§1.1 and so on) are those of the project's guardrail specification.

mod calibration;
mod coverage;
mod delta_s;
mod equivalence;
mod error;
mod fidelity;
mod lambda;
mod ranking;
mod resonance;
mod statistics;

pub use calibration::{Calibration, Fitness, MIN_CALIBRATION_ITEMS, Thresholds, Unfit};
pub use coverage::{Anchor, Coverage, TokenSet, coverage, coverage_of, gold_span_fits};
pub use delta_s::{
    Band, Ds, Family, KSweep, Probe, SetDs, UndefinedDs, decoy_margin, ds, ds_windows, k_sweep,
    residual, set_ds,
};
pub use equivalence::{
    AnswerText, Classes, Equivalence, Outcome, Verdict, assign_classes, content_words,
    json_equivalent, normalised, number_set, token_f1,
};
pub use error::MetricsError;
pub use fidelity::{Fidelity, FidelitySummary, LogProbabilities, POSITION_BIN, PositionBin};
pub use lambda::{
    Lambda, LambdaState, Release, Run, RunKind, SubLabel, lambda, mean_pairwise_jaccard, release,
    retrieve_converges, semantic_entropy,
};
pub use ranking::{fused, ndcg, reciprocal_rank};
pub use resonance::{
    Equivalence as Tost, MODE_MARGIN, MODE_PROMPTS, TREND_MARGIN, TREND_SIZE, mean_interval,
    spikes, tost,
};
pub use statistics::{
    Interval, TheilSen, auroc, binomial_upper, bootstrap_median, jaccard, kld_from_logits,
    kld_probabilities, mean, median, quantile, theil_sen, wilson,
};
