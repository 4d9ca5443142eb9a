//! A server over a tiny model.

use std::{error::Error, path::Path, sync::Arc};

use axum::{
    body::{Body, to_bytes},
    http::{HeaderMap, Method, Request, StatusCode, header},
};
use exrail_checkpoint::{Checkpoint, Gguf, sha256_hex};
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Identity, LoadOptions, Loaded, ModelFingerprint,
    WarmUpPlan, WarmUpReport, prepare_generator, warm_up,
};
use exrail_kernels::{Activation, Backend};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_retrieval::{
    ChunkOptions, Collection, Contract, Encode, read_folder, testing::FakeEncoder,
};
use exrail_server::{
    AppState, BootOwner, BootPlan, Keys, Limits, Node, Pace, Phase, ServedEncoder, Services,
    TraceLog, pipeline::Asker, router, sentinel,
};
use exrail_testkit::{TinyLlama, tiny_llama};
use exrail_text::ChatTemplate;
use exrail_verify::{CollectionIndex, EvidenceGate, LiveChecker, trace::verify_log};
use serde_json::Value;
use tempfile::TempDir;
use tower::ServiceExt;

pub(crate) const MODEL: &str = "tiny";
pub(crate) const KEY: &str = "0123456789abcdef";

/// A running server and the folder that it writes to.
pub(crate) struct Server {
    pub(crate) state: Arc<AppState>,
    pub(crate) folder: TempDir,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(crate) fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// An engine whose model has this fingerprint, or that of its bytes.
fn engine(fingerprint: Option<ModelFingerprint>) -> EngineHandle {
    start(cpu(), four(), |loaded| {
        if let Some(fingerprint) = fingerprint {
            loaded.model_sha256 = fingerprint;
        }
    })
}

pub(crate) fn four() -> EngineOptions {
    EngineOptions { max_sequences: 4, ..EngineOptions::default() }
}

pub(crate) fn cpu() -> CpuBackend {
    let options =
        CpuOptions { threads: Some(1), activation: Activation::F32, ..CpuOptions::default() };
    CpuBackend::new(options).unwrap()
}

/// An engine of a model that was changed before it started.
pub(crate) fn start<B: Backend>(
    backend: B,
    options: EngineOptions,
    change: impl FnOnce(&mut Loaded<B>),
) -> EngineHandle {
    start_seeded(7, backend, options, change)
}

/// The same of a model with other weights.
pub(crate) fn start_seeded<B: Backend>(
    seed: u64,
    backend: B,
    options: EngineOptions,
    change: impl FnOnce(&mut Loaded<B>),
) -> EngineHandle {
    let mut loaded = prepared(seed, backend);
    change(&mut loaded);
    Engine::start(loaded, options).unwrap()
}

fn prepared<B: Backend>(seed: u64, backend: B) -> Loaded<B> {
    let bytes = tiny_llama(seed, TinyLlama::default());
    let sha256 = sha256_hex(&bytes);
    let gguf = Gguf::parse(bytes).unwrap();
    let who = Identity { name: MODEL.to_owned(), sha256 };
    let load = LoadOptions::default();
    let checkpoint = Checkpoint::Gguf(gguf);
    prepare_generator(backend, &checkpoint, who, load, &mut |_| {}).unwrap()
}

const PAGE: &str = "# Cabinets\n\nThe spare key of cabinet B lies in the red box on the second shelf \
of the store room, and only the guard may take it out during the day.\n\n## Fines\n\nA lost key costs \
forty coins, which the finder may keep if nobody asks for them within thirty days of the loss.\n";

fn asker(engine: &EngineHandle, folder: &Path) -> Asker {
    let docs = folder.join("docs");
    std::fs::create_dir_all(&docs).unwrap();
    std::fs::write(docs.join("cabinets.md"), PAGE).unwrap();
    let encoder: Arc<dyn Encode> = Arc::new(FakeEncoder::new(1));
    let contract = Contract::new(&*encoder, ChunkOptions::for_encoder(&*encoder)).unwrap();
    let mut collection = Collection::create(&folder.join("index"), contract).unwrap();
    collection.ingest(read_folder(&docs).unwrap(), &*encoder, &mut |_| {}).unwrap();
    let index = CollectionIndex::new(collection, encoder);
    let live = LiveChecker::new(index.encoder(), None);
    let gate = (EvidenceGate::not_calibrated(), "not calibrated".into());
    Asker::new(engine.clone(), index, gate, live).unwrap()
}

/// A server whose boot has not begun.
pub(crate) fn cold(keys: &[&str], trace_log: Option<&str>) -> Server {
    limited(keys, trace_log, Limits::default())
}

fn limited(keys: &[&str], trace_log: Option<&str>, limits: Limits) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let log = trace_log.map_or_else(|| folder.path().join("trace.jsonl"), Into::into);
    let keys = Keys::new(keys.iter().copied()).unwrap();
    let state = AppState::new(keys, TraceLog::open(&log).unwrap(), limits);
    Server { state, folder }
}

