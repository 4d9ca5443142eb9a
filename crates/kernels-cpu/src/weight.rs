//! [`CpuWeight`]: a checkpoint matrix repacked into the tiles of [`crate::tile`] when it is loaded.

use crate::codes::LINE;
use crate::memory::{Arena, Bytes};
use crate::pool::Pool;
use crate::tile::{BLOCK, Group, GroupLayout, Meaning, ROWS, SUPER, ScaleKind, TileKind};
use exrail_kernels::{InputRounding, KernelError, WeightView};
use exrail_tensor::{DType, e8m0_half, unpack_signed_scales};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A matrix in tiles. Its last group is padded with zero rows.
#[derive(Debug)]
pub struct CpuWeight {
    dtype: DType,
    rows: usize,
    columns: usize,
    layout: GroupLayout,
    rounding: InputRounding,
    bytes: Bytes,
}

impl CpuWeight {
    /// Repacks, a row group a chunk.
    pub(crate) fn pack(
        view: &WeightView<'_>,
        arena: &Arena,
        pool: &Pool,
        device: impl Fn() -> String,
    ) -> Result<CpuWeight, KernelError> {
        let row_bytes = view.row_bytes()?;
        let kind = TileKind::of(view.dtype);
        let n_groups = view.rows.div_ceil(ROWS);
        let out_of_memory = |wanted_bytes| KernelError::OutOfMemory {
            what: format!("weight `{}`", view.name),
            wanted_bytes,
            device: device(),
        };
        let layout = kind.layout(view.columns).ok_or_else(|| out_of_memory(usize::MAX))?;
        let len =
            layout.len_bytes.checked_mul(n_groups).ok_or_else(|| out_of_memory(usize::MAX))?;
        let mut bytes = arena.bytes(len).ok_or_else(|| out_of_memory(len))?;
        let weight = Packer { dtype: view.dtype, kind, layout };
        // Each lock is taken once: the pool hands out every index once.
        let groups: Vec<Mutex<&mut [u8]>> =
            bytes.chunks_exact_mut(layout.len_bytes.max(1)).map(Mutex::new).collect();
        pool.run(n_groups, &|g| {
            let group = &mut **groups[g].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = view.rows.min((g + 1) * ROWS) - g * ROWS;
            for r in 0..rows {
                let start = (g * ROWS + r) * row_bytes;
                weight.pack_row(&view.bytes[start..start + row_bytes], r, group);
            }
        });
        drop(groups);
        let WeightView { dtype, rows, columns, rounding, .. } = *view;
        Ok(CpuWeight { dtype, rows, columns, layout, rounding, bytes })
    }

    /// Format of the checkpoint's matrix.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// What its activations tolerate.
    pub(crate) fn rounding(&self) -> InputRounding {
        self.rounding
    }

    /// Output features N.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Groups of sixteen rows.
    pub(crate) fn n_groups(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Bytes of all groups.
    pub(crate) fn len_bytes(&self) -> usize {
        self.n_groups() * self.layout.len_bytes
    }

    /// Where some groups lie.
    pub(crate) fn addresses(&self, groups: Range<usize>) -> Range<usize> {
        let (start, len) = (self.bytes.as_ptr().addr(), self.layout.len_bytes);
        start + groups.start * len..start + groups.end * len
    }

    /// One group of rows.
    #[inline(always)]
    pub(crate) fn group(&self, group: usize) -> Group<'_> {
        let start = group * self.layout.len_bytes;
        Group { layout: self.layout, bytes: &self.bytes[start..start + self.layout.len_bytes] }
    }
}

