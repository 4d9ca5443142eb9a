//! Tensors of a checkpoint onto a device, with progress.

use exrail_checkpoint::Tensors;
use exrail_kernels::{Backend, InputRounding, WeightView};

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
        (rows, columns): (usize, usize),
        rounding: InputRounding,
    ) -> Result<B::Weight, ModelError> {
        self.tensors.require_info(name, &[rows, columns])?;
        let mut parts = self.parts(name, &[rows], columns, rounding)?;
        Ok(parts.pop().expect("one part was asked for"))
    }

    /// The matrix called `name`, `(V, columns)`, that gives the logits.
    pub(crate) fn head(
        &mut self,
        name: &str,
        (rows, columns): (usize, usize),
    ) -> Result<B::Weight, ModelError> {
        self.tensors.require_info(name, &[rows, columns])?;
        let usage = (InputRounding::Twice, true);
        let mut parts = self.parts_for(name, &[rows], columns, usage)?;
        Ok(parts.pop().expect("one part was asked for"))
    }

    /// Runs of rows of the tensor called `name`, whose rows have `columns` values: the matrices
    /// that it is made of, first to last.
    pub(crate) fn parts(
        &mut self,
        name: &str,
        rows: &[usize],
        columns: usize,
        rounding: InputRounding,
    ) -> Result<Vec<B::Weight>, ModelError> {
        self.parts_for(name, rows, columns, (rounding, false))
    }

    fn parts_for(
        &mut self,
        name: &str,
        rows: &[usize],
        columns: usize,
        (rounding, head): (InputRounding, bool),
    ) -> Result<Vec<B::Weight>, ModelError> {
        let view = self.tensors.tensor(name)?;
        let dtype = view.dtype;
        let row_bytes = view.bytes.len() / rows.iter().sum::<usize>().max(1);
        let mut weights = Vec::with_capacity(rows.len());
        let mut rest = &*view.bytes;
        for &rows in rows {
            let (bytes, others) = rest.split_at(rows * row_bytes);
            rest = others;
            let view = WeightView { name, dtype, rows, columns, bytes, rounding, head };
            weights.push(self.backend.weight(&view)?);
        }
        self.advance(view.bytes.len());
        self.tensors.release(name);
        Ok(weights)
    }

    /// The vector called `name`, as f32.
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<B::Buffer, ModelError> {
        let view = self.tensors.require(name, &[len])?;
        let mut buffer = self.backend.buffer(len)?;
        self.backend.write(&mut buffer, &view.to_f32()?);
        self.advance(view.bytes.len());
        Ok(buffer)
    }

    /// Runs of the vector called `name`, if it is there.
    pub(crate) fn bias(
        &mut self,
        name: &str,
        lens: &[usize],
    ) -> Result<Option<Vec<B::Buffer>>, ModelError> {
        if self.tensors.info(name).is_none() {
            return Ok(None);
        }
        let values = self.tensors.require(name, &[lens.iter().sum()])?.to_f32()?;
        let mut rest = &values[..];
        let mut buffers = Vec::with_capacity(lens.len());
        for &len in lens {
            let (part, others) = rest.split_at(len);
            rest = others;
            let mut buffer = self.backend.buffer(len)?;
            self.backend.write(&mut buffer, part);
            buffers.push(buffer);
        }
        self.advance(4 * values.len());
        Ok(Some(buffers))
    }

    fn advance(&mut self, len_bytes: usize) {
        self.progress.n_done += 1;
        self.progress.bytes_done += len_bytes as u64;
        (self.report)(self.progress);
    }
}
