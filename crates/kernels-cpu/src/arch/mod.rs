//! Capability tokens, one a module: by instruction set first, then by operation.

mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub(crate) use scalar::Scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{avx2::Avx2, avx512::Avx512Vnni};
