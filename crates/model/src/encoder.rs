//! [`Encoder`]: BERT (Devlin et al. 2018, arXiv:1810.04805) with mean pooling, for sentence vectors
//! (Reimers and Gurevych 2019, arXiv:1908.10084, §3).

use exrail_checkpoint::{BertConfig, Pooling, Tensors};
use exrail_kernels::{AttentionShape, Backend, InputRounding, Span, TokenId};

use crate::load::Loader;
use crate::{LoadProgress, ModelError};

/// Rows after which a pass is closed, so that a call with thousands of texts does not need memory
/// for all of them; large enough that a matrix product is bound by arithmetic.
const PASS_ROWS: usize = 1024;

/// A sentence encoder on a device.
pub struct Encoder<B: Backend> {
    config: BertConfig,
    words: B::Weight,       // (V, C)
    positions: B::Weight,   // (max_positions, C)
    token_types: B::Weight, // (n_token_types, C)
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
}

struct Norm<B: Backend> {
    weight: B::Buffer, // (C)
    bias: B::Buffer,   // (C)
}

struct Linear<B: Backend> {
    weight: B::Weight, // (N, columns)
    bias: B::Buffer,   // (N)
}

struct Layer<B: Backend> {
    query: Linear<B>,         // (C, C)
    key: Linear<B>,           // (C, C)
    value: Linear<B>,         // (C, C)
    attention_out: Linear<B>, // (C, C)
    attention_norm: Norm<B>,
    intermediate: Linear<B>, // (F, C)
    output: Linear<B>,       // (C, F)
    output_norm: Norm<B>,
}

/// Tensors outside the layers and in one layer.
const OUTSIDE_TENSORS: usize = 5;
const LAYER_TENSORS: usize = 16;

/// Activations of one pass.
struct Activations<B: Backend> {
    x: B::Buffer,        // (T, C)
    queries: B::Buffer,  // (T, C); first the position and token type embeddings
    keys: B::Buffer,     // (T, C)
    values: B::Buffer,   // (T, C)
    attended: B::Buffer, // (T, C)
    inner: B::Buffer,    // (T, F)
}

impl<B: Backend> Encoder<B> {
    /// Prepares the weights of a Hugging Face BERT checkpoint; names may start with `bert.`.
    ///
    /// # Errors
    /// A missing or misshapen tensor by name, a format without a kernel, or no memory.
    pub fn load(
        backend: &B,
        config: &BertConfig,
        tensors: &dyn Tensors,
    ) -> Result<Self, ModelError> {
        Self::load_with_progress(backend, config, tensors, &mut |_| {})
    }

    /// [`Encoder::load`], reporting after each tensor.
    ///
    /// # Errors
    /// As [`Encoder::load`].
    pub fn load_with_progress(
        backend: &B,
        config: &BertConfig,
        tensors: &dyn Tensors,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let prefixed = tensors.info("bert.embeddings.word_embeddings.weight").is_some();
        let prefix = if prefixed { "bert." } else { "" };
        let n_total = OUTSIDE_TENSORS + LAYER_TENSORS * config.n_layers;
        let progress_at_start = LoadProgress { n_total, ..LoadProgress::default() };
        let mut loader = Loader { backend, tensors, report: progress, progress: progress_at_start };
        let width = config.width;
        let table = |name: &str| format!("{prefix}embeddings.{name}.weight");
        let twice = InputRounding::Twice;
        let words = loader.matrix(&table("word_embeddings"), (config.vocab_size, width), twice)?;
        let positions =
            loader.matrix(&table("position_embeddings"), (config.max_positions, width), twice)?;
        let token_types =
            loader.matrix(&table("token_type_embeddings"), (config.n_token_types, width), twice)?;
        let norm = Norm::load(&mut loader, &format!("{prefix}embeddings.LayerNorm"), width)?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for layer_idx in 0..config.n_layers {
            let block = format!("{prefix}encoder.layer.{layer_idx}");
            layers.push(Layer::load(&mut loader, config, &block)?);
        }
        Ok(Self { config: config.clone(), words, positions, token_types, norm, layers })
    }

    /// The hyperparameters that it was loaded with.
    #[must_use]
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// One vector `(C)` a text, of unit length where the configuration says so. Token ids include
    /// `[CLS]` and `[SEP]`; texts share a pass without padding and do not see each other.
    ///
    /// # Errors
    /// A text without tokens, with more than the model has positions, or with an id outside the
    /// vocabulary; no memory; or a vector that has no direction.
    pub fn forward(&self, backend: &B, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>, ModelError> {
        for (text, ids) in texts.iter().enumerate() {
            self.check(text, ids)?;
        }
        let mut vectors = Vec::with_capacity(texts.len());
        let mut first = 0;
        while first < texts.len() {
            let mut n_rows = texts[first].len();
            let mut next = first + 1;
            while next < texts.len() && n_rows + texts[next].len() <= PASS_ROWS {
                n_rows += texts[next].len();
                next += 1;
            }
            for mut vector in self.pass(backend, &texts[first..next], n_rows)? {
                let length = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                if !length.is_finite() || length == 0.0 {
                    return Err(ModelError::NumericFault { text: vectors.len(), length });
                }
                if self.config.normalize {
                    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
                }
                vectors.push(vector);
            }
            first = next;
        }
        Ok(vectors)
    }

    fn check(&self, text: usize, ids: &[u32]) -> Result<(), ModelError> {
        if ids.is_empty() {
            return Err(ModelError::EmptyText { text });
        }
        let limit = self.config.max_positions;
        if ids.len() > limit {
            return Err(ModelError::TextTooLong { text, limit, found: ids.len() });
        }
        let limit = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= limit) {
            Some(&found) => Err(ModelError::UnknownToken { text, limit, found }),
            None => Ok(()),
        }
    }

