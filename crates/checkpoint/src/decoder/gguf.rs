//! [`DecoderConfig`] out of GGUF metadata.

use super::family::{FAMILIES, Family, GlobalRope, LayerPattern};
use super::keys::Keys;
use super::{
    BlockNorms, DecoderConfig, Experts, LayerConfig, NormConfig, NormKind, RopeConfig, RopeScaling,
    Storage,
};
use crate::{Gguf, LoadError, Tensors};

/// More layers than any published decoder.
pub(crate) const MAX_LAYERS: u32 = 1024;
/// More experts in a layer than any published decoder.
pub(crate) const MAX_EXPERTS: usize = 4096;
/// Two million, sixteen times the longest context in common use.
pub(crate) const MAX_CONTEXT: u32 = 1 << 21;
/// Value that GGUF gives `rope.freq_base` when the key is absent.
const DEFAULT_ROPE_THETA: f32 = 10_000.0;
/// Llama 3's frequency divisors.
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// `LongRoPE`'s divisors, up to the trained length and beyond it.
const LONG_ROPE: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

impl DecoderConfig {
    /// Reads and checks the configuration of `gguf`.
    ///
    /// # Errors
    /// When the architecture is unknown, a key is missing or impossible, a feature is used that
    /// this engine does not have, or a tensor is missing, misshapen or unknown.
    pub fn from_gguf(gguf: &Gguf) -> Result<DecoderConfig, LoadError> {
        let key = "general.architecture";
        let architecture = gguf.metadata().require_str(key)?;
        let Some(family) = FAMILIES.iter().find(|family| family.name == architecture) else {
            let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
            let expected = format!("one of {}", names.join(", "));
            return Err(LoadError::bad_value(key, expected, architecture));
        };
        let keys = Keys { metadata: gguf.metadata(), architecture };
        Source { gguf, keys, family }.config()
    }
}

/// What the configuration is read from.
struct Source<'a> {
    gguf: &'a Gguf,
    keys: Keys<'a>,
    family: &'a Family,
}

