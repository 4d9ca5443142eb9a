//! G-05: what a device builds behind the warm-up fence is seen.

use exrail_engine::{EngineHandle, WarmUpPlan, warm_up};
use exrail_kernels::DeviceCounters;

use crate::support::{collect, options, plain, start, start_building};

/// Answers three requests of one token each at once, over enough steps for all to meet.
fn three_at_once(engine: &EngineHandle) {
    let generations: Vec<_> =
        (0..3).map(|n| engine.submit(plain(vec![5 + n], 200)).unwrap()).collect();
    for generation in &generations {
        collect(generation).finished();
    }
}

#[test]
fn behind_a_full_warm_up_users_find_every_number_of_sequences_built() {
    let engine = start_building(options());
    assert_eq!(engine.counters().built_after_fence, None, "nothing was warmed yet");
    let plan = WarmUpPlan::of(&engine);
    assert_eq!(plan.shapes, (1..=8).collect::<Vec<_>>(), "a device that builds gets all of them");
    let report = warm_up(&engine, &plan).unwrap();
    assert!(report.built.graph_captures >= 8, "{report:?}");
    three_at_once(&engine);
    let counters = engine.counters();
    assert_eq!(counters.built, report.built);
    assert_eq!(counters.built_after_fence, Some(DeviceCounters::default()));
}

/// The mutation of §3.1: one bucket is skipped.
#[test]
fn a_shape_that_was_not_warmed_is_counted_behind_the_fence() {
    let engine = start_building(options());
    let mut plan = WarmUpPlan::full(&engine);
    plan.shapes.retain(|&n| n != 3);
    let report = warm_up(&engine, &plan).unwrap();
    three_at_once(&engine);
    let counters = engine.counters();
    let grown = DeviceCounters { graph_captures: 1, ..DeviceCounters::default() };
    assert_eq!(counters.built_after_fence, Some(grown));
    assert_eq!(counters.built.graph_captures, report.built.graph_captures + 1);
    // What is warmed once more is warm: the fence opens and closes again.
    warm_up(&engine, &plan).unwrap();
    assert_eq!(engine.counters().built_after_fence, Some(DeviceCounters::default()));
}

/// The mutation of the check: without a fence the same user waits for the same graph, and no number says so.
#[test]
fn mutation_without_a_fence_nobody_is_told_what_users_wait_for() {
    let engine = start_building(options());
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
    assert_eq!(plan.shapes, Vec::<usize>::new());
    let engine = crate::support::start_with(crate::support::Faults::default(), false, options());
    assert!(warm_up(&engine, &plan).unwrap().built.is_zero());
    assert_eq!(engine.counters().built_after_fence, Some(DeviceCounters::default()));
}
