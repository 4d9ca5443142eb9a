//! [`Names`]: modules of a Hugging Face checkpoint and what the engine calls them.

use crate::decoder::BlockNorms;
use crate::{DecoderConfig, QkNorm};

/// A module's name in the checkpoint, and its name here.
type Pair = (&'static str, &'static str);

/// The modules of a family, in the names of both sides.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// What stands before `layers.0`, the usual way first.
    roots: &'static [&'static str],
    /// Names of the head, the usual one first.
    heads: &'static [&'static str],
    /// Modules of a layer.
    modules: Vec<Pair>,
    experts: Option<ExpertNames>,
}

/// How a family calls its experts.
#[derive(Clone, Copy, Debug)]
struct ExpertNames {
    /// What stands before an expert's number.
    prefix: &'static str,
    parts: [Pair; 3],
}

const EMBEDDING: Pair = ("embed_tokens", "token_embd");
const NORM: Pair = ("norm", "output_norm");
const HEAD: &str = "output";
const ATTENTION: [Pair; 4] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
];
const FUSED_ATTENTION: [Pair; 2] =
    [("self_attn.qkv_proj", "attn_qkv"), ("self_attn.o_proj", "attn_output")];
const QK_NORMS: [Pair; 2] =
    [("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")];
const NETWORK: [Pair; 3] =
    [("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")];
const FUSED_NETWORK: [Pair; 2] = [("mlp.gate_up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")];
const MIXTRAL: ExpertNames = ExpertNames {
    prefix: "block_sparse_moe.experts.",
    parts: [("w1", "ffn_gate"), ("w3", "ffn_up"), ("w2", "ffn_down")],
};
const QWEN_MOE: ExpertNames = ExpertNames {
    prefix: "mlp.experts.",
    parts: [("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")],
};

impl Names {
    /// Those of a model like `config`; `model_type` decides how experts are called, and a
    /// multimodal folder nests the decoder.
    pub(super) fn new(config: &DecoderConfig, model_type: &str, is_multimodal: bool) -> Names {
        let mut modules: Vec<Pair> = norms(config.blocks).to_vec();
        if config.storage.fused_qkv {
            modules.extend(FUSED_ATTENTION);
        } else {
            modules.extend(ATTENTION);
        }
        match config.qk_norm {
            Some(QkNorm::Heads | QkNorm::Whole) => modules.extend(QK_NORMS),
            None => {}
        }
        let experts = config.experts.map(|_| {
            let is_mixtral = model_type == "mixtral";
            let gate = if is_mixtral { "block_sparse_moe.gate" } else { "mlp.gate" };
            modules.push((gate, "ffn_gate_inp"));
            if is_mixtral { MIXTRAL } else { QWEN_MOE }
        });
        if config.storage.fused_gate_up {
            modules.extend(FUSED_NETWORK);
        } else {
            modules.extend(NETWORK);
        }
        let (roots, heads): (&[&str], &[&str]) = if is_multimodal {
            (
                &["model.language_model.", "language_model.model."],
                &["lm_head", "language_model.lm_head"],
            )
        } else {
            (&["model."], &["lm_head"])
        };
        Names { roots, heads, modules, experts }
    }

    /// What the engine calls `module`, such as `blk.3.attn_q`.
    pub(super) fn canonical(&self, module: &str) -> Option<String> {
        if self.heads.contains(&module) {
            return Some(HEAD.to_owned());
        }
        let inner = self.roots.iter().find_map(|root| module.strip_prefix(root))?;
        for (stored, ours) in [EMBEDDING, NORM] {
            if inner == stored {
                return Some(ours.to_owned());
            }
        }
        let (layer, part) = inner.strip_prefix("layers.")?.split_once('.')?;
        let layer = number(layer)?;
        if let Some((_, ours)) = self.modules.iter().find(|(stored, _)| *stored == part) {
            return Some(format!("blk.{layer}.{ours}"));
        }
        let experts = self.experts?;
        let (expert, role) = part.strip_prefix(experts.prefix)?.split_once('.')?;
        let expert = number(expert)?;
        let (_, ours) = experts.parts.iter().find(|(stored, _)| *stored == role)?;
        Some(format!("blk.{layer}.{ours}.{expert}"))
    }

    /// What the checkpoint would call the tensor `name`, for messages.
    pub(super) fn stored(&self, name: &str) -> Option<String> {
        let (module, suffix) = name.rsplit_once('.')?;
        if module == HEAD {
            return Some(format!("{}.{suffix}", self.heads[0]));
        }
        let root = self.roots[0];
        for (stored, ours) in [EMBEDDING, NORM] {
            if module == ours {
                return Some(format!("{root}{stored}.{suffix}"));
            }
        }
        let (layer, part) = module.strip_prefix("blk.")?.split_once('.')?;
        if let Some((stored, _)) = self.modules.iter().find(|(_, ours)| *ours == part) {
            return Some(format!("{root}layers.{layer}.{stored}.{suffix}"));
        }
        let (role, expert) = part.split_once('.')?;
        let experts = self.experts?;
        let (stored, _) = experts.parts.iter().find(|(_, ours)| *ours == role)?;
        Some(format!("{root}layers.{layer}.{}{expert}.{stored}.{suffix}", experts.prefix))
    }
}

fn norms(blocks: BlockNorms) -> &'static [Pair] {
    match blocks {
        BlockNorms::Pre => {
            &[("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]
        }
        BlockNorms::Sandwich => &[
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        BlockNorms::Post => &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        BlockNorms::Parallel => &[("input_layernorm", "attn_norm")],
    }
}

/// A number without a sign or leading zeros, so that no two names mean the same.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number: &u32| number.to_string() == text)
}
