//! [`LlamaConfig`]: the hyperparameters of a llama-family decoder, checked against its tensors.

use crate::{Gguf, LoadError, Metadata, Tensors};

/// More layers than any published decoder.
const MAX_LAYERS: u32 = 1024;
/// Two million, sixteen times the longest context in common use.
const MAX_CONTEXT: u32 = 1 << 21;
/// Value that GGUF gives `rope.freq_base` when the key is absent.
const DEFAULT_ROPE_THETA: f32 = 10_000.0;

/// Hyperparameters of a llama-family decoder.
///
/// A value of this type agrees with the tensors of the file that it came from: every tensor that a
/// decoder needs is there in the shape given here, and there is none that it does not know.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// `general.architecture`; `llama`.
    pub architecture: String,
    /// Decoder layers (L).
    pub n_layers: usize,
    /// Width of the residual stream (C).
    pub width: usize,
    /// Query heads (H), a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads (K).
    pub n_kv_heads: usize,
    /// Width of one head (D); `n_heads * head_dim` need not equal `width`.
    pub head_dim: usize,
    /// Width of the feed-forward network (F).
    pub ffn_width: usize,
    /// Rows of the embedding (V); the tokenizer may have fewer tokens.
    pub vocab_size: usize,
    /// Added to the mean square in RMS norm; positive.
    pub rms_eps: f32,
    /// Base of the rotary frequencies; positive.
    pub rope_theta: f32,
    /// Leading elements of each head that rotate; even, at most `head_dim`. Pairs are adjacent.
    pub rope_dim: usize,
    /// Divisors of the rotary frequencies (`rope_freqs.weight`), `rope_dim / 2` of them.
    pub rope_factors: Option<Vec<f32>>,
    /// Positions that the model was trained for.
    pub context_len: usize,
    /// Whether the output head is the embedding table.
    pub tied_head: bool,
}

impl LlamaConfig {
    /// Reads and checks the configuration of `gguf`.
    ///
    /// # Errors
    /// When the architecture is another one, a key is missing or impossible, a feature is used
    /// that this engine does not have, or a tensor is missing, misshapen or unknown.
    pub fn from_gguf(gguf: &Gguf) -> Result<LlamaConfig, LoadError> {
        let keys = Keys { metadata: gguf.metadata() };
        let architecture = keys.metadata.require_str("general.architecture")?;
        if architecture != "llama" {
            return Err(LoadError::bad_value("general.architecture", "llama", architecture));
        }
        keys.refuse_unsupported()?;

        let width = keys.positive("llama.embedding_length", u32::MAX)?;
        let n_heads = keys.positive("llama.attention.head_count", u32::MAX)?;
        let n_kv_heads = keys.kv_heads(n_heads)?;
        let head_dim = keys.head_dim(width, n_heads)?;
        let rope_dim = keys.rope_dim(head_dim)?;
        let vocab_size = vocab_size(gguf, width)?;
        let config = LlamaConfig {
            architecture: architecture.to_owned(),
            n_layers: keys.positive("llama.block_count", MAX_LAYERS)?,
            width,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_width: keys.positive("llama.feed_forward_length", u32::MAX)?,
            vocab_size,
            rms_eps: keys.positive_f32("llama.attention.layer_norm_rms_epsilon", None)?,
            rope_theta: keys.positive_f32("llama.rope.freq_base", Some(DEFAULT_ROPE_THETA))?,
            rope_dim,
            rope_factors: rope_factors(gguf, rope_dim)?,
            context_len: keys.positive("llama.context_length", MAX_CONTEXT)?,
            tied_head: gguf.tensor("output.weight").is_none(),
        };
        config.check_tensors(gguf)?;
        Ok(config)
    }

