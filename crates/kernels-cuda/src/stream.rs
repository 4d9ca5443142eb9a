//! [`Stream`]: the one queue of a device, its kernels, and what is uploaded for single calls.

#![expect(unsafe_code, reason = "kernel launches and copies; the arguments are checked here")]

use std::{
    collections::HashMap,
    ffi::CString,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, result,
    sys,
};
use exrail_kernels::{DeviceCounters, KernelError};

use crate::layout::Machine;
use crate::loader::Loader;
use crate::queue::{Kernel, Queue};
use crate::{CudaError, DeviceFacts, device};

/// The compiled kernels, one fat binary a file of `cu/`.
const BINARIES: [(&str, &[u8]); 13] = [
    ("attention", include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin"))),
    ("draw", include_bytes!(concat!(env!("OUT_DIR"), "/draw.fatbin"))),
    ("flash", include_bytes!(concat!(env!("OUT_DIR"), "/flash.fatbin"))),
    ("group", include_bytes!(concat!(env!("OUT_DIR"), "/group.fatbin"))),
    ("kv", include_bytes!(concat!(env!("OUT_DIR"), "/kv.fatbin"))),
    ("linear", include_bytes!(concat!(env!("OUT_DIR"), "/linear.fatbin"))),
    ("matmul", include_bytes!(concat!(env!("OUT_DIR"), "/matmul.fatbin"))),
    ("norm", include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin"))),
    ("quantise", include_bytes!(concat!(env!("OUT_DIR"), "/quantise.fatbin"))),
    ("repack", include_bytes!(concat!(env!("OUT_DIR"), "/repack.fatbin"))),
    ("rope", include_bytes!(concat!(env!("OUT_DIR"), "/rope.fatbin"))),
    ("rows", include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin"))),
    ("tiles", include_bytes!(concat!(env!("OUT_DIR"), "/tiles.fatbin"))),
];

/// Launches that are handed over while more are asked for: about a third of a step of a small model.
const HAND_OVER_FROM: usize = 64;
/// Shared memory that kernels have besides what a launch adds, at most.
const STATIC_BYTES: usize = 4096;

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
    /// Blocks, `z`.
    pub(crate) runs: usize,
    /// Threads of a block.
    pub(crate) threads: usize,
    /// Bytes of shared memory that the launch adds.
    pub(crate) shared_bytes: usize,
    /// Blocks (`z`) that read each other's shared memory, where the device has clusters.
    pub(crate) cluster: usize,
}

impl Grid {
    /// One block of 256 threads.
    pub(crate) const fn one(shared_bytes: usize) -> Grid {
        Grid { blocks: (1, 1), runs: 1, threads: 256, shared_bytes, cluster: 1 }
    }

    /// One thread for each of `n`.
    pub(crate) fn each(n: usize) -> Grid {
        Grid { blocks: (n.div_ceil(256), 1), ..Grid::one(0) }
    }

    /// One warp for each of `n`.
    pub(crate) fn warps(n: usize) -> Grid {
        Grid { blocks: (n.div_ceil(8), 1), ..Grid::one(0) }
    }
}

/// Memory on the device. What waits in the queue may use it, so that it is handed over before the
/// memory goes.
#[derive(Debug)]
pub(crate) struct Memory {
    slice: Option<CudaSlice<u8>>,
    address: Address,
    len: usize,
    stream: Arc<Stream>,
}

impl Memory {
    /// Zeroed.
    pub(crate) fn zeroed(
        stream: &Arc<Stream>,
        bytes: usize,
        what: &str,
    ) -> Result<Memory, KernelError> {
        let slice = stream.zeroed(bytes, what)?;
        let address = stream.address(&slice);
        Ok(Memory { slice: Some(slice), address, len: bytes, stream: Arc::clone(stream) })
    }

    /// Where it starts.
    pub(crate) fn address(&self) -> Address {
        self.address
    }

    /// Bytes that were asked for.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Copies to the head of the memory. `bytes` may be changed as soon as this returns.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.write_at(0, bytes);
    }

    /// [`Memory::write`] behind the first `offset` bytes.
    pub(crate) fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        let slice = self.slice.as_mut().expect("it goes when this is dropped");
        self.stream.write(slice, offset, bytes);
    }

    /// Copies the head of the memory out, when everything before has run.
    pub(crate) fn read(&self, bytes: &mut [u8]) {
        self.read_at(0, bytes);
    }

    /// [`Memory::read`] behind the first `offset` bytes.
    pub(crate) fn read_at(&self, offset: usize, bytes: &mut [u8]) {
        let slice = self.slice.as_ref().expect("it goes when this is dropped");
        self.stream.read(slice, offset, bytes);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that failed has said so already, and one whose process ends needs no more.
        self.stream.try_flush().ok();
        self.slice = None;
    }
}

