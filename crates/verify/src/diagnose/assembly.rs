//! Whether what was found for a question reaches the model, in the order of its slots (§1.2.2, G-12), and whether the
//! same question with the same seed gives the same answer (G-28).
//!
//! Both are about the way from the evidence to the reply. A fault here looks like a weak model: it cites nothing, it
//! refuses, its answers differ. So it is looked for on its own, by what the generator says that it reads.

use exrail_metrics::coverage_of;
use exrail_retrieval::{Encode, Hit};
use serde::Serialize;

use crate::ask::{AskPolicy, Fitted, Prompt, fit, retrieve};
use crate::error::VerifyError;
use crate::evaluate::{Progress, Stage, sample};
use crate::evidence_gate::EvidenceGate;
use crate::gold::{GoldSet, ResolvedItem};
use crate::positions::Positions;
use crate::prompt::{Nonce, PromptFrame};
use crate::system::{Generate, GenerateError, Generated, Placed, Retrieve};

/// Questions that are answered twice with one seed.
const REPEATED: usize = 3;

/// How prompts were put together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AssemblyCheck {
    /// Prompts that were built, one for each question of the sample that the gate lets in.
    pub prompts: usize,
    /// Prompts whose slots do not stand in the order system, task, constraints, citations, question, answer.
    pub reordered: usize,
    /// Prompts with a slot whose place is not known: the template writes something else than it was given.
    pub unplaced: usize,
    /// Prompts that lost evidence which was found, because they did not fit.
    pub cut: usize,
    /// What was compared.
    #[serde(skip)]
    pub observed: Vec<AssemblyObservation>,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AssemblyObservation {
    /// The item.
    pub id: String,
    /// Coverage of what was found; none of an item whose evidence has no tokens.
    pub coverage_found: Option<f64>,
    /// Coverage of what is in the prompt.
    pub coverage_prompt: Option<f64>,
    /// First token of each slot and one past its last, where they are known.
    pub slots: Vec<Option<[usize; 2]>>,
}

/// Questions that were answered twice with the same prompt and the same seed.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RepeatCheck {
    /// Pairs of answers.
    pub pairs: usize,
    /// Pairs whose texts differ.
    pub differ: usize,
    /// Answers to a prompt of which the generator read another number of tokens than it has.
    pub misread: usize,
    /// What was compared.
    #[serde(skip)]
    pub observed: Vec<RepeatObservation>,
}

/// One such pair.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RepeatObservation {
    /// The item.
    pub id: String,
    /// Both texts; one that did not come is empty.
    pub texts: [String; 2],
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that were read each time; none of a reply that did not come.
    pub read_tokens: [Option<usize>; 2],
}

/// Who is asked, and how.
#[derive(Clone, Copy)]
pub struct AssemblySystem<'a> {
    /// What answers.
    pub generator: &'a dyn Generate,
    /// What finds.
    pub index: &'a dyn Retrieve,
    /// What counts tokens of documents.
    pub encoder: &'a dyn Encode,
    /// Who may be answered.
    pub gate: &'a EvidenceGate,
    /// How questions are answered; the policy of production.
    pub policy: &'a AskPolicy,
}

/// Builds the prompts of so many answerable questions, all when there is no number, and looks where their parts come to
/// stand. Generates nothing.
///
/// # Errors
/// The gold set does not fit the index, or a part of the system failed.
pub fn check_assembly(
    system: AssemblySystem<'_>,
    gold: &GoldSet,
    (n_items, seed): (Option<usize>, u64),
    progress: &mut dyn FnMut(Progress),
) -> Result<AssemblyCheck, VerifyError> {
    let resolved = gold.resolve(system.index)?;
    let items = sample(&resolved, n_items, seed, |resolved| &resolved.item.id);
    let mut positions = Positions::new(system.encoder, system.index);
    let mut check = AssemblyCheck::default();
    for (n_done, item) in items.iter().copied().enumerate() {
        let found = retrieve(system.index, &item.item.question, system.policy)?;
        if let Some(prompt) = system.prompt(item, &found)? {
            let placed = system.generator.place(&prompt.frame)?;
            let mut coverage = |hits: &[Hit]| coverage(&mut positions, item, hits);
            check.add(AssemblyObservation {
                id: item.item.id.clone(),
                coverage_found: coverage(&found)?,
                coverage_prompt: coverage(prompt.hits)?,
                slots: placed.slots,
            });
        }
        progress(Progress { stage: Stage::Assemble, n_done: n_done + 1, n_total: items.len() });
    }
    Ok(check)
}

