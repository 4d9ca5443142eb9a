//! Questions to a collection: the engine and the index behind the traits of `verify`, so that the
//! server, the probes and the command line answer through one code path.
//!
//! Everything here blocks; the routes call it on a blocking thread.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    sync::Arc,
    time::Instant,
};

use exrail_engine::{
    EngineHandle, Event, Finish, Finished, GenerateRequest, Generation, LoopGuard, Priority,
    Sampling, SequenceFault, SubmitError,
};
use exrail_grammar::{Grammar, Source};
use exrail_retrieval::Hit;
use exrail_text::{ChatMessage, SlotTokens, Specials};
use exrail_verify::{
    AskOutcome, AskPolicy, Begun, CollectionIndex, DeltaSGate, EvidenceGate, FrameMessage,
    Generate, GenerateError, Generated, GeneratedEnd, GeneratorFacts, LiveChecker, LiveChecks,
    MAX_STEPS, Nonce, OfSchema, Placed, PromptFrame, Retrieve, RuleSet, SamplingKind, Slot,
    StepPolicy, answer_over, begin, cite_lark, conclude, retrieve, step_lark,
};
use exrail_wire::{Pins, StepRecord};
use serde_json::{Value, json};

use crate::{
    ENGINE_BUILD,
    baseline::EntropyBaseline,
    error::ApiError,
    generation::ms_since,
    ids, leak, rules, state,
    trace::TraceError,
    translate::{self, Slotted},
};

/// The sampling of grounded answers: nearly greedy, because the answer should be the evidence's, and
/// seeded, so that the same request gives the same answer.
#[must_use]
pub fn ask_sampling() -> Sampling {
    Sampling {
        temperature: 0.2,
        top_p: 0.9,
        // No repetition penalty: an answer should repeat the words of its evidence. At 1.1 the
        // default model's answers shared 37 % of their words with the evidence, without it 68 %.
        repetition_penalty: 1.0,
        seed: 1,
        ..Sampling::default()
    }
}

/// Tokens of a grounded answer when the request names no limit.
pub const ASK_MAX_TOKENS: usize = 128;

/// Snippets of a grounded answer when the request names no number.
pub const ASK_K: usize = 5;

/// A generator behind its chat template, with one profile of sampling.
pub struct EngineGenerate<'a> {
    engine: &'a EngineHandle,
    sampling: Sampling,
    max_tokens: usize,
    tenant: Option<String>,
    priority: Priority,
    deadline: Option<Instant>,
    hung_up: Option<flume::Receiver<Infallible>>,
    loop_guard: Option<LoopGuard>,
    prefix_cache: bool,
    lock: AnswerLock,
    /// Of all calls: submission to first token, and the engine's own account.
    taken: Cell<Option<Measured>>,
    /// Of the last prompt over evidence: first and last token of each slot, where they are known.
    slots: RefCell<Vec<Option<[usize; 2]>>>,
}

/// What one generation took, or several of one answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Submission of the first one to its first token.
    pub first_token_ms: Option<f64>,
    /// Waiting for a place in the batch.
    pub queue_ms: f64,
    /// Reading the prompt.
    pub prefill_ms: f64,
    /// Generating.
    pub decode_ms: f64,
    /// Mean next-token entropy in nats, if the engine measured it.
    pub entropy_mean: Option<f64>,
    /// Prompt tokens from the cache.
    pub cached_tokens: usize,
    /// Tokens that were generated.
    n_tokens: usize,
    /// From the first submission to the last end.
    pub(crate) during: Option<(Instant, Instant)>,
}

impl Measured {
    /// This generation and the next one together.
    fn and(self, next: Measured) -> Measured {
        Measured {
            first_token_ms: self.first_token_ms.or(next.first_token_ms),
            queue_ms: self.queue_ms + next.queue_ms,
            prefill_ms: self.prefill_ms + next.prefill_ms,
            decode_ms: self.decode_ms + next.decode_ms,
            entropy_mean: match (self.entropy_mean, next.entropy_mean) {
                (Some(before), Some(after)) => {
                    Some(weighted((before, self.n_tokens), (after, next.n_tokens)))
                }
                (before, after) => before.or(after),
            },
            cached_tokens: self.cached_tokens + next.cached_tokens,
            n_tokens: self.n_tokens + next.n_tokens,
            during: match (self.during, next.during) {
                (Some((from, _)), Some((_, to))) => Some((from, to)),
                (before, after) => before.or(after),
            },
        }
    }
}

