//! Formats with 32 weights per block: `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`.

use crate::DType;
use crate::block::{
    Block, extremes, f32_to_half, field, field_u16, grid_index, half_to_f32, index_byte,
    pack_nibbles, signed_extreme, unpack_nibbles,
};

/// `w = d (q - 8)`, q in 0..16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale, half precision bits.
    pub d: u16,
    /// Weight j in the low nibble of byte j, weight j + 16 in the high nibble.
    pub qs: [u8; 16],
}

/// `w = d q + m`, q in 0..16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// Scale, half precision bits.
    pub d: u16,
    /// Minimum, half precision bits.
    pub m: u16,
    /// Nibbles as in [`BlockQ4_0::qs`].
    pub qs: [u8; 16],
}

/// `w = d (q - 16)`, q in 0..32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale, half precision bits.
    pub d: u16,
    /// Little-endian word whose bit j is the fifth bit of weight j.
    pub qh: [u8; 4],
    /// The low four bits, as in [`BlockQ4_0::qs`].
    pub qs: [u8; 16],
}

/// `w = d q + m`, q in 0..32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale, half precision bits.
    pub d: u16,
    /// Minimum, half precision bits.
    pub m: u16,
    /// Fifth bits as in [`BlockQ5_0::qh`].
    pub qh: [u8; 4],
    /// The low four bits, as in [`BlockQ4_0::qs`].
    pub qs: [u8; 16],
}

/// `w = d q`, q in -128..128 (quantisers use -127..=127).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale, half precision bits.
    pub d: u16,
    /// Weights in order.
    pub qs: [i8; 32],
}

const _: () = {
    assert!(size_of::<BlockQ4_0>() == DType::Q4_0.block_bytes());
    assert!(size_of::<BlockQ4_1>() == DType::Q4_1.block_bytes());
    assert!(size_of::<BlockQ5_0>() == DType::Q5_0.block_bytes());
    assert!(size_of::<BlockQ5_1>() == DType::Q5_1.block_bytes());
    assert!(size_of::<BlockQ8_0>() == DType::Q8_0.block_bytes());
};

impl Block<18, 32> for BlockQ4_0 {
    fn from_bytes(bytes: &[u8; 18]) -> Self {
        BlockQ4_0 { d: field_u16::<0, 18>(bytes), qs: field::<2, 16, 18>(bytes) }
    }

    fn to_bytes(&self) -> [u8; 18] {
        join(&[&self.d.to_le_bytes(), &self.qs])
    }

    fn values(&self) -> [f32; 32] {
        let d = half_to_f32(self.d);
        unpack_nibbles(&self.qs).map(|q| d * (f32::from(q) - 8.0))
    }

    fn nearest(values: &[f32; 32]) -> Self {
        let d = f32_to_half(signed_extreme(values) / -8.0);
        let indices = values.map(|x| index_byte(grid_index(x, half_to_f32(d), -8, 7) + 8));
        BlockQ4_0 { d, qs: pack_nibbles(&indices) }
    }
}

