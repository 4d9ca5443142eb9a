//! Answers that are made step by step (G-20): each step is one sentence behind the labels of its sources, and one that
//! does not stand is taken back and drawn anew.
//!
//! A step stands when a source supports it, when the answer so far contradicts no hard rule with it, and when it is no
//! repetition. Steps that bring nothing new three times in a row are a stall, and so is one that goes round in a
//! circle. What does not stand leaves nothing behind: the next draw begins behind the steps that stand, with another
//! seed. After [`MAX_ROLLBACKS`] of them the answer is the refusal, whose reason says which step it was and what
//! was not found; where the model only has nothing more to say, the answer ends with the steps that stand.
//!
//! A contradiction in other words than a pattern's passes: no model here judges entailment ([`crate::NLI`]).

use std::collections::BTreeSet;

use exrail_metrics::content_words;
use exrail_wire::{StepRecord, TokenCounts};
use serde::{Deserialize, Serialize};

use crate::answer::{ParsedAnswer, Segment, parse_answer};
use crate::ask::{
    AskOutcome, AskPolicy, ConstraintCheck, RefusalReason, attribute_uncited,
    drop_unsupported_labels, is_cut,
};
use crate::attribution::stems;
use crate::prompt::{Live, PromptFrame, sha256_hex};
use crate::rules::Contradiction;
use crate::system::{Generate, GenerateError, Generated, GeneratedEnd};

/// Most steps of an answer. Each that stands is a place to go back to, so these are the checkpoints, too (G-20 P).
pub const MAX_STEPS: usize = 8;
/// How often an answer may go back before it is refused (G-20 P).
pub const MAX_ROLLBACKS: usize = 2;
/// Steps in a row that bring nothing new and are a stall (G-20 S).
pub const STALL_STEPS: usize = 3;
/// Most words that a refusal names as missing.
const MAX_MISSING: usize = 8;
/// Name of the guard in records and counters.
pub const LOGIC_COLLAPSE: &str = "logic_collapse";

/// How an answer is made step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPolicy {
    /// Most steps, 1 to [`MAX_STEPS`].
    pub max_steps: usize,
    /// How often the answer may go back.
    pub max_rollbacks: usize,
    /// Whether steps are checked.
    pub check: StepCheck,
}

impl StepPolicy {
    /// At most so many steps.
    #[must_use]
    pub fn new(max_steps: usize) -> StepPolicy {
        StepPolicy { max_steps, max_rollbacks: MAX_ROLLBACKS, check: StepCheck::Enforce }
    }
}

/// Whether the logic-collapse guard of G-20 is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepCheck {
    /// A step that does not stand is taken back.
    Enforce,
    /// The guard is off: every step stands, and the whole answer is judged as any other. For mutation tests, which show
    /// what it holds back.
    Off,
}

/// Why a step does not stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum StepFault {
    /// It cites what was not retrieved.
    UnknownCitation,
    /// No snippet supports it.
    Uncited,
    /// With it the answer matches what a hard rule forbids.
    Contradiction {
        /// The rule, from 0.
        rule: usize,
        /// The pattern among those of the rule, from 0.
        pattern: usize,
    },
    /// It has the content words of an earlier step, and no others.
    Repetition {
        /// That step, from 1.
        of: usize,
    },
    /// The loop detector ended it (G-19).
    Looped,
    /// It is one of [`STALL_STEPS`] in a row that bring no new snippet and no new content word.
    NothingNew,
    /// The token budget cut it behind steps that stand.
    Cut,
}

