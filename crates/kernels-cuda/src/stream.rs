//! [`Stream`]: the one queue of a device, its kernels, and what is uploaded for single calls.

#![expect(unsafe_code, reason = "kernel launches and copies; the arguments are checked here")]

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, result,
    sys,
};
use exrail_kernels::KernelError;

use crate::{CudaError, DeviceFacts, device};

/// The compiled kernels, one fat binary a file of `cu/`.
const BINARIES: [(&str, &[u8]); 8] = [
    ("attention", include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin"))),
    ("kv", include_bytes!(concat!(env!("OUT_DIR"), "/kv.fatbin"))),
    ("linear", include_bytes!(concat!(env!("OUT_DIR"), "/linear.fatbin"))),
    ("norm", include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin"))),
    ("quantise", include_bytes!(concat!(env!("OUT_DIR"), "/quantise.fatbin"))),
    ("repack", include_bytes!(concat!(env!("OUT_DIR"), "/repack.fatbin"))),
    ("rope", include_bytes!(concat!(env!("OUT_DIR"), "/rope.fatbin"))),
    ("rows", include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin"))),
];

/// An address on the device, as kernels take it; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Address(pub(crate) u64);

// SAFETY: an address is the eight bytes that a pointer argument of a kernel has.
unsafe impl DeviceRepr for Address {}

/// What a kernel takes by value: plain data with the layout of its C++ counterpart.
pub(crate) trait Argument: DeviceRepr {}
impl<T: DeviceRepr> Argument for T {}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Blocks, `x` and `y`.
    pub(crate) blocks: (usize, usize),
    /// Threads of a block.
    pub(crate) threads: usize,
    /// Bytes of shared memory that the launch adds.
    pub(crate) shared_bytes: usize,
}

impl Grid {
    /// One thread for each of `n`.
    pub(crate) fn each(n: usize) -> Grid {
        Grid { blocks: (n.div_ceil(256), 1), threads: 256, shared_bytes: 0 }
    }

    /// One warp for each of `n`.
    pub(crate) fn warps(n: usize) -> Grid {
        Grid { blocks: (n.div_ceil(8), 1), threads: 256, shared_bytes: 0 }
    }
}

/// What is uploaded for single calls, each in a place of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Ids,
    Positions,
    Frequencies,
    KvSlots,
    AttentionRows,
    PageTable,
    Rows,
    Scales,
    Spans,
}

struct Uploaded {
    host: Vec<u8>,
    device: CudaSlice<u8>,
}

/// Scratch that operations share.
#[derive(Default)]
struct Scratch {
    uploads: HashMap<Slot, Uploaded>,
    work: HashMap<&'static str, CudaSlice<u8>>,
}

/// The one queue of a device: work runs in the order in which it was asked for.
pub(crate) struct Stream {
    pub(crate) facts: DeviceFacts,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: HashMap<String, Kernel>,
    scratch: Mutex<Scratch>,
}

struct Kernel(sys::CUfunction);

// SAFETY: a function is an immutable handle of its context, which every thread may use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("facts", &self.facts).finish_non_exhaustive()
    }
}

impl Stream {
    /// Opens a device and loads all kernels.
    pub(crate) fn open(ordinal: usize) -> Result<Stream, CudaError> {
        let (context, facts) = device::open(ordinal)?;
        // SAFETY: one stream orders everything that this backend does; nothing relies on events.
        unsafe { context.disable_event_tracking() };
        let failed = |call| CudaError::driver(ordinal, call);
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        let mut kernels = HashMap::new();
        for (file, image) in BINARIES {
            load(ordinal, file, image, &mut kernels)?;
        }
        Ok(Stream { facts, context, stream, kernels, scratch: Mutex::default() })
    }

    /// Name of the device in messages.
    pub(crate) fn device(&self) -> String {
        format!("cuda:{} {}", self.facts.ordinal, self.facts.name)
    }

    /// Zeroed memory.
    pub(crate) fn zeroed(&self, bytes: usize, what: &str) -> Result<CudaSlice<u8>, KernelError> {
        // An empty allocation has no address.
        self.stream.alloc_zeros(bytes.max(16)).map_err(|_| KernelError::OutOfMemory {
            what: what.to_owned(),
            wanted_bytes: bytes,
            device: self.device(),
        })
    }

    /// Where memory starts.
    pub(crate) fn address(&self, memory: &CudaSlice<u8>) -> Address {
        Address(memory.device_ptr(&self.stream).0)
    }

