//! How a weight lies in memory: groups of sixteen rows, so that one vector holds one k of every row.
//!
//! A group is a run of bytes that starts on a cache line: first what superblocks of 256 k share,
//! then a record a block of 32 k with its scales, its minima and its weights. A product thus reads
//! one stream from the first byte to the last.
//!
//! | format | scales | minima | weights of a block | bits a weight |
//! |---|---|---|---|---|
//! | Q4_0, IQ4_NL | f16 x 16 | - | 4 bits, 256 B | 4.5 |
//! | Q4_1 | f16 x 16 | f16 x 16 | 4 bits, 256 B | 5 |
//! | Q5_0 | f16 x 16 | - | 4 + 1 bits, 320 B | 5.5 |
//! | Q5_1 | f16 x 16 | f16 x 16 | 4 + 1 bits, 320 B | 6 |
//! | Q8_0 | f16 x 16 | - | bytes, 512 B | 8.5 |
//! | MXFP4 | bf16 x 16 | - | 4 bits, 256 B | 4.5 |
//! | Q2_K | u8 x 16 a 16 k, f16 x 16 a 256 k | the same | 2 bits, 128 B | 3.1 |
//! | Q3_K | i8 x 16 a 16 k, f16 x 16 a 256 k | - | 2 + 1 bits, 192 B | 3.6 |
//! | Q4_K | u8 x 16, f16 x 16 a 256 k | the same | 4 bits, 256 B | 4.6 |
//! | Q5_K | u8 x 16, f16 x 16 a 256 k | the same | 4 + 1 bits, 320 B | 5.6 |
//! | Q6_K | i8 x 16 a 16 k, f16 x 16 a 256 k | - | 4 + 2 bits, 384 B | 6.6 |
//! | IQ4_XS | i8 x 16, f16 x 16 a 256 k | - | 4 bits, 256 B | 4.3 |
//! | Q8_0 of a head | f16 x 16 | - | 4 high bits, 256 B; 4 low bits apart, 256 B | 8.5 |
//! | F32, F16, BF16 | - | - | the values, k-major | 32, 16, 16 |
//!
//! Nothing is rounded: dequantising a tile gives the same f32 as dequantising the checkpoint's
//! block. The order of the bits: see [`crate::codes`]. The low bits of a head lie behind all groups, so
//! that [`crate::largest`] can leave out those of most rows.

use crate::codes::LINE;
use exrail_tensor::{DType, E2M1_TABLE, IQ4_TABLE};
use std::ops::Range;

/// Rows of a group.
pub(crate) const ROWS: usize = 16;
/// k of a block.
pub(crate) const BLOCK: usize = 32;
/// Blocks that share a superblock's f16 scale.
pub(crate) const SUPER: usize = 8;

/// Where the parts of a group are, in bytes from its start. Superblock parts have 32 bytes each;
/// the parts of block b are `b * stride` further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupLayout {
    /// Blocks of 32 k, the last one possibly partial (F32, F16, BF16 only).
    pub(crate) n_blocks: usize,
    /// Bytes of a block's record.
    pub(crate) stride: usize,
    /// K-quants: the superblocks' f16 `d`.
    pub(crate) super_scales: usize,
    /// K-quants with minima: the superblocks' f16 `dmin`.
    pub(crate) super_minima: usize,
    /// f16 scales; K-quants: one byte a row and sub-block.
    pub(crate) scales: usize,
    /// f16 minima; K-quants: one byte a row.
    pub(crate) minima: usize,
    /// The weights.
    pub(crate) weights: usize,
    /// All of it, a multiple of 64.
    pub(crate) len_bytes: usize,
}

/// What a format's tiles are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TileKind {
    /// Bits a weight of the low and of the high plane; see [`crate::codes`].
    pub(crate) planes: [usize; 2],
    /// Low bits that lie apart, in a plane of their own.
    pub(crate) apart: usize,
    /// What a code stands for.
    pub(crate) meaning: Meaning,
    /// `w = scale q + minimum` rather than `w = scale q`.
    pub(crate) minima: bool,
    /// Scales.
    pub(crate) scales: ScaleKind,
}

