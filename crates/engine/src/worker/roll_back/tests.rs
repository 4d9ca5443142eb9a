//! An answer that loops goes back once, and what it has taken back is nowhere.
//!
//! Greedy, the tiny model says one token for ever behind a few others. That is the fault here.

use exrail_kernels::KvDtype;

use super::super::tests::Bench;
use crate::event::{Event, Finish, Finished};
use crate::handle::EngineOptions;
use crate::loops::{LoopGuard, OnLoop};
use crate::request::GenerateRequest;
use crate::rotation::{RotatePolicy, Rotated, Rotation, RotationOptions};

/// An answer as its caller has it at the end.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    ids: Vec<u32>,
    text: String,
    /// Tokens that stayed and tokens that went, each time.
    roll_backs: Vec<(usize, usize)>,
    rotations: Vec<(usize, Rotated)>,
    end: Option<Finished>,
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
                Event::RolledBack { n_tokens, n_text } => {
                    heard.roll_backs.push((n_tokens, heard.ids.len() - n_tokens));
                    heard.ids.truncate(n_tokens);
                    heard.text.truncate(n_text);
                }
                Event::Rotated(rotated) => heard.rotations.push((heard.ids.len(), rotated)),
                Event::Tail(text) => heard.text.push_str(&text),
                Event::Finished(finished) => heard.end = Some(finished),
                Event::Failed(fault) => panic!("{fault}"),
            }
        }
        heard
    }

    fn finish(&self) -> Option<Finish> {
        self.end.as_ref().map(|end| end.finish)
    }
}

fn bench(runs_ahead: bool) -> Bench {
    let options = EngineOptions {
        max_sequences: 4,
        kv_pages: Some(24),
        kv_dtype: KvDtype::F32,
        ..EngineOptions::default()
    };
    let mut bench = Bench::with(options);
    bench.worker.runs_ahead = runs_ahead;
    bench
}

fn run(bench: &mut Bench, request: &GenerateRequest) -> Heard {
    let events = bench.send(request.clone());
    for _ in 0..8000 {
        if bench.is_idle() && bench.commands.is_empty() {
            return Heard::of(&events);
        }
        bench.turn();
    }
    panic!("it goes on and on");
}

/// Behind five tokens it loops at once, behind three after some others.
fn looping(n_prompt: u32, max_tokens: usize) -> GenerateRequest {
    let mut request = Bench::request(n_prompt, max_tokens);
    let on_loop = OnLoop::RollBack;
    request.loop_guard = Some(LoopGuard { on_loop, ..LoopGuard::default() });
    request
}

/// Tokens of the longest run of one token.
fn longest_run(ids: &[u32]) -> usize {
    ids.chunk_by(|a, b| a == b).map(<[u32]>::len).max().unwrap_or(0)
}

#[test]
fn it_goes_on_from_before_the_loop_with_a_raised_penalty() {
    for (n_prompt, runs_ahead) in [(5, false), (5, true), (3, false), (3, true), (4, true)] {
        let request = looping(n_prompt, 1100);
        let mut bench = bench(runs_ahead);
        let other = bench.send(Bench::request(9, 700));
        let heard = run(&mut bench, &request);
        let [(n_kept, n_gone)] = heard.roll_backs[..] else { panic!("{:?}", heard.roll_backs) };
        assert!(n_kept % 128 == 0 && (1000..1144).contains(&n_gone), "{n_kept}, {n_gone}");
        // What follows is what a fresh request with what was kept and that penalty gets.
        let mut fresh = request.clone();
        fresh.prompt.extend(&heard.ids[..n_kept]);
        fresh.max_tokens -= n_kept;
        fresh.loop_guard = None;
        fresh.sampling.repetition_penalty = 1.2;
        fresh.sampling.repetition_window = 256;
        let fresh = run(&mut self::bench(false), &fresh);
        assert_eq!(heard.ids[n_kept..], fresh.ids[..heard.ids.len() - n_kept]);
        if n_kept == 0 {
            assert!(!heard.text.is_empty() && fresh.text.starts_with(&heard.text));
        }
        let end = heard.end.as_ref().unwrap();
        assert_eq!(end.usage.completion_tokens, heard.ids.len());
        assert_eq!(end.usage.prompt_tokens, n_prompt as usize);
        assert!(longest_run(&heard.ids) < 1000, "{}", longest_run(&heard.ids));
        // Nobody else hears of it.
        let free = run(&mut self::bench(false), &Bench::request(9, 700));
        assert_eq!(Heard::of(&other).ids, free.ids);
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.roll_backs, counters.kv_faults), (1, 0));
        assert_eq!(counters.pages_free, counters.pages_total);
    }
    // Mutation: without the guard the loop reaches the user to the last token.
    let mut unguarded = looping(5, 1100);
    unguarded.loop_guard = None;
    assert!(longest_run(&run(&mut bench(false), &unguarded).ids) > 1000);
}

