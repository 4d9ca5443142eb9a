//! [`Decoder`]: the Llama architecture (Touvron et al. 2023, arXiv:2302.13971, §2.2): pre-norm
//! blocks of grouped-query attention with rotary positions and a SwiGLU network.

use exrail_checkpoint::{LlamaConfig, Tensors};
use exrail_kernels::{AttentionShape, Backend, KvDtype, KvShape, Rope, RopeStyle};

use crate::load::Loader;
use crate::{Batch, LoadProgress, ModelError, Scratch};

/// A decoder on a device.
pub struct Decoder<B: Backend> {
    config: LlamaConfig,
    embedding: B::Weight, // (V, C)
    layers: Vec<Layer<B>>,
    norm: B::Buffer, // (C)
    head: Head<B::Weight>,
    rope: Rope,
}

/// The matrix that turns the last state into logits.
enum Head<W> {
    /// The embedding table.
    Tied,
    /// Its own matrix, `(V, C)`.
    Own(W),
}

struct Layer<B: Backend> {
    attention_norm: B::Buffer, // (C)
    query: B::Weight,          // (H * D, C)
    key: B::Weight,            // (K * D, C)
    value: B::Weight,          // (K * D, C)
    attention_out: B::Weight,  // (C, H * D)
    ffn_norm: B::Buffer,       // (C)
    gate: B::Weight,           // (F, C)
    up: B::Weight,             // (F, C)
    down: B::Weight,           // (C, F)
}

/// Tensors of one layer.
const LAYER_TENSORS: usize = 9;

impl<B: Backend> Decoder<B> {
    /// Prepares the weights of a GGUF file of architecture `llama`.
    ///
    /// # Errors
    /// A missing or misshapen tensor by name, a format without a kernel, or no memory.
    pub fn load(
        backend: &B,
        config: &LlamaConfig,
        tensors: &dyn Tensors,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let n_outside = 2 + usize::from(!config.tied_head);
        let n_total = n_outside + LAYER_TENSORS * config.n_layers;
        let progress_at_start = LoadProgress { n_total, ..LoadProgress::default() };
        let mut loader = Loader { backend, tensors, report: progress, progress: progress_at_start };
        let (vocab_size, width) = (config.vocab_size, config.width);
        let embedding = loader.matrix("token_embd.weight", vocab_size, width)?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for layer_idx in 0..config.n_layers {
            layers.push(Layer::load(&mut loader, config, layer_idx)?);
        }
        let norm = loader.vector("output_norm.weight", width)?;
        let head = if config.tied_head {
            Head::Tied
        } else {
            Head::Own(loader.matrix("output.weight", vocab_size, width)?)
        };
        Ok(Self { config: config.clone(), embedding, layers, norm, head, rope: rope(config) })
    }

    /// The hyperparameters that it was loaded with.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The pool that this decoder's sequences live in.
    #[must_use]
    pub fn kv_shape(&self, n_pages: usize, dtype: KvDtype) -> KvShape {
        KvShape {
            n_layers: self.config.n_layers,
            n_kv_heads: self.config.n_kv_heads,
            head_dim: self.config.head_dim,
            n_pages,
            dtype,
        }
    }

    /// Activations for steps of up to `max_rows` rows, `max_logit_rows` of them with logits.
    ///
    /// # Errors
    /// Out of memory.
    pub fn scratch(
        &self,
        backend: &B,
        max_rows: usize,
        max_logit_rows: usize,
    ) -> Result<Scratch<B>, ModelError> {
        Scratch::new(backend, &self.config, max_rows, max_logit_rows)
    }

    /// Runs one step: writes the keys and values of every row to its pages, and leaves the logits
    /// of the batch's logit rows in `scratch`.
    ///
    /// Behind the keys and values of the last layer only logit rows are computed: in a prefill
    /// chunk without any, the last layer's attention and network do not run at all.
    ///
    /// # Panics
    /// When the batch has more rows or logit rows than `scratch`, a token id outside the
    /// vocabulary, or spans that [`Batch`] does not allow; or when `pool` is not of
    /// [`Decoder::kv_shape`].
    pub fn forward(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        batch: &Batch<'_>,
    ) {
        let (n_rows, n_logit_rows) = (batch.ids.len(), batch.logit_rows.len());
        assert!(n_rows <= scratch.max_rows, "{n_rows} rows of {}", scratch.max_rows);
        assert!(
            n_logit_rows <= scratch.max_logit_rows,
            "{n_logit_rows} logit rows of {}",
            scratch.max_logit_rows
        );
        let vocab_size = self.config.vocab_size;
        assert!(batch.ids.iter().all(|id| (id.0 as usize) < vocab_size), "ids below {vocab_size}");
        batch.place(&mut scratch.positions, &mut scratch.slots);

        backend.embed(&self.embedding, batch.ids, &mut scratch.residual);
        let last = self.layers.len() - 1;
        for layer_idx in 0..last {
            self.cache(backend, scratch, pool, layer_idx, n_rows);
            let queries = &scratch.queries;
            let shape = self.attention_shape();
            backend.attention(queries, pool, layer_idx, shape, batch.spans, &mut scratch.attended);
            self.mix(backend, scratch, layer_idx, n_rows);
        }
        self.cache(backend, scratch, pool, last, n_rows);
        self.finish(backend, scratch, pool, batch);
    }

