//! Tiny engines for tests: a seeded model on the reference backend, with faults on demand.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use exrail_checkpoint::{Checkpoint, Gguf};
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, Finished, GenerateRequest, Generation, Identity,
    LoadOptions, Loaded, Sampling, SequenceFault, TokenEvent, prepare_generator,
};
use exrail_kernels::reference::Reference;
use exrail_kernels::{
    AttentionShape, AttentionSpan, Backend, DeviceCounters, Draws, GateActivation, KernelError,
    KvDtype, KvShape, KvSlot, Largest, NormKind, PAGE_TOKENS, PageId, Rope, Span, TokenId,
    WeightView,
};
use exrail_testkit::{TinyLlama, tiny_llama};

/// Embedding this token gives NaN. A sequence that must stay healthy bans it, see [`greedy`].
pub(crate) const NAN_TOKEN: u32 = 300;
/// Embedding this token panics.
pub(crate) const PANIC_TOKEN: u32 = 301;

/// A backend that computes what the inner one does and fails on two tokens.
#[derive(Clone, Debug)]
pub(crate) struct Faulty<B> {
    inner: B,
    faults: Faults,
    runs_ahead: bool,
    /// What it has built; `None`: it builds nothing.
    shapes: Option<Arc<Mutex<Shapes>>>,
}

/// What a device builds for every number of rows, and for every power of two of positions.
#[derive(Debug, Default)]
pub(crate) struct Shapes {
    rows: BTreeSet<usize>,
    contexts: BTreeSet<usize>,
    /// Whether it builds no more where the fence is closed.
    heeds_fence: bool,
    is_closed: bool,
    /// Rows that it computed.
    pub(crate) n_computed: usize,
}

impl Shapes {
    fn build(&mut self, shape: impl FnOnce(&mut Shapes) -> (&mut BTreeSet<usize>, usize)) {
        if self.heeds_fence && self.is_closed {
            return;
        }
        let (built, of) = shape(self);
        built.insert(of);
    }
}

/// The tokens that a [`Faulty`] backend fails on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Embedding this token gives NaN.
    pub(crate) nan: Option<u32>,
    /// Embedding this token panics.
    pub(crate) panic: Option<u32>,
}

macro_rules! forward {
    ($($name:ident(&self $(, $argument:ident: $kind:ty)*);)*) => {
        $(fn $name(&self $(, $argument: $kind)*) { self.inner.$name($($argument),*) })*
    };
}

impl<B: Backend> Backend for Faulty<B> {
    type Weight = B::Weight;
    type Buffer = B::Buffer;
    type KvPool = B::KvPool;
    type Found = B::Found;

    fn name(&self) -> String {
        format!("faulty {}", self.inner.name())
    }
    fn runs_ahead(&self) -> bool {
        self.runs_ahead
    }
    fn built(&self) -> DeviceCounters {
        self.shapes.as_ref().map_or_else(DeviceCounters::default, |shapes| DeviceCounters {
            module_loads: 1,
            graph_captures: {
                let shapes = shapes.lock().unwrap();
                (shapes.rows.len() + shapes.contexts.len()) as u64
            },
            ..DeviceCounters::default()
        })
    }
    fn close_fence(&self, closed: bool) {
        if let Some(shapes) = &self.shapes {
            shapes.lock().unwrap().is_closed = closed;
        }
    }
    fn attention(
        &self,
        q: &B::Buffer,
        pool: &B::KvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut B::Buffer,
    ) {
        if let Some(shapes) = &self.shapes {
            let ends = spans.iter().map(|span| span.first_position + span.n_rows);
            let longest = ends.max().unwrap_or(0).max(PAGE_TOKENS).next_power_of_two();
            shapes.lock().unwrap().build(|shapes| (&mut shapes.contexts, longest));
        }
        self.inner.attention(q, pool, layer, shape, spans, out);
    }
    fn largest(&self, x: &B::Buffer, n_rows: usize, width: usize, limit: usize) -> B::Found {
        self.inner.largest(x, n_rows, width, limit)
    }
    fn draw(&self, x: &mut B::Buffer, width: usize, draws: Draws<'_>) -> B::Found {
        self.inner.draw(x, width, draws)
    }
    fn found(&self, found: &B::Found) -> Vec<Largest> {
        self.inner.found(found)
    }
    fn weight(&self, view: &WeightView<'_>) -> Result<B::Weight, KernelError> {
        self.inner.weight(view)
    }
    fn weight_shape(&self, weight: &B::Weight) -> (usize, usize) {
        self.inner.weight_shape(weight)
    }
    fn buffer(&self, len: usize) -> Result<B::Buffer, KernelError> {
        self.inner.buffer(len)
    }
    fn kv_pool(&self, shape: KvShape) -> Result<B::KvPool, KernelError> {
        self.inner.kv_pool(shape)
    }