impl CpuWeight {
    /// Row `row` as f32, the same values as dequantising the checkpoint's blocks.
    pub(crate) fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        let group = self.group(row / ROWS);
        let r = row % ROWS;
        let kind = TileKind::of(self.dtype);
        let half = |entry: &[u8; 32]| f16::from_le_bytes([entry[2 * r], entry[2 * r + 1]]).to_f32();
        let weights = &group.bytes[group.layout.weights..];
        for (b, out) in out[..self.columns].chunks_mut(BLOCK).enumerate() {
            let tile = &weights[b * group.layout.stride..][..kind.block_bytes()];
            match kind.scales {
                ScaleKind::None => float_block(self.dtype, tile, r, out),
                ScaleKind::Half => {
                    let minimum = if kind.minima { half(group.minima(b)) } else { 0.0 };
                    let scale = half(group.scales(b));
                    quant_block(kind, tile, r, |_, q| scale * q + minimum, out);
                }
                ScaleKind::Brain => {
                    let entry = group.scales(b);
                    let scale = bf16::from_le_bytes([entry[2 * r], entry[2 * r + 1]]).to_f32();
                    quant_block(kind, tile, r, |_, q| scale * q, out);
                }
                ScaleKind::Super { per_block } => {
                    let d = half(group.super_scales(b));
                    let scale = |k: usize| {
                        let sub = group.sub_scales(b, k * per_block / BLOCK)[r];
                        d * if kind.minima { f32::from(sub) } else { f32::from(sub.cast_signed()) }
                    };
                    let minimum = |k: usize| {
                        if !kind.minima {
                            return 0.0;
                        }
                        let sub = group.sub_minima(b, k * per_block / BLOCK)[r];
                        half(group.super_minima(b)) * f32::from(sub)
                    };
                    quant_block(kind, tile, r, |k, q| scale(k) * q - minimum(k), out);
                }
            }
        }
    }
}

fn float_block(dtype: DType, tile: &[u8], r: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        let at = k * ROWS + r;
        let two = || [tile[2 * at], tile[2 * at + 1]];
        *out = if dtype == DType::F16 {
            f16::from_le_bytes(two()).to_f32()
        } else if dtype == DType::BF16 {
            bf16::from_le_bytes(two()).to_f32()
        } else {
            let at = 4 * at;
            f32::from_le_bytes([tile[at], tile[at + 1], tile[at + 2], tile[at + 3]])
        };
    }
}

/// `out[k] = value(k, q)`, q the weight before its scale.
fn quant_block(
    kind: TileKind,
    tile: &[u8],
    r: usize,
    value: impl Fn(usize, f32) -> f32,
    out: &mut [f32],
) {
    let [low_bits, high_bits] = kind.planes;
    let (low, high) = tile.split_at(low_bits * LINE);
    for (k, out) in out.iter_mut().enumerate() {
        let mut code = code(low, low_bits, r, k);
        if high_bits > 0 {
            code |= self::code(high, high_bits, r, k) << low_bits;
        }
        let q = match kind.meaning {
            Meaning::Float => 0.0,
            Meaning::Minus(bias) => f32::from(code) - f32::from(bias),
            Meaning::Table(table) => f32::from(table[usize::from(code)]),
        };
        *out = value(k, q);
    }
}

/// Where a plane of `bits` bits has weight k of row r: byte and shift.
fn place(bits: usize, r: usize, k: usize) -> (usize, usize) {
    let (entry, within) = (k / 4, k % 4);
    (entry % bits * LINE + r * 4 + within, entry / bits * bits)
}

fn code(plane: &[u8], bits: usize, r: usize, k: usize) -> u8 {
    let (at, shift) = place(bits, r, k);
    // Eight bits are the whole byte.
    plane[at] >> shift & (0xff >> (8 - bits))
}

/// What [`Packer::pack_row`] needs to know of the matrix.
struct Packer {
    dtype: DType,
    kind: TileKind,
    layout: GroupLayout,
}

/// 32 weights as tiles store them: scale and minimum bits as in the file, q as stored.
struct PlainBlock {
    scale: [u8; 2],
    minimum: [u8; 2],
    q: [u8; BLOCK],
}

impl Packer {
    fn pack_row(&self, row: &[u8], r: usize, group: &mut [u8]) {
        match self.kind.scales {
            ScaleKind::None => self.pack_floats(row, r, group),
            ScaleKind::Half | ScaleKind::Brain => self.pack_halves(row, r, group),
            ScaleKind::Super { .. } => self.pack_super(row, r, group),
        }
    }

