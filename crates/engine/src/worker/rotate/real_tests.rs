//! The acceptance of G-16 for `sink_window`, on SmolLM2 itself.

use std::path::PathBuf;

use exrail_kernels::{Activation, KvDtype, KvMove, KvSlot, PAGE_TOKENS};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_text::Specials;

use super::super::Worker;
use super::super::tests::Bench;
use crate::handle::EngineOptions;
use crate::load::{LoadOptions, load_generator};
use crate::request::{GenerateRequest, Sampling};
use crate::rotation::{RotatePolicy, Rotation, RotationOptions};

const ROTATE_AT: usize = 2048;
const WINDOW: usize = 1024;
const N_NEXT: usize = 512;
fn bench(kv_dtype: KvDtype) -> Bench<CpuBackend> {
    let path = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("run through make test");
    let options =
        CpuOptions { threads: Some(2), activation: Activation::Int8, ..CpuOptions::default() };
    let backend = CpuBackend::new(options).expect("this machine runs the CPU backend");
    let loaded = load_generator(backend, &PathBuf::from(path), LoadOptions::default(), &mut |_| {})
        .expect("the default generator loads");
    let options = EngineOptions { kv_pages: Some(16), kv_dtype, ..EngineOptions::default() };
    Bench::of(loaded, options)
}

/// Minus the log-probability of `id`.
fn nll(logits: &[f32], id: u32) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
    total.ln() - f64::from(logits[id as usize] - most)
}

/// Some English that the model has not said itself.
fn text(bench: &Bench<CpuBackend>) -> Vec<u32> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packs/stability/docs");
    let entries = std::fs::read_dir(folder).expect("the sample corpus");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
    paths.sort();
    let pages = paths.iter().map(|path| std::fs::read_to_string(path).expect("a page"));
    let text: String = pages.take(8).collect();
    let ids = bench.worker.loaded.tokenizer.encode(&text, Specials::AsText).expect("it is text");
    assert!(ids.len() > ROTATE_AT + N_NEXT, "{} tokens", ids.len());
    ids
}

/// The context of the only sequence, in the queue or not.
fn context(bench: &mut Bench<CpuBackend>) -> &mut Vec<u32> {
    let Worker { running, suspended, .. } = &mut bench.worker;
    let only = running.iter_mut().chain(suspended).next().expect("it runs");
    &mut only.tokens
}

/// Mean loss of the [`N_NEXT`] tokens of the text behind the first rotation, each of them read as an answer is:
/// what the model says is replaced before it is fed. `spoil` changes what the rotation left.
fn loss(
    kv_dtype: KvDtype,
    policy: RotatePolicy,
    spoil: impl FnOnce(&mut Bench<CpuBackend>),
) -> f64 {
    let mut bench = bench(kv_dtype);
    let text = text(&bench);
    let mut request = GenerateRequest::new(text[..ROTATE_AT - 1].to_vec(), 2 * ROTATE_AT);
    // With the entropy it needs every logit, which stay in the worker's row.
    (request.sampling, request.entropy, request.stop_at_eos) = (Sampling::greedy(), true, false);
    let (rotate_at, window) = (Some(ROTATE_AT), Some(WINDOW));
    let options = RotationOptions { policy, rotate_at, window, sink: None };
    // The other policy keeps the same tokens.
    let pinned = std::iter::once(0..4).collect();
    request.rotation = Rotation { options, pinned, waits_for_json: false };
    let _events = bench.send(request);
    while bench.gauges.snapshot().rotations == 0 {
        bench.turn();
    }
    assert_eq!(context(&mut bench).len(), WINDOW + 4);
    spoil(&mut bench);
    let mut total = 0.0;
    for at in ROTATE_AT - 1..ROTATE_AT - 1 + N_NEXT {
        let tokens = context(&mut bench);
        let n_tokens = tokens.len();
        tokens[n_tokens - 1] = text[at];
        while context(&mut bench).len() == n_tokens {
            bench.turn();
        }
        let Worker { logits, vocab_len, .. } = &bench.worker;
        total += nll(&logits[..*vocab_len], text[at + 1]);
    }
    total / N_NEXT as f64
}

/// Keys as they would be had nobody turned them.
fn turn_back(bench: &mut Bench<CpuBackend>) {
    let Worker { loaded, running, pool, .. } = &mut bench.worker;
    let table = &running[0].page_table;
    let back = i32::try_from(ROTATE_AT - WINDOW - 4).expect("it is small");
    let moves: Vec<KvMove> = (4..running[0].fed)
        .map(|position| {
            let offset = u32::try_from(position % PAGE_TOKENS).expect("it is small");
            let at = KvSlot { page: table[position / PAGE_TOKENS], offset };
            KvMove { from: at, to: at, distance: back }
        })
        .collect();
    loaded.decoder.move_cached(&loaded.backend, pool, &moves);
}

/// G-16: mean NLL of the next 512 tokens at most 1.05 times that of the other policy on the same text.
#[test]
fn behind_a_rotation_in_place_the_loss_is_that_of_a_prefill_but_for_a_twentieth() {
    let expected = loss(KvDtype::F16, RotatePolicy::Reprefill, |_| {});
    for kv_dtype in [KvDtype::F16, KvDtype::Int8] {
        let found = loss(kv_dtype, RotatePolicy::SinkWindow, |_| {});
        assert!(found <= 1.05 * expected, "{kv_dtype:?}: {found} against {expected}");
    }
    // Mutation: the same keys at the positions that they had.
    let spoilt = loss(KvDtype::F16, RotatePolicy::SinkWindow, turn_back);
    assert!(spoilt > 1.05 * expected, "{spoilt} against {expected}");
}
