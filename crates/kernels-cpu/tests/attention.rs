//! Attention gives a query the same bits alone and in a batch, on one thread and on several, on
//! every instruction set.

mod support;

use exrail_kernels::{
    Activation, AttentionShape, AttentionSpan, Backend, KvDtype, KvShape, KvSlot, PAGE_TOKENS,
    PageId,
};
use exrail_kernels_cpu::{CpuBackend, CpuBuffer, CpuOptions, Isa};
use support::noise;

/// H, K, D: groups of 1, 2, 3, 4, 7 and 8 queries a key head.
const HEADS: [(usize, usize, usize); 6] =
    [(2, 2, 40), (4, 2, 64), (9, 3, 64), (8, 2, 32), (7, 1, 33), (8, 1, 144)];
/// First positions and rows of the sequences of a batch: within a segment of 128 tokens, at its
/// edge, over pages, and a prompt.
const SEQUENCES: [(usize, usize); 5] = [(700, 1), (127, 1), (128, 1), (255, 3), (380, 9)];
const PAGES: usize = 3;

fn upload(backend: &CpuBackend, values: &[f32]) -> CpuBuffer {
    let mut buffer = backend.buffer(values.len()).expect("memory");
    backend.write(&mut buffer, values);
    buffer
}

/// One sequence's pages, its first position and its queries.
type Sequence<'a> = (&'a [PageId], usize, &'a [f32]);

fn attend(
    backend: &CpuBackend,
    pool: &<CpuBackend as Backend>::KvPool,
    shape: AttentionShape,
    sequences: &[Sequence<'_>],
) -> Vec<u32> {
    let width = shape.n_heads * shape.head_dim;
    let (mut q, mut spans) = (Vec::new(), Vec::new());
    for (pages, first_position, queries) in sequences {
        let (first_row, n_rows) = (q.len() / width, queries.len() / width);
        spans.push(AttentionSpan { first_row, n_rows, first_position: *first_position, pages });
        q.extend_from_slice(queries);
    }
    let mut out = backend.buffer(q.len()).expect("memory");
    backend.attention(&upload(backend, &q), pool, 0, shape, &spans, &mut out);
    let mut values = vec![0.0; q.len()];
    backend.read(&out, &mut values);
    assert!(values.iter().all(|v| v.is_finite()));
    values.iter().map(|v| v.to_bits()).collect()
}

fn filled_pool(backend: &CpuBackend, shape: KvShape) -> <CpuBackend as Backend>::KvPool {
    let mut pool = backend.kv_pool(shape).expect("memory");
    let slots: Vec<KvSlot> = (0..shape.n_pages * PAGE_TOKENS)
        .map(|i| KvSlot {
            page: PageId((i / PAGE_TOKENS) as u32),
            offset: (i % PAGE_TOKENS) as u32,
        })
        .collect();
    let len = slots.len() * shape.n_kv_heads * shape.head_dim;
    let (k, v) = (upload(backend, &noise(1, len)), upload(backend, &noise(2, len)));
    backend.kv_write(&mut pool, 0, &k, &v, &slots);
    pool
}

#[test]
fn a_query_alone_equals_the_query_in_a_batch_on_any_threads() {
    for (n_heads, n_kv_heads, head_dim) in HEADS {
        for (soft_cap, window) in [(None, None), (Some(2.0), None), (None, Some(200))] {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let shape = AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap, window };
            let pages: Vec<PageId> = (0..(SEQUENCES.len() * PAGES) as u32).map(PageId).collect();
            let width = n_heads * head_dim;
            let queries: Vec<Vec<f32>> =
                SEQUENCES.iter().map(|(first, rows)| noise(*first as u64, rows * width)).collect();
            let sequences: Vec<Sequence<'_>> = SEQUENCES
                .iter()
                .zip(pages.chunks(PAGES).zip(&queries))
                .map(|(&(first, _), (pages, queries))| (pages, first, &queries[..]))
                .collect();
            let mut expected: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                for threads in [1, 2, 5] {
                    let options = CpuOptions {
                        threads: Some(threads),
                        activation: Activation::Int8,
                        isa: Some(isa),
                        ..CpuOptions::default()
                    };
                    let backend = CpuBackend::new(options).expect("available");
                    let n_pages = pages.len();
                    let dtype = KvDtype::F16;
                    let kv = KvShape { n_layers: 1, n_kv_heads, head_dim, n_pages, dtype };
                    let pool = filled_pool(&backend, kv);
                    let batch = attend(&backend, &pool, shape, &sequences);
                    let alone: Vec<u32> = sequences
                        .iter()
                        .flat_map(|(pages, first, queries)| {
                            let rows = queries.chunks_exact(width).enumerate();
                            let row = |(i, row)| {
                                attend(&backend, &pool, shape, &[(pages, first + i, row)])
                            };
                            rows.flat_map(row).collect::<Vec<u32>>()
                        })
                        .collect();
                    let what = format!("{isa}, {threads} threads, {shape:?}");
                    assert!(batch == alone, "a batch differs: {what}");
                    assert!(*expected.get_or_insert(batch.clone()) == batch, "differs: {what}");
                }
            }
        }
    }
}
