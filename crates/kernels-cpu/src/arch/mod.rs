//! Capability tokens, one a module: by instruction set first, then by operation.

mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub(crate) use scalar::Scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{avx2::Avx2, avx512::Avx512Vnni};

/// Asks for the cache line at an address, which may be any: the hint never faults.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the intrinsic takes a pointer")]
pub(crate) fn prefetch(address: usize) {
    use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that the program can see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) };
}

/// No hint on this architecture.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn prefetch(_address: usize) {}
