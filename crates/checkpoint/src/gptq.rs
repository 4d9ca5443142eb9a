//! GPTQ layers: `w = s (q - z)`, packed down K (`AutoGPTQ` `qlinear_cuda_old.py`, `GPTQModel`).
//!
//! `qweight` (K bits / 32, N), `qzeros` (G, N bits / 32), `scales` (G, N), optional `g_idx` (K).
//! The stream of each column is contiguous, lowest bits first, also across words for 3 bits. The
//! difference is an exact integer and the product rounds once to half, as torch does.
//!
//! A checkpoint may mix widths (`dynamic` in its configuration). `g_idx` has one entry an input
//! feature, so where it is there a layer's width and number of groups follow from its tensors.

use crate::LoadError;
use crate::quantised::{
    Blocks, Dense, GptqConfig, GptqZeros, Layer, RawTensor, RawType, dense, half_bits, stream_bits,
};
use exrail_tensor::{Block, BlockQ4_0, BlockQ4_1, BlockQ8_0, DType};
use half::f16;

/// Weights of a native block.
const BLOCK: usize = 32;

/// (N, K).
pub(crate) fn shape(layer: &Layer<'_>, config: GptqConfig) -> Result<(usize, usize), LoadError> {
    let packed = Packed::new(layer, config)?;
    Ok((packed.n, packed.k))
}

/// The weights.
pub(crate) fn dequantise(layer: &Layer<'_>, config: GptqConfig) -> Result<Dense, LoadError> {
    let packed = Packed::new(layer, config)?;
    let matrix = Matrix::new(layer, &packed)?;
    let (n, k, groups) = (packed.n, packed.k, packed.groups);
    let mut out = dense(layer, n, k)?;
    for row in 0..k {
        let group = packed.group_of(row);
        if group >= groups {
            return Err(layer.refuse("g_idx", format!("groups below {groups}"), group));
        }
        for column in 0..n {
            let q = stream_bits(
                |w| matrix.weight.word(w * n + column),
                row * packed.bits as usize,
                packed.bits,
            );
            let zero = matrix.zero(&packed, group, column);
            let value = matrix.scales.half(group * n + column) * difference(q, zero);
            out.halves[column * k + row] = half_bits(value);
        }
    }
    Ok(out)
}

/// A kind of layer that has a block format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Native {
    /// 4 bits around the middle.
    Int4,
    /// 4 bits with zero points.
    Affine4,
    /// 8 bits around the middle.
    Int8,
}

impl Native {
    /// The format.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Native::Int4 => DType::Q4_0,
            Native::Affine4 => DType::Q4_1,
            Native::Int8 => DType::Q8_0,
        }
    }
}

/// The block format that the layer can be repacked to: 4 or 8 bits, groups that are whole blocks
/// of neighbouring input features, and for 8 bits every zero point in the middle. Reads the zero
/// points and `g_idx`, but no weight.
pub(crate) fn native(layer: &Layer<'_>, config: GptqConfig) -> Result<Option<Native>, LoadError> {
    let packed = Packed::new(layer, config)?;
    let matrix = Matrix::new(layer, &packed)?;
    let (k, groups) = (packed.k, packed.groups);
    if !matches!(packed.bits, 4 | 8) || !k.is_multiple_of(groups) {
        return Ok(None);
    }
    let group_size = k / groups;
    let in_order = (0..k).all(|row| packed.group_of(row) == row / group_size);
    if !group_size.is_multiple_of(BLOCK) || !in_order {
        return Ok(None);
    }
    let middle = 1 << (packed.bits - 1);
    let zeros = |group| (0..packed.n).map(move |column| (group, column));
    let is_symmetric = (0..groups)
        .flat_map(zeros)
        .all(|(group, column)| matrix.zero(&packed, group, column) == middle);
    Ok(match (packed.bits, is_symmetric) {
        (4, true) => Some(Native::Int4),
        (4, false) => Some(Native::Affine4),
        (8, true) => Some(Native::Int8),
        _ => None,
    })
}

/// The layer as blocks of [`native`]'s format; `None` where there is none.
pub(crate) fn blocks(layer: &Layer<'_>, config: GptqConfig) -> Result<Option<Blocks>, LoadError> {
    let Some(native) = native(layer, config)? else { return Ok(None) };
    let dtype = native.dtype();
    let packed = Packed::new(layer, config)?;
    let matrix = Matrix::new(layer, &packed)?;
    let (n, k) = (packed.n, packed.k);
    let (blocks_of_row, block_bytes) = (k / BLOCK, dtype.block_bytes());
    // Far below the address space: the packed words lie in memory.
    let mut bytes = vec![0; n * blocks_of_row * block_bytes];
    for block in 0..blocks_of_row {
        let group = block * BLOCK / (k / packed.groups);
        for column in 0..n {
            let at = (column * blocks_of_row + block) * block_bytes;
            let out = &mut bytes[at..at + block_bytes];
            let scale = matrix.scales.short(group * n + column);
            let mut codes = [0; BLOCK];
            matrix.codes(&packed, block, column, &mut codes);
            match native {
                Native::Int8 => {
                    let qs = codes.map(|code| code.wrapping_sub(128).cast_signed());
                    out.copy_from_slice(&BlockQ8_0 { d: scale, qs }.to_bytes());
                }
                Native::Int4 => {
                    let qs = nibbles(&codes);
                    out.copy_from_slice(&BlockQ4_0 { d: scale, qs }.to_bytes());
                }
                Native::Affine4 => {
                    let zero = difference(matrix.zero(&packed, group, column), 0);
                    let m = half_bits(-f16::from_bits(scale).to_f32() * zero);
                    let qs = nibbles(&codes);
                    out.copy_from_slice(&BlockQ4_1 { d: scale, m, qs }.to_bytes());
                }
            }
        }
    }
    Ok(Some(Blocks { dtype, rows: n, columns: k, bytes }))
}

