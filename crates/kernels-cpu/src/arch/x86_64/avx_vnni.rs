//! AVX2 with the 256-bit VNNI instructions, as client CPUs without AVX-512 have: the lanes of
//! [`super::avx2`] with shorter integer dot products.
#![expect(unsafe_code, reason = "vector intrinsics; the token proves that they exist")]

use super::avx2::*;
use crate::lanes::Kernel;
use core::arch::x86_64::*;

/// Proof that this CPU has AVX2, FMA, F16C and AVX-VNNI. Only [`AvxVnni::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni {
    ahead: usize,
}

impl AvxVnni {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<AvxVnni> {
        let present = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("avxvnni");
        present.then(|| AvxVnni { ahead: super::ahead() })
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves that every feature `inside` enables is present.
        unsafe { inside(self, kernel) }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn inside<K: Kernel>(token: AvxVnni, kernel: K) -> K::Out {
    kernel.run(token)
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_products(total: [__m256i; 2], w: [__m256i; 2], x: &[i8; 4]) -> [__m256i; 2] {
    let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(i8::cast_unsigned)));
    [_mm256_dpbusd_avx_epi32(total[0], w[0], x), _mm256_dpbusd_avx_epi32(total[1], w[1], x)]
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_nibbles(w: &[[__m256i; 2]; 8], x: &[i8; 32], total: [__m256i; 2]) -> [__m256i; 2] {
    // Two chains a register hide half of the latency of VPDPBUSD.
    let (mut low, mut high) = (total, [_mm256_setzero_si256(); 2]);
    let (x, _) = x.as_chunks::<4>();
    for j in 0..4 {
        low = add_products(low, w[j], &x[j]);
        high = add_products(high, w[j + 4], &x[j + 4]);
    }
    add_i(low, high)
}

#[inline]
#[target_feature(enable = "avx2")]
fn start_bytes(sum: i32) -> [__m256i; 2] {
    splat_i(sum)
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_16_bytes(w: [[__m256i; 2]; 4], x: &[i8; 16], mut total: [__m256i; 2]) -> [__m256i; 2] {
    let (x, _) = x.as_chunks::<4>();
    for j in 0..4 {
        total = add_products(total, w[j], &x[j]);
    }
    total
}

lanes_by_functions!(AvxVnni, V = [__m256; 2], I = [__m256i; 2], WIDEST = 4);