    fn embed(&self, table: &B::Weight, ids: &[TokenId], scale: f32, out: &mut B::Buffer) {
        assert!(!ids.iter().any(|id| Some(id.0) == self.faults.panic), "injected panic");
        if let Some(shapes) = &self.shapes {
            let mut shapes = shapes.lock().unwrap();
            shapes.n_computed += ids.len();
            shapes.build(|shapes| (&mut shapes.rows, ids.len()));
        }
        self.inner.embed(table, ids, scale, out);
        let width = self.inner.weight_shape(table).1;
        let mut values = vec![0.0; ids.len() * width];
        self.inner.read(out, &mut values);
        for (row, id) in values.chunks_mut(width).zip(ids) {
            if Some(id.0) == self.faults.nan {
                row.fill(f32::NAN);
            }
        }
        self.inner.write(out, &values);
    }

    forward! {
        write(&self, buffer: &mut B::Buffer, values: &[f32]);
        read(&self, buffer: &B::Buffer, values: &mut [f32]);
        kv_copy_page(&self, pool: &mut B::KvPool, from: PageId, to: PageId);
        norm(&self, kind: NormKind, x: &B::Buffer, n_rows: usize, weight: &B::Buffer, eps: f32,
            out: &mut B::Buffer);
        norm_in_place(&self, kind: NormKind, x: &mut B::Buffer, n_rows: usize, weight: &B::Buffer,
            eps: f32);
        norm_add(&self, kind: NormKind, x: &B::Buffer, n_rows: usize, weight: &B::Buffer, eps: f32,
            y: &mut B::Buffer);
        layer_norm(&self, x: &mut B::Buffer, n_rows: usize, weight: &B::Buffer, bias: &B::Buffer,
            eps: f32);
        linear(&self, x: &B::Buffer, n_rows: usize, weight: &B::Weight, bias: Option<&B::Buffer>,
            out: &mut B::Buffer);
        linear_qkv(&self, x: &B::Buffer, n_rows: usize, weights: [&B::Weight; 3],
            biases: Option<[&B::Buffer; 3]>, outs: [&mut B::Buffer; 3]);
        linear_add(&self, x: &B::Buffer, n_rows: usize, weight: &B::Weight,
            bias: Option<&B::Buffer>, scale: f32, y: &mut B::Buffer);
        linear_add_rows(&self, x: &B::Buffer, weight: &B::Weight, rows: &[u32], scales: &[f32],
            y: &mut B::Buffer);
        linear_gate(&self, x: &B::Buffer, n_rows: usize, gate: &B::Weight, up: &B::Weight,
            activation: GateActivation, out: &mut B::Buffer);
        linear_gelu(&self, x: &B::Buffer, n_rows: usize, weight: &B::Weight, bias: &B::Buffer,
            out: &mut B::Buffer);
        rope(&self, x: &mut B::Buffer, n_heads: usize, head_dim: usize, positions: &[u32],
            rope: &Rope);
        kv_write(&self, pool: &mut B::KvPool, layer: usize, k: &B::Buffer, v: &B::Buffer,
            slots: &[KvSlot]);
        attention_full(&self, q: &B::Buffer, k: &B::Buffer, v: &B::Buffer, shape: AttentionShape,
            spans: &[Span], out: &mut B::Buffer);
        gather_rows(&self, x: &B::Buffer, width: usize, rows: &[u32], out: &mut B::Buffer);
        add(&self, x: &mut B::Buffer, y: &B::Buffer, len: usize);
        scale_and_cap(&self, x: &mut B::Buffer, len: usize, scale: f32, soft_cap: Option<f32>);
        mean_rows(&self, x: &B::Buffer, width: usize, spans: &[Span], out: &mut B::Buffer);
    }
}

pub(crate) fn gguf() -> Gguf {
    Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap()
}

pub(crate) fn load<B: Backend>(backend: B) -> Loaded<B> {
    let who = Identity { name: "tiny".to_owned(), sha256: "0".repeat(64) };
    let checkpoint = Checkpoint::Gguf(gguf());
    prepare_generator(backend, &checkpoint, who, LoadOptions::default(), &mut |_| {}).unwrap()
}

