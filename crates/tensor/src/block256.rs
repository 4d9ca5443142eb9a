//! Formats with 256 weights per block: `Q4_K`, `Q5_K`, `Q6_K`.
//!
//! Quantising picks each group's scale and minimum from the extremes, then tries the neighbouring
//! representable pairs and keeps the one with the least squared error. It is meant for tests and
//! tools; llama.cpp's weighted search gives slightly better files.

use crate::DType;
use crate::block::{
    Block, extremes, f32_to_half, field, field_u16, grid_index, half_to_f32, index_byte,
    signed_extreme,
};

/// `w = d sc q - dmin m` per group of 32, q in 0..16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ4_K {
    /// Scale of the group scales, half precision bits.
    pub d: u16,
    /// Scale of the group minima, half precision bits.
    pub dmin: u16,
    /// Eight 6-bit scales and eight 6-bit minima; see [`unpack_scales`].
    pub scales: [u8; 12],
    /// Per 64 weights 32 bytes: low nibbles are the first 32 weights, high nibbles the next 32.
    pub qs: [u8; 128],
}

/// `w = d sc q - dmin m` per group of 32, q in 0..32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ5_K {
    /// Scale of the group scales, half precision bits.
    pub d: u16,
    /// Scale of the group minima, half precision bits.
    pub dmin: u16,
    /// As in [`BlockQ4_K::scales`].
    pub scales: [u8; 12],
    /// Bit g of byte l is the fifth bit of weight l of group g.
    pub qh: [u8; 32],
    /// The low four bits, as in [`BlockQ4_K::qs`].
    pub qs: [u8; 128],
}

/// `w = d sc (q - 32)` per group of 16, q in 0..64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ6_K {
    /// Low four bits. Per 128 weights 64 bytes: low nibbles are weights 0..64, high 64..128.
    pub ql: [u8; 128],
    /// High two bits. Per 128 weights 32 bytes: bits 2k, 2k + 1 of byte l are weight 32 k + l.
    pub qh: [u8; 64],
    /// One scale per 16 weights, in order.
    pub scales: [i8; 16],
    /// Scale of the group scales, half precision bits.
    pub d: u16,
}

const _: () = {
    assert!(size_of::<BlockQ4_K>() == DType::Q4_K.block_bytes());
    assert!(size_of::<BlockQ5_K>() == DType::Q5_K.block_bytes());
    assert!(size_of::<BlockQ6_K>() == DType::Q6_K.block_bytes());
};

/// The eight 6-bit scales and eight 6-bit minima of a `Q4_K` or `Q5_K` block.
///
/// Bytes 0..4 hold scales 0..4 and bytes 4..8 minima 0..4 in their low six bits. Bytes 8..12 hold
/// the low nibbles of scales (low) and minima (high) 4..8, whose two high bits sit in the top bits
/// of bytes 0..4 and 4..8.
#[must_use]
pub fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = packed[j] & 63;
        minima[j] = packed[j + 4] & 63;
        scales[j + 4] = (packed[j + 8] & 15) | ((packed[j] >> 6) << 4);
        minima[j + 4] = (packed[j + 8] >> 4) | ((packed[j + 4] >> 6) << 4);
    }
    (scales, minima)
}

/// The inverse of [`unpack_scales`]; bits above the sixth are dropped.
#[must_use]
pub fn pack_scales(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = (scales[j] & 63) | ((scales[j + 4] >> 4) << 6);
        packed[j + 4] = (minima[j] & 63) | ((minima[j + 4] >> 4) << 6);
        packed[j + 8] = (scales[j + 4] & 15) | ((minima[j + 4] & 15) << 4);
    }
    packed
}