    fn pack_floats(&self, row: &[u8], r: usize, group: &mut [u8]) {
        let width = self.kind.planes[0] / 8;
        for (k, value) in row.chunks_exact(width).enumerate() {
            let at = self.layout.weights + (k * ROWS + r) * width;
            group[at..at + width].copy_from_slice(value);
        }
    }

    fn pack_halves(&self, row: &[u8], r: usize, group: &mut [u8]) {
        let layout = &self.layout;
        for (b, block) in row.chunks_exact(self.dtype.block_bytes()).enumerate() {
            let plain = plain_block(self.dtype, block);
            let at = b * layout.stride + r * 2;
            group[layout.scales + at..][..2].copy_from_slice(&plain.scale);
            if self.kind.minima {
                group[layout.minima + at..][..2].copy_from_slice(&plain.minimum);
            }
            self.pack_quants(&plain.q, b, r, group);
        }
    }

    fn pack_super(&self, row: &[u8], r: usize, group: &mut [u8]) {
        let layout = &self.layout;
        let ScaleKind::Super { per_block } = self.kind.scales else { return };
        for (s, block) in row.chunks_exact(self.dtype.block_bytes()).enumerate() {
            let plain = super_block(self.dtype, block);
            let at = (s * ROWS + r) * 2;
            group[layout.super_scales + at..][..2].copy_from_slice(&plain.d);
            if self.kind.minima {
                group[layout.super_minima + at..][..2].copy_from_slice(&plain.d_min);
            }
            for i in 0..SUPER * per_block {
                let record = (s * SUPER + i / per_block) * layout.stride;
                let at = record + i % per_block * ROWS + r;
                group[layout.scales + at] = plain.scales[i];
                if self.kind.minima {
                    group[layout.minima + at] = plain.minima[i];
                }
            }
            for (i, q) in plain.q.as_chunks::<BLOCK>().0.iter().enumerate() {
                self.pack_quants(q, s * SUPER + i, r, group);
            }
        }
    }

    fn pack_quants(&self, q: &[u8; BLOCK], block: usize, r: usize, group: &mut [u8]) {
        let start = self.layout.weights + block * self.layout.stride;
        let tile = &mut group[start..start + self.kind.block_bytes()];
        let [low_bits, high_bits] = self.kind.planes;
        let (low, high) = tile.split_at_mut(low_bits * LINE);
        for (k, &q) in q.iter().enumerate() {
            let (at, shift) = place(low_bits, r, k);
            low[at] |= (q & (0xff >> (8 - low_bits))) << shift;
            if high_bits > 0 {
                let (at, shift) = place(high_bits, r, k);
                high[at] |= q >> low_bits << shift;
            }
        }
    }
}

/// 256 weights as tiles store them.
struct SuperBlock {
    d: [u8; 2],
    d_min: [u8; 2],
    /// Eight or sixteen, the rest zero.
    scales: [u8; 16],
    minima: [u8; 16],
    q: [u8; 256],
}

