//! Rotation seen from outside, on the CPU's kernels; and the scores of the cache's oracle.

use std::num::NonZeroUsize;

use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, Finish, GenerateRequest, RotatePolicy, Rotated,
    Rotation, RotationOptions, ScoreError, SubmitError, TokenEvent,
};
use exrail_kernels::{Activation, KvDtype};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_metrics::{kld_from_logits, kld_probabilities};

use crate::support::{
    Faults, assert_all_pages_return, generate, load, options, plain, prompt, start, start_with,
};

fn cpu(kv_dtype: KvDtype) -> EngineHandle {
    let cpu =
        CpuOptions { threads: Some(2), activation: Activation::Int8, ..CpuOptions::default() };
    let options = EngineOptions { kv_dtype, ..options() };
    Engine::start(load(CpuBackend::new(cpu).unwrap()), options).unwrap()
}

fn rotating(mut request: GenerateRequest, rotate_at: usize, window: usize) -> GenerateRequest {
    let policy = RotatePolicy::Reprefill;
    let (rotate_at, window) = (Some(rotate_at), Some(window));
    let options = RotationOptions { policy, rotate_at, window, sink: None };
    let pinned = std::iter::once(0..30).collect();
    request.rotation = Rotation { options, pinned, waits_for_json: false };
    request
}

/// Its tokens, and each rotation with the tokens of the answer before it.
fn said(
    engine: &EngineHandle,
    request: &GenerateRequest,
) -> (Vec<TokenEvent>, Vec<(usize, Rotated)>) {
    let (mut tokens, mut rotations) = (Vec::new(), Vec::new());
    let generation = engine.submit(request.clone()).unwrap();
    for event in &generation.events {
        match event {
            Event::Started { .. } | Event::RolledBack { .. } | Event::Tail(_) => {}
            Event::Token(token) => tokens.push(token),
            Event::Rotated(rotated) => rotations.push((tokens.len(), rotated)),
            Event::Finished(finished) => assert_eq!(finished.finish, Finish::Length),
            Event::Failed(fault) => panic!("{fault}"),
        }
    }
    (tokens, rotations)
}

/// KL(fresh ‖ rotated) over the tokens that the rotated answer told of, and the rest as one.
fn divergence(fresh: &[f32], told: &TokenEvent) -> f64 {
    let greatest = fresh.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = fresh.iter().map(|&x| f64::from(x - greatest).exp()).sum();
    let top = &told.logprob.as_ref().unwrap().top;
    let best = (0..fresh.len()).max_by(|&a, &b| fresh[a].total_cmp(&fresh[b])).unwrap();
    assert_eq!(top[0].id as usize, best, "the most likely token");
    let with_rest = |mut p: Vec<f64>| {
        p.push((1.0 - p.iter().sum::<f64>()).max(0.0));
        p
    };
    let p = top.iter().map(|at| f64::from(fresh[at.id as usize] - greatest).exp() / total);
    let q = top.iter().map(|at| f64::from(at.logprob).exp());
    kld_probabilities(&with_rest(p.collect()), &with_rest(q.collect())).unwrap()
}

/// The acceptance of G-16: behind each rotation, KL(after ‖ fresh prefill of the kept ids) within §1.6.
#[test]
fn behind_a_rotation_the_distribution_is_that_of_a_fresh_prefill() {
    for (kv_dtype, limit) in [(KvDtype::F16, 0.01), (KvDtype::Int8, 0.05)] {
        let engine = cpu(kv_dtype);
        let mut request = rotating(plain(prompt(2, 300), 900), 700, 200);
        request.logprobs = Some(20);
        let (tokens, rotations) = said(&engine, &request);
        assert!(rotations.len() >= 2, "{}", rotations.len());
        let ids = tokens.iter().map(|token| token.id);
        let history: Vec<u32> = request.prompt.iter().copied().chain(ids).collect();
        for (at, rotated) in &rotations {
            let kept = rotated.kept.iter().cloned().flatten().map(|at| history[at]).collect();
            let fresh = engine.next_logits(kept).unwrap();
            let kl = divergence(&fresh, &tokens[*at]);
            assert!(kl <= limit, "{kv_dtype:?}: {kl}");
            // Mutation: without the pinned range it is another distribution.
            let lost = rotated.kept[1..].iter().cloned().flatten().map(|at| history[at]).collect();
            let lost = engine.next_logits(lost).unwrap();
            // A model of random weights looks little at any token; 200 others stay.
            let other = kld_from_logits(&fresh, &lost).unwrap();
            assert!(other > 100.0 * kl.max(1e-7), "{kv_dtype:?}: {other}, {kl}");
        }
        assert_eq!(engine.counters().rotations, rotations.len() as u64);
        assert_all_pages_return(&engine);
    }
}

