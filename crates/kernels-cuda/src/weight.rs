//! [`CudaWeight`]: a matrix as planes of codes and scales; see `cu/common.cuh`.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use std::sync::Arc;

use cudarc::driver::DeviceRepr;
use exrail_kernels::{KernelError, WeightView};
use exrail_tensor::DType;

use crate::layout::Matrix;
use crate::loader::SLOT_BYTES;
use crate::memory::narrow;
use crate::planes::{GROUP, GROUP_LOG2, PlaneBytes, PlaneLayout, may_share_scales};
use crate::stream::{Address, Grid, Memory, Stream};

/// Every format with the ending of its kernels' names.
pub(crate) const SUFFIXES: [(DType, &str); 16] = [
    (DType::F32, "f32"),
    (DType::F16, "f16"),
    (DType::BF16, "bf16"),
    (DType::Q4_0, "q4_0"),
    (DType::Q4_1, "q4_1"),
    (DType::Q5_0, "q5_0"),
    (DType::Q5_1, "q5_1"),
    (DType::Q8_0, "q8_0"),
    (DType::Q2_K, "q2_k"),
    (DType::Q3_K, "q3_k"),
    (DType::Q4_K, "q4_k"),
    (DType::Q5_K, "q5_k"),
    (DType::Q6_K, "q6_k"),
    (DType::IQ4_NL, "iq4_nl"),
    (DType::IQ4_XS, "iq4_xs"),
    (DType::MXFP4, "mxfp4"),
];

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Planes {
    low: Address,
    high: Address,
    scales: Address,
    supers: Address,
    rows: u32,
    columns: u32,
    shared: u32,
    scale_bytes: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Planes {}

/// A matrix on the device. Formats take up to 6 % more than in a file there, but Q3_K 4.6 bits a
/// weight and Q2_K 5.1: their codes lie in nibbles.
#[derive(Debug)]
pub struct CudaWeight {
    pub(crate) dtype: DType,
    pub(crate) format: usize, // the place of `dtype` in `SUFFIXES`
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// 2^shared neighbours of a row share a scale.
    pub(crate) shared: u32,
    scale_bytes: usize, // of a row
    memory: Memory,
    parts: [usize; 3], // where the planes after the first start
}

impl CudaWeight {
    /// Uploads a matrix and takes its blocks apart on the device.
    pub(crate) fn new(
        stream: &Arc<Stream>,
        view: &WeightView<'_>,
    ) -> Result<CudaWeight, KernelError> {
        let row_bytes = view.row_bytes()?;
        let shared = maybe_shared_scales(view);
        if let Some(weight) = CudaWeight::packed(stream, view, row_bytes, shared)? {
            return Ok(weight);
        }
        let packed = CudaWeight::packed(stream, view, row_bytes, 0)?;
        Ok(packed.expect("blocks with scales of their own are what they are"))
    }

    /// The same with scales that 2^`shared` neighbours share, or nothing if some do not.
    fn packed(
        stream: &Arc<Stream>,
        view: &WeightView<'_>,
        row_bytes: usize,
        shared: u32,
    ) -> Result<Option<CudaWeight>, KernelError> {
        let WeightView { dtype, rows, columns, .. } = *view;
        let out_of_memory = || KernelError::OutOfMemory {
            what: view.name.to_owned(),
            wanted_bytes: usize::MAX,
            device: stream.device(),
        };
        let planes = PlaneLayout::of(dtype, (rows, columns), shared).ok_or_else(out_of_memory)?;
        let PlaneLayout { high, scales, supers, scale_bytes, len } = planes;
        let memory = Memory::zeroed(stream, len, view.name)?;
        let weight = CudaWeight {
            dtype,
            format: SUFFIXES.iter().position(|&(known, _)| known == dtype).unwrap_or(0),
            rows,
            columns,
            shared,
            scale_bytes,
            memory,
            parts: [high, scales, supers],
        };
        if dtype.is_quantised() {
            return Ok(weight.repack(stream, view.bytes, row_bytes)?.then_some(weight));
        }
        let Address(start) = weight.memory.address();
        for (i, chunk) in view.bytes.chunks(SLOT_BYTES).enumerate() {
            let to = Address(start + (i * SLOT_BYTES) as u64);
            stream.load(chunk, |from| stream.copy(from, to, chunk.len()))?;
        }
        Ok(Some(weight))
    }

    /// Bytes that it takes on the device.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.memory.len()
    }

    /// The ending of the names of this format's kernels.
    pub(crate) fn suffix(&self) -> &'static str {
        SUFFIXES[self.format].1
    }

    /// What kernels take.
    pub(crate) fn planes(&self) -> Planes {
        let Address(low) = self.memory.address();
        let [high, scales, supers] = self.parts.map(|part| Address(low + part as u64));
        let (rows, columns) = (narrow(self.rows), narrow(self.columns));
        let (shared, scale_bytes) = (self.shared, narrow(self.scale_bytes));
        Planes { low: Address(low), high, scales, supers, rows, columns, shared, scale_bytes }
    }

    /// What the cut of a product depends on: `Ring` of `cu/ring.cuh` and `Format` of `cu/common.cuh`.
    pub(crate) fn matrix(&self) -> Matrix {
        let bytes = PlaneBytes::of(self.dtype);
        let supers = if bytes.supers > 0 { 16 } else { 0 };
        Matrix {
            columns: self.columns,
            chunk_bytes: 32 * (bytes.low + bytes.high + bytes.scales) + supers,
            halves: matches!(self.dtype, DType::Q2_K | DType::Q3_K | DType::Q6_K),
        }
    }

    /// Bytes that a block for each lane of a warp takes in a ring; `Column` in `cu/matmul.cu`.
    pub(crate) fn column_bytes(&self) -> usize {
        let bytes = PlaneBytes::of(self.dtype);
        32 * (bytes.low + bytes.high + 4 + if bytes.supers > 0 { 4 } else { 0 })
    }

    /// In runs of whole rows; whether all neighbours that should share a scale do.
    fn repack(
        &self,
        stream: &Arc<Stream>,
        bytes: &[u8],
        row_bytes: usize,
    ) -> Result<bool, KernelError> {
        if bytes.is_empty() {
            return Ok(true);
        }
        assert!(row_bytes <= SLOT_BYTES, "a row of {row_bytes} bytes");
        let rows_at_once = SLOT_BYTES / row_bytes;
        let differ = Memory::zeroed(stream, 4, "a flag")?;
        let kernel = format!("repack_{}", self.suffix());
        let unit = PlaneBytes::of(self.dtype);
        let (mut first_row, mut first_block) = (0, 0);
        for chunk in bytes.chunks(rows_at_once * row_bytes) {
            let n_blocks = chunk.len() / row_bytes * self.columns / 32;
            let mut planes = self.planes();
            let behind = |Address(at): Address, bytes| Address(at + (first_block * bytes) as u64);
            planes.low = behind(planes.low, unit.low);
            planes.high = behind(planes.high, unit.high);
            planes.scales = Address(planes.scales.0 + (first_row * self.scale_bytes) as u64);
            // Formats with superblocks have whole ones in a row.
            planes.supers = Address(planes.supers.0 + (first_block / 8 * unit.supers) as u64);
            let (n, flag) = (narrow(n_blocks), differ.address());
            stream.load(chunk, |from| {
                stream.launch(&kernel, Grid::each(n_blocks), &[&from, &planes, &n, &flag]);
            })?;
            first_row += chunk.len() / row_bytes;
            first_block += n_blocks;
        }
        if self.shared == 0 {
            return Ok(true);
        }
        let mut flag = [0; 4];
        differ.read(&mut flag);
        Ok(flag == [0; 4])
    }
}

/// Neighbours that may share a scale, as a power of two. In a checkpoint with larger groups than its
/// format's blocks (GPTQ and AWQ with groups of 128) every block has the scale of the first of its four,
/// and only that one is kept: nothing changes but the bytes that a product reads. A few groups are looked
/// at here; the device looks at all.
fn maybe_shared_scales(view: &WeightView<'_>) -> u32 {
    const LOOKED_AT: usize = 64;
    let block_bytes = view.dtype.block_bytes();
    let n_scale_bytes = PlaneBytes::of(view.dtype).scales;
    if !may_share_scales(view.dtype, view.columns) || view.bytes.is_empty() {
        return 0;
    }
    let groups = view.bytes.chunks_exact(GROUP * block_bytes);
    let step = (groups.len() / LOOKED_AT).max(1);
    let shared = groups.step_by(step).all(|group| {
        let scale = &group[..n_scale_bytes];
        group.chunks_exact(block_bytes).all(|block| block[..n_scale_bytes] == *scale)
    });
    if shared { GROUP_LOG2 } else { 0 }
}
