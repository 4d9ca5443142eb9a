//! Answers under a grammar, turn by turn, and what comes through where one of the rules is broken by hand.
//!
//! The tiny model knows no JSON at all: whatever is valid is so because of the grammar.

use std::sync::{Arc, OnceLock};

use exrail_checkpoint::{Checkpoint, Gguf, VocabularyTable};
use exrail_grammar::{Compiler, Grammar, Limits, Source, Vocabulary};
use exrail_kernels::KvDtype;
use exrail_kernels::reference::Reference;
use exrail_testkit::{TinyLlama, tiny_llama};
use exrail_text::Tokenizer;
use serde_json::{Value, json};

use super::tests::Bench;
use crate::constraint::Broken;
use crate::error::SubmitError;
use crate::event::{Constrained, Event, Finish, Finished, SequenceFault};
use crate::handle::{Engine, EngineOptions};
use crate::load::{Identity, LoadOptions, Loaded, prepare_generator};
use crate::loops::{LoopGuard, OnLoop};
use crate::request::{GenerateRequest, Sampling};
use crate::rotation::{RotatePolicy, RotationOptions};

/// What one answer said.
#[derive(Debug, Default)]
struct Heard {
    ids: Vec<u32>,
    text: String,
    n_rotations: usize,
    n_roll_backs: usize,
    end: Option<Result<Finished, SequenceFault>>,
}

impl Heard {
    fn of(events: &flume::Receiver<Event>) -> Heard {
        let mut heard = Heard::default();
        for event in events.drain() {
            match event {
                Event::Started { .. } => {}
                Event::Token(token) => {
                    heard.ids.push(token.id);
                    heard.text.push_str(&token.text);
                }
                Event::Rotated(_) => heard.n_rotations += 1,
                Event::RolledBack { n_tokens, n_text } => {
                    heard.n_roll_backs += 1;
                    heard.ids.truncate(n_tokens);
                    heard.text.truncate(n_text);
                }
                Event::Tail(text) => heard.text.push_str(&text),
                Event::Finished(finished) => heard.end = Some(Ok(finished)),
                Event::Failed(fault) => heard.end = Some(Err(fault)),
            }
        }
        heard
    }

    fn finished(&self) -> &Finished {
        match &self.end {
            Some(Ok(finished)) => finished,
            other => panic!("expected an end, found {other:?}"),
        }
    }

    fn finish(&self) -> Finish {
        self.finished().finish
    }

    fn constrained(&self) -> Constrained {
        self.finished().constrained.expect("it had a grammar")
    }
}

fn loaded() -> Loaded<Reference> {
    let checkpoint = Checkpoint::Gguf(Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap());
    let who = Identity { name: "tiny".to_owned(), sha256: String::new() };
    let load = LoadOptions::default();
    prepare_generator(Reference, &checkpoint, who, load, &mut |_| {}).unwrap()
}

fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(|| loaded().tokenizer)
}

/// A grammar over a vocabulary of the same size, in which each byte has the id of the one before.
fn over_other_ids(source: &Source) -> Grammar {
    let gguf = Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap();
    let mut table = VocabularyTable::from_gguf(&gguf).unwrap();
    table.tokens[3..259].rotate_left(1);
    let tokenizer = Tokenizer::from_vocabulary(crate::load::vocabulary(table)).unwrap();
    let vocabulary = Vocabulary::new(&Arc::new(tokenizer)).unwrap();
    Compiler::new(vocabulary, Limits::default()).unwrap().compile(source).unwrap()
}

fn compile(source: &Source) -> Grammar {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    let compiler = COMPILER.get_or_init(|| {
        Compiler::new(Vocabulary::new(tokenizer()).unwrap(), Limits::default()).unwrap()
    });
    compiler.compile(source).unwrap()
}

fn schema(schema: Value) -> Grammar {
    compile(&Source::JsonSchema(schema))
}

fn regex(pattern: &str) -> Grammar {
    compile(&Source::Regex(pattern.to_owned()))
}