/// The mean of two means of so many values.
#[expect(clippy::cast_precision_loss, reason = "answers are far below 2^52 tokens")]
fn weighted((a, n_a): (f64, usize), (b, n_b): (f64, usize)) -> f64 {
    let n = (n_a + n_b).max(1) as f64;
    (a * n_a as f64 + b * n_b as f64) / n
}

impl<'a> EngineGenerate<'a> {
    /// A generator with this profile; the seed is given per call.
    #[must_use]
    pub fn new(engine: &'a EngineHandle, sampling: Sampling, max_tokens: usize) -> Self {
        Self {
            engine,
            sampling,
            max_tokens,
            tenant: None,
            priority: Priority::default(),
            deadline: None,
            hung_up: None,
            loop_guard: Some(LoopGuard::default()),
            prefix_cache: true,
            lock: AnswerLock::default(),
            taken: Cell::new(None),
            slots: RefCell::default(),
        }
    }

    /// The same with the lock of answers on or off.
    #[must_use]
    pub fn locked(self, lock: AnswerLock) -> Self {
        Self { lock, ..self }
    }

    /// The same for who asks, as urgently as asked, on a route whose answers usually have so much entropy.
    #[must_use]
    pub fn for_call(self, call: &AskCall, entropy_baseline: Option<f32>) -> Self {
        let AskCall { tenant, priority, deadline, hung_up, loop_guard, prefix_cache, .. } =
            call.clone();
        let loop_guard =
            loop_guard.then_some(LoopGuard { entropy_baseline, ..LoopGuard::default() });
        Self { tenant, priority, deadline, hung_up, loop_guard, prefix_cache, ..self }
    }

    /// What all calls took together; none before the first one has ended.
    #[must_use]
    pub fn taken(&self) -> Option<Measured> {
        self.taken.get()
    }

    /// The tokens of each slot of the last prompt over evidence, where the template left it as it is.
    #[must_use]
    pub fn slots(&self) -> Vec<Option<[usize; 2]>> {
        self.slots.borrow().clone()
    }

    /// The next event; `None` when the engine is gone. Whoever hangs up takes the sequence along.
    fn next(&self, generation: &Generation) -> Result<Option<Event>, GenerateError> {
        let Some(hung_up) = &self.hung_up else { return Ok(generation.events.recv().ok()) };
        let event = flume::Selector::new()
            .recv(&generation.events, |event| Some(event.ok()))
            .recv(hung_up, |_| None)
            .wait();
        event.ok_or_else(|| engine_error(ApiError::HungUp))
    }

    /// What may be said, where that is locked.
    fn grammar(&self, source: Source) -> Result<Option<Grammar>, GenerateError> {
        match self.lock {
            AnswerLock::Off => Ok(None),
            AnswerLock::Enforce => {
                let compiler = self.engine.grammars().map_err(engine_error)?;
                let grammar = compiler.compile(&source);
                grammar.map(Some).map_err(engine_error)
            }
        }
    }

    /// What the model says to these messages, held to nothing.
    ///
    /// # Errors
    /// As [`Generate::generate`].
    pub fn say(&self, messages: &[FrameMessage], seed: u64) -> Result<Generated, GenerateError> {
        self.reply(self.prompt(messages)?, None, (self.max_tokens, seed))
    }

    fn reply(
        &self,
        prompt: Vec<u32>,
        grammar: Option<Grammar>,
        (max_tokens, seed): (usize, u64),
    ) -> Result<Generated, GenerateError> {
        let request = self.request(prompt, grammar, (max_tokens, seed));
        Pending::of(self.engine.submit(request).map_err(engine_error)?).finish(self)
    }

