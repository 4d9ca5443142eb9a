//! What follows a rotation is what a fresh sequence with the kept tokens gets, and one broken rule at a time
//! is seen.

use std::ops::Range;
use std::time::Instant;

use exrail_kernels::KvDtype;
use exrail_testkit::TinyLlama;
use proptest::prelude::*;

use super::super::tests::Bench;
use super::*;
use crate::event::{Event, Finished, SequenceId};
use crate::handle::{Command, EngineOptions};
use crate::places::PlaceLimits;
use crate::request::{GenerateRequest, Sampling};
use crate::rotation::{RotatePolicy, Rotated, Rotation, RotationOptions};
use crate::sampler::{Sampler, SamplerScratch};
use crate::sequence::{Job, Scoring, Traffic, Waiting};

/// The answer in the parts that its rotations make of it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    pub(super) ids: Vec<u32>,
    text: String,
    /// Each with the tokens of the answer before it.
    pub(super) rotations: Vec<(usize, Rotated)>,
    pub(super) end: Option<Finished>,
}

impl Said {
    pub(super) fn of(events: &flume::Receiver<Event>) -> Said {
        let mut said = Said::default();
        for event in events.drain() {
            match event {
                Event::Started { .. } | Event::RolledBack { .. } => {}
                Event::Token(token) => {
                    said.ids.push(token.id);
                    said.text.push_str(&token.text);
                }
                Event::Rotated(rotated) => said.rotations.push((said.ids.len(), rotated)),
                Event::Tail(text) => said.text.push_str(&text),
                Event::Finished(finished) => said.end = Some(finished),
                Event::Failed(fault) => panic!("{fault}"),
            }
        }
        said
    }

    pub(super) fn finish(&self) -> Option<Finish> {
        self.end.as_ref().map(|end| end.finish)
    }
}

pub(super) fn bench(kv_pages: usize, runs_ahead: bool) -> Bench {
    bench_of(TinyLlama::default(), kv_pages, runs_ahead)
}

pub(super) fn bench_of(model: TinyLlama, kv_pages: usize, runs_ahead: bool) -> Bench {
    let options = EngineOptions {
        max_sequences: 4,
        kv_pages: Some(kv_pages),
        prefill_chunk: 64,
        kv_dtype: KvDtype::F32,
        ..EngineOptions::default()
    };
    let mut bench = Bench::of_model(model, options);
    bench.worker.runs_ahead = runs_ahead;
    bench
}

/// Ordinary tokens, different for each `n`.
pub(super) fn tokens(n: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| 3 + (n * 37 + i * 11 + i * i) % 250).collect()
}

pub(super) fn rotation(rotate_at: usize, window: usize, pinned: Range<usize>) -> Rotation {
    let policy = RotatePolicy::Reprefill;
    let (rotate_at, window) = (Some(rotate_at), Some(window));
    let options = RotationOptions { policy, rotate_at, window, sink: None };
    Rotation { options, pinned: vec![pinned], waits_for_json: false }
}

/// Nearly at random, so that tokens tell contexts apart, to `max_tokens`.
pub(super) fn request(n_prompt: u32, max_tokens: usize, rotation: Rotation) -> GenerateRequest {
    let mut request = GenerateRequest::new(tokens(n_prompt, n_prompt), max_tokens);
    request.sampling = Sampling { temperature: 2.0, seed: 5, ..Sampling::default() };
    request.stop_at_eos = false;
    request.rotation = rotation;
    request
}

pub(super) fn run(bench: &mut Bench, request: &GenerateRequest) -> Said {
    let events = bench.send(request.clone());
    bench.finish();
    Said::of(&events)
}

/// The logits behind each of these tokens, from an engine that has seen nothing before.
fn cold(ids: Vec<u32>) -> Vec<Vec<f32>> {
    let mut bench = bench(8, false);
    let (rows, receiver) = flume::unbounded();
    let job = Job::Score { ids, scoring: Scoring::Chunks, rows };
    let (id, traffic, submitted) = (SequenceId(0), Traffic::User, Instant::now());
    let waiting = Waiting { id, traffic, blank: 0, submitted, job };
    bench.gauges.enter_queue(None, PlaceLimits::NONE).unwrap();
    bench.commands.send(Command::Submit(waiting)).unwrap();
    bench.finish();
    receiver.drain().collect::<Result<_, _>>().unwrap()
}

