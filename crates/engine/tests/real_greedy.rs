//! SmolLM2 itself: it answers, and it continues as llama.cpp does.

use std::path::PathBuf;
use std::sync::OnceLock;

use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, Finish, GenerateRequest, Sampling, load_generator,
};
use exrail_kernels::Activation;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_text::{ChatMessage, RenderOptions, encode_prompt};
use serde::Deserialize;

/// llama.cpp's margin, in nats, below which another next token is rounding and not a fault.
const MARGIN: f32 = 0.1;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    /// Per id: difference of llama.cpp's two largest log-probabilities.
    margins: Vec<f32>,
}

fn engine() -> &'static EngineHandle {
    static ENGINE: OnceLock<EngineHandle> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let path = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("run through make test");
        let options = CpuOptions { threads: None, activation: Activation::Int8, isa: None };
        let backend = CpuBackend::new(options).expect("this machine runs the CPU backend");
        let loaded = load_generator(backend, &PathBuf::from(path), &mut |_| {})
            .expect("the default generator loads");
        Engine::start(loaded, EngineOptions::default()).expect("the default options are honoured")
    })
}

fn run(request: GenerateRequest) -> (Vec<u32>, String, Finish) {
    let generation = engine().submit(request).expect("the request fits");
    let (mut ids, mut text) = (Vec::new(), String::new());
    loop {
        match generation.events.recv().expect("an answer ends with an event") {
            Event::Started { .. } => {}
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
    let template = engine().template().expect("the file has a chat template");
    let message = ChatMessage {
        role: "user".to_owned(),
        content: "What is the capital of France?".to_owned(),
    };
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let prompt = template.render(&[message], options).expect("the template renders");
    let ids = encode_prompt(engine().tokenizer(), &prompt).expect("the prompt encodes");
    let (_, text, finish) = run(greedy(ids, 64));
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(finish, Finish::Stop, "{text}");
}

#[test]
fn greedy_continuations_equal_llama_cpp_up_to_its_own_near_ties() {
    let golden: Golden = serde_json::from_str(include_str!("../../../golden/greedy/greedy.json"))
        .expect("golden/greedy/make.py wrote it");
    assert_eq!(golden.cases.len(), 8);
    let eos = engine().tokenizer().eos_ids();
    let mut n_equal = 0;
    for case in &golden.cases {
        let answer = case.ids.strip_suffix(&[case.ids[case.ids.len() - 1]]).filter(|_| {
            case.ids.last().is_some_and(|id| eos.contains(id)) // our answers do not show the end
        });
        let expected = answer.unwrap_or(&case.ids);
        let (ids, text, _) = run(greedy(case.prompt_ids.clone(), 64));
        match expected.iter().zip(&ids).position(|(a, b)| a != b) {
            None if expected.len() == ids.len() => n_equal += 1,
            first => {
                let at = first.unwrap_or(expected.len().min(ids.len()));
                let margin = case.margins[at];
                println!("{:?}: differs at {at}, margin {margin}", case.prompt);
                assert!(margin < MARGIN, "{:?}: token {at}, margin {margin}: {text}", case.prompt);
            }
        }
    }
    println!("{n_equal} of 8 continuations are equal to the end");
}