/// f32 cache, so that nothing but the order of sums can differ between schedules.
pub(crate) fn options() -> EngineOptions {
    EngineOptions {
        max_sequences: 8,
        kv_pages: Some(16),
        prefill_chunk: 32,
        kv_dtype: KvDtype::F32,
        ..EngineOptions::default()
    }
}

pub(crate) fn start(options: EngineOptions) -> EngineHandle {
    start_with(Faults { nan: Some(NAN_TOKEN), panic: Some(PANIC_TOKEN) }, false, options)
}

/// On a backend with these faults, and perhaps one whose steps are asked for ahead.
pub(crate) fn start_with(faults: Faults, runs_ahead: bool, options: EngineOptions) -> EngineHandle {
    let backend = Faulty { inner: Reference, faults, runs_ahead, shapes: None };
    Engine::start(load(backend), options).unwrap()
}

/// On a backend without faults that builds graphs, and perhaps none behind the fence; and what it built.
pub(crate) fn start_building(
    heeds_fence: bool,
    options: EngineOptions,
) -> (EngineHandle, Arc<Mutex<Shapes>>) {
    let shapes = Arc::new(Mutex::new(Shapes { heeds_fence, ..Shapes::default() }));
    let built = Some(Arc::clone(&shapes));
    let backend =
        Faulty { inner: Reference, faults: Faults::default(), runs_ahead: true, shapes: built };
    (Engine::start(load(backend), options).unwrap(), shapes)
}

/// Greedy, never sampling the faulty tokens, running to `max_tokens`.
pub(crate) fn greedy(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    let mut request = GenerateRequest::new(prompt, max_tokens);
    request.sampling = Sampling::greedy();
    request.sampling.logit_bias = healthy();
    request.stop_at_eos = false;
    request
}

/// Greedy and nothing beside, so that only the most likely tokens are asked for; to `max_tokens`.
pub(crate) fn plain(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    let mut request = greedy(prompt, max_tokens);
    request.sampling = Sampling::greedy();
    request
}

/// Sampled and nothing beside, so that a device that runs ahead draws the tokens; to `max_tokens`.
pub(crate) fn drawn(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    let seed = prompt.iter().map(|&id| u64::from(id)).sum();
    let mut request = plain(prompt, max_tokens);
    request.sampling = Sampling { temperature: 0.9, top_p: 0.95, seed, ..Sampling::default() };
    request
}

pub(crate) fn healthy() -> Vec<(u32, f32)> {
    vec![(NAN_TOKEN, -100.0), (PANIC_TOKEN, -100.0)]
}

/// Ordinary tokens, different for each `n`.
pub(crate) fn prompt(n: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| 3 + (n * 37 + i * 11 + i * i) % 250).collect()
}

/// Everything one generation said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<TokenEvent>,
    pub(crate) tail: String,
    pub(crate) end: Option<Result<Finished, SequenceFault>>,
}

impl Answer {
    pub(crate) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    pub(crate) fn text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).collect::<String>() + &self.tail
    }

    pub(crate) fn finished(&self) -> &Finished {
        match &self.end {
            Some(Ok(finished)) => finished,
            other => panic!("expected a finished answer, found {other:?}"),
        }
    }

    pub(crate) fn fault(&self) -> &SequenceFault {
        match &self.end {
            Some(Err(fault)) => fault,
            other => panic!("expected a fault, found {other:?}"),
        }
    }
}

/// Reads to the end; a silent end shows as `end: None`.
pub(crate) fn collect(generation: &Generation) -> Answer {
    let mut answer = Answer::default();
    while let Ok(event) = generation.events.recv_timeout(Duration::from_secs(60)) {
        match event {
            Event::Started { .. } => {}
            Event::Token(token) => answer.tokens.push(token),
            Event::Tail(tail) => answer.tail = tail,
            Event::Finished(finished) => answer.end = Some(Ok(finished)),
            Event::Failed(fault) => answer.end = Some(Err(fault)),
        }
    }
    answer
}

pub(crate) fn generate(engine: &EngineHandle, request: GenerateRequest) -> Answer {
    collect(&engine.submit(request).unwrap())
}

/// Waits until the engine holds nothing, and shows that every page is free then.
pub(crate) fn assert_all_pages_return(engine: &EngineHandle) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let counters = engine.counters();
        let busy = counters.sequences_running + counters.sequences_waiting;
        if busy == 0 && counters.pages_free == counters.pages_total {
            assert_eq!(counters.kv_faults, 0);
            return;
        }
        assert!(Instant::now() < deadline, "{counters:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
