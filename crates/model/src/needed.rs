//! [`Needed`]: what a decoder takes on a device, counted by loading its headers onto a [`Ledger`].

use std::borrow::Cow;
use std::sync::Arc;

use exrail_checkpoint::{DecoderConfig, LoadError, TensorInfo, TensorView, Tensors};
use exrail_kernels::{Backend, Footprint, KvShape, Ledger, LedgerWeight};

use crate::{Decoder, ModelError};

/// What is allocated beside the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunSizes {
    /// The page pool.
    pub kv: KvShape,
    /// Rows of a step at most.
    pub max_rows: usize,
    /// Rows of a step with logits at most.
    pub max_logit_rows: usize,
}

/// Memory of a decoder on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needed {
    /// Its matrices; the embedding is `token_embd.weight`, a head of its own `output.weight`.
    pub weights: Vec<LedgerWeight>,
    /// Bytes of norms and biases.
    pub vector_bytes: usize,
    /// Bytes of the activations of one step.
    pub scratch_bytes: usize,
    /// Bytes of the page pool.
    pub kv_bytes: usize,
}

impl Needed {
    /// Counts what [`Decoder::load`], [`Decoder::scratch`] and a page pool allocate, by running them. Reads
    /// no elements of a tensor.
    ///
    /// # Errors
    /// A missing or misshapen tensor by name, or more bytes than a number holds.
    pub fn count(
        footprint: Arc<dyn Footprint>,
        config: &DecoderConfig,
        tensors: &dyn Tensors,
        sizes: RunSizes,
    ) -> Result<Needed, ModelError> {
        let ledger = Ledger::new(footprint);
        let decoder = Decoder::load(&ledger, config, &Headers(tensors), &mut |_| {})?;
        let loaded = ledger.take();
        let _scratch = decoder.scratch(&ledger, sizes.max_rows, sizes.max_logit_rows)?;
        let scratch_bytes = ledger.take().buffer_bytes;
        ledger.kv_pool(sizes.kv)?;
        Ok(Needed {
            weights: loaded.weights,
            vector_bytes: loaded.buffer_bytes,
            scratch_bytes,
            kv_bytes: ledger.take().kv_bytes,
        })
    }
}

/// Tensors without elements: matrices are empty, and vectors, which are small, zero.
struct Headers<'a>(&'a dyn Tensors);

impl Tensors for Headers<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.0.info(name)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let missing = || LoadError::MissingTensor { tensor: name.to_owned(), expected: Vec::new() };
        let info = self.0.info(name).ok_or_else(missing)?;
        let n_bytes = if info.shape.len() == 1 { info.n_bytes() } else { 0 };
        let TensorInfo { name, dtype, shape } = info;
        Ok(TensorView { name, dtype, shape, bytes: Cow::Owned(vec![0; n_bytes]) })
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.0.names()
    }
}