impl Source<'_> {
    fn config(&self) -> Result<DecoderConfig, LoadError> {
        let Source { gguf, keys, family } = self;
        let width = keys.positive("embedding_length", u32::MAX)?;
        let n_heads = keys.positive("attention.head_count", u32::MAX)?;
        let n_kv_heads = self.kv_heads(n_heads)?;
        let head_dim = self.head_dim(width, n_heads)?;
        within(&[n_heads, head_dim])?;
        let n_layers = keys.positive("block_count", MAX_LAYERS)?;
        let stated_len = keys.positive("context_length", MAX_CONTEXT)?;
        let ffn_width = keys.positive("feed_forward_length", u32::MAX / 2)?;
        let experts = self.experts(ffn_width)?;
        let rope = self.rope(head_dim, stated_len)?;
        let context_len = rope.default_context_len(stated_len);
        let max_context_len = rope.max_context_len(stated_len);
        let (ropes, layers) = self.layers(n_layers, rope, max_context_len, experts.is_some())?;
        let config = DecoderConfig {
            architecture: family.name.to_owned(),
            width,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_width,
            experts,
            vocab_size: self.vocab_size(width)?,
            context_len,
            max_context_len,
            norm: self.norm()?,
            blocks: family.blocks,
            qk_norm: family.qk_norm,
            requires_qkv_bias: family.requires_qkv_bias,
            gate: family.gate,
            attention_scale: self.attention_scale(width, n_heads, head_dim, n_layers)?,
            attention_soft_cap: self.cap("attn_logit_softcapping", family.attention_soft_cap)?,
            embedding_scale: self.embedding_scale(width)?,
            residual_scale: keys.optional_f32("residual_scale")?.unwrap_or(1.0),
            logit_scale: self.logit_scale()?,
            logit_soft_cap: self.cap("final_logit_softcapping", family.logit_soft_cap)?,
            ropes,
            layers,
            tied_head: gguf.tensor("output.weight").is_none(),
            storage: Storage {
                fused_qkv: gguf.tensor("blk.0.attn_qkv.weight").is_some(),
                fused_gate_up: family.fused,
                stacked_experts: gguf.tensors().any(|t| t.name.ends_with("ffn_gate_exps.weight")),
            },
        };
        config.check_tensors(*gguf, &self.rope_tensors(&config))?;
        Ok(config)
    }

    fn kv_heads(&self, n_heads: usize) -> Result<usize, LoadError> {
        let key = "attention.head_count_kv";
        let n_kv_heads = self.keys.optional_positive(key)?.unwrap_or(n_heads);
        if n_heads.is_multiple_of(n_kv_heads) {
            return Ok(n_kv_heads);
        }
        let whole = self.keys.name("attention.head_count");
        Err(self.keys.bad(key, format!("a divisor of {whole} ({n_heads})"), n_kv_heads))
    }

    fn head_dim(&self, width: usize, n_heads: usize) -> Result<usize, LoadError> {
        let head_dim = match self.keys.optional_positive("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if width.is_multiple_of(n_heads) => width / n_heads,
            None => {
                let whole = self.keys.name("embedding_length");
                let expected = format!("a divisor of {whole} ({width})");
                return Err(self.keys.bad("attention.head_count", expected, n_heads));
            }
        };
        let key = "attention.value_length";
        match self.keys.optional_positive(key)? {
            Some(found) if found != head_dim => {
                Err(self.keys.bad(key, format!("the head width {head_dim}"), found))
            }
            Some(_) | None => Ok(head_dim),
        }
    }

    fn norm(&self) -> Result<NormConfig, LoadError> {
        let kind = self.family.norm;
        let eps = match kind {
            NormKind::Rms => self.keys.positive_f32("attention.layer_norm_rms_epsilon")?,
            NormKind::Layer => self.keys.positive_f32("attention.layer_norm_epsilon")?,
        };
        Ok(NormConfig { kind, eps })
    }

    fn experts(&self, ffn_width: usize) -> Result<Option<Experts>, LoadError> {
        let Some(n_experts) = self.keys.positive_or_zero("expert_count")? else { return Ok(None) };
        if self.family.blocks != BlockNorms::Pre {
            return Err(self.keys.bad("expert_count", "0 (this family has no experts)", n_experts));
        }
        if n_experts > MAX_EXPERTS {
            let expected = format!("at most {MAX_EXPERTS}");
            return Err(self.keys.bad("expert_count", expected, n_experts));
        }
        let key = "expert_used_count";
        let n_used = self.keys.positive(key, u32::MAX)?;
        if n_used > n_experts {
            return Err(self.keys.bad(key, format!("at most {n_experts} experts"), n_used));
        }
        if self.keys.positive_or_zero("expert_shared_count")?.is_some() {
            return Err(self.keys.bad("expert_shared_count", "0 (not supported)", "more"));
        }
        let width = self.keys.optional_positive("expert_feed_forward_length")?;
        let normalise = self.family.normalises_experts;
        Ok(Some(Experts { n_experts, n_used, width: width.unwrap_or(ffn_width), normalise }))
    }

    fn attention_scale(
        &self,
        width: usize,
        n_heads: usize,
        head_dim: usize,
        n_layers: usize,
    ) -> Result<f32, LoadError> {
        if let Some(scale) = self.keys.optional_f32("attention.scale")? {
            return Ok(scale);
        }
        let wide = self.family.wide_score_layers == Some(n_layers);
        let divisor = if wide { width as f32 / n_heads as f32 } else { head_dim as f32 };
        Ok(1.0 / divisor.sqrt())
    }

    fn cap(&self, key: &str, default: Option<f32>) -> Result<Option<f32>, LoadError> {
        Ok(self.keys.optional_f32(key)?.or(default))
    }

    fn embedding_scale(&self, width: usize) -> Result<f32, LoadError> {
        if self.family.scales_embedding {
            return Ok((width as f32).sqrt());
        }
        Ok(self.keys.optional_f32("embedding_scale")?.unwrap_or(1.0))
    }

    /// Cohere multiplies by the key's value, Granite divides by it.
    fn logit_scale(&self) -> Result<f32, LoadError> {
        let scale = self.keys.optional_f32("logit_scale")?.unwrap_or(1.0);
        Ok(if self.family.name == "granite" { 1.0 / scale } else { scale })
    }

    /// Rows of the embedding, which must have `width` columns and agree with the key if it is there.
    fn vocab_size(&self, width: usize) -> Result<usize, LoadError> {
        let stated = self.keys.optional_positive("vocab_size")?;
        let name = "token_embd.weight";
        let rows = match (self.gguf.tensor(name), stated) {
            (Some(view), None) => view.shape[0],
            (Some(_), Some(stated)) => stated,
            (None, stated) => {
                let expected = vec![stated.unwrap_or(0), width];
                return Err(LoadError::MissingTensor { tensor: name.to_owned(), expected });
            }
        };
        self.gguf.require_info(name, &[rows, width])?;
        if u32::try_from(rows).is_err() {
            return Err(LoadError::LimitExceeded {
                what: format!("rows of tensor `{name}`"),
                limit: u64::from(u32::MAX),
                found: rows as u64,
            });
        }
        Ok(rows)
    }

    fn layers(
        &self,
        n_layers: usize,
        rope: RopeConfig,
        max_context_len: usize,
        has_experts: bool,
    ) -> Result<(Vec<RopeConfig>, Vec<LayerConfig>), LoadError> {
        let window = self.keys.positive_or_zero("attention.sliding_window")?;
        let base = LayerConfig { rope: Some(0), window: None, has_experts };
        // A window that no position reaches is none.
        let windowed = LayerConfig { window: window.filter(|&w| w < max_context_len), ..base };
        let mut ropes = vec![rope];
        let is_last_of = |period: usize| move |i: usize| (i + 1).is_multiple_of(period);
        let layers: Vec<LayerConfig> = match self.family.layers {
            LayerPattern::Uniform => vec![windowed; n_layers],
            LayerPattern::SomeWithoutRope { period } => {
                let is_last = is_last_of(period);
                let rope = |i| (!is_last(i)).then_some(0);
                (0..n_layers).map(|i| LayerConfig { rope: rope(i), ..base }).collect()
            }
            LayerPattern::Local { period, global } => {
                if window.is_none() {
                    let key = self.keys.name("attention.sliding_window");
                    return Err(LoadError::MissingKey { key });
                }
                let (local, global) = self.local_and_global(global, windowed, &mut ropes)?;
                let is_last = is_last_of(self.period(period)?);
                (0..n_layers).map(|i| if is_last(i) { global } else { local }).collect()
            }
        };
        Ok((ropes, layers))
    }

    fn local_and_global(
        &self,
        global: GlobalRope,
        local: LayerConfig,
        ropes: &mut Vec<RopeConfig>,
    ) -> Result<(LayerConfig, LayerConfig), LoadError> {
        let unbounded = LayerConfig { window: None, ..local };
        Ok(match global {
            GlobalRope::Same => (local, unbounded),
            GlobalRope::None => (local, LayerConfig { rope: None, ..unbounded }),
            GlobalRope::Own => {
                let theta = self.keys.optional_f32("rope.freq_base_swa")?;
                let theta = theta.unwrap_or(DEFAULT_ROPE_THETA);
                ropes.push(RopeConfig { theta, scaling: RopeScaling::None, ..ropes[0].clone() });
                (LayerConfig { rope: Some(1), ..local }, unbounded)
            }
        })
    }

    /// The family's period, or the one that the file states as a number.
    fn period(&self, default: usize) -> Result<usize, LoadError> {
        Ok(self.keys.optional_positive("attention.sliding_window_pattern")?.unwrap_or(default))
    }

    fn rope(&self, head_dim: usize, context_len: usize) -> Result<RopeConfig, LoadError> {
        let theta = self.keys.optional_f32("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_THETA);
        let key = "rope.dimension_count";
        let dim = self.keys.optional_positive(key)?.unwrap_or(head_dim);
        if !dim.is_multiple_of(2) || dim > head_dim {
            let expected = format!("an even number up to the head width {head_dim}");
            return Err(self.keys.bad(key, expected, dim));
        }
        let scaling = self.scaling(dim, context_len)?;
        Ok(RopeConfig { theta, dim, pairs: self.family.pairs, scaling })
    }

    fn scaling(&self, dim: usize, context_len: usize) -> Result<RopeScaling, LoadError> {
        let keys = self.keys;
        let original = keys.optional_positive("rope.scaling.original_context_length")?;
        let original_len = original.unwrap_or(context_len);
        let magnitude = keys.optional_f32("rope.scaling.attn_factor")?;
        if self.gguf.tensor(LONG_ROPE[0]).is_some() || self.gguf.tensor(LONG_ROPE[1]).is_some() {
            let [short, long] = LONG_ROPE;
            let (short, long) = (self.divisors(short, dim)?, self.divisors(long, dim)?);
            let magnitude = magnitude.unwrap_or(1.0);
            return Ok(RopeScaling::Long { short, long, original_len, magnitude });
        }
        let linear = keys.optional_f32("rope.scale_linear")?;
        let factor = keys.optional_f32("rope.scaling.factor")?.or(linear).unwrap_or(1.0);
        let default = if factor == 1.0 { "none" } else { "linear" };
        let kind = keys.str("rope.scaling.type")?.unwrap_or(default);
        let scaling = match kind {
            "none" => RopeScaling::None,
            "linear" if factor == 1.0 => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor },
            "yarn" => RopeScaling::Yarn {
                factor,
                original_len,
                beta_fast: keys.optional_f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.optional_f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                magnitude: None,
                truncate: true,
            },
            other => {
                let expected = "none, linear or yarn";
                return Err(keys.bad("rope.scaling.type", expected, other));
            }
        };
        if self.gguf.tensor(ROPE_FACTORS).is_none() {
            return Ok(scaling);
        }
        if scaling != RopeScaling::None {
            let expected = format!("none beside `{ROPE_FACTORS}`");
            return Err(keys.bad("rope.scaling.type", expected, kind));
        }
        Ok(RopeScaling::Factors(self.divisors(ROPE_FACTORS, dim)?))
    }

    /// Divisors of the rotary frequencies, one a pair, all finite and positive.
    fn divisors(&self, name: &str, dim: usize) -> Result<Vec<f32>, LoadError> {
        let factors = self.gguf.require(name, &[dim / 2])?.to_f32()?;
        match factors.iter().find(|factor| !factor.is_finite() || **factor <= 0.0) {
            Some(factor) => Err(LoadError::bad_value(name, "positive numbers", factor)),
            None => Ok(factors),
        }
    }

    fn rope_tensors(&self, config: &DecoderConfig) -> Vec<&'static str> {
        match config.ropes[0].scaling {
            RopeScaling::Factors(_) => vec![ROPE_FACTORS],
            RopeScaling::Long { .. } => LONG_ROPE.to_vec(),
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::DynamicNtk { .. }
            | RopeScaling::Yarn { .. }
            | RopeScaling::Llama3 { .. } => Vec::new(),
        }
    }
}

/// Refuses a product that no address reaches.
pub(crate) fn within(factors: &[usize]) -> Result<(), LoadError> {
    let product = factors.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    match product.filter(|&product| product <= usize::MAX / 4) {
        Some(_) => Ok(()),
        None => Err(LoadError::LimitExceeded {
            what: format!("product of head count and head width {factors:?}"),
            limit: (usize::MAX / 4) as u64,
            found: u64::MAX,
        }),
    }
}
