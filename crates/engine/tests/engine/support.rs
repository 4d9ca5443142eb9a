//! Tiny engines for tests: a seeded model on the reference backend, with faults on demand.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use exrail_checkpoint::{Checkpoint, Gguf};
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, Finished, GenerateRequest, Generation, Identity,
    LoadOptions, Loaded, Sampling, SequenceFault, TokenEvent, prepare_generator,
};
use exrail_kernels::reference::Reference;
use exrail_kernels::{Backend, KvDtype};
use exrail_testkit::{TinyLlama, tiny_llama};

pub(crate) use crate::faulty::Faults;
use crate::faulty::{Faulty, Shapes};

/// Embedding this token gives NaN. A sequence that must stay healthy bans it, see [`greedy`].
pub(crate) const NAN_TOKEN: u32 = 300;
/// Embedding this token panics.
pub(crate) const PANIC_TOKEN: u32 = 301;

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
        // Steps are counted.
        step_target: None,
        ..EngineOptions::default()
    }
}

pub(crate) fn start(options: EngineOptions) -> EngineHandle {
    start_with(Faults { nan: Some(NAN_TOKEN), panic: Some(PANIC_TOKEN), rot: None }, false, options)
}

/// On a backend with these faults, and perhaps one whose steps are asked for ahead.
pub(crate) fn start_with(faults: Faults, runs_ahead: bool, options: EngineOptions) -> EngineHandle {
    let backend = Faulty { faults, runs_ahead, ..Faulty::new(Reference) };
    Engine::start(load(backend), options).unwrap()
}

/// On a backend without faults, and a switch that makes it slow.
pub(crate) fn start_with_brake(options: EngineOptions) -> (EngineHandle, Arc<AtomicBool>) {
    let backend = Faulty::new(Reference);
    let brake = Arc::clone(&backend.slow);
    (Engine::start(load(backend), options).unwrap(), brake)
}

/// On a backend without faults that builds graphs, and perhaps none behind the fence; and what it built.
pub(crate) fn start_building(
    heeds_fence: bool,
    options: EngineOptions,
) -> (EngineHandle, Arc<Mutex<Shapes>>) {
    let shapes = Arc::new(Mutex::new(Shapes { heeds_fence, ..Shapes::default() }));
    let built = Some(Arc::clone(&shapes));
    let backend = Faulty { runs_ahead: true, shapes: built, ..Faulty::new(Reference) };
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
            Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. } => {}
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
