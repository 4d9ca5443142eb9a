//! Quantise and dequantise: error bounds, exactness on the grid, hostile values.

use exrail_tensor::{
    Block, BlockIQ4_NL, BlockIQ4_XS, BlockMXFP4, BlockQ2_K, BlockQ3_K, BlockQ4_0, BlockQ4_1,
    BlockQ4_K, BlockQ5_0, BlockQ5_1, BlockQ5_K, BlockQ6_K, BlockQ8_0, DType, E2M1_TABLE,
    FormatError, IQ4_TABLE, dequantize, e8m0_half, pack_scales, pack_signed_scales, quantize,
    unpack_scales, unpack_signed_scales,
};
use proptest::prelude::*;

fn round_trip(dtype: DType, values: &[f32]) -> Vec<f32> {
    let mut back = vec![f32::NAN; values.len()];
    let blocks = quantize(dtype, values).expect("whole blocks");
    dequantize(dtype, &blocks, &mut back).expect("the bytes that quantize made");
    back
}

fn span(values: &[f32]) -> (f32, f32) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (low, high)
}

/// The largest error that rounding one of `block` may cause.
///
/// With one scale `d = max / -n` half a step, or a whole one for a value opposite in sign to the
/// extreme (the grid has one point less there). With a minimum half a step. The scale itself is a
/// half: relative error 2⁻¹¹ over at most `n` steps. K-quants add the rounding of the group scale
/// and minimum: half a unit of each, the scale's times the number of steps.
fn bound(dtype: DType, block: &[f32]) -> f32 {
    let (low, high) = span(block);
    let largest = high.max(-low);
    let range = high - low;
    let half_epsilon = largest * 2.0_f32.powi(-10) + 1e-6;
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => largest * 2.0_f32.powi(-11) + 1e-7,
        DType::BF16 => largest * 2.0_f32.powi(-8),
        DType::Q4_0 => largest / 8.0 + half_epsilon,
        DType::Q5_0 => largest / 16.0 + half_epsilon,
        DType::Q8_0 => largest / 127.0 / 2.0 + half_epsilon,
        DType::Q4_1 => range / 15.0 / 2.0 + half_epsilon,
        DType::Q5_1 => range / 31.0 / 2.0 + half_epsilon,
        // Least squares over 32 weights may spend one weight's error up to the sum of all.
        DType::Q4_K => {
            32.0_f32.sqrt() * (largest * (2.0 / 15.0 / 2.0 + 3.0 / 126.0) + half_epsilon)
        }
        DType::Q5_K => {
            32.0_f32.sqrt() * (largest * (2.0 / 31.0 / 2.0 + 3.0 / 126.0) + half_epsilon)
        }
        DType::Q6_K => 16.0_f32.sqrt() * (largest * (1.0 / 32.0 + 1.0 / 256.0) + half_epsilon),
        DType::Q2_K => 16.0_f32.sqrt() * (largest * (2.0 / 3.0 / 2.0 + 3.0 / 30.0) + half_epsilon),
        DType::Q3_K => 16.0_f32.sqrt() * (largest * (1.0 / 4.0 + 1.0 / 64.0) + half_epsilon),
        // The table ends at -127 and 113, so a value opposite in sign to the extreme may miss it by
        // 14; its widest gap is 24.
        DType::IQ4_NL => largest * 14.0 / 127.0 + half_epsilon,
        DType::IQ4_XS => 32.0_f32.sqrt() * (largest * (14.0 / 127.0 + 1.0 / 64.0) + half_epsilon),
        // The largest value of the grid is 1.5 times the extreme's power of two, and its widest gap
        // half of that power.
        DType::MXFP4 => largest / 4.0,
    }
}