/// Answers a few questions twice, with the same prompt and the same seed.
///
/// # Errors
/// As [`check_assembly`].
pub fn check_repeats(
    system: AssemblySystem<'_>,
    gold: &GoldSet,
    seed: u64,
) -> Result<RepeatCheck, VerifyError> {
    let items = gold.resolve(system.index)?;
    let chosen = sample(&items, Some(REPEATED), seed, |resolved| &resolved.item.id);
    let found =
        chosen.iter().map(|item| retrieve(system.index, &item.item.question, system.policy));
    let found = found.collect::<Result<Vec<_>, _>>()?;
    let mut asked = Vec::with_capacity(chosen.len());
    for (item, found) in chosen.iter().zip(&found) {
        if let Some(prompt) = system.prompt(item, found)? {
            let Placed { n_tokens, .. } = system.generator.place(&prompt.frame)?;
            asked.push((&item.item.id, n_tokens, prompt));
        }
    }
    let prompts: Vec<_> = asked.iter().map(|(.., prompt)| (&prompt.frame, seed)).collect();
    // The same batch twice: what else is computed beside an answer is the same, too.
    let first = replies(system.generator, &prompts)?;
    let second = replies(system.generator, &prompts)?;
    let mut check = RepeatCheck::default();
    for ((id, n_tokens, _), pair) in asked.iter().zip(first.into_iter().zip(second)) {
        check.add(id, *n_tokens, pair.into());
    }
    Ok(check)
}

impl AssemblySystem<'_> {
    /// The prompt of a question; none where the gate keeps it out.
    fn prompt<'h>(
        &self,
        item: &ResolvedItem,
        found: &'h [Hit],
    ) -> Result<Option<Box<Prompt<'h>>>, GenerateError> {
        let nonce = Nonce::derive(&[item.item.id.as_bytes(), self.index.index_hash().as_bytes()]);
        let asked = (&*item.item.question, found);
        match fit(self.generator, asked, self.gate, (self.policy, &nonce))? {
            Fitted::Prompt(prompt) => Ok(Some(prompt)),
            Fitted::Refused(_) => Ok(None),
        }
    }
}

/// Coverage of an item's evidence by these snippets (§1.2).
fn coverage(
    positions: &mut Positions<'_>,
    item: &ResolvedItem,
    hits: &[Hit],
) -> Result<Option<f64>, VerifyError> {
    let (anchor, sections) = (positions.anchor(item), positions.sections(item));
    let tokens = positions.chunks(hits.iter().map(|hit| &*hit.chunk))?;
    Ok(coverage_of(&anchor, &tokens, &tokens, &sections).value)
}

/// Replies; none where time or numbers ran out.
fn replies(
    generator: &dyn Generate,
    prompts: &[(&PromptFrame, u64)],
) -> Result<Vec<Option<Generated>>, GenerateError> {
    let replies = generator.generate_all(prompts).into_iter().map(|reply| match reply {
        Ok(reply) => Ok(Some(reply)),
        Err(error) if error.is_outcome() => Ok(None),
        Err(error) => Err(error),
    });
    replies.collect()
}

impl AssemblyCheck {
    fn add(&mut self, of: AssemblyObservation) {
        self.prompts += 1;
        self.unplaced += usize::from(of.slots.iter().any(Option::is_none));
        let known: Vec<[usize; 2]> = of.slots.iter().copied().flatten().collect();
        // Two slots of one message may share the token between them.
        let in_order =
            known.windows(2).all(|pair| pair[0][0] <= pair[1][0] && pair[0][1] <= pair[1][1]);
        self.reordered += usize::from(!in_order);
        self.cut += usize::from(of.coverage_prompt < of.coverage_found);
        self.observed.push(of);
    }
}

impl RepeatCheck {
    fn add(&mut self, id: &str, prompt_tokens: usize, replies: [Option<Generated>; 2]) {
        let read_tokens =
            [&replies[0], &replies[1]].map(|reply| reply.as_ref().map(|of| of.n_prompt_tokens));
        let texts = replies.map(|reply| reply.map_or_else(String::new, |of| of.text));
        self.pairs += 1;
        self.differ += usize::from(texts[0] != texts[1]);
        self.misread += read_tokens.iter().flatten().filter(|&&read| read != prompt_tokens).count();
        let id = id.to_owned();
        self.observed.push(RepeatObservation { id, texts, prompt_tokens, read_tokens });
    }
}
