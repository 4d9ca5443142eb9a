//! [`DecoderConfig`] out of `config.json`.

use serde_json::Value;

use super::family::{Biases, HfFamily, Windows};
use super::fields::{Fields, short};
use super::names::Names;
use super::rope::RopeSource;
use crate::decoder::{GlobalRope, LayerPattern, MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, within};
use crate::{
    DecoderConfig, Experts, GateKind, LayerConfig, LoadError, NormConfig, NormKind, Storage,
};

/// A configuration, and what else the tensors of the folder must agree with.
#[derive(Clone, Debug)]
pub(super) struct HfConfig {
    pub(super) decoder: DecoderConfig,
    /// Whether attention's output projection has a bias.
    pub(super) has_output_bias: bool,
    /// Whether the folder holds more than the decoder: a vision tower, which text does not use.
    pub(super) is_multimodal: bool,
    /// Whether norms multiply by 1 + weight.
    pub(super) adds_one_to_norms: bool,
    /// `model_type` of the decoder.
    pub(super) model_type: &'static str,
}

impl DecoderConfig {
    /// Reads the contents of a Hugging Face `config.json`, in the spelling of transformers 4 or 5.
    /// That the tensors agree is checked by [`crate::HfFolder`].
    ///
    /// # Errors
    /// When the file is not JSON, the model type is unknown, a field is missing or impossible, or a
    /// feature is used that this engine does not have; the error names the field.
    pub fn from_config_json(json: &[u8]) -> Result<DecoderConfig, LoadError> {
        let value = serde_json::from_slice(json).map_err(|source| LoadError::Json { source })?;
        HfConfig::new(&value).map(|config| config.decoder)
    }
}

impl HfConfig {
    /// Reads a parsed `config.json`.
    pub(super) fn new(json: &Value) -> Result<HfConfig, LoadError> {
        let whole = Fields::new(json, "")?;
        let stated = whole.str("model_type")?.unwrap_or("nothing");
        let is_multimodal = stated == "gemma3";
        let fields = if is_multimodal {
            let inner = whole.object("text_config", "text_config.")?;
            inner.ok_or_else(|| whole.bad("text_config", "an object", "nothing"))?
        } else {
            whole
        };
        let default = if is_multimodal { "gemma3_text" } else { "nothing" };
        let name = fields.str("model_type")?.unwrap_or(default);
        let Some(family) = HfFamily::find(name) else {
            let expected = format!("one of {}", HfFamily::names());
            return Err(fields.bad("model_type", expected, name));
        };
        let source = Source { fields, family };
        source.refuse_unsupported()?;
        let tied = match (whole.bool("tie_word_embeddings")?, source.tied()?) {
            (Some(outer), None) => outer,
            (_, inner) => inner.unwrap_or(family.tied),
        };
        Ok(HfConfig {
            decoder: source.decoder(tied)?,
            has_output_bias: family.biases == Biases::Stated && source.attention_bias()?,
            is_multimodal,
            adds_one_to_norms: family.traits().scales_embedding,
            model_type: family.name,
        })
    }

    /// What the folder calls its tensors.
    pub(super) fn names(&self) -> Names {
        Names::new(&self.decoder, self.model_type, self.is_multimodal)
    }

    /// Whether the module that the engine calls `name` has a bias.
    pub(super) fn has_bias(&self, name: &str) -> bool {
        let part = name.rsplit('.').next().unwrap_or_default();
        match part {
            "attn_q" | "attn_k" | "attn_v" => self.decoder.requires_qkv_bias,
            "attn_output" => self.has_output_bias,
            _ => false,
        }
    }
}

/// What the configuration is read from.
#[derive(Clone, Copy)]
struct Source<'a> {
    fields: Fields<'a>,
    family: &'static HfFamily,
}