impl Block<20, 32> for BlockQ4_1 {
    fn from_bytes(bytes: &[u8; 20]) -> Self {
        BlockQ4_1 {
            d: field_u16::<0, 20>(bytes),
            m: field_u16::<2, 20>(bytes),
            qs: field::<4, 16, 20>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 20] {
        join(&[&self.d.to_le_bytes(), &self.m.to_le_bytes(), &self.qs])
    }

    fn values(&self) -> [f32; 32] {
        let (d, m) = (half_to_f32(self.d), half_to_f32(self.m));
        unpack_nibbles(&self.qs).map(|q| d * f32::from(q) + m)
    }

    fn nearest(values: &[f32; 32]) -> Self {
        let (d, m, indices) = nearest_affine(values, 15);
        BlockQ4_1 { d, m, qs: pack_nibbles(&indices) }
    }
}

impl Block<22, 32> for BlockQ5_0 {
    fn from_bytes(bytes: &[u8; 22]) -> Self {
        BlockQ5_0 {
            d: field_u16::<0, 22>(bytes),
            qh: field::<2, 4, 22>(bytes),
            qs: field::<6, 16, 22>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 22] {
        join(&[&self.d.to_le_bytes(), &self.qh, &self.qs])
    }

    fn values(&self) -> [f32; 32] {
        let d = half_to_f32(self.d);
        unpack_five_bits(&self.qs, self.qh).map(|q| d * (f32::from(q) - 16.0))
    }

    fn nearest(values: &[f32; 32]) -> Self {
        let d = f32_to_half(signed_extreme(values) / -16.0);
        let indices = values.map(|x| index_byte(grid_index(x, half_to_f32(d), -16, 15) + 16));
        BlockQ5_0 { d, qh: fifth_bits(&indices), qs: pack_nibbles(&indices) }
    }
}

impl Block<24, 32> for BlockQ5_1 {
    fn from_bytes(bytes: &[u8; 24]) -> Self {
        BlockQ5_1 {
            d: field_u16::<0, 24>(bytes),
            m: field_u16::<2, 24>(bytes),
            qh: field::<4, 4, 24>(bytes),
            qs: field::<8, 16, 24>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 24] {
        join(&[&self.d.to_le_bytes(), &self.m.to_le_bytes(), &self.qh, &self.qs])
    }

    fn values(&self) -> [f32; 32] {
        let (d, m) = (half_to_f32(self.d), half_to_f32(self.m));
        unpack_five_bits(&self.qs, self.qh).map(|q| d * f32::from(q) + m)
    }

    fn nearest(values: &[f32; 32]) -> Self {
        let (d, m, indices) = nearest_affine(values, 31);
        BlockQ5_1 { d, m, qh: fifth_bits(&indices), qs: pack_nibbles(&indices) }
    }
}

impl Block<34, 32> for BlockQ8_0 {
    fn from_bytes(bytes: &[u8; 34]) -> Self {
        let qs = field::<2, 32, 34>(bytes).map(u8::cast_signed);
        BlockQ8_0 { d: field_u16::<0, 34>(bytes), qs }
    }

    fn to_bytes(&self) -> [u8; 34] {
        join(&[&self.d.to_le_bytes(), &self.qs.map(i8::cast_unsigned)])
    }

    fn values(&self) -> [f32; 32] {
        let d = half_to_f32(self.d);
        self.qs.map(|q| f32::from(q) * d)
    }

    fn nearest(values: &[f32; 32]) -> Self {
        let d = f32_to_half(signed_extreme(values).abs() / 127.0);
        let qs = values.map(|x| index_byte(grid_index(x, half_to_f32(d), -127, 127)).cast_signed());
        BlockQ8_0 { d, qs }
    }
}

/// Scale and minimum (half bits) and grid indices in `0..=top` of `values`.
fn nearest_affine(values: &[f32; 32], top: i16) -> (u16, u16, [u8; 32]) {
    let (low, high) = extremes(values);
    let (d, m) = (f32_to_half((high - low) / f32::from(top)), f32_to_half(low));
    let (step, start) = (half_to_f32(d), half_to_f32(m));
    (d, m, values.map(|x| index_byte(grid_index(x - start, step, 0, top))))
}

/// Nibbles plus the fifth bit of each weight: 32 values in 0..32.
fn unpack_five_bits(qs: &[u8; 16], qh: [u8; 4]) -> [u8; 32] {
    let mut indices = unpack_nibbles(qs);
    for (j, index) in indices.iter_mut().enumerate() {
        *index |= ((qh[j / 8] >> (j % 8)) & 1) << 4;
    }
    indices
}

/// The word of fifth bits that [`unpack_five_bits`] reads.
fn fifth_bits(indices: &[u8; 32]) -> [u8; 4] {
    std::array::from_fn(|byte| {
        (0..8).fold(0, |bits, j| bits | (((indices[8 * byte + j] >> 4) & 1) << j))
    })
}

/// Concatenates the fields of a block; their lengths must add up to `BYTES`.
pub(crate) fn join<const BYTES: usize>(fields: &[&[u8]]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    let mut at = 0;
    for field in fields {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    }
    assert_eq!(at, BYTES, "block fields must fill the block");
    bytes
}