/// The kernels of products with weights of one format; a step of decode asks for hundreds. Those that
/// a format of floats lacks are its first.
pub(crate) struct FormatKernels {
    pub(crate) exact: [Kernel; 2],   // by tile
    pub(crate) rounded: [Kernel; 2], // by tile
    pub(crate) few: [Kernel; 4],     // of 8, 16, 32 and 64 rows
    pub(crate) many: Kernel,
    pub(crate) unpack: Kernel,
}

impl FormatKernels {
    fn new(kernels: &HashMap<String, Kernel>, suffix: &str) -> FormatKernels {
        let [one, several] = crate::linear::TILES;
        let exact = [one, several].map(|tile| kernels[&format!("linear_f32_{suffix}_{tile}")]);
        let find = |name: String| kernels.get(&name).copied().unwrap_or(exact[0]);
        let rounded = [one, several].map(|tile| find(format!("linear_{suffix}_{tile}")));
        let few = [1, 2, 4, 8].map(|tiles| find(format!("matmul_few_{suffix}_{tiles}")));
        let (many, unpack) = (format!("matmul_many_{suffix}"), format!("unpack_{suffix}"));
        FormatKernels { exact, rounded, few, many: find(many), unpack: find(unpack) }
    }
}

/// What operations share.
#[derive(Default)]
struct Shared {
    queue: Queue,
    work: HashMap<&'static str, CudaSlice<u8>>,
    kept: Kept,
    retired: Vec<CudaSlice<u8>>, // until what waits was handed over
    follows: bool, // whether what waits belongs to a step behind one that may still run
}

/// What the operations of one step make once and share.
#[derive(Default)]
struct Kept {
    memory: Vec<(CudaSlice<u8>, Address)>,
    facts: Vec<[u64; 4]>, // of this step; entry i lies in memory i
}