impl Block<144, 256> for BlockQ4_K {
    fn from_bytes(bytes: &[u8; 144]) -> Self {
        BlockQ4_K {
            d: field_u16::<0, 144>(bytes),
            dmin: field_u16::<2, 144>(bytes),
            scales: field::<4, 12, 144>(bytes),
            qs: field::<16, 128, 144>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 144] {
        let mut bytes = [0; 144];
        bytes[..2].copy_from_slice(&self.d.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.dmin.to_le_bytes());
        bytes[4..16].copy_from_slice(&self.scales);
        bytes[16..].copy_from_slice(&self.qs);
        bytes
    }

    fn values(&self) -> [f32; 256] {
        affine_values(self.d, self.dmin, &self.scales, &unpack_group_nibbles(&self.qs))
    }

    fn nearest(values: &[f32; 256]) -> Self {
        let affine = Affine::<8>::nearest(values, 15, 63);
        BlockQ4_K {
            d: affine.d,
            dmin: affine.dmin,
            scales: pack_scales(&affine.scales, &affine.minima),
            qs: pack_group_nibbles(&affine.indices),
        }
    }
}

impl Block<176, 256> for BlockQ5_K {
    fn from_bytes(bytes: &[u8; 176]) -> Self {
        BlockQ5_K {
            d: field_u16::<0, 176>(bytes),
            dmin: field_u16::<2, 176>(bytes),
            scales: field::<4, 12, 176>(bytes),
            qh: field::<16, 32, 176>(bytes),
            qs: field::<48, 128, 176>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 176] {
        let mut bytes = [0; 176];
        bytes[..2].copy_from_slice(&self.d.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.dmin.to_le_bytes());
        bytes[4..16].copy_from_slice(&self.scales);
        bytes[16..48].copy_from_slice(&self.qh);
        bytes[48..].copy_from_slice(&self.qs);
        bytes
    }

    fn values(&self) -> [f32; 256] {
        let mut indices = unpack_group_nibbles(&self.qs);
        for (i, index) in indices.iter_mut().enumerate() {
            *index |= ((self.qh[i % 32] >> (i / 32)) & 1) << 4;
        }
        affine_values(self.d, self.dmin, &self.scales, &indices)
    }

    fn nearest(values: &[f32; 256]) -> Self {
        let affine = Affine::<8>::nearest(values, 31, 63);
        let mut qh = [0; 32];
        for (i, index) in affine.indices.iter().enumerate() {
            qh[i % 32] |= ((index >> 4) & 1) << (i / 32);
        }
        BlockQ5_K {
            d: affine.d,
            dmin: affine.dmin,
            scales: pack_scales(&affine.scales, &affine.minima),
            qh,
            qs: pack_group_nibbles(&affine.indices),
        }
    }
}

impl Block<210, 256> for BlockQ6_K {
    fn from_bytes(bytes: &[u8; 210]) -> Self {
        BlockQ6_K {
            ql: field::<0, 128, 210>(bytes),
            qh: field::<128, 64, 210>(bytes),
            scales: field::<192, 16, 210>(bytes).map(u8::cast_signed),
            d: field_u16::<208, 210>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 210] {
        let mut bytes = [0; 210];
        bytes[..128].copy_from_slice(&self.ql);
        bytes[128..192].copy_from_slice(&self.qh);
        bytes[192..208].copy_from_slice(&self.scales.map(i8::cast_unsigned));
        bytes[208..].copy_from_slice(&self.d.to_le_bytes());
        bytes
    }

    fn values(&self) -> [f32; 256] {
        let d = half_to_f32(self.d);
        let mut values = [0.0; 256];
        for (i, value) in values.iter_mut().enumerate() {
            let place = SixBits::of(i);
            let low = (self.ql[place.ql] >> place.ql_shift) & 15;
            let high = (self.qh[place.qh] >> place.qh_shift) & 3;
            let q = f32::from(low | (high << 4)) - 32.0;
            *value = d * f32::from(self.scales[i / 16]) * q;
        }
        values
    }

    fn nearest(values: &[f32; 256]) -> Self {
        let (groups, _) = values.as_chunks::<16>();
        let wanted: [f32; 16] = std::array::from_fn(|g| signed_extreme(&groups[g]) / -32.0);
        let d = f32_to_half(signed_extreme(&wanted) / -128.0);
        let step = half_to_f32(d);
        let scales: [i8; 16] =
            std::array::from_fn(|g| nearest_signed_scale(&groups[g], wanted[g], step, -128, -32));
        let (mut ql, mut qh) = ([0; 128], [0; 64]);
        for (i, &value) in values.iter().enumerate() {
            let scale = step * f32::from(scales[i / 16]);
            let index = index_byte(grid_index(value, scale, -32, 31) + 32);
            let place = SixBits::of(i);
            ql[place.ql] |= (index & 15) << place.ql_shift;
            qh[place.qh] |= (index >> 4) << place.qh_shift;
        }
        BlockQ6_K { ql, qh, scales, d }
    }
}

/// Where the six bits of one `Q6_K` weight are.
struct SixBits {
    ql: usize,
    ql_shift: usize,
    qh: usize,
    qh_shift: usize,
}

impl SixBits {
    /// The place of weight `i` in 0..256.
    fn of(i: usize) -> SixBits {
        let (half, within) = (i / 128, i % 128);
        SixBits {
            ql: 64 * half + within % 64,
            ql_shift: 4 * (within / 64),
            qh: 32 * half + within % 32,
            qh_shift: 2 * (within / 32),
        }
    }
}

/// The representable scale next to `wanted` with the least squared error over `group`.
///
/// Scales and grid indices are signed and given by their lowest values: `low..=-low - 1`.
pub(crate) fn nearest_signed_scale(
    group: &[f32],
    wanted: f32,
    step: f32,
    low_scale: i16,
    low_index: i16,
) -> i8 {
    let high_scale = -low_scale - 1;
    let near = grid_index(wanted, step, low_scale, high_scale);
    let candidates = [near, (near - 1).max(low_scale), (near + 1).min(high_scale)];
    let error = |&candidate: &i16| {
        let scale = step * f32::from(candidate);
        let rounded = |x| scale * f32::from(grid_index(x, scale, low_index, -low_index - 1));
        squared_error(group, rounded)
    };
    let best = candidates.into_iter().min_by(|a, b| error(a).total_cmp(&error(b)));
    index_byte(best.unwrap_or(near)).cast_signed()
}

/// Scales, minima and grid indices of a block of `GROUPS` groups with minima, before packing.
pub(crate) struct Affine<const GROUPS: usize> {
    pub(crate) d: u16,
    pub(crate) dmin: u16,
    pub(crate) scales: [u8; GROUPS],
    pub(crate) minima: [u8; GROUPS],
    pub(crate) indices: [u8; 256],
}

impl<const GROUPS: usize> Affine<GROUPS> {
    /// Quantises with indices in `0..=top` and with scales and minima in `0..=most`.
    pub(crate) fn nearest(values: &[f32; 256], top: i16, most: i16) -> Affine<GROUPS> {
        let len = const { 256 / GROUPS };
        let group = |g: usize| &values[g * len..(g + 1) * len];
        // A minimum is stored as a magnitude to subtract, so a group above zero starts at zero.
        let wanted: [(f32, f32); GROUPS] = std::array::from_fn(|g| {
            let (low, high) = extremes(group(g));
            let low = low.min(0.0);
            ((high - low) / f32::from(top), -low)
        });
        let largest = |pick: fn(&(f32, f32)) -> f32| wanted.iter().map(pick).fold(0.0, f32::max);
        let most_value = f32::from(most);
        let (d, dmin) = (
            f32_to_half(largest(|w| w.0) / most_value),
            f32_to_half(largest(|w| w.1) / most_value),
        );
        let steps = (half_to_f32(d), half_to_f32(dmin));
        let (mut scales, mut minima, mut indices) = ([0; GROUPS], [0; GROUPS], [0; 256]);
        for g in 0..GROUPS {
            let (scale, minimum) = nearest_group(group(g), wanted[g], steps, top, most);
            scales[g] = index_byte(scale);
            minima[g] = index_byte(minimum);
            let (step, start) = (steps.0 * f32::from(scale), steps.1 * f32::from(minimum));
            for (index, &x) in indices[len * g..].iter_mut().zip(group(g)) {
                *index = index_byte(grid_index(x + start, step, 0, top));
            }
        }
        Affine { d, dmin, scales, minima, indices }
    }
}

/// The representable (scale, minimum) next to `wanted` with the least squared error over `group`.
fn nearest_group(
    group: &[f32],
    wanted: (f32, f32),
    steps: (f32, f32),
    top: i16,
    most: i16,
) -> (i16, i16) {
    let near = (grid_index(wanted.0, steps.0, 0, most), grid_index(wanted.1, steps.1, 0, most));
    let mut best = (f32::INFINITY, near);
    for (scale_shift, minimum_shift) in
        [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    {
        let candidate =
            ((near.0 + scale_shift).clamp(0, most), (near.1 + minimum_shift).clamp(0, most));
        let (step, start) = (steps.0 * f32::from(candidate.0), steps.1 * f32::from(candidate.1));
        let error =
            squared_error(group, |x| step * f32::from(grid_index(x + start, step, 0, top)) - start);
        if error < best.0 {
            best = (error, candidate);
        }
    }
    best.1
}

pub(crate) fn squared_error(group: &[f32], rounded: impl Fn(f32) -> f32) -> f32 {
    group.iter().map(|&x| (x - rounded(x)).powi(2)).sum()
}

/// `d sc q - dmin m`, in ggml's order of operations.
fn affine_values(d: u16, dmin: u16, packed: &[u8; 12], indices: &[u8; 256]) -> [f32; 256] {
    let (d, dmin) = (half_to_f32(d), half_to_f32(dmin));
    let (scales, minima) = unpack_scales(packed);
    std::array::from_fn(|i| {
        let (step, start) = (d * f32::from(scales[i / 32]), dmin * f32::from(minima[i / 32]));
        step * f32::from(indices[i]) - start
    })
}

/// 256 nibbles in weight order; see [`BlockQ4_K::qs`].
fn unpack_group_nibbles(qs: &[u8; 128]) -> [u8; 256] {
    std::array::from_fn(|i| (qs[32 * (i / 64) + i % 32] >> (4 * ((i / 32) % 2))) & 15)
}

/// The inverse of [`unpack_group_nibbles`]; bits above the fourth are dropped.
fn pack_group_nibbles(indices: &[u8; 256]) -> [u8; 128] {
    std::array::from_fn(|byte| {
        let first = 64 * (byte / 32) + byte % 32;
        (indices[first] & 15) | (indices[first + 32] << 4)
    })
}
