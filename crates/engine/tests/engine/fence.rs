//! G-05: what a device builds behind the warm-up fence is seen, and what users bring is built before it.

use std::sync::atomic::Ordering;

use exrail_engine::{EngineHandle, EngineOptions, Prompt, WarmUpPlan, warm_up, warm_up_told};
use exrail_kernels::DeviceCounters;

use crate::faulty::SLOW;
use crate::support::{collect, options, plain, start, start_building, start_with_brake};

/// Answers three requests of one token each at once, over enough steps for all to meet.
fn three_at_once(engine: &EngineHandle) {
    let generations: Vec<_> =
        (0..3).map(|n| engine.submit(plain(vec![5 + n], 200)).unwrap()).collect();
    for generation in &generations {
        collect(generation).finished();
    }
}

/// One answer that goes on behind one context of a power of two and then another.
fn a_long_one(engine: &EngineHandle) {
    // Whole chunks of a prompt, because each number of rows is a shape.
    let prompt = vec![5; 13 * options().prefill_chunk];
    collect(&engine.submit(plain(prompt, 700)).unwrap()).finished();
}

fn is_shallow(shape: &[Prompt]) -> bool {
    shape.iter().all(|prompt| *prompt == Prompt { n_tokens: 1, depth: 0 })
}

fn grown(graph_captures: u64) -> Option<DeviceCounters> {
    Some(DeviceCounters { graph_captures, ..DeviceCounters::default() })
}

#[test]
fn behind_a_full_warm_up_users_find_every_shape_built() {
    let (engine, _) = start_building(false, options());
    assert_eq!(engine.counters().built_after_fence, None, "nothing was warmed yet");
    let plan = WarmUpPlan::of(&engine);
    let together: Vec<usize> =
        plan.shapes.iter().filter(|shape| is_shallow(shape)).map(Vec::len).collect();
    assert_eq!(together, (1..=8).collect::<Vec<_>>(), "a device that builds gets all of them");
    let report = warm_up(&engine, &plan).unwrap();
    assert!(report.built.graph_captures >= 8, "{report:?}");
    three_at_once(&engine);
    a_long_one(&engine);
    let counters = engine.counters();
    assert_eq!(counters.built, report.built);
    assert_eq!(counters.built_after_fence, grown(0));
}

/// The mutation of §3.1: one bucket is skipped.
#[test]
fn a_shape_that_was_not_warmed_is_counted_behind_the_fence() {
    let (engine, _) = start_building(false, options());
    let mut plan = WarmUpPlan::full(&engine);
    plan.shapes.retain(|shape| shape.len() != 3);
    let report = warm_up(&engine, &plan).unwrap();
    three_at_once(&engine);
    let counters = engine.counters();
    assert_eq!(counters.built_after_fence, grown(1));
    assert_eq!(counters.built.graph_captures, report.built.graph_captures + 1);
    // What is warmed once more is warm: the fence opens and closes again.
    warm_up(&engine, &plan).unwrap();
    assert_eq!(engine.counters().built_after_fence, grown(0));
}

/// The same of the contexts.
#[test]
fn a_context_that_was_not_warmed_is_counted_behind_the_fence() {
    let (engine, _) = start_building(false, options());
    let mut plan = WarmUpPlan::full(&engine);
    plan.shapes.retain(|shape| is_shallow(shape));
    plan.crowd.clear();
    warm_up(&engine, &plan).unwrap();
    a_long_one(&engine);
    assert_eq!(engine.counters().built_after_fence, grown(1), "the one up to 2,048");
}

/// A device that heeds the fence is told of it, and what was not warmed runs all the same.
#[test]
fn behind_the_fence_nothing_is_built_for_what_was_not_warmed() {
    let (engine, _) = start_building(true, options());
    let (mut plan, before) = (WarmUpPlan::full(&engine), engine.counters().built);
    (plan.shapes, plan.crowd) = (vec![], vec![]);
    let report = warm_up(&engine, &plan).unwrap();
    assert!(
        report.built.graph_captures > before.graph_captures,
        "it builds where the fence is open"
    );
    three_at_once(&engine);
    a_long_one(&engine);
    assert_eq!(engine.counters().built_after_fence, grown(0));
}