/// Three required members with fixed names and numbers of four digits, no text.
fn record() -> Value {
    let names = ["alpha", "beta", "gamma"];
    let number = json!({"type": "integer", "minimum": 1000, "maximum": 9999});
    let members: serde_json::Map<_, _> =
        names.iter().map(|&name| (name.to_owned(), number.clone())).collect();
    json!({"type": "object", "properties": members, "required": names,
        "additionalProperties": false})
}

fn options() -> EngineOptions {
    EngineOptions {
        max_sequences: 4,
        kv_pages: Some(16),
        prefill_chunk: 16,
        kv_dtype: KvDtype::F32,
        ..EngineOptions::default()
    }
}

fn bench(runs_ahead: bool) -> Bench {
    let mut bench = Bench::with(options());
    bench.worker.runs_ahead = runs_ahead;
    bench
}

/// No model ends by itself.
const NO_ENDS: [(u32, f32); 3] = [(0, -100.0), (1, -100.0), (2, -100.0)];

/// Drawn nearly at random.
fn asked(grammar: Grammar, max_tokens: usize, seed: u64) -> GenerateRequest {
    let mut request = GenerateRequest::new((3..9).collect(), max_tokens);
    request.sampling = Sampling { temperature: 1.2, seed, ..Sampling::default() };
    request.grammar = Some(grammar);
    request
}

fn run(bench: &mut Bench, request: &GenerateRequest) -> Heard {
    let events = bench.send(request.clone());
    finish(bench);
    Heard::of(&events)
}

fn finish(bench: &mut Bench) {
    for _ in 0..8000 {
        if bench.is_idle() && bench.commands.is_empty() {
            return;
        }
        bench.turn();
    }
    panic!("it goes on and on");
}

/// Runs a request whose state is broken as soon as it is admitted.
fn run_broken(request: &GenerateRequest, broken: Broken) -> Heard {
    let mut bench = bench(false);
    let events = bench.send(request.clone());
    bench.worker.take_commands();
    bench.worker.admit();
    bench.worker.running[0].constraint().broken = broken;
    finish(&mut bench);
    Heard::of(&events)
}

fn is_valid(grammar: &Grammar, text: &str) -> bool {
    let value: Result<Value, _> = serde_json::from_str(text);
    value.is_ok_and(|value| grammar.validator().expect("a schema").check(&value).is_ok())
}

/// B8: constraints hold state, and it is each sequence's own.
#[test]
fn b8_two_sequences_of_a_batch_obey_their_own_schemas() {
    let (a, b) = (schema(json!({"enum": ["red", "green"]})), schema(record()));
    for runs_ahead in [false, true] {
        let mut bench = bench(runs_ahead);
        for seed in 0..10 {
            let free = bench.send(Bench::request(5, 30));
            let events = [&a, &b].map(|grammar| bench.send(asked(grammar.clone(), 100, seed)));
            finish(&mut bench);
            let [one, two] = events.each_ref().map(Heard::of);
            assert!(is_valid(&a, &one.text) && is_valid(&b, &two.text), "{one:?} {two:?}");
            assert_eq!([one.finish(), two.finish()], [Finish::Stop; 2]);
            assert_eq!(
                Heard::of(&free).ids,
                run(&mut self::bench(false), &Bench::request(5, 30)).ids
            );
        }
        let counters = bench.gauges.snapshot();
        assert_eq!(counters.grammar.answers, 20);
        assert_eq!(counters.pages_free, counters.pages_total);
    }
}

/// B12: the state goes on once for each token, however steps overlap.
#[test]
fn b12_on_a_device_that_runs_ahead_answers_are_those_of_one_that_waits() {
    let grammar = schema(record());
    let (mut ahead, mut waits) = (bench(true), bench(false));
    for seed in 0..100 {
        let requests = (0..4).map(|n| match n {
            // Beside one that is followed, which lands for the others.
            3 => Bench::request(5, 12),
            n => asked(grammar.clone(), 80, seed * 4 + n),
        });
        let requests: Vec<_> = requests.collect();
        let events: Vec<_> = requests.iter().map(|one| ahead.send(one.clone())).collect();
        finish(&mut ahead);
        for (n, (request, events)) in requests.iter().zip(&events).enumerate() {
            let found = Heard::of(events);
            if n < 3 {
                assert!(is_valid(&grammar, &found.text), "{}", found.text);
                assert_eq!(found.finish(), Finish::Stop);
            }
            if seed % 25 == 0 {
                assert_eq!(found.ids, run(&mut waits, request).ids);
            }
        }
    }
    assert_eq!(ahead.gauges.snapshot().grammar.answers, 300);
}

