//! [`ReadProbe`]: how fast the backend's threads read memory, which bounds decode.
//!
//! After the read-only kernel of STREAM-like tests (McCalpin 1995): every byte of a buffer far
//! larger than the caches is loaded once and combined, with the threads, pages and prefetches that
//! weights are read with.

use crate::backend::CpuBackend;
use crate::lanes::{Kernel, Lanes};
use crate::memory::Bytes;
use crate::pool::Pool;
use crate::processor::Processor;
use exrail_kernels::{Backend, KernelError};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Bytes that a thread takes at once: consecutive ones of its home range.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes from a load to the line that is asked for, as in the matrix products.
const PREFETCH_BYTES: usize = 4 << 10;

/// A buffer that the threads of a [`CpuBackend`] read.
#[derive(Debug)]
pub struct ReadProbe {
    backend: CpuBackend,
    bytes: Bytes,
}

impl ReadProbe {
    /// A buffer of `len_bytes`, which should be several times the last-level cache. Its pages are
    /// in memory when this returns.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(backend: &CpuBackend, len_bytes: usize) -> Result<ReadProbe, KernelError> {
        let mut bytes = Bytes::alone(len_bytes).ok_or_else(|| KernelError::OutOfMemory {
            what: "the read probe".to_owned(),
            wanted_bytes: len_bytes,
            device: backend.name(),
        })?;
        // Pages that were never written all map to the one page of zeros, which caches hold.
        bytes.fill(1);
        Ok(ReadProbe { backend: backend.clone(), bytes })
    }

    /// Reads the whole buffer once, on all threads, and returns bytes per second.
    #[must_use]
    pub fn pass(&self) -> f64 {
        let (processor, pool) = self.backend.parts();
        let since = Instant::now();
        std::hint::black_box(read(processor, pool, &self.bytes));
        self.bytes.len() as f64 / since.elapsed().as_secs_f64()
    }
}

/// All whole lines of `bytes` or-ed together, byte by byte and then over the lanes.
fn read(processor: Processor, pool: &Pool, bytes: &[u8]) -> u32 {
    let all = AtomicU32::new(0);
    pool.run(bytes.len().div_ceil(CHUNK_BYTES), &|i| {
        let chunk = &bytes[i * CHUNK_BYTES..bytes.len().min((i + 1) * CHUNK_BYTES)];
        all.fetch_or(processor.run(OrLines(chunk)), Ordering::Relaxed);
    });
    all.into_inner()
}

/// The or of the lines of a chunk, reduced to the bits that any lane has.
struct OrLines<'a>(&'a [u8]);

impl Kernel for OrLines<'_> {
    type Out = u32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> u32 {
        // Four accumulators, so that the loads are the limit and not the chain of ors.
        let mut sums = [lanes.load_codes(&[0; 64]); 4];
        let (fours, tail) = self.0.as_chunks::<256>();
        for four in fours {
            for (sum, line) in sums.iter_mut().zip(four.as_chunks::<64>().0) {
                lanes.prefetch(line, PREFETCH_BYTES);
                *sum = lanes.or(*sum, lanes.load_codes(line));
            }
        }
        for line in tail.as_chunks::<64>().0 {
            sums[0] = lanes.or(sums[0], lanes.load_codes(line));
        }
        let all = lanes.or(lanes.or(sums[0], sums[1]), lanes.or(sums[2], sums[3]));
        lanes
            .unpack_bytes(all)
            .into_iter()
            .map(|bytes| lanes.maximum(bytes) as u32)
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::Isa;
    use crate::{CpuOptions, affinity};

    #[test]
    fn every_line_is_read_on_every_instruction_set() {
        let len = 2 * CHUNK_BYTES + 256 + 64;
        let pool = Pool::new(2, &affinity::cores());
        for isa in Isa::available() {
            let processor = Processor::of(isa).expect("listed as available");
            let mut bytes = vec![1_u8; len];
            assert_eq!(read(processor, &pool, &bytes), 1, "{isa}");
            // One line of the first chunk, of the second, and of the tail.
            for line in [3, CHUNK_BYTES / 64 + 7, len / 64 - 1] {
                bytes[line * 64 + 5] = 9;
                assert_eq!(read(processor, &pool, &bytes), 9, "{isa}, line {line}");
                bytes[line * 64 + 5] = 1;
            }
        }
    }

    #[test]
    fn a_pass_takes_time_and_too_large_a_buffer_is_refused() {
        let options = CpuOptions { threads: Some(2), ..CpuOptions::default() };
        let backend = CpuBackend::new(options).expect("no instruction set was asked for");
        let probe = ReadProbe::new(&backend, 3 << 20).expect("3 MiB");
        assert!(probe.pass().is_finite() && probe.pass() > 0.0);
        assert!(ReadProbe::new(&backend, usize::MAX / 2).is_err());
    }
}
