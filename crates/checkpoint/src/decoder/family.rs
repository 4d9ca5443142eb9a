//! [`Family`]: what files do not say, because every model of an architecture has it.

use super::{BlockNorms, GateKind, NormKind, QkNorm, RopePairs};

/// The fixed traits of an architecture. Everything else is read from the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Family {
    /// `general.architecture`.
    pub(crate) name: &'static str,
    pub(crate) norm: NormKind,
    pub(crate) blocks: BlockNorms,
    pub(crate) qk_norm: Option<QkNorm>,
    pub(crate) requires_qkv_bias: bool,
    pub(crate) gate: GateKind,
    pub(crate) pairs: RopePairs,
    pub(crate) layers: LayerPattern,
    /// Whether embeddings are multiplied by √C.
    pub(crate) scales_embedding: bool,
    /// Whether query, key and value, and gate and up, are one matrix each.
    pub(crate) fused: bool,
    /// Whether the weights of the chosen experts sum to one.
    pub(crate) normalises_experts: bool,
    /// A model of this many layers scales its scores by 1/√(C/H) rather than by 1/√D: the largest
    /// of its family, which GGUF files do not mark otherwise.
    pub(crate) wide_score_layers: Option<usize>,
    /// Soft cap of attention scores when the file does not state it.
    pub(crate) attention_soft_cap: Option<f32>,
    /// Soft cap of logits when the file does not state it.
    pub(crate) logit_soft_cap: Option<f32>,
}

/// Which layers rotate and which see only a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerPattern {
    /// All alike: all rotate, and all have the window if the file states one.
    Uniform,
    /// Every `period`-th layer is global, the others have the window.
    Local {
        /// 2: local, global, local, …
        period: usize,
        /// How global layers rotate.
        global: GlobalRope,
    },
    /// Every `period`-th layer does not rotate; none has a window.
    SomeWithoutRope {
        /// 4: three layers rotate, the fourth does not.
        period: usize,
    },
}

/// How the global layers of a local/global model rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GlobalRope {
    /// As local layers do (Gemma 2).
    Same,
    /// With the file's base and scaling, while local layers use base 10,000 unscaled (Gemma 3).
    Own,
    /// Not at all (Cohere 2).
    None,
}

/// Llama, from which the others differ.
const LLAMA: Family = Family {
    name: "llama",
    norm: NormKind::Rms,
    blocks: BlockNorms::Pre,
    qk_norm: None,
    requires_qkv_bias: false,
    gate: GateKind::Silu,
    pairs: RopePairs::Adjacent,
    layers: LayerPattern::Uniform,
    scales_embedding: false,
    fused: false,
    normalises_experts: true,
    wide_score_layers: None,
    attention_soft_cap: None,
    logit_soft_cap: None,
};

/// Gemma 2, from which Gemma 3 differs.
const GEMMA2: Family = Family {
    name: "gemma2",
    blocks: BlockNorms::Sandwich,
    gate: GateKind::GeluTanh,
    pairs: RopePairs::Halves,
    layers: LayerPattern::Local { period: 2, global: GlobalRope::Same },
    scales_embedding: true,
    wide_score_layers: Some(46),
    attention_soft_cap: Some(50.0),
    logit_soft_cap: Some(30.0),
    ..LLAMA
};

/// Every architecture that the engine has. Mistral and Mixtral files say `llama`.
pub(crate) const FAMILIES: [Family; 11] = [
    LLAMA,
    Family { name: "qwen2", requires_qkv_bias: true, pairs: RopePairs::Halves, ..LLAMA },
    Family { name: "qwen3", qk_norm: Some(QkNorm::Heads), pairs: RopePairs::Halves, ..LLAMA },
    Family { name: "qwen3moe", qk_norm: Some(QkNorm::Heads), pairs: RopePairs::Halves, ..LLAMA },
    GEMMA2,
    Family {
        name: "gemma3",
        qk_norm: Some(QkNorm::Heads),
        layers: LayerPattern::Local { period: 6, global: GlobalRope::Own },
        wide_score_layers: Some(62),
        attention_soft_cap: None,
        logit_soft_cap: None,
        ..GEMMA2
    },
    Family { name: "phi3", pairs: RopePairs::Halves, fused: true, ..LLAMA },
    Family { name: "smollm3", layers: LayerPattern::SomeWithoutRope { period: 4 }, ..LLAMA },
    Family { name: "granite", ..LLAMA },
    Family {
        name: "cohere2",
        norm: NormKind::Layer,
        blocks: BlockNorms::Parallel,
        layers: LayerPattern::Local { period: 4, global: GlobalRope::None },
        ..LLAMA
    },
    Family {
        name: "olmo2",
        blocks: BlockNorms::Post,
        qk_norm: Some(QkNorm::Whole),
        pairs: RopePairs::Halves,
        ..LLAMA
    },
];
