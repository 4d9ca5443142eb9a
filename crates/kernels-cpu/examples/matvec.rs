//! Speed of the matrix products: GB/s of weights, and the share of the read bandwidth that this
//! machine measures in the same run. Before that one decode step of SmolLM2-135M, matrices only.
//!
//! `cargo run --release -p exrail-kernels-cpu --example matvec -- [threads]`. Every result is checked
//! against f64 before it is timed. Times are the best of several runs.
#![expect(clippy::print_stdout, reason = "a bench prints")]

#[path = "../tests/support/mod.rs"]
mod support;

use exrail_kernels::{Activation, Backend, GateActivation, InputRounding, WeightView};
use exrail_kernels_cpu::{CpuBackend, CpuBuffer, CpuOptions, CpuWeight};
use exrail_tensor::DType;
use std::hint::black_box;
use std::time::Instant;
use support::noise;

/// Weights of a case together: more than the last-level cache.
const TOTAL_BYTES: usize = 128 << 20;

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok());
    let options = CpuOptions { threads, ..CpuOptions::default() };
    let backend = CpuBackend::new(options).expect("the best instruction set is available");
    let peak = read_bandwidth(backend.n_threads());
    println!("{}; reads {peak:.1} GB/s", backend.name());
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q8_0] {
        decode_step(&backend, dtype);
    }
    println!(
        "{:>5} {:>9} {:>9} {:>7} {:>12} {:>12}",
        "", "f32 GB/s", "int8 GB/s", "share", "T=8 GMAC/s", "T=64 GMAC/s"
    );
    for dtype in DType::ALL {
        format_speed(&backend, dtype, peak);
    }
}

/// The best of eight sums over 256 MiB on all threads.
fn read_bandwidth(threads: usize) -> f64 {
    let data = vec![1_u64; 32 << 20];
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in data.chunks(data.len().div_ceil(threads)) {
                scope.spawn(move || {
                    let mut sums = [0_u64; 32];
                    for chunk in part.as_chunks::<32>().0 {
                        for (sum, value) in sums.iter_mut().zip(chunk) {
                            *sum ^= value;
                        }
                    }
                    black_box(sums)
                });
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (data.len() * 8) as f64 / best / 1e9
}

/// Seconds of the fastest of a few runs, bounded to about half a second.
fn best_of(mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..40 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        if begin.elapsed().as_secs_f64() > 0.5 {
            break;
        }
    }
    best
}

fn buffer(backend: &CpuBackend, values: &[f32]) -> CpuBuffer {
    let mut buffer = backend.buffer(values.len()).expect("memory");
    backend.write(&mut buffer, values);
    buffer
}

/// Inputs are rounded twice.
fn weight(backend: &CpuBackend, dtype: DType, rows: usize, columns: usize) -> (CpuWeight, Vec<u8>) {
    rounded_weight(backend, dtype, (rows, columns), InputRounding::Twice)
}

fn rounded_weight(
    backend: &CpuBackend,
    dtype: DType,
    (rows, columns): (usize, usize),
    rounding: InputRounding,
) -> (CpuWeight, Vec<u8>) {
    // One quantised row, repeated and rotated by whole blocks, is random enough and quick to make.
    let row = exrail_tensor::quantize(dtype, &noise(7, columns)).expect("whole blocks");
    let mut bytes = Vec::with_capacity(rows * row.len());
    for r in 0..rows {
        let cut = r * dtype.block_bytes() % row.len();
        bytes.extend_from_slice(&row[cut..]);
        bytes.extend_from_slice(&row[..cut]);
    }
    let view = WeightView { name: "w", dtype, rows, columns, bytes: &bytes, rounding, head: false };
    (backend.weight(&view).expect("weight"), bytes)
}

fn check(backend: &CpuBackend, (weight, bytes): &(CpuWeight, Vec<u8>), dtype: DType, bound: f64) {
    let (rows, columns) = backend.weight_shape(weight);
    let x = noise(11, columns);
    let input = buffer(backend, &x);
    let mut out = backend.buffer(rows).expect("memory");
    backend.linear(&input, 1, weight, None, &mut out);
    let mut found = vec![0.0; rows];
    backend.read(&out, &mut found);
    let mut row = vec![0.0; columns];
    for (found, bytes) in found.iter().zip(bytes.chunks_exact(bytes.len() / rows)).take(64) {
        exrail_tensor::dequantize(dtype, bytes, &mut row).expect("whole blocks");
        let products = row.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x));
        let (sum, size) = products.fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()));
        assert!((f64::from(*found) - sum).abs() <= bound * size, "{dtype}: {found} is not {sum}");
    }
}

