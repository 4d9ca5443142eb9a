//! From the rows of a checkpoint to the tiles of [`crate::tile`].
//!
//! A group is packed block by block: first the codes of its sixteen rows, 32 of each, then entries
//! of four k of every row, then planes of bits. Every loop runs over whole lines, which
//! compilers vectorise.

use crate::codes::LINE;
use crate::tile::{BLOCK, GroupLayout, ROWS, SUPER, ScaleKind, TileKind};
use exrail_tensor::{DType, e8m0_half, unpack_signed_scales};
use half::bf16;

/// k of a superblock.
const SUPER_K: usize = SUPER * BLOCK;

/// Codes of 32 k of one row.
type Codes = [u8; BLOCK];
/// The codes of a block, `[j][4 r + c]` for k = 4 j + c of row r.
type Entries = [[u8; LINE]; BLOCK / 4];

/// Packs the groups of one matrix.
pub(crate) struct Packer {
    pub(crate) dtype: DType,
    pub(crate) kind: TileKind,
    pub(crate) layout: GroupLayout,
}

impl Packer {
    /// Packs sixteen rows of `row_bytes`, or fewer of the last group, whose others stay zero.
    /// `apart` takes the low bits of a head.
    pub(crate) fn group(&self, rows: &[u8], row_bytes: usize, group: &mut [u8], apart: &mut [u8]) {
        match self.kind.scales {
            ScaleKind::None if self.dtype == DType::F32 => self.floats::<4>(rows, row_bytes, group),
            ScaleKind::None => self.floats::<2>(rows, row_bytes, group),
            ScaleKind::Half | ScaleKind::Brain => self.blocks(rows, row_bytes, group, apart),
            ScaleKind::Super { per_block } => {
                self.super_blocks(rows, row_bytes, per_block, group);
            }
        }
    }

    /// Values of `W` bytes, k-major.
    fn floats<const W: usize>(&self, rows: &[u8], row_bytes: usize, group: &mut [u8]) {
        let lines = group[self.layout.weights..].as_chunks_mut::<W>().0;
        for (r, row) in rows.chunks_exact(row_bytes.max(1)).enumerate() {
            for (line, value) in lines.chunks_exact_mut(ROWS).zip(row.as_chunks::<W>().0) {
                line[r] = *value;
            }
        }
    }

    fn blocks(&self, rows: &[u8], row_bytes: usize, group: &mut [u8], apart: &mut [u8]) {
        let (layout, block_bytes) = (&self.layout, self.dtype.block_bytes());
        let mut codes = [[0; BLOCK]; ROWS];
        for b in 0..layout.n_blocks {
            let record = b * layout.stride;
            for (r, row) in rows.chunks_exact(row_bytes.max(1)).enumerate() {
                let block = &row[b * block_bytes..][..block_bytes];
                let at = record + r * 2;
                let scale = plain_block(self.dtype, block, &mut codes[r]);
                group[layout.scales + at..][..2].copy_from_slice(&scale);
                if self.kind.minima {
                    group[layout.minima + at..][..2].copy_from_slice(&block[2..4]);
                }
            }
            let entries = entries(&codes);
            self.tile(&entries, b, group);
            if self.kind.apart > 0 {
                let low = &mut apart[b * self.kind.apart_bytes()..][..self.kind.apart_bytes()];
                plane(&entries, 0, self.kind.apart, low.as_chunks_mut().0);
            }
        }
    }

    fn super_blocks(&self, rows: &[u8], row_bytes: usize, per_block: usize, group: &mut [u8]) {
        let (layout, block_bytes) = (&self.layout, self.dtype.block_bytes());
        let mut codes = [[[0; BLOCK]; ROWS]; SUPER];
        for s in 0..layout.n_blocks / SUPER {
            for (r, row) in rows.chunks_exact(row_bytes.max(1)).enumerate() {
                let plain = super_block(self.dtype, &row[s * block_bytes..][..block_bytes]);
                for (codes, q) in codes.iter_mut().zip(plain.q.as_chunks().0) {
                    codes[r] = *q;
                }
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
            }
            for (i, codes) in codes.iter().enumerate() {
                self.tile(&entries(codes), s * SUPER + i, group);
            }
        }
    }

