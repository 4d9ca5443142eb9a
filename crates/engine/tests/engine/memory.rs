//! What an engine holds: no more after a thousand requests, and nothing once it has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use exrail_engine::{Engine, EngineHandle};
use exrail_kernels::reference::Reference;

use crate::faulty::Faulty;
use crate::support::{assert_all_pages_return, generate, load, options, plain, prompt};

/// A short answer to a prompt that nobody had before.
fn ask(engine: &EngineHandle, n: u32) {
    assert_eq!(generate(engine, plain(prompt(n, 5), 2)).ids().len(), 2);
}

/// Field fault G2: the device's memory grows with every request.
#[test]
fn g2_a_thousand_short_requests_in_turn_allocate_nothing() {
    let backend = Faulty::new(Reference);
    let n_allocated = Arc::clone(&backend.n_allocated);
    let engine = Engine::start(load(backend), options()).unwrap();
    ask(&engine, 0);
    let before = n_allocated.load(Ordering::Relaxed);
    for n in 1..=1000 {
        ask(&engine, n);
    }
    assert_eq!(n_allocated.load(Ordering::Relaxed), before);
    assert_all_pages_return(&engine);
}

/// The mutation, and the reported cause: a cache for each call.
#[test]
fn mutation_g2_a_cache_for_each_call_shows_in_the_allocations() {
    let backend = Faulty::new(Reference);
    let n_allocated = Arc::clone(&backend.n_allocated);
    let mut counts = Vec::new();
    for n in 0..3 {
        let engine = Engine::start(load(backend.clone()), options()).unwrap();
        ask(&engine, n);
        counts.push(n_allocated.load(Ordering::Relaxed));
    }
    assert!(counts.is_sorted_by(|one, next| one < next), "{counts:?}");
}

/// Takes a while to be dropped, and says so only then.
#[derive(Debug)]
struct LateEnd(Arc<AtomicBool>);

impl Drop for LateEnd {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_millis(200));
        self.0.store(true, Ordering::Release);
    }
}

/// Field fault F11: what comes next is loaded into the place of what has ended.
#[test]
fn shutdown_returns_when_the_memory_is_given_back_and_not_before() {
    let given_back = Arc::new(AtomicBool::new(false));
    let end = Arc::new(LateEnd(Arc::clone(&given_back)));
    let backend = Faulty { end: Some(end), ..Faulty::new(Reference) };
    let engine = Engine::start(load(backend), options()).unwrap();
    ask(&engine, 1);
    engine.shutdown();
    assert!(given_back.load(Ordering::Acquire));
}

#[test]
fn a_step_that_hangs_is_waited_for_no_longer_than_the_limit() {
    let (release, released) = flume::bounded(0);
    let backend = Faulty { hang: Some((7, released)), ..Faulty::new(Reference) };
    let engine = Engine::start(load(backend), options()).unwrap();
    let generation = engine.submit(plain(vec![7, 9], 1)).unwrap();
    while engine.counters().sequences_running == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!engine.shutdown_within(Duration::from_millis(300)));
    drop(release);
    assert!(engine.shutdown_within(Duration::from_secs(60)));
    drop(generation);
}
