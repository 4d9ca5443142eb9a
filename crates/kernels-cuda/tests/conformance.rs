//! Every operation against the reference, in both activation modes. A missing device is a failure.

use exrail_kernels::{
    Activation, AttentionShape, AttentionSpan, Backend, GateActivation, InputRounding, KvDtype,
    KvShape, KvSlot, NormKind, Normed, PAGE_TOKENS, PageId, WeightView, conformance,
};
use exrail_kernels_cuda::{CudaBackend, CudaBuffer, CudaOptions, CudaWeight};
use exrail_tensor::DType;

fn backend(activation: Activation, batch_invariant: bool) -> CudaBackend {
    let options = CudaOptions { activation, batch_invariant, ..CudaOptions::new(0) };
    CudaBackend::open(options).expect("a device")
}

/// Every way in which rows meet weights.
fn backends() -> [CudaBackend; 3] {
    [
        backend(Activation::F32, false),
        backend(Activation::Int8, false),
        backend(Activation::Int8, true),
    ]
}

#[test]
fn every_operation_conforms() {
    for backend in backends() {
        if let Err(error) = conformance::run(&backend, backend.options().activation) {
            panic!("{}: {error}", backend.name());
        }
    }
}

/// Seeded values in -1..1.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn product(backend: &CudaBackend, view: &WeightView<'_>, x: &[f32]) -> Vec<f32> {
    let n_rows = x.len() / view.columns;
    let weight = backend.weight(view).expect("weight");
    let mut input = backend.buffer(x.len()).expect("memory");
    backend.write(&mut input, x);
    let mut out = backend.buffer(n_rows * view.rows).expect("memory");
    backend.linear(&input, n_rows, &weight, None, &mut out);
    let mut values = vec![0.0; n_rows * view.rows];
    backend.read(&out, &mut values);
    values
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_row_alone_equals_the_row_in_a_batch() {
    for activation in [Activation::F32, Activation::Int8] {
        let backend = backend(activation, true);
        for (i, dtype) in DType::ALL.into_iter().enumerate() {
            for rounding in [InputRounding::Once, InputRounding::Twice] {
                let (rows, columns, n_rows) = (37, 512, 11);
                let values = noise(i as u64 + 5, rows * columns);
                let bytes = exrail_tensor::quantize(dtype, &values).expect("whole blocks");
                let bytes = &bytes;
                let view =
                    WeightView { name: "w", dtype, rows, columns, bytes, rounding, head: false };
                let x = noise(i as u64 + 77, n_rows * columns);
                let together = product(&backend, &view, &x);
                for (t, x) in x.chunks_exact(columns).enumerate() {
                    let alone = product(&backend, &view, x);
                    let row = &together[t * rows..(t + 1) * rows];
                    assert_eq!(bits(&alone), bits(row), "{dtype} row {t}");
                }
            }
        }
    }
}

/// Groups of four blocks share a scale, as in a checkpoint with groups of 128, and are kept so; where
/// one block of one group has its own, it counts.
#[test]
fn shared_scales_change_no_value() {
    let (dtype, rows, columns) = (DType::Q4_0, 64, 512);
    let values = noise(9, rows * columns);
    let mut bytes = exrail_tensor::quantize(dtype, &values).expect("whole blocks");
    for group in bytes.chunks_exact_mut(4 * dtype.block_bytes()) {
        let scale = [group[0], group[1]];
        group.chunks_exact_mut(dtype.block_bytes()).for_each(|b| b[..2].copy_from_slice(&scale));
    }
    let mut with_one = bytes.clone();
    let block = 7 * 4 * dtype.block_bytes() + 2 * dtype.block_bytes();
    with_one[block + 1] = 0x30; // 0.125 and more
    let x = noise(10, columns);
    for bytes in [&bytes, &with_one] {
        let (name, rounding, head) = ("w", InputRounding::Twice, false);
        let view = WeightView { name, dtype, rows, columns, bytes, rounding, head };
        let mut weights = vec![0.0; rows * columns];
        exrail_tensor::dequantize(dtype, bytes, &mut weights).expect("whole blocks");
        for backend in backends() {
            for (n, found) in product(&backend, &view, &x).into_iter().enumerate() {
                let row = &weights[n * columns..][..columns];
                let expected: f32 = row.iter().zip(&x).map(|(w, x)| w * x).sum();
                assert!((found - expected).abs() < 2e-3, "{n}: {found}, expected {expected}");
            }
        }
    }
}

