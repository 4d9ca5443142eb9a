//! Many schemas, many answers, a model that knows no JSON and prefers what is not allowed.

use std::sync::Arc;

use exrail_engine::{EngineHandle, EngineOptions, Finish, GenerateRequest, Sampling};
use exrail_grammar::{Compiler, Grammar, Source};
use exrail_testkit::Random;
use serde_json::Value;

use crate::schemas::schema;
use crate::support::{
    Answer, Faults, assert_all_pages_return, collect, generate, healthy, options, plain, prompt,
    start_with,
};

const N_SCHEMAS: u32 = 100;
const N_ANSWERS: u32 = 600;
/// Answers that run at a time, and the plain ones beside them.
const N_TOGETHER: u32 = 20;
const N_PLAIN: u32 = 2;

fn compile(grammars: &Arc<Compiler>, n: u32) -> Grammar {
    let source = Source::JsonSchema(schema(u64::from(n)));
    grammars.compile(&source).unwrap_or_else(|error| panic!("schema {n}: {error}: {source:?}"))
}

/// At temperature 1.2, with a third of the vocabulary ranked up: control tokens, blanks, braces, letters, whatever
/// it is. What is allowed of it at any place is little.
fn adversarial(engine: &EngineHandle, grammar: Grammar, n: u32) -> GenerateRequest {
    let mut random = Random::named(u64::from(n), "adversary");
    let vocab_len = engine.facts().vocab_len;
    let favourites = (0..u32::try_from(vocab_len).unwrap()).filter(|_| random.below(3) == 0);
    let mut request = GenerateRequest::new(prompt(n % 97, 5), 60 + (n as usize * 7) % 240);
    request.sampling = Sampling {
        temperature: 1.2,
        seed: u64::from(n),
        logit_bias: favourites.map(|id| (id, 15.0)).collect(),
        ..Sampling::default()
    };
    request.grammar = Some(grammar);
    request
}

fn is_valid(grammar: &Grammar, text: &str) -> bool {
    let value: Result<Value, _> = serde_json::from_str(text);
    value.is_ok_and(|value| grammar.validator().unwrap().check(&value).is_ok())
}

/// Whether an answer is whole; panics where it is told as what it is not.
fn is_whole(grammar: &Grammar, answer: &Answer) -> bool {
    let (text, finished) = (answer.text(), answer.finished());
    let told = finished.constrained.expect("it had a grammar");
    match finished.finish {
        Finish::Stop => assert!(is_valid(grammar, &text) && told.is_complete, "{text}"),
        Finish::SchemaIncomplete => {
            assert!(!told.is_complete && !is_valid(grammar, &text), "{text}");
        }
        finish @ (Finish::Length
        | Finish::Degenerate
        | Finish::RotationRequired
        | Finish::Cancelled) => panic!("{finish:?}: {text}"),
    }
    finished.finish == Finish::Stop
}

/// The lock of G-13: every answer is valid, or told as incomplete.
#[test]
fn g13_two_thousand_answers_under_a_hundred_schemas_are_valid_or_told_as_incomplete() {
    let engine = start_with(
        Faults::default(),
        true,
        EngineOptions { kv_pages: Some(32), max_sequences: 16, ..options() },
    );
    let grammars = Arc::clone(engine.grammars().unwrap());
    let grammars: Vec<Grammar> = (0..N_SCHEMAS).map(|n| compile(&grammars, n)).collect();
    let expected: Vec<Vec<u32>> =
        (0..N_PLAIN).map(|n| generate(&engine, plain(prompt(n, 9), 25)).ids()).collect();
    let mut n_whole = 0_u32;
    for first in (0..N_ANSWERS).step_by(N_TOGETHER as usize) {
        let plain: Vec<_> =
            (0..N_PLAIN).map(|n| engine.submit(plain(prompt(n, 9), 25)).unwrap()).collect();
        let asked = (first..first + N_TOGETHER).map(|n| {
            let grammar = &grammars[(n % N_SCHEMAS) as usize];
            (grammar, engine.submit(adversarial(&engine, grammar.clone(), n)).unwrap())
        });
        let asked: Vec<_> = asked.collect();
        for (grammar, generation) in &asked {
            n_whole += u32::from(is_whole(grammar, &collect(generation)));
        }
        for (generation, expected) in plain.iter().zip(&expected) {
            assert_eq!(collect(generation).ids(), *expected, "who has no grammar knows of none");
        }
    }
    let counters = engine.counters();
    assert_eq!(counters.grammar.answers, u64::from(N_ANSWERS));
    assert_eq!(counters.grammar.incomplete, u64::from(N_ANSWERS - n_whole));
    assert_eq!((counters.failed, counters.panics), (0, 0));
    assert!(n_whole * 4 > N_ANSWERS, "{n_whole} of {N_ANSWERS} are whole");
    assert_all_pages_return(&engine);
}

/// The mutation: the same model without the lock.
#[test]
fn without_a_grammar_the_same_answers_are_no_values() {
    let engine = start_with(Faults::default(), true, options());
    let grammars = Arc::clone(engine.grammars().unwrap());
    for n in 0..20 {
        let grammar = compile(&grammars, n);
        let mut request = adversarial(&engine, grammar.clone(), n);
        request.grammar = None;
        assert!(!is_valid(&grammar, &generate(&engine, request).text()));
    }
}

/// A grammar needs its end.
#[test]
fn a_grammar_without_an_end_is_refused() {
    let engine = start_with(Faults::default(), false, options());
    let mut request = adversarial(&engine, compile(engine.grammars().unwrap(), 1), 1);
    request.stop_at_eos = false;
    let error = engine.submit(request).unwrap_err().to_string();
    assert!(error.contains("stop_at_eos"), "{error}");
}

/// A logit that is no number is a fault under a grammar, too, and nobody else's.
#[test]
fn no_numbers_under_a_grammar_fail_the_sequence() {
    use crate::support::NAN_TOKEN;
    let engine = start_with(Faults { nan: Some(NAN_TOKEN), ..Faults::default() }, false, options());
    let grammar = compile(engine.grammars().unwrap(), 2);
    let mut request = adversarial(&engine, grammar.clone(), 3);
    request.sampling.logit_bias = healthy();
    request.prompt.push(NAN_TOKEN);
    let failing = engine.submit(request.clone()).unwrap();
    request.prompt.pop();
    request.max_tokens = 300;
    let other = engine.submit(request).unwrap();
    assert!(collect(&failing).fault().to_string().contains("non-finite"));
    assert!(is_whole(&grammar, &collect(&other)));
    assert_all_pages_return(&engine);
}
