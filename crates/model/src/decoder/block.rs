//! [`Block`]: one layer of a decoder by itself, for tools that cannot hold a whole model.

use exrail_checkpoint::{DecoderConfig, Tensors};
use exrail_kernels::{
    AttentionSpan, Backend, InputRounding, KvDtype, PAGE_TOKENS, PageId, TokenId, WeightView,
};
use exrail_tensor::DType;

use super::{Decoder, Head, rope};
use crate::layer::Layer;
use crate::load::Loader;
use crate::{Batch, LoadProgress, ModelError, Scratch};

/// Tokens that [`embed_tokens`] looks up at once.
const CHUNK: usize = 256;

/// One layer on a device, and the activations and keys of one sequence.
pub struct Block<B: Backend> {
    decoder: Decoder<B>,
    scratch: Scratch<B>,
    pool: B::KvPool,
    pages: Vec<PageId>,
    ids: Vec<TokenId>,
}

impl<B: Backend> Block<B> {
    /// Prepares layer `layer_idx` for sequences of up to `max_rows` tokens.
    ///
    /// # Errors
    /// A missing or misshapen tensor by name, a format without a kernel, or no memory.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn load(
        backend: &B,
        config: &DecoderConfig,
        tensors: &dyn Tensors,
        layer_idx: usize,
        max_rows: usize,
    ) -> Result<Self, ModelError> {
        let progress = LoadProgress::default();
        let mut loader = Loader { backend, tensors, report: &mut |_| {}, progress };
        let layer = Layer::load(&mut loader, config, layer_idx)?;
        // The embedding and the head of this decoder are never used.
        let mut config = config.clone();
        config.layers = vec![config.layers[layer_idx]];
        let ropes = config.ropes.iter().map(|r| rope(r, config.context_len)).collect();
        let nothing = WeightView {
            name: "embedding of a block alone",
            dtype: DType::F32,
            rows: 1,
            columns: config.width,
            bytes: &vec![0; 4 * config.width],
            rounding: InputRounding::Twice,
            head: false,
        };
        let decoder = Decoder {
            embedding: backend.weight(&nothing)?,
            layers: vec![layer],
            norm: backend.buffer(config.width)?,
            head: Head::Tied,
            ropes,
            config,
        };
        let n_pages = max_rows.div_ceil(PAGE_TOKENS);
        let scratch = Scratch::new(backend, &decoder.config, max_rows, 1)?;
        let pool = backend.kv_pool(decoder.kv_shape(n_pages, KvDtype::F32))?;
        let n_pages = u32::try_from(n_pages).expect("a context is far below 2^32");
        let pages = (0..n_pages).map(PageId).collect();
        Ok(Self { decoder, scratch, pool, pages, ids: vec![TokenId(0); max_rows] })
    }

    /// Runs one sequence from position 0: `residual` `(T, C)` before the layer becomes that behind
    /// it.
    ///
    /// # Panics
    /// When `residual` is not whole rows, or more than the block was prepared for.
    pub fn run(&mut self, backend: &B, residual: &mut [f32]) {
        let Self { decoder, scratch, pool, pages, ids } = self;
        let width = decoder.config.width;
        assert!(residual.len().is_multiple_of(width), "whole rows of {width}");
        let n_rows = residual.len() / width;
        assert!(n_rows <= scratch.max_rows, "{n_rows} rows of {}", scratch.max_rows);
        let spans = [AttentionSpan { first_row: 0, n_rows, first_position: 0, pages }];
        let batch = Batch { ids: &ids[..n_rows], spans: &spans, logit_rows: &[] };
        batch.rows().place(&mut scratch.positions, &mut scratch.slots);
        backend.write(&mut scratch.residual, residual);
        decoder.cache(backend, scratch, pool, 0, n_rows);
        let shape = decoder.attention_shape(0);
        backend.attention(&scratch.queries, pool, 0, shape, &spans, &mut scratch.attended);
        decoder.mix(backend, scratch, 0, n_rows);
        backend.read(&scratch.residual, residual);
    }
}

/// The first residual `(T, C)` of `ids`: their rows of the embedding, scaled as the family does.
///
/// # Errors
/// As [`Block::load`].
///
/// # Panics
/// When an id is outside the vocabulary.
pub fn embed_tokens<B: Backend>(
    backend: &B,
    config: &DecoderConfig,
    tensors: &dyn Tensors,
    ids: &[TokenId],
) -> Result<Vec<f32>, ModelError> {
    let vocab_size = config.vocab_size;
    assert!(ids.iter().all(|id| (id.0 as usize) < vocab_size), "ids below {vocab_size}");
    let progress = LoadProgress::default();
    let mut loader = Loader { backend, tensors, report: &mut |_| {}, progress };
    let table =
        loader.matrix("token_embd.weight", (vocab_size, config.width), InputRounding::Twice)?;
    let mut residual = vec![0.0; ids.len() * config.width];
    let mut buffer = backend.buffer(CHUNK * config.width)?;
    for (ids, residual) in ids.chunks(CHUNK).zip(residual.chunks_mut(CHUNK * config.width)) {
        backend.embed(&table, ids, config.embedding_scale, &mut buffer);
        backend.read(&buffer, residual);
    }
    Ok(residual)
}