/// The one queue of a device: work runs in the order in which it was asked for.
pub(crate) struct Stream {
    pub(crate) facts: DeviceFacts,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: HashMap<String, Kernel>,
    formats: Vec<FormatKernels>, // in the order of `weight::SUFFIXES`
    machine: Machine,
    shared: Mutex<Shared>,
    loader: Mutex<Option<Loader>>, // while a model is loaded
    n_allocations: AtomicU64,      // of the device's memory, ever
}

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
        let limit = device::max_shared_bytes(&context).map_err(failed("asking its limits"))?;
        let mut kernels = HashMap::new();
        for (file, image) in BINARIES {
            load(ordinal, file, image, limit, &mut kernels)?;
        }
        let of_format = |(_, suffix)| FormatKernels::new(&kernels, suffix);
        let formats = crate::weight::SUFFIXES.into_iter().map(of_format).collect();
        let queue = Queue::new(device::kernels_overlap(&facts));
        let shared = Mutex::new(Shared { queue, ..Shared::default() });
        let machine = Machine {
            n_multiprocessors: facts.n_multiprocessors,
            max_shared_bytes: limit.saturating_sub(STATIC_BYTES),
            depth: device::ring_depth(&facts),
        };
        let loader = Mutex::default();
        let n_allocations = AtomicU64::new(0);
        Ok(Stream {
            facts,
            context,
            stream,
            kernels,
            formats,
            machine,
            shared,
            loader,
            n_allocations,
        })
    }

    /// The products of a format, by its place in `weight::SUFFIXES`.
    pub(crate) fn format(&self, index: usize) -> &FormatKernels {
        &self.formats[index]
    }

    /// What of the device the cuts of products depend on.
    pub(crate) fn machine(&self) -> Machine {
        self.machine
    }

    /// Whether it has what came with Hopper: tensor cores that read shared memory (`cu/tiles.cu`), and
    /// clusters of blocks of threads.
    pub(crate) fn is_hopper(&self) -> bool {
        device::is_hopper(&self.facts)
    }

    /// Name of the device in messages.
    pub(crate) fn device(&self) -> String {
        format!("cuda:{} {}", self.facts.ordinal, self.facts.name)
    }

    /// Zeroed memory.
    fn zeroed(&self, bytes: usize, what: &str) -> Result<CudaSlice<u8>, KernelError> {
        tracing::debug!(what, bytes, "memory of the device");
        // An empty allocation has no address.
        self.allocate(bytes.max(16)).map_err(|_| KernelError::OutOfMemory {
            what: what.to_owned(),
            wanted_bytes: bytes,
            device: self.device(),
        })
    }

    fn allocate(&self, bytes: usize) -> Result<CudaSlice<u8>, DriverError> {
        self.n_allocations.fetch_add(1, Ordering::Relaxed);
        self.stream.alloc_zeros(bytes)
    }

    /// Where memory starts.
    fn address(&self, memory: &CudaSlice<u8>) -> Address {
        Address(memory.device_ptr(&self.stream).0)
    }

    fn write(&self, memory: &mut CudaSlice<u8>, offset: usize, bytes: &[u8]) {
        let room = memory.len().saturating_sub(offset);
        assert!(bytes.len() <= room, "{} bytes into {room}", bytes.len());
        if bytes.is_empty() {
            return;
        }
        self.flush();
        let to = memory.device_ptr_mut(&self.stream).0 + offset as u64;
        // SAFETY: `memory` has room, and the driver has taken pageable bytes when this returns.
        let copied = unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) };
        self.expect(copied, "copying to the device");
    }

    /// Copies a file's bytes, at most [`crate::loader::SLOT_BYTES`], to where `then` finds them; `then`
    /// asks for what uses them.
    pub(crate) fn load(&self, bytes: &[u8], then: impl FnOnce(Address)) -> Result<(), KernelError> {
        let mut loader = self.loader.lock().unwrap_or_else(PoisonError::into_inner);
        self.flush();
        if loader.is_none() {
            let allocate = |wanted| {
                let memory = self.allocate(wanted)?;
                let Address(start) = self.address(&memory);
                Ok::<_, DriverError>((memory, start))
            };
            *loader = Some(Loader::new(allocate).map_err(|_| KernelError::OutOfMemory {
                what: "loading".to_owned(),
                wanted_bytes: 2 * crate::loader::SLOT_BYTES,
                device: self.device(),
            })?);
        }
        let loader = loader.as_mut().expect("made above");
        let stream = self.stream.cu_stream();
        match loader.send(bytes, stream) {
            Ok(start) => then(Address(start)),
            Err(error) => self.expect(Err(error), "copying to the device"),
        }
        self.flush();
        self.expect(loader.taken(stream), "copying to the device");
        Ok(())
    }

    /// Gives back what loading needed.
    pub(crate) fn end_of_loading(&self) {
        self.wait();
        *self.loader.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Which list of launches waits: another number after each that was handed over.
    pub(crate) fn list(&self) -> u64 {
        self.shared().queue.list()
    }

    /// Hands a long list over early, so that the device begins while the host goes on asking. Called
    /// where no upload waits for its launch.
    pub(crate) fn hand_over(&self) {
        let shared = self.shared();
        let is_long = shared.queue.len() >= HAND_OVER_FROM && !shared.follows;
        drop(shared);
        if is_long {
            self.flush();
        }
    }

    /// Says that the step that is asked for next follows one that may still run: the device has enough to
    /// do, and one long list has fewer gaps than several.
    pub(crate) fn follow(&self) {
        self.shared().follows = true;
    }

    fn read(&self, memory: &CudaSlice<u8>, offset: usize, bytes: &mut [u8]) {
        let held = memory.len().saturating_sub(offset);
        assert!(bytes.len() <= held, "{} bytes out of {held}", bytes.len());
        if bytes.is_empty() {
            return;
        }
        self.flush();
        let from = memory.device_ptr(&self.stream).0 + offset as u64;
        // SAFETY: `memory` has the bytes, and the stream is waited for before they are used.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) };
        self.expect(copied, "copying from the device");
        self.expect(self.stream.synchronize(), "waiting for kernels");
    }

    /// Copies inside the device.
    pub(crate) fn copy(&self, from: Address, to: Address, bytes: usize) {
        self.flush();
        // SAFETY: callers pass places inside one pool, which do not overlap.
        let copied =
            unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) };
        self.expect(copied, "copying on the device");
    }

    /// Waits until everything has run.
    pub(crate) fn wait(&self) {
        self.flush();
        self.expect(self.stream.synchronize(), "waiting for kernels");
    }

    /// Where what one call needs will be when its kernel runs.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Address {
        let allocate = |wanted| {
            let memory = self.zeroed(wanted, "arguments of calls")?;
            let Address(start) = self.address(&memory);
            Ok::<_, KernelError>((memory, start))
        };
        match self.shared().queue.upload(bytes, allocate) {
            Ok(at) => Address(at),
            Err(error) => panic!("{error}"),
        }
    }

    /// Memory of at least `bytes` that one operation uses; it may hold anything.
    pub(crate) fn work(&self, what: &'static str, bytes: usize) -> Address {
        let mut shared = self.shared();
        if shared.work.get(what).is_none_or(|work| work.len() < bytes) {
            let wanted = bytes.next_power_of_two();
            let work = self.zeroed(wanted, what).unwrap_or_else(|error| panic!("{error}"));
            // What waits may use the old memory. It must go on waiting: the caller has uploads whose
            // launch is not noted yet, and handing over would give their places away.
            let old = shared.work.insert(what, work);
            shared.retired.extend(old);
        }
        self.address(&shared.work[what])
    }

    /// At least `n` counters, all zero; a kernel leaves them so.
    pub(crate) fn counters(&self, n: usize) -> Address {
        self.work("counters", 4 * n)
    }

    /// Memory of `bytes` for what depends on `facts` alone, addresses of this step's uploads among
    /// them, and whether it must still be made: it is there until the step is handed over.
    pub(crate) fn kept_in_step(&self, facts: [u64; 4], bytes: usize) -> (Address, bool) {
        let mut shared = self.shared();
        let Shared { kept, retired, .. } = &mut *shared;
        if let Some(i) = kept.facts.iter().position(|known| *known == facts) {
            return (kept.memory[i].1, false);
        }
        let i = kept.facts.len();
        kept.facts.push(facts);
        if kept.memory.get(i).is_none_or(|(memory, _)| memory.len() < bytes) {
            let wanted = bytes.next_power_of_two();
            let memory = self.zeroed(wanted, "rotations").unwrap_or_else(|error| panic!("{error}"));
            let address = self.address(&memory);
            match kept.memory.get_mut(i) {
                Some(old) => retired.push(std::mem::replace(old, (memory, address)).0),
                None => kept.memory.push((memory, address)),
            }
        }
        (kept.memory[i].1, true)
    }

    /// Hands over what waits, and `event` behind it.
    pub(crate) fn mark(&self, event: sys::CUevent) {
        self.flush();
        // SAFETY: callers keep the event alive until it has happened.
        let marked = unsafe { result::event::record(event, self.stream.cu_stream()) };
        self.expect(marked, "recording an event");
    }

    /// Waits until `event` has happened, not for what was handed over behind it.
    pub(crate) fn wait_for(&self, event: sys::CUevent) {
        self.expect(self.context.bind_to_thread(), "choosing the device");
        // SAFETY: callers keep the event alive.
        let happened = unsafe { result::event::synchronize(event) };
        self.expect(happened, "waiting for kernels");
    }

    /// Asks for a kernel, which runs when a result is asked for. The caller passes what the kernel's
    /// signature in `cu/` says.
    pub(crate) fn launch(&self, kernel: &str, grid: Grid, arguments: &[&dyn AnyArgument]) {
        let Some(&kernel) = self.kernels.get(kernel) else {
            panic!("{}: no kernel `{kernel}`", self.device());
        };
        self.launch_kernel(kernel, grid, arguments);
    }

    /// The same of a kernel that was looked up before.
    pub(crate) fn launch_kernel(&self, kernel: Kernel, grid: Grid, arguments: &[&dyn AnyArgument]) {
        let Grid { blocks: (x, y), runs: z, threads, shared_bytes, cluster } = grid;
        if x == 0 || y == 0 || z == 0 {
            return;
        }
        let narrow = |n: usize| u32::try_from(n).expect("grids are below 2^32");
        let dimensions = [x, y, z, threads, shared_bytes, cluster].map(narrow);
        let arguments: Vec<&[u8]> = arguments.iter().map(|argument| argument.bytes()).collect();
        self.shared().queue.push(kernel, dimensions, &arguments);
    }

    /// Hands over what waits.
    fn flush(&self) {
        self.expect(self.try_flush(), "running kernels");
    }

    pub(crate) fn try_flush(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()?;
        let mut shared = self.shared();
        let done = shared.queue.flush(self.stream.cu_stream());
        shared.retired.clear();
        shared.kept.facts.clear();
        shared.follows = false;
        done
    }

    /// Whether lists of launches become graphs no more.
    pub(crate) fn close_fence(&self, closed: bool) {
        self.shared().queue.close_fence(closed);
    }

    /// What was built since the device was opened. All modules are loaded there.
    pub(crate) fn built(&self) -> DeviceCounters {
        DeviceCounters {
            module_loads: BINARIES.len() as u64,
            graph_captures: self.shared().queue.n_graphs(),
            device_allocs: self.n_allocations.load(Ordering::Relaxed),
            ..DeviceCounters::default()
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // What a panic left is whole: a queue is cleared when it was handed over.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device that failed once answers nothing any more: the engine's worker ends with this
    /// message, and its callers are told.
    fn expect(&self, outcome: Result<(), DriverError>, call: &str) {
        if let Err(error) = outcome {
            panic!("{}: {call}: {error}", self.device());
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Pinned memory is given back in its context; an error leaves nothing to do.
        self.context.bind_to_thread().ok();
        *self.loader.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// An argument of a kernel, by reference.
pub(crate) trait AnyArgument {
    /// Its bytes.
    fn bytes(&self) -> &[u8];
}

impl<T: Argument> AnyArgument for T {
    fn bytes(&self) -> &[u8] {
        // SAFETY: arguments are plain data without padding: numbers, addresses, and the structs of
        // this crate, whose sizes are checked where they are defined.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<T>()) }
    }
}

/// Loads one binary and finds all its kernels. Modules live as long as the program.
fn load(
    ordinal: usize,
    file: &str,
    image: &[u8],
    max_shared_bytes: usize,
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
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(max_shared_bytes.saturating_sub(STATIC_BYTES)).unwrap_or(0);
        // SAFETY: the function was found above.
        let raised = unsafe { sys::cuFuncSetAttribute(function, attribute, bytes) };
        raised.result().map_err(|error| refused(&name, error))?;
        kernels.insert(name, Kernel::new(function));
    }
    Ok(())
}

/// Kernels of a file of `cu/`.
fn names(file: &str) -> Vec<String> {
    let plain = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let blocks = || crate::weight::SUFFIXES.iter().filter(|(dtype, _)| dtype.is_quantised());
    match file {
        "attention" => {
            let mut names: Vec<String> =
                plain(&["attention_full", "attention_f32", "attention_f16", "attention_int8"]);
            names.extend(crate::attention::run_names());
            names
        }
        "draw" => plain(&["draw_weigh", "draw_pick"]),
        "flash" => crate::attention::tile_names().collect(),
        "group" => crate::attention::group_names().collect(),
        "kv" => plain(&["kv_write", "kv_move"]),
        "matmul" => {
            let mut names: Vec<String> = plain(&["halve"]);
            for (_, suffix) in blocks() {
                names.push(format!("matmul_many_{suffix}"));
                names.extend([1, 2, 4, 8].map(|tiles| format!("matmul_few_{suffix}_{tiles}")));
            }
            names
        }
        "tiles" => {
            let mut names: Vec<String> = plain(&crate::linear::TILED);
            names.extend(blocks().map(|(_, suffix)| format!("unpack_{suffix}")));
            names
        }
        "norm" => plain(&["norm_rows"]),
        "quantise" => plain(&["quantise"]),
        "rope" => plain(&["rope", "rope_turns", "place_heads"]),
        "repack" => blocks().map(|(_, suffix)| format!("repack_{suffix}")).collect(),
        "linear" => {
            let mut names = Vec::new();
            for (dtype, suffix) in crate::weight::SUFFIXES {
                for tile in crate::linear::TILES {
                    names.push(format!("linear_f32_{suffix}_{tile}"));
                    if dtype.is_quantised() {
                        names.push(format!("linear_{suffix}_{tile}"));
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
