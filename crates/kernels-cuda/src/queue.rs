//! [`Queue`]: launches that wait until a result is asked for, and the graphs that they become.
//!
//! Launching a kernel takes the host several microseconds, longer than a small kernel runs. Operations
//! therefore only note what they would launch; when a value is read, all of it is handed over at
//! once. A list of launches that was handed over before becomes a CUDA graph, whose nodes follow each
//! other in about a microsecond. What differs between two steps of decode (tokens, positions, pages)
//! is no argument but memory, uploaded before, so that the steps of a batch are one graph. Behind the
//! warm-up fence no graph is made: a list without one is handed over launch by launch.

#![expect(unsafe_code, reason = "launches, captures and graphs; the arguments are kept here")]

use std::collections::VecDeque;
use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher};

use cudarc::driver::{CudaSlice, DriverError, result, sys};

/// Launches from which a graph is worth its making.
const GRAPH_FROM: usize = 16;
/// Graphs that are kept, and lists that are remembered.
const KEPT: usize = 512;
/// Smallest memory for uploads, in bytes.
const CHUNK_BYTES: usize = 1 << 20;
/// Uploads start on multiples of this.
const ALIGNED: usize = 256;

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel(usize);

impl Kernel {
    pub(crate) fn new(function: sys::CUfunction) -> Kernel {
        Kernel(function as usize)
    }

    fn function(self) -> sys::CUfunction {
        self.0 as sys::CUfunction
    }
}

/// Blocks (x, y, z), threads and bytes of shared memory of a launch, and blocks (z) of a cluster.
pub(crate) type Dimensions = [u32; 6];

/// One launch; its arguments are in [`List::words`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Launch {
    kernel: Kernel,
    dimensions: Dimensions,
    first_argument: usize,
    n_arguments: usize,
}

/// Launches in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct List {
    launches: Vec<Launch>,
    arguments: Vec<usize>, // where in `words` each starts
    words: Vec<u64>,
}

impl List {
    fn push(&mut self, kernel: Kernel, dimensions: Dimensions, arguments: &[&[u8]]) {
        let first_argument = self.arguments.len();
        for bytes in arguments {
            self.arguments.push(self.words.len());
            for part in bytes.chunks(8) {
                let mut word = [0; 8];
                word[..part.len()].copy_from_slice(part);
                self.words.push(u64::from_ne_bytes(word));
            }
        }
        let n_arguments = arguments.len();
        self.launches.push(Launch { kernel, dimensions, first_argument, n_arguments });
    }

    fn clear(&mut self) {
        self.launches.clear();
        self.arguments.clear();
        self.words.clear();
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// Hands every launch over, to run or to be captured.
    fn run(&mut self, stream: sys::CUstream, overlap: bool) -> Result<(), DriverError> {
        for (i, launch) in self.launches.iter().enumerate() {
            let range = launch.first_argument..launch.first_argument + launch.n_arguments;
            let words = self.words.as_mut_ptr();
            let pointer = |&start: &usize| words.wrapping_add(start).cast::<c_void>();
            let mut pointers: Vec<*mut c_void> =
                self.arguments[range].iter().map(pointer).collect();
            let [x, y, z, threads, shared, cluster] = launch.dimensions;
            // The first waits for all that was handed over before: its list may read any of it.
            let mut attributes = Vec::with_capacity(2);
            attributes.extend((overlap && i > 0).then(overlapping));
            attributes.extend((cluster > 1).then(|| clusters(cluster)));
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shared,
                hStream: stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: u32::try_from(attributes.len()).expect("two at most"),
            };
            let (function, arguments) = (launch.kernel.function(), pointers.as_mut_ptr());
            let no_more = std::ptr::null_mut();
            // SAFETY: every pointer is to an argument of the type that the kernel's signature has,
            // which the tests of every operation check; the driver copies them and the attributes
            // before it returns.
            let launched =
                unsafe { sys::cuLaunchKernelEx(&raw const config, function, arguments, no_more) };
            launched.result()?;
        }
        Ok(())
    }
}

/// What lets a kernel start before the one before it has ended: it waits for that end itself, in
/// `begin` of `cu/common.cuh`.
fn overlapping() -> sys::CUlaunchAttribute {
    // SAFETY: the C struct is plain data, for which zeros are valid.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

/// What lets `n` neighbouring blocks (z) read each other's shared memory.
fn clusters(n: u32) -> sys::CUlaunchAttribute {
    // SAFETY: the C struct is plain data, for which zeros are valid.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim =
        sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 1, y: 1, z: n };
    attribute
}

/// A list of launches that runs as one.
struct Graph {
    list: List,
    executable: sys::CUgraphExec,
}

// SAFETY: an executable graph is a handle that any one thread at a time may use; the queue that owns
// it is behind a lock.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, and destroyed here alone. An error leaves nothing to do.
        unsafe { result::graph::exec_destroy(self.executable) }.ok();
    }
}

/// Memory that uploads of one step lie in.
struct Chunk {
    device: CudaSlice<u8>,
    start: u64,
    host: Vec<u8>,
}

