//! SmolLM2 itself: it answers, and it continues as llama.cpp does.

use std::path::PathBuf;

use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, Finish, GenerateRequest, LoadOptions, Sampling,
    load_generator,
};
use exrail_kernels::{Activation, KvDtype};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_text::{ChatMessage, RenderOptions, encode_prompt};
use serde::Deserialize;

/// llama.cpp's margin, in nats, below which another next token is rounding and not a fault: the
/// largest one at which these continuations part was 0.106 when this was set. llama.cpp's own fast
/// mode leaves its exact one at margins up to 0.3.
const MARGIN: f32 = 0.15;

#[derive(Deserialize)]
struct Golden {
    /// llama.cpp on the dequantised weights, f32 throughout.
    exact: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    /// Per id: difference of llama.cpp's two largest log-probabilities.
    margins: Vec<f32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../golden/greedy/greedy.json"))
        .expect("golden/greedy/make.py wrote it")
}

fn start(activation: Activation, kv_dtype: KvDtype) -> EngineHandle {
    let path = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("run through make test");
    let options = CpuOptions { activation, ..CpuOptions::default() };
    let backend = CpuBackend::new(options).expect("this machine runs the CPU backend");
    let loaded = load_generator(backend, &PathBuf::from(path), LoadOptions::default(), &mut |_| {})
        .expect("the default generator loads");
    let options = EngineOptions { kv_dtype, kv_pages: Some(16), ..EngineOptions::default() };
    Engine::start(loaded, options).expect("these options are honoured")
}

fn run(engine: &EngineHandle, request: GenerateRequest) -> (Vec<u32>, String, Finish) {
    let generation = engine.submit(request).expect("the request fits");
    let (mut ids, mut text) = (Vec::new(), String::new());
    loop {
        match generation.events.recv().expect("an answer ends with an event") {
            Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. } => {}
            Event::Token(token) => {
                ids.push(token.id);
                text.push_str(&token.text);
            }
            Event::Tail(tail) => text.push_str(&tail),
            Event::Finished(finished) => return (ids, text, finished.finish),
            Event::Failed(fault) => panic!("{fault}"),
        }
    }
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest { sampling: Sampling::greedy(), ..GenerateRequest::new(prompt, max_tokens) }
}

#[test]
fn smollm2_answers_a_question() {
    let engine = start(Activation::Int8, KvDtype::F16);
    let template = engine.template().expect("the file has a chat template");
    // The exact mode chooses every token of this answer with a margin of at least 0.97 nats. (Asked
    // for the capital of France it begins with a margin of 0.08, which is less than what rounding
    // activations may move.)
    let message = ChatMessage::new("user", "What is the capital of Japan?");
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let prompt = template.render(&[message], &options).expect("the template renders");
    let ids = encode_prompt(engine.tokenizer(), &prompt).expect("the prompt encodes");
    let (_, text, finish) = run(&engine, greedy(ids, 64));
    assert_eq!(text, "The capital of Japan is Tokyo.");
    assert_eq!(finish, Finish::Stop, "{text}");
}

#[test]
fn exact_continuations_equal_llama_cpp() {
    let engine = start(Activation::F32, KvDtype::F32);
    let cases = golden().exact;
    assert_eq!(cases.len(), 8);
    for case in &cases {
        assert_eq!(first_difference(&engine, case), None, "{:?}", case.prompt);
    }
}

/// The fast mode against llama.cpp without rounding. Against llama.cpp's own fast mode it would be
/// rounding against rounding: that mode leaves its exact one at margins up to 0.3.
#[test]
fn fast_continuations_leave_llama_cpp_at_near_ties_only() {
    let engine = start(Activation::Int8, KvDtype::F16);
    for case in &golden().exact {
        if let Some((at, margin)) = first_difference(&engine, case) {
            assert!(margin < MARGIN, "{:?}: token {at}, margin {margin}", case.prompt);
        }
    }
}

/// Where our continuation leaves llama.cpp's, and its margin there. The token that ends an answer
/// is the last id of a golden, so ours is reported too and not acted on.
fn first_difference(engine: &EngineHandle, case: &Case) -> Option<(usize, f32)> {
    let mut request = greedy(case.prompt_ids.clone(), case.ids.len());
    request.stop_at_eos = false;
    let (ids, _, _) = run(engine, request);
    assert_eq!(ids.len(), case.ids.len());
    let at = case.ids.iter().zip(&ids).position(|(a, b)| a != b)?;
    Some((at, case.margins[at]))
}
