//! The portable path. It defines what the others compute, lane by lane. Its larger operations are
//! calls, because inlined into every kernel they would make up half of this crate's code.

use crate::lanes::{Kernel, Lanes};
use half::f16;

/// The token that needs no proof.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

impl Scalar {
    /// Runs a kernel.
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(self)
    }
}

fn map(a: [f32; 16], f: impl Fn(f32) -> f32) -> [f32; 16] {
    a.map(f)
}

fn zip(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn map_bytes(v: [i32; 16], f: impl Fn(u8) -> u8) -> [i32; 16] {
    v.map(|lane| i32::from_le_bytes(lane.to_le_bytes().map(&f)))
}

fn dot_lane(w: i32, x: &[i8], bias: i32) -> i32 {
    let bytes = w.to_le_bytes();
    (0..4).map(|c| (i32::from(bytes[c]) - bias) * i32::from(x[c])).sum()
}

impl Lanes for Scalar {
    type V = [f32; 16];
    type I = [i32; 16];
    const WIDEST: usize = 1;

    #[inline(always)]
    fn ahead(self) -> usize {
        0
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, values: &[f32; 16]) -> [f32; 16] {
        *values
    }
    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }
    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> [f32; 16] {
        let (chunks, _) = bytes.as_chunks::<4>();
        std::array::from_fn(|i| f32::from_le_bytes(chunks[i]))
    }
    #[inline(never)]
    fn load_f16(self, bytes: &[u8; 32]) -> [f32; 16] {
        let (chunks, _) = bytes.as_chunks::<2>();
        std::array::from_fn(|i| f16::from_le_bytes(chunks[i]).to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 32]) -> [f32; 16] {
        let (chunks, _) = bytes.as_chunks::<2>();
        std::array::from_fn(|i| f32::from_bits(u32::from(u16::from_le_bytes(chunks[i])) << 16))
    }
    #[inline(always)]
    fn load_u8(self, bytes: &[u8; 16]) -> [f32; 16] {
        bytes.map(f32::from)
    }
    #[inline(always)]
    fn load_i8(self, bytes: &[u8; 16]) -> [f32; 16] {
        bytes.map(|b| f32::from(b.cast_signed()))
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a / b)
    }
    #[inline(never)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, v: [f32; 16]) -> [f32; 16] {
        map(v, f32::abs)
    }
    #[inline(always)]
    fn copy_sign(self, magnitude: [f32; 16], sign: [f32; 16]) -> [f32; 16] {
        zip(magnitude, sign, f32::copysign)
    }
    #[inline(never)]
    fn round(self, v: [f32; 16]) -> [f32; 16] {
        map(v, f32::round_ties_even)
    }
    #[inline(never)]
    fn exp2i(self, n: [f32; 16]) -> [f32; 16] {
        map(n, |n| f32::from_bits(((n as i32 + 127) << 23).cast_unsigned()))
    }
    #[inline(never)]
    fn select_less(
        self,
        a: [f32; 16],
        b: [f32; 16],
        then: [f32; 16],
        other: [f32; 16],
    ) -> [f32; 16] {
        std::array::from_fn(|i| if a[i] < b[i] { then[i] } else { other[i] })
    }
    #[inline(always)]
    fn sum(self, v: [f32; 16]) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    fn maximum(self, v: [f32; 16]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn largest_magnitude(self, a: [f32; 16], b: [f32; 16]) -> f32 {
        // In this order a NaN comes after infinity.
        let bits = a.into_iter().chain(b).map(|x| x.abs().to_bits());
        f32::from_bits(bits.fold(0, u32::max))
    }
    #[inline(always)]
    fn integer_sums(self, v: [[f32; 16]; 4]) -> [i32; 4] {
        v.map(|v| v.into_iter().map(|x| x as i32).sum())
    }
    #[inline(never)]
    fn store_i8(self, v: [f32; 16], out: &mut [i8; 16]) {
        *out = v.map(|x| x as i8);
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> [i32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn to_f32(self, v: [i32; 16]) -> [f32; 16] {
        v.map(|x| x as f32)
    }
    #[inline(always)]
    fn add_i(self, a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn times_256(self, v: [i32; 16]) -> [i32; 16] {
        v.map(|x| x << 8)
    }
    #[inline(never)]
    fn nibbles(self, tile: &[u8; 256]) -> [[i32; 16]; 8] {
        let (lanes, _) = tile.as_chunks::<4>();
        std::array::from_fn(|j| {
            std::array::from_fn(|r| {
                let packed = u32::from_le_bytes(lanes[(j % 4) * 16 + r]);
                (packed >> if j < 4 { 0 } else { 4 } & 0x0f0f_0f0f).cast_signed()
            })
        })
    }
    #[inline(never)]
    fn load_codes(self, line: &[u8; 64]) -> [i32; 16] {
        let (lanes, _) = line.as_chunks::<4>();
        std::array::from_fn(|r| i32::from_le_bytes(lanes[r]))
    }
    #[inline(never)]
    fn shift_mask(self, v: [i32; 16], left: i32, mask: u8) -> [i32; 16] {
        let shift = |byte: u8| if left < 0 { byte >> -left } else { byte << left };
        map_bytes(v, |byte| shift(byte) & mask)
    }
    #[inline(always)]
    fn or(self, a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(never)]
    fn add_bytes(self, v: [i32; 16], addend: u8) -> [i32; 16] {
        map_bytes(v, |byte| byte.wrapping_add(addend))
    }
    #[inline(never)]
    fn lookup(self, v: [i32; 16], table: &[u8; 16]) -> [i32; 16] {
        map_bytes(v, |byte| table[usize::from(byte & 15)])
    }
    #[inline(never)]
    fn bytes(self, tile: &[u8; 512]) -> [[i32; 16]; 8] {
        let (lanes, _) = tile.as_chunks::<4>();
        std::array::from_fn(|j| std::array::from_fn(|r| i32::from_le_bytes(lanes[j * 16 + r])))
    }
    #[inline(never)]
    fn dot_nibbles<const N: usize>(
        self,
        w: &[[i32; 16]; 8],
        x: [&[i8; 32]; N],
        totals: [[i32; 16]; N],
    ) -> [[i32; 16]; N] {
        let dot = |r: usize, x: &[i8; 32]| -> i32 {
            (0..8).map(|j| dot_lane(w[j][r], &x[4 * j..], 0)).sum()
        };
        std::array::from_fn(|n| std::array::from_fn(|r| totals[n][r] + dot(r, x[n])))
    }
    #[inline(always)]
    fn start_bytes(self, _sum: i32) -> [i32; 16] {
        [0; 16]
    }
    #[inline(never)]
    fn dot_bytes<const N: usize>(
        self,
        w: [[i32; 16]; 4],
        x: [&[i8; 16]; N],
        totals: [[i32; 16]; N],
    ) -> [[i32; 16]; N] {
        let dot = |r: usize, x: &[i8; 16]| -> i32 {
            (0..4).map(|j| dot_lane(w[j][r], &x[4 * j..], 128)).sum()
        };
        std::array::from_fn(|n| std::array::from_fn(|r| totals[n][r] + dot(r, x[n])))
    }
    #[inline(never)]
    fn unpack_bytes(self, v: [i32; 16]) -> [[f32; 16]; 4] {
        std::array::from_fn(|c| v.map(|lane| f32::from(lane.to_le_bytes()[c])))
    }
    #[inline(always)]
    fn prefetch(self, _from: &[u8], _offset: usize) {}
    #[inline(always)]
    fn prefetch_l2(self, _from: &[u8], _offset: usize) {}
}
