//! The largest output of a head is that of the product, whatever the weights are.

mod support;

use exrail_kernels::{Activation, Backend, InputRounding, Largest, WeightView};
use exrail_kernels_cpu::{CpuBackend, CpuOptions, Isa};
use exrail_tensor::{DType, quantize};
use proptest::prelude::*;
use support::noise;

fn backend(isa: Isa) -> CpuBackend {
    let options = CpuOptions {
        threads: Some(2),
        activation: Activation::Int8,
        isa: Some(isa),
        split_heads_from: 0,
    };
    CpuBackend::new(options).expect("an available instruction set")
}

/// What `linear_largest` and `linear` say of the first `limit` rows.
fn both(
    backend: &CpuBackend,
    bytes: &[u8],
    (rows, columns): (usize, usize),
    x: &[f32],
    limit: usize,
) -> (Largest, Largest) {
    let (dtype, rounding) = (DType::Q8_0, InputRounding::Twice);
    let view = WeightView { name: "head", dtype, rows, columns, bytes, rounding, head: true };
    let weight = backend.weight(&view).expect("a head");
    let mut input = backend.buffer(columns).expect("memory");
    backend.write(&mut input, x);
    let mut out = backend.buffer(rows).expect("memory");
    let found = backend.linear_largest(&input, 1, &weight, limit, &mut out);
    backend.linear(&input, 1, &weight, None, &mut out);
    let mut outputs = vec![0.0; rows];
    backend.read(&out, &mut outputs);
    (backend.found(&found)[0], Largest::of(&outputs[..limit]))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    /// Scales of any sign and size, quants of any byte, states with outliers and zeros.
    #[test]
    fn the_largest_of_any_head_is_that_of_its_product(
        seed in any::<u64>(),
        rows in 1..700_usize,
        n_blocks in 1..6_usize,
        scales in proptest::collection::vec(-8.0..8.0_f32, 1..5),
        outlier in prop_oneof![Just(0.0_f32), Just(1.0), Just(1e4)],
        cut in 0..40_usize,
    ) {
        let columns = 32 * n_blocks;
        let mut bytes: Vec<u8> =
            noise(seed, rows * n_blocks * 34).iter().map(|x| (x * 127.0) as i8 as u8).collect();
        for (i, block) in bytes.chunks_exact_mut(34).enumerate() {
            let scale = half::f16::from_f32(scales[i % scales.len()] * 0.01);
            block[..2].copy_from_slice(&scale.to_le_bytes());
        }
        let mut x = noise(seed ^ 1, columns);
        x[columns / 3] *= outlier;
        let limit = rows.saturating_sub(cut).max(1);
        for isa in Isa::available() {
            let (found, expected) = both(&backend(isa), &bytes, (rows, columns), &x, limit);
            prop_assert_eq!(found, expected, "{}", isa);
        }
    }
}

#[test]
fn of_equal_outputs_the_first_is_taken_and_all_are_looked_at() {
    let (rows, columns) = (1000, 64);
    let mut values = vec![0.1; rows * columns];
    values[..columns].fill(0.0);
    let bytes = quantize(DType::Q8_0, &values).expect("whole blocks");
    for isa in Isa::available() {
        let x = vec![1.0; columns];
        let (found, expected) = both(&backend(isa), &bytes, (rows, columns), &x, rows);
        assert_eq!((found, found.index), (expected, 1), "{isa}");
    }
}

#[test]
fn a_row_that_is_no_number_is_not_overlooked() {
    let (rows, columns) = (300, 64);
    let mut bytes = quantize(DType::Q8_0, &noise(5, rows * columns)).expect("whole blocks");
    for (bad, at) in [(half::f16::NAN, 0), (half::f16::INFINITY, 123), (half::f16::NAN, 299)] {
        let mut bytes = bytes.clone();
        let start = at * 2 * 34;
        bytes[start..start + 2].copy_from_slice(&bad.to_le_bytes());
        for isa in Isa::available() {
            let found = both(&backend(isa), &bytes, (rows, columns), &noise(6, columns), rows).0;
            assert!(found.value.is_nan(), "{isa} {at}: {found:?}");
        }
    }
    // A state that is no number makes every output one.
    bytes.truncate(rows * 2 * 34);
    let mut x = noise(6, columns);
    x[40] = f32::NAN;
    for isa in Isa::available() {
        let found = both(&backend(isa), &bytes, (rows, columns), &x, rows).0;
        assert!(found.value.is_nan(), "{isa}");
    }
}
