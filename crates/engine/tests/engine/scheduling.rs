//! What is promised of running engines: hangs are seen, loops end, and company changes nothing.

use std::time::{Duration, Instant};

use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Finish, GenerateRequest, LoopGuard, Sampling,
};
use exrail_kernels::Backend;
use exrail_kernels::reference::Reference;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};

use crate::faulty::Faulty;
use crate::support::{
    Answer, assert_all_pages_return, collect, drawn, generate, greedy, load, options, plain,
    prompt, start,
};

/// Until it holds.
fn wait(holds: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < limit);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// H1, G-04: what hangs inside a step is seen from outside, in the prompt and while something waits.
#[test]
fn a_step_that_hangs_is_seen_and_one_that_goes_on_is_not() {
    const HANG: u32 = 7;
    let (release, released) = flume::bounded(0);
    let backend = Faulty { hang: Some((HANG, released)), ..Faulty::new(Reference) };
    let engine =
        Engine::start(load(backend), EngineOptions { max_sequences: 1, ..options() }).unwrap();
    let is_stalled = |limit| engine.counters().is_stalled(Duration::from_millis(limit));
    let hanging = engine.submit(greedy(vec![HANG, 9], 4)).unwrap();
    let waiting = engine.submit(greedy(prompt(1, 5), 4)).unwrap();
    wait(|| engine.counters().sequences_running == 1 && is_stalled(50));
    // The mutation: a watchdog that never fires sees nothing.
    assert!(!engine.counters().is_stalled(Duration::MAX));
    drop(release);
    assert_eq!(collect(&hanging).tokens.len(), 4);
    assert_eq!(collect(&waiting).tokens.len(), 4);
    wait(|| engine.counters().sequences_running == 0);
    std::thread::sleep(Duration::from_millis(80));
    assert!(!is_stalled(50), "nothing to do is no stall");
}