pub(crate) fn services(folder: &Path) -> Services {
    services_of(engine(None), folder)
}

pub(crate) fn services_of(engine: EngineHandle, folder: &Path) -> Services {
    let asker = Arc::new(asker(&engine, folder));
    let encoder = Arc::clone(asker.index().encoder());
    Services {
        model_name: MODEL.into(),
        engine,
        warm_up: None,
        encoder: Some(ServedEncoder { name: "fake".into(), encoder }),
        collections: [("cabinets".to_owned(), asker)].into(),
        loaded_at: 0,
        tool_format: std::sync::OnceLock::new(),
    }
}

/// Boots with a real sentinel.
pub(crate) fn warm(keys: &[&str], trace_log: Option<&str>) -> Server {
    boot(cold(keys, trace_log), engine(None), None)
}

/// The same on another engine.
pub(crate) fn warm_on(engine: EngineHandle, keys: &[&str], limits: Limits) -> Server {
    boot(limited(keys, None, limits), engine, None)
}

/// The same with a real warm-up, so that the fence is closed.
pub(crate) fn fenced() -> Server {
    let engine = engine(None);
    let report = warm_up(&engine, &WarmUpPlan::of(&engine)).unwrap();
    boot(cold(&[], None), engine, Some(report))
}

/// The same with a model of this fingerprint, and no keys.
pub(crate) fn warm_with(fingerprint: ModelFingerprint) -> Server {
    boot(cold(&[], None), engine(Some(fingerprint)), None)
}

/// The same with a model whose chat template is this one.
pub(crate) fn warm_speaking(template: &str) -> Server {
    let template = ChatTemplate::compile(template, "<|im_start|>", "<|im_end|>").unwrap();
    let engine = start(cpu(), four(), |loaded| loaded.template = Some(Arc::new(template)));
    boot(cold(&[], None), engine, None)
}

fn boot(server: Server, engine: EngineHandle, warm_up: Option<WarmUpReport>) -> Server {
    let services = Services { warm_up, ..services_of(engine, server.folder.path()) };
    let owner = server.own();
    pass(&owner, Phase::Weights);
    pass(&owner, Phase::WarmUp);
    let detail: Result<_, Box<dyn Error>> = owner.run(
        Phase::Sentinel,
        || Ok(sentinel::run(&services, sentinel::ONCE, &mut || {})?),
        |detail| Ok(detail.clone()),
    );
    detail.unwrap();
    server.state.open(services).unwrap();
    server
}

/// A bias against the end of the answer: it goes on to its limit.
pub(crate) fn endless(server: &Server) -> Value {
    let engine = server.state.services().unwrap().engine.clone();
    let eos = engine.tokenizer().eos_ids().iter();
    eos.map(|id| (id.to_string(), (-100).into())).collect::<serde_json::Map<_, _>>().into()
}

/// The phases that these tests look at.
pub(crate) fn plan() -> BootPlan {
    let nodes = vec![
        Node::new(Phase::Weights, &[], "loaded"),
        Node::new(Phase::WarmUp, &[Phase::Weights], "tokens"),
        Node::new(Phase::Sentinel, &[Phase::WarmUp], "answered"),
        Node::new(Phase::Ready, &[Phase::Sentinel], "all of it"),
    ];
    BootPlan::new(nodes).unwrap()
}

/// A phase that finds nothing wrong.
pub(crate) fn pass(owner: &BootOwner, phase: Phase) {
    let ended: Result<(), Box<dyn Error>> = owner.run(phase, || Ok(()), |()| Ok(String::new()));
    ended.unwrap();
}

impl Server {
    /// Takes the boot.
    pub(crate) fn own(&self) -> BootOwner {
        self.state.board().own(plan(), Pace::default(), |_| {}).unwrap()
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = router(Arc::clone(&self.state)).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, 16 << 20).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: parts.status, headers: parts.headers, text }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(request(Method::GET, path, None, Body::empty())).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(request(Method::POST, path, None, Body::from(body.to_string()))).await
    }

    /// The records, each as the published schemas and the collection say (G-14).
    pub(crate) fn trace_lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.folder.path().join("trace.jsonl")).unwrap();
        let stored = Collection::read(&self.folder.path().join("index")).ok();
        let report = verify_log(text.as_bytes(), stored.as_ref()).unwrap();
        assert_eq!(report.n_breaches, 0, "{:#?}", report.breaches);
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub(crate) fn request(method: Method, path: &str, key: Option<&str>, body: Body) -> Request<Body> {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    request.body(body).unwrap()
}

/// The `data:` events of a stream.
pub(crate) fn events(text: &str) -> Vec<&str> {
    text.split("\n\n").filter_map(|block| block.strip_prefix("data: ")).collect()
}
