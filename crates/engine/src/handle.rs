//! The engine seen from outside: start it, submit to it, read it, stop it.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use exrail_checkpoint::DecoderConfig;
use exrail_grammar::{Compiler, GrammarError, Limits, Vocabulary};
use exrail_kernels::{Backend, DeviceCounters, KvDtype, PAGE_TOKENS};
use exrail_model::kv_shape;
use exrail_text::{ChatTemplate, Tokenizer};

use crate::constraint::Constraint;
use crate::counters::{Counters, EngineState, Gauges};
use crate::error::{EngineError, ScoreError, SubmitError};
use crate::event::{Event, Generation, SequenceFault, SequenceId};
use crate::faults::{FaultBoard, FaultPlan};
use crate::fingerprint::ModelFingerprint;
use crate::load::Loaded;
use crate::pace::STEP_TARGET;
use crate::places::{Left, PlaceLimits};
use crate::queue::Queued;
use crate::request::GenerateRequest;
use crate::rotation::{Lengths, RotatePolicy, RotationOptions, RotationPlan};
use crate::sequence::{Job, Scoring, Traffic, Waiting};
use crate::session::PageCommand;
use crate::worker::Worker;

/// Bytes of KV cache that the default page count stays within, one full context at least.
const DEFAULT_KV_BYTES: usize = 1 << 30;

/// Sizes that are fixed when the engine starts. Nothing on the device grows later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Sequences that run at once, 1 to 1024. Each costs one decode row a step.
    pub max_sequences: usize,
    /// Pages of the KV pool (256 positions each). `None`: what `max_sequences` full contexts need,
    /// at most 1 GiB but one full context at least.
    pub kv_pages: Option<usize>,
    /// Longest prompt plus answer in tokens; `None` is the model's trained context, or the whole
    /// pool if `kv_pages` is smaller than that.
    pub max_context: Option<usize>,
    /// Most prompt rows a step, at least 1: the bound on how long a prompt delays running answers.
    pub prefill_chunk: usize,
    /// Time that a step with prompt rows is to take at most, where the device computes in the engine's own
    /// thread: chunks are cut to what fits at the measured pace. Between two steps cancels, deadlines and
    /// new requests are seen. `None`: whole chunks.
    pub step_target: Option<Duration>,
    /// Element type of the KV cache.
    pub kv_dtype: KvDtype,
    /// Requests that may wait, at least 1; more are refused.
    pub queue_limit: usize,
    /// Requests of one tenant that may wait, at least 1; `None`: as many as of all.
    pub tenant_queue_limit: Option<usize>,
    /// Whether prompts that begin alike share the pages of their beginning.
    pub prefix_cache: bool,
    /// Bytes of the host's memory for pages that must make room on the device; 0: they are given up. Taken from
    /// the system when the engine starts. Off unless asked for: a CPU's pool is in that memory already, and
    /// beside a GPU nobody else says how much of it is free.
    pub kv_host_bytes: usize,
    /// Steps between two audits of the whole page pool, at least 1. The pages of the batch are checked
    /// before every step, whatever this says.
    pub kv_audit_every: u64,
    /// Whether the pages of the batch are checked before every step, all pages are audited, and what the device
    /// builds is compared with its fence. `false` measures what that costs; whoever answers others keeps it.
    pub guards: bool,
    /// Numbers for what the rotation of a request leaves open. The policy is each request's own; this one is
    /// for who makes requests.
    pub rotation: RotationOptions,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            max_sequences: 16,
            kv_pages: None,
            max_context: None,
            prefill_chunk: 256,
            step_target: Some(STEP_TARGET),
            kv_dtype: KvDtype::F16,
            queue_limit: 256,
            tenant_queue_limit: None,
            prefix_cache: true,
            kv_host_bytes: 0,
            kv_audit_every: if cfg!(debug_assertions) { 1 } else { 1024 },
            guards: true,
            rotation: RotationOptions {
                policy: RotatePolicy::Reprefill,
                ..RotationOptions::default()
            },
        }
    }
}

/// What is true of a running engine for its whole life.
#[derive(Clone, Debug)]
pub struct EngineFacts {
    /// Name in the model file, or its file name.
    pub model_name: String,
    /// Hex sha256 of the model's files; the hash may still run. It ends when the engine does.
    pub model_sha256: ModelFingerprint,
    /// Storage format of most weights, such as `Q4_1`.
    pub quant: String,
    /// Device and kernels.
    pub backend: String,
    /// Tokens of the vocabulary.
    pub vocab_len: usize,
    /// Longest prompt plus answer in tokens.
    pub context: usize,
    /// Element type of the KV cache.
    pub kv_dtype: KvDtype,
    /// Pages of the KV pool.
    pub kv_pages: usize,
    /// Bytes of the KV pool.
    pub kv_bytes: usize,
    /// The options as resolved.
    pub options: EngineOptions,
}

