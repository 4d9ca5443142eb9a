//! The runs of a probe: one item in several wordings and with several seeds over given evidence, what class each
//! answer is of, and λ over them. What the evidence is, and what is compared, is up to the probe.

use std::collections::{BTreeMap, BTreeSet};

use exrail_metrics::{
    AnswerText, Classes, Equivalence, Lambda, LambdaState, Outcome, Run, RunKind, assign_classes,
    lambda,
};
use exrail_retrieval::Hit;
use serde::Serialize;

use crate::ask::{AskOutcome, AskPolicy, OneOf, RefusalReason, answer_all};
use crate::attribution::containment;
use crate::error::VerifyError;
use crate::evidence_gate::EvidenceGate;
use crate::prompt::Nonce;
use crate::system::{Generate, GenerateError, Generated, GeneratedEnd, SamplingKind};

/// The two seeds of the probe.
pub(crate) const SEEDS: [u64; 2] = [1, 2];
/// Least share of a reference answer's words in an answer that counts as matching it.
const MIN_MATCH: f64 = 0.8;

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

impl ModeLambda {
    /// The class of each run, undecided pairs taken as different.
    #[must_use]
    pub fn classes(&self) -> Vec<usize> {
        self.runs.iter().map(|run| run.class).collect()
    }
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
    /// Whether the loop detector ended it (G-19).
    pub looped: bool,
    /// Whether the generator ran; it does not where the ΔS gate refuses.
    pub generated: bool,
    /// Tokens of the prompt.
    pub tokens_in: usize,
    /// Tokens of the reply.
    pub tokens: usize,
}

/// Runs over frozen evidence, by item, that another probe of the same system need not make again.
#[derive(Clone, Debug, Default)]
pub struct FrozenRuns(pub(crate) BTreeMap<String, Vec<Attempt>>);

/// The fence's mark of an item's runs: the same for every probe of an index, so that prompts are the same.
pub(crate) fn nonce_of(id: &str, index_hash: &str) -> Nonce {
    Nonce::derive(&[id.as_bytes(), index_hash.as_bytes()])
}

/// Who is asked, and how.
#[derive(Clone, Copy)]
pub(crate) struct Asking<'a> {
    pub(crate) generator: &'a dyn Generate,
    pub(crate) gate: &'a EvidenceGate,
    pub(crate) policy: &'a AskPolicy,
    /// One for all runs of an item: they must differ in wording and seed only.
    pub(crate) nonce: &'a Nonce,
}

/// One run before its class is known.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) paraphrase: usize,
    pub(crate) seed_idx: usize,
    /// None if the generator gave no reply.
    pub(crate) outcome: Option<AskOutcome>,
    pub(crate) answer: Outcome,
}

impl Asking<'_> {
    /// Asks every wording over its evidence, with every seed. Greedy sampling makes seeds void, so then there is one
    /// run per wording.
    pub(crate) fn all<'h>(
        &self,
        paraphrases: &[String],
        hits: impl Fn(usize) -> &'h [Hit],
    ) -> Result<Vec<Attempt>, VerifyError> {
        let [attempts] = self.over(paraphrases, [&hits])?;
        Ok(attempts)
    }

    /// The same over several kinds of evidence, all of it at once.
    pub(crate) fn over<'h, const N: usize>(
        &self,
        paraphrases: &[String],
        evidence: [&dyn Fn(usize) -> &'h [Hit]; N],
    ) -> Result<[Vec<Attempt>; N], VerifyError> {
        let n_seeds = match self.generator.facts()?.sampling {
            SamplingKind::Seeded => SEEDS.len(),
            SamplingKind::Greedy => 1,
        };
        let pairs: Vec<(usize, usize)> = (0..paraphrases.len())
            .flat_map(|paraphrase| (0..n_seeds).map(move |seed_idx| (paraphrase, seed_idx)))
            .collect();
        let question = |hits: &dyn Fn(usize) -> &'h [Hit], (at, seed_idx): (usize, usize)| OneOf {
            question: &paraphrases[at],
            hits: hits(at),
            nonce: self.nonce,
            seed: SEEDS[seed_idx],
        };
        let questions = evidence
            .iter()
            .flat_map(|hits| pairs.iter().map(|&pair| question(*hits, pair)).collect::<Vec<_>>());
        let questions: Vec<OneOf<'_>> = questions.collect();
        let mut answered =
            answer_all(self.generator, &questions, self.gate, self.policy).into_iter();
        let mut attempts = [const { Vec::new() }; N];
        for of_evidence in &mut attempts {
            for (&(paraphrase, seed_idx), result) in pairs.iter().zip(answered.by_ref()) {
                let (outcome, answer) = classed(result)?;
                of_evidence.push(Attempt { paraphrase, seed_idx, outcome, answer });
            }
        }
        Ok(attempts)
    }
}

