//! Generators behind the traits of `verify`.

use exrail_checkpoint::{Checkpoint, Gguf};
use exrail_engine::{Engine, EngineOptions, Identity, LoadOptions, PageFault, prepare_generator};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_testkit::{TinyLlama, tiny_llama};
use exrail_text::ChatTemplate;
use exrail_verify::Live;

use super::*;

fn engine(options: EngineOptions) -> EngineHandle {
    engine_with(options, None)
}

fn engine_with(options: EngineOptions, template: Option<&str>) -> EngineHandle {
    let backend = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() });
    let gguf = Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap();
    let who = Identity { name: "tiny".into(), sha256: "0".repeat(64) };
    let (checkpoint, load) = (Checkpoint::Gguf(gguf), LoadOptions::default());
    let mut loaded =
        prepare_generator(backend.unwrap(), &checkpoint, who, load, &mut |_| {}).unwrap();
    if let Some(template) = template {
        loaded.template = Some(Arc::new(ChatTemplate::compile(template, "", "").unwrap()));
    }
    Engine::start(loaded, EngineOptions { kv_pages: Some(32), ..options }).unwrap()
}

/// What three prompts that begin alike give: asked together, and one after the other.
fn together_and_alone(options: EngineOptions) -> [Vec<Generated>; 2] {
    let nonce = Nonce::derive(&[b"together"]);
    let frame = |of: &str| {
        let question = format!("{} {of}?", "How long is a page of the cache".repeat(20));
        PromptFrame::new(&question, Live::default(), &nonce).unwrap()
    };
    let frames = ["today", "tomorrow", "on Monday"].map(frame);
    let prompts: Vec<(&PromptFrame, u64)> = frames.iter().zip(1..).collect();
    let sampling = Sampling { temperature: 1.0, ..ask_sampling() };
    let [first, second] = [engine(options), engine(options)];
    let of = |engine| EngineGenerate::new(engine, sampling.clone(), 12).locked(AnswerLock::Off);
    let together = of(&first).generate_all(&prompts);
    let alone = prompts.iter().map(|&(frame, seed)| of(&second).generate(frame, seed));
    let found = [together, alone.collect()]
        .map(|all| all.into_iter().map(Result::unwrap).collect::<Vec<_>>());
    [first, second].iter().for_each(EngineHandle::shutdown);
    found
}

#[test]
fn prompts_that_are_asked_together_give_what_they_give_alone_and_share_what_they_have_in_common() {
    let [together, alone] = together_and_alone(EngineOptions::default());
    assert_eq!(together, alone);
    assert_ne!(together[0].text, together[1].text, "the prompts and the seeds differ");
    assert_eq!(together[0].n_cached_tokens, 0);
    assert!(together[1..].iter().all(|reply| reply.n_cached_tokens >= 256), "{together:?}");
}

/// A template that writes the last message first.
const REVERSED: &str = "{% for message in messages | reverse %}{{ '<|im_start|>' + message['role'] + '\n' \
    + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}";

#[test]
fn g12_a_template_that_moves_the_slots_is_refused_and_without_the_guard_the_model_reads_them_so() {
    let engine = engine_with(EngineOptions::default(), Some(REVERSED));
    let generator = EngineGenerate::new(&engine, ask_sampling(), 12);
    let nonce = Nonce::derive(&[b"order"]);
    let frame = PromptFrame::new("How long is a page?", Live::default(), &nonce).unwrap();
    let refused = generator.generate(&frame, 1).unwrap_err();
    assert!(refused.is_outcome(), "{refused}");
    let refused = ask_error(refused);
    assert_eq!(refused.status().as_u16(), 422);
    let told = refused.body().error;
    assert_eq!(told.code, "prompt_lint");
    assert!(told.message.contains("slot_order"), "{}", told.message);
    // Mutation: what would be read.
    let ids = generator.slotted(&frame).unwrap().placed.ids;
    let text = engine.tokenizer().decode(&ids);
    assert!(text.find("How long is a page?") < text.find("You answer"), "{text}");
    engine.shutdown();
}

#[test]
fn who_asks_several_things_at_once_is_not_refused_by_the_queue() {
    let narrow = EngineOptions { max_sequences: 1, queue_limit: 1, ..EngineOptions::default() };
    let [together, alone] = together_and_alone(narrow);
    assert_eq!(together, alone);
}

#[test]
fn a_broken_page_keeps_its_code_through_an_ask() {
    let fault = SequenceFault::KvIntegrity(PageFault::NotHeld { page: 3 });
    let direct = ApiError::from(fault.clone());
    let asked = ask_error(engine_error(ApiError::from(fault)));
    for error in [direct, asked] {
        assert_eq!(error.status().as_u16(), 500);
        let detail = error.body().error;
        assert_eq!(detail.code, "kv_integrity");
        assert!(detail.message.contains("page 3"), "{}", detail.message);
    }
}
