//! [`CudaWeight`]: a matrix as planes of codes and scales; see `cu/common.cuh`.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use std::sync::Arc;

use cudarc::driver::DeviceRepr;
use exrail_kernels::{InputRounding, KernelError, WeightView};
use exrail_tensor::DType;

use crate::memory::narrow;
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

/// Bytes of a checkpoint's blocks that are uploaded at once.
const CHUNK_BYTES: usize = 64 << 20;

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
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Planes {}

/// Bytes that a block of 32 weights has in each plane; `supers` is of eight blocks.
struct PlaneBytes {
    low: usize,
    high: usize,
    scales: usize,
    supers: usize,
}

impl PlaneBytes {
    fn of(dtype: DType) -> PlaneBytes {
        let (low, high, scales, supers) = match dtype {
            DType::F32 => (4 * 32, 0, 0, 0),
            DType::F16 | DType::BF16 => (2 * 32, 0, 0, 0),
            DType::Q4_0 | DType::IQ4_NL | DType::MXFP4 => (16, 0, 2, 0),
            DType::Q4_1 => (16, 0, 4, 0),
            DType::Q5_0 => (16, 4, 2, 0),
            DType::Q5_1 => (16, 4, 4, 0),
            DType::Q8_0 => (32, 0, 2, 0),
            DType::Q2_K => (16, 0, 4, 4),
            DType::Q3_K | DType::Q4_K => (16, 0, 2, 4),
            DType::Q5_K => (16, 4, 2, 4),
            DType::Q6_K => (16, 8, 2, 4),
            DType::IQ4_XS => (16, 0, 1, 4),
        };
        PlaneBytes { low, high, scales, supers }
    }
}

/// A matrix on the device. Formats take up to 6 % more than in a file there, but Q3_K 4.6 bits a
/// weight and Q2_K 5.1: their codes lie in nibbles.
#[derive(Debug)]
pub struct CudaWeight {
    pub(crate) dtype: DType,
    pub(crate) rounding: InputRounding,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
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
        let WeightView { dtype, rows, columns, .. } = *view;
        let bytes = PlaneBytes::of(dtype);
        // Planes start on 256 bytes; only floats have rows of no whole blocks.
        let n_blocks = (rows * columns).div_ceil(32);
        let aligned = |bytes: usize| bytes.next_multiple_of(256);
        let high = aligned(n_blocks * bytes.low);
        let scales = high + aligned(n_blocks * bytes.high);
        let supers = scales + aligned(n_blocks * bytes.scales);
        let len = supers + aligned(n_blocks.div_ceil(8) * bytes.supers);
        let memory = Memory::zeroed(stream, len, view.name)?;
        let mut weight = CudaWeight {
            dtype,
            rounding: view.rounding,
            rows,
            columns,
            memory,
            parts: [high, scales, supers],
        };
        if dtype.is_quantised() {
            weight.repack(stream, view.bytes, row_bytes)?;
        } else {
            weight.memory.write(view.bytes);
        }
        Ok(weight)
    }

    /// The ending of the names of this format's kernels.
    pub(crate) fn suffix(&self) -> &'static str {
        let known = SUFFIXES.iter().find(|(dtype, _)| *dtype == self.dtype);
        known.map_or("", |(_, suffix)| suffix)
    }

    /// What kernels take.
    pub(crate) fn planes(&self) -> Planes {
        let Address(low) = self.memory.address();
        let [high, scales, supers] = self.parts.map(|part| Address(low + part as u64));
        let (rows, columns) = (narrow(self.rows), narrow(self.columns));
        Planes { low: Address(low), high, scales, supers, rows, columns }
    }

    /// In runs of whole rows, through one staging buffer.
    fn repack(
        &self,
        stream: &Arc<Stream>,
        bytes: &[u8],
        row_bytes: usize,
    ) -> Result<(), KernelError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let rows_at_once = (CHUNK_BYTES / row_bytes).clamp(1, self.rows);
        let mut staging =
            Memory::zeroed(stream, rows_at_once * row_bytes, "a checkpoint's blocks")?;
        let kernel = format!("repack_{}", self.suffix());
        let unit = PlaneBytes::of(self.dtype);
        let mut first_block = 0;
        for chunk in bytes.chunks(rows_at_once * row_bytes) {
            let n_blocks = chunk.len() / row_bytes * self.columns / 32;
            staging.write(chunk);
            let mut planes = self.planes();
            let behind = |Address(at): Address, bytes| Address(at + (first_block * bytes) as u64);
            planes.low = behind(planes.low, unit.low);
            planes.high = behind(planes.high, unit.high);
            planes.scales = behind(planes.scales, unit.scales);
            // Formats with superblocks have whole ones in a row.
            planes.supers = Address(planes.supers.0 + (first_block / 8 * unit.supers) as u64);
            let (from, n) = (staging.address(), narrow(n_blocks));
            stream.launch(&kernel, Grid::each(n_blocks), &[&from, &planes, &n]);
            first_block += n_blocks;
        }
        Ok(())
    }
}
