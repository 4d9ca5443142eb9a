//! [`CudaFound`]: the largest or drawn outputs of some rows, on their way to the host.
//!
//! The kernel that finds them writes them to memory of the device, where the next step may read its tokens,
//! and to pinned memory of the host. The event behind it says that they are there, so that the host
//! waits for them and not for what was asked for since.

#![expect(unsafe_code, reason = "pinned memory and events; the pointers are kept here")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{ptr, slice};

use cudarc::driver::{DriverError, result, sys};
use exrail_kernels::{KernelError, Largest};

use crate::stream::{Address, Memory, Stream};

/// Bytes of a row: [`Largest`], as `cu/found.cuh` has it.
const ROW_BYTES: usize = 8;
/// Rows that a slot has room for at least.
const MIN_ROWS: usize = 256;

/// The largest or drawn outputs of some rows, which may not be there yet.
#[derive(Debug)]
pub struct CudaFound {
    n_rows: usize,
    slot: Option<Slot>, // until it is dropped; none of no rows
    slots: Arc<Slots>,
}

impl CudaFound {
    /// A place for the answer about `n_rows`. [`CudaFound::asked`] comes behind the launch that writes it.
    ///
    /// # Panics
    /// When there is no memory.
    pub(crate) fn new(slots: &Arc<Slots>, stream: &Arc<Stream>, n_rows: usize) -> CudaFound {
        let slot = (n_rows > 0).then(|| slots.take(stream, n_rows));
        CudaFound { n_rows, slot, slots: Arc::clone(slots) }
    }

    /// Rows that were asked about.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Where the kernel writes its answer: on the device and on the host.
    pub(crate) fn places(&self) -> [Address; 2] {
        let places = |slot: &Slot| [slot.device.address(), Address(slot.host as u64)];
        self.slot.as_ref().map_or([Address(0); 2], places)
    }

    /// Hands over what waits: the answer is there when all of that has run.
    pub(crate) fn asked(&self) {
        if let Some(slot) = &self.slot {
            slot.stream.mark(slot.written);
        }
    }

    /// Waits for the answer.
    pub(crate) fn read(&self) -> Vec<Largest> {
        let Some(slot) = &self.slot else { return Vec::new() };
        slot.stream.wait_for(slot.written);
        // SAFETY: a slot has room for the rows that it was taken for, `Slot::new` wrote all of it, and
        // the device has written what it writes: the event is behind that, and nothing later writes
        // here while this slot is held.
        let bytes = unsafe { slice::from_raw_parts(slot.host, self.n_rows * ROW_BYTES) };
        let rows = bytes.as_chunks::<ROW_BYTES>().0.iter();
        rows.map(|bytes| {
            let [index, value] = [0, 4].map(|at| [0, 1, 2, 3].map(|i| bytes[at + i]));
            Largest { index: u32::from_le_bytes(index), value: f32::from_le_bytes(value) }
        })
        .collect()
    }
}

impl Drop for CudaFound {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.slots.places().free.push(slot);
        }
    }
}

/// Places for answers.
///
/// One may be given away again while the device still writes or reads its last answer: the stream runs
/// in order, so that the next answer is written behind both, and its event is recorded behind that.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<Places>);

#[derive(Debug, Default)]
struct Places {
    free: Vec<Slot>,
    n_made: usize,
}

impl Slots {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // a list of slots is always whole
    }

    /// The oldest of those that have room. Steps then take turns with one or two addresses, and are few
    /// graphs.
    fn take(&self, stream: &Arc<Stream>, n_rows: usize) -> Slot {
        let mut places = self.places();
        let fits = places.free.iter().enumerate();
        let fits = fits.filter(|(_, slot)| slot.device.len() >= n_rows * ROW_BYTES);
        if let Some((at, _)) = fits.min_by_key(|(_, slot)| slot.number) {
            return places.free.swap_remove(at);
        }
        places.n_made += 1;
        let room = n_rows.next_power_of_two().max(MIN_ROWS);
        Slot::new(stream, places.n_made, room).unwrap_or_else(|error| panic!("{error}"))
    }
}

#[derive(Debug)]
struct Slot {
    number: usize, // in the order of their making
    device: Memory,
    host: *mut u8, // pinned, as long
    written: sys::CUevent,
    stream: Arc<Stream>,
}

// SAFETY: pinned memory and an event belong to the context, which every thread binds; whoever has the
// slot is alone with it.
unsafe impl Send for Slot {}

impl Slot {
    fn new(stream: &Arc<Stream>, number: usize, n_rows: usize) -> Result<Slot, KernelError> {
        let (bytes, what) = (n_rows * ROW_BYTES, "largest outputs");
        let device = Memory::zeroed(stream, bytes, what)?; // the context is current from here on
        let (host, written) = pinned(bytes).map_err(|_| KernelError::OutOfMemory {
            what: what.to_owned(),
            wanted_bytes: bytes,
            device: stream.device(),
        })?;
        Ok(Slot { number, device, host, written, stream: Arc::clone(stream) })
    }
}

/// Zeroed memory of the host, which the device writes at the same address, and an event.
fn pinned(bytes: usize) -> Result<(*mut u8, sys::CUevent), DriverError> {
    let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
    // SAFETY: a size, and no flags.
    let host: *mut u8 = match unsafe { result::malloc_host(bytes, 0) } {
        Ok(host) => host.cast(),
        Err(error) => {
            // SAFETY: made above, and not used.
            unsafe { result::event::destroy(event) }.ok();
            return Err(error);
        }
    };
    // SAFETY: pinned memory of that size; it must hold something before it is a slice.
    unsafe { ptr::write_bytes(host, 0, bytes) };
    Ok((host, event))
}

impl Drop for Slot {
    fn drop(&mut self) {
        // An error leaves nothing to do: the process gives everything back.
        self.stream.try_flush().ok(); // and the context is current
        // SAFETY: the event is live; the device has written to the memory when this returns.
        unsafe { result::event::synchronize(self.written) }.ok();
        // SAFETY: made in `pinned`, and destroyed here alone.
        unsafe { result::event::destroy(self.written) }.ok();
        // SAFETY: as above.
        unsafe { result::free_host(self.host.cast()) }.ok();
    }
}
