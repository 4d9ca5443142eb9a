//! Which cards there are, and whether the kernels run on one.

#![expect(unsafe_code, reason = "two calls of the driver that have no safe form")]

use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use crate::CudaError;

/// CUDA version that the kernels are built against, as the driver numbers it.
const VERSION: i32 = 13_000;

/// Oldest compute capability.
const CAPABILITY: (i32, i32) = (8, 0);

/// One card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The number in `cuda:N`.
    pub ordinal: usize,
    /// As the driver names it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub n_multiprocessors: usize,
    /// Bytes of its memory.
    pub memory_bytes: usize,
}

/// All cards, in the driver's order.
///
/// # Errors
/// No driver, or one that is too old.
pub fn devices() -> Result<Vec<DeviceFacts>, CudaError> {
    (0..count()?).map(|ordinal| facts(ordinal).map(|(_, facts)| facts)).collect()
}

/// Bytes that a card can still give, to this process with its context open.
///
/// # Errors
/// No driver, no such card, or a driver that does not say.
pub fn free_memory(ordinal: usize) -> Result<usize, CudaError> {
    let n_devices = count()?;
    if ordinal >= n_devices {
        return Err(CudaError::NoDevice { ordinal, n_devices });
    }
    let failed = |call| CudaError::driver(ordinal, call);
    // A process has one context a card: the backend's, where one is open.
    let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
    let (free, _) = context.mem_get_info().map_err(failed("asking for free memory"))?;
    Ok(free)
}

/// Opens a card that the kernels run on.
pub(crate) fn open(ordinal: usize) -> Result<(Arc<CudaContext>, DeviceFacts), CudaError> {
    let n_devices = count()?;
    if ordinal >= n_devices {
        return Err(CudaError::NoDevice { ordinal, n_devices });
    }
    let (context, facts) = facts(ordinal)?;
    if facts.capability < CAPABILITY {
        return Err(CudaError::OldDevice {
            ordinal,
            name: facts.name,
            expected: dotted(CAPABILITY),
            found: dotted(facts.capability),
        });
    }
    Ok((context, facts))
}

/// The most shared memory that a block of threads may ask for.
pub(crate) fn max_shared_bytes(context: &CudaContext) -> Result<usize, DriverError> {
    let attribute =
        sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(usize::try_from(context.attribute(attribute)?).unwrap_or(0))
}

/// Whether a kernel may start while the one before ends: its machine code waits at the right place
/// where it was compiled for this very card; what the driver compiles from PTX does not.
pub(crate) fn kernels_overlap(facts: &DeviceFacts) -> bool {
    facts.capability == (9, 0)
}

/// Whether it has `wgmma` and clusters of blocks of threads: machine code for this very generation alone.
pub(crate) fn is_hopper(facts: &DeviceFacts) -> bool {
    facts.capability == (9, 0)
}

/// Pairs of chunks of weights that a warp has room for; `DEPTH` of `cu/ring.cuh`.
pub(crate) fn ring_depth(facts: &DeviceFacts) -> usize {
    if facts.capability == (9, 0) { 3 } else { 2 }
}

fn facts(ordinal: usize) -> Result<(Arc<CudaContext>, DeviceFacts), CudaError> {
    let failed = |call| CudaError::driver(ordinal, call);
    let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
    let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let n = context.attribute(attribute).map_err(failed("counting its multiprocessors"))?;
    let facts = DeviceFacts {
        ordinal,
        name: context.name().map_err(failed("asking its name"))?,
        capability: context.compute_capability().map_err(failed("asking its capability"))?,
        n_multiprocessors: usize::try_from(n).unwrap_or(0),
        memory_bytes: context.total_mem().map_err(failed("asking its memory"))?,
    };
    Ok((context, facts))
}

fn count() -> Result<usize, CudaError> {
    // SAFETY: loading the driver's library runs its initialisers only.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let failed = |call| CudaError::driver(0, call);
    result::init().map_err(failed("starting the driver"))?;
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    answer.result().map_err(failed("asking the driver's version"))?;
    if version < VERSION {
        let dotted = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(CudaError::OldDriver { expected: dotted(VERSION), found: dotted(version) });
    }
    let n = CudaContext::device_count().map_err(failed("counting devices"))?;
    Ok(usize::try_from(n).unwrap_or(0))
}

fn dotted((major, minor): (i32, i32)) -> String {
    format!("{major}.{minor}")
}
