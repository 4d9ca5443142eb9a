//! [`Loader`]: from the pages of a file to the device. Threads copy into pinned memory while the device
//! takes what was copied before.

#![expect(unsafe_code, reason = "pinned memory and events; the pointers are kept here")]

use std::{ptr, slice, thread};

use cudarc::driver::{CudaSlice, DriverError, result, sys};

/// Bytes that are on their way at once, twice.
pub(crate) const SLOT_BYTES: usize = 32 << 20;
/// Threads that copy at most, and bytes from which another one is worth its start.
const MAX_THREADS: usize = 8;
const THREAD_BYTES: usize = 1 << 20;

/// Memory of the host and of the device that takes turns.
pub(crate) struct Loader {
    slots: [Slot; 2],
    next: usize,
}

struct Slot {
    host: *mut u8, // pinned, SLOT_BYTES
    device: CudaSlice<u8>,
    start: u64,
    taken: sys::CUevent,
}

// SAFETY: pinned memory and an event belong to the context, which every thread binds; one thread at a
// time has the loader.
unsafe impl Send for Loader {}

impl Loader {
    /// `allocate` gives memory of the device and where it starts. The context is current.
    pub(crate) fn new<E: From<DriverError>>(
        mut allocate: impl FnMut(usize) -> Result<(CudaSlice<u8>, u64), E>,
    ) -> Result<Loader, E> {
        let slots = [Slot::new(&mut allocate)?, Slot::new(&mut allocate)?];
        Ok(Loader { slots, next: 0 })
    }

    /// Sends bytes on their way, at most [`SLOT_BYTES`], and says where they will be. What uses them
    /// must be asked for before [`Loader::taken`] is called.
    pub(crate) fn send(&mut self, bytes: &[u8], stream: sys::CUstream) -> Result<u64, DriverError> {
        assert!(bytes.len() <= SLOT_BYTES, "{} bytes in a slot", bytes.len());
        let slot = &self.slots[self.next];
        // SAFETY: the event is live.
        unsafe { result::event::synchronize(slot.taken)? };
        // SAFETY: the memory has SLOT_BYTES, and the device has taken what was there.
        let host = unsafe { slice::from_raw_parts_mut(slot.host, bytes.len()) };
        copy(bytes, host);
        // SAFETY: the device's memory has as many, and pinned memory stays until it was taken.
        unsafe { result::memcpy_htod_async(slot.start, host, stream)? };
        Ok(slot.start)
    }

    /// Notes that everything that uses the last bytes was asked for.
    pub(crate) fn taken(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        let slot = &self.slots[self.next];
        self.next = 1 - self.next;
        // SAFETY: the event and the stream are live.
        unsafe { result::event::record(slot.taken, stream) }
    }
}

impl Slot {
    fn new<E: From<DriverError>>(
        allocate: &mut impl FnMut(usize) -> Result<(CudaSlice<u8>, u64), E>,
    ) -> Result<Slot, E> {
        let (device, start) = allocate(SLOT_BYTES)?;
        let taken = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: a size, and no flags.
        let host = match unsafe { result::malloc_host(SLOT_BYTES, 0) } {
            Ok(host) => host.cast(),
            Err(error) => {
                // SAFETY: made above, and not used.
                unsafe { result::event::destroy(taken) }.ok();
                return Err(error.into());
            }
        };
        // SAFETY: pinned memory of that size; it must hold something before it is a slice.
        unsafe { ptr::write_bytes(host, 0, SLOT_BYTES) };
        Ok(Slot { host, device, start, taken })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _device = &self.device; // It goes with the slot.
        // An error leaves nothing to do: the process gives everything back.
        // SAFETY: the event is live; what was sent is taken when this returns.
        unsafe { result::event::synchronize(self.taken) }.ok();
        // SAFETY: made in `new`, and destroyed here alone.
        unsafe { result::event::destroy(self.taken) }.ok();
        // SAFETY: as above.
        unsafe { result::free_host(self.host.cast()) }.ok();
    }
}

/// Copies with several threads: one alone is slower than the bus, and a file's pages may have to be
/// mapped first.
fn copy(from: &[u8], to: &mut [u8]) {
    let available = thread::available_parallelism().map_or(1, usize::from);
    let n_threads = available.min(MAX_THREADS).min(from.len().div_ceil(THREAD_BYTES)).max(1);
    let part = from.len().div_ceil(n_threads).max(1);
    let mut parts = from.chunks(part).zip(to.chunks_mut(part));
    let first = parts.next();
    thread::scope(|scope| {
        for (from, to) in parts {
            scope.spawn(|| to.copy_from_slice(from));
        }
        if let Some((from, to)) = first {
            to.copy_from_slice(from);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_copied_whatever_the_threads() {
        for len in [0, 1, THREAD_BYTES - 1, THREAD_BYTES + 1, 5 * THREAD_BYTES + 3] {
            let from: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            let mut to = vec![0; len];
            copy(&from, &mut to);
            assert!(from == to, "{len} bytes");
        }
    }
}