    fn request(
        &self,
        prompt: Vec<u32>,
        grammar: Option<Grammar>,
        (max_tokens, seed): (usize, u64),
    ) -> GenerateRequest {
        GenerateRequest {
            grammar,
            sampling: Sampling { seed, ..self.sampling.clone() },
            // The trace of a verified answer carries it.
            entropy: true,
            tenant: self.tenant.clone(),
            priority: self.priority,
            deadline: self.deadline,
            loop_guard: self.loop_guard,
            prefix_cache: self.prefix_cache,
            ..GenerateRequest::new(prompt, max_tokens)
        }
    }

    /// Hands a prompt over evidence to the engine. One that finds no place waits until those before it have ended: who
    /// asks several things at once is refused no sooner than who asks one after the other.
    fn hand_over(
        &self,
        (frame, seed): (&PromptFrame, u64),
        before: &mut [InFlight],
    ) -> Result<Pending, GenerateError> {
        let grammar = self.grammar(Source::Lark(cite_lark(frame.live())))?;
        let request = self.request(self.framed(frame)?, grammar, (self.max_tokens, seed));
        let mut waiting = before.iter_mut();
        loop {
            match self.engine.submit(request.clone()) {
                Ok(generation) => return Ok(Pending::of(generation)),
                Err(error @ (SubmitError::QueueFull { .. } | SubmitError::Overloaded { .. })) => {
                    let Some(oldest) = waiting.next() else { return Err(engine_error(error)) };
                    oldest.end(self);
                }
                Err(error) => return Err(engine_error(error)),
            }
        }
    }

    fn prompt(&self, messages: &[FrameMessage]) -> Result<Vec<u32>, GenerateError> {
        translate::chat_prompt(self.engine, &chat_messages(messages)).map_err(refused_or_failed)
    }

    /// A frame as the template writes it, with the place of each slot.
    fn slotted(&self, frame: &PromptFrame) -> Result<Slotted, GenerateError> {
        let bytes =
            |(_, message, bytes): &(Slot, usize, std::ops::Range<usize>)| (*message, bytes.clone());
        let slots: Vec<_> = frame.slots().iter().map(bytes).collect();
        let messages = chat_messages(frame.messages());
        let slotted = translate::slotted_prompt(self.engine, &messages, None, &slots);
        slotted.map_err(refused_or_failed)
    }

    /// The ids of a frame, whose slots stand in their order (G-12). Where a request has rules, all of the frame's are
    /// read back out of them (G-31).
    fn framed(&self, frame: &PromptFrame) -> Result<Vec<u32>, GenerateError> {
        let slotted = self.slotted(frame)?;
        if let Some((before, behind)) = translate::out_of_order(&slotted.slots) {
            let name = |at: usize| frame.slots().get(at).map_or("?", |(slot, ..)| slot.name());
            let problem = format!(
                "expected the slot {} behind {}, found it in front: the chat template puts the messages into another \
                 order",
                name(behind),
                name(before)
            );
            return Err(refused_or_failed(ApiError::PromptLint { rule: "slot_order", problem }));
        }
        if frame.is_locked() {
            let at = frame.slots().iter().position(|(slot, ..)| *slot == Slot::Constraints);
            let slot = at.and_then(|at| slotted.slots[at].as_ref());
            let (tokenizer, ids) = (self.engine.tokenizer(), &slotted.placed.ids);
            rules::echo(tokenizer, ids, slot, frame.constraints()).map_err(engine_error)?;
        }
        self.slots.replace(slotted.slots.iter().map(|slot| slot.as_ref().map(ends)).collect());
        Ok(slotted.placed.ids)
    }
}

/// One of several generations.
enum InFlight {
    /// Its events are to come.
    Running(Pending),
    /// What it gave.
    Ended(Result<Generated, GenerateError>),
}

impl InFlight {
    /// Waits for its end.
    fn end(&mut self, of: &EngineGenerate<'_>) {
        let lost = InFlight::Ended(Err(engine_error(ApiError::Lost)));
        *self = InFlight::Ended(std::mem::replace(self, lost).ended(of));
    }

