//! What the handlers share: the board, the keys, the trace log, and, behind the fence, the services.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use exrail_engine::{EngineHandle, ModelFingerprint, WarmUpReport};
use exrail_kernels::KvDtype;
use exrail_retrieval::Encode;
use exrail_text::tools::ToolFormat;
use exrail_wire::{Pins, TraceBody, schemas};
use tokio::sync::Semaphore;

use crate::{
    KeyError, Keys,
    auth::KeyRing,
    boot::{BootBoard, NotProved, PhaseRecord},
    diagnostics::Diagnostics,
    error::ApiError,
    ids,
    observe::Metrics,
    otlp::SpanExport,
    pipeline::{Asker, Grounds},
    sessions::SessionKeeper,
    swap::{Fleet, Models},
    tool_circuit::ToolCircuits,
    trace::{TraceError, TraceIdentity, TraceLog},
};

/// Version of this program in fingerprints and traces. One that can inject faults says so.
pub const ENGINE_BUILD: &str = if cfg!(feature = "faults") {
    concat!("exrail-", env!("CARGO_PKG_VERSION"), "+faults")
} else {
    concat!("exrail-", env!("CARGO_PKG_VERSION"))
};

/// Limits of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest body.
    pub body_bytes: usize,
    /// Time for the body of a request to arrive.
    pub body_timeout: Duration,
    /// Time for the line and the header fields of a request to arrive, and of a connection without one.
    pub head_timeout: Duration,
    /// Most choices of one request.
    pub choices: usize,
    /// Most texts of one embedding request.
    pub embedding_inputs: usize,
    /// Tokens generated when a chat request names no limit.
    pub default_max_tokens: usize,
    /// Time for the answer to a request that names no deadline; none when absent.
    pub default_deadline: Option<Duration>,
    /// Time without a finished step after which an engine with work is not alive (G-04).
    pub watchdog: Duration,
    /// Whether answers end when they go round in a circle, unless a request says otherwise (G-19).
    pub loop_guard: bool,
    /// Whether chats are kept from repeating their system messages, unless a request says otherwise (G-21).
    pub leak_guard: bool,
    /// What a structured answer may take (G-13).
    pub structured: StructuredLimits,
}

/// Limits of structured answers (G-13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructuredLimits {
    /// Most tools of one request.
    pub tools: usize,
    /// Most calls of one answer, at least 1.
    pub tool_calls: usize,
    /// Most bytes of one call.
    pub tool_call_bytes: usize,
    /// Further attempts when an answer does not conform.
    pub repairs: usize,
    /// Whether requests that let a model call what it likes are refused while its calls cannot be read (G-29).
    pub tool_circuit: bool,
}

impl Default for StructuredLimits {
    fn default() -> Self {
        Self {
            tools: 128,
            tool_calls: 3,
            tool_call_bytes: 256 << 10,
            repairs: 1,
            tool_circuit: true,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 4 << 20,
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(30),
            choices: 16,
            embedding_inputs: 256,
            default_max_tokens: 512,
            default_deadline: None,
            watchdog: Duration::from_secs(30),
            loop_guard: true,
            structured: StructuredLimits::default(),
            leak_guard: false,
        }
    }
}

/// A sentence encoder under a name.
#[derive(Clone)]
pub struct ServedEncoder {
    /// The name in `/v1/models`.
    pub name: String,
    /// The encoder.
    pub encoder: Arc<dyn Encode>,
}

/// Everything that answers requests. Exists once the boot has proved that it works.
pub struct Services {
    /// The generator's name in `/v1/models`.
    pub model_name: String,
    /// The generator.
    pub engine: EngineHandle,
    /// What its warm-up measured, when it had one.
    pub warm_up: Option<WarmUpReport>,
    /// The sentence encoder, when one is configured.
    pub encoder: Option<ServedEncoder>,
    /// Collections by name.
    pub collections: BTreeMap<String, Arc<Asker>>,
    /// Seconds since 1970 at which they were loaded.
    pub loaded_at: i64,
    /// How the generator writes tool calls and thoughts; found by the first chat.
    pub tool_format: OnceLock<ToolFormat>,
}

/// What stays when a generator goes: the encoder, and collections by name.
#[derive(Clone, Default)]
pub struct Shelf {
    encoder: Option<ServedEncoder>,
    collections: BTreeMap<String, Arc<Grounds>>,
}

impl Shelf {
    /// Of services whose generator may go.
    #[must_use]
    pub fn of(services: &Services) -> Self {
        let grounds =
            |(name, asker): (&String, &Arc<Asker>)| (name.clone(), Arc::clone(asker.grounds()));
        let collections = services.collections.iter().map(grounds).collect();
        Self { encoder: services.encoder.clone(), collections }
    }