/// The mutation of both: what the model would say without its mask.
#[test]
fn without_the_mask_what_is_said_is_no_value() {
    let grammar = schema(record());
    let broken = run_broken(&asked(grammar.clone(), 60, 1), Broken::Mask);
    assert!(!is_valid(&grammar, &broken.text), "{}", broken.text);
}

/// B6: what ends, pads or is reserved is the model's favourite, at temperature 0 and from the first token.
#[test]
fn b6_control_tokens_that_rank_highest_never_come() {
    let one_of = json!({"oneOf": [{"const": "yes"}, {"const": "no"}, {"const": 12}]});
    for grammar in [schema(one_of), schema(record())] {
        for seed in 0..20 {
            let mut request = asked(grammar.clone(), 100, seed);
            request.sampling.temperature = if seed == 0 { 0.0 } else { 1.2 };
            request.sampling.logit_bias = vec![(0, 100.0), (1, 100.0), (2, 100.0)];
            let heard = run(&mut bench(false), &request);
            assert!(is_valid(&grammar, &heard.text), "{}", heard.text);
            assert_eq!(heard.finish(), Finish::Stop);
            assert!(heard.ids.iter().all(|&id| id > 2), "{:?}", heard.ids);
        }
        let mut request = asked(grammar.clone(), 100, 0);
        request.sampling.logit_bias = vec![(0, 100.0), (1, 100.0), (2, 100.0)];
        let broken = run_broken(&request, Broken::Mask);
        assert!(!is_valid(&grammar, &broken.text), "mutation: {}", broken.text);
    }
}

/// The mutation of B6: a mask that ends where text does. The favourite is drawn, the automaton does not take it, and
/// that is what the client hears, whatever the seed.
#[test]
fn mutation_b6_a_control_token_that_no_mask_covers_is_drawn_and_ends_the_answer_in_a_fault() {
    let grammar = schema(json!({"oneOf": [{"const": "yes"}, {"const": "no"}, {"const": 12}]}));
    for favourite in [0, 1, 2] {
        for seed in 0..3 {
            let mut request = asked(grammar.clone(), 100, seed);
            request.sampling.logit_bias = vec![(favourite, 100.0)];
            let heard = run(&mut bench(false), &request);
            assert!(is_valid(&grammar, &heard.text), "{}", heard.text);
            let broken = run_broken(&request, Broken::Width);
            let expected = format!("token {favourite} is not allowed here");
            let Some(Err(SequenceFault::GrammarFault { step: 0, message })) = &broken.end else {
                panic!("{:?}", broken.end)
            };
            assert_eq!((message, broken.text.as_str()), (&expected, ""));
        }
    }
}

/// The mutation of B3: a constraint that turns out to be broken in the engine's thread, where others are served,
/// and not before the queue. It takes a place and a step, and its client hears of a fault instead of a refusal.
#[test]
fn mutation_b3_a_constraint_that_breaks_behind_the_queue_takes_steps() {
    let mut bench = bench(false);
    let events = bench.send(asked(schema(record()), 100, 1));
    bench.worker.take_commands();
    bench.worker.admit();
    assert_eq!(bench.worker.running.len(), 1, "a place");
    bench.worker.running[0].constraint().broken = Broken::Automaton;
    finish(&mut bench);
    let heard = Heard::of(&events);
    assert!(matches!(heard.end, Some(Err(SequenceFault::GrammarFault { .. }))), "{heard:?}");
    assert!(bench.gauges.snapshot().steps > 0);
}