/// A message to the engine thread.
#[derive(Debug)]
pub(crate) enum Command {
    Submit(Waiting),
    /// Sequences that begin in one step, as far as there is room.
    SubmitTogether(Vec<Waiting>),
    Cancel(SequenceId),
    /// The device may build what it needs, until the fence is closed.
    OpenFence,
    /// It is to build nothing from here on; answered when that holds.
    CloseFence(flume::Sender<DeviceCounters>),
    /// Of sessions, which read and fill the cache.
    Pages(PageCommand),
    /// Injects faults from here on.
    Inject(FaultPlan),
    Shutdown,
}

impl Command {
    /// The sequences that come with it.
    pub(crate) fn submitted(self) -> Vec<Waiting> {
        match self {
            Command::Submit(waiting) => vec![waiting],
            Command::SubmitTogether(waiting) => waiting,
            Command::Cancel(_)
            | Command::OpenFence
            | Command::CloseFence(_)
            | Command::Pages(_)
            | Command::Inject(_)
            | Command::Shutdown => Vec::new(),
        }
    }
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Allocates scratch and KV pool and starts the thread that owns them.
    ///
    /// # Errors
    /// An option that cannot be honoured, a device without the memory, or no thread.
    pub fn start<B: Backend>(
        loaded: Loaded<B>,
        options: EngineOptions,
    ) -> Result<EngineHandle, EngineError> {
        let facts = resolve(&loaded, options)?;
        let (commands, receiver) = flume::unbounded();
        let (alive, stopped) = flume::bounded(0);
        let gauges = Arc::new(Gauges::new(facts.kv_pages));
        let shared = Arc::new(Shared {
            facts,
            gauges: Arc::clone(&gauges),
            tokenizer: Arc::clone(&loaded.tokenizer),
            template: loaded.template.clone(),
            grammars: Grammars::default(),
            next_id: AtomicU64::new(0),
            stopped,
        });
        let worker = Worker::new(loaded, &shared.facts, receiver, gauges)?;
        std::thread::Builder::new()
            .name("exrail-engine".to_owned())
            .spawn(move || worker.run(alive))
            .map_err(EngineError::Thread)?;
        Ok(EngineHandle { commands, shared })
    }
}

/// The compiler of grammars, made when somebody asks for it first.
#[derive(Default)]
struct Grammars(OnceLock<Result<Arc<Compiler>, GrammarError>>);

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("is_made", &self.0.get().is_some()).finish()
    }
}

#[derive(Debug)]
struct Shared {
    facts: EngineFacts,
    gauges: Arc<Gauges>,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    grammars: Grammars,
    next_id: AtomicU64,
    /// Disconnects when the thread has ended.
    stopped: flume::Receiver<std::convert::Infallible>,
}

