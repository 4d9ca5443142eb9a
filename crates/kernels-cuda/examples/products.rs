//! How fast products stream their weights: one row of activations against matrices of a decoder's
//! shapes, taking turns over more data than the last-level cache holds, next to the copy bandwidth
//! of the same run. Prints a table for `bench/record/`.
//!
//! `cargo run --release -p exrail-kernels-cuda --features cuda --example products [ORDINAL]`

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::time::Instant;

use exrail_kernels::{Backend, InputRounding, WeightView};
use exrail_kernels_cuda::{CopyProbe, CudaBackend, CudaOptions};
use exrail_tensor::DType;

/// Output features and columns: q, k of grouped heads, gate, down and the head of a 7B decoder, and
/// the widest product of a 135M one.
const SHAPES: [(usize, usize); 6] =
    [(4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008), (32000, 4096), (1536, 576)];
/// Formats whose kernels are compared.
const FORMATS: [DType; 6] =
    [DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::Q4_K, DType::Q6_K, DType::F16];
/// Bytes of weights that take turns: many times any last-level cache.
const TURNS_BYTES: usize = 1 << 30;
/// Launches between two measurements of the time, at least. They are the same each time, and so they
/// are one graph, as in decode.
const LAUNCHES: usize = 400;
/// Passes before: the second makes the graph.
const WARM_UPS: usize = 2;
/// Measurements, of which the median counts.
const SAMPLES: usize = 7;

fn main() {
    let ordinal = std::env::args().nth(1).map_or(0, |n| n.parse().expect("a device's number"));
    let backend = CudaBackend::open(CudaOptions::new(ordinal)).expect("a device");
    let mut probe = CopyProbe::new(&backend, TURNS_BYTES).expect("memory");
    let copy = median((0..SAMPLES).map(|_| probe.pass()).collect());
    println!("{}; copies move {:.0} GB/s\n", backend.name(), copy / 1e9);
    println!("| format | N | K | rows | µs | GB/s | of copies |");
    println!("|---|---|---|---|---|---|---|");
    for dtype in FORMATS {
        for (rows, columns) in SHAPES {
            if !columns.is_multiple_of(dtype.block_len()) {
                continue;
            }
            for n_rows in [1, 8, 512] {
                let (us, bytes_per_s) = measure(&backend, dtype, (rows, columns), n_rows);
                println!(
                    "| {dtype} | {rows} | {columns} | {n_rows} | {us:.1} | {:.0} | {:.0} % |",
                    bytes_per_s / 1e9,
                    100.0 * bytes_per_s / copy
                );
            }
        }
    }
}

/// Microseconds of a product with the rounding of its activations, and weight bytes per second.
fn measure(
    backend: &CudaBackend,
    dtype: DType,
    (rows, columns): (usize, usize),
    n_rows: usize,
) -> (f64, f64) {
    let len = rows * dtype.row_bytes(columns).expect("whole blocks");
    // Any bytes are read as fast as any others; but equal scales would be kept once for four blocks.
    let varied: Vec<u8> = (0..len).map(|i| (i * i % 251) as u8 & 0x3f).collect();
    let (name, bytes, head, rounding) = ("w", &varied[..], false, InputRounding::Twice);
    let view = WeightView { name, dtype, rows, columns, bytes, rounding, head };
    let n_turns = (TURNS_BYTES / len).clamp(2, 2000);
    let weights: Vec<_> =
        (0..n_turns).map(|_| backend.weight(&view).expect("the device has memory")).collect();
    let mut x = backend.buffer(n_rows * columns).expect("memory");
    backend.write(&mut x, &vec![0.5; n_rows * columns]);
    let mut out = backend.buffer(n_rows * rows).expect("memory");
    let mut one = [0.0];
    let n_launches = LAUNCHES.next_multiple_of(n_turns);
    let samples = (0..WARM_UPS + SAMPLES).map(|_| {
        backend.read(&out, &mut one);
        let since = Instant::now();
        for weight in weights.iter().cycle().take(n_launches) {
            backend.linear(&x, n_rows, weight, None, &mut out);
        }
        backend.read(&out, &mut one);
        since.elapsed().as_secs_f64() / n_launches as f64
    });
    let seconds = median(samples.skip(WARM_UPS).collect());
    (1e6 * seconds, len as f64 / seconds)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