/// A grammar of token ids that mean something else here is refused before it is queued.
#[test]
fn a_grammar_over_another_vocabulary_is_refused_with_both_fingerprints() {
    let engine = Engine::start(loaded(), options()).unwrap();
    let foreign = over_other_ids(&Source::JsonSchema(record()));
    assert_ne!(foreign, schema(record()), "of one source, and not the same grammar");
    let found = foreign.vocabulary_fingerprint().to_owned();
    let error = engine.submit(asked(foreign, 100, 1)).unwrap_err();
    let expected = tokenizer().fingerprint().to_owned();
    assert_eq!(error, SubmitError::ForeignGrammar { expected, found });
    assert_eq!((engine.counters().submitted, engine.counters().steps), (0, 0));
    // One that another compiler made over the same ids is as good as the engine's own.
    engine.submit(asked(schema(record()), 100, 1)).unwrap();
}

/// The mutation: nobody compares, as the queue itself does not. An answer that is told as whole is no value.
#[test]
fn mutation_a_grammar_over_other_ids_is_told_as_obeyed_and_was_not() {
    let grammar = over_other_ids(&Source::JsonSchema(record()));
    let heard = run(&mut bench(false), &asked(grammar.clone(), 100, 1));
    assert_eq!((heard.finish(), heard.constrained().is_complete), (Finish::Stop, true));
    assert!(!is_valid(&grammar, &heard.text), "{}", heard.text);
}

/// B7: a model that prefers blanks gets no further with them, and nothing comes behind the last brace.
#[test]
fn b7_blanks_do_not_stall() {
    let grammar = schema(json!({"type": "object", "properties": {"a": {"type": "integer"}},
        "required": ["a"], "additionalProperties": false}));
    let blanks = (0..u32::try_from(tokenizer().vocab_len()).unwrap()).filter(|&id| {
        let bytes = tokenizer().token_bytes(id).unwrap_or_default();
        !bytes.is_empty() && bytes.iter().all(u8::is_ascii_whitespace)
    });
    let blanks: Vec<(u32, f32)> = blanks.map(|id| (id, 90.0)).collect();
    let end: Vec<(u32, f32)> =
        vec![(tokenizer().encode("}", exrail_text::Specials::AsText).unwrap()[0], 50.0)];
    for seed in 0..20 {
        let mut request = asked(grammar.clone(), 200, seed);
        request.sampling.logit_bias = [blanks.clone(), end.clone()].concat();
        let heard = run(&mut bench(false), &request);
        assert_eq!(heard.finish(), Finish::Stop, "{}", heard.text);
        assert!(is_valid(&grammar, &heard.text) && heard.text.ends_with('}'), "{}", heard.text);
        assert!(heard.ids.len() < 150, "{:?}", heard.text);
    }
    // The mutation: without its mask it says blanks to the end.
    let mut request = asked(grammar, 200, 0);
    request.sampling.logit_bias = blanks;
    let broken = run_broken(&request, Broken::Mask);
    assert_eq!(broken.ids.len(), 200);
    assert!(broken.text.trim().len() < 10, "{}", broken.text);
}

/// B11: an object that was cut is never told as whole, whatever the tokens that it may have.
#[test]
fn b11_with_any_number_of_tokens_an_answer_is_whole_or_told_as_incomplete() {
    let grammar = schema(record());
    let mut n_whole = 0;
    for max_tokens in 1..=64 {
        let mut bench = bench(max_tokens % 2 == 0);
        let heard = run(&mut bench, &asked(grammar.clone(), max_tokens, max_tokens as u64));
        assert!(heard.ids.len() <= max_tokens);
        let is_whole = is_valid(&grammar, &heard.text);
        let told = heard.constrained().is_complete;
        let expected = if is_whole { Finish::Stop } else { Finish::SchemaIncomplete };
        assert_eq!((heard.finish(), told), (expected, is_whole), "{max_tokens}: {}", heard.text);
        n_whole += usize::from(is_whole);
    }
    assert!((1..64).contains(&n_whole), "{n_whole}");
    // The mutation: what is cut is told as an answer that ended.
    let broken = run_broken(&asked(grammar.clone(), 25, 1), Broken::Telling);
    assert!(broken.constrained().is_complete && !is_valid(&grammar, &broken.text));
}

