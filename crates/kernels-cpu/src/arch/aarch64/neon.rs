//! NEON with the dot products of `asimddp`: four registers are sixteen lanes, lanes 0..4 first.
#![expect(unsafe_code, reason = "vector intrinsics; the token proves that they exist")]

use crate::lanes::Kernel;
use core::arch::aarch64::*;
use core::arch::asm;

/// Proof that this CPU has NEON and its dot products. Only [`Neon::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon {
    ahead: usize,
}

impl Neon {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<Neon> {
        // The loads take weights as they lie in memory, which is little-endian.
        let present = cfg!(target_endian = "little")
            && std::arch::is_aarch64_feature_detected!("neon")
            && std::arch::is_aarch64_feature_detected!("dotprod");
        // As on Zen 4, not measured.
        present.then_some(Neon { ahead: 128 })
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves that every feature `inside` enables is present.
        unsafe { inside(self, kernel) }
    }
}

#[target_feature(enable = "neon,dotprod")]
fn inside<K: Kernel>(token: Neon, kernel: K) -> K::Out {
    kernel.run(token)
}

/// `f` of every register. Closures have the instruction set of the function that they are in.
#[inline(always)]
fn each<A: Copy, B>(v: [A; 4], f: impl Fn(A) -> B) -> [B; 4] {
    [f(v[0]), f(v[1]), f(v[2]), f(v[3])]
}

