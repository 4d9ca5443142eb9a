//! What goes wrong stays with the sequence it belongs to, and every page comes back.

use std::time::{Duration, Instant};

use crate::support::{
    Faults, NAN_TOKEN, PANIC_TOKEN, assert_all_pages_return, collect, drawn, generate, greedy,
    options, plain, prompt, start, start_with,
};
use exrail_engine::{
    EngineHandle, EngineOptions, EngineState, Event, Finish, GenerateRequest, Generation,
    SequenceFault, SubmitError,
};
use proptest::prelude::*;

/// Blocks until the sequence has its pages.
fn wait_started(generation: &Generation) {
    let event = generation.events.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(matches!(event, Event::Started { .. }), "{event:?}");
}

/// H2, for logits that are no numbers.
/// J3 of the field faults: a NaN ends its own request by name.
#[test]
fn non_finite_logits_fail_only_their_sequence() {
    let engine = start(options());
    let clean: Vec<_> =
        (0..3).map(|n| generate(&engine, greedy(prompt(n, 30), 20)).ids()).collect();
    for _ in 0..5 {
        let mut poisoned = prompt(9, 30);
        poisoned[20] = NAN_TOKEN;
        let before = engine.submit(greedy(prompt(0, 30), 20)).unwrap();
        let faulty = engine.submit(greedy(poisoned, 20)).unwrap();
        let after: Vec<_> =
            (1..3).map(|n| engine.submit(greedy(prompt(n, 30), 20)).unwrap()).collect();
        assert_eq!(*collect(&faulty).fault(), SequenceFault::NumericFault { step: 0 });
        assert_eq!(collect(&before).ids(), clean[0]);
        assert_eq!(collect(&after[0]).ids(), clean[1]);
        assert_eq!(collect(&after[1]).ids(), clean[2]);
    }
    assert_all_pages_return(&engine);
    // The pages that held NaN are in use again by now; nothing of it is read.
    assert_eq!(generate(&engine, greedy(prompt(1, 30), 20)).ids(), clean[1]);
    assert_eq!(engine.counters().failed, 5);
}

/// H2: fifty times a fault in one of four, in the first chunk of its prompt or a later one.
#[test]
fn a_panic_in_one_of_four_is_one_error_and_three_answers() {
    let engine = start(options());
    let clean: Vec<_> = (0..4).map(|n| generate(&engine, greedy(prompt(n, 60), 6)).ids()).collect();
    for round in 0..50 {
        let generations: Vec<_> = (0..4)
            .map(|n| {
                let mut prompt = prompt(n, 60);
                if n == 1 {
                    prompt[round % 60] = PANIC_TOKEN;
                }
                engine.submit(greedy(prompt, 6)).unwrap()
            })
            .collect();
        for (n, generation) in generations.iter().enumerate() {
            let answer = collect(generation);
            if n == 1 {
                assert!(matches!(answer.fault(), SequenceFault::StepPanicked { .. }));
            } else {
                assert_eq!(answer.ids(), clean[n], "round {round}");
            }
        }
        assert_all_pages_return(&engine);
    }
    let counters = engine.counters();
    assert_eq!((counters.failed, counters.state), (50, EngineState::Running));
}

#[test]
fn a_panicking_step_fails_its_sequence_and_the_engine_goes_on() {
    let engine = start(options());
    let clean = generate(&engine, greedy(prompt(1, 30), 20)).ids();
    for _ in 0..5 {
        let faulty = engine.submit(greedy(vec![5, PANIC_TOKEN], 4)).unwrap();
        let fault = collect(&faulty).fault().clone();
        assert!(
            matches!(&fault, SequenceFault::StepPanicked { message, .. } if message == "injected panic"),
            "{fault:?}"
        );
        assert_eq!(generate(&engine, greedy(prompt(1, 30), 20)).ids(), clean);
    }
    let counters = engine.counters();
    assert_eq!((counters.panics, counters.failed), (5, 5));
    assert_eq!(counters.state, EngineState::Running);
    assert_all_pages_return(&engine);
}

