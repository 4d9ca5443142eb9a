//! What every block format has in common: trait [`Block`] and the bit packing that formats share.

use half::f16;

/// A block of `LEN` weights stored in `BYTES` bytes, in ggml's layout.
///
/// A block is parsed by copying, so its bytes need no alignment.
pub trait Block<const BYTES: usize, const LEN: usize>: Sized {
    /// Parses the block. Every bit pattern is a block; scales may be infinite or NaN.
    fn from_bytes(bytes: &[u8; BYTES]) -> Self;

    /// The stored form of the block.
    fn to_bytes(&self) -> [u8; BYTES];

    /// The weights that the block stands for, bit for bit those of ggml's `dequantize_row_*`.
    fn values(&self) -> [f32; LEN];

    /// A block near `values`: scales from the extremes, each weight rounded to the nearest grid
    /// value. Values beyond the range of the scales are clamped; NaN gets grid index 0.
    fn nearest(values: &[f32; LEN]) -> Self;
}

/// The value of a half-precision bit pattern.
pub(crate) fn half_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// The half-precision bit pattern nearest to `value`, clamped to the finite range so that no
/// scale becomes infinite.
pub(crate) fn f32_to_half(value: f32) -> u16 {
    f16::from_f32(value.clamp(f16::MIN.to_f32_const(), f16::MAX.to_f32_const())).to_bits()
}

/// `value / step` rounded to an integer in `[low, high]`; 0 (clamped) when `step` is 0.
pub(crate) fn grid_index(value: f32, step: f32, low: i16, high: i16) -> i16 {
    if step == 0.0 {
        return 0i16.clamp(low, high);
    }
    let index = (value / step).round().clamp(f32::from(low), f32::from(high));
    #[expect(clippy::cast_possible_truncation, reason = "clamped to an i16 range; NaN becomes 0")]
    let index = index as i16;
    index.clamp(low, high)
}

/// Low byte of a grid index that is known to lie in `0..256` or, for signed grids, `-128..128`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "callers clamp the index to the width of the format; signed grids keep two's complement"
)]
pub(crate) fn index_byte(index: i16) -> u8 {
    index as u8
}

/// The element with the largest magnitude, sign kept; 0 for an all-NaN slice.
pub(crate) fn signed_extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |best: f32, &value| if value.abs() > best.abs() { value } else { best })
}

/// The smallest and largest element, NaN ignored; `(0, 0)` for an all-NaN slice.
pub(crate) fn extremes(values: &[f32]) -> (f32, f32) {
    let start = (f32::INFINITY, f32::NEG_INFINITY);
    let (low, high) = values.iter().fold(start, |(low, high), &x| (low.min(x), high.max(x)));
    if low > high { (0.0, 0.0) } else { (low, high) }
}

/// Splits 16 bytes into 32 nibbles: element j is the low nibble of byte j, element j + 16 the high.
pub(crate) fn unpack_nibbles(qs: &[u8; 16]) -> [u8; 32] {
    let mut nibbles = [0; 32];
    for (j, &byte) in qs.iter().enumerate() {
        nibbles[j] = byte & 15;
        nibbles[j + 16] = byte >> 4;
    }
    nibbles
}

/// The inverse of [`unpack_nibbles`]; bits above the fourth are dropped.
pub(crate) fn pack_nibbles(nibbles: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| (nibbles[j] & 15) | (nibbles[j + 16] << 4))
}

/// A fixed-size piece of `bytes`, for parsing block fields. `AT + N` must be inside the block.
pub(crate) fn field<const AT: usize, const N: usize, const BYTES: usize>(
    bytes: &[u8; BYTES],
) -> [u8; N] {
    const { assert!(AT + N <= BYTES, "a block field lies outside its block") };
    std::array::from_fn(|i| bytes[AT + i])
}

/// The little-endian `u16` at byte `AT`.
pub(crate) fn field_u16<const AT: usize, const BYTES: usize>(bytes: &[u8; BYTES]) -> u16 {
    u16::from_le_bytes(field::<AT, 2, BYTES>(bytes))
}