/// Draws the whole answer again, each part of it from a fresh prefill of what the rotation before it kept,
/// with one sampler and all tokens so far, and says where it differs first.
fn differs_from_cold(said: &Said, request: &GenerateRequest) -> Option<usize> {
    let mut sampler = Sampler::new(request.sampling.clone());
    let mut scratch = SamplerScratch::default();
    let mut history = request.prompt.clone();
    let whole = || (0..request.prompt.len()).collect::<Vec<_>>();
    let starts = said
        .rotations
        .iter()
        .map(|(at, rotated)| (*at, rotated.kept.iter().cloned().flatten().collect::<Vec<usize>>()));
    let starts: Vec<(usize, Vec<usize>)> = std::iter::once((0, whole())).chain(starts).collect();
    let all = [&request.prompt[..], &said.ids].concat();
    for (n, (from, kept)) in starts.iter().enumerate() {
        let to = starts.get(n + 1).map_or(said.ids.len(), |next| next.0);
        let context = kept.iter().map(|&at| all[at]).chain(said.ids[*from..to].iter().copied());
        let rows = cold(context.collect());
        for (row, at) in rows[kept.len() - 1..].iter().zip(*from..to) {
            let id = sampler.sample(row, &history, &mut scratch).unwrap();
            if id != said.ids[at] {
                return Some(at);
            }
            history.push(id);
        }
    }
    None
}

#[test]
fn what_follows_is_what_a_fresh_sequence_gets() {
    for runs_ahead in [false, true] {
        let mut bench = bench(8, runs_ahead);
        let request = request(40, 120, rotation(80, 20, 0..8));
        let said = run(&mut bench, &request);
        assert_eq!((said.ids.len(), said.finish()), (120, Some(Finish::Length)));
        let first = &said.rotations[0];
        assert_eq!(first.0, 40, "80 tokens");
        assert_eq!((first.1.tokens_before, first.1.tokens_after), (80, 28));
        assert_eq!(first.1.dropped, [Range { start: 8, end: 60 }]);
        assert_eq!(first.1.kept, [0..8, 60..80]);
        assert_eq!(said.rotations.len(), 2, "at 40 and 92 tokens");
        assert_eq!(differs_from_cold(&said, &request), None);
        let usage = said.end.as_ref().unwrap().usage;
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (40, 120));
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.rotations, counters.finished, counters.kv_faults), (2, 1, 0));
        assert_eq!((counters.tokens_prompt, counters.tokens_generated), (40, 120));
        assert_eq!(counters.pages_free, counters.pages_total);
    }
}

/// C7 of the field faults: the same tokens however many run, and however they are asked for.
#[test]
fn c7_a_rotated_answer_is_the_same_beside_others() {
    let requests: Vec<GenerateRequest> =
        [40, 23, 60, 9].map(|n| request(n, 100, rotation(75, 30, 0..4))).into();
    let alone: Vec<Said> =
        requests.iter().map(|request| run(&mut bench(8, false), request)).collect();
    for runs_ahead in [false, true] {
        let mut bench = bench(8, runs_ahead);
        let events: Vec<_> = requests.iter().map(|request| bench.send(request.clone())).collect();
        bench.finish();
        for (events, alone) in events.iter().zip(&alone) {
            let said = Said::of(events);
            assert_eq!((&said.ids, &said.rotations), (&alone.ids, &alone.rotations));
            assert!(!said.rotations.is_empty());
        }
    }
}

#[test]
fn penalties_and_draws_go_on_over_what_was_dropped() {
    let mut request = request(30, 90, rotation(60, 15, 0..2));
    request.sampling.repetition_penalty = 5.0;
    request.sampling.repetition_window = 200;
    request.sampling.frequency_penalty = 1.5;
    let said = run(&mut bench(8, true), &request);
    assert!(said.rotations.len() >= 2);
    assert_eq!(differs_from_cold(&said, &request), None);
    // Mutation: a sampler that sees the context alone would have drawn others.
    let mut forgetful = request.clone();
    forgetful.sampling.repetition_window = 1;
    assert!(differs_from_cold(&said, &forgetful).is_some());
}

/// C8 of the field faults: pages are taken for what may be used at once, and not for the whole answer.
#[test]
fn c8_two_answers_longer_than_the_pool_run_in_it() {
    let mut bench = bench(2, false);
    let requests = [1, 2].map(|n| request(50 + n, 600, rotation(256, 100, 0..10)));
    let events = requests.clone().map(|request| bench.send(request));
    bench.turn();
    assert_eq!(bench.worker.running.len(), 2, "a page each");
    bench.finish();
    for (events, request) in events.iter().zip(&requests) {
        let said = Said::of(events);
        assert_eq!(said.finish(), Some(Finish::Length));
        assert_eq!(said.ids.len(), 600);
        assert_eq!(differs_from_cold(&said, request), None);
    }
    assert_eq!(bench.gauges.snapshot().pages_free, 2);
}