impl Source<'_> {
    fn decoder(self, tied_head: bool) -> Result<DecoderConfig, LoadError> {
        let Source { fields, family } = self;
        let (traits, sizes) = (family.traits(), family.sizes);
        let width = fields.require_positive("hidden_size", u32::MAX)?;
        let n_heads =
            self.size("num_attention_heads", u32::MAX, sizes.map(|sizes| sizes.n_heads))?;
        let n_kv_heads = self.kv_heads(n_heads)?;
        let head_dim = self.head_dim(width, n_heads)?;
        within(&[n_heads, head_dim])?;
        let n_layers = fields.require_positive("num_hidden_layers", MAX_LAYERS)?;
        let key = "max_position_embeddings";
        let stated_len = self.size(key, MAX_CONTEXT, sizes.map(|sizes| sizes.context_len))?;
        let ffn_width = fields.require_positive("intermediate_size", u32::MAX / 2)?;
        let experts = self.experts(ffn_width)?;
        let ropes = RopeSource { fields, family, head_dim, stated_len }.ropes()?;
        let context_len = ropes[0].default_context_len(stated_len);
        let max_context_len = ropes[0].max_context_len(stated_len);
        let layers = self.layers(n_layers, max_context_len, experts.is_some())?;
        Ok(DecoderConfig {
            architecture: traits.name.to_owned(),
            width,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_width,
            experts,
            vocab_size: self.size("vocab_size", u32::MAX, sizes.map(|sizes| sizes.vocab_size))?,
            context_len,
            max_context_len,
            norm: self.norm()?,
            blocks: traits.blocks,
            qk_norm: traits.qk_norm,
            requires_qkv_bias: self.has_qkv_bias()?,
            gate: self.gate()?,
            attention_scale: self.attention_scale(head_dim)?,
            attention_soft_cap: self.cap("attn_logit_softcapping", traits.attention_soft_cap)?,
            embedding_scale: self.embedding_scale(width)?,
            residual_scale: fields.positive_f32("residual_multiplier")?.unwrap_or(1.0),
            logit_scale: self.logit_scale()?,
            logit_soft_cap: self.cap("final_logit_softcapping", traits.logit_soft_cap)?,
            ropes,
            layers,
            tied_head,
            storage: Storage {
                fused_qkv: traits.fused,
                fused_gate_up: traits.fused,
                stacked_experts: false,
            },
        })
    }

    /// Refuses fields that change the mathematics to something that the engine does not have.
    fn refuse_unsupported(self) -> Result<(), LoadError> {
        let (fields, name) = (self.fields, self.family.name);
        for (key, only) in [
            ("mlp_bias", false),
            ("use_bidirectional_attention", false),
            ("use_qk_norm", false),
            ("rope_interleaved", false),
            ("add_cross_attention", false),
            ("is_encoder_decoder", false),
            ("use_parallel_block", true),
            ("use_gated_activation", true),
        ] {
            if fields.bool(key)?.is_some_and(|found| found != only) {
                return Err(fields.bad(key, format!("{only} (not supported otherwise)"), !only));
            }
        }
        if self.family.biases == Biases::Never && self.attention_bias()? {
            return Err(fields.bad("attention_bias", format!("false for {name}"), true));
        }
        for (key, families) in [
            ("clip_qkv", &[][..]),
            ("shared_expert_intermediate_size", &[]),
            ("n_shared_experts", &[]),
            ("num_shared_experts", &[]),
            ("attn_logit_softcapping", &["gemma2", "gemma3_text"]),
            ("final_logit_softcapping", &["gemma2", "gemma3_text"]),
            ("query_pre_attn_scalar", &["gemma2", "gemma3_text"]),
            ("logit_scale", &["cohere2"]),
            ("embedding_multiplier", &["granite"]),
            ("attention_multiplier", &["granite"]),
            ("residual_multiplier", &["granite"]),
            ("logits_scaling", &["granite"]),
        ] {
            if let Some(found) = fields.get(key).filter(|_| !families.contains(&name)) {
                return Err(fields.bad(key, format!("nothing for {name}"), short(found)));
            }
        }
        for (key, expected) in [
            ("position_embedding_type", "rope_gptj"),
            ("order_of_interleaved_layers", "local_attn_first"),
        ] {
            if let Some(found) = fields.str(key)?.filter(|&found| found != expected) {
                return Err(fields.bad(key, expected, found));
            }
        }
        match fields.get("rotary_pct").filter(|found| found.as_f64() != Some(1.0)) {
            Some(found) => Err(fields.bad("rotary_pct", "1", short(found))),
            None => Ok(()),
        }
    }

    /// A positive number, or the default of the family.
    fn size(self, key: &str, limit: u32, default: Option<usize>) -> Result<usize, LoadError> {
        match (self.fields.positive(key, limit)?, default) {
            (Some(stated), _) => Ok(stated),
            (None, Some(default)) => Ok(default),
            (None, None) => self.fields.require_positive(key, limit),
        }
    }

    fn kv_heads(self, n_heads: usize) -> Result<usize, LoadError> {
        let key = "num_key_value_heads";
        let default = self.family.sizes.map_or(n_heads, |sizes| sizes.n_kv_heads);
        let n_kv_heads = self.fields.positive(key, u32::MAX)?.unwrap_or(default);
        if n_heads.is_multiple_of(n_kv_heads) {
            return Ok(n_kv_heads);
        }
        let expected = format!("a divisor of num_attention_heads ({n_heads})");
        Err(self.fields.bad(key, expected, n_kv_heads))
    }

    fn head_dim(self, width: usize, n_heads: usize) -> Result<usize, LoadError> {
        match self.fields.positive("head_dim", u32::MAX)?.or(self.family.head_dim) {
            Some(head_dim) => Ok(head_dim),
            None if width.is_multiple_of(n_heads) => Ok(width / n_heads),
            None => {
                let expected = format!("a divisor of hidden_size ({width})");
                Err(self.fields.bad("num_attention_heads", expected, n_heads))
            }
        }
    }

    fn tied(self) -> Result<Option<bool>, LoadError> {
        let stated = self.fields.bool("tie_word_embeddings")?;
        // Cohere's own spelling of the same.
        let sharing = self.fields.bool("use_embedding_sharing")?;
        match (stated, sharing) {
            (Some(tied), Some(sharing)) if tied != sharing => {
                let expected = format!("{tied} as tie_word_embeddings says");
                Err(self.fields.bad("use_embedding_sharing", expected, sharing))
            }
            (stated, sharing) => Ok(stated.or(sharing)),
        }
    }

    fn attention_bias(self) -> Result<bool, LoadError> {
        Ok(self.fields.bool("attention_bias")?.unwrap_or(false))
    }

    fn has_qkv_bias(self) -> Result<bool, LoadError> {
        match self.family.biases {
            Biases::Stated => self.attention_bias(),
            Biases::Qkv => Ok(true),
            Biases::Never => Ok(false),
        }
    }

    fn norm(self) -> Result<NormConfig, LoadError> {
        let kind = self.family.traits().norm;
        let key = match kind {
            NormKind::Rms => "rms_norm_eps",
            NormKind::Layer => "layer_norm_eps",
        };
        let default = self.family.sizes.map(|sizes| sizes.eps);
        match self.fields.positive_f32(key)?.or(default) {
            Some(eps) => Ok(NormConfig { kind, eps }),
            None => Err(self.fields.bad(key, "a positive number", "nothing")),
        }
    }

    /// Gemma reads `hidden_activation` and ignores `hidden_act`.
    fn gate(self) -> Result<GateKind, LoadError> {
        let default = self.family.traits().gate;
        let key = match default {
            GateKind::Silu => "hidden_act",
            GateKind::GeluTanh => "hidden_activation",
        };
        match self.fields.str(key)? {
            None => Ok(default),
            Some("silu" | "swish") => Ok(GateKind::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(GateKind::GeluTanh),
            Some(other) => Err(self.fields.bad(key, "silu or gelu_pytorch_tanh", other)),
        }
    }

    fn experts(self, ffn_width: usize) -> Result<Option<Experts>, LoadError> {
        let Some(&first) = self.family.expert_keys.first() else { return Ok(None) };
        let key = self.family.expert_keys.iter().find(|key| self.fields.get(key).is_some());
        let key = *key.unwrap_or(&first);
        let limit = u32::try_from(MAX_EXPERTS).expect("a small constant");
        let n_experts = self.fields.require_positive(key, limit)?;
        let used = "num_experts_per_tok";
        let n_used = self.fields.require_positive(used, u32::MAX)?;
        if n_used > n_experts {
            return Err(self.fields.bad(used, format!("at most {n_experts} experts"), n_used));
        }
        // Mixtral has one width, and weights that always sum to one.
        if self.family.name == "mixtral" {
            return Ok(Some(Experts { n_experts, n_used, width: ffn_width, normalise: true }));
        }
        let width = self.fields.require_positive("moe_intermediate_size", u32::MAX / 2)?;
        let normalise = self.fields.bool("norm_topk_prob")?.unwrap_or(false);
        Ok(Some(Experts { n_experts, n_used, width, normalise }))
    }

    fn attention_scale(self, head_dim: usize) -> Result<f32, LoadError> {
        if self.family.name == "granite" {
            return Ok(self.fields.positive_f32("attention_multiplier")?.unwrap_or(1.0));
        }
        // `Gemma2Config` and `Gemma3TextConfig` have 256 by default.
        let scalar = match self.fields.positive_f32("query_pre_attn_scalar")? {
            None if self.family.traits().scales_embedding => Some(256.0),
            stated => stated,
        };
        Ok(1.0 / scalar.unwrap_or(head_dim as f32).sqrt())
    }

    /// `null` is no cap, an absent field the family's.
    fn cap(self, key: &str, default: Option<f32>) -> Result<Option<f32>, LoadError> {
        if self.fields.has(key) { self.fields.positive_f32(key) } else { Ok(default) }
    }

    fn embedding_scale(self, width: usize) -> Result<f32, LoadError> {
        if self.family.traits().scales_embedding {
            return Ok((width as f32).sqrt());
        }
        Ok(self.fields.positive_f32("embedding_multiplier")?.unwrap_or(1.0))
    }

    /// Granite divides by its field, Cohere multiplies (`Cohere2Config`: by 1/16 unless stated).
    fn logit_scale(self) -> Result<f32, LoadError> {
        if self.family.name == "cohere2" {
            return Ok(self.fields.positive_f32("logit_scale")?.unwrap_or(0.0625));
        }
        Ok(1.0 / self.fields.positive_f32("logits_scaling")?.unwrap_or(1.0))
    }

    fn layers(
        self,
        n_layers: usize,
        max_context_len: usize,
        has_experts: bool,
    ) -> Result<Vec<LayerConfig>, LoadError> {
        let rotates = self.rotates(n_layers)?;
        // A window that no position reaches is none.
        let width = self.window()?.filter(|&width| width < max_context_len);
        let is_local = self.local_layers(&rotates)?;
        let dense = self.dense_layers(n_layers)?;
        let layer = |i: usize| {
            let rope = match self.family.traits().layers {
                LayerPattern::Local { global: GlobalRope::Own, .. } if is_local[i] => Some(1),
                LayerPattern::Local { global: GlobalRope::None, .. } if !is_local[i] => None,
                LayerPattern::Local { .. }
                | LayerPattern::Uniform
                | LayerPattern::SomeWithoutRope { .. } => rotates[i].then_some(0),
            };
            let window = width.filter(|_| is_local[i]);
            LayerConfig { rope, window, has_experts: has_experts && !dense[i] }
        };
        Ok((0..n_layers).map(layer).collect())
    }

    /// The window of local layers.
    fn window(self) -> Result<Option<usize>, LoadError> {
        let key = "sliding_window";
        let stated = self.fields.positive(key, u32::MAX)?;
        let is_on = self.fields.bool("use_sliding_window")?;
        let name = self.family.name;
        match self.family.windows {
            Windows::Never => match stated {
                Some(found) => Err(self.fields.bad(key, format!("nothing for {name}"), found)),
                None => Ok(None),
            },
            Windows::Off if is_on == Some(true) => {
                Err(self.fields.bad("use_sliding_window", format!("false for {name}"), true))
            }
            Windows::Off => Ok(None),
            Windows::All(default) => Ok(if self.fields.has(key) { stated } else { default }),
            Windows::FromLayer | Windows::WithoutRope => Ok(stated.filter(|_| is_on == Some(true))),
            Windows::Local(default) => Ok(Some(stated.unwrap_or(default))),
        }
    }

    /// Which layers have the window: as `layer_types` says, or as the family's rule does.
    fn local_layers(self, rotates: &[bool]) -> Result<Vec<bool>, LoadError> {
        let n_layers = rotates.len();
        let ruled: Vec<bool> = match self.family.windows {
            Windows::Never | Windows::Off => vec![false; n_layers],
            Windows::All(_) => vec![true; n_layers],
            Windows::FromLayer => {
                let first = self.fields.u32("max_window_layers")?.unwrap_or(28) as usize;
                (0..n_layers).map(|i| i >= first).collect()
            }
            Windows::WithoutRope => rotates.iter().map(|rotates| !rotates).collect(),
            Windows::Local(_) => {
                let period = self.period()?;
                (0..n_layers).map(|i| !(i + 1).is_multiple_of(period)).collect()
            }
        };
        let Some(stated) = self.layer_types(n_layers)? else { return Ok(ruled) };
        let windows = self.family.windows;
        if matches!(windows, Windows::Never | Windows::Off) && stated.contains(&true) {
            let expected = format!("full_attention for {}", self.family.name);
            return Err(self.fields.bad("layer_types", expected, "sliding_attention"));
        }
        let all_have_one = matches!(windows, Windows::All(_)) && self.window()?.is_some();
        if all_have_one && stated.contains(&false) {
            let expected = "sliding_attention for every layer";
            return Err(self.fields.bad("layer_types", expected, "full_attention"));
        }
        Ok(stated)
    }

    fn layer_types(self, n_layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
        let key = "layer_types";
        let Some(list) = self.fields.list(key)? else { return Ok(None) };
        if list.len() != n_layers {
            let expected = format!("a list of {n_layers} kinds of layers");
            return Err(self.fields.bad(key, expected, list.len()));
        }
        let kind = |value: &Value| match value.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            Some(_) | None => {
                let expected = "full_attention or sliding_attention";
                Err(self.fields.bad(key, expected, short(value)))
            }
        };
        list.iter().map(kind).collect::<Result<Vec<bool>, _>>().map(Some)
    }

    /// Every how many layers one is global.
    fn period(self) -> Result<usize, LoadError> {
        let keys = ["sliding_window_pattern", "_sliding_window_pattern", "layer_switch"];
        let mut found: Option<(usize, &str)> = None;
        for key in keys {
            let Some(period) = self.fields.positive(key, u32::MAX)? else { continue };
            match found {
                Some((first, name)) if first != period => {
                    return Err(self.fields.bad(key, format!("{first} as in {name}"), period));
                }
                Some(_) | None => found = Some((period, key)),
            }
        }
        let default = match self.family.traits().layers {
            LayerPattern::Local { period, .. } => period,
            LayerPattern::Uniform | LayerPattern::SomeWithoutRope { .. } => 1,
        };
        Ok(found.map_or(default, |(period, _)| period))
    }

    /// Which layers rotate; all but those that `SmolLM` 3 exempts.
    fn rotates(self, n_layers: usize) -> Result<Vec<bool>, LoadError> {
        let LayerPattern::SomeWithoutRope { period } = self.family.traits().layers else {
            return Ok(vec![true; n_layers]);
        };
        let key = "no_rope_layers";
        let Some(list) = self.fields.list(key)? else {
            let interval = self.fields.positive("no_rope_layer_interval", u32::MAX)?;
            let period = interval.unwrap_or(period);
            return Ok((0..n_layers).map(|i| !(i + 1).is_multiple_of(period)).collect());
        };
        let flags: Option<Vec<bool>> = list.iter().map(flag).collect();
        // The list may be longer than the model.
        match flags.filter(|flags| flags.len() >= n_layers) {
            Some(flags) => Ok(flags[..n_layers].to_vec()),
            None => {
                let expected = format!("a list of at least {n_layers} zeros and ones");
                Err(self.fields.bad(key, expected, format!("{} entries", list.len())))
            }
        }
    }

    /// Which layers of a model with experts have none.
    fn dense_layers(self, n_layers: usize) -> Result<Vec<bool>, LoadError> {
        let step = self.fields.positive("decoder_sparse_step", u32::MAX)?.unwrap_or(1);
        let mut dense: Vec<bool> = (0..n_layers).map(|i| !(i + 1).is_multiple_of(step)).collect();
        let key = "mlp_only_layers";
        for value in self.fields.list(key)?.into_iter().flatten() {
            let layer = value.as_u64().and_then(|i| usize::try_from(i).ok());
            let Some(layer) = layer.and_then(|i| dense.get_mut(i)) else {
                let expected = format!("numbers of layers below {n_layers}");
                return Err(self.fields.bad(key, expected, short(value)));
            };
            *layer = true;
        }
        Ok(dense)
    }
}

/// A zero, a one or a truth value.
fn flag(value: &Value) -> Option<bool> {
    match value.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        Some(_) => None,
        None => value.as_bool(),
    }
}