/// B11: with few tokens left the answer turns to its end.
#[test]
fn b11_an_answer_that_could_go_on_for_ever_ends_in_time() {
    let nested = json!({"type": "array", "items": {"$ref": "#"}});
    let ids = tokenizer().encode("[", exrail_text::Specials::AsText).unwrap();
    let request = |max_tokens, seed| {
        let mut request = asked(schema(nested.clone()), max_tokens, seed);
        request.sampling.logit_bias = vec![(ids[0], 12.0)];
        request
    };
    // A reader of JSON gives up below 128 brackets.
    for max_tokens in [2, 3, 8, 21, 64, 150, 200] {
        let heard = run(&mut bench(false), &request(max_tokens, 3));
        assert_eq!(heard.finish(), Finish::Stop, "{max_tokens}: {}", heard.text);
        assert!(is_valid(&schema(nested.clone()), &heard.text), "{}", heard.text);
        assert!(heard.constrained().n_closing > 0);
    }
    // The mutation: nobody looks for the end, and it is not reached.
    let broken = run_broken(&request(64, 3), Broken::Closing);
    assert_eq!((broken.finish(), broken.ids.len()), (Finish::SchemaIncomplete, 64));
}

/// B13: what is taken back of the answer is taken back of its grammar.
#[test]
fn b13_an_answer_that_goes_back_before_a_loop_takes_its_grammar_along() {
    let grammar = regex("([ab][cd][ef][gh][ij])*");
    let mut request = asked(grammar, 1500, 1);
    // The first letter of each pair, for ever.
    let firsts = [100, 102, 104, 106, 108].map(|id| (id, 50.0));
    let logit_bias = [&NO_ENDS[..], &firsts].concat();
    request.sampling = Sampling { logit_bias, ..Sampling::greedy() };
    let on_loop = OnLoop::RollBack;
    request.loop_guard = Some(LoopGuard { on_loop, ..LoopGuard::default() });
    let fits = |text: &str| {
        let places = ["ab", "cd", "ef", "gh", "ij"];
        text.chars().enumerate().all(|(at, c)| places[at % 5].contains(c))
    };
    let heard = run(&mut bench(false), &request);
    assert_eq!(heard.n_roll_backs, 1, "{heard:?}");
    assert!(fits(&heard.text), "{}", heard.text);
    let broken = run_broken(&request, Broken::RollBack);
    assert_eq!(broken.n_roll_backs, 1);
    assert!(!fits(&broken.text), "mutation: {}", broken.text);
}

/// A rotation drops tokens of the context and nothing of the grammar's state.
#[test]
fn a_rotation_leaves_the_grammar_where_it_is() {
    for policy in [RotatePolicy::Reprefill, RotatePolicy::SinkWindow] {
        let mut request = asked(regex("([ab][cd][ef]){90}"), 300, 5);
        request.rotation.options =
            RotationOptions { policy, rotate_at: Some(60), window: Some(20), sink: None };
        let heard = run(&mut bench(false), &request);
        assert!(heard.n_rotations > 2, "{}", heard.n_rotations);
        assert_eq!((heard.finish(), heard.text.len()), (Finish::Stop, 270));
        let places = ["ab", "cd", "ef"];
        let fits = heard.text.chars().enumerate().all(|(at, c)| places[at % 3].contains(c));
        assert!(fits, "{}", heard.text);
    }
}

/// A rotation that waits for an open value asks the grammar, which knows that this text is none.
#[test]
fn whether_a_value_is_open_is_the_grammars_to_say() {
    let run = |pattern: &str| {
        let mut request = asked(regex(pattern), 200, 5);
        request.rotation.options = RotationOptions {
            policy: RotatePolicy::Reprefill,
            rotate_at: Some(60),
            window: Some(20),
            sink: None,
        };
        request.rotation.waits_for_json = true;
        request.sampling.logit_bias = NO_ENDS.to_vec();
        run(&mut bench(false), &request)
    };
    // To a reader of the text this is an open array for ever; each beginning is a whole answer.
    let open = run(r"\[(1,)*");
    // It ends at the last whole beginning that fits, and not inside a pair.
    assert_eq!((open.finish(), open.n_rotations > 0), (Finish::Stop, true), "{open:?}");
    // To it this is no JSON at all, and no beginning is whole.
    let closed = run(r"([ab][cd]){90}");
    assert_eq!((closed.n_rotations, closed.finish()), (0, Finish::Stop));
}