/// Answers of 24 tokens, and one token that only the first of them has: `(answers, place, token)`.
fn answers_with_a_token_of_their_own(
    request: fn(Vec<u32>, usize) -> GenerateRequest,
) -> (Vec<Vec<u32>>, usize, u32) {
    let engine = start_with(Faults::default(), false, options());
    let answers: Vec<Vec<u32>> =
        (0..4).map(|n| generate(&engine, request(prompt(n, 30), 24)).ids()).collect();
    let prompts: Vec<u32> = (0..4).flat_map(|n| prompt(n, 30)).collect();
    let others = [&prompts[..], &answers[1], &answers[2], &answers[3]].concat();
    let is_own = |&at: &usize| {
        let id = &answers[0][at];
        !others.contains(id) && !answers[0][..at].contains(id)
    };
    let own = (2..22).find(is_own).unwrap_or_else(|| panic!("no such token in {answers:?}"));
    let token = answers[0][own];
    (answers, own, token)
}

#[test]
fn non_finite_logits_in_flight_fail_only_their_sequence() {
    non_finite_logits(plain);
    non_finite_logits(drawn);
}

fn non_finite_logits(request: fn(Vec<u32>, usize) -> GenerateRequest) {
    let (clean, own, token) = answers_with_a_token_of_their_own(request);
    let engine = start_with(Faults { nan: Some(token), panic: None, rot: None }, true, options());
    let generations: Vec<_> =
        (0..4).map(|n| engine.submit(request(prompt(n, 30), 24)).unwrap()).collect();
    let answers: Vec<_> = generations.iter().map(collect).collect();
    assert_eq!(answers[0].ids(), clean[0][..=own]);
    assert_eq!(*answers[0].fault(), SequenceFault::NumericFault { step: own + 1 });
    for n in 1..4 {
        assert_eq!(answers[n].ids(), clean[n]);
        assert_eq!(answers[n].finished().finish, Finish::Length);
    }
    assert_all_pages_return(&engine);
    assert_eq!((engine.counters().failed, engine.counters().panics), (1, 0));
}

#[test]
fn a_panic_in_flight_fails_its_sequence_behind_the_tokens_before() {
    let (clean, own, token) = answers_with_a_token_of_their_own(plain);
    let engine = start_with(Faults { nan: None, panic: Some(token), rot: None }, true, options());
    let alone = generate(&engine, plain(prompt(0, 30), 24));
    assert_eq!(alone.ids(), clean[0][..=own], "the token that the panic follows was delivered");
    let fault = alone.fault();
    assert!(
        matches!(fault, SequenceFault::StepPanicked { message, .. } if message == "injected panic"),
        "{fault:?}"
    );
    let generations: Vec<_> =
        (0..4).map(|n| engine.submit(plain(prompt(n, 30), 24)).unwrap()).collect();
    for (n, (generation, clean)) in generations.iter().zip(&clean).enumerate() {
        let answer = collect(generation);
        if n == 0 {
            assert!(matches!(answer.fault(), SequenceFault::StepPanicked { .. }));
            assert_eq!(answer.ids(), clean[..=own]);
        } else {
            assert_eq!(answer.ids(), *clean);
            assert_eq!(answer.finished().finish, Finish::Length);
        }
    }
    assert_all_pages_return(&engine);
    let counters = engine.counters();
    // Alone, and together and alone again, unless the others came too late to be suspected.
    assert!((2..=3).contains(&counters.panics), "{counters:?}");
    assert_eq!(counters.state, EngineState::Running);
    assert_eq!(counters.failed, 2, "{counters:?}");
    assert_eq!(generate(&engine, plain(prompt(1, 30), 24)).ids(), clean[1]);
}