    /// Pooled vectors of texts that together have `n_rows` tokens.
    fn pass(
        &self,
        backend: &B,
        texts: &[&[u32]],
        n_rows: usize,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let width = self.config.width;
        let mut activations = Activations::<B> {
            x: backend.buffer(n_rows * width)?,
            queries: backend.buffer(n_rows * width)?,
            keys: backend.buffer(n_rows * width)?,
            values: backend.buffer(n_rows * width)?,
            attended: backend.buffer(n_rows * width)?,
            inner: backend.buffer(n_rows * self.config.ffn_width)?,
        };
        let mut first_row = 0;
        let spans: Vec<Span> = texts
            .iter()
            .map(|ids| {
                let span = Span { first_row, n_rows: ids.len() };
                first_row += ids.len();
                span
            })
            .collect();
        self.embed(backend, &mut activations, texts);
        for layer in &self.layers {
            self.layer(backend, &mut activations, layer, &spans, n_rows);
        }
        let mut pooled = backend.buffer(texts.len() * width)?;
        match self.config.pooling {
            Pooling::Mean => backend.mean_rows(&activations.x, width, &spans, &mut pooled),
        }
        let mut values = vec![0.0; texts.len() * width];
        backend.read(&pooled, &mut values);
        Ok(values.chunks_exact(width).map(<[f32]>::to_vec).collect())
    }

    /// Word, position and token type embeddings of every row, summed and normed into `x`.
    fn embed(&self, backend: &B, activations: &mut Activations<B>, texts: &[&[u32]]) {
        let ids: Vec<TokenId> = texts.iter().copied().flatten().map(|&id| TokenId(id)).collect();
        let positions: Vec<TokenId> =
            texts.iter().flat_map(|ids| (0..).map(TokenId).take(ids.len())).collect();
        let token_types = vec![TokenId(0); ids.len()];
        let (n_rows, len) = (ids.len(), ids.len() * self.config.width);
        let Activations { x, queries: other, .. } = activations;
        backend.embed(&self.words, &ids, 1.0, x);
        backend.embed(&self.token_types, &token_types, 1.0, other);
        backend.add(x, other, len);
        backend.embed(&self.positions, &positions, 1.0, other);
        backend.add(x, other, len);
        self.normalize(backend, x, n_rows, &self.norm);
    }

    /// One post-norm block (Vaswani et al. 2017, arXiv:1706.03762, §3.1).
    fn layer(
        &self,
        backend: &B,
        activations: &mut Activations<B>,
        layer: &Layer<B>,
        spans: &[Span],
        n_rows: usize,
    ) {
        let Activations { x, queries, keys, values, attended, inner } = activations;
        let linears = [&layer.query, &layer.key, &layer.value];
        let (weights, biases) = (linears.map(|l| &l.weight), linears.map(|l| &l.bias));
        backend.linear_qkv(x, n_rows, weights, Some(biases), [queries, keys, values]);
        let n_heads = self.config.n_heads;
        let head_dim = self.config.width / n_heads;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape {
            n_heads,
            n_kv_heads: n_heads,
            head_dim,
            scale,
            soft_cap: None,
            window: None,
        };
        backend.attention_full(queries, keys, values, shape, spans, attended);
        let Linear { weight, bias } = &layer.attention_out;
        backend.linear_add(attended, n_rows, weight, Some(bias), 1.0, x);
        self.normalize(backend, x, n_rows, &layer.attention_norm);
        let Linear { weight, bias } = &layer.intermediate;
        backend.linear_gelu(x, n_rows, weight, bias, inner);
        let Linear { weight, bias } = &layer.output;
        backend.linear_add(inner, n_rows, weight, Some(bias), 1.0, x);
        self.normalize(backend, x, n_rows, &layer.output_norm);
    }

    fn normalize(&self, backend: &B, x: &mut B::Buffer, n_rows: usize, norm: &Norm<B>) {
        backend.layer_norm(x, n_rows, &norm.weight, &norm.bias, self.config.layer_norm_eps);
    }
}

impl<B: Backend> Norm<B> {
    fn load(loader: &mut Loader<'_, B>, name: &str, width: usize) -> Result<Self, ModelError> {
        Ok(Self {
            weight: loader.vector(&format!("{name}.weight"), width)?,
            bias: loader.vector(&format!("{name}.bias"), width)?,
        })
    }
}

impl<B: Backend> Linear<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        name: &str,
        (rows, columns): (usize, usize),
        rounding: InputRounding,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            weight: loader.matrix(&format!("{name}.weight"), (rows, columns), rounding)?,
            bias: loader.vector(&format!("{name}.bias"), rows)?,
        })
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        config: &BertConfig,
        block: &str,
    ) -> Result<Self, ModelError> {
        let (width, ffn_width) = (config.width, config.ffn_width);
        let name = |part: &str| format!("{block}.{part}");
        let (once, twice) = (InputRounding::Once, InputRounding::Twice);
        let square = (width, width);
        Ok(Self {
            query: Linear::load(loader, &name("attention.self.query"), square, twice)?,
            key: Linear::load(loader, &name("attention.self.key"), square, twice)?,
            value: Linear::load(loader, &name("attention.self.value"), square, twice)?,
            attention_out: Linear::load(loader, &name("attention.output.dense"), square, once)?,
            attention_norm: Norm::load(loader, &name("attention.output.LayerNorm"), width)?,
            intermediate: Linear::load(
                loader,
                &name("intermediate.dense"),
                (ffn_width, width),
                twice,
            )?,
            output: Linear::load(loader, &name("output.dense"), (width, ffn_width), twice)?,
            output_norm: Norm::load(loader, &name("output.LayerNorm"), width)?,
        })
    }
}
