//! [`GptqTensors`]: the tensors of a layer in the layout of GPTQ checkpoints, version 1.
//!
//! Codes are stored unsigned, as q = code + 2^(bits − 1), with that number as every zero point;
//! version 1 stores zero points less one. `g_idx` counts up, so groups are runs of columns.

use crate::Codes;

/// What a GPTQ checkpoint stores for one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GptqTensors {
    /// (K · bits / 32, N): the codes of a column of outputs, lowest bits first.
    pub qweight: Vec<i32>,
    /// (G, N · bits / 32).
    pub qzeros: Vec<i32>,
    /// Half-precision bits, (G, N).
    pub scales: Vec<u16>,
    /// The group of every input feature, (K).
    pub g_idx: Vec<i32>,
}

impl GptqTensors {
    /// Whether a matrix `(rows, columns)` can be stored: whole words both ways.
    #[must_use]
    pub fn fits(bits: u32, rows: usize, columns: usize) -> bool {
        let per_word = 32 / bits as usize;
        rows.is_multiple_of(per_word) && columns.is_multiple_of(per_word)
    }

    /// Packs a matrix.
    ///
    /// # Panics
    /// When it does not fit, see [`GptqTensors::fits`].
    #[must_use]
    pub fn pack(codes: &Codes) -> GptqTensors {
        let bits = codes.grid.bits();
        let (n, k, n_groups) = (codes.rows, codes.columns, codes.n_groups());
        assert!(GptqTensors::fits(bits, n, k), "{n} x {k} of {bits} bits are not whole words");
        let per_word = 32 / bits as usize;
        let zero = 1_i32 << (bits - 1);
        let mut qweight = vec![0_u32; k / per_word * n];
        for (row, codes) in codes.codes.chunks_exact(k).enumerate() {
            for (word, codes) in codes.chunks_exact(per_word).enumerate() {
                qweight[word * n + row] = join(codes.iter().map(|&c| i32::from(c) + zero), bits);
            }
        }
        let zeros = join(std::iter::repeat_n(zero - 1, per_word), bits);
        let mut scales = vec![0; n_groups * n];
        for (row, stored) in codes.scales.chunks_exact(n_groups).enumerate() {
            for (group, &scale) in stored.iter().enumerate() {
                scales[group * n + row] = scale;
            }
        }
        let group_of = |column: usize| i32::try_from(column / codes.group);
        GptqTensors {
            qweight: qweight.into_iter().map(u32::cast_signed).collect(),
            qzeros: vec![zeros.cast_signed(); n_groups * n / per_word],
            scales,
            g_idx: (0..k).map(|column| group_of(column).expect("fewer than 2^31")).collect(),
        }
    }
}

/// Numbers of `bits` bits side by side in a word, first in the lowest bits.
fn join(numbers: impl Iterator<Item = i32>, bits: u32) -> u32 {
    let shifted = numbers.zip((0..32).step_by(bits as usize));
    shifted.fold(0, |word, (number, shift)| word | number.cast_unsigned() << shift)
}
