//! [`Isa`]: the instruction sets, and the one place that chooses between them.

#[cfg(target_arch = "aarch64")]
use crate::arch::Neon;
use crate::arch::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::arch::{Avx2, Avx512Vnni, AvxVnni};
use crate::lanes::Kernel;
use std::fmt;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// NEON of AArch64 with the dot products of `asimddp`.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 with FMA, F16C and AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl Isa {
    /// Every one, slowest first among those of one architecture.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni];

    /// Those that this CPU runs, slowest first; never empty.
    #[must_use]
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|&isa| Processor::of(isa).is_some()).collect()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx-vnni",
            Isa::Avx512Vnni => "avx512-vnni",
        })
    }
}

/// A proof that the CPU runs an instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Processor {
    Scalar(Scalar),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
}

impl Processor {
    /// `None` when this CPU does not run it.
    pub(crate) fn of(isa: Isa) -> Option<Processor> {
        match isa {
            Isa::Scalar => Some(Processor::Scalar(Scalar)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::detect().map(Processor::Neon),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => None,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().map(Processor::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => AvxVnni::detect().map(Processor::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Avx512Vnni::detect().map(Processor::Avx512Vnni),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni => None,
        }
    }

    /// The fastest that this CPU runs.
    pub(crate) fn best() -> Processor {
        Isa::ALL.into_iter().rev().find_map(Processor::of).unwrap_or(Processor::Scalar(Scalar))
    }

    /// The same on a CPU that wants to be asked this far ahead, which the portable code never is.
    #[cfg(test)]
    pub(crate) fn asking(self, ahead: usize) -> Processor {
        match self {
            Processor::Scalar(token) => Processor::Scalar(token),
            #[cfg(target_arch = "aarch64")]
            Processor::Neon(token) => Processor::Neon(token.asking(ahead)),
            #[cfg(target_arch = "x86_64")]
            Processor::Avx2(token) => Processor::Avx2(token.asking(ahead)),
            #[cfg(target_arch = "x86_64")]
            Processor::AvxVnni(token) => Processor::AvxVnni(token.asking(ahead)),
            #[cfg(target_arch = "x86_64")]
            Processor::Avx512Vnni(token) => Processor::Avx512Vnni(token.asking(ahead)),
        }
    }

    /// Which one it is.
    pub(crate) fn isa(self) -> Isa {
        match self {
            Processor::Scalar(_) => Isa::Scalar,
            #[cfg(target_arch = "aarch64")]
            Processor::Neon(_) => Isa::Neon,
            #[cfg(target_arch = "x86_64")]
            Processor::Avx2(_) => Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Processor::AvxVnni(_) => Isa::AvxVnni,
            #[cfg(target_arch = "x86_64")]
            Processor::Avx512Vnni(_) => Isa::Avx512Vnni,
        }
    }

    /// Runs a kernel.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            Processor::Scalar(token) => token.enter(kernel),
            #[cfg(target_arch = "aarch64")]
            Processor::Neon(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Processor::Avx2(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Processor::AvxVnni(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Processor::Avx512Vnni(token) => token.enter(kernel),
        }
    }
}

#[cfg(all(test, target_arch = "aarch64"))]
mod tests {
    use super::*;

    #[test]
    fn neon_is_among_what_is_tested() {
        let available = Isa::available();
        assert!(available.contains(&Isa::Neon), "this CPU has no `asimddp`: {available:?}");
    }
}