    /// Copies to the head of `memory`. `bytes` may be changed as soon as this returns.
    pub(crate) fn write(&self, memory: &mut CudaSlice<u8>, bytes: &[u8]) {
        assert!(bytes.len() <= memory.len(), "{} bytes into {}", bytes.len(), memory.len());
        if bytes.is_empty() {
            return;
        }
        self.bind();
        let to = memory.device_ptr_mut(&self.stream).0;
        // SAFETY: `memory` has room, and the driver has taken pageable bytes when this returns.
        let copied = unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) };
        self.expect(copied, "copying to the device");
    }

    /// Copies the head of `memory` out, when everything before has run.
    pub(crate) fn read(&self, memory: &CudaSlice<u8>, bytes: &mut [u8]) {
        assert!(bytes.len() <= memory.len(), "{} bytes out of {}", bytes.len(), memory.len());
        if bytes.is_empty() {
            return;
        }
        self.bind();
        let from = memory.device_ptr(&self.stream).0;
        // SAFETY: `memory` has the bytes, and the stream is waited for before they are used.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) };
        self.expect(copied, "copying from the device");
        self.wait();
    }

    /// Copies inside the device.
    pub(crate) fn copy(&self, from: Address, to: Address, bytes: usize) {
        self.bind();
        // SAFETY: callers pass places inside one pool, which do not overlap.
        let copied =
            unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) };
        self.expect(copied, "copying on the device");
    }

    /// Waits until everything has run.
    pub(crate) fn wait(&self) {
        self.expect(self.stream.synchronize(), "waiting for kernels");
    }

    /// Uploads what one call needs, unless the last call at that slot had the same.
    pub(crate) fn upload(&self, slot: Slot, bytes: Vec<u8>) -> Address {
        let mut scratch = self.scratch();
        let known = scratch.uploads.get(&slot).is_some_and(|known| known.host == bytes);
        if !known {
            let mut device = match scratch.uploads.remove(&slot) {
                Some(old) if old.device.len() >= bytes.len() => old.device,
                _ => {
                    let wanted = bytes.len().next_power_of_two();
                    self.zeroed(wanted, "a call's arguments").unwrap_or_else(|e| panic!("{e}"))
                }
            };
            self.write(&mut device, &bytes);
            scratch.uploads.insert(slot, Uploaded { host: bytes, device });
        }
        self.address(&scratch.uploads[&slot].device)
    }

    /// Memory of at least `bytes` that one operation uses; it may hold anything.
    pub(crate) fn work(&self, what: &'static str, bytes: usize) -> Address {
        let mut scratch = self.scratch();
        if scratch.work.get(what).is_none_or(|work| work.len() < bytes) {
            scratch.work.remove(what);
            let work = self
                .zeroed(bytes.next_power_of_two(), what)
                .unwrap_or_else(|error| panic!("{error}"));
            scratch.work.insert(what, work);
        }
        self.address(&scratch.work[what])
    }

    /// Copies the head of an operation's memory out.
    pub(crate) fn read_work(&self, what: &'static str, bytes: &mut [u8]) {
        self.read(&self.scratch().work[what], bytes);
    }

    /// Asks for a kernel. The caller passes what the kernel's signature in `cu/` says.
    pub(crate) fn launch(&self, kernel: &str, grid: Grid, arguments: &[&dyn AnyArgument]) {
        let Grid { blocks: (x, y), threads, shared_bytes } = grid;
        if x == 0 || y == 0 {
            return;
        }
        let Some(function) = self.kernels.get(kernel) else {
            panic!("{}: no kernel `{kernel}`", self.device());
        };
        self.bind();
        let narrow = |n: usize| u32::try_from(n).expect("grids are below 2^32");
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|a| a.pointer()).collect();
        // SAFETY: the pointers are to live values of the types that the kernel's signature has, which
        // the tests of every operation check.
        let launched = unsafe {
            result::launch_kernel(
                function.0,
                (narrow(x), narrow(y), 1),
                (narrow(threads), 1, 1),
                narrow(shared_bytes),
                self.stream.cu_stream(),
                &mut pointers,
            )
        };
        self.expect(launched, kernel);
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // What a panic left is either whole or absent.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bind(&self) {
        self.expect(self.context.bind_to_thread(), "using the device");
    }

    /// A device that failed once answers nothing any more: the engine's worker ends with this
    /// message, and its callers are told.
    fn expect(&self, outcome: Result<(), DriverError>, call: &str) {
        if let Err(error) = outcome {
            panic!("{}: {call}: {error}", self.device());
        }
    }
}

/// An argument of a kernel, by reference.
pub(crate) trait AnyArgument {
    /// Where its bytes are.
    fn pointer(&self) -> *mut c_void;
}

impl<T: Argument> AnyArgument for T {
    fn pointer(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }
}

/// Loads one binary and finds all its kernels. Modules live as long as the program.
fn load(
    ordinal: usize,
    file: &str,
    image: &[u8],
    kernels: &mut HashMap<String, Kernel>,
) -> Result<(), CudaError> {
    let refused = |kernel: &str, error: DriverError| CudaError::Kernel {
        ordinal,
        kernel: kernel.to_owned(),
        reason: error.to_string(),
    };
    // SAFETY: `image` is a whole fat binary, which carries its own length.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
        .map_err(|error| refused(file, error))?;
    for name in names(file) {
        let symbol = CString::new(name.clone()).expect("names have no zero byte");
        // SAFETY: the module was loaded above and is never unloaded.
        let function = unsafe { result::module::get_function(module, symbol) }
            .map_err(|error| refused(&name, error))?;
        kernels.insert(name, Kernel(function));
    }
    Ok(())
}

/// Kernels of a file of `cu/`.
fn names(file: &str) -> Vec<String> {
    let plain = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let blocks = || crate::weight::SUFFIXES.iter().filter(|(dtype, _)| dtype.is_quantised());
    match file {
        "attention" => {
            plain(&["attention_f32", "attention_f16", "attention_int8", "attention_full"])
        }
        "kv" => plain(&["kv_write"]),
        "norm" => plain(&["norm_rows"]),
        "quantise" => plain(&["quantise"]),
        "rope" => plain(&["rope"]),
        "repack" => blocks().map(|(_, suffix)| format!("repack_{suffix}")).collect(),
        "linear" => {
            let mut names = Vec::new();
            for (dtype, suffix) in crate::weight::SUFFIXES {
                for tile in crate::linear::TILES {
                    names.push(format!("linear_f32_{suffix}_{tile}"));
                    if dtype.is_quantised() {
                        names.push(format!("linear_once_{suffix}_{tile}"));
                        names.push(format!("linear_twice_{suffix}_{tile}"));
                    }
                }
            }
            names
        }
        _ => {
            let mut names: Vec<String> =
                plain(&["gather_rows", "add", "scale_and_cap", "mean_rows", "largest"]);
            names.extend(crate::weight::SUFFIXES.map(|(_, suffix)| format!("embed_{suffix}")));
            names
        }
    }
}
