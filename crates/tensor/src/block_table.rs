//! Formats whose four bits are an index into a table of sixteen values: `IQ4_NL`, `IQ4_XS`, `MXFP4`.

use crate::DType;
use crate::block::{
    Block, f32_to_half, field, field_u16, grid_index, half_to_f32, index_byte, pack_nibbles,
    signed_extreme, unpack_nibbles,
};
use crate::block32::join;
use crate::block256::squared_error;

/// What the indices of `IQ4_NL` and `IQ4_XS` stand for (`kvalues_iq4nl` of ggml).
pub const IQ4_TABLE: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// What the indices of `MXFP4` stand for, doubled: E2M1 floats, the fourth bit being the sign.
/// Index 8 is zero, not negative zero, as in ggml (`kvalues_mxfp4`).
pub const E2M1_TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// `w = d t[q]` with [`IQ4_TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockIQ4_NL {
    /// Scale, half precision bits.
    pub d: u16,
    /// Weight j in the low nibble of byte j, weight j + 16 in the high nibble.
    pub qs: [u8; 16],
}

/// `w = d (sc - 32) t[q]` per group of 32, with [`IQ4_TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockIQ4_XS {
    /// Scale of the group scales, half precision bits.
    pub d: u16,
    /// Bits 2g, 2g + 1 are the high two bits of the scale of group g.
    pub scales_h: u16,
    /// Low four bits of the scales: nibble g is that of group g, low nibble first.
    pub scales_l: [u8; 4],
    /// Per group 16 bytes, nibbles as in [`BlockIQ4_NL::qs`].
    pub qs: [u8; 128],
}

/// `w = 2^(e - 128) t[q]` with [`E2M1_TABLE`]; see [`e8m0_half`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BlockMXFP4 {
    /// Exponent of the scale, biased (E8M0).
    pub e: u8,
    /// Nibbles as in [`BlockIQ4_NL::qs`].
    pub qs: [u8; 16],
}

const _: () = {
    assert!(size_of::<BlockIQ4_NL>() == DType::IQ4_NL.block_bytes());
    assert!(size_of::<BlockIQ4_XS>() == DType::IQ4_XS.block_bytes());
    assert!(size_of::<BlockMXFP4>() == DType::MXFP4.block_bytes());
};

/// Half of the E8M0 scale `e`: 2^(e - 128), since [`E2M1_TABLE`] is doubled.
///
/// The two lowest are subnormal. 255, which the OCP specification makes NaN, is 2^127 as in ggml.
#[must_use]
pub const fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

impl Block<18, 32> for BlockIQ4_NL {
    fn from_bytes(bytes: &[u8; 18]) -> Self {
        BlockIQ4_NL { d: field_u16::<0, 18>(bytes), qs: field::<2, 16, 18>(bytes) }
    }

    fn to_bytes(&self) -> [u8; 18] {
        join(&[&self.d.to_le_bytes(), &self.qs])
    }

    fn values(&self) -> [f32; 32] {
        let d = half_to_f32(self.d);
        unpack_nibbles(&self.qs).map(|q| d * table_value(&IQ4_TABLE, q))
    }

    fn nearest(values: &[f32; 32]) -> Self {
        let d = f32_to_half(signed_extreme(values) / -127.0);
        let step = half_to_f32(d);
        BlockIQ4_NL { d, qs: pack_nibbles(&values.map(|x| iq4_index(x, step))) }
    }
}

impl Block<136, 256> for BlockIQ4_XS {
    fn from_bytes(bytes: &[u8; 136]) -> Self {
        BlockIQ4_XS {
            d: field_u16::<0, 136>(bytes),
            scales_h: field_u16::<2, 136>(bytes),
            scales_l: field::<4, 4, 136>(bytes),
            qs: field::<8, 128, 136>(bytes),
        }
    }

    fn to_bytes(&self) -> [u8; 136] {
        join(&[&self.d.to_le_bytes(), &self.scales_h.to_le_bytes(), &self.scales_l, &self.qs])
    }

