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
    KvShape, KvSlot, NormKind, Normed, PAGE_TOKENS, PageId, Places, Rope, RopeStyle, TokenId,
    WeightView,
};
use exrail_kernels_cuda::{
    CopyProbe, CudaBackend, CudaBuffer, CudaKvPool, CudaOptions, CudaWeight,
};
use exrail_model::{Batch, Decoder};
use exrail_tensor::DType;
use exrail_testkit::{SYNTHETIC_LLAMAS, SyntheticLlama as Shape};

/// The shapes of `exrail-testkit` that fit one card beside the others.
fn shapes() -> impl Iterator<Item = Shape> {
    SYNTHETIC_LLAMAS.into_iter().filter(|shape| shape.n_layers <= 32)
}

/// Widths of queries, and of keys and values.
fn head_widths(shape: Shape) -> (usize, usize) {
    (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim)
}

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
    for shape in shapes() {
        for (n_rows, depth) in [(1, 512), (1, 3500), (8, 512), (2048, 0)] {
            let load = Load { backend: &backend, shape, n_rows, depth, copy };
            let mut cache = load.cache();
            load.products(&mut cache);
            load.attention(&mut cache);
        }
    }
}

/// The weights of a layer.
struct Layer {
    qkv: [CudaWeight; 3],
    out: CudaWeight,
    gate: CudaWeight,
    up: CudaWeight,
    down: CudaWeight,
}

/// Rows that go through a decoder's stages.
#[derive(Clone, Copy)]
struct Load<'a> {
    backend: &'a CudaBackend,
    shape: Shape,
    n_rows: usize, // of one sequence in prefill, or one a sequence in decode
    depth: usize,
    copy: f64, // bytes a second
}