impl StepFault {
    /// Its name in records.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            StepFault::UnknownCitation => "unknown_citation",
            StepFault::Uncited => "uncited",
            StepFault::Contradiction { .. } => "contradiction",
            StepFault::Repetition { .. } => "repetition",
            StepFault::Looped => "looped",
            StepFault::NothingNew => "nothing_new",
            StepFault::Cut => "cut",
        }
    }

    /// What becomes of a step with it: `rolled_back`, `stalled` (rolled back, because nothing moves) or `cut`.
    #[must_use]
    pub fn state(self) -> &'static str {
        match self {
            StepFault::UnknownCitation
            | StepFault::Uncited
            | StepFault::Contradiction { .. }
            | StepFault::Repetition { .. } => "rolled_back",
            StepFault::Looped | StepFault::NothingNew => "stalled",
            StepFault::Cut => "cut",
        }
    }

    /// Whether it says nothing false, and only brings the answer no further.
    pub(crate) fn is_idle(self) -> bool {
        match self {
            StepFault::Repetition { .. } | StepFault::Looped | StepFault::NothingNew => true,
            StepFault::UnknownCitation
            | StepFault::Uncited
            | StepFault::Contradiction { .. }
            | StepFault::Cut => false,
        }
    }

    /// The fault of a name, wherever it was; none for a name that there is not.
    pub(crate) fn of_code(code: &str) -> Option<StepFault> {
        const ALL: [StepFault; 7] = [
            StepFault::UnknownCitation,
            StepFault::Uncited,
            StepFault::Contradiction { rule: 0, pattern: 0 },
            StepFault::Repetition { of: 1 },
            StepFault::Looped,
            StepFault::NothingNew,
            StepFault::Cut,
        ];
        ALL.into_iter().find(|fault| fault.code() == code)
    }

    /// What is wrong with the step, in words that follow "step 2: ".
    #[must_use]
    pub fn in_words(self) -> String {
        match self {
            StepFault::UnknownCitation => "it cites a source that it was not given".to_owned(),
            StepFault::Uncited => "no source supports it".to_owned(),
            StepFault::Contradiction { rule, pattern } => {
                format!("it contradicts constraints[{rule}]: it matches forbid[{pattern}]")
            }
            StepFault::Repetition { of } => format!("it says again what step {of} says"),
            StepFault::Looped => "it goes round in a circle".to_owned(),
            StepFault::NothingNew => {
                format!("{STALL_STEPS} steps in a row bring no new source and no new claim")
            }
            StepFault::Cut => "the token budget cut it".to_owned(),
        }
    }
}

/// A step that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its place in the answer, from 1. One that is drawn anew has the place of the one that was taken back.
    pub step: usize,
    /// Seed of its draw.
    pub seed: u64,
    /// The sentence, without labels.
    pub claim: String,
    /// What supports it; its span is that of the claim.
    pub support: Segment,
    /// Why it does not stand; none where it does.
    pub fault: Option<StepFault>,
    /// What it took.
    pub tokens: TokenCounts,
    /// What the next step is drawn behind: the labels and the sentence.
    said: String,
}

/// Seed of the `nth` draw of an answer, from 0. No two draws of an answer have the same one: the same step under the
/// same seed would be the same text (G-20 R). The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), which
/// maps no two numbers to one.
#[must_use]
pub fn step_seed(seed: u64, nth: usize) -> u64 {
    const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut z = seed.wrapping_add(GOLDEN_GAMMA.wrapping_mul(nth as u64 + 1));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// An answer that was made step by step.
pub(crate) struct Walked {
    /// Every step that was drawn, in order.
    pub(crate) steps: Vec<Step>,
    /// The answer as generated, with what all draws took.
    pub(crate) reply: Generated,
    /// Why it is refused, if it is.
    pub(crate) refusal: Option<RefusalReason>,
}

/// Makes an answer step by step.
///
/// # Errors
/// The generator failed.
pub(crate) fn walk(
    system: &dyn Generate,
    frame: &PromptFrame,
    (policy, options): (&AskPolicy, StepPolicy),
    seed: u64,
) -> Result<Walked, GenerateError> {
    let mut walk = Walk::new(frame, policy, options);
    while walk.standing.len() < options.max_steps {
        let seed = step_seed(seed, walk.steps.len());
        let reply = system.generate_step(frame, &walk.so_far(), seed)?;
        match walk.take(&reply, seed) {
            Next::Step => {}
            Next::Over(end) => return Ok(walk.end(end, None)),
            Next::Refused(reason) => return Ok(walk.end(reply.end, Some(reason))),
        }
    }
    // The model was not asked whether it would have gone on.
    Ok(walk.end(GeneratedEnd::Length, None))
}

/// What comes behind a draw.
enum Next {
    /// Another one.
    Step,
    /// Nothing: the answer is what stands.
    Over(GeneratedEnd),
    /// Nothing: the answer is refused.
    Refused(RefusalReason),
}

/// An answer on its way.
struct Walk<'a> {
    frame: &'a PromptFrame,
    policy: &'a AskPolicy,
    options: StepPolicy,
    steps: Vec<Step>,
    /// The places to go back to.
    standing: Vec<Standing>,
    n_rollbacks: usize,
    tokens: TokenCounts,
}

