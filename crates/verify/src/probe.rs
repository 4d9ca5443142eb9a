//! The λ probe: one item asked in three wordings with two seeds, with evidence retrieved once
//! (`frozen`) and per wording (`live`), so that a retrieval fault and a generation fault can be
//! told apart (§1.3.3).

use std::collections::BTreeSet;

use exrail_metrics::{
    AnswerText, Classes, Equivalence, Lambda, LambdaState, Outcome, Run, RunKind, assign_classes,
    lambda, retrieve_converges,
};
use exrail_retrieval::Hit;
use serde::Serialize;

use crate::ask::{AskOutcome, AskPolicy, RefusalReason, answer_over, retrieve};
use crate::attribution::containment;
use crate::error::VerifyError;
use crate::evidence_gate::EvidenceGate;
use crate::gold::{GoldItem, N_PARAPHRASES};
use crate::prompt::Nonce;
use crate::system::{Generate, GenerateError, GeneratedEnd, Retrieve, SamplingKind};

/// The two seeds of the probe.
const SEEDS: [u64; 2] = [1, 2];
/// Least share of a reference answer's words in an answer that counts as matching it.
const MIN_MATCH: f64 = 0.8;

/// λ of one gold item in both modes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemLambda {
    /// The item.
    pub id: String,
    /// Evidence retrieved once, with the item's own question.
    pub frozen: ModeLambda,
    /// Evidence retrieved for each wording.
    pub live: ModeLambda,
    /// Whether the wordings retrieve the same snippets: mean pairwise Jaccard ≥ 0.70.
    pub retrieve_convergent: bool,
    /// Whether template, role order and slot order were the same in all runs that had a prompt.
    pub assemble_convergent: bool,
    /// Whether the largest class of the live runs holds a reference answer. λ is stability, not
    /// truth.
    pub matches_gold: bool,
}

/// λ in one mode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeLambda {
    /// The state; none if it depends on answers whose equivalence only a fit encoder could decide.
    pub state: Option<LambdaState>,
    /// λ with undecided pairs taken as different.
    pub strict: Lambda,
    /// Comparisons that were undecided.
    pub n_undecided: usize,
    /// The runs, so that a reader can recompute.
    pub runs: Vec<ProbeRun>,
}

/// One run of the probe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeRun {
    /// Wording, from 1.
    pub p: usize,
    /// Seed.
    pub s: u64,
    /// Class of the answer.
    pub class: usize,
    /// Whether the output was usable.
    pub valid: bool,
    /// Whether the user got the refusal token.
    pub refusal: bool,
    /// Ids of the cited snippets.
    pub citations: Vec<String>,
    /// Whether the generator ran; it does not where the ΔS gate refuses.
    pub generated: bool,
    /// Tokens of the prompt.
    pub tokens_in: usize,
    /// Tokens of the reply.
    pub tokens: usize,
}

/// What the probe asks, and how.
pub(crate) struct ProbeSystem<'a> {
    pub(crate) generator: &'a dyn Generate,
    pub(crate) index: &'a dyn Retrieve,
    pub(crate) gate: &'a EvidenceGate,
    pub(crate) policy: &'a AskPolicy,
}