proptest! {
    #[test]
    fn error_is_at_most_what_the_grid_allows(
        values in prop::collection::vec(-4.0_f32..4.0, 512),
        scale in prop::sample::select(vec![0.01_f32, 1.0, 300.0]),
    ) {
        let values: Vec<f32> = values.iter().map(|x| x * scale).collect();
        for dtype in DType::ALL {
            let back = round_trip(dtype, &values);
            let len = dtype.block_len();
            for (block, back) in values.chunks(len).zip(back.chunks(len)) {
                let bound = bound(dtype, block);
                for (x, y) in block.iter().zip(back) {
                    prop_assert!((x - y).abs() <= bound, "{dtype}: {x} became {y}, bound {bound}");
                }
            }
        }
    }

    #[test]
    fn any_bits_survive_parsing_and_packing(bytes in prop::collection::vec(any::<u8>(), 210)) {
        fn check<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(bytes: &[u8]) {
            let block: &[u8; BYTES] = bytes[..BYTES].try_into().expect("enough bytes");
            assert_eq!(&B::from_bytes(block).to_bytes(), block);
        }
        check::<BlockQ4_0, 18, 32>(&bytes);
        check::<BlockQ4_1, 20, 32>(&bytes);
        check::<BlockQ5_0, 22, 32>(&bytes);
        check::<BlockQ5_1, 24, 32>(&bytes);
        check::<BlockQ8_0, 34, 32>(&bytes);
        check::<BlockQ4_K, 144, 256>(&bytes);
        check::<BlockQ5_K, 176, 256>(&bytes);
        check::<BlockQ6_K, 210, 256>(&bytes);
        check::<BlockQ2_K, 84, 256>(&bytes);
        check::<BlockQ3_K, 110, 256>(&bytes);
        check::<BlockIQ4_NL, 18, 32>(&bytes);
        check::<BlockIQ4_XS, 136, 256>(&bytes);
        check::<BlockMXFP4, 17, 32>(&bytes);
    }

    #[test]
    fn group_scales_survive_packing(
        scales in prop::array::uniform8(0_u8..64),
        minima in prop::array::uniform8(0_u8..64),
    ) {
        prop_assert_eq!(unpack_scales(&pack_scales(&scales, &minima)), (scales, minima));
    }

    #[test]
    fn signed_group_scales_survive_packing(scales in prop::array::uniform16(-32_i8..32)) {
        prop_assert_eq!(unpack_signed_scales(&pack_signed_scales(&scales)), scales);
    }

    #[test]
    fn table_values_with_their_extremes_are_exact(
        seed in prop::collection::vec(0_usize..16, 256),
        group_scales in prop::array::uniform8(-32_i16..32),
        mantissa in 1024_u16..2048,
        e in 0_u8..=252,
    ) {
        let d = f32::from(mantissa) / 1024.0;
        let mut indices = seed.clone();
        for group in indices.chunks_mut(32) {
            group[7] = 0;
        }
        let table = |i: usize| f32::from(IQ4_TABLE[indices[i]]);
        let values: Vec<f32> = (0..256).map(|i| d * table(i)).collect();
        prop_assert_eq!(&round_trip(DType::IQ4_NL, &values), &values);
        // Group 0 has the largest scale, so that d is recovered.
        let scale = |g: usize| f32::from(if g == 0 { -32 } else { group_scales[g] });
        let values: Vec<f32> = (0..256).map(|i| d * scale(i / 32) * table(i)).collect();
        prop_assert_eq!(&round_trip(DType::IQ4_XS, &values), &values);
        // The largest magnitude of E2M1 shows the exponent.
        let mut indices = seed;
        for group in indices.chunks_mut(32) {
            group[7] = 15;
        }
        let values: Vec<f32> =
            indices.iter().map(|&q| e8m0_half(e) * f32::from(E2M1_TABLE[q])).collect();
        prop_assert_eq!(&round_trip(DType::MXFP4, &values), &values);
    }

    #[test]
    fn grid_values_with_their_extremes_are_exact(
        seed in prop::collection::vec(any::<u8>(), 256),
        exponent in -8_i32..3,
        mantissa in 1024_u16..2048,
    ) {
        // Eleven bits: exact as a half.
        let d = f32::from(mantissa) * 2.0_f32.powi(exponent - 10);
        for (dtype, low, high) in [
            (DType::Q4_0, -8_i16, 7),
            (DType::Q5_0, -16, 15),
            (DType::Q8_0, -127, 127),
            (DType::Q4_1, 0, 15),
            (DType::Q5_1, 0, 31),
        ] {
            let mut indices: Vec<i16> =
                seed[..32].iter().map(|&b| low + i16::from(b) % (high - low + 1)).collect();
            indices[3] = low;
            indices[30] = high;
            let values: Vec<f32> = indices.iter().map(|&q| d * f32::from(q)).collect();
            prop_assert_eq!(&round_trip(dtype, &values), &values, "{}", dtype);
        }
    }

    #[test]
    fn grid_values_of_k_quants_are_exact(seed in prop::collection::vec(any::<u8>(), 256)) {
        for (dtype, top) in [(DType::Q4_K, 15_u8), (DType::Q5_K, 31)] {
            let (d, dmin) = (0.015625_f32, 0.25_f32);
            let values: Vec<f32> = (0..256)
                .map(|i| {
                    let g = i / 32;
                    // Each group shows both ends of its grid; group 0 has the largest scale and
                    // minimum, so that d and dmin are recovered.
                    let q = match i % 32 { 0 => 0, 1 => top, _ => seed[i] % (top + 1) };
                    let (sc, m) = if g == 0 { (63, 63) } else { (32 + seed[g] % 32, seed[g] % 2) };
                    d * f32::from(sc) * f32::from(q) - dmin * f32::from(m)
                })
                .collect();
            prop_assert_eq!(&round_trip(dtype, &values), &values, "{}", dtype);
        }
        let d = 0.0078125_f32;
        let values: Vec<f32> = (0..256)
            .map(|i| {
                let g = i / 16;
                let q = if i % 16 == 0 { -32 } else { i16::from(seed[i] % 64) - 32 };
                let sc = if g == 0 { -128 } else { i16::from(seed[g].cast_signed()) };
                d * f32::from(sc) * f32::from(q)
            })
            .collect();
        prop_assert_eq!(&round_trip(DType::Q6_K, &values), &values);
    }

    #[test]
    fn grid_values_of_few_bits_are_exact(seed in prop::collection::vec(any::<u8>(), 256)) {
        let (d, dmin) = (0.015625_f32, 0.25_f32);
        let values: Vec<f32> = (0..256)
            .map(|i| {
                let g = i / 16;
                let q = match i % 16 { 0 => 0, 1 => 3, _ => seed[i] % 4 };
                let (sc, m) = if g == 0 { (15, 15_u8) } else { (8 + seed[g] % 8, 0) };
                d * f32::from(sc) * f32::from(q) - dmin * f32::from(m)
            })
            .collect();
        prop_assert_eq!(&round_trip(DType::Q2_K, &values), &values);
        let values: Vec<f32> = (0..256)
            .map(|i| {
                let g = i / 16;
                let q = if i % 16 == 0 { -4 } else { i16::from(seed[i] % 8) - 4 };
                let sc = if g == 0 { -32 } else { i16::from(seed[g] % 64) - 32 };
                d * f32::from(sc) * f32::from(q)
            })
            .collect();
        prop_assert_eq!(&round_trip(DType::Q3_K, &values), &values);
    }

    #[test]
    fn no_value_makes_quantising_panic_or_scales_infinite(
        bits in prop::collection::vec(any::<u32>(), 256),
    ) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for dtype in DType::ALL {
            let back = round_trip(dtype, &values);
            if dtype.is_quantised() {
                prop_assert!(back.iter().all(|x| x.is_finite()), "{dtype}");
            }
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_named() {
    assert_eq!(
        quantize(DType::Q4_0, &[0.0; 33]).unwrap_err().to_string(),
        "Q4_0: expected a multiple of 32 values, found 33"
    );
    let error = dequantize(DType::Q6_K, &[0; 209], &mut [0.0; 256]).unwrap_err();
    let (dtype, n_values, expected, found) = (DType::Q6_K, 256, 210, 209);
    assert_eq!(error, FormatError::WrongByteCount { dtype, n_values, expected, found });
}

#[test]
fn all_zero_blocks_stay_zero() {
    for dtype in DType::ALL {
        assert_eq!(round_trip(dtype, &[0.0; 256]), [0.0; 256], "{dtype}");
    }
}