    /// What it gave, when it has ended.
    fn ended(self, of: &EngineGenerate<'_>) -> Result<Generated, GenerateError> {
        match self {
            InFlight::Running(pending) => pending.finish(of),
            InFlight::Ended(result) => result,
        }
    }
}

/// A generation with what came of it so far.
struct Pending {
    generation: Generation,
    submitted: Instant,
    text: String,
    first_token_ms: Option<f64>,
    finished: Option<Finished>,
}

impl Pending {
    fn of(generation: Generation) -> Self {
        let submitted = Instant::now();
        Self { generation, submitted, text: String::new(), first_token_ms: None, finished: None }
    }

    /// Waits until the prompt is read, which the first token shows.
    fn read_prompt(&mut self, of: &EngineGenerate<'_>) -> Result<(), GenerateError> {
        while self.first_token_ms.is_none() && self.finished.is_none() {
            self.take(of)?;
        }
        Ok(())
    }

    /// Waits for the end.
    fn finish(self, of: &EngineGenerate<'_>) -> Result<Generated, GenerateError> {
        let (text, finished) = self.wait(of)?;
        generated(text, &finished)
    }

    /// Waits for the end; the text, and the engine's own account of it.
    fn wait(mut self, of: &EngineGenerate<'_>) -> Result<(String, Finished), GenerateError> {
        loop {
            if let Some(finished) = self.finished {
                let this = measured(self.first_token_ms, &finished, self.submitted);
                of.taken.set(Some(of.taken.get().map_or(this, |before| before.and(this))));
                return Ok((self.text, finished));
            }
            self.take(of)?;
        }
    }

    /// Takes the next event.
    fn take(&mut self, of: &EngineGenerate<'_>) -> Result<(), GenerateError> {
        match of.next(&self.generation)? {
            Some(Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. }) => Ok(()),
            Some(Event::Token(token)) => {
                self.first_token_ms.get_or_insert_with(|| ms_since(self.submitted));
                self.text.push_str(&token.text);
                Ok(())
            }
            Some(Event::Tail(tail)) => {
                self.text.push_str(&tail);
                Ok(())
            }
            Some(Event::Finished(finished)) => {
                self.finished = Some(finished);
                Ok(())
            }
            Some(Event::Failed(SequenceFault::NumericFault { step })) => {
                Err(GenerateError::Numeric { step })
            }
            Some(Event::Failed(fault)) => Err(engine_error(ApiError::from(fault))),
            None => Err(engine_error(ApiError::Lost)),
        }
    }
}

fn chat_messages(messages: &[FrameMessage]) -> Vec<ChatMessage> {
    messages.iter().map(|m| ChatMessage::new(m.role, m.content.clone())).collect()
}

/// First token of a slot and one past its last.
fn ends(slot: &SlotTokens) -> [usize; 2] {
    [slot.tokens.start, slot.tokens.end]
}

/// A prompt that a guard refuses is what one question came to; everything else is a failure.
fn refused_or_failed(error: ApiError) -> GenerateError {
    if matches!(error, ApiError::PromptLint { .. }) {
        GenerateError::Refused(Box::new(error))
    } else {
        engine_error(error)
    }
}

fn engine_error(error: impl std::error::Error + Send + Sync + 'static) -> GenerateError {
    GenerateError::Engine(Box::new(error))
}

/// Whether a grounded answer is locked to its grammar (G-15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnswerLock {
    /// Only what [`cite_lark`] allows can be sampled.
    #[default]
    Enforce,
    /// Any text. For the mutation tests, which show what the lock holds back.
    Off,
}

