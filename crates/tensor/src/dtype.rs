//! [`DType`]: how numbers lie in memory. It holds no numbers and knows no shapes.

use std::fmt;

/// A storage format of a tensor's elements, named as ggml names it.
///
/// Sizes and layouts are those of ggml's `ggml-common.h`; this crate's format modules spell out
/// each block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(non_camel_case_types, reason = "the names of the formats as every model file spells them")]
pub enum DType {
    /// IEEE 754 single precision, little endian.
    F32,
    /// IEEE 754 half precision, little endian.
    F16,
    /// The upper half of an `F32`, little endian.
    BF16,
    /// 32 weights of 4 bits, one scale: 4.5 bits per weight.
    Q4_0,
    /// 32 weights of 4 bits, scale and minimum: 5 bits per weight.
    Q4_1,
    /// 32 weights of 5 bits, one scale: 5.5 bits per weight.
    Q5_0,
    /// 32 weights of 5 bits, scale and minimum: 6 bits per weight.
    Q5_1,
    /// 32 weights of 8 bits, one scale: 8.5 bits per weight.
    Q8_0,
    /// 256 weights of 2 bits in 16 groups with 4-bit scales and minima: 2.625 bits per weight.
    Q2_K,
    /// 256 weights of 3 bits in 16 groups with 6-bit scales: 3.4375 bits per weight.
    Q3_K,
    /// 256 weights of 4 bits in 8 groups with 6-bit scales and minima: 4.5 bits per weight.
    Q4_K,
    /// 256 weights of 5 bits in 8 groups with 6-bit scales and minima: 5.5 bits per weight.
    Q5_K,
    /// 256 weights of 6 bits in 16 groups with 8-bit scales: 6.5625 bits per weight.
    Q6_K,
    /// 32 indices of 4 bits into an uneven table, one scale: 4.5 bits per weight.
    IQ4_NL,
    /// 256 indices of 4 bits into the same table in 8 groups with 6-bit scales: 4.25 bits per
    /// weight.
    IQ4_XS,
    /// 32 four-bit floats (E2M1), one power of two as scale: 4.25 bits per weight. The format of
    /// the OCP Microscaling specification.
    MXFP4,
}

impl DType {
    /// Every format, in declaration order.
    pub const ALL: [DType; 16] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::IQ4_NL,
        DType::IQ4_XS,
        DType::MXFP4,
    ];

    /// Elements in one block: 1, 32 or 256. A row is a whole number of blocks.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q4_0
            | DType::Q4_1
            | DType::Q5_0
            | DType::Q5_1
            | DType::Q8_0
            | DType::IQ4_NL
            | DType::MXFP4 => 32,
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K | DType::IQ4_XS => {
                256
            }
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::MXFP4 => 17,
            DType::Q4_0 | DType::IQ4_NL => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2_K => 84,
            DType::Q3_K => 110,
            DType::IQ4_XS => 136,
            DType::Q4_K => 144,
            DType::Q5_K => 176,
            DType::Q6_K => 210,
        }
    }

    /// Bytes of a row of `columns` elements. `None` when `columns` is not a whole number of blocks
    /// or the count does not fit in `usize`.
    #[must_use]
    pub const fn row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block_len()) {
            return None;
        }
        (columns / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether a block shares scales between its elements.
    #[must_use]
    pub const fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// The format with this number in ggml's `enum ggml_type`; `None` for those that this crate
    /// does not read (see [`ggml_type_name`] for their names).
    #[must_use]
    pub const fn from_ggml(type_id: u32) -> Option<DType> {
        match type_id {
            0 => Some(DType::F32),
            1 => Some(DType::F16),
            2 => Some(DType::Q4_0),
            3 => Some(DType::Q4_1),
            6 => Some(DType::Q5_0),
            7 => Some(DType::Q5_1),
            8 => Some(DType::Q8_0),
            10 => Some(DType::Q2_K),
            11 => Some(DType::Q3_K),
            12 => Some(DType::Q4_K),
            13 => Some(DType::Q5_K),
            14 => Some(DType::Q6_K),
            20 => Some(DType::IQ4_NL),
            23 => Some(DType::IQ4_XS),
            30 => Some(DType::BF16),
            39 => Some(DType::MXFP4),
            _ => None,
        }
    }

    /// The format's number in ggml's `enum ggml_type`, as GGUF files store it.
    #[must_use]
    pub const fn to_ggml(self) -> u32 {
        match self {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::Q4_0 => 2,
            DType::Q4_1 => 3,
            DType::Q5_0 => 6,
            DType::Q5_1 => 7,
            DType::Q8_0 => 8,
            DType::Q2_K => 10,
            DType::Q3_K => 11,
            DType::Q4_K => 12,
            DType::Q5_K => 13,
            DType::Q6_K => 14,
            DType::IQ4_NL => 20,
            DType::IQ4_XS => 23,
            DType::BF16 => 30,
            DType::MXFP4 => 39,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q5_0 => "Q5_0",
            DType::Q5_1 => "Q5_1",
            DType::Q8_0 => "Q8_0",
            DType::Q2_K => "Q2_K",
            DType::Q3_K => "Q3_K",
            DType::Q4_K => "Q4_K",
            DType::Q5_K => "Q5_K",
            DType::Q6_K => "Q6_K",
            DType::IQ4_NL => "IQ4_NL",
            DType::IQ4_XS => "IQ4_XS",
            DType::MXFP4 => "MXFP4",
        })
    }
}

/// ggml's name of a type number, also for the types that [`DType`] does not cover, so that an
/// error can say `IQ3_S` instead of 21. `None` for numbers that ggml does not define or has
/// removed.
#[must_use]
pub const fn ggml_type_name(type_id: u32) -> Option<&'static str> {
    Some(match type_id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        30 => "BF16",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ggml_numbers_and_names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_ggml(dtype.to_ggml()), Some(dtype));
            assert_eq!(ggml_type_name(dtype.to_ggml()), Some(dtype.to_string().as_str()));
        }
        assert_eq!(DType::from_ggml(u32::MAX), None);
        assert_eq!(DType::from_ggml(21), None);
    }

    #[test]
    fn rows_must_be_whole_blocks_and_must_fit() {
        assert_eq!(DType::Q4_1.row_bytes(576), Some(18 * 20));
        assert_eq!(DType::Q4_K.row_bytes(576), None);
        assert_eq!(DType::Q8_0.row_bytes(0), Some(0));
        assert_eq!(DType::F32.row_bytes(usize::MAX), None);
    }
}