/// What the code of a weight stands for, before its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Itself: a float.
    Float,
    /// The code minus this.
    Minus(u8),
    /// An entry of a table.
    Table(&'static [i8; 16]),
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleKind {
    /// The weights are floats.
    None,
    /// One f16 a block.
    Half,
    /// One bfloat16 a block.
    Brain,
    /// One f16 a superblock and this many bytes a block.
    Super {
        /// 1 (a scale for 32 k) or 2 (a scale for 16 k).
        per_block: usize,
    },
}

impl TileKind {
    /// The tiles of a checkpoint format.
    pub(crate) fn of(dtype: DType) -> TileKind {
        let kind = |planes, meaning, minima, scales| TileKind {
            planes,
            apart: 0,
            meaning,
            minima,
            scales,
        };
        let (half, plain) = (ScaleKind::Half, Meaning::Minus);
        let sub = |per_block| ScaleKind::Super { per_block };
        match dtype {
            DType::F32 => kind([32, 0], Meaning::Float, false, ScaleKind::None),
            DType::F16 | DType::BF16 => kind([16, 0], Meaning::Float, false, ScaleKind::None),
            DType::Q4_0 => kind([4, 0], plain(8), false, half),
            DType::Q4_1 => kind([4, 0], plain(0), true, half),
            DType::Q5_0 => kind([4, 1], plain(16), false, half),
            DType::Q5_1 => kind([4, 1], plain(0), true, half),
            DType::Q8_0 => kind([8, 0], plain(128), false, half),
            DType::Q2_K => kind([2, 0], plain(0), true, sub(2)),
            DType::Q3_K => kind([2, 1], plain(4), false, sub(2)),
            DType::Q4_K => kind([4, 0], plain(0), true, sub(1)),
            DType::Q5_K => kind([4, 1], plain(0), true, sub(1)),
            DType::Q6_K => kind([4, 2], plain(32), false, sub(2)),
            DType::IQ4_NL => kind([4, 0], Meaning::Table(&IQ4_TABLE), false, half),
            DType::IQ4_XS => kind([4, 0], Meaning::Table(&IQ4_TABLE), false, sub(1)),
            DType::MXFP4 => kind([4, 0], Meaning::Table(&E2M1_TABLE), false, ScaleKind::Brain),
        }
    }

    /// The tiles of a matrix whose largest output may be asked for.
    pub(crate) fn of_head(dtype: DType) -> TileKind {
        let kind = TileKind::of(dtype);
        if dtype == DType::Q8_0 { TileKind { planes: [4, 0], apart: 4, ..kind } } else { kind }
    }

    /// Bytes of one block's weights in its record, all sixteen rows.
    pub(crate) fn block_bytes(self) -> usize {
        (self.planes[0] + self.planes[1]) * LINE
    }

    /// Bytes of one block's low bits that lie apart, all sixteen rows.
    pub(crate) fn apart_bytes(self) -> usize {
        self.apart * LINE
    }

    /// The layout of a group; `None` when the size overflows.
    pub(crate) fn layout(self, columns: usize) -> Option<GroupLayout> {
        let n_blocks = columns.div_ceil(BLOCK);
        let (n_super, part) = match self.scales {
            ScaleKind::None => (0, 0),
            ScaleKind::Half | ScaleKind::Brain => (0, 2 * ROWS),
            ScaleKind::Super { per_block } => (n_blocks / SUPER, per_block * ROWS),
        };
        let n_parts = if self.minima { 2 } else { 1 };
        let super_bytes = n_super.checked_mul(2 * ROWS)?;
        let scales = super_bytes.checked_mul(n_parts)?.checked_next_multiple_of(64)?;
        let stride = n_parts * part + self.block_bytes();
        let len_bytes = n_blocks.checked_mul(stride)?.checked_add(scales)?;
        Some(GroupLayout {
            n_blocks,
            stride,
            super_scales: 0,
            super_minima: super_bytes,
            scales,
            minima: scales + part,
            weights: scales + n_parts * part,
            len_bytes: len_bytes.checked_next_multiple_of(64)?,
        })
    }
}

/// One group's bytes, cut into its parts.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    pub(crate) layout: GroupLayout,
    pub(crate) bytes: &'a [u8],
    /// Low bits that lie apart, 256 bytes a block, or nothing.
    pub(crate) apart: &'a [u8],
}

impl<'a> Group<'a> {
    #[inline(always)]
    fn part<const B: usize>(self, start: usize) -> &'a [u8; B] {
        self.bytes[start..].first_chunk().expect("the layout lies inside the group")
    }

    /// Indices of the blocks.
    #[inline(always)]
    pub(crate) fn blocks(self) -> Range<usize> {
        0..self.layout.n_blocks
    }

    /// f16 scales of sixteen rows.
    #[inline(always)]
    pub(crate) fn scales(self, block: usize) -> &'a [u8; 32] {
        self.part(self.layout.scales + block * self.layout.stride)
    }

    /// f16 minima of sixteen rows.
    #[inline(always)]
    pub(crate) fn minima(self, block: usize) -> &'a [u8; 32] {
        self.part(self.layout.minima + block * self.layout.stride)
    }

    /// f16 `d` of sixteen rows.
    #[inline(always)]
    pub(crate) fn super_scales(self, block: usize) -> &'a [u8; 32] {
        self.part(self.layout.super_scales + block / SUPER * 2 * ROWS)
    }

    /// f16 `dmin` of sixteen rows.
    #[inline(always)]
    pub(crate) fn super_minima(self, block: usize) -> &'a [u8; 32] {
        self.part(self.layout.super_minima + block / SUPER * 2 * ROWS)
    }

    /// Byte scales of sixteen rows, of the first or second half of a block.
    #[inline(always)]
    pub(crate) fn sub_scales(self, block: usize, half: usize) -> &'a [u8; 16] {
        self.part(self.layout.scales + block * self.layout.stride + half * ROWS)
    }

    /// Byte minima of sixteen rows, of the first or second half of a block.
    #[inline(always)]
    pub(crate) fn sub_minima(self, block: usize, half: usize) -> &'a [u8; 16] {
        self.part(self.layout.minima + block * self.layout.stride + half * ROWS)
    }

    /// The weights of a block, and whatever follows.
    #[inline(always)]
    pub(crate) fn block(self, block: usize) -> &'a [u8] {
        &self.bytes[self.layout.weights + block * self.layout.stride..]
    }

    /// Whether low bits lie apart.
    #[inline(always)]
    pub(crate) fn is_split(self) -> bool {
        !self.apart.is_empty()
    }

    /// The low bits of a block that lie apart, and whatever follows.
    #[inline(always)]
    pub(crate) fn low(self, block: usize) -> &'a [u8] {
        &self.apart[block * 4 * LINE..]
    }

    /// The weights, `B` bytes a block.
    #[inline(always)]
    pub(crate) fn weights<const B: usize>(self, block: usize) -> &'a [u8; B] {
        self.part(self.layout.weights + block * self.layout.stride)
    }
}
