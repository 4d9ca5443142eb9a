//! What holds for every matrix: packing loses nothing, and errors stay in their bounds.

use std::collections::HashMap;

use exrail_checkpoint::{
    GptqConfig, GptqZeros, QuantMethod, RawTensor, RawType, dequantise_layer, native_blocks,
};
use exrail_quantize::{Codes, GptqTensors, Hessian, calibrate};
use exrail_tensor::{IntGrid, dequantize};
use half::f16;
use proptest::prelude::*;

/// A matrix of 8 to 24 rows and one to three groups, with its columns and group.
fn matrices() -> impl Strategy<Value = (Vec<f32>, usize, usize)> {
    let group = prop::sample::select(vec![32_usize, 64, 128]);
    (1_usize..4, 1_usize..4, group, -12_i32..6).prop_flat_map(|(eights, groups, group, scale)| {
        let columns = groups * group;
        let weight = prop_oneof![4 => -1.0_f32..1.0, 1 => Just(0.0), 1 => -8.0_f32..8.0];
        let size = 2.0_f32.powi(scale);
        let values =
            prop::collection::vec(weight.prop_map(move |w| w * size), 8 * eights * columns);
        (values, Just(columns), Just(group))
    })
}

fn grids() -> impl Strategy<Value = IntGrid> {
    prop::sample::select(vec![IntGrid::Int4, IntGrid::Int8])
}

type Stored = HashMap<&'static str, (RawType, Vec<usize>, Vec<u8>)>;

fn stored(codes: &Codes) -> Stored {
    let per_word = 32 / codes.grid.bits() as usize;
    let (n, k, groups) = (codes.rows, codes.columns, codes.n_groups());
    let packed = GptqTensors::pack(codes);
    let words = |words: Vec<i32>| words.into_iter().flat_map(i32::to_le_bytes).collect();
    let scales = packed.scales.into_iter().flat_map(u16::to_le_bytes).collect();
    HashMap::from([
        ("w.qweight", (RawType::I32, vec![k / per_word, n], words(packed.qweight))),
        ("w.qzeros", (RawType::I32, vec![groups, n / per_word], words(packed.qzeros))),
        ("w.scales", (RawType::F16, vec![groups, n], scales)),
        ("w.g_idx", (RawType::I32, vec![k], words(packed.g_idx))),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn packing_loses_nothing((values, columns, group) in matrices(), grid in grids()) {
        let codes = Codes::nearest(grid, &values, columns, group);
        let tensors = stored(&codes);
        let look = |name: &str| {
            let (dtype, shape, bytes) = tensors.get(name)?;
            Some(RawTensor { dtype: *dtype, shape, bytes })
        };
        let (bits, group_size, zeros) = (grid.bits(), Some(group), GptqZeros::LessOne);
        let method = QuantMethod::Gptq(GptqConfig { bits, group_size, zeros });
        let blocks = native_blocks(&method, "w", &look).unwrap().unwrap();
        prop_assert_eq!(blocks.dtype, grid.dtype());
        prop_assert_eq!(&blocks.bytes, &codes.blocks());
        // As blocks and as codes the weights are the same numbers; a GPTQ dequantiser rounds them.
        let mut weights = vec![0.0; values.len()];
        dequantize(blocks.dtype, &blocks.bytes, &mut weights).unwrap();
        let rows: Vec<f32> = (0..codes.rows).flat_map(|row| codes.row(row)).collect();
        prop_assert_eq!(&weights, &rows);
        let dense = dequantise_layer(&method, "w", &look).unwrap();
        let halves: Vec<f16> = dense.halves.into_iter().map(f16::from_bits).collect();
        let rounded: Vec<f16> = rows.into_iter().map(f16::from_f32).collect();
        prop_assert_eq!(halves, rounded);
    }

    #[test]
    fn int8_errs_by_half_a_step((values, columns, group) in matrices()) {
        let codes = Codes::nearest(IntGrid::Int8, &values, columns, group);
        let rows = (0..codes.rows).flat_map(|row| codes.row(row));
        for (i, (found, value)) in rows.zip(&values).enumerate() {
            let step = f16::from_bits(codes.scales[i / group]).to_f32();
            // The scale is rounded to half: by 2^-11 of itself, or 2^-25 where it is subnormal.
            let bound = step / 2.0 + 127.0 * (step / 2048.0).max(2.0_f32.powi(-25));
            prop_assert!((found - value).abs() <= bound * 1.001, "{value} {found} step {step}");
        }
    }

    #[test]
    fn a_column_without_inputs_is_rounded_by_itself(
        (values, columns, group) in matrices(),
        grid in grids(),
        dead in 0_usize..32,
        seed in any::<u32>(),
    ) {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 - 0.5
        };
        let mut inputs: Vec<f32> = (0..50 * columns).map(|_| next()).collect();
        inputs.iter_mut().skip(dead).step_by(columns).for_each(|x| *x = 0.0);
        let mut hessian = Hessian::new(columns);
        hessian.add(&inputs);
        // Fewer inputs than columns: only damping makes it solvable.
        let found = calibrate("w", grid, &values, &hessian, group).unwrap();
        prop_assert_eq!(&found, &calibrate("w", grid, &values, &hessian, group).unwrap());
        for row in 0..found.codes.rows {
            let scale = found.codes.scales[row * (columns / group) + dead / group];
            let code = grid.code(values[row * columns + dead], f16::from_bits(scale).to_f32());
            prop_assert_eq!(found.codes.codes[row * columns + dead], code);
        }
    }
}

#[test]
fn inputs_that_are_not_finite_are_refused_by_the_name_of_the_matrix() {
    let mut hessian = Hessian::new(32);
    hessian.add(&[f32::NAN; 32]);
    let error = calibrate("model.w", IntGrid::Int4, &[1.0; 256], &hessian, 32).unwrap_err();
    let expected = "tensor `model.w`: its calibration inputs are not finite";
    assert_eq!(error.to_string(), expected);
}
