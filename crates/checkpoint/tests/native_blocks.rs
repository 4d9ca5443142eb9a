//! GPTQ layers repacked to native blocks, against the dequantiser that the goldens test.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;

use exrail_checkpoint::{
    GptqConfig, GptqZeros, QuantMethod, RawTensor, RawType, dequantise_layer, native_blocks,
    native_type,
};
use exrail_tensor::{DType, dequantize};
use half::f16;

const K: usize = 128;
const N: usize = 16;

struct Layer {
    config: GptqConfig,
    tensors: HashMap<&'static str, (RawType, Vec<usize>, Vec<u8>)>,
}

impl Layer {
    /// Random codes and scales; zero points in the middle or random.
    fn new(bits: u32, group: usize, zeros: GptqZeros, is_symmetric: bool) -> Layer {
        let mut state = 0x9e37_79b9_u32 ^ bits ^ u32::try_from(group).unwrap();
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        let groups = K / group;
        let width = bits as usize;
        let words = |n: usize, mut next: Box<dyn FnMut() -> u32 + '_>| -> Vec<u8> {
            (0..n).flat_map(|_| next().to_le_bytes()).collect()
        };
        let qweight = words(K * width / 32 * N, Box::new(&mut next));
        let middle = 1_u32 << (bits - 1);
        let stored = if zeros == GptqZeros::LessOne { middle - 1 } else { middle };
        let repeated = (0..32).step_by(width).fold(0, |word, shift| word | stored << shift);
        let qzeros = if is_symmetric {
            words(groups * N * width / 32, Box::new(|| repeated))
        } else {
            words(groups * N * width / 32, Box::new(&mut next))
        };
        let scale = |x: u32| f16::from_f32((x % 4000) as f32 * 1e-5 - 0.02).to_le_bytes();
        let scales = (0..groups * N).flat_map(|_| scale(next())).collect();
        let mut tensors = HashMap::new();
        tensors.insert("qweight", (RawType::I32, vec![K * width / 32, N], qweight));
        tensors.insert("qzeros", (RawType::I32, vec![groups, N * width / 32], qzeros));
        tensors.insert("scales", (RawType::F16, vec![groups, N], scales));
        Layer { config: GptqConfig { bits, group_size: Some(group), zeros }, tensors }
    }

    fn order(mut self, group_of: impl Fn(usize) -> u32) -> Layer {
        let bytes = (0..K).flat_map(|k| group_of(k).to_le_bytes()).collect();
        self.tensors.insert("g_idx", (RawType::I32, vec![K], bytes));
        self
    }

    fn look(&self, name: &str) -> Option<RawTensor<'_>> {
        let (dtype, shape, bytes) = self.tensors.get(name.strip_prefix("layer.")?)?;
        Some(RawTensor { dtype: *dtype, shape, bytes })
    }

    fn native(&self) -> Option<(DType, Vec<f32>)> {
        let (method, look) = (QuantMethod::Gptq(self.config), |name: &str| self.look(name));
        let dtype = native_type(&method, "layer", &look).unwrap();
        let blocks = native_blocks(&method, "layer", &look).unwrap();
        assert_eq!(dtype, blocks.as_ref().map(|blocks| blocks.dtype));
        let blocks = blocks?;
        assert_eq!((blocks.rows, blocks.columns), (N, K));
        let mut values = vec![0.0; N * K];
        dequantize(blocks.dtype, &blocks.bytes, &mut values).unwrap();
        Some((blocks.dtype, values))
    }

    fn halves(&self) -> Vec<f16> {
        let (method, look) = (QuantMethod::Gptq(self.config), |name: &str| self.look(name));
        let dense = dequantise_layer(&method, "layer", &look).unwrap();
        dense.halves.into_iter().map(f16::from_bits).collect()
    }
}

#[test]
fn symmetric_layers_are_exact() {
    for (bits, dtype) in [(4, DType::Q4_0), (8, DType::Q8_0)] {
        for group in [32, 64, 128] {
            for zeros in [GptqZeros::LessOne, GptqZeros::Plain] {
                let layer = Layer::new(bits, group, zeros, true);
                let (found, values) = layer.native().unwrap();
                assert_eq!(found, dtype);
                let rounded: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
                // Compared as numbers, because 0 · -scale is -0 in one of them.
                assert_eq!(rounded, layer.halves(), "{bits} bits, groups of {group}, {zeros:?}");
            }
        }
    }
}

#[test]
fn zero_points_become_a_minimum_that_is_rounded_once() {
    for group in [32, 128] {
        let layer = Layer::new(4, group, GptqZeros::LessOne, false);
        let (dtype, values) = layer.native().unwrap();
        assert_eq!(dtype, DType::Q4_1);
        for (value, half) in values.into_iter().zip(layer.halves()) {
            // Scales are below 0.021 and zero points below 16: one rounding of the minimum and one
            // of the half, each at most 2^-12 of a number below 0.34 (in [1/4, 1/2)).
            assert!((value - half.to_f32()).abs() <= 2.0 * 0.5 / 4096.0 / 2.0, "{value} {half}");
        }
    }
}

#[test]
fn what_has_no_block_format_is_dequantised() {
    let plain = |bits, group| Layer::new(bits, group, GptqZeros::LessOne, true);
    assert!(Layer::new(8, 32, GptqZeros::LessOne, false).native().is_none(), "8-bit zero points");
    assert!(plain(2, 32).native().is_none(), "2 bits");
    assert!(plain(4, 16).native().is_none(), "half a block");
    let counting = plain(4, 32).order(|k| u32::try_from(k / 32).unwrap());
    assert_eq!(counting.native().unwrap().0, DType::Q4_0);
    let shuffled = plain(4, 32).order(|k| u32::try_from(k % 4).unwrap());
    assert!(shuffled.native().is_none(), "act-order");
}

#[test]
fn a_layer_may_have_its_own_width_and_groups() {
    let mut layer =
        Layer::new(8, 32, GptqZeros::LessOne, true).order(|k| u32::try_from(k / 32).unwrap());
    let (dtype, values) = layer.native().unwrap();
    let halves = layer.halves();
    // What the checkpoint says of its other layers.
    layer.config = GptqConfig { bits: 4, group_size: Some(128), ..layer.config };
    assert_eq!(layer.native().unwrap(), (dtype, values));
    assert_eq!(layer.halves(), halves);
}
