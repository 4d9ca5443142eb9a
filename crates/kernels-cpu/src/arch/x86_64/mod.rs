//! AVX2, AVX2 with VNNI, and AVX-512 with VNNI.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx_vnni;