impl Generate for EngineGenerate<'_> {
    fn generate(&self, prompt: &PromptFrame, seed: u64) -> Result<Generated, GenerateError> {
        let grammar = self.grammar(Source::Lark(cite_lark(prompt.live())))?;
        self.reply(self.framed(prompt)?, grammar, (self.max_tokens, seed))
    }

    /// All of them are in the engine at once. The first one goes ahead until its prompt is read: from then on the pages
    /// that the others have in common with it are found, and not computed again.
    fn generate_all(
        &self,
        prompts: &[(&PromptFrame, u64)],
    ) -> Vec<Result<Generated, GenerateError>> {
        let mut all: Vec<InFlight> = Vec::with_capacity(prompts.len());
        for &prompt in prompts {
            let handed_over = self.hand_over(prompt, &mut all);
            all.push(
                handed_over.map_or_else(|error| InFlight::Ended(Err(error)), InFlight::Running),
            );
            if let [InFlight::Running(first)] = &mut all[..]
                && let Err(error) = first.read_prompt(self)
            {
                all[0] = InFlight::Ended(Err(error));
            }
        }
        all.into_iter().map(|one| one.ended(self)).collect()
    }

    /// The copy-on-write checkpoint of a step (G-20) is what the prefix cache holds of the prompt and the steps that
    /// stand: whole pages, which the next draw shares and never writes to; what it says goes to pages of its own, and
    /// nobody reads those of a step that was taken back. What does not fill a page is computed anew.
    fn generate_step(
        &self,
        prompt: &PromptFrame,
        so_far: &str,
        seed: u64,
    ) -> Result<Generated, GenerateError> {
        let mut ids = self.framed(prompt)?;
        let n_frame = ids.len();
        if !so_far.is_empty() {
            let said = self.engine.tokenizer().encode(so_far, Specials::AsText);
            ids.extend(said.map_err(engine_error)?);
        }
        // One budget for the whole answer; what was taken back is not in it.
        let left = self.max_tokens.saturating_sub(ids.len() - n_frame);
        if left == 0 && !so_far.is_empty() {
            return Ok(Generated {
                text: String::new(),
                end: GeneratedEnd::Length,
                n_prompt_tokens: 0,
                n_output_tokens: 0,
                n_cached_tokens: 0,
            });
        }
        let grammar = self.grammar(Source::Lark(step_lark(prompt.live(), so_far)))?;
        self.reply(ids, grammar, (left, seed))
    }

    fn generate_of_schema(
        &self,
        messages: &[FrameMessage],
        schema: &Value,
        seed: u64,
    ) -> Result<OfSchema, GenerateError> {
        let grammar = self.grammar(Source::JsonSchema(schema.clone()))?;
        let request = self.request(self.prompt(messages)?, grammar, (self.max_tokens, seed));
        let pending = Pending::of(self.engine.submit(request).map_err(engine_error)?);
        let (text, finished) = pending.wait(self)?;
        let allowed = finished.constrained.map(|of| f64::from(of.allowed_mass_min));
        Ok(OfSchema { text, allowed_mass_min: allowed })
    }

    fn place(&self, prompt: &PromptFrame) -> Result<Placed, GenerateError> {
        let Slotted { placed, slots, .. } = self.slotted(prompt)?;
        let slots = slots.iter().map(|slot| slot.as_ref().map(ends)).collect();
        Ok(Placed { n_tokens: placed.ids.len(), slots })
    }

    fn count_tokens(&self, messages: &[FrameMessage]) -> Result<usize, GenerateError> {
        Ok(self.prompt(messages)?.len())
    }

    fn token_ends(&self, text: &str) -> Result<Vec<usize>, GenerateError> {
        leak::token_ends(self.engine, text).map_err(engine_error)
    }

    fn prompt_limit(&self) -> usize {
        self.engine.facts().context.saturating_sub(self.max_tokens)
    }

    fn facts(&self) -> Result<GeneratorFacts, GenerateError> {
        let facts = self.engine.facts();
        let pins = state::pins(self.engine).map_err(engine_error)?;
        Ok(GeneratorFacts {
            model: facts.model_name.clone(),
            model_fp: pins.model_fp,
            tok_fp: pins.tok_fp,
            template_hash: pins.template_hash.unwrap_or_default(),
            engine_build: pins.engine_build,
            quant: pins.quant,
            kv_dtype: pins.kv_dtype,
            device: facts.backend.clone(),
            sampling: if self.sampling.temperature > 0.0 {
                SamplingKind::Seeded
            } else {
                SamplingKind::Greedy
            },
        })
    }
}