fn format_speed(backend: &CpuBackend, dtype: DType, peak: f64) {
    let (rows, columns) = (2048, 2048);
    let first = weight(backend, dtype, rows, columns);
    let mut speeds = Vec::new();
    let n_matrices = (TOTAL_BYTES / first.1.len()).clamp(1, 64);
    let weights: Vec<CpuWeight> =
        (0..n_matrices).map(|_| weight(backend, dtype, rows, columns).0).collect();
    for (activation, bound) in [(Activation::F32, 1e-5), (Activation::Int8, 2e-2)] {
        let backend = backend.with_activation(activation);
        check(&backend, &first, dtype, bound);
        let x = buffer(&backend, &noise(11, columns));
        let mut out = backend.buffer(rows).expect("memory");
        let seconds =
            best_of(|| weights.iter().for_each(|w| backend.linear(&x, 1, w, None, &mut out)));
        speeds.push((n_matrices * first.1.len()) as f64 / seconds / 1e9);
    }
    let batch = |n_rows: usize| {
        let x = buffer(backend, &noise(11, n_rows * columns));
        let mut out = backend.buffer(n_rows * rows).expect("memory");
        let seconds = best_of(|| {
            weights[..4].iter().for_each(|w| backend.linear(&x, n_rows, w, None, &mut out));
        });
        (4 * n_rows * rows * columns) as f64 / seconds / 1e9
    };
    println!(
        "{:>5} {:>9.1} {:>9.1} {:>6.0}% {:>12.0} {:>12.0}",
        dtype.to_string(),
        speeds[0],
        speeds[1],
        100.0 * speeds[1] / peak,
        batch(8),
        batch(64)
    );
}

struct Layer {
    qkv: [CpuWeight; 3],
    o: CpuWeight,
    gate: CpuWeight,
    up: CpuWeight,
    down: CpuWeight,
}

/// The matrices of one token: 30 layers and the head, and of a 256-token prompt.
fn decode_step(backend: &CpuBackend, dtype: DType) {
    let new = |rows, columns| weight(backend, dtype, rows, columns).0;
    let once =
        |rows, columns| rounded_weight(backend, dtype, (rows, columns), InputRounding::Once).0;
    let layers: Vec<Layer> = (0..30)
        .map(|_| Layer {
            qkv: [new(576, 576), new(192, 576), new(192, 576)],
            o: once(576, 576),
            gate: once(1536, 576),
            up: once(1536, 576),
            down: new(576, 1536),
        })
        .collect();
    let head = weight(backend, DType::Q8_0, 49152, 576).0;
    for n_rows in [1, 2, 4, 8, 256] {
        let x = buffer(backend, &noise(5, n_rows * 576));
        let new = |len: usize| backend.buffer(n_rows * len).expect("memory");
        let (mut q, mut k, mut v) = (new(576), new(192), new(192));
        let (mut hidden, mut y) = (new(1536), new(576));
        let mut logits = backend.buffer(n_rows.min(8) * 49152).expect("memory");
        let mut parts = Parts::default();
        let seconds = best_of(|| {
            parts.begin();
            for layer in &layers {
                let [wq, wk, wv] = &layer.qkv;
                backend.linear_qkv(&x, n_rows, [wq, wk, wv], None, [&mut q, &mut k, &mut v]);
                parts.end_of(0);
                backend.linear_add(&q, n_rows, &layer.o, None, 1.0, &mut y);
                parts.end_of(1);
                let (gate, up) = (&layer.gate, &layer.up);
                backend.linear_gate(&x, n_rows, gate, up, GateActivation::Silu, &mut hidden);
                parts.end_of(2);
                backend.linear_add(&hidden, n_rows, &layer.down, None, 1.0, &mut y);
                parts.end_of(3);
            }
            // A prompt needs the logits of its last row only.
            let logit_rows = if n_rows <= 8 { n_rows } else { 1 };
            backend.linear(&x, logit_rows, &head, None, &mut logits);
            parts.end_of(4);
        });
        println!(
            "SmolLM2-135M {dtype} matrices, {n_rows:>3} rows: {:>7.2} ms, {:>7.0} rows/s; {parts}",
            1e3 * seconds,
            n_rows as f64 / seconds
        );
    }
}

/// The fastest time of each part of a step, in seconds.
struct Parts {
    last: Instant,
    now: [f64; 5],
    best: [f64; 5],
}

impl Default for Parts {
    fn default() -> Parts {
        Parts { last: Instant::now(), now: [0.0; 5], best: [f64::INFINITY; 5] }
    }
}

impl Parts {
    fn begin(&mut self) {
        self.last = Instant::now();
        self.now = [0.0; 5];
    }

    fn end_of(&mut self, part: usize) {
        let now = Instant::now();
        self.now[part] += (now - self.last).as_secs_f64();
        self.last = now;
        if part == 4 {
            for (best, now) in self.best.iter_mut().zip(self.now) {
                *best = best.min(now);
            }
        }
    }
}

impl std::fmt::Display for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [qkv, o, gate, down, head] = self.best.map(|seconds| 1e3 * seconds);
        write!(f, "qkv {qkv:.2} o {o:.2} gate/up {gate:.2} down {down:.2} head {head:.2} ms")
    }
}