/// A way to talk to a running engine; cheap to clone. The thread ends after
/// [`EngineHandle::shutdown`], or when the last handle and generation are gone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: flume::Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Queues a sequence. Nothing of a refused request is kept.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        let (job, events) = self.job(request)?;
        let id = self.enqueue(job)?;
        Ok(Generation { id, events, commands: self.commands.clone() })
    }

    /// Queues sequences that warm the engine and begin together, whatever the limit of the queue, and with each
    /// how many of its first tokens are not computed.
    pub(crate) fn warm(
        &self,
        requests: Vec<(GenerateRequest, usize)>,
    ) -> Result<Vec<Generation>, SubmitError> {
        let job = |(request, blank)| Ok((self.job(request)?, blank));
        let jobs: Vec<_> = requests.into_iter().map(job).collect::<Result<_, SubmitError>>()?;
        let (mut waiting, mut generations) = (Vec::new(), Vec::new());
        for ((job, events), blank) in jobs {
            let waits = self.wait(job, Traffic::WarmUp, PlaceLimits::NONE)?;
            generations.push(Generation { id: waits.id, events, commands: self.commands.clone() });
            waiting.push(Waiting { blank, ..waits });
        }
        self.send(Command::SubmitTogether(waiting))?;
        Ok(generations)
    }

    /// What the engine's thread gets of a request, and where its events come out.
    fn job(&self, request: GenerateRequest) -> Result<(Job, flume::Receiver<Event>), SubmitError> {
        request.validate(self.shared.facts.vocab_len)?;
        self.refuse_foreign_grammar(&request)?;
        let rotation = self.rotation(&request)?;
        if rotation.is_none() {
            self.check_lengths(request.prompt.len(), request.max_tokens)?;
        }
        let (sender, events) = flume::unbounded();
        let constraint = Constraint::of(&request);
        let request = Box::new(request);
        Ok((Job::Generate { request, constraint, rotation, events: sender }, events))
    }

    /// A grammar is of token ids: over those of another tokenizer its masks let through what it forbids, and
    /// nothing would tell.
    fn refuse_foreign_grammar(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        let Some(grammar) = &request.grammar else { return Ok(()) };
        let expected = self.shared.tokenizer.fingerprint();
        let found = grammar.vocabulary_fingerprint();
        if found == expected {
            return Ok(());
        }
        let [expected, found] = [expected, found].map(str::to_owned);
        Err(SubmitError::ForeignGrammar { expected, found })
    }

    fn rotation(&self, request: &GenerateRequest) -> Result<Option<RotationPlan>, SubmitError> {
        let lengths = Lengths {
            prompt: request.prompt.len(),
            max_tokens: request.max_tokens,
            has_bos: request.prompt.first().copied() == self.shared.tokenizer.bos(),
            context: self.shared.facts.context,
            usual: self.shared.facts.options.rotation,
        };
        RotationPlan::of(&request.rotation, lengths)
    }

    /// Most tokens that can follow a prompt of this length without a rotation; 0 if the prompt is too long.
    #[must_use]
    pub fn max_new_tokens(&self, prompt_tokens: usize) -> usize {
        self.shared.facts.context.saturating_sub(prompt_tokens)
    }

    /// Teacher-forced logits: calls `visit` with each position and its row `(V,)` in order; row i
    /// predicts token i + 1. Rows that the caller has not visited yet are queued, 4 V bytes each.
    ///
    /// # Errors
    /// The ids are refused, or the engine gives the sequence up. Unlike a generation, scoring
    /// passes non-finite logits through.
    pub fn score(
        &self,
        ids: Vec<u32>,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ScoreError> {
        let n_rows = ids.len();
        let rows = self.scored(ids, Scoring::Chunks)?;
        for position in 0..n_rows {
            visit(position, &next_row(&rows)?);
        }
        Ok(())
    }

    /// [`EngineHandle::score`] of a sequence that is fed token by token, as an answer is: calls `visit` with
    /// the position and the row `(V,)` of each `every`th token only, the first at position `every − 1`.
    ///
    /// # Errors
    /// As [`EngineHandle::score`].
    pub fn score_steps(
        &self,
        ids: Vec<u32>,
        every: NonZeroUsize,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ScoreError> {
        let (n_tokens, every) = (ids.len(), every.get());
        let rows = self.scored(ids, Scoring::Steps { every })?;
        for n_fed in (every..=n_tokens).step_by(every) {
            visit(n_fed - 1, &next_row(&rows)?);
        }
        Ok(())
    }

    /// The row `(V,)` behind these tokens, read as a prompt that nothing is known of: the cache's prefixes
    /// have no part in it.
    ///
    /// # Errors
    /// As [`EngineHandle::score`].
    pub fn next_logits(&self, ids: Vec<u32>) -> Result<Vec<f32>, ScoreError> {
        Ok(next_row(&self.scored(ids, Scoring::Last)?)?)
    }

    /// The rows of a score, as they come.
    fn scored(&self, ids: Vec<u32>, scoring: Scoring) -> Result<ScoredRows, ScoreError> {
        let (tokens, limit) = (ids.len(), self.shared.facts.context);
        GenerateRequest::new(ids.clone(), 1).validate(self.shared.facts.vocab_len)?;
        if tokens > limit {
            return Err(SubmitError::PromptTooLong { tokens, limit }.into());
        }
        let (rows, receiver) = flume::unbounded();
        self.enqueue(Job::Score { ids, scoring, rows })?;
        Ok(receiver)
    }

    /// [`EngineHandle::score`] with all rows kept: `(ids, V)`.
    ///
    /// # Errors
    /// As [`EngineHandle::score`].
    pub fn forward_logits(&self, ids: Vec<u32>) -> Result<Vec<Vec<f32>>, ScoreError> {
        let mut rows = Vec::with_capacity(ids.len());
        self.score(ids, &mut |_, row| rows.push(row.to_vec()))?;
        Ok(rows)
    }

    /// Numbers of this moment.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.gauges.snapshot()
    }

    /// Injects faults by a plan from here on; in a build without feature `faults` nothing happens.
    pub fn inject(&self, plan: FaultPlan) {
        drop(self.commands.send(Command::Inject(plan))); // a stopped engine has no steps to disturb
    }

    /// What was injected, and what was caught of it.
    #[must_use]
    pub fn faults(&self) -> &Arc<FaultBoard> {
        self.shared.gauges.faults()
    }

    /// Lets the device build what it needs without a word.
    pub(crate) fn open_fence(&self) {
        drop(self.commands.send(Command::OpenFence)); // a stopped engine builds nothing
    }

    /// Closes the warm-up fence and says what the device has built by then; `None` of a stopped engine.
    pub(crate) fn close_fence(&self) -> Option<DeviceCounters> {
        let (sender, built) = flume::bounded(1);
        self.commands.send(Command::CloseFence(sender)).ok()?;
        built.recv().ok()
    }

    /// Hands over what takes no place in the queue.
    pub(crate) fn command(&self, command: Command) -> Result<(), SubmitError> {
        self.commands.send(command).map_err(|_| SubmitError::Stopped)
    }

    /// What does not change.
    #[must_use]
    pub fn facts(&self) -> &EngineFacts {
        &self.shared.facts
    }

    /// The model's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.shared.tokenizer
    }

    /// The model's chat template, if its file has one.
    #[must_use]
    pub fn template(&self) -> Option<&Arc<ChatTemplate>> {
        self.shared.template.as_ref()
    }

    /// The compiler of grammars over this model's vocabulary. The first call makes it, for which the
    /// whole vocabulary is read: never call it first where somebody waits for a step.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`], the same each time: no answer of this model can be constrained.
    pub fn grammars(&self) -> Result<&Arc<Compiler>, GrammarError> {
        let make = || {
            let vocabulary = Vocabulary::new(&self.shared.tokenizer)?;
            Compiler::new(vocabulary, Limits::default()).map(Arc::new)
        };
        self.shared.grammars.0.get_or_init(make).as_ref().map_err(Clone::clone)
    }

    /// Fails every sequence with [`SequenceFault::Stopped`] and waits for the thread to end, which
    /// takes at most the step in progress. Weights and KV pool are given back then.
    pub fn shutdown(&self) {
        drop(self.commands.send(Command::Shutdown)); // already stopped is fine
        match self.shared.stopped.recv() {
            Ok(never) => match never {},
            Err(flume::RecvError::Disconnected) => {}
        }
    }

    /// [`EngineHandle::shutdown`] that waits no longer than this. False: a step hangs, and holds the memory.
    #[must_use]
    pub fn shutdown_within(&self, limit: Duration) -> bool {
        drop(self.commands.send(Command::Shutdown)); // already stopped is fine
        match self.shared.stopped.recv_timeout(limit) {
            Ok(never) => match never {},
            Err(flume::RecvTimeoutError::Disconnected) => true,
            Err(flume::RecvTimeoutError::Timeout) => false,
        }
    }

    fn check_lengths(&self, prompt_tokens: usize, max_tokens: usize) -> Result<(), SubmitError> {
        let context = self.shared.facts.context;
        if prompt_tokens >= context {
            return Err(SubmitError::PromptTooLong { tokens: prompt_tokens, limit: context - 1 });
        }
        let limit = context - prompt_tokens;
        if max_tokens > limit {
            return Err(SubmitError::TooManyTokens { prompt_tokens, max_tokens, limit });
        }
        Ok(())
    }

    fn enqueue(&self, job: Job) -> Result<SequenceId, SubmitError> {
        let options = &self.shared.facts.options;
        let all = options.queue_limit;
        let limits = PlaceLimits { all, tenant: options.tenant_queue_limit.unwrap_or(all) };
        let waiting = self.wait(job, Traffic::User, limits)?;
        let id = waiting.id;
        self.send(Command::Submit(waiting))?;
        Ok(id)
    }

    /// Takes a place in the queue.
    fn wait(
        &self,
        job: Job,
        traffic: Traffic,
        limits: PlaceLimits,
    ) -> Result<Waiting, SubmitError> {
        let gauges = &self.shared.gauges;
        if gauges.state() != EngineState::Running {
            return Err(SubmitError::Stopped);
        }
        let id = SequenceId(self.shared.next_id.fetch_add(1, Ordering::Relaxed));
        let waiting = Waiting { id, traffic, blank: 0, submitted: Instant::now(), job };
        gauges.enter_queue(waiting.tenant(), limits)?;
        Ok(waiting)
    }

    /// Hands over what has taken its places.
    fn send(&self, command: Command) -> Result<(), SubmitError> {
        let gauges = &self.shared.gauges;
        if let Err(flume::SendError(command)) = self.commands.send(command) {
            for waiting in command.submitted() {
                gauges.leave_queue(waiting.tenant(), Left::Gone);
            }
            return Err(SubmitError::Stopped);
        }
        // A stopping thread sets its state and then empties the channel; a command that comes after
        // that would lie there unread, so look again.
        if gauges.state() != EngineState::Running {
            return Err(SubmitError::Stopped);
        }
        Ok(())
    }
}

