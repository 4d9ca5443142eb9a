//! [`HfFamily`]: what the `model_type` of `config.json` implies. Defaults are those of the
//! configuration classes of transformers, which published files rely on by leaving fields out.

use crate::decoder::{FAMILIES, Family, RopePairs};

/// The fixed traits of a `model_type`.
#[derive(Clone, Copy)]
pub(super) struct HfFamily {
    /// `model_type`.
    pub(super) name: &'static str,
    /// Name of the [`Family`].
    family: &'static str,
    pub(super) pairs: RopePairs,
    /// Which projections have biases.
    pub(super) biases: Biases,
    pub(super) windows: Windows,
    /// `rope_theta`.
    pub(super) theta: f32,
    /// `head_dim`; `None`: width / heads.
    pub(super) head_dim: Option<usize>,
    /// `tie_word_embeddings`.
    pub(super) tied: bool,
    /// Keys of the expert count, first spelling first, for families with experts.
    pub(super) expert_keys: &'static [&'static str],
    /// Defaults of fields that are usually there.
    pub(super) sizes: Option<Sizes>,
}

/// Which projections of attention have biases.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Biases {
    /// All four if `attention_bias` says so.
    Stated,
    /// Query, key and value (Qwen 2).
    Qkv,
    /// None.
    Never,
}

/// Which layers see only a window.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// None; a `sliding_window` is refused.
    Never,
    /// All, if `sliding_window` is there; its default when the field is absent.
    All(Option<usize>),
    /// Those from `max_window_layers` on, if `use_sliding_window`.
    FromLayer,
    /// None; `use_sliding_window` is refused.
    Off,
    /// Those without rotation, if `use_sliding_window` (`SmolLM` 3).
    WithoutRope,
    /// All but every n-th; the default width.
    Local(usize),
}

/// Defaults of sizes, for families whose published files leave them out (Gemma 3).
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) vocab_size: usize,
    pub(super) context_len: usize,
    pub(super) eps: f32,
}

impl HfFamily {
    /// The family called `model_type`.
    pub(super) fn find(model_type: &str) -> Option<&'static HfFamily> {
        HF_FAMILIES.iter().find(|family| family.name == model_type)
    }

    /// All names, for a message.
    pub(super) fn names() -> String {
        let names: Vec<&str> = HF_FAMILIES.iter().map(|family| family.name).collect();
        names.join(", ")
    }

    /// What it shares with GGUF files of the architecture.
    pub(super) fn traits(&self) -> &'static Family {
        let found = FAMILIES.iter().find(|family| family.name == self.family);
        found.expect("the table names families that exist")
    }
}

/// Llama, from which the others differ.
const LLAMA: HfFamily = HfFamily {
    name: "llama",
    family: "llama",
    pairs: RopePairs::Halves,
    biases: Biases::Stated,
    windows: Windows::Never,
    theta: 10_000.0,
    head_dim: None,
    tied: false,
    expert_keys: &[],
    sizes: None,
};

/// `Gemma3TextConfig`.
const GEMMA3_SIZES: Sizes =
    Sizes { n_heads: 8, n_kv_heads: 4, vocab_size: 262_208, context_len: 131_072, eps: 1e-6 };

const HF_FAMILIES: [HfFamily; 13] = [
    LLAMA,
    HfFamily { name: "mistral", biases: Biases::Never, windows: Windows::All(Some(4096)), ..LLAMA },
    HfFamily {
        name: "mixtral",
        biases: Biases::Never,
        windows: Windows::All(None),
        theta: 1e6,
        expert_keys: &["num_local_experts"],
        ..LLAMA
    },
    HfFamily {
        name: "qwen2",
        family: "qwen2",
        biases: Biases::Qkv,
        windows: Windows::FromLayer,
        ..LLAMA
    },
    HfFamily {
        name: "qwen3",
        family: "qwen3",
        windows: Windows::FromLayer,
        head_dim: Some(128),
        ..LLAMA
    },
    HfFamily {
        name: "qwen3_moe",
        family: "qwen3moe",
        windows: Windows::Off,
        expert_keys: &["num_experts", "num_local_experts"],
        ..LLAMA
    },
    HfFamily {
        name: "gemma2",
        family: "gemma2",
        windows: Windows::Local(4096),
        head_dim: Some(256),
        tied: true,
        ..LLAMA
    },
    HfFamily {
        name: "gemma3_text",
        family: "gemma3",
        windows: Windows::Local(4096),
        theta: 1e6,
        head_dim: Some(256),
        tied: true,
        sizes: Some(GEMMA3_SIZES),
        ..LLAMA
    },
    HfFamily {
        name: "phi3",
        family: "phi3",
        biases: Biases::Never,
        windows: Windows::All(None),
        ..LLAMA
    },
    HfFamily {
        name: "smollm3",
        family: "smollm3",
        windows: Windows::WithoutRope,
        theta: 2e6,
        tied: true,
        ..LLAMA
    },
    HfFamily { name: "granite", family: "granite", ..LLAMA },
    HfFamily {
        name: "cohere2",
        family: "cohere2",
        pairs: RopePairs::Adjacent,
        windows: Windows::Local(4096),
        tied: true,
        ..LLAMA
    },
    HfFamily { name: "olmo2", family: "olmo2", ..LLAMA },
];
