//! Every instruction set of this machine against the reference, in both activation modes, and all of
//! them against each other bit for bit.

mod support;

use exrail_kernels::{Activation, Backend, InputRounding, WeightView, conformance};
use exrail_kernels_cpu::{CpuBackend, CpuOptions, Isa};
use exrail_tensor::DType;
use proptest::prelude::*;
use support::noise;

fn backend(isa: Isa, threads: usize, activation: Activation) -> CpuBackend {
    CpuBackend::new(CpuOptions {
        threads: Some(threads),
        activation,
        isa: Some(isa),
        // The heads of these tests are small.
        split_heads_from: 0,
    })
    .expect("the instruction set is available")
}

#[test]
fn every_instruction_set_conforms() {
    for isa in Isa::available() {
        for activation in [Activation::F32, Activation::Int8] {
            let backend = backend(isa, 3, activation);
            if let Err(error) = conformance::run(&backend, activation) {
                panic!("{}: {error}", backend.name());
            }
        }
    }
}

fn product(backend: &CpuBackend, view: &WeightView<'_>, x: &[f32]) -> Vec<f32> {
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_row_alone_equals_the_row_in_a_batch_on_every_instruction_set(
        seed: u64,
        format in 0..DType::ALL.len(),
        rows in 1_usize..70,
        n_blocks in 1_usize..4,
        n_rows in 1_usize..20,
        integers: bool,
        once: bool,
    ) {
        let dtype = DType::ALL[format];
        // Float formats also take columns that fill no block.
        let columns = if dtype.block_len() == 1 { n_blocks * 32 - 7 } else { n_blocks * dtype.block_len() };
        let activation = if integers { Activation::Int8 } else { Activation::F32 };
        let bytes = exrail_tensor::quantize(dtype, &noise(seed, rows * columns)).expect("whole blocks");
        let rounding = if once { InputRounding::Once } else { InputRounding::Twice };
        let view = WeightView { name: "w", dtype, rows, columns, bytes: &bytes, rounding, head: false };
        let x = noise(seed ^ 1, n_rows * columns);
        let expected = product(&backend(Isa::Scalar, 1, activation), &view, &x);
        for isa in Isa::available() {
            let backend = backend(isa, 2, activation);
            prop_assert_eq!(bits(&product(&backend, &view, &x)), bits(&expected), "{}", isa);
            for (t, x) in x.chunks_exact(columns).enumerate() {
                let alone = product(&backend, &view, x);
                prop_assert_eq!(bits(&alone), bits(&expected[t * rows..(t + 1) * rows]), "{} row {}", isa, t);
            }
        }
    }
}

#[test]
fn a_nan_activation_reaches_the_output_of_its_row_only() {
    for isa in Isa::available() {
        let bad = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        // Anywhere in a block.
        let places = [0, 15, 16, 40, 63];
        for (bad, place) in bad.into_iter().flat_map(|bad| places.map(|place| (bad, place))) {
            let backend = backend(isa, 1, Activation::Int8);
            let bytes =
                exrail_tensor::quantize(DType::Q4_0, &noise(3, 20 * 64)).expect("whole blocks");
            let rounding = InputRounding::Once;
            let view = WeightView {
                name: "w",
                dtype: DType::Q4_0,
                rows: 20,
                columns: 64,
                bytes: &bytes,
                rounding,
                head: false,
            };
            let mut x = noise(4, 3 * 64);
            x[64 + place] = bad;
            let out = product(&backend, &view, &x);
            assert!(out[..20].iter().all(|v| v.is_finite()));
            assert!(out[20..40].iter().all(|v| v.is_nan()));
            assert!(out[40..].iter().all(|v| v.is_finite()));
        }
    }
}
