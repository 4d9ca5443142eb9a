//! SmolLM2 under many schemas, with a third of its vocabulary ranked up: valid, or told as incomplete.
//!
//! 40 answers in an ordinary run. `EXRAIL_TEST_ANSWERS=2000` asks for more, and `EXRAIL_TEST_RECORD` names a file
//! that gets the numbers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, Finish, Finished, GenerateRequest, LoadOptions,
    Sampling, load_generator,
};
use exrail_grammar::{Grammar, Source};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_testkit::Random;
use exrail_text::Specials;
use serde_json::{Value, json};

#[path = "engine/schemas.rs"]
mod schemas;

const N_SCHEMAS: u64 = 100;
/// Answers that run at a time; a fifth of the requests has no grammar.
const N_TOGETHER: u64 = 10;

fn start() -> EngineHandle {
    let path = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("run through make test");
    let backend = CpuBackend::new(CpuOptions::default()).expect("this machine runs the backend");
    let loaded = load_generator(backend, &PathBuf::from(path), LoadOptions::default(), &mut |_| {})
        .expect("the default generator loads");
    let options =
        EngineOptions { kv_pages: Some(16), max_sequences: 8, ..EngineOptions::default() };
    Engine::start(loaded, options).expect("these options are honoured")
}

fn request(engine: &EngineHandle, grammar: Option<&Grammar>, n: u64) -> GenerateRequest {
    let mut random = Random::named(n, "adversary");
    let vocab_len = u32::try_from(engine.facts().vocab_len).expect("ids have 32 bits");
    let favourites = (0..vocab_len).filter(|_| random.below(3) == 0);
    let text = format!("Answer {n} in JSON:\n");
    let ids = engine.tokenizer().encode(&text, Specials::AsText).expect("it is short");
    let n_tokens = 20 + usize::try_from(n * 7 % 180).expect("small");
    let mut request = GenerateRequest::new(ids, n_tokens);
    request.sampling = Sampling { temperature: 1.2, seed: n, ..Sampling::default() };
    if let Some(grammar) = grammar {
        request.sampling.logit_bias = favourites.map(|id| (id, 8.0)).collect();
        request.grammar = Some(grammar.clone());
    }
    request
}

fn hear(events: &flume::Receiver<Event>) -> (String, Finished) {
    let mut text = String::new();
    loop {
        match events.recv().expect("an answer ends with an event") {
            Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. } => {}
            Event::Token(token) => text.push_str(&token.text),
            Event::Tail(tail) => text.push_str(&tail),
            Event::Finished(finished) => return (text, finished),
            Event::Failed(fault) => panic!("{fault}"),
        }
    }
}

#[test]
fn g13_smollm2_says_values_or_that_it_did_not() {
    let n_answers: u64 =
        std::env::var("EXRAIL_TEST_ANSWERS").map_or(40, |n| n.parse().expect("a number"));
    let engine = start();
    let compiler = Arc::clone(engine.grammars().expect("a vocabulary with an end"));
    let compile = |n| compiler.compile(&Source::JsonSchema(schemas::schema(n))).expect("supported");
    let grammars: Vec<Grammar> = (0..N_SCHEMAS).map(compile).collect();
    let begun = Instant::now();
    let (mut n_whole, mut n_incomplete) = (0_u64, 0_u64);
    for first in (0..n_answers).step_by(10) {
        let free: Vec<_> = (0..N_TOGETHER / 5)
            .map(|n| engine.submit(request(&engine, None, first + n)).expect("it fits"))
            .collect();
        let asked: Vec<_> = (first..n_answers.min(first + N_TOGETHER))
            .map(|n| {
                let grammar = &grammars[usize::try_from(n % N_SCHEMAS).expect("small")];
                let request = request(&engine, Some(grammar), n);
                (grammar, engine.submit(request).expect("it fits"))
            })
            .collect();
        for (grammar, generation) in &asked {
            let (text, finished) = hear(&generation.events);
            let value: Result<Value, _> = serde_json::from_str(&text);
            let validator = grammar.validator().expect("a schema");
            let is_valid = value.is_ok_and(|value| validator.check(&value).is_ok());
            let told = finished.constrained.expect("it had a grammar").is_complete;
            let expected = if is_valid { Finish::Stop } else { Finish::SchemaIncomplete };
            assert_eq!((finished.finish, told), (expected, is_valid), "{text}");
            n_whole += u64::from(is_valid);
            n_incomplete += u64::from(!is_valid);
        }
        for generation in &free {
            hear(&generation.events);
        }
    }
    let counters = engine.counters();
    assert_eq!((counters.grammar.answers, counters.failed), (n_answers, 0));
    assert!(n_whole > n_incomplete, "{n_whole} whole, {n_incomplete} not");
    if let Some(path) = std::env::var_os("EXRAIL_TEST_RECORD") {
        let record = json!({"kind": "constrained", "model": engine.facts().model_name,
            "kernels": engine.facts().backend, "schemas": N_SCHEMAS, "answers": n_answers,
            "valid": n_whole, "told_incomplete": n_incomplete, "seconds": begun.elapsed().as_secs_f64(),
            "masked_tokens": counters.grammar.masked_tokens,
            "forced_tokens": counters.grammar.forced_tokens,
            "closing_tokens": counters.grammar.closing_tokens,
            "argmax_masked": counters.grammar.argmax_masked,
            "mask_us": counters.grammar.mask_us});
        std::fs::write(path, format!("{record:#}\n")).expect("the record can be written");
    }
}

/// Long fixed names, short values: what forced tokens are for.
fn long_names() -> Value {
    let names =
        ["customer_reference_number", "is_delivery_expected_tomorrow", "preferred_language"];
    let flags = names.map(|name| (name.to_owned(), json!({"enum": [true, false]})));
    let members: serde_json::Map<_, _> = flags.into_iter().collect();
    json!({"type": "object", "properties": members, "required": names,
        "additionalProperties": false})
}

/// Steps and tokens of one answer alone.
fn cost(engine: &EngineHandle, request: GenerateRequest) -> (u64, usize) {
    let before = engine.counters().steps;
    let generation = engine.submit(request).expect("it fits");
    let (_, finished) = hear(&generation.events);
    (engine.counters().steps - before, finished.usage.completion_tokens)
}

/// An answer under a grammar costs a step for each choice, a free one for each token. What that is worth in time is
/// measured by `exrail-bench constrained`.
#[test]
fn an_answer_of_long_fixed_names_costs_fewer_steps_than_tokens() {
    let engine = start();
    let compiler = Arc::clone(engine.grammars().expect("a vocabulary with an end"));
    let grammar = compiler.compile(&Source::JsonSchema(long_names())).expect("supported");
    let mut request = request(&engine, None, 0);
    request.max_tokens = 200;
    request.sampling = Sampling::greedy();
    request.prefix_cache = false;
    let locked = GenerateRequest { grammar: Some(grammar), ..request.clone() };
    let (locked_steps, n_tokens) = cost(&engine, locked);
    let free = GenerateRequest { max_tokens: n_tokens, stop_at_eos: false, ..request };
    let (free_steps, n_free) = cost(&engine, free);
    assert_eq!((n_free, free_steps), (n_tokens, u64::try_from(n_tokens).expect("small")));
    assert!(2 * locked_steps < free_steps, "{locked_steps} of {free_steps}");
}
