//! Tensors of a checkpoint onto a device, with progress.

use exrail_checkpoint::Tensors;
use exrail_kernels::{Backend, WeightView};

use crate::ModelError;

/// How far a load has come; reported after each tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors on the device.
    pub n_done: usize,
    /// Tensors of the model.
    pub n_total: usize,
    /// Bytes that the tensors so far have in the file.
    pub bytes_done: u64,
}

/// Moves tensors to a backend.
pub(crate) struct Loader<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) tensors: &'a dyn Tensors,
    pub(crate) report: &'a mut dyn FnMut(LoadProgress),
    pub(crate) progress: LoadProgress,
}

impl<B: Backend> Loader<'_, B> {
    /// The matrix called `name`, `(rows, columns)`.
    pub(crate) fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<B::Weight, ModelError> {
        let view = self.tensors.require(name, &[rows, columns])?;
        let (dtype, bytes) = (view.dtype, view.bytes);
        let weight = self.backend.weight(&WeightView { name, dtype, rows, columns, bytes })?;
        self.advance(bytes.len());
        Ok(weight)
    }

    /// The vector called `name`, as f32.
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<B::Buffer, ModelError> {
        let view = self.tensors.require(name, &[len])?;
        let mut buffer = self.backend.buffer(len)?;
        self.backend.write(&mut buffer, &view.to_f32()?);
        self.advance(view.bytes.len());
        Ok(buffer)
    }

    fn advance(&mut self, len_bytes: usize) {
        self.progress.n_done += 1;
        self.progress.bytes_done += len_bytes as u64;
        (self.report)(self.progress);
    }
}
