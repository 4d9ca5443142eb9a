//! Row C1 of the field faults: pages whose size suits no vector are moved to other places.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use exrail_kernels::reference::Reference;
use exrail_kernels::{Backend, KvDtype, KvMove, KvShape, KvSlot, PAGE_TOKENS, PageId};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use proptest::prelude::*;
use support::noise;

const N_LAYERS: usize = 2;
const N_PAGES: usize = 6;

fn place(page: usize, offset: u32) -> KvSlot {
    KvSlot { page: PageId(u32::try_from(page).unwrap()), offset }
}

/// Every key and value of one page to another, in every layer, without a turn.
fn move_page<B: Backend>(backend: &B, pool: &mut B::KvPool, from: usize, to: usize) {
    let offsets = 0..u32::try_from(PAGE_TOKENS).unwrap();
    let one = |offset| KvMove { from: place(from, offset), to: place(to, offset), distance: 0 };
    let moves: Vec<KvMove> = offsets.map(one).collect();
    for layer in 0..N_LAYERS {
        backend.kv_move(pool, layer, &moves, None);
    }
}

/// Bytes of all pages.
fn pages<B: Backend>(backend: &B, pool: &B::KvPool) -> Vec<Vec<u8>> {
    let read = |page| {
        let mut bytes = vec![0; backend.kv_page_bytes(pool)];
        backend.kv_read_page(pool, place(page, 0).page, &mut bytes);
        bytes
    };
    (0..N_PAGES).map(read).collect()
}

/// A pool of noise whose pages 0 to 4 go, by way of the last one, to the places that `order` names.
fn permute<B: Backend>(backend: &B, shape: KvShape, order: &[usize]) {
    let mut pool = backend.kv_pool(shape).unwrap();
    let rows = N_PAGES * PAGE_TOKENS;
    let n = rows * shape.n_kv_heads * shape.head_dim;
    let (mut k, mut v) = (backend.buffer(n).unwrap(), backend.buffer(n).unwrap());
    let slots: Vec<KvSlot> =
        (0..rows).map(|row| place(row / PAGE_TOKENS, (row % PAGE_TOKENS) as u32)).collect();
    for layer in 0..N_LAYERS {
        backend.write(&mut k, &noise(2 * layer as u64, n));
        backend.write(&mut v, &noise(2 * layer as u64 + 1, n));
        backend.kv_write(&mut pool, layer, &k, &v, &slots);
    }
    let before = pages(backend, &pool);
    let mut now: Vec<usize> = (0..N_PAGES).collect();
    for (to, &wanted) in order.iter().enumerate() {
        let from = now.iter().position(|&page| page == wanted).unwrap();
        if from == to {
            continue;
        }
        for (from, to) in [(to, N_PAGES - 1), (from, to), (N_PAGES - 1, from)] {
            move_page(backend, &mut pool, from, to);
        }
        now.swap(from, to);
    }
    let after = pages(backend, &pool);
    for (to, &wanted) in order.iter().enumerate() {
        assert!(before[wanted] == after[to], "{}, {shape:?}: page {wanted}", backend.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]
    /// C1: after any permutation every page has the bytes that it had, whatever the size of a head.
    #[test]
    fn pages_of_any_size_keep_their_bytes(order in Just((0..N_PAGES - 1).collect::<Vec<_>>()).prop_shuffle()) {
        let cpu = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        for (n_kv_heads, head_dim) in [(1, 7), (3, 14), (2, 33), (1, 64)] {
            for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
                let shape = KvShape { n_layers: N_LAYERS, n_kv_heads, head_dim, n_pages: N_PAGES, dtype };
                permute(&cpu, shape, &order);
                permute(&Reference, shape, &order);
            }
        }
    }
}
