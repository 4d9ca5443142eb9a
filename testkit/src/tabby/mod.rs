//! [`Tabby`]: a strict double of TabbyAPI's HTTP server (e632af4 with exllamav3), for tests of what
//! stands in front of one.
//!
//! It answers in that server's shapes, statuses and order of checks, and has no model: texts are
//! pseudo words that follow from the prompt. It obeys lengths, stop strings, schemas and
//! `regex_pattern`; samplers, penalties, biases and banned strings are checked and change nothing.
//! `grammar_string` is a 501, which the real server never sends: the double cannot obey it, and
//! a test must not mistake that for an answer.

mod answers;
mod auth;
mod body;
mod catalog;
mod generation;
mod loading;
mod messages;
mod refusal;
mod request;
mod routes;
mod schema;
mod sse;
mod streams;
mod tokens;
mod writing;

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use axum::Router;
use serde_json::{Map, Value};
use tokio::sync::oneshot;

use self::{loading::Place, tokens::Tokens};

/// How many request bodies are kept.
const BODIES: usize = 256;

/// What the double does wrong, each measured on the real server; all off: the double behaves as
/// documented, right.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each fault is switched by itself")]
pub struct TabbyFaults {
    /// The first generation after each load takes so long before its first token, and `/health`
    /// is healthy throughout. What comes meanwhile waits for it; what comes later is fast.
    pub slow_first: Option<Duration>,
    /// `json_schema` and `response_format` of type `json_schema` do not constrain the text.
    pub ignores_schema: bool,
    /// A schema's answer is an opened object and spaces, with `finish_reason` "stop". (Which
    /// `eos_reason` came with it was not recorded; the double says `stop_token`.)
    pub invalid_as_stop: bool,
    /// A schema or regex that does not compile is dropped: 200, unconstrained. When off: 400.
    pub drops_bad_schema: bool,
    /// A running stream sends only pings for ever after an unload, and `/health` stays healthy.
    /// When off: an error event, and as a generation has failed, `/health` is unhealthy for ever.
    pub hangs_after_unload: bool,
    /// A plain request during an unload gets 200, content null, `finish_reason` "stop". When off:
    /// 503.
    pub aborts_as_clean: bool,
    /// A load accepts any `cache_mode` and `cache_size` and says finished. When off: an error
    /// event, and the old model is gone.
    pub loads_without_checking: bool,
}

/// How a [`Tabby`] starts.
#[derive(Clone, Debug)]
pub struct TabbyOptions {
    /// The key of generation and lists.
    pub api_key: String,
    /// The key of loads, which opens everything else too.
    pub admin_key: String,
    /// The folders of the model directory.
    pub models: Vec<String>,
    /// Which of them is loaded at the start.
    pub loaded: Option<String>,
    /// The context in tokens, unless a load names another.
    pub context: usize,
    /// What goes wrong.
    pub faults: TabbyFaults,
    /// Between two pings of a stream; zero turns them off.
    pub ping: Duration,
    /// What a token takes, in streams and plain requests.
    pub token_time: Duration,
}

impl Default for TabbyOptions {
    fn default() -> TabbyOptions {
        TabbyOptions {
            api_key: "api-key-of-tabby".into(),
            admin_key: "admin-key-of-tabby".into(),
            models: vec!["tiny".into(), "other".into()],
            loaded: Some("tiny".into()),
            context: 4096,
            faults: TabbyFaults::default(),
            ping: Duration::from_secs(15),
            token_time: Duration::from_millis(1),
        }
    }
}

/// A running double on a free port of 127.0.0.1, in a thread of its own. Dropped, it ends at once
/// and cuts what is open.
#[derive(Debug)]
pub struct Tabby {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What all requests share.
#[derive(Debug)]
struct Shared {
    options: TabbyOptions,
    faults: Mutex<TabbyFaults>,
    place: Place,
    tokens: Mutex<Tokens>,
    overrides: Mutex<Map<String, Value>>,
    /// Why generations failed: what `/health` tells.
    issues: Mutex<Vec<Value>>,
    /// Makes each sampled text another one.
    sampled: AtomicU64,
    generations: AtomicUsize,
    cancelled: AtomicUsize,
    bodies: Mutex<VecDeque<Value>>,
}

impl Tabby {
    /// Starts a double; it answers when this returns.
    ///
    /// # Errors
    /// When there is no port or no thread.
    ///
    /// # Panics
    /// When the model to be loaded is not among the folders.
    pub fn start(options: TabbyOptions) -> io::Result<Tabby> {
        if let Some(loaded) = &options.loaded {
            assert!(options.models.contains(loaded), "`{loaded}` is not among the models");
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared::new(options));
        let (stop, stopped) = oneshot::channel();
        let router = Router::new().fallback(routes::answer).with_state(Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("tabby".into()).spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                tokio::select! {
                    _ = axum::serve(listener, router) => {}
                    _ = stopped => {}
                }
            });
            // Dropping the runtime drops its connections, with streams that are open.
        })?;
        Ok(Tabby { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Replaces the faults, for what comes from now on. An unload follows the faults of its time.
    pub fn set_faults(&self, faults: TabbyFaults) {
        *lock(&self.shared.faults) = faults;
    }

    /// How many generation requests have begun: those that passed every check.
    #[must_use]
    pub fn generations(&self) -> usize {
        self.shared.generations.load(Ordering::SeqCst)
    }

    /// How many streams were left by their client before their end.
    #[must_use]
    pub fn cancelled(&self) -> usize {
        self.shared.cancelled.load(Ordering::SeqCst)
    }

    /// The bodies of generation requests with a right key, the oldest first; of more than 256
    /// the last ones.
    #[must_use]
    pub fn bodies(&self) -> Vec<Value> {
        lock(&self.shared.bodies).iter().cloned().collect()
    }
}

impl Drop for Tabby {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the double has been printed by its thread.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn new(options: TabbyOptions) -> Shared {
        Shared {
            faults: Mutex::new(options.faults.clone()),
            place: Place::new(options.loaded.as_deref(), options.context),
            tokens: Mutex::default(),
            overrides: Mutex::default(),
            issues: Mutex::default(),
            sampled: AtomicU64::new(0),
            generations: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            bodies: Mutex::default(),
            options,
        }
    }

    fn faults(&self) -> TabbyFaults {
        lock(&self.faults).clone()
    }

    fn remember_body(&self, body: &Map<String, Value>) {
        let mut bodies = lock(&self.bodies);
        if bodies.len() == BODIES {
            bodies.pop_front();
        }
        bodies.push_back(Value::Object(body.clone()));
    }

    /// A generation has failed, which `/health` tells for ever.
    fn fell_ill(&self, why: &str) {
        let time = jiff::Timestamp::now().to_string();
        lock(&self.issues).push(serde_json::json!({"time": time, "description": why}));
    }
}

/// What `mutex` holds. A panic under it has failed its test already.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seconds since 1970.
fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