/// Probes one item. `calibrated_ds` gives ΔS of two answers on the text↔text scale, or nothing
/// where no fit encoder is at hand. Greedy sampling makes seeds void, so then there is one run
/// per wording.
///
/// # Errors
/// The index failed, or the generator failed otherwise than by time or numbers, which are
/// outcomes.
pub fn lambda_probe(
    system: (&dyn Generate, &dyn Retrieve),
    gate: &EvidenceGate,
    policy: &AskPolicy,
    item: &GoldItem,
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Result<ItemLambda, VerifyError> {
    let system = ProbeSystem { generator: system.0, index: system.1, gate, policy };
    let paraphrases = &item.paraphrases[..item.paraphrases.len().min(N_PARAPHRASES)];
    let frozen_hits = retrieve(system.index, &item.question, policy)?;
    let mut live_hits = Vec::with_capacity(paraphrases.len());
    for paraphrase in paraphrases {
        live_hits.push(retrieve(system.index, paraphrase, policy)?);
    }
    let frozen = system.ask_all(item, paraphrases, |_| &frozen_hits)?;
    let live = system.ask_all(item, paraphrases, |index| &live_hits[index])?;
    let ids = |hits: &Vec<Hit>| -> BTreeSet<String> {
        hits.iter().map(|hit| hit.chunk.snippet_id.clone()).collect()
    };
    let shapes: BTreeSet<&String> = frozen
        .iter()
        .chain(&live)
        .filter_map(|attempt| Some(&attempt.outcome.as_ref()?.prompt.as_ref()?.shape_sha256))
        .collect();
    let assemble_convergent = shapes.len() <= 1;
    let live_lambda = summarise(&live, calibrated_ds)?;
    let matches_gold = majority_matches(&live, &live_lambda, &item.answers);
    Ok(ItemLambda {
        id: item.id.clone(),
        frozen: summarise(&frozen, calibrated_ds)?,
        live: live_lambda,
        retrieve_convergent: retrieve_converges(&live_hits.iter().map(ids).collect::<Vec<_>>()),
        assemble_convergent,
        matches_gold,
    })
}

/// One run before its class is known.
struct Attempt {
    paraphrase: usize,
    seed_idx: usize,
    /// None if the generator gave no reply.
    outcome: Option<AskOutcome>,
    answer: Outcome,
}

impl ProbeSystem<'_> {
    fn ask_all<'h>(
        &self,
        item: &GoldItem,
        paraphrases: &[String],
        hits: impl Fn(usize) -> &'h Vec<Hit>,
    ) -> Result<Vec<Attempt>, VerifyError> {
        let n_seeds = match self.generator.facts()?.sampling {
            SamplingKind::Seeded => SEEDS.len(),
            SamplingKind::Greedy => 1,
        };
        // One nonce for all runs of an item: they must differ in wording and seed only.
        let nonce = Nonce::derive(&[item.id.as_bytes(), self.index.index_hash().as_bytes()]);
        let mut attempts = Vec::with_capacity(paraphrases.len() * n_seeds);
        for (paraphrase_idx, paraphrase) in paraphrases.iter().enumerate() {
            for (seed_idx, &seed) in SEEDS[..n_seeds].iter().enumerate() {
                let result = answer_over(
                    self.generator,
                    paraphrase,
                    hits(paraphrase_idx),
                    self.gate,
                    (self.policy, &nonce, seed),
                );
                let (outcome, answer) = match result {
                    Ok(outcome) => {
                        let answer = outcome_class(&outcome);
                        (Some(outcome), answer)
                    }
                    Err(GenerateError::Numeric { .. }) => (None, Outcome::Numeric),
                    Err(GenerateError::TimedOut { .. }) => (None, Outcome::TimedOut),
                    Err(
                        error @ (GenerateError::PromptTooLong { .. } | GenerateError::Engine(_)),
                    ) => return Err(error.into()),
                };
                attempts.push(Attempt { paraphrase: paraphrase_idx, seed_idx, outcome, answer });
            }
        }
        Ok(attempts)
    }
}

/// The class that an outcome belongs to, by what the user sees. Citing what was not retrieved is
/// an invalid output, although the user sees a refusal.
fn outcome_class(outcome: &AskOutcome) -> Outcome {
    match &outcome.refusal {
        None => Outcome::Answer(AnswerText::Text(outcome.text.clone())),
        Some(RefusalReason::EmptyReply) => Outcome::Empty,
        Some(
            RefusalReason::UnknownCitation { .. }
            | RefusalReason::FenceBroken { .. }
            | RefusalReason::Leak,
        ) => Outcome::Invalid,
        Some(
            RefusalReason::NoEvidence
            | RefusalReason::DeltaS { .. }
            | RefusalReason::WeakEvidence { .. }
            | RefusalReason::NoContentWords
            | RefusalReason::DeltaSUndefined { .. }
            | RefusalReason::Model
            | RefusalReason::NoValidCitation { .. }
            | RefusalReason::ConstraintContradiction { .. }
            | RefusalReason::LogicCollapse { .. },
        ) => Outcome::Refusal,
    }
}

