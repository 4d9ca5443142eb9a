//! Where the time of a decode step goes: every stage of a decoder's layer by itself, as the nodes of one
//! graph over many layers' weights, next to the copy bandwidth of the same run. Prints a table for
//! `bench/record/`; with a model file also how long the host takes to ask for a step.
//!
//! `cargo run --release -p exrail-kernels-cuda --features cuda --example stages [MODEL.gguf]`

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::path::Path;
use std::time::Instant;

use exrail_checkpoint::{DecoderConfig, Gguf};
use exrail_kernels::{
    AttentionShape, AttentionSpan, Backend, GateActivation, HeadRows, InputRounding, KvDtype,
    KvShape, KvSlot, NormKind, Normed, PAGE_TOKENS, PageId, Rope, RopeStyle, TokenId, WeightView,
};
use exrail_kernels_cuda::{CopyProbe, CudaBackend, CudaOptions, CudaWeight};
use exrail_model::{Batch, Decoder};
use exrail_tensor::DType;

/// Layers, width, query heads, key/value heads, head width, FFN width, vocabulary.
type Shape = (&'static str, usize, usize, usize, usize, usize, usize, usize);

const SHAPES: [Shape; 4] = [
    ("llama-2-7b", 32, 4096, 32, 32, 128, 11_008, 32_000),
    ("llama-3-8b", 32, 4096, 32, 8, 128, 14_336, 128_256),
    ("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256),
    ("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49_152),
];
/// Passes before: the second makes the graph.
const WARM_UPS: usize = 3;
/// Measurements, of which the median counts.
const SAMPLES: usize = 9;

fn main() {
    let backend = CudaBackend::open(CudaOptions::new(0)).expect("a device");
    let mut probe = CopyProbe::new(&backend, 1 << 30).expect("memory");
    let copy = median((0..SAMPLES).map(|_| probe.pass()).collect());
    println!("{}; copies move {:.0} GB/s\n", backend.name(), copy / 1e9);
    if let Some(path) = std::env::args().nth(1) {
        return step(&backend, Path::new(&path));
    }
    println!("| shape | stage | rows | depth | µs | MB | GB/s | of copies |");
    println!("|---|---|---|---|---|---|---|---|");
    for shape in SHAPES {
        for (n_rows, depth) in [(1, 512), (1, 3500), (8, 512), (2048, 0)] {
            stages(&backend, shape, n_rows, depth, copy);
        }
    }
}

struct Layer {
    qkv: [CudaWeight; 3],
    out: CudaWeight,
    gate: CudaWeight,
    up: CudaWeight,
    down: CudaWeight,
}

fn weight(backend: &CudaBackend, dtype: DType, rows: usize, columns: usize) -> (CudaWeight, usize) {
    let len = rows * dtype.row_bytes(columns).expect("whole blocks");
    let bytes: Vec<u8> = (0..len).map(|i| (i * i % 251) as u8 & 0x3f).collect();
    let (name, rounding, head) = ("w", InputRounding::Twice, false);
    let view = WeightView { name, dtype, rows, columns, bytes: &bytes, rounding, head };
    (backend.weight(&view).expect("the device has memory"), len)
}

fn stages(backend: &CudaBackend, shape: Shape, n_rows: usize, depth: usize, copy: f64) {
    let (name, n_layers, width, n_heads, n_kv_heads, head_dim, ffn, vocabulary) = shape;
    let (query, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
    let prefill = n_rows > 64;
    let dtype = DType::Q4_0;
    let mut bytes = [0; 4];
    let layers: Vec<Layer> = (0..n_layers)
        .map(|_| {
            let mut make = |stage: usize, rows, columns| {
                let (weight, len) = weight(backend, dtype, rows, columns);
                bytes[stage] += len;
                weight
            };
            Layer {
                qkv: [make(0, query, width), make(0, kv, width), make(0, kv, width)],
                out: make(1, width, query),
                gate: make(2, ffn, width),
                up: make(2, ffn, width),
                down: make(3, width, ffn),
            }
        })
        .collect();
    let (head, head_bytes) = weight(backend, DType::Q6_K, vocabulary, width.next_multiple_of(256));
    let buffer = |len: usize| backend.buffer(n_rows * len).expect("memory");
    let ones = |len: usize| {
        let mut buffer = backend.buffer(len).expect("memory");
        backend.write(&mut buffer, &vec![1.0; len]);
        buffer
    };
    let wide = width.next_multiple_of(256);
    let (norm, head_norm) = (ones(width), ones(wide));
    let mut x = ones(n_rows * wide);
    let (mut q, mut k, mut v) = (buffer(query), buffer(kv), buffer(kv));
    let (mut attended, mut gated) = (buffer(query), buffer(ffn));
    let n_logits = if prefill { 1 } else { n_rows };
    let mut logits = backend.buffer(n_logits * vocabulary).expect("memory");
    let (mut work, kind, eps) = (buffer(wide), NormKind::Rms, 1e-5);
    // One sequence in prefill, or one a row in decode.
    let (n_sequences, rows_of_one) = if prefill { (1, n_rows) } else { (n_rows, 1) };
    let pages_of_one = (depth + rows_of_one).div_ceil(PAGE_TOKENS);
    let n_pages = n_sequences * pages_of_one;
    let kv_shape = KvShape { n_layers, n_kv_heads, head_dim, n_pages, dtype: KvDtype::F16 };
    let mut pool = backend.kv_pool(kv_shape).expect("memory");
    let pages: Vec<PageId> = (0..n_pages as u32).map(PageId).collect();
    let own = |row: usize| &pages[row / rows_of_one * pages_of_one..][..pages_of_one];
    let position = |row: usize| depth + row % rows_of_one;
    let positions: Vec<u32> = (0..n_rows).map(|row| position(row) as u32).collect();
    let slots: Vec<KvSlot> = (0..n_rows)
        .map(|row| KvSlot {
            page: own(row)[position(row) / PAGE_TOKENS],
            offset: (position(row) % PAGE_TOKENS) as u32,
        })
        .collect();
    let spans: Vec<AttentionSpan<'_>> = (0..n_sequences)
        .map(|i| AttentionSpan {
            first_row: i * rows_of_one,
            n_rows: rows_of_one,
            first_position: depth,
            pages: own(i * rows_of_one),
        })
        .collect();
    let inverse_frequencies = (0..head_dim / 2).map(|i| 1.0 / (i + 1) as f32).collect();
    let rope = Rope { inverse_frequencies, style: RopeStyle::Interleaved, magnitude: 1.0 };
    let scale = 1.0 / (head_dim as f32).sqrt();
    let attention =
        AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap: None, window: None };
    let cached = 2 * n_layers * n_sequences * (depth + rows_of_one) * kv * 2;

    let row = |stage: &str, bytes: usize, n_nodes: usize, seconds: f64| {
        let (us, rate) = (1e6 * seconds / n_nodes as f64, bytes as f64 / seconds);
        let mb = bytes as f64 / n_nodes as f64 / 1e6;
        let share = 100.0 * rate / copy;
        println!(
            "| {name} | {stage} | {n_rows} | {depth} | {us:.2} | {mb:.2} | {:.0} | {share:.0} % |",
            rate / 1e9
        );
    };
    macro_rules! time {
        ($stage:expr, $bytes:expr, $n:expr, $run:expr) => {
            let seconds = measure(backend, || $run);
            row($stage, $bytes, $n, seconds);
        };
    }
    time!(
        "norm, q, k, v",
        bytes[0],
        n_layers,
        for layer in &layers {
            let input = Normed { x: &x, n_rows, kind, weight: &norm, eps, work: &mut work };
            backend.norm_qkv(input, layer.qkv.each_ref(), None, [&mut q, &mut k, &mut v]);
        }
    );
    time!(
        "rotate, store",
        0,
        n_layers,
        for layer_idx in 0..n_layers {
            let (queries, keys, values) = (&mut q, &mut k, &v);
            let (norms, rope) = (None, Some(&rope));
            let heads =
                HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
            backend.place_heads(heads, &positions, &mut pool, layer_idx, &slots);
        }
    );
    time!(
        "attention",
        cached,
        n_layers,
        for layer_idx in 0..n_layers {
            backend.attention(&q, &pool, layer_idx, attention, &spans, &mut attended);
        }
    );
    time!(
        "output, add",
        bytes[1],
        n_layers,
        for layer in &layers {
            backend.linear_add(&attended, n_rows, &layer.out, None, 0.0, &mut x);
        }
    );
    time!(
        "norm, gate, up",
        bytes[2],
        n_layers,
        for layer in &layers {
            let input = Normed { x: &x, n_rows, kind, weight: &norm, eps, work: &mut work };
            backend.norm_gate(input, &layer.gate, &layer.up, GateActivation::Silu, &mut gated);
        }
    );
    time!(
        "down, add",
        bytes[3],
        n_layers,
        for layer in &layers {
            backend.linear_add(&gated, n_rows, &layer.down, None, 0.0, &mut x);
        }
    );
    time!(
        "norm, head, largest",
        16 * head_bytes,
        16,
        for _ in 0..16 {
            let input = Normed { x: &x, n_rows, kind, weight: &head_norm, eps, work: &mut work };
            backend.norm_linear(input, &head, &mut logits);
        }
    );
}

/// Seconds of a pass.
fn measure(backend: &CudaBackend, mut run: impl FnMut()) -> f64 {
    let mut probe = backend.buffer(1).expect("memory");
    let mut one = [0.0];
    let mut samples = Vec::new();
    for i in 0..WARM_UPS + SAMPLES {
        backend.write(&mut probe, &one);
        backend.read(&probe, &mut one);
        run();
        let since = Instant::now();
        backend.read(&probe, &mut one);
        if i >= WARM_UPS {
            samples.push(since.elapsed().as_secs_f64());
        }
    }
    median(samples)
}

/// How long the host takes to ask for a step of decode, and the device to answer.
fn step(backend: &CudaBackend, path: &Path) {
    let gguf = Gguf::open(path).expect("a model");
    let config = DecoderConfig::from_gguf(&gguf).expect("a model");
    let config = config.with_context_len(1024).expect("a context");
    let decoder = Decoder::load(backend, &config, &gguf, &mut |_| {}).expect("a model");
    let pages: Vec<PageId> = (0..4).map(PageId).collect();
    let mut pool = backend.kv_pool(decoder.kv_shape(4, KvDtype::F16)).expect("memory");
    let mut scratch = decoder.scratch(backend, 1, 1).expect("memory");
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    let mut logits = Vec::new();
    for first_position in 0..200 {
        let span = AttentionSpan { first_row: 0, n_rows: 1, first_position, pages: &pages };
        let batch = Batch { ids: &[TokenId(1)], spans: &[span], logit_rows: &[0] };
        let since = Instant::now();
        decoder.forward(backend, &mut scratch, &mut pool, &batch);
        asked.push(since.elapsed().as_secs_f64());
        let since = Instant::now();
        scratch.read_logits(backend, &mut logits);
        answered.push(since.elapsed().as_secs_f64());
    }
    println!(
        "asking for a step takes {:.0} µs, the answer with all logits {:.0} µs",
        1e6 * median(asked),
        1e6 * median(answered)
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