    /// Queries of a layer into `scratch`, rotated; keys and values into the pool.
    fn cache(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        layer_idx: usize,
        n_rows: usize,
    ) {
        let (layer, config) = (&self.layers[layer_idx], &self.config);
        let Scratch { residual, normed, queries, keys, values, positions, slots, .. } = scratch;
        backend.rms_norm(residual, n_rows, &layer.attention_norm, config.rms_eps, normed);
        let weights = [&layer.query, &layer.key, &layer.value];
        backend.linear_qkv(normed, n_rows, weights, None, [queries, keys, values]);
        backend.rope(queries, config.n_heads, config.head_dim, positions, &self.rope);
        backend.rope(keys, config.n_kv_heads, config.head_dim, positions, &self.rope);
        backend.kv_write(pool, layer_idx, keys, values, slots);
    }

    /// Adds a layer's attention output and its network to the residual.
    fn mix(&self, backend: &B, scratch: &mut Scratch<B>, layer_idx: usize, n_rows: usize) {
        let layer = &self.layers[layer_idx];
        let Scratch { residual, normed, attended, gated, .. } = scratch;
        backend.linear_add(attended, n_rows, &layer.attention_out, None, residual);
        backend.rms_norm(residual, n_rows, &layer.ffn_norm, self.config.rms_eps, normed);
        backend.linear_silu_gate(normed, n_rows, &layer.gate, &layer.up, gated);
        backend.linear_add(gated, n_rows, &layer.down, None, residual);
    }

    /// The rest of the last layer and the head, for the logit rows alone.
    fn finish(&self, backend: &B, scratch: &mut Scratch<B>, pool: &B::KvPool, batch: &Batch<'_>) {
        let (rows, n_rows) = (batch.logit_rows, batch.logit_rows.len());
        if n_rows == 0 {
            scratch.logits_for(0);
            return;
        }
        let Scratch { residual, queries, attended, last_residual, last_queries, .. } = scratch;
        let shape = self.attention_shape();
        backend.gather_rows(residual, self.config.width, rows, last_residual);
        backend.gather_rows(queries, shape.n_heads * shape.head_dim, rows, last_queries);
        let last = self.layers.len() - 1;
        backend.attention(last_queries, pool, last, shape, &batch.logit_spans(), attended);
        // The residual of the other rows is not needed any more, so its place is free.
        std::mem::swap(residual, last_residual);
        self.mix(backend, scratch, last, n_rows);
        let Scratch { residual, normed, .. } = scratch;
        backend.rms_norm(residual, n_rows, &self.norm, self.config.rms_eps, normed);
        std::mem::swap(&mut scratch.residual, &mut scratch.last_residual);
        let head = match &self.head {
            Head::Tied => &self.embedding,
            Head::Own(head) => head,
        };
        let (normed, logits) = scratch.logits_for(n_rows);
        backend.linear(normed, n_rows, head, None, logits);
    }

    fn attention_shape(&self) -> AttentionShape {
        let LlamaConfig { n_heads, n_kv_heads, head_dim, .. } = self.config;
        AttentionShape { n_heads, n_kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        config: &LlamaConfig,
        layer_idx: usize,
    ) -> Result<Self, ModelError> {
        let name = |part: &str| format!("blk.{layer_idx}.{part}.weight");
        let (width, ffn_width) = (config.width, config.ffn_width);
        let query_width = config.n_heads * config.head_dim;
        let kv_width = config.n_kv_heads * config.head_dim;
        Ok(Self {
            attention_norm: loader.vector(&name("attn_norm"), width)?,
            query: loader.matrix(&name("attn_q"), query_width, width)?,
            key: loader.matrix(&name("attn_k"), kv_width, width)?,
            value: loader.matrix(&name("attn_v"), kv_width, width)?,
            attention_out: loader.matrix(&name("attn_output"), width, query_width)?,
            ffn_norm: loader.vector(&name("ffn_norm"), width)?,
            gate: loader.matrix(&name("ffn_gate"), ffn_width, width)?,
            up: loader.matrix(&name("ffn_up"), ffn_width, width)?,
            down: loader.matrix(&name("ffn_down"), width, ffn_width)?,
        })
    }
}

/// Pair i turns by position · theta^(-2i/R) / factorᵢ (arXiv:2104.09864, §3.2.2; the factors are
/// Llama 3's frequency scaling, which the GGUF converter stores as `rope_freqs.weight`).
fn rope(config: &LlamaConfig) -> Rope {
    let n_pairs = config.rope_dim / 2;
    let inverse_frequencies = (0..n_pairs)
        .map(|i| {
            let factor = config.rope_factors.as_ref().map_or(1.0, |factors| f64::from(factors[i]));
            let exponent = -(i as f64) / n_pairs as f64;
            (f64::from(config.rope_theta).powf(exponent) / factor) as f32
        })
        .collect();
    Rope { inverse_frequencies, style: RopeStyle::Interleaved }
}
