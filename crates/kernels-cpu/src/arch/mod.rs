//! Capability tokens, one a module: by instruction set first, then by operation.

/// Implements [`crate::lanes::Lanes`] for a token by the functions of the same names in scope, which
/// take no token and are compiled for its instruction set. Integer products are made row by row, unless
/// methods for them are given.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! lanes_by_functions {
    ($token:ty, V = $v:ty, I = $i:ty, WIDEST = $widest:literal) => {
        lanes_by_functions! {
            $token, V = $v, I = $i, WIDEST = $widest;

            #[inline(always)]
            fn dot_nibbles<const N: usize>(
                self,
                w: &[$i; 8],
                x: [&[i8; 32]; N],
                mut totals: [$i; N],
            ) -> [$i; N] {
                for (total, x) in totals.iter_mut().zip(x) {
                    // SAFETY: `self` proves that the instruction set of this function is present.
                    *total = unsafe { add_nibbles(w, x, *total) };
                }
                totals
            }
            #[inline(always)]
            fn dot_bytes<const N: usize>(
                self,
                w: [$i; 4],
                x: [&[i8; 16]; N],
                mut totals: [$i; N],
            ) -> [$i; N] {
                for (total, x) in totals.iter_mut().zip(x) {
                    // SAFETY: `self` proves that the instruction set of this function is present.
                    *total = unsafe { add_16_bytes(w, x, *total) };
                }
                totals
            }
        }
    };
    ($token:ty, V = $v:ty, I = $i:ty, WIDEST = $widest:literal; $($dots:item)*) => {
        #[cfg(test)]
        impl $token {
            /// The same on a CPU that wants to be asked this far ahead.
            pub(crate) fn asking(self, ahead: usize) -> Self {
                let mut token = self;
                token.ahead = ahead;
                token
            }
        }

        impl crate::lanes::Lanes for $token {
            type V = $v;
            type I = $i;
            const WIDEST: usize = $widest;

            #[inline(always)]
            fn ahead(self) -> usize {
                self.ahead
            }

            forward! {
                splat(x: f32) -> Self::V;
                load(values: &[f32; 16]) -> Self::V;
                store(v: Self::V, out: &mut [f32; 16]);
                load_f32(bytes: &[u8; 64]) -> Self::V;
                load_f16(bytes: &[u8; 32]) -> Self::V;
                load_bf16(bytes: &[u8; 32]) -> Self::V;
                load_u8(bytes: &[u8; 16]) -> Self::V;
                load_i8(bytes: &[u8; 16]) -> Self::V;
                add(a: Self::V, b: Self::V) -> Self::V;
                sub(a: Self::V, b: Self::V) -> Self::V;
                mul(a: Self::V, b: Self::V) -> Self::V;
                div(a: Self::V, b: Self::V) -> Self::V;
                fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
                max(a: Self::V, b: Self::V) -> Self::V;
                min(a: Self::V, b: Self::V) -> Self::V;
                abs(v: Self::V) -> Self::V;
                copy_sign(magnitude: Self::V, sign: Self::V) -> Self::V;
                round(v: Self::V) -> Self::V;
                exp2i(n: Self::V) -> Self::V;
                select_less(a: Self::V, b: Self::V, then: Self::V, other: Self::V) -> Self::V;
                sum(v: Self::V) -> f32;
                maximum(v: Self::V) -> f32;
                largest_magnitude(a: Self::V, b: Self::V) -> f32;
                integer_sums(v: [Self::V; 4]) -> [i32; 4];
                store_i8(v: Self::V, out: &mut [i8; 16]);
                splat_i(x: i32) -> Self::I;
                to_f32(v: Self::I) -> Self::V;
                add_i(a: Self::I, b: Self::I) -> Self::I;
                times_256(v: Self::I) -> Self::I;
                nibbles(tile: &[u8; 256]) -> [Self::I; 8];
                load_codes(line: &[u8; 64]) -> Self::I;
                shift_mask(v: Self::I, left: i32, mask: u8) -> Self::I;
                or(a: Self::I, b: Self::I) -> Self::I;
                add_bytes(v: Self::I, addend: u8) -> Self::I;
                lookup(v: Self::I, table: &[u8; 16]) -> Self::I;
                bytes(tile: &[u8; 512]) -> [Self::I; 8];
                start_bytes(sum: i32) -> Self::I;
                unpack_bytes(v: Self::I) -> [Self::V; 4];
                prefetch(from: &[u8], offset: usize);
                prefetch_l2(from: &[u8], offset: usize);
            }

            $($dots)*
        }
    };
}

/// Methods that call the functions of the same names.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! forward {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $out:ty)?;)*) => {$(
        #[inline(always)]
        fn $name(self, $($argument: $type),*) $(-> $out)? {
            // SAFETY: `self` proves that the instruction set of this function is present.
            unsafe { $name($($argument),*) }
        }
    )*};
}

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::neon::Neon;
pub(crate) use scalar::Scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{avx_vnni::AvxVnni, avx2::Avx2, avx512::Avx512Vnni};