/// Long contexts cost the warm-up no more than short ones.
#[test]
fn the_positions_before_the_prompt_are_not_computed() {
    let (engine, shapes) = start_building(false, options());
    let prompt = Prompt { n_tokens: 5, depth: 1500 };
    let mut plan = WarmUpPlan::full(&engine);
    (plan.decode_buckets, plan.prefill_buckets, plan.crowd) = (vec![], vec![], vec![]);
    plan.shapes = vec![vec![prompt; 2]];
    let report = warm_up(&engine, &plan).unwrap();
    assert_eq!(report.n_tokens, 2 * 2 * plan.n_tokens, "greedily and drawn");
    // The last token of each is not fed.
    let each = prompt.n_tokens + plan.n_tokens - 1;
    assert_eq!(shapes.lock().unwrap().n_computed, 2 * 2 * each);
}

/// Shapes fit the engine, whatever its options.
#[test]
fn every_plan_fits_its_engine() {
    for (max_context, kv_pages, prefill_chunk) in
        [(2, 1, 512), (12, 1, 1), (300, 2, 512), (600, 3, 600), (2048, 8, 64), (2000, 50, 2000)]
    {
        let (max_context, kv_pages) = (Some(max_context), Some(kv_pages));
        let options = EngineOptions { max_context, kv_pages, prefill_chunk, ..options() };
        let (engine, _) = start_building(false, options);
        let plan = WarmUpPlan { decode_buckets: vec![], ..WarmUpPlan::full(&engine) };
        let context = engine.facts().context;
        for Prompt { n_tokens, depth } in plan.shapes.iter().flatten().chain(&plan.crowd) {
            assert!(depth + n_tokens + plan.n_tokens <= context, "{plan:?}, context {context}");
        }
        warm_up(&engine, &plan).unwrap();
    }
}

/// The mutation of the check: without a fence the same user waits for the same graph, and no number says so.
#[test]
fn mutation_without_a_fence_nobody_is_told_what_users_wait_for() {
    let (engine, _) = start_building(false, options());
    let before = engine.counters().built;
    three_at_once(&engine);
    let counters = engine.counters();
    assert!(counters.built.graph_captures > before.graph_captures, "{counters:?}");
    assert_eq!(counters.built_after_fence, None);
}

#[test]
fn a_device_that_builds_nothing_is_warmed_in_short_and_stays_at_zero() {
    let engine = start(options());
    let plan = WarmUpPlan::of(&engine);
    assert_eq!(plan, WarmUpPlan::short(&engine));
    assert_eq!(plan.shapes, Vec::<Vec<Prompt>>::new());
    let engine = crate::support::start_with(crate::support::Faults::default(), false, options());
    assert!(warm_up(&engine, &plan).unwrap().built.is_zero());
    assert_eq!(engine.counters().built_after_fence, Some(DeviceCounters::default()));
}

/// Field fault A1: what is still cold behind the fence is measured, before a user meets it.
#[test]
fn a1_a_shape_that_is_cold_behind_the_fence_shows_in_the_ready_ratio() {
    let (engine, brake) = start_with_brake(options());
    let plan = WarmUpPlan {
        decode_buckets: vec![1],
        prefill_buckets: vec![],
        ..WarmUpPlan::short(&engine)
    };
    let report = warm_up_told(&engine, &plan, &mut |done, total| {
        // The last token is the one behind the fence.
        assert_eq!(total, 31);
        brake.store(done == total - 1, Ordering::Release);
    });
    let report = report.unwrap();
    assert!(report.ready_ratio > plan.cold_ratio_max, "{report:?}");
}

/// The mutation: a measurement that ends at the fence says nothing of it, no counter grows, and the first
/// user waits.
#[test]
fn mutation_without_the_run_behind_the_fence_the_first_user_measures_it() {
    let (engine, brake) = start_with_brake(options());
    let report = warm_up(&engine, &WarmUpPlan::short(&engine)).unwrap();
    brake.store(true, Ordering::Release);
    let generation = engine.submit(plain(vec![5], 1)).unwrap();
    let collected = collect(&generation);
    let first = collected.finished();
    let waited = first.timings.queue_ms + first.timings.prefill_ms;
    assert!(waited >= SLOW.as_secs_f64() * 1e3, "{waited}");
    assert_eq!(engine.counters().built_after_fence, Some(DeviceCounters::default()));
    assert!(report.buckets.iter().all(|bucket| bucket.first_token_ms.len() == 3));
}