/// G1 of the field faults: callers hear of a device that fails, and no channel panics.
#[test]
fn an_engine_that_only_panics_stops_and_says_so() {
    let engine = start(options());
    for _ in 0..3 {
        // The last submit may see the engine stop already.
        if let Ok(faulty) = engine.submit(greedy(vec![PANIC_TOKEN], 4)) {
            assert!(collect(&faulty).end.is_some());
        }
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while engine.counters().state == EngineState::Running {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(engine.counters().state, EngineState::Faulted);
    assert_eq!(engine.submit(greedy(vec![5], 1)).unwrap_err(), SubmitError::Stopped);
    engine.shutdown();
    assert_all_pages_return(&engine);
}

/// H3, H5.
#[test]
fn cancel_frees_pages_in_every_state() {
    let engine = start(EngineOptions { max_sequences: 2, prefill_chunk: 1, ..options() });
    let decoding = engine.submit(greedy(prompt(0, 1), 2000)).unwrap();
    let prefilling = engine.submit(greedy(prompt(1, 1500), 10)).unwrap();
    let queued = engine.submit(greedy(prompt(2, 10), 10)).unwrap();
    wait_started(&decoding);
    wait_started(&prefilling);
    assert_eq!(engine.counters().pages_free, 16 - 8 - 6);
    queued.cancel();
    assert_eq!(collect(&queued).finished().finish, Finish::Cancelled);
    prefilling.cancel();
    let answer = collect(&prefilling);
    assert_eq!(answer.finished().finish, Finish::Cancelled);
    assert!(answer.tokens.is_empty(), "cancelled in the prompt");
    // Published before the event: whoever knows of the end sees the pages free.
    assert_eq!(engine.counters().pages_free, 16 - 8);
    drop(decoding);
    assert_all_pages_return(&engine);
    assert_eq!(engine.counters().cancelled, 3);
}

/// H1, H5: in the queue, admitted, and behind its first token.
#[test]
fn two_hundred_dropped_streams_leave_a_working_engine() {
    dropped_streams(&start(options()), greedy);
    dropped_streams(&start_with(Faults::default(), true, options()), plain);
}

fn dropped_streams(engine: &EngineHandle, greedy: fn(Vec<u32>, usize) -> GenerateRequest) {
    let clean = generate(engine, greedy(prompt(1, 20), 10)).ids();
    for n in 0..200 {
        let generation = engine.submit(greedy(prompt(n, 10), 1000)).unwrap();
        if n % 3 > 0 {
            wait_started(&generation);
        }
        if n % 3 == 2 {
            generation.events.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    }
    assert_eq!(generate(engine, greedy(prompt(1, 20), 10)).ids(), clean);
    assert_all_pages_return(engine);
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let engine =
        start(EngineOptions { max_sequences: 1, queue_limit: 2, prefill_chunk: 1, ..options() });
    let running = engine.submit(greedy(prompt(0, 1000), 1000)).unwrap();
    wait_started(&running);
    let waiting: Vec<_> = (0..2).map(|n| engine.submit(greedy(prompt(n, 5), 5)).unwrap()).collect();
    let refused = engine.submit(greedy(prompt(7, 5), 5)).unwrap_err();
    assert_eq!(refused, SubmitError::QueueFull { limit: 2, retry_after_s: 1 });
    // Somebody else is not to blame for that.
    let mut other = greedy(prompt(7, 5), 5);
    other.tenant = Some("other".to_owned());
    let refused = engine.submit(other).unwrap_err();
    assert_eq!(refused, SubmitError::Overloaded { limit: 2, retry_after_s: 1 });
    drop(running);
    for generation in &waiting {
        assert_eq!(collect(generation).tokens.len(), 5);
    }
    assert_eq!(generate(&engine, greedy(prompt(7, 5), 5)).tokens.len(), 5);
}

#[test]
fn sequences_that_need_the_whole_pool_take_turns() {
    let engine = start(EngineOptions { kv_pages: Some(2), ..options() });
    assert_eq!(engine.facts().context, 512);
    let generations: Vec<_> = (0..6)
        .map(|n| engine.submit(greedy(prompt(n, if n % 2 == 0 { 480 } else { 8 }), 30)).unwrap())
        .collect();
    for generation in &generations {
        assert_eq!(collect(generation).tokens.len(), 30);
    }
    assert_all_pages_return(&engine);
}

/// H5: whoever is there and does not listen.
#[test]
fn a_receiver_that_never_reads_blocks_nobody() {
    let engine = start(options());
    let deaf = engine.submit(greedy(prompt(0, 5), 500)).unwrap();
    let answer = generate(&engine, greedy(prompt(1, 5), 50));
    assert_eq!(answer.tokens.len(), 50);
    let deadline = Instant::now() + Duration::from_secs(60);
    // Started, 500 tokens and Finished wait for the reader.
    while deaf.events.len() < 502 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_all_pages_return(&engine);
}

#[test]
fn shutdown_fails_everybody_by_name() {
    let options = EngineOptions { max_sequences: 1, ..options() };
    shut_down(&start(options), greedy);
    shut_down(&start_with(Faults::default(), true, options), plain);
}

fn shut_down(engine: &EngineHandle, greedy: fn(Vec<u32>, usize) -> GenerateRequest) {
    let running = engine.submit(greedy(prompt(0, 5), 2000)).unwrap();
    let queued = engine.submit(greedy(prompt(1, 5), 5)).unwrap();
    wait_started(&running);
    engine.shutdown();
    assert_eq!(*collect(&running).fault(), SequenceFault::Stopped);
    assert_eq!(*collect(&queued).fault(), SequenceFault::Stopped);
    assert_eq!(engine.submit(greedy(prompt(1, 5), 5)).unwrap_err(), SubmitError::Stopped);
    assert!(engine.forward_logits(prompt(1, 5)).is_err());
    assert_eq!(engine.counters().state, EngineState::Stopped);
    engine.shutdown();
    assert_all_pages_return(engine);
}

#[test]
fn scoring_shares_the_engine_and_returns_its_pages() {
    let engine = start(options());
    let clean = generate(&engine, greedy(prompt(1, 30), 40)).ids();
    let generation = engine.submit(greedy(prompt(1, 30), 40)).unwrap();
    let rows = engine.forward_logits(prompt(2, 100)).unwrap();
    assert_eq!((rows.len(), rows[0].len()), (100, engine.facts().vocab_len));
    assert_eq!(collect(&generation).ids(), clean);
    assert_all_pages_return(&engine);
}

/// What a random client does.
#[derive(Clone, Debug)]
enum Action {
    Submit { n: u32, len: u32, max_tokens: usize },
    Cancel(usize),
    Drop(usize),
    Read(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        3 => (0..50_u32, 1..400_u32, 1..40_usize)
            .prop_map(|(n, len, max_tokens)| Action::Submit { n, len, max_tokens }),
        1 => any::<usize>().prop_map(Action::Cancel),
        1 => any::<usize>().prop_map(Action::Drop),
        1 => any::<usize>().prop_map(Action::Read),
    ];
    prop::collection::vec(action, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    /// Random submit, cancel, drop and read against a naive map of live generations. In debug
    /// builds the worker audits the page books after every step of it.
    #[test]
    fn every_page_returns_and_every_sequence_ends_once(
        actions in actions(),
        runs_ahead in any::<bool>(),
    ) {
        let options = EngineOptions { max_sequences: 4, kv_pages: Some(5), ..options() };
        let engine = start_with(Faults::default(), runs_ahead, options);
        let mut live: Vec<(Generation, usize)> = Vec::new();
        let mut submitted = 0;
        for action in actions {
            match action {
                Action::Submit { n, len, max_tokens } => {
                    let request = if n % 2 == 0 { plain } else { drawn };
                    let request = request(prompt(n, len), max_tokens);
                    live.push((engine.submit(request).unwrap(), max_tokens));
                    submitted += 1;
                }
                Action::Cancel(at) if !live.is_empty() => live[at % live.len()].0.cancel(),
                Action::Drop(at) if !live.is_empty() => drop(live.swap_remove(at % live.len())),
                Action::Read(at) if !live.is_empty() => {
                    let (generation, max_tokens) = live.swap_remove(at % live.len());
                    let answer = collect(&generation);
                    match answer.finished().finish {
                        Finish::Length => prop_assert_eq!(answer.tokens.len(), max_tokens),
                        Finish::Cancelled => prop_assert!(answer.tokens.len() <= max_tokens),
                        Finish::Stop
| Finish::Degenerate
| Finish::RotationRequired
| Finish::SchemaIncomplete => {
                            prop_assert!(false, "nothing stops these");
                        }
                    }
                }
                Action::Cancel(_) | Action::Drop(_) | Action::Read(_) => {}
            }
        }
        for (generation, _) in &live {
            prop_assert!(collect(generation).end.is_some());
        }
        drop(live);
        assert_all_pages_return(&engine);
        let counters = engine.counters();
        prop_assert_eq!(counters.submitted, submitted);
        prop_assert_eq!(counters.finished + counters.cancelled, submitted);
    }
}