    /// The encoder, when one is configured.
    #[must_use]
    pub fn encoder(&self) -> Option<&ServedEncoder> {
        self.encoder.as_ref()
    }

    /// Collections by name.
    #[must_use]
    pub fn collections(&self) -> &BTreeMap<String, Arc<Grounds>> {
        &self.collections
    }

    /// The same with a generator that was loaded just now.
    #[must_use]
    pub fn services(
        &self,
        model_name: String,
        engine: EngineHandle,
        warm_up: Option<WarmUpReport>,
    ) -> Services {
        let asker = |(name, grounds): (&String, &Arc<Grounds>)| {
            (name.clone(), Arc::new(Asker::on(engine.clone(), Arc::clone(grounds))))
        };
        let collections = self.collections.iter().map(asker).collect();
        let (encoder, loaded_at) = (self.encoder.clone(), jiff::Timestamp::now().as_second());
        let tool_format = OnceLock::new();
        Services { model_name, engine, warm_up, encoder, collections, loaded_at, tool_format }
    }
}

impl Services {
    /// How the generator writes tool calls and thoughts.
    pub(crate) fn tool_format(&self) -> &ToolFormat {
        self.tool_format.get_or_init(|| {
            let template = self.engine.template().map(AsRef::as_ref);
            ToolFormat::detect(template, self.engine.tokenizer())
        })
    }

    /// The collection of that name, or the only one.
    pub(crate) fn collection(&self, name: Option<&str>) -> Result<&Arc<Asker>, ApiError> {
        let known = || {
            let names = self.collections.keys().map(|name| format!("`{name}`"));
            let names = names.collect::<Vec<_>>().join(", ");
            if names.is_empty() { "none: this server has no collection".into() } else { names }
        };
        match (name, self.collections.len()) {
            (None, 1) => self.collections.values().next().ok_or(ApiError::Internal("collections")),
            (None, _) => Err(ApiError::UnknownCollection { found: String::new(), known: known() }),
            (Some(name), _) => self
                .collections
                .get(name)
                .ok_or_else(|| ApiError::UnknownCollection { found: name.into(), known: known() }),
        }
    }

    /// What an answer without a collection depends on; waits for the model's hash.
    pub(crate) async fn pins(&self) -> Result<Pins, TraceError> {
        hashed(&self.engine).await;
        pins(&self.engine)
    }
}

/// The `system_fingerprint` of responses; none while the model's hash runs.
pub(crate) fn system_fingerprint(model: &ModelFingerprint) -> Option<String> {
    let sha256 = model.get()?;
    Some(format!("{ENGINE_BUILD}-{}", sha256.get(..12).unwrap_or(sha256)))
}

/// Waits until the model's hash has ended, without holding a thread.
pub(crate) async fn hashed(engine: &EngineHandle) {
    // Nothing is ever sent: the end of the hash is the end of the channel.
    match engine.facts().model_sha256.ended().recv_async().await {
        Ok(never) => match never {},
        Err(flume::RecvError::Disconnected) => {}
    }
}

/// The pins of an engine alone; blocks while the model's hash runs.
///
/// # Errors
/// The hash failed: a record would name no model.
pub(crate) fn pins(engine: &EngineHandle) -> Result<Pins, TraceError> {
    let facts = engine.facts();
    Ok(Pins {
        model_fp: facts.model_sha256.wait()?.to_owned(),
        tok_fp: engine.tokenizer().fingerprint().into(),
        encoder_fp: None,
        index_hash: None,
        template_hash: engine.template().map(|template| template.sha256().into()),
        schema_hash: schemas::SHA256.into(),
        quant: facts.quant.clone(),
        kv_dtype: kv_name(facts.kv_dtype).into(),
        tp: 1,
        engine_build: ENGINE_BUILD.into(),
    })
}

/// The name of a KV element type in pins and reports.
pub(crate) fn kv_name(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "f32",
        KvDtype::F16 => "f16",
        KvDtype::Int8 => "int8",
    }
}

/// Grammars that are compiled at the same time: the engine needs the cores more.
const COMPILATIONS: usize = 2;