/// H7: whoever reads a long prompt finishes steps, although no token comes.
#[test]
fn a_busy_engine_is_not_called_dead() {
    let backend = Faulty { delay: Duration::from_millis(5), ..Faulty::new(Reference) };
    let options = EngineOptions { prefill_chunk: 1, ..options() };
    let engine = Engine::start(load(backend), options).unwrap();
    let reading = engine.submit(greedy(prompt(1, 300), 1)).unwrap();
    let started = Instant::now();
    let mut longest = Duration::ZERO;
    while reading.events.len() < 2 {
        longest = longest.max(engine.counters().since_progress);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(started.elapsed() > Duration::from_millis(1500), "300 steps of 5 ms");
    assert!(longest < Duration::from_secs(1), "{longest:?} without a step");
}

/// H3: a prompt of thousands of tokens is not read to its end for somebody who has gone, and on a device
/// that is slow the step in which that is seen is short, too.
#[test]
fn a_cancel_in_a_long_prompt_is_heard_within_a_short_step() {
    // A row takes 1 ms: a chunk of 256 would take a quarter of a second.
    let heard = |step_target: Option<Duration>| {
        let options = EngineOptions { prefill_chunk: 256, step_target, ..options() };
        let backend = Faulty { row_delay: Duration::from_millis(1), ..Faulty::new(Reference) };
        let engine = Engine::start(load(backend), options).unwrap();
        // As the warm-up does: what a row takes is known then.
        generate(&engine, greedy(prompt(3, 64), 1));
        let n_before = engine.counters().tokens_prompt;
        let reading = engine.submit(greedy(prompt(1, 1800), 4)).unwrap();
        wait(|| engine.counters().tokens_prompt > n_before);
        let n_read = engine.counters().tokens_prompt;
        reading.cancel();
        assert_eq!(collect(&reading).finished().finish, Finish::Cancelled);
        assert_all_pages_return(&engine);
        engine.counters().tokens_prompt - n_read
    };
    // At most the step that it came in and, where it came between two, no other: in rows, which take 1 ms.
    let n_rows = heard(EngineOptions::default().step_target);
    assert!(n_rows <= 100, "{n_rows} rows");
    // The mutation: whole chunks. One of these cancels comes within a step and not between two.
    assert_eq!((0..3).map(|_| heard(None)).max(), Some(256));
}

/// Always the same token.
fn stuck(loop_guard: Option<LoopGuard>) -> GenerateRequest {
    let mut request = greedy(prompt(1, 9), 1500);
    request.sampling.logit_bias = vec![(40, 100.0)];
    GenerateRequest { loop_guard, ..request }
}

#[test]
fn an_answer_that_goes_round_in_a_circle_ends_by_name() {
    let engine = start(options());
    let answer = generate(&engine, stuck(Some(LoopGuard::default())));
    assert_eq!(answer.finished().finish, Finish::Degenerate);
    assert_eq!(answer.tokens.len(), 1008, "the first check behind 1,000 tokens");
    assert_eq!(engine.counters().degenerate, 1);
    assert_all_pages_return(&engine);
    // The mutation: without the guard it goes on to its limit.
    let answer = generate(&engine, stuck(None));
    assert_eq!((answer.finished().finish, answer.tokens.len()), (Finish::Length, 1500));
    assert_eq!(engine.counters().degenerate, 1);
}

#[test]
fn a_collapse_is_told_by_the_entropy_where_a_route_has_a_baseline() {
    let engine = start(options());
    let measured = |entropy_baseline| {
        let guard = Some(LoopGuard { entropy_baseline, ..LoopGuard::default() });
        generate(&engine, GenerateRequest { entropy: true, ..stuck(guard) })
    };
    let exact = measured(None);
    assert_eq!(exact.tokens.len(), 1008);
    let mean = exact.finished().entropy_mean.unwrap();
    // Of a route whose answers have five times as much.
    let collapsed = measured(Some(5.0 * mean));
    assert_eq!(collapsed.finished().finish, Finish::Degenerate);
    assert_eq!(collapsed.tokens.len(), 256, "the first whole window of 4-grams");
    assert_eq!(measured(Some(mean)).tokens.len(), 1008, "as much as usual");
}

/// Where the device finds the tokens there is no entropy; exact loops are seen all the same, also where the
/// next step is asked for before.
#[test]
fn a_loop_ends_where_the_device_finds_the_tokens() {
    for runs_ahead in [false, true] {
        let backend = Faulty { runs_ahead, stuck_on: Some(40), ..Faulty::new(Reference) };
        let engine = Engine::start(load(backend), options()).unwrap();
        let ends = |loop_guard| {
            let request = GenerateRequest { loop_guard, ..plain(prompt(1, 20), 1200) };
            let answer = generate(&engine, request);
            (answer.finished().finish, answer.tokens.len())
        };
        assert_eq!(ends(Some(LoopGuard::default())), (Finish::Degenerate, 1008));
        assert_eq!(ends(None), (Finish::Length, 1200));
        assert_all_pages_return(&engine);
    }
}

/// Thirty-two requests: greedy, drawn, and with options that need every logit (J2).
fn mixed() -> Vec<GenerateRequest> {
    let request = |n: u32| {
        let (prompt, max_tokens) = (prompt(n, 3 + 7 * n), 24);
        match n % 4 {
            0 => plain(prompt, max_tokens),
            1 => drawn(prompt, max_tokens),
            2 => GenerateRequest { entropy: true, ..drawn(prompt, max_tokens) },
            _ => {
                let mut request = drawn(prompt, max_tokens);
                let penalised = Sampling { repetition_penalty: 1.2, ..request.sampling };
                request.sampling = Sampling { temperature: 3.0, ..penalised };
                request
            }
        }
    };
    (0..32).map(request).collect()
}

/// Their answers one by one, and all at once.
fn alone_and_among_32<B: Backend>(backend: B) -> [Vec<Vec<u32>>; 2] {
    let options = EngineOptions { max_sequences: 32, kv_pages: Some(40), ..options() };
    let engine = Engine::start(load(backend), options).unwrap();
    let alone = mixed().into_iter().map(|request| generate(&engine, request).ids()).collect();
    let all: Vec<_> = mixed().into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let answers: Vec<Answer> = all.iter().map(collect).collect();
    assert_eq!(answers.iter().filter(|answer| answer.tokens.len() == 24).count(), 32);
    assert!(batched(&engine), "{:?}", engine.counters());
    [alone, answers.iter().map(Answer::ids).collect()]
}

/// Whether most of the second 32 answers ran together: by themselves, 32 take 23 steps each and more.
fn batched(engine: &EngineHandle) -> bool {
    engine.counters().steps < 32 * 30 + 150
}

/// G-28, J6: the same seed gives the same tokens, alone and in a batch of 32.
#[test]
fn company_changes_no_token() {
    let [alone, among] = alone_and_among_32(Reference);
    assert_eq!(among, alone);
    let cpu = CpuOptions { threads: Some(2), ..CpuOptions::default() };
    let [alone, among] = alone_and_among_32(CpuBackend::new(cpu).unwrap());
    assert_eq!(among, alone);
    // The mutation: kernels whose sums depend on the batch.
    let backend = Faulty { depends_on_the_batch: true, ..Faulty::new(Reference) };
    let [alone, among] = alone_and_among_32(backend);
    let n_other = alone.iter().zip(&among).filter(|(alone, among)| alone != among).count();
    assert!(n_other > 8, "{n_other} of 32");
}
