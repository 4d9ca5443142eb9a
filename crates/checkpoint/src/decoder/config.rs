//! The plain types of [`DecoderConfig`].

use super::MAX_CONTEXT;
use crate::LoadError;

/// Hyperparameters of a decoder. Families differ in these values only.
///
/// A value of this type agrees with the tensors of the checkpoint that it came from: every tensor
/// that the decoder needs is there in the shape given here, and there is none that it does not
/// know.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `general.architecture` of GGUF files, such as `qwen3moe`; folders of the same family have
    /// the same name here, and Mistral and Mixtral are `llama`.
    pub architecture: String,
    /// Width of the residual stream (C).
    pub width: usize,
    /// Query heads (H), a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads (K).
    pub n_kv_heads: usize,
    /// Width of one head (D); `n_heads * head_dim` need not equal `width`.
    pub head_dim: usize,
    /// Width of the dense feed-forward networks (F).
    pub ffn_width: usize,
    /// The mixture of experts of the layers that have one.
    pub experts: Option<Experts>,
    /// Rows of the embedding (V); the tokenizer may have fewer tokens.
    pub vocab_size: usize,
    /// Positions that the model serves; the rotary frequencies are those for this many. At first
    /// the trained length, see [`DecoderConfig::with_context_len`].
    pub context_len: usize,
    /// Positions that it can serve at most.
    pub max_context_len: usize,
    /// Every normalisation of the model but the one of queries and keys, which is always RMS.
    pub norm: NormConfig,
    /// Where a block normalises.
    pub blocks: BlockNorms,
    /// How queries and keys are normalised before they rotate.
    pub qk_norm: Option<QkNorm>,
    /// Whether query, key and value must have biases; other biases are used when they are there.
    pub requires_qkv_bias: bool,
    /// What the gate of the feed-forward network goes through.
    pub gate: GateKind,
    /// Attention scores are multiplied by this.
    pub attention_scale: f32,
    /// Attention scores s become cap · tanh(s / cap).
    pub attention_soft_cap: Option<f32>,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
    /// What a block adds to the residual stream is multiplied by this.
    pub residual_scale: f32,
    /// Logits are multiplied by this.
    pub logit_scale: f32,
    /// Logits x become cap · tanh(x / cap), after the scale.
    pub logit_soft_cap: Option<f32>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<RopeConfig>,
    /// The layers (L), first to last.
    pub layers: Vec<LayerConfig>,
    /// Whether the output head is the embedding table.
    pub tied_head: bool,
    /// How the checkpoint stores matrices that belong together.
    pub storage: Storage,
}

impl DecoderConfig {
    /// Layers L.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of all query heads, H · D.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key heads, K · D.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// The same model serving `context_len` positions. Scalings that depend on the length (dynamic
    /// NTK, `LongRoPE`) depend on this one, for every sequence and step.
    ///
    /// # Errors
    /// [`LoadError::BadValue`] for a length outside 1 to [`DecoderConfig::max_context_len`].
    pub fn with_context_len(self, context_len: usize) -> Result<DecoderConfig, LoadError> {
        if (1..=self.max_context_len).contains(&context_len) {
            return Ok(DecoderConfig { context_len, ..self });
        }
        let expected = format!("1 to {}", self.max_context_len);
        Err(LoadError::bad_value("context length", expected, context_len))
    }
}

/// What differs between layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerConfig {
    /// Index into [`DecoderConfig::ropes`]; `None`: queries and keys do not rotate.
    pub rope: Option<usize>,
    /// A token sees this many tokens, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Whether the network is a mixture of experts.
    pub has_experts: bool,
}

/// A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): the router's softmax picks
/// `n_used` experts a token and weighs their outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts of a layer (E).
    pub n_experts: usize,
    /// Experts that a token goes through; at most `n_experts`.
    pub n_used: usize,
    /// Width of one expert's network.
    pub width: usize,
    /// Whether the weights of the chosen experts are scaled to sum to one.
    pub normalise: bool,
}

/// A normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormConfig {
    /// Which one.
    pub kind: NormKind,
    /// Added to the mean square or the variance; positive.
    pub eps: f32,
}

/// Kinds of normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x / sqrt(mean(x²) + eps) · weight.
    Rms,
    /// (x − mean) / sqrt(variance + eps) · weight, without a bias.
    Layer,
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockNorms {
    /// Before attention and before the network (Llama).
    Pre,
    /// Before and after each of them (Gemma 2 and 3).
    Sandwich,
    /// After each of them only (`OLMo` 2).
    Post,
    /// Once before both, which then run side by side (Cohere).
    Parallel,
}