#[test]
fn the_second_loop_ends_the_answer() {
    let mut request = looping(5, 3000);
    // No penalty outweighs that.
    request.sampling.logit_bias = vec![(40, 100.0)];
    let mut bench = bench(false);
    let heard = run(&mut bench, &request);
    assert_eq!((heard.finish(), heard.roll_backs.len()), (Some(Finish::Degenerate), 1));
    assert_eq!(heard.ids.len(), 1008, "from the start again, to the first check");
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.roll_backs, counters.degenerate, counters.finished), (1, 1, 1));
    assert_eq!(counters.tokens_generated, 2 * 1008, "what was computed is counted");
    // Mutation: by the other choice it ends at once.
    request.loop_guard = Some(LoopGuard::default());
    let ended = run(&mut bench, &request);
    assert_eq!((ended.finish(), ended.roll_backs.len()), (Some(Finish::Degenerate), 0));
}

fn rotating(rotate_at: usize, window: usize, policy: RotatePolicy) -> Rotation {
    let (rotate_at, window) = (Some(rotate_at), Some(window));
    let options = RotationOptions { policy, rotate_at, window, sink: None };
    Rotation { options, ..Rotation::default() }
}

#[test]
fn what_a_rotation_dropped_cannot_be_gone_back_to() {
    let mut request = looping(5, 3000);
    request.sampling.logit_bias = vec![(40, 100.0)];
    request.rotation = rotating(600, 200, RotatePolicy::Reprefill);
    let heard = run(&mut bench(false), &request);
    assert_eq!((heard.finish(), heard.roll_backs.len()), (Some(Finish::Degenerate), 0));
    assert_eq!(heard.rotations.len(), 2);
}

#[test]
fn behind_a_roll_back_it_rotates_by_the_tokens_that_stand() {
    for policy in [RotatePolicy::Reprefill, RotatePolicy::SinkWindow] {
        let mut request = looping(3, 1600);
        request.rotation = rotating(1200, 300, policy);
        let heard = run(&mut bench(false), &request);
        assert_eq!(heard.roll_backs.len(), 1);
        let (at, first) = &heard.rotations[0];
        assert_eq!((at + 3, first.kept.last().unwrap().end), (1200, 1200), "{policy:?}");
        let told: usize = first.kept.iter().chain(&first.dropped).map(ExactSizeIterator::len).sum();
        assert_eq!(told, 1200);
    }
}

/// Entropy is measured where a baseline is given, whether the request asks to see it or not.
#[test]
fn a_collapse_is_found_where_a_baseline_is_given() {
    let mut request = looping(5, 700);
    request.sampling.logit_bias = vec![(40, 100.0)];
    let guard = LoopGuard { entropy_baseline: Some(1e3), ..LoopGuard::default() };
    request.loop_guard = Some(guard);
    assert!(!request.needs_only_tokens());
    let heard = run(&mut bench(true), &request);
    assert_eq!((heard.finish(), heard.ids.len()), (Some(Finish::Degenerate), 256));
    assert_eq!(heard.end.unwrap().entropy_mean, None, "it did not ask to see it");
    // Mutation: without the baseline the collapse goes on.
    request.loop_guard = Some(LoopGuard::default());
    assert_eq!(run(&mut bench(true), &request).ids.len(), 700);
}
