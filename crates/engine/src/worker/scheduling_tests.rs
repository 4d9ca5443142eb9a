//! Who comes next, who is too late, and how soon a cancel is heard: turn by turn, on a tiny model.

use std::time::{Duration, Instant};

use super::tests::Bench;
use super::*;
use crate::event::{Event, Finished, LatePhase};
use crate::handle::EngineOptions;
use crate::request::{GenerateRequest, Priority};

/// One sequence at a time.
fn narrow() -> Bench {
    Bench::with(EngineOptions { max_sequences: 1, ..options() })
}

fn options() -> EngineOptions {
    EngineOptions { kv_pages: Some(8), prefill_chunk: 16, ..EngineOptions::default() }
}

fn of(tenant: &str, n_prompt: u32, max_tokens: usize) -> GenerateRequest {
    let tenant = Some(tenant.to_owned());
    GenerateRequest { tenant, ..Bench::request(n_prompt, max_tokens) }
}

fn has_started(events: &flume::Receiver<Event>) -> bool {
    !events.is_empty()
}

/// The order in which these got a place.
fn order(bench: &mut Bench, all: &[flume::Receiver<Event>]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::new();
    while order.len() < all.len() {
        bench.turn();
        let started = (0..all.len()).filter(|&at| has_started(&all[at]));
        let new: Vec<usize> = started.filter(|at| !order.contains(at)).collect();
        order.extend(new);
    }
    order
}

#[test]
fn a_tenant_is_admitted_before_the_flood_of_another() {
    let run = |other: &str| {
        let mut bench = narrow();
        let mut all: Vec<_> = (0..6).map(|_| bench.send(of("flood", 4, 3))).collect();
        bench.turn();
        all.push(bench.send(of(other, 4, 3)));
        order(&mut bench, &all)
    };
    assert_eq!(run("other"), [0, 6, 1, 2, 3, 4, 5]);
    // The mutation: nobody is told apart.
    assert_eq!(run("flood"), [0, 1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_priority_is_admitted_before_its_own_tenants_others() {
    let mut bench = narrow();
    let mut all: Vec<_> = (0..3).map(|_| bench.send(of("a", 4, 3))).collect();
    bench.turn();
    all.push(bench.send(GenerateRequest { priority: Priority::High, ..of("a", 4, 3) }));
    all.push(bench.send(GenerateRequest { priority: Priority::Low, ..of("b", 4, 3) }));
    assert_eq!(order(&mut bench, &all), [0, 4, 3, 1, 2]);
}

/// K1: whoever asks something short does not wait until somebody else's long prompt is read.
#[test]
fn a_short_prompt_is_read_beside_the_long_one_of_another_tenant() {
    let turns = |other: &str| {
        let mut bench = Bench::with(EngineOptions { max_sequences: 4, ..options() });
        let _long = bench.send(of("a", 240, 3));
        bench.turn();
        let short = bench.send(of(other, 8, 3));
        (1..100).find(|_| {
            bench.turn();
            short.len() > 1
        })
    };
    assert_eq!(turns("b"), Some(1));
    // The mutation: of one tenant they are read one after the other, 240 rows by 16.
    assert_eq!(turns("a"), Some(15));
}

fn fault(events: &flume::Receiver<Event>) -> SequenceFault {
    match events.drain().last() {
        Some(Event::Failed(fault)) => fault,
        other => panic!("expected a fault, found {other:?}"),
    }
}

fn late(phase: LatePhase, n_tokens: usize) -> SequenceFault {
    SequenceFault::DeadlineExceeded { phase, n_tokens }
}

#[test]
fn a_deadline_ends_a_sequence_by_name_in_every_state() {
    let mut bench = Bench::with(EngineOptions { max_sequences: 2, ..options() });
    let decoding = bench.submit(4, 500);
    let prefilling = bench.submit(200, 400);
    for _ in 0..3 {
        bench.turn();
    }
    let passed = Some(Instant::now());
    let queued = bench.send(GenerateRequest { deadline: passed, ..Bench::request(4, 5) });
    let later = passed.map(|now| now + Duration::from_secs(3600));
    let patient = bench.send(GenerateRequest { deadline: later, ..Bench::request(4, 5) });
    bench.turn();
    assert_eq!(fault(&queued), late(LatePhase::Queue, 0));
    bench.worker.running[1].deadline = passed;
    bench.turn();
    assert_eq!(fault(&prefilling), late(LatePhase::Prefill, 0));
    let n_tokens = bench.worker.running[0].n_completion();
    bench.worker.running[0].deadline = passed;
    bench.turn();
    assert_eq!(fault(&decoding), late(LatePhase::Decode, n_tokens));
    bench.finish();
    assert!(matches!(patient.drain().last(), Some(Event::Finished(_))), "it is not late");
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.late, counters.failed, counters.pages_free), (3, 3, 8));
    assert_eq!(counters.sequences_waiting + counters.sequences_running, 0);
}

#[test]
fn a_suspended_sequence_has_its_deadline_too() {
    let mut bench = Bench::with(EngineOptions { max_sequences: 2, ..options() });
    let events = bench.submit(4, 500);
    bench.turn();
    let mut suspended = bench.worker.take_out(0, Some(0));
    suspended.deadline = Some(Instant::now());
    bench.worker.suspended.push_back(suspended);
    bench.turn();
    assert_eq!(fault(&events), late(LatePhase::Decode, 1));
    assert_eq!(bench.gauges.snapshot().pages_free, 8);
}

/// The mutation: turns that ask no deadline. The client is told after it has given up.
#[test]
fn without_the_check_an_answer_comes_after_its_deadline() {
    let mut bench = narrow();
    let deadline = Some(Instant::now());
    let events = bench.send(GenerateRequest { deadline, ..Bench::request(4, 5) });
    for _ in 0..5 {
        assert_eq!(bench.worker.take_commands(), Turn::Next);
        bench.worker.admit();
        bench.worker.step();
    }
    let end = events.drain().last();
    assert!(
        matches!(end, Some(Event::Finished(Finished { usage, .. })) if usage.completion_tokens == 5)
    );
}