/// What is bound to follow costs no step, and is what would have been drawn.
#[test]
fn forced_tokens_are_those_that_would_have_been_drawn_one_by_one() {
    let grammar = schema(record());
    for seed in 0..20 {
        let request = asked(grammar.clone(), 100, seed);
        let mut forcing = bench(false);
        let forced = run(&mut forcing, &request);
        let mut drawing = bench(false);
        let drawn = run(&mut drawing, &GenerateRequest { logprobs: Some(0), ..request.clone() });
        assert_eq!((&forced.ids, &forced.text), (&drawn.ids, &drawn.text));
        assert_eq!(forced.finished().usage, drawn.finished().usage);
        let (found, expected) = (forced.constrained(), drawn.constrained());
        assert_eq!(expected.n_forced, 0);
        assert_eq!(found.n_masked + found.n_forced, expected.n_masked);
        let steps = [&forcing, &drawing].map(|bench| bench.gauges.snapshot().steps);
        assert!(steps[0] + found.n_forced as u64 / 2 < steps[1], "{steps:?}, {found:?}");
        let counters = forcing.gauges.snapshot();
        assert_eq!(counters.tokens_generated, forced.ids.len() as u64);
        assert_eq!(counters.grammar.forced_tokens, found.n_forced as u64);
        assert_eq!(counters.pages_free, counters.pages_total);
    }
}

/// An answer of which there is only one is said without a forward pass.
#[test]
fn what_leaves_no_choice_costs_no_step() {
    let grammar = regex("it is the only one");
    let mut bench = bench(false);
    let heard = run(&mut bench, &asked(grammar.clone(), 60, 1));
    assert_eq!(heard.text, "it is the only one");
    assert_eq!((heard.finish(), bench.gauges.snapshot().steps), (Finish::Stop, 0));
}

/// Forced tokens are fed in chunks, whose pages are shared only once they are computed.
#[test]
fn an_answer_over_several_pages_of_forced_tokens_is_that_of_a_cold_cache() {
    let long = "x".repeat(600);
    let grammar = schema(json!({"type": "object", "required": ["a", "b"],
        "properties": {"a": {"const": long}, "b": {"enum": [1, 2]}},
        "additionalProperties": false}));
    let mut warm = bench(false);
    for seed in 0..3 {
        let request = asked(grammar.clone(), 700, seed);
        let heard = run(&mut warm, &request);
        assert!(is_valid(&grammar, &heard.text));
        let mut cold = Bench::with(EngineOptions { prefix_cache: false, ..options() });
        assert_eq!(run(&mut cold, &request).ids, heard.ids);
        let mut chat = request.clone();
        chat.prompt.extend(&heard.ids);
        let expected =
            run(&mut Bench::with(EngineOptions { prefix_cache: false, ..options() }), &chat);
        let found = run(&mut warm, &chat);
        assert_eq!(found.ids, expected.ids);
        // The pages of the answer that were computed are found again.
        let n_cached = found.finished().usage.cached_tokens;
        assert!(n_cached > 0, "{n_cached} of {}", chat.prompt.len());
    }
    assert_eq!(warm.gauges.snapshot().kv_faults, 0);
}

/// Pages that are withdrawn cost time; the grammar stands where the answer does.
#[test]
fn an_answer_that_is_computed_anew_goes_on_under_its_grammar() {
    let grammar = schema(record());
    let request = asked(grammar.clone(), 100, 4);
    let mut bench = bench(false);
    let events = bench.send(request.clone());
    for _ in 0..4 {
        bench.turn();
    }
    assert_eq!(bench.worker.running.len(), 1);
    let n_pages = bench.worker.running[0].pages.len();
    let mut sequence = bench.worker.take_out(0, Some(n_pages));
    sequence.restart();
    bench.worker.suspended.push_back(sequence);
    finish(&mut bench);
    let heard = Heard::of(&events);
    assert_eq!(heard.ids, run(&mut self::bench(false), &request).ids);
    assert!(is_valid(&grammar, &heard.text));
}