/// Every kind of product of rows of `x`, one after the other in one list of values a row.
struct Products<'a> {
    backend: &'a CudaBackend,
    weights: [CudaWeight; 3], // the first two of one shape
    norm: CudaBuffer,
    bias: CudaBuffer,
    columns: usize,
}

impl<'a> Products<'a> {
    fn new(backend: &'a CudaBackend, dtype: DType, rows: [usize; 2], columns: usize) -> Self {
        let weight = |seed: u64, rows: usize| {
            let values = noise(seed, rows * columns);
            let bytes = &exrail_tensor::quantize(dtype, &values).expect("whole blocks");
            let (name, rounding, head) = ("w", InputRounding::Twice, false);
            let view = WeightView { name, dtype, rows, columns, bytes, rounding, head };
            backend.weight(&view).expect("memory")
        };
        let weights = [weight(21, rows[0]), weight(22, rows[0]), weight(23, rows[1])];
        let filled = |seed, len| buffer(backend, &noise(seed, len));
        Products { backend, weights, norm: filled(24, columns), bias: filled(25, rows[0]), columns }
    }

    /// What of which width: the outputs of all rows.
    fn of(&self, x: &[f32]) -> Vec<(&'static str, usize, Vec<f32>)> {
        let Products { backend, weights: [a, b, c], norm, bias, columns } = self;
        let n_rows = x.len() / columns;
        let (wide, narrow) = (backend.weight_shape(a).0, backend.weight_shape(c).0);
        let x = buffer(backend, x);
        // Whatever is not overwritten shows.
        let poisoned = |len: usize| buffer(backend, &vec![f32::NAN; len]);
        let mut work = poisoned(n_rows * columns);
        let [mut plain, mut q, mut k, mut silu, mut gelu] =
            [(); 5].map(|()| poisoned(n_rows * wide));
        let mut v = poisoned(n_rows * narrow);
        backend.linear(&x, n_rows, a, Some(bias), &mut plain);
        let (kind, eps) = (NormKind::Rms, 1e-5);
        let input = Normed { x: &x, n_rows, kind, weight: norm, eps, work: &mut work };
        backend.norm_qkv(input, [a, b, c], None, [&mut q, &mut k, &mut v]);
        backend.linear_add(&x, n_rows, b, None, 0.5, &mut q);
        let input = Normed { x: &x, n_rows, kind, weight: norm, eps, work: &mut work };
        backend.norm_gate(input, a, b, GateActivation::Silu, &mut silu);
        backend.linear_gate(&x, n_rows, a, b, GateActivation::GeluTanh, &mut gelu);
        let read = |name, from: &CudaBuffer, width: usize| {
            let mut values = vec![0.0; n_rows * width];
            backend.read(from, &mut values);
            (name, width, values)
        };
        vec![
            read("with a bias", &plain, wide),
            read("queries and an addition", &q, wide),
            read("keys", &k, wide),
            read("values", &v, narrow),
            read("gate of silu", &silu, wide),
            read("gate of gelu", &gelu, wide),
        ]
    }
}

fn buffer(backend: &CudaBackend, values: &[f32]) -> CudaBuffer {
    let mut buffer = backend.buffer(values.len()).expect("memory");
    backend.write(&mut buffer, values);
    buffer
}

/// Products of more than 64 rows, and of more than 255, have kernels of their own, which conformance with its
/// few rows does not see: the same rows one tile of 64 after the other must give about the same. What is left
/// has two rows and more, because one alone is rounded in another way.
#[test]
fn many_rows_equal_the_same_rows_in_small_batches() {
    let backend = backend(Activation::Int8, false);
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantised()) {
        for (rows, columns) in [([300, 34], 512), ([514, 37], 256), ([33, 2], 768)] {
            let products = Products::new(&backend, dtype, rows, columns);
            for n_rows in [66, 130, 256, 402] {
                let x = noise(n_rows as u64, n_rows * columns);
                let together = products.of(&x);
                for (i, x) in x.chunks(64 * columns).enumerate() {
                    for ((name, width, all), (_, _, apart)) in together.iter().zip(products.of(x)) {
                        let case = format!("{dtype} {rows:?}x{columns} T={n_rows} {name}");
                        let all = &all[64 * i * width..][..apart.len()];
                        for (at, (a, b)) in all.iter().zip(&apart).enumerate() {
                            let (row, output) = (64 * i + at / width, at % width);
                            let is_close = (a - b).abs() <= 1e-3 * (1.0 + b.abs());
                            assert!(is_close, "{case}: row {row} output {output}: {a}, not {b}");
                        }
                    }
                }
            }
        }
    }
}