/// Launches and uploads that wait.
#[derive(Default)]
pub(crate) struct Queue {
    list: List,
    chunks: Vec<Chunk>,
    placed: Vec<(usize, usize, usize)>, // chunk, start, length
    graphs: VecDeque<Graph>,            // the one that was used last comes first
    seen: VecDeque<u64>,
    n_graphs: u64,
    n_lists: u64,
    overlap: bool,
    is_closed: bool, // no graph is made
}

impl Queue {
    /// `overlap`: whether the kernels of this device wait for each other by themselves.
    pub(crate) fn new(overlap: bool) -> Queue {
        Queue { overlap, ..Queue::default() }
    }

    /// Notes a launch.
    pub(crate) fn push(&mut self, kernel: Kernel, dimensions: Dimensions, arguments: &[&[u8]]) {
        self.list.push(kernel, dimensions, arguments);
    }

    /// Lists that were handed over before this one.
    pub(crate) fn list(&self) -> u64 {
        self.n_lists
    }

    /// Launches that wait.
    pub(crate) fn len(&self) -> usize {
        self.list.launches.len()
    }

    /// Whether lists become graphs no more.
    pub(crate) fn close_fence(&mut self, closed: bool) {
        self.is_closed = closed;
    }

    /// Graphs that were ever made.
    pub(crate) fn n_graphs(&self) -> u64 {
        self.n_graphs
    }

    /// Where `bytes` will be when the launches run. Equal uploads of one step share a place, and
    /// steps with uploads of about the same lengths get the same places. `allocate` gives memory of
    /// a size and its address.
    pub(crate) fn upload<E>(
        &mut self,
        bytes: &[u8],
        allocate: impl FnOnce(usize) -> Result<(CudaSlice<u8>, u64), E>,
    ) -> Result<u64, E> {
        let same = self.placed.iter().find(|&&(chunk, start, len)| {
            len == bytes.len() && self.chunks[chunk].host[start..start + len] == *bytes
        });
        if let Some(&(chunk, start, _)) = same {
            return Ok(self.chunks[chunk].start + start as u64);
        }
        // Powers of two, so that a growing page table seldom moves what comes behind it.
        let room = bytes.len().next_power_of_two().max(ALIGNED);
        let fits = |chunk: &Chunk| chunk.host.len() + room <= chunk.device.len();
        let chunk = match self.chunks.iter().position(fits) {
            Some(chunk) => chunk,
            None => {
                let (device, start) = allocate(room.max(CHUNK_BYTES))?;
                self.chunks.push(Chunk { device, start, host: Vec::new() });
                self.chunks.len() - 1
            }
        };
        let Chunk { start: address, host, .. } = &mut self.chunks[chunk];
        let start = host.len();
        host.extend_from_slice(bytes);
        host.resize(start + room, 0);
        self.placed.push((chunk, start, bytes.len()));
        Ok(*address + start as u64)
    }

    /// Hands everything over to `stream`, whose context is current.
    pub(crate) fn flush(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        for chunk in self.chunks.iter_mut().filter(|chunk| !chunk.host.is_empty()) {
            // SAFETY: the chunk has room for what was placed in it, and the driver has taken pageable
            // bytes when this returns.
            unsafe { result::memcpy_htod_async(chunk.start, &chunk.host, stream)? };
            chunk.host.clear();
        }
        self.placed.clear();
        if self.list.launches.is_empty() {
            return Ok(());
        }
        let done = self.launch(stream);
        self.list.clear();
        self.n_lists += 1;
        done
    }

    fn launch(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        if self.list.launches.len() < GRAPH_FROM {
            return self.list.run(stream, self.overlap);
        }
        if let Some(at) = self.graphs.iter().position(|graph| graph.list == self.list) {
            let graph = self.graphs.remove(at).expect("it was found there");
            let executable = graph.executable;
            self.graphs.push_front(graph);
            // SAFETY: both handles are live.
            return unsafe { result::graph::launch(executable, stream) };
        }
        if self.is_closed {
            return self.list.run(stream, self.overlap);
        }
        let digest = self.list.digest();
        if self.seen.contains(&digest) {
            let executable = capture(&mut self.list, stream, self.overlap)?;
            if self.graphs.len() == KEPT {
                // It may still run: destroying one that does is allowed and waits for its end.
                self.graphs.pop_back();
            }
            self.graphs.push_front(Graph { list: self.list.clone(), executable });
            self.n_graphs += 1;
            // SAFETY: both handles are live.
            return unsafe { result::graph::launch(executable, stream) };
        }
        if self.seen.len() == KEPT {
            self.seen.pop_front();
        }
        self.seen.push_back(digest);
        self.list.run(stream, self.overlap)
    }
}

/// Makes a graph of a list.
fn capture(
    list: &mut List,
    stream: sys::CUstream,
    overlap: bool,
) -> Result<sys::CUgraphExec, DriverError> {
    let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream is live and captures nothing else: the queue is behind a lock.
    unsafe { result::stream::begin_capture(stream, mode)? };
    let launched = list.run(stream, overlap);
    // SAFETY: the capture was begun above, and ends whether or not the launches could be captured.
    let graph = unsafe { result::stream::end_capture(stream) };
    launched?;
    let graph = graph?;
    // SAFETY: the graph is live.
    let executable = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
    // SAFETY: an executable graph does not need what it was made of.
    unsafe { result::graph::destroy(graph)? };
    executable
}