/// C9 of the field faults: what was said is there, and the end says why.
#[test]
fn c9_stop_delivers_everything_and_names_its_reason() {
    for runs_ahead in [false, true] {
        let mut with = rotation(70, 1, 0..1);
        with.options.policy = RotatePolicy::Stop;
        let mut bench = bench(8, runs_ahead);
        let said = run(&mut bench, &request(30, 500, with));
        assert_eq!(said.finish(), Some(Finish::RotationRequired));
        let free = run(&mut bench, &request(30, 40, Rotation::default()));
        assert_eq!((said.ids, said.text), (free.ids, free.text));
        assert_eq!(said.end.map(|end| end.usage.completion_tokens), Some(40));
        assert_eq!(bench.gauges.snapshot().finished, 2);
    }
}

/// A long pinned prefix is read from the cache that its own sequence left.
#[test]
fn a_pinned_page_is_not_computed_again() {
    let mut bench = bench(8, false);
    let events = bench.send(request(300, 400, rotation(500, 50, 0..280)));
    while bench.worker.suspended.is_empty() {
        bench.turn();
    }
    assert_eq!(bench.worker.suspended[0].fed, 0);
    bench.turn();
    let running = &bench.worker.running[0];
    assert_eq!(running.tokens.len(), 330);
    assert_eq!(running.fed, 256 + 64, "a page from the cache and a chunk");
    bench.finish();
    let said = Said::of(&events);
    assert_eq!(differs_from_cold(&said, &request(300, 400, rotation(500, 50, 0..280))), None);
}

/// Its pages are its own again before anybody who waits for some.
#[test]
fn nobody_passes_a_sequence_that_is_rotated() {
    let mut bench = bench(2, false);
    let events = bench.send(request(30, 900, rotation(512, 100, 0..5)));
    bench.turn();
    let waiting = bench.send(request(20, 30, Rotation::default()));
    while bench.worker.suspended.is_empty() {
        bench.turn();
    }
    bench.turn();
    assert_eq!((bench.worker.running.len(), bench.worker.waiting.is_empty()), (1, false));
    assert!(bench.worker.suspended.is_empty() && waiting.is_empty());
    // A cancelled one gives everything back, in that very state too.
    while bench.worker.suspended.is_empty() {
        bench.turn();
    }
    bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
    bench.finish();
    assert_eq!(Said::of(&events).finish(), Some(Finish::Cancelled));
    assert_eq!(Said::of(&waiting).ids.len(), 30);
    assert_eq!(bench.gauges.snapshot().pages_free, 2);
}

/// Turns until the next token fills the context of the only sequence.
fn turn_until_full(bench: &mut Bench) {
    while bench.worker.running.is_empty() || bench.worker.running[0].feeds_its_next_token() {
        bench.turn();
    }
}

/// An answer of one letter, with an object open or not when its context is full.
fn in_an_object(change: impl FnOnce(&mut Bench)) -> Said {
    let mut bench = bench(8, false);
    let mut with = rotation(70, 20, 0..4);
    with.waits_for_json = true;
    let mut request = request(30, 700, with);
    let is_letter = |&id: &u32| bench.worker.loaded.tokenizer.token_bytes(id) == Some(b"a");
    let letter = (0..260).find(is_letter).expect("a token of one letter");
    request.sampling.logit_bias = vec![(letter, 100.0)];
    let events = bench.send(request);
    turn_until_full(&mut bench);
    change(&mut bench);
    bench.finish();
    Said::of(&events)
}

#[test]
fn an_open_object_is_not_cut() {
    let open = |bench: &mut Bench| {
        bench.worker.running[0].rotating().push_text(b"{\"a\": \"");
    };
    let waits = in_an_object(open);
    assert_eq!(waits.finish(), Some(Finish::RotationRequired));
    assert_eq!((waits.ids.len(), waits.rotations.len()), (40 + 512, 0), "it waited 512 tokens");
    let closed = in_an_object(|bench| {
        open(bench);
        for _ in 0..30 {
            bench.turn();
        }
        bench.worker.running[0].rotating().push_text(b"\"}");
    });
    assert_eq!(closed.finish(), Some(Finish::Length));
    let (at, first) = &closed.rotations[0];
    assert!((66..=71).contains(at), "{at}");
    assert_eq!(first.tokens_after, 24);
    let plain = in_an_object(|_| {});
    assert_eq!(plain.rotations[0].0, 40);
    // Mutation: nobody looks, and the client gets an object whose beginning the model does not see.
    let mutated = in_an_object(|bench| {
        open(bench);
        bench.worker.running[0].rotating().ignore_json();
    });
    assert_eq!(mutated.rotations[0].0, 40);
}