/// How queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself, weight `(D)` (Qwen 3, Gemma 3).
    Heads,
    /// All heads together, weights `(H * D)` and `(K * D)` (`OLMo` 2).
    Whole,
}

/// What the gate of a network goes through before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    /// x · sigmoid(x).
    Silu,
    /// The tanh approximation of gelu.
    GeluTanh,
}

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies; positive.
    pub theta: f32,
    /// Leading elements of each head that rotate (R); even, at most the head width.
    pub dim: usize,
    /// Which elements form a pair.
    pub pairs: RopePairs,
    /// How the frequencies are stretched to longer contexts.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// How many of the `stated_len` positions of a checkpoint are served unless more are asked for:
    /// a scaling that changes with the length keeps to the trained one, where it is exact.
    pub(crate) fn default_context_len(&self, stated_len: usize) -> usize {
        match self.scaling {
            RopeScaling::DynamicNtk { original_len, .. }
            | RopeScaling::Long { original_len, .. } => stated_len.min(original_len),
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Yarn { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Factors(_) => stated_len,
        }
    }

    /// How many positions can be served at most. Checkpoints with dynamic NTK or `YaRN` often state
    /// the trained length only.
    pub(crate) fn max_context_len(&self, stated_len: usize) -> usize {
        match self.scaling {
            RopeScaling::DynamicNtk { factor, original_len }
            | RopeScaling::Yarn { factor, original_len, .. } => {
                let stretched = (f64::from(factor) * original_len as f64) as usize;
                stated_len.max(stretched.min(MAX_CONTEXT as usize))
            }
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Factors(_)
            | RopeScaling::Long { .. } => stated_len,
        }
    }

    /// The base of the frequencies in a context of `context_len` positions. "NTK-aware" scaling
    /// raises it beyond the trained length N: theta · (factor · T / N − (factor − 1))^(R / (R − 2)).
    #[must_use]
    pub fn theta_for(&self, context_len: usize) -> f64 {
        let theta = f64::from(self.theta);
        match self.scaling {
            RopeScaling::DynamicNtk { factor, original_len } if context_len > original_len => {
                let (factor, dim) = (f64::from(factor), self.dim as f64);
                let stretch = factor * context_len as f64 / original_len as f64 - (factor - 1.0);
                theta * stretch.powf(dim / (dim - 2.0))
            }
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::DynamicNtk { .. }
            | RopeScaling::Yarn { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Factors(_)
            | RopeScaling::Long { .. } => theta,
        }
    }
}

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// (2i, 2i + 1).
    Adjacent,
    /// (i, i + R/2).
    Halves,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// "NTK-aware": up to the trained length unchanged; beyond, the base grows with the length of
    /// the context, see [`RopeConfig::theta_for`].
    DynamicNtk {
        /// At least 1.
        factor: f32,
        /// Trained length; the head has more than two rotating elements.
        original_len: usize,
    },
    /// `YaRN` (Peng et al. 2023, arXiv:2309.00071, §3.2 and §3.4).
    Yarn {
        /// At least 1.
        factor: f32,
        /// Trained length.
        original_len: usize,
        /// Rotations within the trained length above which a frequency stays; usually 32.
        beta_fast: f32,
        /// Rotations below which it is divided; usually 1.
        beta_slow: f32,
        /// Cosine and sine are multiplied by this; `None`: 0.1 ln(factor) + 1.
        magnitude: Option<f32>,
        /// Whether the bounds of the ramp are rounded to whole pairs; the usual way.
        truncate: bool,
    },
    /// Llama 3.1: long waves divided, short ones kept, smooth between.
    Llama3 {
        /// Divisor of the long waves.
        factor: f32,
        /// Waves longer than `original_len` / this are long.
        low_frequency_factor: f32,
        /// Waves shorter than `original_len` / this are short.
        high_frequency_factor: f32,
        /// Trained length.
        original_len: usize,
    },
    /// One divisor a pair, as GGUF files store Llama 3's scaling.
    Factors(Vec<f32>),
    /// `LongRoPE` (Ding et al. 2024, arXiv:2402.13753): one divisor a pair, another list of them
    /// when the context is longer than the trained one.
    Long {
        /// Divisors up to `original_len`.
        short: Vec<f32>,
        /// Divisors beyond it.
        long: Vec<f32>,
        /// Trained length.
        original_len: usize,
        /// Cosine and sine are multiplied by this.
        magnitude: f32,
    },
}

/// How the checkpoint stores matrices that belong together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Storage {
    /// Query, key and value are one matrix, in this order.
    pub fused_qkv: bool,
    /// Gate and up are one matrix, in this order.
    pub fused_gate_up: bool,
    /// The experts of a layer are one tensor a role, `(E, rows, columns)`.
    pub stacked_experts: bool,
}