    /// Writes the planes of a block.
    fn tile(&self, entries: &Entries, block: usize, group: &mut [u8]) {
        let start = self.layout.weights + block * self.layout.stride;
        let tile = &mut group[start..start + self.kind.block_bytes()];
        let [low_bits, high_bits] = self.kind.planes;
        let (low, high) = tile.as_chunks_mut::<LINE>().0.split_at_mut(low_bits);
        plane(entries, self.kind.apart, low_bits, low);
        if high_bits > 0 {
            plane(entries, low_bits, high_bits, high);
        }
    }
}

/// The codes of sixteen rows, four k at a time.
fn entries(codes: &[Codes; ROWS]) -> Entries {
    let mut entries = [[0; LINE]; BLOCK / 4];
    for (r, codes) in codes.iter().enumerate() {
        for (entry, four) in entries.iter_mut().zip(codes.as_chunks::<4>().0) {
            entry.as_chunks_mut::<4>().0[r] = *four;
        }
    }
    entries
}

/// `bits` bits of every code from bit `first` on, in as many lines; see [`crate::codes`].
fn plane(entries: &Entries, first: usize, bits: usize, lines: &mut [[u8; LINE]]) {
    match bits {
        1 => plane_of::<1>(entries, first, lines),
        2 => plane_of::<2>(entries, first, lines),
        4 => plane_of::<4>(entries, first, lines),
        _ => lines.copy_from_slice(entries),
    }
}

fn plane_of<const BITS: usize>(entries: &Entries, first: usize, lines: &mut [[u8; LINE]]) {
    let mask = (1 << BITS) - 1;
    for (l, line) in lines.iter_mut().enumerate() {
        *line = [0; LINE];
        for up in (0..8).step_by(BITS) {
            for (byte, code) in line.iter_mut().zip(&entries[l + up]) {
                *byte |= (code >> first & mask) << up;
            }
        }
    }
}

