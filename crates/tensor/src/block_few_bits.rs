//! Formats with 256 weights of two or three bits per block: `Q2_K`, `Q3_K`.
//!
//! Quantising is that of [`crate::block256`]: extremes, then the neighbouring representable scales.

use crate::DType;
use crate::block::{
    Block, f32_to_half, field, field_u16, grid_index, half_to_f32, index_byte, signed_extreme,
};
use crate::block32::join;
use crate::block256::{Affine, nearest_signed_scale};

/// `w = d sc q - dmin m` per group of 16, q in 0..4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ2_K {
    /// Per group of 16 weights the scale (low nibble) and the minimum (high nibble).
    pub scales: [u8; 16],
    /// Per 128 weights 32 bytes: bits 2k, 2k + 1 of byte l are weight 32 k + l.
    pub qs: [u8; 64],
    /// Scale of the group scales, half precision bits.
    pub d: u16,
    /// Scale of the group minima, half precision bits.
    pub dmin: u16,
}

/// `w = d sc (q - 4)` per group of 16, q in 0..8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ3_K {
    /// Bit g of byte l is the third bit of weight l of group g of 32.
    pub hmask: [u8; 32],
    /// The low two bits, as in [`BlockQ2_K::qs`].
    pub qs: [u8; 64],
    /// Sixteen 6-bit scales, stored plus 32; see [`unpack_signed_scales`].
    pub scales: [u8; 12],
    /// Scale of the group scales, half precision bits.
    pub d: u16,
}

const _: () = {
    assert!(size_of::<BlockQ2_K>() == DType::Q2_K.block_bytes());
    assert!(size_of::<BlockQ3_K>() == DType::Q3_K.block_bytes());
};

/// The sixteen scales of a `Q3_K` block, in -32..32.
///
/// Bytes 0..8 hold the low four bits: scale j in the low nibble of byte j, scale j + 8 in the high
/// one. Bits 2k, 2k + 1 of byte 8 + j are the high two bits of scale 4 k + j.
#[must_use]
pub fn unpack_signed_scales(packed: &[u8; 12]) -> [i8; 16] {
    std::array::from_fn(|j| {
        let low = (packed[j % 8] >> (4 * (j / 8))) & 15;
        let high = (packed[8 + j % 4] >> (2 * (j / 4))) & 3;
        (low | (high << 4)).cast_signed() - 32
    })
}

/// The inverse of [`unpack_signed_scales`]; scales are taken modulo 64.
#[must_use]
pub fn pack_signed_scales(scales: &[i8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, scale) in scales.iter().enumerate() {
        let stored = scale.wrapping_add(32).cast_unsigned();
        packed[j % 8] |= (stored & 15) << (4 * (j / 8));
        packed[8 + j % 4] |= ((stored >> 4) & 3) << (2 * (j / 4));
    }
    packed
}

impl Block<84, 256> for BlockQ2_K {
    fn from_bytes(bytes: &[u8; 84]) -> Self {
        BlockQ2_K {
            scales: field::<0, 16, 84>(bytes),
            qs: field::<16, 64, 84>(bytes),
            d: field_u16::<80, 84>(bytes),
            dmin: field_u16::<82, 84>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 84] {
        join(&[&self.scales, &self.qs, &self.d.to_le_bytes(), &self.dmin.to_le_bytes()])
    }

    fn values(&self) -> [f32; 256] {
        let (d, dmin) = (half_to_f32(self.d), half_to_f32(self.dmin));
        let indices = unpack_pairs(&self.qs);
        std::array::from_fn(|i| {
            let packed = self.scales[i / 16];
            let (step, start) = (d * f32::from(packed & 15), dmin * f32::from(packed >> 4));
            step * f32::from(indices[i]) - start
        })
    }

    fn nearest(values: &[f32; 256]) -> Self {
        let affine = Affine::<16>::nearest(values, 3, 15);
        BlockQ2_K {
            scales: std::array::from_fn(|g| affine.scales[g] | (affine.minima[g] << 4)),
            qs: pack_pairs(&affine.indices),
            d: affine.d,
            dmin: affine.dmin,
        }
    }
}

impl Block<110, 256> for BlockQ3_K {
    fn from_bytes(bytes: &[u8; 110]) -> Self {
        BlockQ3_K {
            hmask: field::<0, 32, 110>(bytes),
            qs: field::<32, 64, 110>(bytes),
            scales: field::<96, 12, 110>(bytes),
            d: field_u16::<108, 110>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 110] {
        join(&[&self.hmask, &self.qs, &self.scales, &self.d.to_le_bytes()])
    }

    fn values(&self) -> [f32; 256] {
        let d = half_to_f32(self.d);
        let scales = unpack_signed_scales(&self.scales);
        let low = unpack_pairs(&self.qs);
        std::array::from_fn(|i| {
            let high = (self.hmask[i % 32] >> (i / 32)) & 1;
            let q = f32::from(low[i] | (high << 2)) - 4.0;
            d * f32::from(scales[i / 16]) * q
        })
    }

    fn nearest(values: &[f32; 256]) -> Self {
        let (groups, _) = values.as_chunks::<16>();
        let wanted: [f32; 16] = std::array::from_fn(|g| signed_extreme(&groups[g]) / -4.0);
        let d = f32_to_half(signed_extreme(&wanted) / -32.0);
        let step = half_to_f32(d);
        let scales: [i8; 16] =
            std::array::from_fn(|g| nearest_signed_scale(&groups[g], wanted[g], step, -32, -4));
        let indices: [u8; 256] = std::array::from_fn(|i| {
            let scale = step * f32::from(scales[i / 16]);
            index_byte(grid_index(values[i], scale, -4, 3) + 4)
        });
        let mut hmask = [0; 32];
        for (i, index) in indices.iter().enumerate() {
            hmask[i % 32] |= (index >> 2) << (i / 32);
        }
        BlockQ3_K { hmask, qs: pack_pairs(&indices), scales: pack_signed_scales(&scales), d }
    }
}

/// 256 two-bit values in weight order; see [`BlockQ2_K::qs`].
fn unpack_pairs(qs: &[u8; 64]) -> [u8; 256] {
    std::array::from_fn(|i| (qs[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32))) & 3)
}

/// The inverse of [`unpack_pairs`]; bits above the second are dropped.
fn pack_pairs(indices: &[u8; 256]) -> [u8; 64] {
    std::array::from_fn(|byte| {
        let first = 128 * (byte / 32) + byte % 32;
        (0..4).fold(0, |bits, k| bits | ((indices[first + 32 * k] & 3) << (2 * k)))
    })
}