/// The formats of 256 weights a block.
fn super_block(dtype: DType, block: &[u8]) -> SuperBlock {
    let two = |at: usize| [block[at], block[at + 1]];
    let mut plain =
        SuperBlock { d: two(0), d_min: two(2), scales: [0; 16], minima: [0; 16], q: [0; 256] };
    match dtype {
        DType::Q2_K => {
            (plain.d, plain.d_min) = (two(80), two(82));
            plain.scales = std::array::from_fn(|i| block[i] & 15);
            plain.minima = std::array::from_fn(|i| block[i] >> 4);
            plain.q = std::array::from_fn(|i| two_bits(&block[16..80], i));
        }
        DType::Q3_K => {
            plain.d = two(108);
            let packed = block[96..108].first_chunk().expect("twelve bytes of scales");
            plain.scales = unpack_signed_scales(packed).map(i8::cast_unsigned);
            plain.q = std::array::from_fn(|i| {
                two_bits(&block[32..96], i) | (block[i % 32] >> (i / 32) & 1) << 2
            });
        }
        DType::Q6_K => {
            plain.d = two(208);
            plain.scales = std::array::from_fn(|i| block[192 + i]);
            plain.q = q6_k(block);
        }
        DType::IQ4_XS => {
            plain.scales = std::array::from_fn(|i| iq4_xs_scale(block, i % SUPER));
            plain.q = std::array::from_fn(|i| {
                let byte = block[8 + i / 32 * 16 + i % 16];
                if i % 32 < 16 { byte & 15 } else { byte >> 4 }
            });
        }
        DType::Q4_K | DType::Q5_K => {
            for i in 0..SUPER {
                (plain.scales[i], plain.minima[i]) = six_bits(&block[4..16], i);
            }
            plain.q = if dtype == DType::Q4_K { q4_k(block) } else { q5_k(block) };
        }
        DType::Q4_0
        | DType::Q4_1
        | DType::Q5_0
        | DType::Q5_1
        | DType::Q8_0
        | DType::IQ4_NL
        | DType::MXFP4
        | DType::F32
        | DType::F16
        | DType::BF16 => {}
    }
    plain
}

/// Scale of a group of 32, minus 32, as a signed byte.
fn iq4_xs_scale(block: &[u8], group: usize) -> u8 {
    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * group) & 3;
    let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
    (low | (high as u8) << 4).wrapping_sub(32)
}

/// Weight i of two-bit weights, 32 bytes for 128.
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// The formats of 32 weights a block; Q8_0 as signed weight plus 128.
fn plain_block(dtype: DType, block: &[u8]) -> PlainBlock {
    let two = |at: usize| [block[at], block[at + 1]];
    let nibbles = |at: usize, i: usize| {
        if i < 16 { block[at + i] & 15 } else { block[at + i - 16] >> 4 }
    };
    let fifth = |at: usize, i: usize| (block[at + i / 8] >> (i % 8) & 1) << 4;
    let has_minimum = matches!(dtype, DType::Q4_1 | DType::Q5_1);
    let mut scale = two(0);
    let q = match dtype {
        DType::Q4_0 | DType::IQ4_NL => std::array::from_fn(|i| nibbles(2, i)),
        DType::Q4_1 => std::array::from_fn(|i| nibbles(4, i)),
        DType::Q5_0 => std::array::from_fn(|i| nibbles(6, i) | fifth(2, i)),
        DType::Q5_1 => std::array::from_fn(|i| nibbles(8, i) | fifth(4, i)),
        DType::MXFP4 => {
            // A power of two, which bfloat16 holds exactly, subnormal ones too.
            scale = bf16::from_f32(e8m0_half(block[0])).to_le_bytes();
            std::array::from_fn(|i| nibbles(1, i))
        }
        DType::Q8_0
        | DType::Q2_K
        | DType::Q3_K
        | DType::Q4_K
        | DType::Q5_K
        | DType::Q6_K
        | DType::IQ4_XS
        | DType::F32
        | DType::F16
        | DType::BF16 => std::array::from_fn(|i| block[2 + i] ^ 0x80),
    };
    PlainBlock { scale, minimum: if has_minimum { two(2) } else { [0; 2] }, q }
}

/// Scale and minimum i of the eight 6-bit pairs in 12 bytes.
fn six_bits(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    }
}

fn q4_k(block: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| {
        let byte = block[16 + i / 64 * 32 + i % 32];
        if i % 64 < 32 { byte & 15 } else { byte >> 4 }
    })
}

fn q5_k(block: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| {
        let byte = block[48 + i / 64 * 32 + i % 32];
        let low = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
        low | (block[16 + i % 32] >> (i / 32) & 1) << 4
    })
}

fn q6_k(block: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| {
        let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
        let byte = block[half * 64 + quarter % 2 * 32 + l];
        let low = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let high = block[128 + half * 32 + l] >> (2 * quarter) & 3;
        low | high << 4
    })
}