    /// Checks that every tensor of the decoder is there in its shape, and that there is no other:
    /// a bias or a gate that is read past gives fluent nonsense instead of an error.
    fn check_tensors(&self, gguf: &Gguf) -> Result<(), LoadError> {
        let query_width = product(&[self.n_heads, self.head_dim])?;
        let kv_width = product(&[self.n_kv_heads, self.head_dim])?;
        gguf.require("output_norm.weight", &[self.width])?;
        if !self.tied_head {
            gguf.require("output.weight", &[self.vocab_size, self.width])?;
        }
        let layer: [(&str, &[usize]); 9] = [
            ("attn_norm", &[self.width]),
            ("attn_q", &[query_width, self.width]),
            ("attn_k", &[kv_width, self.width]),
            ("attn_v", &[kv_width, self.width]),
            ("attn_output", &[self.width, query_width]),
            ("ffn_norm", &[self.width]),
            ("ffn_gate", &[self.ffn_width, self.width]),
            ("ffn_up", &[self.ffn_width, self.width]),
            ("ffn_down", &[self.width, self.ffn_width]),
        ];
        for layer_idx in 0..self.n_layers {
            for (name, shape) in layer {
                gguf.require(&format!("blk.{layer_idx}.{name}.weight"), shape)?;
            }
        }
        let outside = ["token_embd.weight", "output_norm.weight", "output.weight"];
        let known = outside.len() - usize::from(self.tied_head)
            + usize::from(self.rope_factors.is_some())
            + self.n_layers * layer.len();
        if gguf.tensors().count() == known {
            return Ok(());
        }
        let is_known = |name: &str| {
            outside.contains(&name)
                || name == ROPE_FACTORS
                || name.split_once('.').and_then(|(_, rest)| rest.split_once('.')).is_some_and(
                    |(number, rest)| {
                        let layer_idx = number.parse().unwrap_or(usize::MAX);
                        let stem = rest.strip_suffix(".weight").unwrap_or(rest);
                        layer_idx < self.n_layers
                            && layer.iter().any(|&(known, _)| known == stem)
                            // Spelled otherwise it is not the tensor that was checked above.
                            && name == format!("blk.{layer_idx}.{stem}.weight")
                    },
                )
        };
        match gguf.tensors().find(|view| !is_known(view.name)) {
            None => Ok(()),
            Some(view) => Err(LoadError::UnexpectedTensor {
                tensor: view.name.to_owned(),
                architecture: self.architecture.clone(),
            }),
        }
    }
}

const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Typed access to the architecture's keys.
struct Keys<'a> {
    metadata: &'a Metadata,
}

impl Keys<'_> {
    fn positive(&self, key: &str, limit: u32) -> Result<usize, LoadError> {
        in_range(key, self.metadata.require_u32(key)?, limit)
    }

    fn optional_positive(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.metadata.u32(key)?.map(|value| in_range(key, value, u32::MAX)).transpose()
    }

    fn positive_f32(&self, key: &str, default: Option<f32>) -> Result<f32, LoadError> {
        let value = match (self.metadata.f32(key)?, default) {
            (Some(value), _) => value,
            (None, Some(default)) => default,
            (None, None) => return Err(LoadError::MissingKey { key: key.to_owned() }),
        };
        if !value.is_finite() || value <= 0.0 {
            return Err(LoadError::bad_value(key, "a positive number", value));
        }
        Ok(value)
    }

    fn kv_heads(&self, n_heads: usize) -> Result<usize, LoadError> {
        let key = "llama.attention.head_count_kv";
        let n_kv_heads = self.optional_positive(key)?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            let expected = format!("a divisor of llama.attention.head_count ({n_heads})");
            return Err(LoadError::bad_value(key, expected, n_kv_heads));
        }
        Ok(n_kv_heads)
    }

    fn head_dim(&self, width: usize, n_heads: usize) -> Result<usize, LoadError> {
        let key = "llama.attention.key_length";
        let head_dim = match self.optional_positive(key)? {
            Some(head_dim) => head_dim,
            None if width.is_multiple_of(n_heads) => width / n_heads,
            None => {
                let expected = format!("a divisor of llama.embedding_length ({width})");
                return Err(LoadError::bad_value("llama.attention.head_count", expected, n_heads));
            }
        };
        let key = "llama.attention.value_length";
        match self.optional_positive(key)? {
            Some(found) if found != head_dim => {
                let expected = format!("the head width {head_dim}");
                Err(LoadError::bad_value(key, expected, found))
            }
            Some(_) | None => Ok(head_dim),
        }
    }

    fn rope_dim(&self, head_dim: usize) -> Result<usize, LoadError> {
        let key = "llama.rope.dimension_count";
        let rope_dim = self.optional_positive(key)?.unwrap_or(head_dim);
        if !rope_dim.is_multiple_of(2) || rope_dim > head_dim {
            let expected = format!("an even number up to the head width {head_dim}");
            return Err(LoadError::bad_value(key, expected, rope_dim));
        }
        Ok(rope_dim)
    }

    /// Refuses what changes the arithmetic and is not implemented.
    fn refuse_unsupported(&self) -> Result<(), LoadError> {
        let key = "llama.expert_count";
        let experts = self.metadata.u32(key)?.unwrap_or(0);
        if experts != 0 {
            let expected = "0 (mixtures of experts are not supported)";
            return Err(LoadError::bad_value(key, expected, experts));
        }
        let key = "llama.rope.scaling.type";
        if let Some(kind) = self.metadata.str(key)?.filter(|&kind| kind != "none") {
            return Err(LoadError::bad_value(key, "none (or rope_freqs.weight)", kind));
        }
        for key in ["llama.rope.scale_linear", "llama.rope.scaling.factor", "llama.logit_scale"] {
            // One and, as llama.cpp reads it, zero mean that nothing is scaled.
            match self.metadata.f32(key)? {
                Some(factor) if factor != 0.0 && factor.to_bits() != 1.0_f32.to_bits() => {
                    return Err(LoadError::bad_value(key, "1 (scaling is not supported)", factor));
                }
                Some(_) | None => {}
            }
        }
        Ok(())
    }
}