/// The formats of 32 weights a block: their codes, Q8_0 as signed weight plus 128, and the bits of
/// the scale.
fn plain_block(dtype: DType, block: &[u8], q: &mut Codes) -> [u8; 2] {
    let mut scale = [block[0], block[1]];
    match dtype {
        DType::Q4_0 | DType::IQ4_NL => nibbles(&block[2..], q),
        DType::Q4_1 => nibbles(&block[4..], q),
        DType::Q5_0 => {
            nibbles(&block[6..], q);
            fifth_bits(&block[2..6], q);
        }
        DType::Q5_1 => {
            nibbles(&block[8..], q);
            fifth_bits(&block[4..8], q);
        }
        DType::MXFP4 => {
            // A power of two, which bfloat16 holds exactly, subnormal ones too.
            scale = bf16::from_f32(e8m0_half(block[0])).to_le_bytes();
            nibbles(&block[1..], q);
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
        | DType::BF16 => {
            for (q, byte) in q.iter_mut().zip(&block[2..]) {
                *q = byte ^ 0x80;
            }
        }
    }
    scale
}

/// Sixteen low nibbles, then the high ones.
fn nibbles(bytes: &[u8], q: &mut Codes) {
    let (low, high) = q.split_at_mut(BLOCK / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

fn fifth_bits(bits: &[u8], q: &mut Codes) {
    for (q, bits) in q.as_chunks_mut::<8>().0.iter_mut().zip(bits) {
        for (i, q) in q.iter_mut().enumerate() {
            *q |= (bits >> i & 1) << 4;
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
    q: [u8; SUPER_K],
}

/// The formats of 256 weights a block.
fn super_block(dtype: DType, block: &[u8]) -> SuperBlock {
    let two = |at: usize| [block[at], block[at + 1]];
    let mut plain =
        SuperBlock { d: two(0), d_min: two(2), scales: [0; 16], minima: [0; 16], q: [0; SUPER_K] };
    match dtype {
        DType::Q2_K => {
            (plain.d, plain.d_min) = (two(80), two(82));
            plain.scales = std::array::from_fn(|i| block[i] & 15);
            plain.minima = std::array::from_fn(|i| block[i] >> 4);
            low_pairs(&block[16..80], &mut plain.q);
        }
        DType::Q3_K => {
            plain.d = two(108);
            let packed = block[96..108].first_chunk().expect("twelve bytes of scales");
            plain.scales = unpack_signed_scales(packed).map(i8::cast_unsigned);
            low_pairs(&block[32..96], &mut plain.q);
            add_bits(&block[..32], 2, &mut plain.q);
        }
        DType::Q6_K => {
            plain.d = two(208);
            plain.scales.copy_from_slice(&block[192..208]);
            q6_k(block, &mut plain.q);
        }
        DType::IQ4_XS => {
            plain.scales = std::array::from_fn(|i| iq4_xs_scale(block, i % SUPER));
            let bytes = block[8..].as_chunks::<{ BLOCK / 2 }>().0;
            for (q, bytes) in plain.q.as_chunks_mut().0.iter_mut().zip(bytes) {
                nibbles(bytes, q);
            }
        }
        DType::Q4_K | DType::Q5_K => {
            for i in 0..SUPER {
                (plain.scales[i], plain.minima[i]) = six_bits(&block[4..16], i);
            }
            if dtype == DType::Q4_K {
                long_nibbles(&block[16..], &mut plain.q);
            } else {
                long_nibbles(&block[48..], &mut plain.q);
                add_bits(&block[16..48], 4, &mut plain.q);
            }
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

/// Scale and minimum i of the eight 6-bit pairs in 12 bytes.
fn six_bits(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    }
}

/// The low nibbles of 32 bytes, then their high ones, and so on.
fn long_nibbles(bytes: &[u8], q: &mut [u8; SUPER_K]) {
    for (q, bytes) in q.as_chunks_mut::<64>().0.iter_mut().zip(bytes.as_chunks::<32>().0) {
        let (low, high) = q.split_at_mut(32);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = byte & 15;
            *high = byte >> 4;
        }
    }
}

/// Two-bit codes: four runs of 32 in every 32 bytes.
fn low_pairs(bytes: &[u8], q: &mut [u8; SUPER_K]) {
    for (q, bytes) in q.as_chunks_mut::<128>().0.iter_mut().zip(bytes.as_chunks::<32>().0) {
        for (part, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (q, byte) in q.iter_mut().zip(bytes) {
                *q = byte >> (2 * part) & 3;
            }
        }
    }
}

/// Bit j of 32 bytes becomes bit `up` of run j of 32 codes.
fn add_bits(bits: &[u8], up: usize, q: &mut [u8; SUPER_K]) {
    for (j, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (q, bits) in q.iter_mut().zip(bits) {
            *q |= (bits >> j & 1) << up;
        }
    }
}

/// Nibbles as two runs of 32 in every 64 bytes, low ones first, and two more bits each.
fn q6_k(block: &[u8], q: &mut [u8; SUPER_K]) {
    let (low, high) = block.split_at(128);
    let halves = low.as_chunks::<64>().0.iter().zip(high.as_chunks::<32>().0);
    for (q, (low, high)) in q.as_chunks_mut::<128>().0.iter_mut().zip(halves) {
        for (quarter, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = &low[quarter % 2 * 32..][..32];
            for ((q, low), high) in q.iter_mut().zip(low).zip(high) {
                let low = low >> (quarter / 2 * 4) & 15;
                *q = low | (high >> (2 * quarter) & 3) << 4;
            }
        }
    }
}
