//! [`CudaBuffer`]: activations on the device, and plain values as bytes.

use std::sync::Arc;

use exrail_kernels::KernelError;

use crate::stream::{Address, Memory, Stream};

/// f32 values on the device.
#[derive(Debug)]
pub struct CudaBuffer {
    memory: Memory,
    len: usize,
}

impl CudaBuffer {
    pub(crate) fn new(stream: &Arc<Stream>, len: usize) -> Result<CudaBuffer, KernelError> {
        let memory = Memory::zeroed(stream, len.saturating_mul(4), "activations")?;
        Ok(CudaBuffer { memory, len })
    }

    /// Values that it holds.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where the first of at least `len` values is.
    ///
    /// # Panics
    /// When there are fewer.
    pub(crate) fn at(&self, len: usize) -> Address {
        assert!(len <= self.len, "expected {len} values, found a buffer of {}", self.len);
        self.memory.address()
    }

    pub(crate) fn write(&mut self, values: &[f32]) {
        assert!(values.len() <= self.len, "{} values into {}", values.len(), self.len);
        self.memory.write(&bytes_of(values, f32::to_le_bytes));
    }

    pub(crate) fn read(&self, values: &mut [f32]) {
        assert!(values.len() <= self.len, "{} values out of {}", values.len(), self.len);
        let mut bytes = vec![0; 4 * values.len()];
        self.memory.read(&mut bytes);
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
}

/// Little-endian bytes of numbers.
pub(crate) fn bytes_of<T: Copy, const N: usize>(
    values: &[T],
    to_bytes: impl Fn(T) -> [u8; N],
) -> Vec<u8> {
    values.iter().flat_map(|&value| to_bytes(value)).collect()
}

/// Little-endian bytes of counts and indices, which are below 2^32.
pub(crate) fn bytes_of_u32(values: impl IntoIterator<Item = usize>) -> Vec<u8> {
    values.into_iter().flat_map(|value| narrow(value).to_le_bytes()).collect()
}

/// A count or an index.
pub(crate) fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("counts on a device are below 2^32")
}