type ScoredRows = flume::Receiver<Result<Vec<f32>, SequenceFault>>;

fn next_row(rows: &ScoredRows) -> Result<Vec<f32>, SequenceFault> {
    rows.recv().map_err(|_| SequenceFault::Stopped)?
}

/// What options leave open, decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Longest prompt plus answer in tokens.
    pub(crate) context: usize,
    /// Pages of the KV pool.
    pub(crate) kv_pages: usize,
    /// Bytes of a page.
    page_bytes: usize,
}

/// Checks the options against a model, and fills in what was left open.
pub(crate) fn sizes(config: &DecoderConfig, options: EngineOptions) -> Result<Sizes, EngineError> {
    within("max_sequences", options.max_sequences, 1, 1024)?;
    within("prefill_chunk", options.prefill_chunk, 1, 1 << 16)?;
    within("queue_limit", options.queue_limit, 1, 1 << 20)?;
    let of_tenant = options.tenant_queue_limit.unwrap_or(options.queue_limit);
    within("tenant_queue_limit", of_tenant, 1, options.queue_limit)?;
    let audit_every = usize::try_from(options.kv_audit_every).unwrap_or(usize::MAX);
    within("kv_audit_every", audit_every, 1, usize::MAX)?;
    let page_bytes = kv_shape(config, 1, options.kv_dtype).page_bytes();
    let asked = options.max_context.unwrap_or(config.context_len);
    within("max_context", asked, 2, config.context_len)?;
    let context_pages = asked.div_ceil(PAGE_TOKENS);
    let kv_pages = options.kv_pages.unwrap_or_else(|| {
        let affordable = DEFAULT_KV_BYTES / page_bytes.max(1);
        (context_pages * options.max_sequences).min(affordable).max(context_pages)
    });
    within("kv_pages", kv_pages, 1, u32::MAX as usize)?;
    let context = match options.max_context {
        Some(asked) => {
            within("kv_pages", kv_pages, context_pages, u32::MAX as usize)?;
            asked
        }
        None => config.context_len.min(kv_pages * PAGE_TOKENS),
    };
    check_rotation(options.rotation, context)?;
    Ok(Sizes { context, kv_pages, page_bytes })
}