/// Code j in the low half of byte j, code j + 16 in the high half.
fn nibbles(codes: &[u8; BLOCK]) -> [u8; BLOCK / 2] {
    std::array::from_fn(|j| codes[j] | codes[j + BLOCK / 2] << 4)
}

/// How a layer is packed.
struct Packed<'a> {
    zeros: GptqZeros,
    bits: u32,
    n: usize,
    k: usize,
    groups: usize,
    group_size: usize,
    order: Option<RawTensor<'a>>,
}

impl<'a> Packed<'a> {
    fn new(layer: &Layer<'a>, config: GptqConfig) -> Result<Packed<'a>, LoadError> {
        let weight = layer.require("qweight", RawType::I32, 2)?;
        let (words, n) = (weight.shape[0], weight.shape[1]);
        let order = layer.optional("g_idx", RawType::I32, 1)?;
        let bits = order.and_then(|order| width(words, order.shape[0])).unwrap_or(config.bits);
        let per = if bits == 3 { 3 } else { 1 };
        if words == 0 || n == 0 || !words.is_multiple_of(per) {
            let expected = format!("a positive multiple of {per} rows and columns");
            return Err(layer.refuse("qweight", expected, format!("{:?}", weight.shape)));
        }
        // The words lie in memory, so this product fits.
        let k = words * 32 / bits as usize;
        if let Some(order) = order.filter(|order| order.shape != [k]) {
            return Err(layer.refuse(
                "g_idx",
                format!("shape [{k}]"),
                format!("{:?}", order.shape),
            ));
        }
        let stated = config.group_size.unwrap_or(k);
        let found = layer.require("scales", RawType::F16, 2)?.shape[0];
        let own = order.is_some() && found > 0 && k.is_multiple_of(found);
        let group_size = if own { k / found } else { stated };
        let groups = k.div_ceil(group_size);
        Ok(Packed { zeros: config.zeros, bits, n, k, groups, group_size, order })
    }

    fn group_of(&self, row: usize) -> usize {
        self.order.map_or(row / self.group_size, |order| order.word(row) as usize)
    }
}

/// The width with which `k` codes fill `words` words.
fn width(words: usize, k: usize) -> Option<u32> {
    [2, 3, 4, 8].into_iter().find(|&bits| k > 0 && words.checked_mul(32) == Some(k * bits as usize))
}

/// The checked tensors of a layer.
struct Matrix<'a> {
    weight: RawTensor<'a>,
    zeros: RawTensor<'a>,
    scales: RawTensor<'a>,
}

impl<'a> Matrix<'a> {
    fn new(layer: &Layer<'a>, packed: &Packed<'_>) -> Result<Matrix<'a>, LoadError> {
        let (n, groups, bits) = (packed.n, packed.groups, packed.bits as usize);
        if !(n * bits).is_multiple_of(32) {
            let expected = "output features that fill whole words of zero points";
            return Err(layer.refuse("qzeros", expected, format!("{n} of {bits} bits")));
        }
        Ok(Matrix {
            weight: layer.require("qweight", RawType::I32, 2)?,
            zeros: layer.exact("qzeros", RawType::I32, &[groups, n * bits / 32])?,
            scales: layer.exact("scales", RawType::F16, &[groups, n])?,
        })
    }

    /// The zero point of a group of an output feature.
    fn zero(&self, packed: &Packed<'_>, group: usize, column: usize) -> u32 {
        let bits = packed.bits;
        let base = group * (packed.n * bits as usize / 32);
        let word = |w| self.zeros.word(base + w);
        let stored = stream_bits(word, column * bits as usize, bits);
        match packed.zeros {
            GptqZeros::LessOne => (stored + 1) & ((1 << bits) - 1),
            GptqZeros::Plain => stored,
        }
    }

    /// The codes of a block of input features of one output feature; 4 or 8 bits.
    fn codes(&self, packed: &Packed<'_>, block: usize, column: usize, out: &mut [u8; BLOCK]) {
        let words_of_block = packed.bits as usize;
        let per_word = BLOCK / words_of_block;
        for (word, out) in out.chunks_exact_mut(per_word).enumerate() {
            let word = self.weight.word((block * words_of_block + word) * packed.n + column);
            for (code, shift) in out.iter_mut().zip((0..32).step_by(words_of_block)) {
                *code = (word >> shift & ((1 << packed.bits) - 1)) as u8;
            }
        }
    }
}

/// `q - zero`; both are at most eight bits wide.
pub(crate) fn difference(q: u32, zero: u32) -> f32 {
    let narrow = |x: u32| i16::try_from(x & 255).expect("eight bits");
    f32::from(narrow(q) - narrow(zero))
}
