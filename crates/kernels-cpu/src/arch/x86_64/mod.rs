//! AVX2, AVX2 with VNNI, and AVX-512 with VNNI.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx_vnni;

use core::arch::x86_64::__cpuid;

/// [`crate::lanes::Lanes::ahead`] of this CPU.
///
/// Measured with AVX-512 VNNI and one row, each distance beside what is best on the other CPU. On an
/// AMD EPYC (Zen 4), whose own prefetchers follow the stream of a group and are disturbed by requests
/// for what lies further ahead, 128 bytes are 9 to 35 % faster than 4 KiB. On an Intel Xeon (Emerald
/// Rapids) those do not keep up with the L3 and the memory of a server, and 8 KiB are 20 to 70 %
/// faster than 128 bytes; 4 KiB are as good for 4-bit weights and worse for bytes.
fn ahead() -> usize {
    if is_intel() { 8 << 10 } else { 128 }
}

fn is_intel() -> bool {
    let leaf = __cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}