fn check_rotation(rotation: RotationOptions, context: usize) -> Result<(), EngineError> {
    let rotate_at = rotation.rotate_at.unwrap_or(context);
    within("rotation.rotate_at", rotate_at, 2, context)?;
    let most = (rotate_at * 3 / 4).max(1);
    within("rotation.window", rotation.window.unwrap_or(1), 1, most)?;
    let beside = most.saturating_sub(rotation.window.unwrap_or(0));
    within("rotation.sink", rotation.sink.unwrap_or(1), 1, beside.max(1))
}

/// What is true of an engine with these options.
pub(crate) fn resolve<B: Backend>(
    loaded: &Loaded<B>,
    options: EngineOptions,
) -> Result<EngineFacts, EngineError> {
    let Sizes { context, kv_pages, page_bytes } = sizes(&loaded.config, options)?;
    Ok(EngineFacts {
        model_name: loaded.model_name.clone(),
        model_sha256: loaded.model_sha256.clone(),
        quant: loaded.quant.clone(),
        backend: loaded.backend.name(),
        vocab_len: loaded.tokenizer.vocab_len(),
        context,
        kv_dtype: options.kv_dtype,
        kv_pages,
        kv_bytes: kv_pages * page_bytes,
        options: EngineOptions { kv_pages: Some(kv_pages), max_context: Some(context), ..options },
    })
}

fn within(field: &'static str, found: usize, low: usize, high: usize) -> Result<(), EngineError> {
    if (low..=high).contains(&found) {
        return Ok(());
    }
    let expected = format!("{low} to {high}");
    Err(EngineError::BadOption { field, expected, found: found.to_string() })
}