fn in_range(key: &str, value: u32, limit: u32) -> Result<usize, LoadError> {
    let expected = || format!("an integer from 1 to {limit}");
    if !(1..=limit).contains(&value) {
        return Err(LoadError::bad_value(key, expected(), value));
    }
    usize::try_from(value).map_err(|_| LoadError::bad_value(key, expected(), value))
}

fn product(factors: &[usize]) -> Result<usize, LoadError> {
    let product = factors.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    product.ok_or_else(|| LoadError::LimitExceeded {
        what: format!("product of head count and head width {factors:?}"),
        limit: usize::MAX as u64,
        found: u64::MAX,
    })
}

/// Rows of the embedding, which must have `width` columns and agree with the key when it is there.
fn vocab_size(gguf: &Gguf, width: usize) -> Result<usize, LoadError> {
    let key = "llama.vocab_size";
    let stated = gguf.metadata().u32(key)?.map(|n| in_range(key, n, u32::MAX)).transpose()?;
    let name = "token_embd.weight";
    let rows = match (gguf.tensor(name), stated) {
        (Some(view), None) => view.shape[0],
        (Some(_), Some(stated)) => stated,
        (None, stated) => {
            let expected = vec![stated.unwrap_or(0), width];
            return Err(LoadError::MissingTensor { tensor: name.to_owned(), expected });
        }
    };
    gguf.require(name, &[rows, width])?;
    if u32::try_from(rows).is_err() {
        return Err(LoadError::LimitExceeded {
            what: format!("rows of tensor `{name}`"),
            limit: u64::from(u32::MAX),
            found: rows as u64,
        });
    }
    Ok(rows)
}

/// The divisors of the rotary frequencies, all finite and positive.
fn rope_factors(gguf: &Gguf, rope_dim: usize) -> Result<Option<Vec<f32>>, LoadError> {
    if gguf.tensor(ROPE_FACTORS).is_none() {
        return Ok(None);
    }
    let factors = gguf.require(ROPE_FACTORS, &[rope_dim / 2])?.to_f32()?;
    match factors.iter().find(|factor| !factor.is_finite() || **factor <= 0.0) {
        Some(factor) => Err(LoadError::bad_value(ROPE_FACTORS, "positive numbers", factor)),
        None => Ok(Some(factors)),
    }
}