/// A fault of one automaton is the fault of one sequence.
#[test]
fn an_automaton_that_fails_ends_its_sequence_and_no_other() {
    let grammar = schema(record());
    let mut bench = bench(false);
    let failing = bench.send(asked(grammar.clone(), 100, 1));
    let other = bench.send(asked(grammar.clone(), 100, 2));
    bench.turn();
    bench.worker.running[0].constraint().broken = Broken::Automaton;
    finish(&mut bench);
    let end = Heard::of(&failing).end;
    assert!(
        matches!(&end, Some(Err(SequenceFault::GrammarFault { message, .. })) if message.contains("fuel")),
        "{end:?}"
    );
    assert!(is_valid(&grammar, &Heard::of(&other).text));
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.failed, counters.grammar.faults, counters.panics), (1, 1, 0));
    assert_eq!(counters.pages_free, counters.pages_total);
}

/// A stop string inside a value leaves no value.
#[test]
fn a_stop_string_inside_a_value_is_told() {
    let grammar = schema(record());
    for (stop, is_whole) in [("gamma", false), ("}", false), ("nowhere", true)] {
        let mut request = asked(grammar.clone(), 100, 1);
        request.stop = vec![stop.to_owned()];
        let heard = run(&mut bench(false), &request);
        let expected = if is_whole { Finish::Stop } else { Finish::SchemaIncomplete };
        assert_eq!(heard.finish(), expected, "{stop}: {}", heard.text);
        assert_eq!(heard.constrained().is_complete, is_whole);
        assert_eq!(is_valid(&grammar, &heard.text), is_whole);
    }
    // What stands before it can be whole by itself.
    let mut request = asked(regex("[ab]+;[ab]+"), 100, 1);
    request.sampling.logit_bias = vec![(62, 9.0)]; // the semicolon
    request.stop = vec![";".to_owned()];
    assert_eq!(run(&mut bench(false), &request).finish(), Finish::SchemaIncomplete);
    request.grammar = Some(regex("[ab]+;?[ab]*"));
    let heard = run(&mut bench(false), &request);
    assert_eq!(heard.finish(), Finish::Stop);
    assert_eq!(heard.finished().stop_string.as_deref(), Some(";"));
}

/// G-13: the share of the model's probability on what is allowed, and how often its first choice is not.
#[test]
fn a_model_that_is_forced_is_told() {
    let grammar = schema(record());
    let mut bench = bench(false);
    let heard = run(&mut bench, &asked(grammar, 100, 1));
    let told = heard.constrained();
    assert!(
        told.allowed_mass_min <= told.allowed_mass_mean && told.allowed_mass_mean < 0.5,
        "{told:?}"
    );
    assert!(told.n_argmax_masked > 0 && told.n_argmax_masked <= told.n_masked, "{told:?}");
    let free = run(&mut self::bench(false), &asked(regex("(.|\\n)*"), 40, 1));
    let free = free.constrained();
    assert!(!free.is_mass_low && free.allowed_mass_mean > told.allowed_mass_mean, "{free:?}");
    let counters = bench.gauges.snapshot().grammar;
    assert_eq!(counters.masked_tokens, told.n_masked as u64);
    assert_eq!(counters.low_mass, u64::from(told.is_mass_low));
    assert_eq!(counters.argmax_masked, told.n_argmax_masked as u64);
}

/// Cancelled in any turn, it leaves nothing behind.
#[test]
fn cancelled_under_a_grammar_it_is_told_as_what_it_is() {
    let grammar = schema(record());
    for n_turns in 1..8 {
        let mut bench = bench(n_turns % 2 == 0);
        let events = bench.send(asked(grammar.clone(), 100, 1));
        let kept = bench.send(asked(grammar.clone(), 100, 2));
        for _ in 0..n_turns {
            bench.turn();
        }
        bench.commands.send(crate::handle::Command::Cancel(crate::SequenceId(0))).unwrap();
        finish(&mut bench);
        let heard = Heard::of(&events);
        if heard.finish() == Finish::Cancelled {
            assert!(!heard.constrained().is_complete);
        }
        assert!(is_valid(&grammar, &Heard::of(&kept).text));
        let counters = bench.gauges.snapshot();
        assert_eq!(counters.pages_free, counters.pages_total);
    }
}
