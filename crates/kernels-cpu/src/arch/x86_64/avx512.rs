//! AVX-512 with VNNI: one register is sixteen lanes.
#![expect(unsafe_code, reason = "vector intrinsics; the token proves that they exist")]

use crate::lanes::Kernel;
use core::arch::x86_64::*;

/// Proof that this CPU and the operating system run AVX-512 F, BW, DQ, VL and VNNI, FMA and F16C.
/// Only [`Avx512Vnni::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Vnni {
    ahead: usize,
}

impl Avx512Vnni {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<Avx512Vnni> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then(|| Avx512Vnni { ahead: super::ahead() })
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves that every feature `inside` enables is present.
        unsafe { inside(self, kernel) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn inside<K: Kernel>(token: Avx512Vnni, kernel: K) -> K::Out {
    kernel.run(token)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_lanes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: `bytes` is 64 readable bytes, and the load has no alignment requirement.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: `bytes` is 32 readable bytes, and the load has no alignment requirement.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: `bytes` is 16 readable bytes, and the load has no alignment requirement.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum(v: __m512) -> f32 {
    let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn exp2i(n: __m512) -> __m512 {
    let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn select_less(a: __m512, b: __m512, then: __m512, other: __m512) -> __m512 {
    _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), other, then)
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn copy_sign(magnitude: __m512, sign: __m512) -> __m512 {
    _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_i8(v: __m512, out: &mut [i8; 16]) {
    let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(tile: &[u8; 256]) -> [__m512i; 8] {
    let (lines, _) = tile.as_chunks::<64>();
    let mask = _mm512_set1_epi8(0x0f);
    let packed = [
        load_lanes(&lines[0]),
        load_lanes(&lines[1]),
        load_lanes(&lines[2]),
        load_lanes(&lines[3]),
    ];
    let mut out = [mask; 8];
    for j in 0..4 {
        out[j] = _mm512_and_si512(packed[j], mask);
        out[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(packed[j]), mask);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn shift_mask(v: __m512i, left: i32, mask: u8) -> __m512i {
    let shifted = if left < 0 {
        _mm512_srl_epi16(v, _mm_cvtsi32_si128(-left))
    } else {
        _mm512_sll_epi16(v, _mm_cvtsi32_si128(left))
    };
    _mm512_and_si512(shifted, _mm512_set1_epi8(mask.cast_signed()))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_bytes(v: __m512i, addend: u8) -> __m512i {
    _mm512_add_epi8(v, _mm512_set1_epi8(addend.cast_signed()))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn lookup(v: __m512i, table: &[u8; 16]) -> __m512i {
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16(table)), v)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn start_bytes(sum: i32) -> __m512i {
    _mm512_set1_epi32(sum)
}

/// `total + Σ w x` over four k, in the order of the calls. Left to itself, the compiler puts the chain of
/// one row of activations behind that of another, and instructions that wait for their own chain fill the
/// processor's scheduler; with the rows in turn it finds eight that are ready.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products(total: __m512i, w: __m512i, x: &[i8; 4]) -> __m512i {
    let x = _mm512_set1_epi32(i32::from_le_bytes(x.map(i8::cast_unsigned)));
    let mut total = _mm512_dpbusd_epi32(total, w, x);
    // SAFETY: no instruction.
    unsafe {
        core::arch::asm!("/* {} */", inout(zmm_reg) total, options(nomem, nostack, preserves_flags));
    }
    total
}

#[inline]
#[target_feature(enable = "avx512f")]
fn unpack_bytes(v: __m512i) -> [__m512; 4] {
    let mask = _mm512_set1_epi32(0xff);
    [
        _mm512_cvtepi32_ps(_mm512_and_si512(v, mask)),
        _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<8>(v), mask)),
        _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<16>(v), mask)),
        _mm512_cvtepi32_ps(_mm512_srli_epi32::<24>(v)),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; 16]) -> __m512 {
    // SAFETY: `values` is 64 readable bytes, and the load has no alignment requirement.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(v: __m512, out: &mut [f32; 16]) {
    // SAFETY: `out` is 64 writable bytes, and the store has no alignment requirement.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(bytes: &[u8; 64]) -> __m512 {
    _mm512_castsi512_ps(load_lanes(bytes))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f16(bytes: &[u8; 32]) -> __m512 {
    _mm512_cvtph_ps(load_32(bytes))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_bf16(bytes: &[u8; 32]) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_32(bytes))))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_u8(bytes: &[u8; 16]) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(bytes)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i8(bytes: &[u8; 16]) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(bytes)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn maximum(v: __m512) -> f32 {
    let eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
    let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn largest_magnitude(a: __m512, b: __m512) -> f32 {
    // As integers, which puts a NaN after infinity.
    let (a, b) = (_mm512_abs_ps(a), _mm512_abs_ps(b));
    let largest = _mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b));
    f32::from_bits(_mm512_reduce_max_epu32(largest))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn integer_sums([a, b, c, d]: [__m512; 4]) -> [i32; 4] {
    // Every quarter of `all` holds a lane of each.
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let all = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
    let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
    let sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
    let sums = _mm_cvtps_epi32(sums);
    let mut out = [0; 4];
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), sums) };
    out
}