fn summarise(
    attempts: &[Attempt],
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Result<ModeLambda, VerifyError> {
    let outcomes: Vec<Outcome> = attempts.iter().map(|attempt| attempt.answer.clone()).collect();
    let strict = assign_classes(&outcomes, Equivalence::Strict, calibrated_ds);
    let lenient = assign_classes(&outcomes, Equivalence::Lenient, calibrated_ds);
    let strict_lambda = lambda(&runs_of(attempts, &strict))?;
    let lenient_lambda = lambda(&runs_of(attempts, &lenient))?;
    let same = strict_lambda.state == lenient_lambda.state;
    let runs = attempts.iter().zip(&strict.ids).map(|(attempt, &class)| ProbeRun {
        p: attempt.paraphrase + 1,
        s: SEEDS[attempt.seed_idx],
        class,
        valid: !attempt.answer.is_invalid(),
        refusal: attempt.answer == Outcome::Refusal,
        citations: citations_of(attempt).into_iter().collect(),
        generated: reply_of(attempt).is_some() || attempt.outcome.is_none(),
        tokens_in: reply_of(attempt).map_or(0, |reply| reply.n_prompt_tokens),
        tokens: reply_of(attempt).map_or(0, |reply| reply.n_output_tokens),
    });
    Ok(ModeLambda {
        state: same.then_some(strict_lambda.state),
        n_undecided: strict.n_undecided,
        runs: runs.collect(),
        strict: strict_lambda,
    })
}

fn runs_of(attempts: &[Attempt], classes: &Classes) -> Vec<Run> {
    let run = |(attempt, &class): (&Attempt, &usize)| Run {
        paraphrase: attempt.paraphrase,
        seed: attempt.seed_idx,
        class,
        citations: citations_of(attempt),
        kind: kind_of(attempt),
    };
    attempts.iter().zip(&classes.ids).map(run).collect()
}

fn kind_of(attempt: &Attempt) -> RunKind {
    match &attempt.answer {
        Outcome::Invalid | Outcome::Empty | Outcome::TimedOut | Outcome::Numeric => {
            RunKind::Invalid
        }
        Outcome::Answer(_) | Outcome::Refusal => match reply_of(attempt).map(|reply| reply.end) {
            Some(GeneratedEnd::Looped) => RunKind::Looped,
            Some(GeneratedEnd::Stop | GeneratedEnd::Length | GeneratedEnd::Closed) | None => {
                match attempt.answer {
                    Outcome::Refusal => RunKind::NoCitationRequired,
                    Outcome::Answer(_)
                    | Outcome::Invalid
                    | Outcome::Empty
                    | Outcome::TimedOut
                    | Outcome::Numeric => RunKind::Answer,
                }
            }
        },
    }
}

fn reply_of(attempt: &Attempt) -> Option<&crate::system::Generated> {
    attempt.outcome.as_ref()?.reply.as_ref()
}

fn citations_of(attempt: &Attempt) -> BTreeSet<String> {
    let ids = attempt.outcome.iter().flat_map(|outcome| outcome.cited_ids());
    ids.map(str::to_owned).collect()
}

fn majority_matches(attempts: &[Attempt], lambda: &ModeLambda, references: &[String]) -> bool {
    let size = |class: usize| lambda.runs.iter().filter(|run| run.class == class).count();
    let majority = lambda.runs.iter().map(|run| run.class).max_by_key(|&class| size(class));
    attempts.iter().zip(&lambda.runs).any(|(attempt, run)| {
        Some(run.class) == majority
            && matches!(&attempt.answer, Outcome::Answer(AnswerText::Text(text))
                if matches_reference(text, references))
    })
}

/// Whether an answer holds at least 80% of the content words and every number of one reference.
pub(crate) fn matches_reference(answer: &str, references: &[String]) -> bool {
    references.iter().any(|reference| containment(reference, answer) >= MIN_MATCH)
}