/// What rows at the ends of two sequences see of `(positions, window)`, keys and values in halves.
fn attended(
    backend: &CudaBackend,
    [n_heads, n_kv_heads, head_dim]: [usize; 3],
    n_positions: [usize; 2],
    n_rows: usize,
    window: Option<usize>,
) -> Vec<f32> {
    let n_pages = n_positions.map(|n| n.div_ceil(PAGE_TOKENS));
    let dtype = KvDtype::F16;
    let kv_shape = KvShape { n_layers: 2, n_kv_heads, head_dim, n_pages: 12, dtype };
    let mut pool = backend.kv_pool(kv_shape).expect("memory");
    // Pages in no order.
    let pages: Vec<PageId> = (0..12).map(|i| PageId(i * 5 % 12)).collect();
    let tables = [&pages[..n_pages[0]], &pages[n_pages[0]..n_pages[0] + n_pages[1]]];
    for (i, (n, table)) in n_positions.into_iter().zip(tables).enumerate() {
        let slots: Vec<KvSlot> = (0..n)
            .map(|p| KvSlot { page: table[p / PAGE_TOKENS], offset: (p % PAGE_TOKENS) as u32 })
            .collect();
        let [k, v] = [1, 2]
            .map(|seed| buffer(backend, &noise(10 * i as u64 + seed, n * n_kv_heads * head_dim)));
        backend.kv_write(&mut pool, 1, &k, &v, &slots);
    }
    let spans = [0, 1].map(|i| AttentionSpan {
        first_row: i * n_rows,
        n_rows,
        first_position: n_positions[i] - n_rows,
        pages: tables[i],
    });
    let scale = 3.0 / (head_dim as f32).sqrt();
    let shape = AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap: None, window };
    let len = 2 * n_rows * n_heads * head_dim;
    let q = buffer(backend, &noise(77, len));
    let mut out = buffer(backend, &vec![f32::NAN; len]);
    backend.attention(&q, &pool, 1, shape, &spans, &mut out);
    let mut values = vec![0.0; len];
    backend.read(&out, &mut values);
    values
}

/// Contexts of many runs, which conformance is too small for: on tensor cores as in the exact mode, within
/// what rounding queries and weights of positions to halves may cost, whatever is in the batch.
#[test]
fn long_contexts_are_attended_to_alike_by_every_kernel() {
    let exact = backend(Activation::F32, false);
    for batch_invariant in [false, true] {
        let rounded = backend(Activation::Int8, batch_invariant);
        for heads in [[4, 4, 128], [8, 2, 64], [12, 1, 32], [6, 2, 96], [16, 1, 128]] {
            for n_positions in [[1500, 70], [513, 512], [64, 1], [1025, 300]] {
                for (n_rows, window) in [(1, None), (1, Some(200)), (5, None), (7, Some(65))] {
                    if n_positions[1] < n_rows {
                        continue;
                    }
                    let expected = attended(&exact, heads, n_positions, n_rows, window);
                    let found = attended(&rounded, heads, n_positions, n_rows, window);
                    let case = format!("{heads:?} {n_positions:?} T={n_rows} window {window:?}");
                    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                        assert!((a - b).abs() < 4e-3, "{case} element {i}: {a}, not {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_nan_activation_reaches_the_output_of_its_row_only() {
    for batch_invariant in [false, true] {
        a_nan_stays_in_its_row(&backend(Activation::Int8, batch_invariant));
    }
}

fn a_nan_stays_in_its_row(backend: &CudaBackend) {
    let bytes = exrail_tensor::quantize(DType::Q4_0, &noise(3, 20 * 64)).expect("whole blocks");
    let (rows, columns, rounding) = (20, 64, InputRounding::Once);
    let (name, dtype, bytes) = ("w", DType::Q4_0, &bytes[..]);
    let view = WeightView { name, dtype, rows, columns, bytes, rounding, head: false };
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 15, 16, 40, 63] {
            // Of each kind of product, and with fewer rows than its tiles have.
            for n_rows in [3, 20, 40, 100, 300] {
                let mut x = noise(4, n_rows * 64);
                x[64 + place] = bad;
                let out = product(backend, &view, &x);
                assert!(out[..20].iter().all(|v| v.is_finite()));
                assert!(out[20..40].iter().all(|v| v.is_nan()));
                assert!(out[40..].iter().all(|v| v.is_finite()));
            }
        }
    }
}