impl Load<'_> {
    fn weight(&self, dtype: DType, rows: usize, columns: usize) -> CudaWeight {
        let len = bytes_of(dtype, rows, columns);
        let bytes: Vec<u8> = (0..len).map(|i| (i * i % 251) as u8 & 0x3f).collect();
        let (name, rounding, head) = ("w", InputRounding::Twice, false);
        let view = WeightView { name, dtype, rows, columns, bytes: &bytes, rounding, head };
        self.backend.weight(&view).expect("the device has memory")
    }

    fn layer(&self) -> Layer {
        let Shape { width, ffn_width, .. } = self.shape;
        let (query, kv) = head_widths(self.shape);
        let make = |rows, columns| self.weight(DType::Q4_0, rows, columns);
        Layer {
            qkv: [make(query, width), make(kv, width), make(kv, width)],
            out: make(width, query),
            gate: make(ffn_width, width),
            up: make(ffn_width, width),
            down: make(width, ffn_width),
        }
    }

    fn buffer(&self, len: usize) -> CudaBuffer {
        let mut buffer = self.backend.buffer(len).expect("memory");
        self.backend.write(&mut buffer, &vec![1.0; len]);
        buffer
    }

    fn is_prefill(&self) -> bool {
        self.n_rows > 64
    }

    /// Measures `n_nodes` of a stage, which read `bytes` together.
    fn report(&self, stage: &str, bytes: usize, n_nodes: usize, run: impl FnMut()) {
        let seconds = measure(self.backend, run);
        let (us, rate) = (1e6 * seconds / n_nodes as f64, bytes as f64 / seconds);
        let mb = bytes as f64 / n_nodes as f64 / 1e6;
        println!(
            "| {} | {stage} | {} | {} | {us:.2} | {mb:.2} | {:.0} | {:.0} % |",
            self.shape.name,
            self.n_rows,
            self.depth,
            rate / 1e9,
            100.0 * rate / self.copy
        );
    }

    /// What reads weights. A few rows leave their heads where attention finds them.
    fn products(&self, cache: &mut Cache) {
        let Load { backend, n_rows, .. } = *self;
        let Shape { n_layers, width, ffn_width, vocab_size, .. } = self.shape;
        let (query, kv) = head_widths(self.shape);
        let layers: Vec<Layer> = (0..n_layers).map(|_| self.layer()).collect();
        let bytes = |rows: usize, columns: usize| n_layers * bytes_of(DType::Q4_0, rows, columns);
        let (norm, kind, eps) = (self.buffer(width), NormKind::Rms, 1e-5);
        let (mut x, mut work) = (self.buffer(n_rows * width), self.buffer(n_rows * width));
        let mut gated = self.buffer(n_rows * ffn_width);
        self.report("norm, q, k, v, rotate, store", bytes(query + 2 * kv, width), n_layers, || {
            for (i, layer) in layers.iter().enumerate() {
                let input = Normed { x: &x, n_rows, kind, weight: &norm, eps, work: &mut work };
                let (heads, places) = cache.heads(i);
                backend.norm_place(input, layer.qkv.each_ref(), None, heads, places);
            }
        });
        self.report("output, add", bytes(width, query), n_layers, || {
            for layer in &layers {
                backend.linear_add(&cache.q, n_rows, &layer.out, None, 0.0, &mut x);
            }
        });
        self.report("norm, gate, up", bytes(2 * ffn_width, width), n_layers, || {
            for Layer { gate, up, .. } in &layers {
                let input = Normed { x: &x, n_rows, kind, weight: &norm, eps, work: &mut work };
                backend.norm_gate(input, gate, up, GateActivation::Silu, &mut gated);
            }
        });
        self.report("down, add", bytes(width, ffn_width), n_layers, || {
            for layer in &layers {
                backend.linear_add(&gated, n_rows, &layer.down, None, 0.0, &mut x);
            }
        });
        // Superblocks have 256 columns.
        let width = width.next_multiple_of(256);
        let n_rows = if self.is_prefill() { 1 } else { n_rows };
        let head = self.weight(DType::Q6_K, vocab_size, width);
        let (norm, x) = (self.buffer(width), self.buffer(n_rows * width));
        let (mut work, mut logits) =
            (self.buffer(n_rows * width), self.buffer(n_rows * vocab_size));
        self.report("norm, head", 16 * bytes_of(DType::Q6_K, vocab_size, width), 16, || {
            for _ in 0..16 {
                let input = Normed { x: &x, n_rows, kind, weight: &norm, eps, work: &mut work };
                backend.norm_linear(input, &head, &mut logits);
            }
        });
    }

    /// What reads keys and values.
    fn attention(&self, cache: &mut Cache) {
        let Load { backend, depth, .. } = *self;
        let Shape { n_layers, n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let (n_sequences, rows_of_one) = self.sequences();
        let pages_of_one = cache.pages.len() / n_sequences;
        let Cache { q, pool, pages, attended, .. } = cache;
        let span = |i: usize| AttentionSpan {
            first_row: i * rows_of_one,
            n_rows: rows_of_one,
            first_position: depth,
            pages: &pages[i * pages_of_one..][..pages_of_one],
        };
        let spans: Vec<AttentionSpan<'_>> = (0..n_sequences).map(span).collect();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape =
            AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap: None, window: None };
        let (_, kv) = head_widths(self.shape);
        let cached = 2 * n_layers * n_sequences * (depth + rows_of_one) * kv * 2;
        self.report("attention", cached, n_layers, || {
            for layer_idx in 0..n_layers {
                backend.attention(q, pool, layer_idx, shape, &spans, attended);
            }
        });
    }

    /// Sequences, and rows of each.
    fn sequences(&self) -> (usize, usize) {
        if self.is_prefill() { (1, self.n_rows) } else { (self.n_rows, 1) }
    }

    fn cache(&self) -> Cache {
        let Load { backend, shape, n_rows, depth, .. } = *self;
        let Shape { n_layers, n_kv_heads, head_dim, .. } = shape;
        let (query, kv) = head_widths(shape);
        let (n_sequences, rows_of_one) = self.sequences();
        let pages_of_one = (depth + rows_of_one).div_ceil(PAGE_TOKENS);
        let n_pages = n_sequences * pages_of_one;
        let kv_shape = KvShape { n_layers, n_kv_heads, head_dim, n_pages, dtype: KvDtype::F16 };
        let pages: Vec<PageId> = (0..n_pages as u32).map(PageId).collect();
        let own = |row: usize| &pages[row / rows_of_one * pages_of_one..][..pages_of_one];
        let position = |row: usize| depth + row % rows_of_one;
        let slot = |row: usize| KvSlot {
            page: own(row)[position(row) / PAGE_TOKENS],
            offset: (position(row) % PAGE_TOKENS) as u32,
        };
        let inverse_frequencies = (0..head_dim / 2).map(|i| 1.0 / (i + 1) as f32).collect();
        let [q, k, v, attended] = [query, kv, kv, query].map(|width| self.buffer(n_rows * width));
        Cache {
            shape,
            pool: backend.kv_pool(kv_shape).expect("memory"),
            positions: (0..n_rows).map(|row| position(row) as u32).collect(),
            slots: (0..n_rows).map(slot).collect(),
            rope: Rope { inverse_frequencies, style: RopeStyle::Interleaved, magnitude: 1.0 },
            pages,
            q,
            k,
            v,
            attended,
        }
    }
}

/// Keys and values, and the heads of a step on their way there.
struct Cache {
    shape: Shape,
    pool: CudaKvPool,
    pages: Vec<PageId>,
    positions: Vec<u32>,
    slots: Vec<KvSlot>,
    rope: Rope,
    q: CudaBuffer,
    k: CudaBuffer,
    v: CudaBuffer,
    attended: CudaBuffer,
}

impl Cache {
    /// What a layer's products fill, and where it goes.
    fn heads(&mut self, layer: usize) -> (HeadRows<'_, CudaBuffer>, Places<'_, CudaKvPool>) {
        let Shape { n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let (queries, keys, values) = (&mut self.q, &mut self.k, &mut self.v);
        let (norms, rope) = (None, Some(&self.rope));
        let heads = HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
        let (positions, slots) = (&self.positions[..], &self.slots[..]);
        (heads, Places { pool: &mut self.pool, layer, positions, slots })
    }
}

fn bytes_of(dtype: DType, rows: usize, columns: usize) -> usize {
    rows * dtype.row_bytes(columns).expect("whole blocks")
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
