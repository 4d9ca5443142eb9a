//! AVX2 with FMA and F16C: two registers are sixteen lanes, lanes 0..8 first.
#![expect(unsafe_code, reason = "vector intrinsics; the token proves that they exist")]

mod dot;

use crate::lanes::Kernel;
use core::arch::x86_64::*;
use dot::{add_16_bytes, add_nibbles, start_bytes};

/// Proof that this CPU has AVX2, FMA and F16C. Only [`Avx2::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2 {
    ahead: usize,
}

impl Avx2 {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<Avx2> {
        let present = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then(|| Avx2 { ahead: super::ahead() })
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves that every feature `inside` enables is present.
        unsafe { inside(self, kernel) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn inside<K: Kernel>(token: Avx2, kernel: K) -> K::Out {
    kernel.run(token)
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: `bytes` is 32 readable bytes, and the load has no alignment requirement.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: `bytes` is 16 readable bytes, and the load has no alignment requirement.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_8(values: &[f32; 8]) -> __m256 {
    // SAFETY: `values` is 32 readable bytes, and the load has no alignment requirement.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_8(v: __m256, out: &mut [f32; 8]) {
    // SAFETY: `out` is 32 writable bytes, and the store has no alignment requirement.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn splat(x: f32) -> [__m256; 2] {
    [_mm256_set1_ps(x); 2]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(values: &[f32; 16]) -> [__m256; 2] {
    let (halves, _) = values.as_chunks::<8>();
    [load_8(&halves[0]), load_8(&halves[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store(v: [__m256; 2], out: &mut [f32; 16]) {
    let (halves, _) = out.as_chunks_mut::<8>();
    store_8(v[0], &mut halves[0]);
    store_8(v[1], &mut halves[1]);
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_f32(bytes: &[u8; 64]) -> [__m256; 2] {
    let (halves, _) = bytes.as_chunks::<32>();
    [_mm256_castsi256_ps(load_32(&halves[0])), _mm256_castsi256_ps(load_32(&halves[1]))]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn load_f16(bytes: &[u8; 32]) -> [__m256; 2] {
    let (halves, _) = bytes.as_chunks::<16>();
    [_mm256_cvtph_ps(load_16(&halves[0])), _mm256_cvtph_ps(load_16(&halves[1]))]
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_bf16(half: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_bf16(bytes: &[u8; 32]) -> [__m256; 2] {
    let (halves, _) = bytes.as_chunks::<16>();
    [widen_bf16(load_16(&halves[0])), widen_bf16(load_16(&halves[1]))]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_u8(bytes: &[u8; 16]) -> [__m256; 2] {
    let v = load_16(bytes);
    [
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)),
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(v))),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_i8(bytes: &[u8; 16]) -> [__m256; 2] {
    let v = load_16(bytes);
    [
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(v))),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
    [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sub(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
    [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
    [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn div(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
    [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn max(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
    [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn min(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
    [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn fma(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
    [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn abs(v: [__m256; 2]) -> [__m256; 2] {
    let sign = _mm256_set1_ps(-0.0);
    [_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn copy_sign(magnitude: [__m256; 2], sign: [__m256; 2]) -> [__m256; 2] {
    let bit = _mm256_set1_ps(-0.0);
    [
        _mm256_or_ps(magnitude[0], _mm256_and_ps(sign[0], bit)),
        _mm256_or_ps(magnitude[1], _mm256_and_ps(sign[1], bit)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn round(v: [__m256; 2]) -> [__m256; 2] {
    [
        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[0]),
        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[1]),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn power_of_two(n: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn exp2i(n: [__m256; 2]) -> [__m256; 2] {
    [power_of_two(n[0]), power_of_two(n[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn select_less(
    a: [__m256; 2],
    b: [__m256; 2],
    then: [__m256; 2],
    other: [__m256; 2],
) -> [__m256; 2] {
    [
        _mm256_blendv_ps(other[0], then[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
        _mm256_blendv_ps(other[1], then[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum(v: [__m256; 2]) -> f32 {
    let eight = _mm256_add_ps(v[0], v[1]);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn largest_magnitude(a: [__m256; 2], b: [__m256; 2]) -> f32 {
    // As integers, which puts a NaN after infinity.
    let (a, b) = (abs(a), abs(b));
    let a = _mm256_max_epu32(_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1]));
    let b = _mm256_max_epu32(_mm256_castps_si256(b[0]), _mm256_castps_si256(b[1]));
    let eight = _mm256_max_epu32(a, b);
    let four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
    let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0x4e>(four));
    let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0xb1>(two));
    f32::from_bits(_mm_cvtsi128_si32(one).cast_unsigned())
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn integer_sums([a, b, c, d]: [[__m256; 2]; 4]) -> [i32; 4] {
    let (a, b) = (_mm256_add_ps(a[0], a[1]), _mm256_add_ps(b[0], b[1]));
    let (c, d) = (_mm256_add_ps(c[0], c[1]), _mm256_add_ps(d[0], d[1]));
    let (ab, cd) = (_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    // Both halves of `all` hold lanes of each.
    let all = _mm256_hadd_ps(ab, cd);
    let sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
    let sums = _mm_cvtps_epi32(sums);
    let mut out = [0; 4];
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), sums) };
    out
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn maximum(v: [__m256; 2]) -> f32 {
    let eight = _mm256_max_ps(v[0], v[1]);
    let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_i8(v: [__m256; 2], out: &mut [i8; 16]) {
    let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
    // packs works inside 128-bit halves: put the 64-bit groups back in order.
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
    let bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn splat_i(x: i32) -> [__m256i; 2] {
    [_mm256_set1_epi32(x); 2]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn to_f32(v: [__m256i; 2]) -> [__m256; 2] {
    [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn times_256(v: [__m256i; 2]) -> [__m256i; 2] {
    [_mm256_slli_epi32::<8>(v[0]), _mm256_slli_epi32::<8>(v[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_i(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
    [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn nibbles(tile: &[u8; 256]) -> [[__m256i; 2]; 8] {
    let (parts, _) = tile.as_chunks::<32>();
    let mask = _mm256_set1_epi8(0x0f);
    let mut out = [[mask; 2]; 8];
    for j in 0..4 {
        for h in 0..2 {
            let packed = load_32(&parts[2 * j + h]);
            out[j][h] = _mm256_and_si256(packed, mask);
            out[j + 4][h] = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
        }
    }
    out
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_codes(line: &[u8; 64]) -> [__m256i; 2] {
    let (halves, _) = line.as_chunks::<32>();
    [load_32(&halves[0]), load_32(&halves[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
fn shift_mask_half(v: __m256i, left: i32, mask: u8) -> __m256i {
    let shifted = if left < 0 {
        _mm256_srl_epi16(v, _mm_cvtsi32_si128(-left))
    } else {
        _mm256_sll_epi16(v, _mm_cvtsi32_si128(left))
    };
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask.cast_signed()))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn shift_mask(v: [__m256i; 2], left: i32, mask: u8) -> [__m256i; 2] {
    [shift_mask_half(v[0], left, mask), shift_mask_half(v[1], left, mask)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn or(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
    [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_bytes(v: [__m256i; 2], addend: u8) -> [__m256i; 2] {
    let addend = _mm256_set1_epi8(addend.cast_signed());
    [_mm256_add_epi8(v[0], addend), _mm256_add_epi8(v[1], addend)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn lookup(v: [__m256i; 2], table: &[u8; 16]) -> [__m256i; 2] {
    let table = _mm256_broadcastsi128_si256(load_16(table));
    [_mm256_shuffle_epi8(table, v[0]), _mm256_shuffle_epi8(table, v[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn bytes(tile: &[u8; 512]) -> [[__m256i; 2]; 8] {
    let (parts, _) = tile.as_chunks::<32>();
    let mut out = [[_mm256_setzero_si256(); 2]; 8];
    for (j, lane) in out.iter_mut().enumerate() {
        *lane = [load_32(&parts[2 * j]), load_32(&parts[2 * j + 1])];
    }
    out
}

#[inline]
#[target_feature(enable = "avx2")]
fn unpack_half(v: __m256i) -> [__m256; 4] {
    let mask = _mm256_set1_epi32(0xff);
    [
        _mm256_cvtepi32_ps(_mm256_and_si256(v, mask)),
        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<8>(v), mask)),
        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<16>(v), mask)),
        _mm256_cvtepi32_ps(_mm256_srli_epi32::<24>(v)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn unpack_bytes(v: [__m256i; 2]) -> [[__m256; 2]; 4] {
    let low = unpack_half(v[0]);
    let high = unpack_half(v[1]);
    [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch(from: &[u8], offset: usize) {
    _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(offset).cast());
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch_l2(from: &[u8], offset: usize) {
    _mm_prefetch::<_MM_HINT_T1>(from.as_ptr().wrapping_add(offset).cast());
}

lanes_by_functions!(Avx2, V = [__m256; 2], I = [__m256i; 2], WIDEST = 4);
