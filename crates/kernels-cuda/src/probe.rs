//! [`CopyProbe`]: how fast the device moves its memory, which bounds decode.

use std::time::Instant;

use exrail_kernels::KernelError;

use crate::CudaBackend;
use crate::stream::Memory;

/// Copies in one pass, so that the host's calls do not count.
const COPIES: usize = 8;

/// Two halves of a buffer, one of which is copied over the other.
pub struct CopyProbe {
    backend: CudaBackend,
    from: Memory,
    to: Memory,
}

impl CopyProbe {
    /// A buffer of `len_bytes`, which should be several times the last-level cache.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &CudaBackend, len_bytes: usize) -> Result<CopyProbe, KernelError> {
        let half = || Memory::zeroed(backend.stream(), len_bytes / 2, "the copy probe");
        let (from, to) = (half()?, half()?);
        Ok(CopyProbe { backend: backend.clone(), from, to })
    }

    /// Copies several times and returns bytes per second, those read and those written.
    #[must_use]
    pub fn pass(&mut self) -> f64 {
        let stream = self.backend.stream();
        stream.wait();
        let since = Instant::now();
        let (from, to) = (self.from.address(), self.to.address());
        for _ in 0..COPIES {
            stream.copy(from, to, self.from.len());
        }
        stream.wait();
        (2 * COPIES * self.from.len()) as f64 / since.elapsed().as_secs_f64()
    }
}