/// A step that stands.
struct Standing {
    /// Among all that were drawn.
    at: usize,
    /// Its content words, by their stems: the class of its claim.
    class: BTreeSet<String>,
    /// Whether no step before it has its snippets and its words.
    is_new: bool,
}

impl<'a> Walk<'a> {
    fn new(frame: &'a PromptFrame, policy: &'a AskPolicy, options: StepPolicy) -> Walk<'a> {
        Walk {
            frame,
            policy,
            options,
            steps: Vec::new(),
            standing: Vec::new(),
            n_rollbacks: 0,
            tokens: TokenCounts::default(),
        }
    }

    /// The steps that stand, as the beginning of the model's turn.
    fn so_far(&self) -> String {
        let said = self.standing().map(|step| step.said.as_str());
        said.collect::<Vec<_>>().join(" ")
    }

    fn standing(&self) -> impl Iterator<Item = &Step> {
        self.standing.iter().map(|standing| &self.steps[standing.at])
    }

    /// Takes what was drawn.
    fn take(&mut self, reply: &Generated, seed: u64) -> Next {
        let tokens = TokenCounts {
            r#in: reply.n_prompt_tokens,
            out: reply.n_output_tokens,
            cached: reply.n_cached_tokens,
        };
        self.tokens.r#in += tokens.r#in;
        self.tokens.out += tokens.out;
        self.tokens.cached += tokens.cached;
        let parsed = parse_answer(sentence_of(&self.frame.without_fence(&reply.text)), self.live());
        if parsed.refusal && self.standing.is_empty() {
            return Next::Refused(RefusalReason::Model);
        }
        let was_cut = parsed.segments.len() == 1 && is_cut(&parsed.text, reply.end);
        let has_unknown = !parsed.unknown_citations.is_empty();
        let Some(mut step) = self.step(parsed, reply, (seed, tokens)) else {
            let is_silent = self.standing.is_empty() && self.options.check == StepCheck::Enforce;
            return match is_silent {
                true => Next::Refused(RefusalReason::EmptyReply),
                false => Next::Over(reply.end),
            };
        };
        // A cut sentence says something else than the model meant; it goes, unless it is all there is.
        if was_cut && !self.standing.is_empty() {
            step.fault = Some(StepFault::Cut);
            self.steps.push(step);
            return Next::Over(reply.end);
        }
        let class = stems(&step.claim);
        step.fault = match self.options.check {
            StepCheck::Enforce if reply.end == GeneratedEnd::Looped => Some(StepFault::Looped),
            StepCheck::Enforce if has_unknown => Some(StepFault::UnknownCitation),
            StepCheck::Enforce => self.judge(&step, &class),
            StepCheck::Off => None,
        };
        let fault = step.fault.map(|fault| (step.step, fault));
        match fault.or_else(|| self.stand(&step, class)) {
            None => {
                self.steps.push(step);
                Next::Step
            }
            Some((place, fault)) => {
                step.fault = Some(fault);
                self.steps.push(step);
                self.go_back((place, fault), reply.end)
            }
        }
    }

    /// The first sentence of a reply with what supports it. What follows is drawn anew, as a step of its own.
    fn step(
        &self,
        mut parsed: ParsedAnswer,
        reply: &Generated,
        (seed, tokens): (u64, TokenCounts),
    ) -> Option<Step> {
        drop_unsupported_labels(&mut parsed, self.live(), self.policy.min_label_containment);
        attribute_uncited(&mut parsed, self.live(), self.policy.min_containment);
        let support = parsed.segments.into_iter().next()?;
        let claim = parsed.text[support.text_span.clone()].to_owned();
        let said = match self.options.check {
            StepCheck::Enforce => labelled(&claim, &support, self.live()),
            StepCheck::Off => sentence_of(&reply.text).trim().to_owned(),
        };
        let step = self.standing.len() + 1;
        Some(Step { step, seed, claim, support, fault: None, tokens, said })
    }

    fn live(&self) -> &'a Live {
        self.frame.live()
    }

    /// Why a step does not stand behind those that do.
    fn judge(&self, step: &Step, class: &BTreeSet<String>) -> Option<StepFault> {
        if step.support.snippet_ids.is_empty() {
            return Some(StepFault::Uncited);
        }
        if let Some(Contradiction { rule, pattern }) = self.contradiction(&step.claim) {
            return Some(StepFault::Contradiction { rule, pattern });
        }
        let same = self.standing.iter().position(|standing| standing.class == *class);
        same.map(|at| StepFault::Repetition { of: at + 1 })
    }

    /// What the answer contradicts with this claim; without it, it contradicts nothing. A pattern may begin in one
    /// step and end in another.
    fn contradiction(&self, claim: &str) -> Option<Contradiction> {
        let rules = match self.policy.constraints {
            ConstraintCheck::Enforce => self.policy.rules.as_ref()?,
            ConstraintCheck::Off => return None,
        };
        let claims = self.standing().map(|step| step.claim.as_str()).chain([claim]);
        rules.contradiction(&claims.collect::<Vec<_>>().join(" "))
    }

    /// Lets a step stand, unless nothing has moved for too long: then it and those before it that brought nothing new
    /// do not stand. The place of the first of them is told.
    fn stand(&mut self, step: &Step, class: BTreeSet<String>) -> Option<(usize, StepFault)> {
        let is_new = self.is_new(step, &class);
        let is_idle = |standing: &&Standing| !standing.is_new;
        let n_idle = self.standing.iter().rev().take_while(is_idle).count();
        let is_checked = self.options.check == StepCheck::Enforce;
        if is_new || !is_checked || n_idle + 1 < STALL_STEPS {
            self.standing.push(Standing { at: self.steps.len(), class, is_new });
            return None;
        }
        let first = self.standing.len() - n_idle;
        for standing in self.standing.drain(first..) {
            self.steps[standing.at].fault = Some(StepFault::NothingNew);
        }
        Some((first + 1, StepFault::NothingNew))
    }

    /// Whether a step has a snippet or a content word that no step before it has.
    fn is_new(&self, step: &Step, class: &BTreeSet<String>) -> bool {
        let is_cited =
            |id: &String| self.standing().any(|before| before.support.snippet_ids.contains(id));
        let is_said = |word: &String| self.standing.iter().any(|it| it.class.contains(word));
        !step.support.snippet_ids.iter().all(is_cited) || !class.iter().all(is_said)
    }

    /// Goes back to the last step that stands, as often as is allowed. What stands is supported, and stays so when
    /// nothing new comes behind it.
    fn go_back(&mut self, (step, fault): (usize, StepFault), end: GeneratedEnd) -> Next {
        if self.n_rollbacks < self.options.max_rollbacks {
            self.n_rollbacks += 1;
            return Next::Step;
        }
        if fault.is_idle() && !self.standing.is_empty() {
            return Next::Over(end);
        }
        let missing = missing(self.frame.question(), self.live());
        let rollbacks = self.n_rollbacks;
        Next::Refused(RefusalReason::LogicCollapse { step, fault, rollbacks, missing })
    }

    fn end(self, end: GeneratedEnd, refusal: Option<RefusalReason>) -> Walked {
        let mut text = self.so_far();
        // What was drawn last is a part of what is withheld.
        let last = self.steps.last().filter(|step| refusal.is_some() && step.fault.is_some());
        if let Some(step) = last {
            text.push_str(if text.is_empty() { "" } else { " " });
            text.push_str(&step.said);
        }
        let TokenCounts { r#in: n_prompt_tokens, out, cached } = self.tokens;
        let (n_output_tokens, n_cached_tokens) = (out, cached);
        let reply = Generated { text, end, n_prompt_tokens, n_output_tokens, n_cached_tokens };
        Walked { steps: self.steps, reply, refusal }
    }
}

