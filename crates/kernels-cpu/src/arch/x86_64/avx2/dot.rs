//! Integer dot products without VNNI.

use core::arch::x86_64::*;

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(x: &[i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_le_bytes(x.map(i8::cast_unsigned)))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_nibbles(
    w: &[[__m256i; 2]; 8],
    x: &[i8; 32],
    total: [__m256i; 2],
) -> [__m256i; 2] {
    // A pair product is at most 2 * 15 * 127 = 3810; eight of them fit sixteen bits (30480).
    let mut words = [_mm256_setzero_si256(); 2];
    let (x, _) = x.as_chunks::<4>();
    for j in 0..8 {
        let four = broadcast(&x[j]);
        words[0] = _mm256_add_epi16(words[0], _mm256_maddubs_epi16(w[j][0], four));
        words[1] = _mm256_add_epi16(words[1], _mm256_maddubs_epi16(w[j][1], four));
    }
    let ones = _mm256_set1_epi16(1);
    [
        _mm256_add_epi32(total[0], _mm256_madd_epi16(words[0], ones)),
        _mm256_add_epi32(total[1], _mm256_madd_epi16(words[1], ones)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_bytes_half(w: [__m256i; 4], x: &[i8; 16], mut total: __m256i) -> __m256i {
    let flip = _mm256_set1_epi8(-128);
    let ones = _mm256_set1_epi16(1);
    let (x, _) = x.as_chunks::<4>();
    for j in 0..4 {
        let signed = _mm256_xor_si256(w[j], flip);
        // |w| <= 128 and |x| <= 127, so a pair is at most 32512 and VPMADDUBSW does not saturate.
        let pairs = _mm256_maddubs_epi16(
            _mm256_abs_epi8(signed),
            _mm256_sign_epi8(broadcast(&x[j]), signed),
        );
        total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
    }
    total
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn start_bytes(_sum: i32) -> [__m256i; 2] {
    [_mm256_setzero_si256(); 2]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_16_bytes(
    w: [[__m256i; 2]; 4],
    x: &[i8; 16],
    total: [__m256i; 2],
) -> [__m256i; 2] {
    [
        add_bytes_half([w[0][0], w[1][0], w[2][0], w[3][0]], x, total[0]),
        add_bytes_half([w[0][1], w[1][1], w[2][1], w[3][1]], x, total[1]),
    ]
}