// Mutations: the test breaks one rule by hand; what the rule is for must be seen.

/// Runs a request whose first rotation is changed, and says where the answer differs from the one of fresh
/// sequences.
fn mutated(change: impl FnOnce(&mut Bench)) -> (Said, Option<usize>) {
    let mut bench = bench(8, false);
    let request = request(40, 80, rotation(80, 20, 0..8));
    let events = bench.send(request.clone());
    turn_until_full(&mut bench);
    change(&mut bench);
    bench.finish();
    let said = Said::of(&events);
    let differs = differs_from_cold(&said, &request);
    (said, differs)
}

#[test]
fn without_the_pins_the_system_range_is_lost_and_the_answer_is_another() {
    let (right, differs) = mutated(|_| {});
    assert_eq!(differs, None);
    let (wrong, _) = mutated(|bench| bench.worker.running[0].rotating().unpin());
    assert_eq!(wrong.rotations[0].1.dropped, [Range { start: 0, end: 60 }]);
    assert_eq!(wrong.ids[..40], right.ids[..40]);
    assert_ne!(wrong.ids, right.ids, "the client sees it");
}

/// What a shift of the cache without new keys would be.
#[test]
fn keys_of_other_positions_would_reach_the_user() {
    let (wrong, differs) = mutated(|bench| {
        bench.turn();
        let mut sequence = bench.worker.suspended.pop_front().expect("it was rotated");
        let wanted = crate::cache::Wanted {
            n_pages: sequence.n_pages(),
            tokens: &sequence.tokens,
            namespace: None,
            own: false,
        };
        let Worker { loaded, pool, cache, .. } = &mut bench.worker;
        let mut device = super::super::paging::PoolPages { backend: &loaded.backend, pool };
        let table = cache.admit(&wanted, &mut device);
        sequence.take(table.unwrap().unwrap());
        // The pages are the same, with the keys and values of what was there before.
        sequence.fed = sequence.tokens.len() - 1;
        bench.worker.running.push(sequence);
    });
    assert_eq!(wrong.ids.len(), 80);
    assert_eq!(differs, Some(40), "the first token behind the rotation");
}

#[test]
fn a_step_behind_a_full_context_would_write_at_a_position_that_is_gone() {
    let mut bench = bench(8, true);
    let _events = bench.send(request(40, 80, rotation(80, 20, 0..8)));
    turn_until_full(&mut bench);
    assert_eq!(bench.worker.running[0].tokens.len(), 79);
    assert!(bench.worker.flight.is_some(), "the token that fills it is on its way");
    bench.turn();
    assert!(bench.worker.flight.is_none() && bench.worker.suspended.len() == 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() })]
    /// Rotated equals cold, whatever the lengths, the points of rotation and the sampling.
    #[test]
    fn rotated_equals_cold(
        n_prompt in 1..90_u32,
        room in 1..60_usize,
        window_share in 0.1..0.7_f64,
        pinned_share in 0.0..1.0_f64,
        max_tokens in 60..150_usize,
        runs_ahead in any::<bool>(),
        (temperature, penalty) in (prop_oneof![Just(0.0_f32), Just(3.0)], prop_oneof![Just(1.0_f32), Just(2.0)]),
    ) {
        let rotate_at = n_prompt as usize + room;
        let share = |n: usize, share: f64| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a part of a small number")]
            let part = (n as f64 * share) as usize;
            part
        };
        let window = share(rotate_at, window_share).max(1);
        let most = (rotate_at * 3 / 4).saturating_sub(window).min(n_prompt as usize);
        prop_assume!(most >= 1);
        let n_pinned = share(most, pinned_share).max(1);
        let from = n_prompt as usize - n_pinned;
        let mut request = request(n_prompt, max_tokens, rotation(rotate_at, window, from..from + n_pinned));
        request.sampling.temperature = temperature;
        request.sampling.repetition_penalty = penalty;
        let mut bench = bench(2, runs_ahead);
        let other = bench.send(self::request(33, 40, Rotation::default()));
        let said = run(&mut bench, &request);
        prop_assert_eq!(Said::of(&other).ids.len(), 40);
        prop_assert_eq!((said.ids.len(), said.finish()), (max_tokens, Some(Finish::Length)));
        prop_assert!(room >= max_tokens || !said.rotations.is_empty());
        prop_assert_eq!(differs_from_cold(&said, &request), None);
        let counters = bench.gauges.snapshot();
        prop_assert_eq!((counters.pages_free, counters.kv_faults, counters.kv_restarts), (2, 0, 0));
    }
}
