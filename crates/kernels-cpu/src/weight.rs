//! [`CpuWeight`]: a checkpoint matrix repacked into the tiles of [`crate::tile`] when it is loaded.

use crate::codes::LINE;
use crate::largest::Screen;
use crate::memory::{Arena, Bytes};
use crate::pack::Packer;
use crate::pool::Pool;
use crate::tile::{BLOCK, Group, GroupLayout, Meaning, ROWS, ScaleKind, TileKind};
use exrail_kernels::{InputRounding, KernelError, WeightView};
use exrail_tensor::DType;
use half::{bf16, f16};
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
    /// Low bits of a head; see [`TileKind::of_head`].
    apart: Bytes,
    screen: Screen,
}

/// Sizes of a matrix in tiles.
pub(crate) struct Packed {
    layout: GroupLayout,
    /// Bytes of all groups.
    bytes: usize,
    /// Bytes of the low bits of one group that lie apart, and of all.
    apart_bytes: usize,
    apart: usize,
}

impl Packed {
    /// `None`: more than a number holds.
    pub(crate) fn of(kind: TileKind, rows: usize, columns: usize) -> Option<Packed> {
        let n_groups = rows.div_ceil(ROWS);
        let layout = kind.layout(columns)?;
        let bytes = layout.len_bytes.checked_mul(n_groups)?;
        // No longer than the groups, whose records hold as many bits and the scales.
        let apart_bytes = layout.n_blocks * kind.apart_bytes();
        Some(Packed { layout, bytes, apart_bytes, apart: apart_bytes * n_groups })
    }

    /// Bytes of the whole matrix.
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes + self.apart
    }
}

impl CpuWeight {
    /// Repacks, a row group a chunk.
    pub(crate) fn pack(
        view: &WeightView<'_>,
        kind: TileKind,
        (arena, pool): (&Arena, &Pool),
        device: impl Fn() -> String,
    ) -> Result<CpuWeight, KernelError> {
        let row_bytes = view.row_bytes()?;
        let n_groups = view.rows.div_ceil(ROWS);
        let out_of_memory = |wanted_bytes| KernelError::OutOfMemory {
            what: format!("weight `{}`", view.name),
            wanted_bytes,
            device: device(),
        };
        let Packed { layout, bytes: len, apart_bytes, apart: apart_len } =
            Packed::of(kind, view.rows, view.columns).ok_or_else(|| out_of_memory(usize::MAX))?;
        let mut bytes = arena.bytes(len).ok_or_else(|| out_of_memory(len))?;
        let mut apart = arena.bytes(apart_len).ok_or_else(|| out_of_memory(apart_len))?;
        let packer = Packer { dtype: view.dtype, kind, layout };
        // Each lock is taken once: the pool hands out every index once.
        let groups = bytes.chunks_exact_mut(layout.len_bytes.max(1));
        let mut low = apart.chunks_exact_mut(apart_bytes.max(1));
        let groups: Vec<Mutex<(&mut [u8], &mut [u8])>> =
            groups.map(|group| Mutex::new((group, low.next().unwrap_or_default()))).collect();
        pool.run(n_groups, &|g| {
            let (group, apart) = &mut *groups[g].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = g * ROWS..view.rows.min((g + 1) * ROWS);
            let bytes = &view.bytes[rows.start * row_bytes..rows.end * row_bytes];
            packer.group(bytes, row_bytes, group, apart);
        });
        drop(groups);
        let WeightView { dtype, rows, columns, rounding, .. } = *view;
        Ok(CpuWeight {
            dtype,
            rows,
            columns,
            layout,
            rounding,
            bytes,
            apart,
            screen: Screen::default(),
        })
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
        self.bytes.len() + self.apart.len()
    }

    /// Whether low bits lie apart.
    pub(crate) fn is_split(&self) -> bool {
        !self.apart.is_empty()
    }

    /// Whether its high bits help to find its largest output.
    pub(crate) fn screen(&self) -> &Screen {
        &self.screen
    }

    /// One group of rows.
    #[inline(always)]
    pub(crate) fn group(&self, group: usize) -> Group<'_> {
        let (layout, start) = (self.layout, group * self.layout.len_bytes);
        let apart = if self.is_split() {
            let len = layout.n_blocks * 4 * LINE;
            &self.apart[group * len..(group + 1) * len]
        } else {
            &[]
        };
        Group { layout, bytes: &self.bytes[start..start + layout.len_bytes], apart }
    }
}

impl CpuWeight {
    /// Row `row` as f32, the same values as dequantising the checkpoint's blocks.
    pub(crate) fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        let group = self.group(row / ROWS);
        let r = row % ROWS;
        let is_head = self.is_split();
        let kind = if is_head { TileKind::of_head(self.dtype) } else { TileKind::of(self.dtype) };
        let half = |entry: &[u8; 32]| f16::from_le_bytes([entry[2 * r], entry[2 * r + 1]]).to_f32();
        let weights = &group.bytes[group.layout.weights..];
        for (b, out) in out[..self.columns].chunks_mut(BLOCK).enumerate() {
            let tile = &weights[b * group.layout.stride..][..kind.block_bytes()];
            let tile = (tile, if is_head { group.low(b) } else { &[] });
            match kind.scales {
                ScaleKind::None => float_block(self.dtype, tile.0, r, out),
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
    (tile, apart): (&[u8], &[u8]),
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
        if kind.apart > 0 {
            code = code << kind.apart | self::code(apart, kind.apart, r, k);
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
