//! The same promises on the CPU backend, in both activation modes.

use exrail_engine::{Engine, EngineHandle, EngineOptions};
use exrail_kernels::reference::Reference;
use exrail_kernels::{Activation, KvDtype};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};

use crate::support::{assert_all_pages_return, collect, generate, greedy, load, options, prompt};

const MODES: [Activation; 2] = [Activation::F32, Activation::Int8];

fn start(activation: Activation, kv_dtype: KvDtype) -> EngineHandle {
    let cpu = CpuOptions { threads: Some(2), activation, ..CpuOptions::default() };
    let options = EngineOptions { kv_dtype, ..options() };
    Engine::start(load(CpuBackend::new(cpu).unwrap()), options).unwrap()
}

/// C13 of the field faults: every request gets its own answer.
#[test]
fn batch_equals_alone_bit_for_bit() {
    // The CPU backend gives the same bits for a row whatever else is in the batch.
    for activation in MODES {
        let engine = start(activation, KvDtype::F16);
        let requests: Vec<_> = (0..8).map(|n| greedy(prompt(n, 3 + 40 * n), 24)).collect();
        let alone: Vec<_> =
            requests.iter().map(|request| generate(&engine, request.clone()).ids()).collect();
        let generations: Vec<_> =
            requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        for (generation, alone) in generations.iter().zip(&alone) {
            assert_eq!(collect(generation).ids(), *alone, "{activation:?}");
        }
        assert_all_pages_return(&engine);
    }
}

#[test]
fn a_warm_answer_is_the_cold_one_bit_for_bit() {
    for activation in MODES {
        for kv_dtype in [KvDtype::F16, KvDtype::Int8] {
            let engine = start(activation, kv_dtype);
            // The same tokens behind a prefix that is computed, and behind one that is read; the chunks
            // of the two begin at other places, and of the answer one page was decoded.
            let request = greedy(prompt(1, 500), 40);
            let cold = generate(&engine, request.clone());
            let warm = generate(&engine, request.clone());
            assert_eq!(warm.finished().usage.cached_tokens, 256, "{activation:?} {kv_dtype:?}");
            assert_eq!(warm.ids(), cold.ids(), "{activation:?} {kv_dtype:?}");
            let chat = [request.prompt, cold.ids(), prompt(2, 30)].concat();
            let fresh = generate(&start(activation, kv_dtype), greedy(chat.clone(), 40));
            let next = generate(&engine, greedy(chat, 40));
            assert_eq!(next.finished().usage.cached_tokens, 512, "{activation:?} {kv_dtype:?}");
            assert_eq!(next.ids(), fresh.ids(), "{activation:?} {kv_dtype:?}");
            assert_all_pages_return(&engine);
        }
    }
}

#[test]
fn logits_agree_with_the_reference() {
    let reference = Engine::start(load(Reference), options()).unwrap();
    let expected = reference.forward_logits(prompt(3, 300)).unwrap();
    let engine = start(Activation::F32, KvDtype::F32);
    let found = engine.forward_logits(prompt(3, 300)).unwrap();
    let largest = expected.iter().flatten().fold(0.0_f32, |max, x| max.max(x.abs()));
    // Two layers of sums over 64 and 128 products: 400 roundings of the largest value at most.
    let bound = 400.0 * f32::EPSILON * largest;
    for (a, b) in expected.iter().flatten().zip(found.iter().flatten()) {
        assert!((a - b).abs() <= bound, "{a} {b}, bound {bound}");
    }
}