fn measured(first_token_ms: Option<f64>, finished: &Finished, submitted: Instant) -> Measured {
    Measured {
        first_token_ms,
        queue_ms: finished.timings.queue_ms,
        prefill_ms: finished.timings.prefill_ms,
        decode_ms: finished.timings.decode_ms,
        entropy_mean: finished.entropy_mean.map(f64::from),
        cached_tokens: finished.usage.cached_tokens,
        n_tokens: finished.usage.completion_tokens,
        during: Some((submitted, Instant::now())),
    }
}

fn generated(text: String, finished: &Finished) -> Result<Generated, GenerateError> {
    let was_closed = finished.constrained.is_some_and(|constrained| constrained.n_closing > 0);
    let end = match finished.finish {
        Finish::Stop | Finish::Length if was_closed => GeneratedEnd::Closed,
        Finish::Stop => GeneratedEnd::Stop,
        // Whole sentences stay, as of an answer that is cut without a grammar.
        Finish::Length | Finish::SchemaIncomplete => GeneratedEnd::Length,
        Finish::Degenerate => GeneratedEnd::Looped,
        // Nobody but this function holds the generation, and it never rotates: its prompt is the evidence.
        Finish::RotationRequired | Finish::Cancelled => return Err(engine_error(ApiError::Lost)),
    };
    Ok(Generated {
        text,
        end,
        n_prompt_tokens: finished.usage.prompt_tokens,
        n_output_tokens: finished.usage.completion_tokens,
        n_cached_tokens: finished.usage.cached_tokens,
    })
}

/// What questions to one collection need besides a generator. It stays when the generator goes.
pub struct Grounds {
    index: CollectionIndex,
    gate: EvidenceGate,
    gate_note: String,
    live: LiveChecker,
    policy: AskPolicy,
    /// Keys the fences: unguessable from outside, the same for the same question, so that asking
    /// twice is a repeat.
    fence_secret: u64,
}

/// Answers questions from one collection.
pub struct Asker {
    engine: EngineHandle,
    grounds: Arc<Grounds>,
    /// Of this collection's answers since the generator was loaded.
    entropy: EntropyBaseline,
}

/// One question.
#[derive(Clone, Debug)]
pub struct AskCall {
    /// Snippets to put into the prompt.
    pub k: usize,
    /// Limit on generated tokens.
    pub max_tokens: usize,
    /// How to sample; its seed is used.
    pub sampling: Sampling,
    /// Who asks, see [`GenerateRequest::tenant`].
    pub tenant: Option<String>,
    /// Before which of the same tenant's requests.
    pub priority: Priority,
    /// When the answer must be there, see [`GenerateRequest::deadline`].
    pub deadline: Option<Instant>,
    /// Disconnects when nobody waits for the answer any more; its sequence then ends.
    pub hung_up: Option<flume::Receiver<Infallible>>,
    /// Whether the answer is cut when it goes round in a circle (G-19).
    pub loop_guard: bool,
    /// Whether cached prefixes are read and left for others.
    pub prefix_cache: bool,
    /// Hard rules that the answer must keep (G-31).
    pub rules: Option<Arc<RuleSet>>,
    /// Most steps of an answer that is made step by step, 1 to [`MAX_STEPS`]; none: it is one reply (G-20).
    pub steps: Option<usize>,
}

impl Default for AskCall {
    fn default() -> Self {
        Self {
            k: ASK_K,
            max_tokens: ASK_MAX_TOKENS,
            sampling: ask_sampling(),
            tenant: None,
            priority: Priority::default(),
            deadline: None,
            hung_up: None,
            loop_guard: true,
            prefix_cache: true,
            rules: None,
            steps: None,
        }
    }
}

/// What one question got, with what it took.
#[derive(Debug)]
pub struct Asked {
    /// The decision.
    pub outcome: AskOutcome,
    /// What was checked of it.
    pub checks: LiveChecks,
    /// Everything that was found, best first; the evidence is a prefix of it.
    pub found: Vec<Hit>,
    /// Milliseconds of the search.
    pub retrieve_ms: f64,
    /// Milliseconds of search and decision.
    pub total_ms: f64,
    /// What the generation took; none when nothing was generated.
    pub measured: Option<Measured>,
    /// First token of each slot of the prompt and one past its last, where they are known; empty when nothing was
    /// generated.
    pub slots: Vec<Option<[usize; 2]>>,
    /// Whether the answer was to be made step by step.
    in_steps: bool,
}