/// What a run gave. Time and numbers that run out are outcomes; everything else that fails is an error.
fn classed(
    result: Result<AskOutcome, GenerateError>,
) -> Result<(Option<AskOutcome>, Outcome), GenerateError> {
    match result {
        Ok(outcome) => {
            let answer = outcome_class(&outcome);
            Ok((Some(outcome), answer))
        }
        Err(GenerateError::Numeric { .. }) => Ok((None, Outcome::Numeric)),
        Err(GenerateError::TimedOut { .. }) => Ok((None, Outcome::TimedOut)),
        // No prompt may come to this: what the user gets is no answer of any class.
        Err(GenerateError::Refused(_)) => Ok((None, Outcome::Invalid)),
        Err(error @ (GenerateError::PromptTooLong { .. } | GenerateError::Engine(_))) => Err(error),
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

/// λ of the runs, with what a reader needs to recompute it.
pub(crate) fn summarise(
    attempts: &[Attempt],
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Result<ModeLambda, VerifyError> {
    let [strict, lenient] = classes_of(attempts.iter(), calibrated_ds);
    let strict_lambda = lambda(&runs_of(attempts, &strict.ids))?;
    let lenient_lambda = lambda(&runs_of(attempts, &lenient.ids))?;
    let same = strict_lambda.state == lenient_lambda.state;
    let runs = attempts.iter().zip(&strict.ids).map(|(attempt, &class)| ProbeRun {
        p: attempt.paraphrase + 1,
        s: SEEDS[attempt.seed_idx],
        class,
        valid: !attempt.answer.is_invalid(),
        refusal: attempt.answer == Outcome::Refusal,
        citations: citations_of(attempt).into_iter().collect(),
        looped: reply_of(attempt).is_some_and(|reply| reply.end == GeneratedEnd::Looped),
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

/// The classes of the runs, in run order, with undecided pairs as different and as the same.
pub(crate) fn classes_of<'a>(
    attempts: impl Iterator<Item = &'a Attempt>,
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> [Classes; 2] {
    let outcomes: Vec<Outcome> = attempts.map(|attempt| attempt.answer.clone()).collect();
    [Equivalence::Strict, Equivalence::Lenient]
        .map(|equivalence| assign_classes(&outcomes, equivalence, calibrated_ds))
}

/// Whether template, role order and slot order were the same in all runs that had a prompt.
pub(crate) fn assembled_alike<'a>(attempts: impl Iterator<Item = &'a Attempt>) -> bool {
    let shape =
        |attempt: &'a Attempt| Some(&attempt.outcome.as_ref()?.prompt.as_ref()?.shape_sha256);
    attempts.filter_map(shape).collect::<BTreeSet<&String>>().len() <= 1
}

/// The runs with these classes.
pub(crate) fn runs_of(attempts: &[Attempt], classes: &[usize]) -> Vec<Run> {
    let run = |(attempt, &class): (&Attempt, &usize)| Run {
        paraphrase: attempt.paraphrase,
        seed: attempt.seed_idx,
        class,
        citations: citations_of(attempt),
        kind: kind_of(attempt),
    };
    attempts.iter().zip(classes).map(run).collect()
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

pub(crate) fn reply_of(attempt: &Attempt) -> Option<&Generated> {
    attempt.outcome.as_ref()?.reply.as_ref()
}

pub(crate) fn citations_of(attempt: &Attempt) -> BTreeSet<String> {
    let ids = attempt.outcome.iter().flat_map(|outcome| outcome.cited_ids());
    ids.map(str::to_owned).collect()
}

/// Whether the largest of these classes holds a reference answer.
pub(crate) fn majority_matches(
    attempts: &[Attempt],
    classes: &[usize],
    references: &[String],
) -> bool {
    let size = |class: usize| classes.iter().filter(|&&other| other == class).count();
    let majority = classes.iter().copied().max_by_key(|&class| size(class));
    attempts.iter().zip(classes).any(|(attempt, &class)| {
        Some(class) == majority
            && matches!(&attempt.answer, Outcome::Answer(AnswerText::Text(text))
                if matches_reference(text, references))
    })
}

/// Whether an answer holds at least 80% of the content words and every number of one reference.
pub(crate) fn matches_reference(answer: &str, references: &[String]) -> bool {
    references.iter().any(|reference| containment(reference, answer) >= MIN_MATCH)
}