#[inline]
#[target_feature(enable = "avx512f")]
fn bytes(tile: &[u8; 512]) -> [__m512i; 8] {
    let (lines, _) = tile.as_chunks::<64>();
    let mut out = [_mm512_setzero_si512(); 8];
    for (lane, line) in out.iter_mut().zip(lines) {
        *lane = load_lanes(line);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(from: &[u8], offset: usize) {
    _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(offset).cast());
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_l2(from: &[u8], offset: usize) {
    _mm_prefetch::<_MM_HINT_T1>(from.as_ptr().wrapping_add(offset).cast());
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn splat(x: f32) -> __m512 {
    _mm512_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn add(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn sub(a: __m512, b: __m512) -> __m512 {
    _mm512_sub_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn mul(a: __m512, b: __m512) -> __m512 {
    _mm512_mul_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn div(a: __m512, b: __m512) -> __m512 {
    _mm512_div_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
    _mm512_fmadd_ps(a, b, c)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn max(a: __m512, b: __m512) -> __m512 {
    _mm512_max_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn min(a: __m512, b: __m512) -> __m512 {
    _mm512_min_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn abs(v: __m512) -> __m512 {
    _mm512_abs_ps(v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn round(v: __m512) -> __m512 {
    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn splat_i(x: i32) -> __m512i {
    _mm512_set1_epi32(x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn to_f32(v: __m512i) -> __m512 {
    _mm512_cvtepi32_ps(v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn add_i(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn times_256(v: __m512i) -> __m512i {
    _mm512_slli_epi32::<8>(v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn load_codes(line: &[u8; 64]) -> __m512i {
    load_lanes(line)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn or(a: __m512i, b: __m512i) -> __m512i {
    _mm512_or_si512(a, b)
}

/// Registers of 32 k, and of 16.
const EIGHT: usize = 8;
const FOUR: usize = 4;

lanes_by_functions! {
    Avx512Vnni, V = __m512, I = __m512i, WIDEST = 8;

    #[inline(always)]
    fn dot_nibbles<const N: usize>(
        self,
        w: &[__m512i; 8],
        x: [&[i8; 32]; N],
        mut totals: [__m512i; N],
    ) -> [__m512i; N] {
        unroll!(j in EIGHT, {
            unroll!(n in N, {
                let x = &x[n].as_chunks::<4>().0[j];
                // SAFETY: `self` proves that the instruction set is present.
                totals[n] = unsafe { add_products(totals[n], w[j], x) };
            });
        });
        totals
    }

    #[inline(always)]
    fn dot_bytes<const N: usize>(
        self,
        w: [__m512i; 4],
        x: [&[i8; 16]; N],
        mut totals: [__m512i; N],
    ) -> [__m512i; N] {
        unroll!(j in FOUR, {
            unroll!(n in N, {
                let x = &x[n].as_chunks::<4>().0[j];
                // SAFETY: `self` proves that the instruction set is present.
                totals[n] = unsafe { add_products(totals[n], w[j], x) };
            });
        });
        totals
    }
}