impl Asked {
    /// Every step that was drawn, as it is told and recorded; none of an answer that was to be made whole.
    #[must_use]
    pub fn steps(&self) -> Option<Vec<StepRecord>> {
        self.in_steps.then(|| self.outcome.step_records())
    }
}

/// What a question found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Best first.
    pub hits: Vec<Hit>,
    /// Milliseconds of the search.
    pub retrieve_ms: f64,
}

/// Largest number of snippets of one prompt.
pub const MAX_K: usize = 50;

impl Asker {
    /// An asker; the note says where the gate's calibration came from, or why there is none.
    ///
    /// # Errors
    /// The system gave no random bytes.
    pub fn new(
        engine: EngineHandle,
        index: CollectionIndex,
        gate: (EvidenceGate, String),
        live: LiveChecker,
    ) -> Result<Self, ApiError> {
        Ok(Self::on(engine, Arc::new(Grounds::new(index, gate, live)?)))
    }

    /// The same collection for another generator.
    #[must_use]
    pub fn on(engine: EngineHandle, grounds: Arc<Grounds>) -> Self {
        Self { engine, grounds, entropy: EntropyBaseline::default() }
    }

    /// What stays when the generator goes.
    #[must_use]
    pub fn grounds(&self) -> &Arc<Grounds> {
        &self.grounds
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &CollectionIndex {
        &self.grounds.index
    }

    /// Answers a question, or refuses with the exact token.
    ///
    /// # Errors
    /// As [`Asker::find`] and [`Asker::answer`].
    pub fn ask(&self, question: &str, call: &AskCall) -> Result<Asked, ApiError> {
        self.answer(question, self.find(question, call)?, call)
    }

    /// What the collection holds for a question.
    ///
    /// # Errors
    /// The index failed, or an option is out of range.
    pub fn find(&self, question: &str, call: &AskCall) -> Result<Found, ApiError> {
        let policy = self.policy(call)?;
        let begun = Instant::now();
        let hits = retrieve(&self.grounds.index, question, &policy)
            .map_err(|error| ApiError::Search(error.to_string()))?;
        Ok(Found { hits, retrieve_ms: ms_since(begun) })
    }

    /// How this question is answered.
    fn policy(&self, call: &AskCall) -> Result<AskPolicy, ApiError> {
        let options = [("k", Some(call.k), MAX_K), ("steps", call.steps, MAX_STEPS)];
        for (field, found, most) in options {
            if let Some(found) = found.filter(|found| !(1..=most).contains(found)) {
                let problem = format!("expected 1 to {most}, found {found}");
                return Err(ApiError::BadField { field: field.into(), problem });
            }
        }
        let mut policy = self.grounds.policy.clone();
        policy.search.k = call.k;
        policy.rules.clone_from(&call.rules);
        policy.steps = call.steps.map(StepPolicy::new);
        Ok(policy)
    }

    /// Answers a question from what it found, or refuses with the exact token.
    ///
    /// # Errors
    /// The generator failed, or an option is out of range.
    pub fn answer(&self, question: &str, found: Found, call: &AskCall) -> Result<Asked, ApiError> {
        let (policy, begun) = (self.policy(call)?, Instant::now());
        let Grounds { gate, fence_secret, .. } = &*self.grounds;
        let Found { hits: found, retrieve_ms } = found;
        let nonce = Nonce::derive(&[&fence_secret.to_le_bytes(), question.as_bytes()]);
        let seed = call.sampling.seed;
        let generator = EngineGenerate::new(&self.engine, call.sampling.clone(), call.max_tokens)
            .for_call(call, self.entropy.nats());
        let outcome = answer_over(&generator, question, &found, gate, (&policy, &nonce, seed))
            .map_err(ask_error)?;
        let checks = self.grounds.live.check(&outcome, policy.min_containment);
        let (total_ms, measured) = (retrieve_ms + ms_since(begun), generator.taken());
        let has_ended = outcome.reply.as_ref().is_some_and(|reply| reply.end == GeneratedEnd::Stop);
        if let Some(nats) = measured.and_then(|m| m.entropy_mean).filter(|_| has_ended) {
            self.entropy.note(nats);
        }
        let slots = generator.slots();
        let in_steps = policy.steps.is_some();
        Ok(Asked { outcome, checks, found, retrieve_ms, total_ms, measured, slots, in_steps })
    }

    /// Every pin of an answer from this collection; blocks while the model's hash runs.
    ///
    /// # Errors
    /// The hash failed.
    pub fn pins(&self) -> Result<Pins, TraceError> {
        Ok(Pins {
            encoder_fp: Some(self.index().encoder_fp().into()),
            index_hash: Some(self.index().index_hash().into()),
            ..state::pins(&self.engine)?
        })
    }
}

impl Grounds {
    /// What a collection is asked with; the note says where the gate's calibration came from, or why there is none.
    ///
    /// # Errors
    /// The system gave no random bytes.
    pub fn new(
        index: CollectionIndex,
        (gate, gate_note): (EvidenceGate, String),
        live: LiveChecker,
    ) -> Result<Self, ApiError> {
        let (policy, fence_secret) = (AskPolicy::default(), ids::seed()?);
        Ok(Self { index, gate, gate_note, live, policy, fence_secret })
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &CollectionIndex {
        &self.index
    }

    /// Decides about a reply that was not generated here, as about one that was: for measurements of what is done
    /// beside a generation. None where the gate keeps the question out.
    #[must_use]
    pub fn decide(&self, question: &str, found: Vec<Hit>, reply: Generated) -> Option<Asked> {
        let nonce = Nonce::derive(&[question.as_bytes()]);
        let Begun::Prompt { frame, gate } = begin(question, &found, &self.gate, (None, &nonce))
        else {
            return None;
        };
        let outcome = conclude(&frame, &found, gate, reply, &self.policy);
        let checks = self.live.check(&outcome, self.policy.min_containment);
        Some(Asked {
            outcome,
            checks,
            found,
            retrieve_ms: 0.0,
            total_ms: 0.0,
            measured: None,
            slots: Vec::new(),
            in_steps: false,
        })
    }

    /// Calibrated ΔS of one hit, where there is a calibration.
    pub(crate) fn calibrated(&self, hit: &Hit) -> Option<f64> {
        let raw = (1.0 - f64::from(hit.cosine)).clamp(0.0, 2.0);
        match self.gate.delta_s() {
            DeltaSGate::Calibrated(calibration) | DeltaSGate::ReportOnly(calibration) => {
                Some(calibration.map(raw))
            }
            DeltaSGate::NotCalibrated => None,
        }
    }

    /// The collection for people: sizes, hashes, the state of its gate.
    #[must_use]
    pub fn describe(&self, name: &str) -> Value {
        json!({
            "name": name,
            "chunks": self.index.n_chunks(),
            "documents": self.index.doc_ids().len(),
            "index_hash": self.index.index_hash(),
            "encoder_fp": self.index.encoder_fp(),
            "delta_s_gate": self.gate_note,
            "engine_build": ENGINE_BUILD,
        })
    }
}

fn ask_error(error: GenerateError) -> ApiError {
    match error {
        GenerateError::Numeric { step } => SequenceFault::NumericFault { step }.into(),
        GenerateError::PromptTooLong { tokens, limit } => {
            SubmitError::PromptTooLong { tokens, limit }.into()
        }
        // A refusal keeps its own status: a full queue is a 429, not a 500.
        GenerateError::Engine(source) | GenerateError::Refused(source) => {
            match source.downcast::<SubmitError>() {
                Ok(refused) => (*refused).into(),
                Err(source) => match source.downcast::<ApiError>() {
                    Ok(own) => *own,
                    Err(source) => ApiError::Ask(source.to_string()),
                },
            }
        }
        other @ (GenerateError::TimedOut { .. } | _) => ApiError::Ask(other.to_string()),
    }
}

#[cfg(test)]
mod tests;