/// The state of one server.
pub struct AppState {
    pub(crate) board: Arc<BootBoard>,
    pub(crate) models: OnceLock<Models>,
    pub(crate) keys: KeyRing,
    pub(crate) traces: TraceLog,
    pub(crate) metrics: Metrics,
    pub(crate) limits: Limits,
    /// Who may compile a grammar: it takes a core, and belongs to whoever asks first.
    pub(crate) compiling: Semaphore,
    /// Of the canaries of system messages; drawn when the first one is needed.
    canary_secret: OnceLock<u64>,
    /// Unset: nothing is kept on disk.
    pub(crate) sessions: OnceLock<SessionKeeper>,
    /// Unset: no spans are made.
    pub(crate) spans: OnceLock<SpanExport>,
    /// Which models call tools that can be read.
    pub(crate) tool_circuits: ToolCircuits,
    /// Unset: this server cannot measure itself.
    pub(crate) diagnostics: OnceLock<Arc<dyn Diagnostics>>,
    /// Who may do so: one at a time.
    pub(crate) diagnosing: Arc<Semaphore>,
}

impl AppState {
    /// A server in phase `config`.
    #[must_use]
    pub fn new(keys: Keys, traces: TraceLog, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            board: Arc::new(BootBoard::new()),
            models: OnceLock::new(),
            keys: KeyRing::new(keys),
            traces,
            metrics: Metrics::default(),
            limits,
            compiling: Semaphore::new(COMPILATIONS),
            canary_secret: OnceLock::new(),
            sessions: OnceLock::new(),
            spans: OnceLock::new(),
            tool_circuits: ToolCircuits::default(),
            diagnostics: OnceLock::new(),
            diagnosing: Arc::new(Semaphore::new(1)),
        })
    }

    /// What canaries are derived from, the same for the life of the process.
    pub(crate) fn canary_secret(&self) -> Result<u64, ApiError> {
        if let Some(secret) = self.canary_secret.get() {
            return Ok(*secret);
        }
        let drawn = ids::seed()?;
        Ok(*self.canary_secret.get_or_init(|| drawn))
    }

    /// Asks for these keys from the next request on. A key that stays keeps what is cached and saved for it.
    ///
    /// # Errors
    /// None is left, which would open the server.
    pub fn replace_keys(&self, keys: Keys) -> Result<(), KeyError> {
        self.keys.replace(keys)
    }

    /// Keeps sessions with this owner. The first one stays.
    pub fn keep_sessions(&self, keeper: SessionKeeper) {
        self.sessions.get_or_init(|| keeper);
    }

    /// Sends the spans of requests from now on. The first one stays.
    pub fn export_spans(&self, export: SpanExport) {
        self.spans.get_or_init(|| export);
    }

    /// Measures with this from now on. The first one stays.
    pub fn diagnose_with(&self, diagnostics: Arc<dyn Diagnostics>) {
        self.diagnostics.get_or_init(|| diagnostics);
    }

    /// The boot board.
    #[must_use]
    pub fn board(&self) -> &Arc<BootBoard> {
        &self.board
    }

    /// The trace log.
    #[must_use]
    pub fn traces(&self) -> &TraceLog {
        &self.traces
    }

    /// The generators, once the first one was handed over.
    #[must_use]
    pub fn models(&self) -> Option<&Models> {
        self.models.get()
    }

    /// The services of the generator that is loaded, if one is.
    #[must_use]
    pub fn services(&self) -> Option<Arc<Services>> {
        self.models()?.lineup().loaded.clone()
    }

    /// Writes a record of each boot phase that ended (G-14); waits for the model's hash, when one is loaded.
    ///
    /// # Errors
    /// A record is not in the log.
    pub async fn record_boot(&self) -> Result<(), TraceError> {
        let pins = match self.services() {
            Some(services) => services.pins().await?,
            None => Pins::default(),
        };
        let millis = jiff::Timestamp::now().as_millisecond();
        let identity =
            TraceIdentity { trace_id: format!("boot-{millis}"), ..TraceIdentity::default() };
        for PhaseRecord { phase, ok, detail, took } in self.board.status().phases {
            let (phase, ms) = (phase.name().to_owned(), took.as_secs_f64() * 1e3);
            let body = TraceBody::Boot { phase, ok, ms, detail };
            self.traces.append(&identity, &pins, body).await?;
        }
        Ok(())
    }

    /// Hands the services over and opens the fence.
    ///
    /// # Errors
    /// The boot has not proved that they work, or services were handed over before.
    pub fn open(&self, services: Services) -> Result<Arc<Services>, NotProved> {
        self.open_fleet(services, Fleet::of_one())
    }

    /// The same with further generators, which are loaded in place of this one when they are asked for.
    ///
    /// # Errors
    /// As [`AppState::open`].
    pub fn open_fleet(&self, services: Services, fleet: Fleet) -> Result<Arc<Services>, NotProved> {
        let services = Arc::new(services);
        let took = self.board.status().took();
        let start = || Models::start(Arc::clone(&services), took, fleet, self.traces.clone());
        self.models.get_or_init(start);
        self.board.ready()?;
        Ok(services)
    }
}
