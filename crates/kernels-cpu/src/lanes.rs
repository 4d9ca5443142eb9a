//! The vector of the generic kernels: sixteen f32 lanes, or sixteen lanes of four bytes.
//!
//! An implementor is a capability token of [`crate::arch`]: holding one proves that its instructions
//! exist, so every method is safe. A kernel is a struct that implements [`Kernel`]; the token's
//! `enter` runs it inside a function compiled for that instruction set, and everything the kernel
//! calls is `#[inline(always)]` so that it is compiled there too.
//!
//! All implementors agree bit for bit: sums have a fixed order, `fma` rounds once everywhere, and
//! integer dot products are exact.

/// Sixteen-lane arithmetic. `V` is sixteen f32, `I` sixteen i32 (or sixteen groups of four bytes).
pub(crate) trait Lanes: Copy + Send + Sync {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// Rows of a register tile beyond which accumulators would be spilled: 1, 4 or 8.
    const WIDEST: usize;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, values: &[f32; 16]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; 16]);
    /// Little-endian f32.
    fn load_f32(self, bytes: &[u8; 64]) -> Self::V;
    /// Little-endian IEEE half precision; exact.
    fn load_f16(self, bytes: &[u8; 32]) -> Self::V;
    /// Little-endian bfloat16; exact.
    fn load_bf16(self, bytes: &[u8; 32]) -> Self::V;
    fn load_u8(self, bytes: &[u8; 16]) -> Self::V;
    /// Two's complement bytes.
    fn load_i8(self, bytes: &[u8; 16]) -> Self::V;

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a` where `a > b`, else `b`: a NaN in `b` survives, one in `a` does not.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where `a < b`, else `b`: a NaN in `b` survives, one in `a` does not.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, v: Self::V) -> Self::V;
    /// `magnitude` (not negative) with the sign bit of `sign`.
    fn copy_sign(self, magnitude: Self::V, sign: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// 2^n for integral n in -126..=128; 128 gives infinity.
    fn exp2i(self, n: Self::V) -> Self::V;
    /// `then` where `a < b`, else `other` (also where either is NaN).
    fn select_less(self, a: Self::V, b: Self::V, then: Self::V, other: Self::V) -> Self::V;
    /// Sum of the lanes, halving: lane i with lane i+8, then i+4, i+2, i+1.
    fn sum(self, v: Self::V) -> f32;
    /// Largest lane; the lanes hold no NaN.
    fn maximum(self, v: Self::V) -> f32;
    /// Largest |x| of both; infinity or a NaN when one of them is.
    fn largest_magnitude(self, a: Self::V, b: Self::V) -> f32;
    /// Sums of the lanes of each, which are integral and below 2^19.
    fn integer_sums(self, v: [Self::V; 4]) -> [i32; 4];
    /// Writes integral values in -127..=127 as bytes.
    fn store_i8(self, v: Self::V, out: &mut [i8; 16]);

    /// Exact below 2^24.
    fn to_f32(self, v: Self::I) -> Self::V;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn times_256(self, v: Self::I) -> Self::I;
    /// A nibble tile: lane r of `bytes[64 j ..]` holds row r, its low nibbles are k = 4j..4j+4 and
    /// its high nibbles k = 16+4j..16+4j+4. Returns one byte a weight: entry j has k = 4j..4j+4.
    fn nibbles(self, tile: &[u8; 256]) -> [Self::I; 8];
    /// One byte of each k, four a row: 64 bytes as they are.
    fn load_codes(self, line: &[u8; 64]) -> Self::I;
    /// Every byte shifted left (right where negative) by at most 7 bits, then `& mask`. Bits that
    /// `mask` lets through must come from the same byte.
    fn shift_mask(self, v: Self::I, left: i32, mask: u8) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Adds to every byte, wrapping.
    fn add_bytes(self, v: Self::I, addend: u8) -> Self::I;
    /// `table[i]` for every byte i, which is below 16.
    fn lookup(self, v: Self::I, table: &[u8; 16]) -> Self::I;
    /// A byte tile: lane r of `tile[64 j ..]` holds k = 4j..4j+4 of row r.
    fn bytes(self, tile: &[u8; 512]) -> [Self::I; 8];
    /// `start + Σ w x` over 32 k, w unsigned and at most 15, x in -127..=127.
    fn dot_nibbles(self, w: &[Self::I; 8], x: &[i8; 32], start: i32) -> Self::I;
    /// `Σ (w - 128) x` over 16 k, w unsigned, x in -127..=127; `sum` is Σ x.
    fn dot_bytes(self, w: [Self::I; 4], x: &[i8; 16], sum: i32) -> Self::I;
    /// The four unsigned bytes of each lane as f32.
    fn unpack_bytes(self, v: Self::I) -> [Self::V; 4];
    /// Asks for the cache line at `offset` bytes after the start of `from`, which may lie outside.
    fn prefetch(self, from: &[u8], offset: usize);
    /// The same, into the cache of the second level.
    fn prefetch_l2(self, from: &[u8], offset: usize);
}

/// A computation that is compiled once for each instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// The computation. Implementations are `#[inline(always)]`.
    fn run<L: Lanes>(self, lanes: L) -> Self::Out;
}