/// A reply without the bracket that begins the next step, see [`crate::step_lark`].
fn sentence_of(reply: &str) -> &str {
    let reply = reply.trim_end();
    reply.strip_suffix('[').unwrap_or(reply)
}

/// A sentence behind the labels of what supports it.
fn labelled(claim: &str, support: &Segment, live: &Live) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for id in &support.snippet_ids {
        if let Some(at) = live.iter().position(|chunk| chunk.snippet_id == *id) {
            // Writing to a String cannot fail.
            let _infallible = write!(text, "[S{}]", at + 1);
        }
    }
    if !text.is_empty() {
        text.push(' ');
    }
    text + claim
}

/// The content words of a question that no snippet holds: what somebody would have to add.
fn missing(question: &str, live: &Live) -> Vec<String> {
    let held: BTreeSet<String> = live.iter().flat_map(|chunk| stems(&chunk.text)).collect();
    let mut missing: Vec<String> = content_words(question);
    missing.retain(|word| stems(word).is_disjoint(&held));
    let mut seen = BTreeSet::new();
    missing.retain(|word| seen.insert(word.clone()));
    missing.truncate(MAX_MISSING);
    missing
}

/// What to do about an answer that collapsed, in words.
pub(crate) fn ask_for(fault: StepFault, missing: &[String]) -> String {
    match fault {
        StepFault::Contradiction { .. } => {
            "add a source that keeps the rule, or ask without it".to_owned()
        }
        StepFault::UnknownCitation
        | StepFault::Uncited
        | StepFault::Repetition { .. }
        | StepFault::Looped
        | StepFault::NothingNew
        | StepFault::Cut => match missing {
            [] => "the sources hold no more of it: add one that does, or ask for less".to_owned(),
            words => {
                let words = words.join("`, `");
                format!("not found in the sources: `{words}`; add what says it, or ask without it")
            }
        },
    }
}

