//! How a weight lies in memory: groups of sixteen rows, so that one vector holds one k of every row.
//!
//! A group is a run of bytes that starts on a cache line and holds, for all its blocks of 32 k,
//! first the scales, then the minima, then the weights:
//!
//! | format | scales | minima | weights of a block | bits a weight |
//! |---|---|---|---|---|
//! | Q4_0 | f16 x 16 | - | nibbles, 256 B | 4.5 |
//! | Q4_1 | f16 x 16 | f16 x 16 | nibbles, 256 B | 5 |
//! | Q5_0, Q8_0 | f16 x 16 | - | bytes, 512 B | 8.5 |
//! | Q5_1 | f16 x 16 | f16 x 16 | bytes, 512 B | 9 |
//! | Q4_K | u8 x 16, f16 x 16 a 256 k | the same | nibbles, 256 B | 4.6 |
//! | Q5_K | u8 x 16, f16 x 16 a 256 k | the same | bytes, 512 B | 8.6 |
//! | Q6_K | i8 x 16 a 16 k, f16 x 16 a 256 k | - | bytes, 512 B | 9.1 |
//! | F32, F16, BF16 | - | - | the values, k-major | 32, 16, 16 |
//!
//! Nothing is rounded: dequantising a tile gives the same f32 as dequantising the checkpoint's
//! block. A byte holds the signed weight plus 128. Nibble and byte order: see
//! [`crate::lanes::Lanes::nibbles`] and [`crate::lanes::Lanes::bytes`].

use exrail_tensor::DType;

/// Rows of a group.
pub(crate) const ROWS: usize = 16;
/// k of a block.
pub(crate) const BLOCK: usize = 32;
/// Blocks that share a superblock's f16 scale.
pub(crate) const SUPER: usize = 8;

/// Where the parts of a group are, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupLayout {
    /// Blocks of 32 k, the last one possibly partial (F32, F16, BF16 only).
    pub(crate) n_blocks: usize,
    /// f16 scales, or the superblocks' f16 `d`.
    pub(crate) scales: usize,
    /// f16 minima, or the superblocks' f16 `dmin`.
    pub(crate) minima: usize,
    /// K-quants: one byte a row and sub-block.
    pub(crate) sub_scales: usize,
    /// K-quants with minima: one byte a row and sub-block.
    pub(crate) sub_minima: usize,
    /// The weights.
    pub(crate) weights: usize,
    /// All of it, a multiple of 64.
    pub(crate) len_bytes: usize,
}

/// What a format's tiles are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TileKind {
    /// Bytes of one block's weights, all sixteen rows.
    pub(crate) block_bytes: usize,
    /// `w = scale q + minimum` rather than `w = scale q`.
    pub(crate) minima: bool,
    /// Scales.
    pub(crate) scales: ScaleKind,
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleKind {
    /// The weights are floats.
    None,
    /// One f16 a block.
    Half,
    /// One f16 a superblock and this many bytes a block.
    Super {
        /// 1 (a scale for 32 k) or 2 (a scale for 16 k).
        per_block: usize,
    },
}

impl TileKind {
    /// The tiles of a checkpoint format.
    pub(crate) fn of(dtype: DType) -> TileKind {
        let kind = |block_bytes, minima, scales| TileKind { block_bytes, minima, scales };
        let nibbles = ROWS * BLOCK / 2;
        let bytes = ROWS * BLOCK;
        match dtype {
            DType::F32 => kind(4 * bytes, false, ScaleKind::None),
            DType::F16 | DType::BF16 => kind(2 * bytes, false, ScaleKind::None),
            DType::Q4_0 => kind(nibbles, false, ScaleKind::Half),
            DType::Q4_1 => kind(nibbles, true, ScaleKind::Half),
            DType::Q5_0 | DType::Q8_0 => kind(bytes, false, ScaleKind::Half),
            DType::Q5_1 => kind(bytes, true, ScaleKind::Half),
            DType::Q4_K => kind(nibbles, true, ScaleKind::Super { per_block: 1 }),
            DType::Q5_K => kind(bytes, true, ScaleKind::Super { per_block: 1 }),
            DType::Q6_K => kind(bytes, false, ScaleKind::Super { per_block: 2 }),
        }
    }

    /// The layout of a group; `None` when the size overflows.
    pub(crate) fn layout(self, columns: usize) -> Option<GroupLayout> {
        let n_blocks = columns.div_ceil(BLOCK);
        let (halves, subs) = match self.scales {
            ScaleKind::None => (0, 0),
            ScaleKind::Half => (n_blocks, 0),
            ScaleKind::Super { per_block } => (n_blocks / SUPER, n_blocks.checked_mul(per_block)?),
        };
        let halves = halves.checked_mul(2 * ROWS)?;
        let subs = subs.checked_mul(ROWS)?;
        let twice = if self.minima { 2 } else { 1 };
        let weights =
            (halves.checked_add(subs)?.checked_mul(twice)?).checked_next_multiple_of(64)?;
        let len_bytes = n_blocks.checked_mul(self.block_bytes)?.checked_add(weights)?;
        Some(GroupLayout {
            n_blocks,
            scales: 0,
            minima: halves,
            sub_scales: twice * halves,
            sub_minima: twice * halves + subs,
            weights,
            len_bytes: len_bytes.checked_next_multiple_of(64)?,
        })
    }
}

/// One group's bytes, cut into its parts.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    pub(crate) layout: GroupLayout,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Group<'a> {
    #[inline(always)]
    fn part<const B: usize>(self, start: usize, count: usize) -> &'a [[u8; B]] {
        self.bytes[start..start + count * B].as_chunks::<B>().0
    }

    /// f16 scales of sixteen rows, a block each.
    #[inline(always)]
    pub(crate) fn scales(self) -> &'a [[u8; 32]] {
        self.part(self.layout.scales, self.layout.n_blocks)
    }

    /// f16 minima of sixteen rows, a block each.
    #[inline(always)]
    pub(crate) fn minima(self) -> &'a [[u8; 32]] {
        self.part(self.layout.minima, self.layout.n_blocks)
    }

    /// f16 `d` of sixteen rows, a superblock each.
    #[inline(always)]
    pub(crate) fn super_scales(self) -> &'a [[u8; 32]] {
        self.part(self.layout.scales, self.layout.n_blocks / SUPER)
    }

    /// f16 `dmin` of sixteen rows, a superblock each.
    #[inline(always)]
    pub(crate) fn super_minima(self) -> &'a [[u8; 32]] {
        self.part(self.layout.minima, self.layout.n_blocks / SUPER)
    }

    /// Byte scales of sixteen rows, `per_block` entries a block.
    #[inline(always)]
    pub(crate) fn sub_scales(self, per_block: usize) -> &'a [[u8; 16]] {
        self.part(self.layout.sub_scales, self.layout.n_blocks * per_block)
    }

    /// Byte minima of sixteen rows, a block each.
    #[inline(always)]
    pub(crate) fn sub_minima(self) -> &'a [[u8; 16]] {
        self.part(self.layout.sub_minima, self.layout.n_blocks)
    }

    /// The weights, `B` bytes a block.
    #[inline(always)]
    pub(crate) fn weights<const B: usize>(self) -> &'a [[u8; B]] {
        self.part(self.layout.weights, self.layout.n_blocks)
    }
}