/// C5 and C8 of the field faults: refused with the numbers, and the engine goes on.
#[test]
fn c5_c8_what_cannot_be_rotated_is_refused_at_once() {
    let engine = start(EngineOptions { kv_pages: Some(2), ..options() });
    let context = engine.facts().context;
    assert_eq!(context, 512);
    for (rotate_at, window, field) in [
        (513, 100, "rotation.rotate_at"),
        (300, 100, "rotation.rotate_at"),
        (usize::MAX, 1, "rotation.rotate_at"),
        (500, 500, "rotation.window"),
        (500, usize::MAX, "rotation.window"),
        (500, 0, "rotation.window"),
    ] {
        let request = rotating(plain(prompt(1, 300), 400), rotate_at, window);
        match engine.submit(request) {
            Err(SubmitError::BadOption { field: found, .. }) => assert_eq!(found, field),
            other => panic!("expected a refused option, found {other:?}"),
        }
    }
    let endless = rotating(plain(prompt(1, 300), usize::MAX), 500, 100);
    assert!(matches!(engine.submit(endless), Err(SubmitError::TooManyTokens { .. })));
    let without = plain(prompt(1, 300), 400);
    assert!(matches!(engine.submit(without), Err(SubmitError::TooManyTokens { limit: 212, .. })));
    let (tokens, rotations) = said(&engine, &rotating(plain(prompt(1, 300), 400), 500, 100));
    assert_eq!((tokens.len(), rotations.len()), (400, 1));
    assert_all_pages_return(&engine);
}

/// C4 of the field faults: a shift of the cache is refused at the start, and by nobody's request later.
#[test]
fn c4_an_engine_refuses_a_rotation_that_it_cannot_do() {
    for (rotation, field) in [
        (RotationOptions { sink: Some(0), ..RotationOptions::default() }, "rotation.sink"),
        (
            RotationOptions { rotate_at: Some(4097), ..RotationOptions::default() },
            "rotation.rotate_at",
        ),
        (RotationOptions { window: Some(0), ..RotationOptions::default() }, "rotation.window"),
    ] {
        match Engine::start(
            load(exrail_kernels::reference::Reference),
            EngineOptions { rotation, ..options() },
        ) {
            Err(error) => assert!(error.to_string().contains(field), "{error}"),
            Ok(_) => panic!("expected a refused `{field}`"),
        }
    }
}

#[test]
fn rows_by_steps_and_the_last_row_are_those_of_a_score() {
    let engine = start(options());
    let ids = prompt(4, 70);
    let all = engine.forward_logits(ids.clone()).unwrap();
    let mut steps = Vec::new();
    let every = NonZeroUsize::new(16).unwrap();
    engine.score_steps(ids.clone(), every, &mut |at, row| steps.push((at, row.to_vec()))).unwrap();
    assert_eq!(steps.iter().map(|step| step.0).collect::<Vec<_>>(), [15, 31, 47, 63]);
    assert!(steps.iter().all(|(at, row)| *row == all[*at]));
    assert!(engine.next_logits(ids.clone()).unwrap() == all[69]);
    let refused = engine.next_logits(Vec::new());
    assert!(matches!(refused, Err(ScoreError::Refused(SubmitError::EmptyPrompt))));
    // Beside an answer, and nothing of it is left in the cache.
    let answer = generate(&engine, plain(ids, 5)).finished().usage;
    assert_eq!(answer.cached_tokens, 0);
    assert_all_pages_return(&engine);
}

/// What the checks of the books do not see: a key that changes in the device's memory. The oracle does.
#[test]
fn a_rotten_key_is_seen_by_a_fresh_prefill_and_by_nothing_else() {
    let ids = prompt(3, 200);
    let every = NonZeroUsize::new(20).unwrap();
    // Two layers write in each step.
    let rot = Faults { rot: Some(2 * 70), ..Faults::default() };
    for (faults, n_right) in [(Faults::default(), 10), (rot, 3)] {
        let engine = start_with(faults, false, options());
        let mut right = Vec::new();
        let mut live = Vec::new();
        let keep = &mut |at: usize, row: &[f32]| live.push((at, row.to_vec()));
        engine.score_steps(ids.clone(), every, keep).unwrap();
        for (at, live) in &live {
            let fresh = engine.next_logits(ids[..=*at].to_vec()).unwrap();
            right.push(kld_from_logits(&fresh, live).unwrap() < 1e-9);
        }
        assert_eq!(right.iter().filter(|is_right| **is_right).count(), n_right, "{right:?}");
        assert!(right[..3].iter().all(|is_right| *is_right));
        assert_eq!(engine.counters().kv_faults, 0);
    }
}
