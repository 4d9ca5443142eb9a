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

    /// Bytes from a line of weights to the one that this CPU wants to be asked for meanwhile, when
    /// the weights come as one stream and little is done with them.
    fn ahead(self) -> usize;

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

    fn splat_i(self, x: i32) -> Self::I;
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
    /// `totals[n] + Σ w x[n]` over 32 k, w unsigned and at most 15, x in -127..=127.
    fn dot_nibbles<const N: usize>(
        self,
        w: &[Self::I; 8],
        x: [&[i8; 32]; N],
        totals: [Self::I; N],
    ) -> [Self::I; N];
    /// What sums of [`Lanes::dot_bytes`] start with, where `sum` is -128 Σ x over all k to come.
    fn start_bytes(self, sum: i32) -> Self::I;
    /// `totals[n] + Σ (w - 128) x[n]` over 16 k, w unsigned, x in -127..=127, once all k have been
    /// added to a start.
    fn dot_bytes<const N: usize>(
        self,
        w: [Self::I; 4],
        x: [&[i8; 16]; N],
        totals: [Self::I; N],
    ) -> [Self::I; N];
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::{Isa, Processor};

    /// Numbers that differ from call to call, all bits of them.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 32) as u32
        }
        fn bytes<const N: usize>(&mut self, below: u32) -> [u8; N] {
            std::array::from_fn(|_| (self.next() % below) as u8)
        }
        fn quants<const N: usize>(&mut self) -> [i8; N] {
            self.bytes(255).map(|byte| (i32::from(byte) - 127) as i8)
        }
        /// Integral values of at most `limit`.
        fn integral(&mut self, limit: i32) -> [f32; 16] {
            std::array::from_fn(|_| ((self.next() >> 1) as i32 % (limit + 1)) as f32)
                .map(|x: f32| if self.next().is_multiple_of(2) { x } else { -x })
        }
        /// Finite, of very different sizes, with zeros and ties of `round` among them.
        fn finite(&mut self) -> [f32; 16] {
            std::array::from_fn(|_| {
                let (kind, bits) = (self.next() % 8, self.next());
                match kind {
                    0 => f32::from_bits(bits & (1 << 31)),
                    1 => (bits % 16) as f32 - 7.5,
                    _ => f32::from_bits(bits & 0x87ff_ffff | (120 + (bits >> 20) % 16) << 23),
                }
            })
        }
        /// As `finite`, with infinities and NaNs.
        fn any(&mut self) -> [f32; 16] {
            self.finite().map(|x| match self.next() % 6 {
                0 => f32::NAN.copysign(x),
                1 => f32::INFINITY.copysign(x),
                _ => x,
            })
        }
    }

    /// What every method gives for some input, as bits.
    struct Methods {
        random: Random,
        out: Vec<(&'static str, Vec<u32>)>,
    }

    impl Methods {
        fn note<L: Lanes>(&mut self, name: &'static str, lanes: L, v: L::V) {
            let mut out = [0.0; 16];
            lanes.store(v, &mut out);
            self.out.push((name, out.map(f32::to_bits).to_vec()));
        }

        /// The bytes of `v`, four a lane.
        fn note_bytes<L: Lanes>(&mut self, name: &'static str, lanes: L, v: L::I) {
            for bytes in lanes.unpack_bytes(v) {
                self.note(name, lanes, bytes);
            }
        }

        fn loads<L: Lanes>(&mut self, lanes: L) {
            let values = self.random.any();
            let mut bytes = [0; 64];
            for (four, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *four = value.to_le_bytes();
            }
            self.note("load_f32", lanes, lanes.load_f32(&bytes));
            let mut halves = self.random.bytes::<32>(256);
            self.note("load_bf16", lanes, lanes.load_bf16(&halves));
            for half in halves.as_chunks_mut::<2>().0 {
                // No NaN, which may come out with other bits.
                half[1] = if half[1] & 0x7c == 0x7c { half[1] & 0xbf } else { half[1] };
            }
            self.note("load_f16", lanes, lanes.load_f16(&halves));
            let sixteen = self.random.bytes(256);
            self.note("load_u8", lanes, lanes.load_u8(&sixteen));
            self.note("load_i8", lanes, lanes.load_i8(&sixteen));
            let x = self.random.finite()[0];
            self.note("splat", lanes, lanes.splat(x));
        }

        fn arithmetic<L: Lanes>(&mut self, lanes: L) {
            let finite: [[f32; 16]; 3] = std::array::from_fn(|_| self.random.finite());
            let [a, b, c] = finite.map(|x| lanes.load(&x));
            self.note("add", lanes, lanes.add(a, b));
            self.note("sub", lanes, lanes.sub(a, b));
            self.note("mul", lanes, lanes.mul(a, b));
            let divisor = lanes.load(&finite[1].map(|x| if x == 0.0 { 3.0 } else { x }));
            self.note("div", lanes, lanes.div(a, divisor));
            self.note("fma", lanes, lanes.fma(a, b, c));
            self.note("round", lanes, lanes.round(a));
            self.out.push(("sum", vec![lanes.sum(a).to_bits()]));
            // All of one sign: which of two zeros is larger is not said.
            let below = lanes.load(&finite[0].map(|x| -x.abs() - 0.25));
            self.out.push(("maximum", vec![lanes.maximum(below).to_bits()]));
        }

        fn comparisons<L: Lanes>(&mut self, lanes: L) {
            let any: [[f32; 16]; 4] = std::array::from_fn(|_| self.random.any());
            let [a, b, c, d] = any.map(|x| lanes.load(&x));
            self.note("max", lanes, lanes.max(a, b));
            self.note("min", lanes, lanes.min(a, b));
            self.note("abs", lanes, lanes.abs(a));
            self.note("copy_sign", lanes, lanes.copy_sign(lanes.abs(a), b));
            self.note("select_less", lanes, lanes.select_less(a, b, c, d));
            let largest = lanes.largest_magnitude(a, b);
            // Of several NaNs any may be taken.
            let largest = if largest.is_nan() { f32::NAN } else { largest };
            self.out.push(("largest_magnitude", vec![largest.to_bits()]));
            let finite = [self.random.finite(), self.random.finite()].map(|x| lanes.load(&x));
            let largest = lanes.largest_magnitude(finite[0], finite[1]);
            self.out.push(("largest_magnitude", vec![largest.to_bits()]));
        }

        fn integral<L: Lanes>(&mut self, lanes: L) {
            let powers = self.random.integral(127).map(|x| (x + 1.0).max(-126.0));
            self.note("exp2i", lanes, lanes.exp2i(lanes.load(&powers)));
            let sums: [_; 4] = std::array::from_fn(|_| lanes.load(&self.random.integral(30_000)));
            let sums = lanes.integer_sums(sums).map(i32::cast_unsigned);
            self.out.push(("integer_sums", sums.to_vec()));
            let mut bytes = [0; 16];
            lanes.store_i8(lanes.load(&self.random.integral(127)), &mut bytes);
            self.out.push(("store_i8", bytes.map(|x| i32::from(x).cast_unsigned()).to_vec()));
        }

        fn codes<L: Lanes>(&mut self, lanes: L) {
            let line = lanes.load_codes(&self.random.bytes(256));
            let other = lanes.load_codes(&self.random.bytes(256));
            self.note_bytes("load_codes", lanes, line);
            self.note_bytes("or", lanes, lanes.or(line, other));
            for shift in 0..8 {
                let (left, right) = (0xff << shift, 0xff >> shift);
                self.note_bytes("shift_mask", lanes, lanes.shift_mask(line, shift, left));
                self.note_bytes("shift_mask", lanes, lanes.shift_mask(line, -shift, right & 0x55));
            }
            let (addend, table) = (self.random.next() as u8, self.random.bytes(256));
            self.note_bytes("add_bytes", lanes, lanes.add_bytes(line, addend));
            let indices = lanes.load_codes(&self.random.bytes(16));
            self.note_bytes("lookup", lanes, lanes.lookup(indices, &table));
        }

        fn products<L: Lanes>(&mut self, lanes: L) {
            let nibbles = lanes.nibbles(&self.random.bytes(256));
            nibbles.into_iter().for_each(|v| self.note_bytes("nibbles", lanes, v));
            let (x, start) = (self.random.quants(), self.random.next() as i32 >> 12);
            let [dot] = lanes.dot_nibbles(&nibbles, [&x], [lanes.splat_i(start)]);
            self.note("dot_nibbles", lanes, lanes.to_f32(dot));
            self.note("times_256", lanes, lanes.to_f32(lanes.times_256(dot)));
            let mut tile = [0; 512];
            tile[..256].copy_from_slice(&self.random.bytes::<256>(256));
            tile[256..].copy_from_slice(&self.random.bytes::<256>(256));
            let bytes = lanes.bytes(&tile);
            bytes.into_iter().for_each(|v| self.note_bytes("bytes", lanes, v));
            let x: [i8; 16] = self.random.quants();
            let start = -128 * x.iter().map(|&x| i32::from(x)).sum::<i32>();
            let [four, _] = bytes.as_chunks::<4>().0 else {
                unreachable!("eight are two times four")
            };
            let [product] = lanes.dot_bytes(*four, [&x], [lanes.start_bytes(start)]);
            self.note("dot_bytes", lanes, lanes.to_f32(product));
            self.note("add_i", lanes, lanes.to_f32(lanes.add_i(product, dot)));
            // Hints, also outside of what they are given.
            lanes.prefetch(&tile, 1 << 30);
            lanes.prefetch_l2(&tile, 1 << 30);
        }
    }

    impl Kernel for Methods {
        type Out = Vec<(&'static str, Vec<u32>)>;

        #[inline(always)]
        fn run<L: Lanes>(mut self, lanes: L) -> Self::Out {
            self.loads(lanes);
            self.arithmetic(lanes);
            self.comparisons(lanes);
            self.integral(lanes);
            self.codes(lanes);
            self.products(lanes);
            self.out
        }
    }

    #[test]
    fn every_method_gives_the_bits_of_the_portable_one() {
        for seed in 0..500 {
            let all = |isa| {
                let processor = Processor::of(isa).expect("listed as available");
                processor.run(Methods { random: Random(seed), out: Vec::new() })
            };
            let expected = all(Isa::Scalar);
            for isa in Isa::available() {
                for (found, expected) in all(isa).iter().zip(&expected) {
                    assert_eq!(found, expected, "{isa}, seed {seed}");
                }
            }
        }
    }
}