/// The answer of the steps that stand, and where each of them is in it.
pub(crate) fn told(steps: &[Step]) -> (String, Vec<Segment>) {
    let mut text = String::new();
    let mut segments = Vec::new();
    for step in steps.iter().filter(|step| step.fault.is_none()) {
        text.push_str(if text.is_empty() { "" } else { " " });
        let start = text.len();
        text.push_str(&step.claim);
        segments.push(Segment { text_span: start..text.len(), ..step.support.clone() });
    }
    (text, segments)
}

impl AskOutcome {
    /// The steps as they are told and recorded: what was withheld is told by its hash only.
    #[must_use]
    pub fn step_records(&self) -> Vec<StepRecord> {
        let record = |step: &Step| StepRecord {
            step: step.step,
            seed: step.seed,
            claim: (self.refusal.is_none() && step.fault.is_none()).then(|| step.claim.clone()),
            claim_sha256: sha256_hex(step.claim.as_bytes()),
            citations: step.support.snippet_ids.clone(),
            state: step.fault.map_or("good", StepFault::state),
            reason: step.fault.map(StepFault::code),
            tokens: step.tokens,
        };
        self.steps.iter().map(record).collect()
    }

    /// The steps that were taken back, in words; none where every step stands.
    #[must_use]
    pub fn rollbacks(&self) -> Option<String> {
        let taken_back = |step: &Step| {
            let fault = step.fault.filter(|fault| *fault != StepFault::Cut)?;
            Some(format!("step {}: {}", step.step, fault.in_words()))
        };
        let words: Vec<String> = self.steps.iter().filter_map(taken_back).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }
}

#[cfg(test)]
mod tests;