    fn values(&self) -> [f32; 256] {
        let d = half_to_f32(self.d);
        let mut values = [0.0; 256];
        for (g, group) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = i16::from(self.scales_l[g / 2] >> (4 * (g % 2))) & 15;
            let high = (self.scales_h >> (2 * g)).cast_signed() & 3;
            let step = d * f32::from((low | (high << 4)) - 32);
            let qs = &self.qs.as_chunks::<16>().0[g];
            *group = unpack_nibbles(qs).map(|q| step * table_value(&IQ4_TABLE, q));
        }
        values
    }

    fn nearest(values: &[f32; 256]) -> Self {
        let (groups, _) = values.as_chunks::<32>();
        let wanted: [f32; 8] = std::array::from_fn(|g| signed_extreme(&groups[g]) / -127.0);
        let d = f32_to_half(signed_extreme(&wanted) / -32.0);
        let mut block = BlockIQ4_XS { d, scales_h: 0, scales_l: [0; 4], qs: [0; 128] };
        for (g, (group, qs)) in groups.iter().zip(block.qs.as_chunks_mut::<16>().0).enumerate() {
            let scale = nearest_table_scale(group, wanted[g], half_to_f32(d));
            let step = half_to_f32(d) * f32::from(scale);
            *qs = pack_nibbles(&group.map(|x| iq4_index(x, step)));
            let stored = index_byte(scale + 32);
            block.scales_l[g / 2] |= (stored & 15) << (4 * (g % 2));
            block.scales_h |= u16::from(stored >> 4) << (2 * g);
        }
        block
    }
}

impl Block<17, 32> for BlockMXFP4 {
    fn from_bytes(bytes: &[u8; 17]) -> Self {
        BlockMXFP4 { e: bytes[0], qs: field::<1, 16, 17>(bytes) }
    }

    fn to_bytes(&self) -> [u8; 17] {
        join(&[&[self.e], &self.qs])
    }

    fn values(&self) -> [f32; 32] {
        let d = e8m0_half(self.e);
        unpack_nibbles(&self.qs).map(|q| d * table_value(&E2M1_TABLE, q))
    }

    /// The scale is that of the OCP specification: the exponent of the largest magnitude minus two,
    /// so that magnitudes above 1.5 times that power of two are clamped.
    fn nearest(values: &[f32; 32]) -> Self {
        let exponent = (signed_extreme(values).to_bits() >> 23) & 255;
        // Infinity has exponent 255; 252 is that of the largest finite number.
        let e = u8::try_from(exponent.saturating_sub(2).min(252)).expect("at most 252");
        BlockMXFP4 { e, qs: pack_nibbles(&values.map(|x| e2m1_index(x, e8m0_half(e)))) }
    }
}

fn table_value(table: &[i8; 16], index: u8) -> f32 {
    f32::from(table[usize::from(index & 15)])
}

/// The index into [`IQ4_TABLE`] of the value nearest to `value / step`.
fn iq4_index(value: f32, step: f32) -> u8 {
    let ratio = if step == 0.0 { 0.0 } else { value / step };
    let below = |pair: &&[i8; 2]| ratio > (f32::from(pair[0]) + f32::from(pair[1])) / 2.0;
    let index = IQ4_TABLE.array_windows::<2>().filter(below).count();
    u8::try_from(index).expect("sixteen values have fifteen gaps")
}

/// The index into [`E2M1_TABLE`] of the value nearest to `value / step`; a tie goes to the smaller
/// magnitude, as in the package `gguf`.
fn e2m1_index(value: f32, step: f32) -> u8 {
    let magnitude = (value / step).abs();
    let below = |pair: &&[i8; 2]| magnitude > (f32::from(pair[0]) + f32::from(pair[1])) / 2.0;
    let index = E2M1_TABLE[..8].array_windows::<2>().filter(below).count();
    let sign = if value < 0.0 { 8 } else { 0 };
    sign | u8::try_from(index).expect("eight values have seven gaps")
}

/// The representable scale next to `wanted` with the least squared error over `group`.
fn nearest_table_scale(group: &[f32; 32], wanted: f32, step: f32) -> i16 {
    let near = grid_index(wanted, step, -32, 31);
    let candidates = [near, (near - 1).max(-32), (near + 1).min(31)];
    let error = |&candidate: &i16| {
        let scale = step * f32::from(candidate);
        squared_error(group, |x| scale * table_value(&IQ4_TABLE, iq4_index(x, scale)))
    };
    candidates.into_iter().min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(near)
}