/// `f` of every two registers.
#[inline(always)]
fn zip<A: Copy, B: Copy, C>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> C) -> [C; 4] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_16(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: `bytes` is 16 readable bytes, and the load has no alignment requirement.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_64(bytes: &[u8; 64]) -> [uint8x16_t; 4] {
    let (parts, _) = bytes.as_chunks::<16>();
    [load_16(&parts[0]), load_16(&parts[1]), load_16(&parts[2]), load_16(&parts[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_4(values: &[f32; 4]) -> float32x4_t {
    // SAFETY: `values` is 16 readable bytes, and the load has no alignment requirement.
    unsafe { vld1q_f32(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_4(v: float32x4_t, out: &mut [f32; 4]) {
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { vst1q_f32(out.as_mut_ptr(), v) }
}

/// Sixteen values of two bytes, four a register.
#[inline]
#[target_feature(enable = "neon")]
fn load_halves(bytes: &[u8; 32]) -> [uint16x4_t; 4] {
    let (parts, _) = bytes.as_chunks::<16>();
    let low = vreinterpretq_u16_u8(load_16(&parts[0]));
    let high = vreinterpretq_u16_u8(load_16(&parts[1]));
    [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)]
}

#[inline]
#[target_feature(enable = "neon")]
fn splat(x: f32) -> [float32x4_t; 4] {
    [vdupq_n_f32(x); 4]
}

#[inline]
#[target_feature(enable = "neon")]
fn load(values: &[f32; 16]) -> [float32x4_t; 4] {
    let (parts, _) = values.as_chunks::<4>();
    [load_4(&parts[0]), load_4(&parts[1]), load_4(&parts[2]), load_4(&parts[3])]
}

#[inline]
#[target_feature(enable = "neon")]
fn store(v: [float32x4_t; 4], out: &mut [f32; 16]) {
    let (parts, _) = out.as_chunks_mut::<4>();
    store_4(v[0], &mut parts[0]);
    store_4(v[1], &mut parts[1]);
    store_4(v[2], &mut parts[2]);
    store_4(v[3], &mut parts[3]);
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32(bytes: &[u8; 64]) -> [float32x4_t; 4] {
    each(load_64(bytes), |part| vreinterpretq_f32_u8(part))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f16(bytes: &[u8; 32]) -> [float32x4_t; 4] {
    each(load_halves(bytes), |half| vcvt_f32_f16(vreinterpret_f16_u16(half)))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bf16(bytes: &[u8; 32]) -> [float32x4_t; 4] {
    each(load_halves(bytes), |half| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(half))))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_u8(bytes: &[u8; 16]) -> [float32x4_t; 4] {
    let v = load_16(bytes);
    let (low, high) = (vmovl_u8(vget_low_u8(v)), vmovl_high_u8(v));
    [
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
        vcvtq_f32_u32(vmovl_high_u16(low)),
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
        vcvtq_f32_u32(vmovl_high_u16(high)),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8(bytes: &[u8; 16]) -> [float32x4_t; 4] {
    let v = vreinterpretq_s8_u8(load_16(bytes));
    let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn add(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
    zip(a, b, |a, b| vaddq_f32(a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn sub(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
    zip(a, b, |a, b| vsubq_f32(a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn mul(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
    zip(a, b, |a, b| vmulq_f32(a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn div(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
    zip(a, b, |a, b| vdivq_f32(a, b))
}

// FMAX and FMIN return a NaN whichever side it is on, so that these compare and select.

#[inline]
#[target_feature(enable = "neon")]
fn max(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
    zip(a, b, |a, b| vbslq_f32(vcgtq_f32(a, b), a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn min(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
    zip(a, b, |a, b| vbslq_f32(vcltq_f32(a, b), a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn fma(a: [float32x4_t; 4], b: [float32x4_t; 4], c: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // The intrinsic takes the addend first.
    [
        vfmaq_f32(c[0], a[0], b[0]),
        vfmaq_f32(c[1], a[1], b[1]),
        vfmaq_f32(c[2], a[2], b[2]),
        vfmaq_f32(c[3], a[3], b[3]),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn abs(v: [float32x4_t; 4]) -> [float32x4_t; 4] {
    each(v, |v| vabsq_f32(v))
}

#[inline]
#[target_feature(enable = "neon")]
fn copy_sign(magnitude: [float32x4_t; 4], sign: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let bit = vdupq_n_u32(1 << 31);
    zip(magnitude, sign, |magnitude, sign| vbslq_f32(bit, sign, magnitude))
}

#[inline]
#[target_feature(enable = "neon")]
fn round(v: [float32x4_t; 4]) -> [float32x4_t; 4] {
    each(v, |v| vrndnq_f32(v))
}

#[inline]
#[target_feature(enable = "neon")]
fn exp2i(n: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let bias = vdupq_n_s32(127);
    each(n, |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), bias))))
}

#[inline]
#[target_feature(enable = "neon")]
fn select_less(
    a: [float32x4_t; 4],
    b: [float32x4_t; 4],
    then: [float32x4_t; 4],
    other: [float32x4_t; 4],
) -> [float32x4_t; 4] {
    let less = zip(a, b, |a, b| vcltq_f32(a, b));
    [
        vbslq_f32(less[0], then[0], other[0]),
        vbslq_f32(less[1], then[1], other[1]),
        vbslq_f32(less[2], then[2], other[2]),
        vbslq_f32(less[3], then[3], other[3]),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn sum(v: [float32x4_t; 4]) -> f32 {
    let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
}

#[inline]
#[target_feature(enable = "neon")]
fn maximum(v: [float32x4_t; 4]) -> f32 {
    vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3])))
}

#[inline]
#[target_feature(enable = "neon")]
fn largest_magnitude(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> f32 {
    // As integers, which puts a NaN after infinity.
    let largest =
        zip(abs(a), abs(b), |a, b| vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
    let four = vmaxq_u32(vmaxq_u32(largest[0], largest[1]), vmaxq_u32(largest[2], largest[3]));
    f32::from_bits(vmaxvq_u32(four))
}

#[inline]
#[target_feature(enable = "neon")]
fn integer_sums(v: [[float32x4_t; 4]; 4]) -> [i32; 4] {
    let [a, b, c, d] = each(v, |v| vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3])));
    let sums = vcvtq_s32_f32(vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
    let mut out = [0; 4];
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { vst1q_s32(out.as_mut_ptr(), sums) };
    out
}

#[inline]
#[target_feature(enable = "neon")]
fn store_i8(v: [float32x4_t; 4], out: &mut [i8; 16]) {
    let v = each(v, |v| vcvtq_s32_f32(v));
    let low = vqmovn_high_s32(vqmovn_s32(v[0]), v[1]);
    let high = vqmovn_high_s32(vqmovn_s32(v[2]), v[3]);
    let bytes = vqmovn_high_s16(vqmovn_s16(low), high);
    // SAFETY: `out` is 16 writable bytes, and the store has no alignment requirement.
    unsafe { vst1q_s8(out.as_mut_ptr(), bytes) }
}

#[inline]
#[target_feature(enable = "neon")]
fn splat_i(x: i32) -> [int32x4_t; 4] {
    [vdupq_n_s32(x); 4]
}

#[inline]
#[target_feature(enable = "neon")]
fn to_f32(v: [int32x4_t; 4]) -> [float32x4_t; 4] {
    each(v, |v| vcvtq_f32_s32(v))
}

#[inline]
#[target_feature(enable = "neon")]
fn times_256(v: [int32x4_t; 4]) -> [int32x4_t; 4] {
    each(v, |v| vshlq_n_s32::<8>(v))
}

#[inline]
#[target_feature(enable = "neon")]
fn add_i(a: [int32x4_t; 4], b: [int32x4_t; 4]) -> [int32x4_t; 4] {
    zip(a, b, |a, b| vaddq_s32(a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn nibbles(tile: &[u8; 256]) -> [[int32x4_t; 4]; 8] {
    let (lines, _) = tile.as_chunks::<64>();
    let mask = vdupq_n_u8(0x0f);
    let mut out = [[vdupq_n_s32(0); 4]; 8];
    for j in 0..4 {
        let packed = load_64(&lines[j]);
        out[j] = each(packed, |packed| vreinterpretq_s32_u8(vandq_u8(packed, mask)));
        out[j + 4] = each(packed, |packed| vreinterpretq_s32_u8(vshrq_n_u8::<4>(packed)));
    }
    out
}

#[inline]
#[target_feature(enable = "neon")]
fn load_codes(line: &[u8; 64]) -> [int32x4_t; 4] {
    each(load_64(line), |part| vreinterpretq_s32_u8(part))
}

#[inline]
#[target_feature(enable = "neon")]
fn shift_mask(v: [int32x4_t; 4], left: i32, mask: u8) -> [int32x4_t; 4] {
    // A negative count shifts right.
    let (left, mask) = (vdupq_n_s8(left as i8), vdupq_n_u8(mask));
    each(v, |v| vreinterpretq_s32_u8(vandq_u8(vshlq_u8(vreinterpretq_u8_s32(v), left), mask)))
}

#[inline]
#[target_feature(enable = "neon")]
fn or(a: [int32x4_t; 4], b: [int32x4_t; 4]) -> [int32x4_t; 4] {
    zip(a, b, |a, b| vorrq_s32(a, b))
}

#[inline]
#[target_feature(enable = "neon")]
fn add_bytes(v: [int32x4_t; 4], addend: u8) -> [int32x4_t; 4] {
    let addend = vdupq_n_u8(addend);
    each(v, |v| vreinterpretq_s32_u8(vaddq_u8(vreinterpretq_u8_s32(v), addend)))
}

#[inline]
#[target_feature(enable = "neon")]
fn lookup(v: [int32x4_t; 4], table: &[u8; 16]) -> [int32x4_t; 4] {
    let table = load_16(table);
    each(v, |v| vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(v))))
}

#[inline]
#[target_feature(enable = "neon")]
fn bytes(tile: &[u8; 512]) -> [[int32x4_t; 4]; 8] {
    let (lines, _) = tile.as_chunks::<64>();
    let mut out = [[vdupq_n_s32(0); 4]; 8];
    for (lane, line) in out.iter_mut().zip(lines) {
        *lane = load_codes(line);
    }
    out
}

/// `sum + Σ w x` over four k a lane; the x of all lanes are the bytes `4 FOUR..4 FOUR + 4`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const FOUR: usize>(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // The intrinsic `vdotq_laneq_s32` is not stable yet (rust-lang/rust#117224).
    // SAFETY: this function enables `dotprod`, which SDOT belongs to; it reads and writes nothing
    // but these registers.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{four}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            four = const FOUR,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `sum + Σ w x` over 16 k, four a register of `w`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_16(sum: int32x4_t, w: [int8x16_t; 4], x: int8x16_t) -> int32x4_t {
    sdot::<3>(sdot::<2>(sdot::<1>(sdot::<0>(sum, w[0], x), w[1], x), w[2], x), w[3], x)
}

#[inline]
#[target_feature(enable = "neon")]
fn load_x(x: &[i8; 16]) -> int8x16_t {
    // SAFETY: `x` is 16 readable bytes, and the load has no alignment requirement.
    unsafe { vld1q_s8(x.as_ptr()) }
}

/// Registers `part` of four vectors.
#[inline]
#[target_feature(enable = "neon")]
fn parts(w: &[[int32x4_t; 4]; 4], part: usize) -> [int8x16_t; 4] {
    each([w[0][part], w[1][part], w[2][part], w[3][part]], |w| vreinterpretq_s8_s32(w))
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_nibbles(w: &[[int32x4_t; 4]; 8], x: &[i8; 32], mut total: [int32x4_t; 4]) -> [int32x4_t; 4] {
    let (halves, _) = x.as_chunks::<16>();
    let (x_low, x_high) = (load_x(&halves[0]), load_x(&halves[1]));
    let (quarters, _) = w.as_chunks::<4>();
    // Nibbles are at most 15, so that they are the same as signed bytes.
    for (part, sum) in total.iter_mut().enumerate() {
        *sum = sdot_16(*sum, parts(&quarters[0], part), x_low);
        *sum = sdot_16(*sum, parts(&quarters[1], part), x_high);
    }
    total
}

#[inline]
#[target_feature(enable = "neon")]
fn start_bytes(_sum: i32) -> [int32x4_t; 4] {
    [vdupq_n_s32(0); 4]
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_16_bytes(w: [[int32x4_t; 4]; 4], x: &[i8; 16], mut total: [int32x4_t; 4]) -> [int32x4_t; 4] {
    let x = load_x(x);
    // As a signed byte, w with its highest bit flipped is w - 128.
    let flip = vdupq_n_s8(i8::MIN);
    for (part, sum) in total.iter_mut().enumerate() {
        *sum = sdot_16(*sum, each(parts(&w, part), |w| veorq_s8(w, flip)), x);
    }
    total
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_bytes(v: [int32x4_t; 4]) -> [[float32x4_t; 4]; 4] {
    let v = each(v, |v| vreinterpretq_u32_s32(v));
    let mask = vdupq_n_u32(0xff);
    [
        each(v, |v| vcvtq_f32_u32(vandq_u32(v, mask))),
        each(v, |v| vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<8>(v), mask))),
        each(v, |v| vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<16>(v), mask))),
        each(v, |v| vcvtq_f32_u32(vshrq_n_u32::<24>(v))),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn prefetch(from: &[u8], offset: usize) {
    let line = from.as_ptr().addr().wrapping_add(offset);
    // The intrinsic `_prefetch` is not stable yet (rust-lang/rust#117217).
    // SAFETY: PRFM is a hint: it changes no register, and no address makes it fault.
    unsafe {
        asm!(
            "prfm pldl1keep, [{line}]",
            line = in(reg) line,
            options(nomem, nostack, preserves_flags),
        );
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn prefetch_l2(from: &[u8], offset: usize) {
    let line = from.as_ptr().addr().wrapping_add(offset);
    // SAFETY: PRFM is a hint: it changes no register, and no address makes it fault.
    unsafe {
        asm!(
            "prfm pldl2keep, [{line}]",
            line = in(reg) line,
            options(nomem, nostack, preserves_flags),
        );
    }
}

lanes_by_functions!(Neon, V = [float32x4_t; 4], I = [int32x4_t; 4], WIDEST = 4);
