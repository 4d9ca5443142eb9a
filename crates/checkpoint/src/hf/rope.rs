//! Rotary embeddings out of `config.json`: `rope_theta` and `rope_scaling` as published files spell
//! it, or `rope_parameters` as transformers 5 does.

use super::family::HfFamily;
use super::fields::Fields;
use crate::decoder::{GlobalRope, LayerPattern};
use crate::{LoadError, RopeConfig, RopeScaling};

/// Base of local layers when the file does not state it (`Gemma3TextConfig`).
const LOCAL_THETA: f32 = 10_000.0;
/// Fields of any scaling. `finetuned` says how the weights came about.
const ANY: [&str; 6] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
];

/// What rotary embeddings are read from.
#[derive(Clone, Copy)]
pub(super) struct RopeSource<'a> {
    pub(super) fields: Fields<'a>,
    pub(super) family: &'static HfFamily,
    pub(super) head_dim: usize,
    /// `max_position_embeddings`.
    pub(super) stated_len: usize,
}

impl<'a> RopeSource<'a> {
    /// The rotary embedding of the model, then that of its local layers if they have their own.
    pub(super) fn ropes(self) -> Result<Vec<RopeConfig>, LoadError> {
        let fields = self.fields;
        let scaling = fields.object("rope_scaling", "rope_scaling.")?;
        let parameters = fields.object("rope_parameters", "rope_parameters.")?;
        if scaling.is_some() && parameters.is_some() {
            let expected = "nothing beside `rope_parameters`";
            return Err(fields.bad("rope_scaling", expected, "an object"));
        }
        let flat = scaling.or(parameters);
        let nested = parameters.filter(|p| p.has("full_attention") || p.has("sliding_attention"));
        let own_local = matches!(
            self.family.traits().layers,
            LayerPattern::Local { global: GlobalRope::Own, .. }
        );
        if !own_local {
            if nested.is_some() {
                let expected = format!("one set for all layers of {}", self.family.name);
                return Err(fields.bad("rope_parameters", expected, "one per kind of layer"));
            }
            return Ok(vec![self.rope(flat, self.theta(flat)?)?]);
        }
        let local_theta = fields.positive_f32("rope_local_base_freq")?.unwrap_or(LOCAL_THETA);
        let Some(nested) = nested else {
            let global = self.rope(flat, self.theta(flat)?)?;
            return Ok(vec![global, self.rope(None, local_theta)?]);
        };
        let full = nested.object("full_attention", "rope_parameters.full_attention.")?;
        let local = nested.object("sliding_attention", "rope_parameters.sliding_attention.")?;
        let stated = local.map(|local| local.positive_f32("rope_theta")).transpose()?.flatten();
        Ok(vec![
            self.rope(full, self.theta(full)?)?,
            self.rope(local, stated.unwrap_or(local_theta))?,
        ])
    }

    fn theta(self, parameters: Option<Fields<'_>>) -> Result<f32, LoadError> {
        let inner = parameters.map(|p| p.positive_f32("rope_theta")).transpose()?.flatten();
        let outer = self.fields.positive_f32("rope_theta")?;
        self.agree("rope_theta", inner, outer)?;
        Ok(inner.or(outer).unwrap_or(self.family.theta))
    }

    /// Refuses a field that has one value inside the scaling and another beside it.
    fn agree<T: PartialEq + ToString>(
        self,
        key: &str,
        inner: Option<T>,
        outer: Option<T>,
    ) -> Result<(), LoadError> {
        match (inner, outer) {
            (Some(inner), Some(outer)) if inner != outer => {
                let expected = format!("{} as in the rope parameters", inner.to_string());
                Err(self.fields.bad(key, expected, outer))
            }
            _ => Ok(()),
        }
    }

    fn rope(self, parameters: Option<Fields<'a>>, theta: f32) -> Result<RopeConfig, LoadError> {
        let dim = self.dim(parameters)?;
        let scaling = match parameters {
            None => RopeScaling::None,
            Some(parameters) => self.scaling(parameters, dim)?,
        };
        Ok(RopeConfig { theta, dim, pairs: self.family.pairs, scaling })
    }

    /// Rotating elements of a head. Only Phi-3's attention rotates a part.
    fn dim(self, parameters: Option<Fields<'_>>) -> Result<usize, LoadError> {
        let key = "partial_rotary_factor";
        let inner = parameters.map(|p| p.positive_f64(key)).transpose()?.flatten();
        let outer = self.fields.positive_f64(key)?;
        self.agree(key, inner, outer)?;
        let factor = inner.or(outer).unwrap_or(1.0);
        let is_partial_family = self.family.name == "phi3";
        let dim = (self.head_dim as f64 * factor) as usize;
        if factor > 1.0 || (factor < 1.0 && !is_partial_family) {
            let expected = if is_partial_family { "at most 1" } else { "1 for this model_type" };
            return Err(self.fields.bad(key, expected, factor));
        }
        if dim == 0 || !dim.is_multiple_of(2) {
            let expected = format!("an even part of the head width {}", self.head_dim);
            return Err(self.fields.bad(key, expected, factor));
        }
        Ok(dim)
    }

    fn scaling(self, fields: Fields<'_>, dim: usize) -> Result<RopeScaling, LoadError> {
        let (new, old) = (fields.str("rope_type")?, fields.str("type")?);
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(fields.bad("type", format!("{new} as `rope_type` says"), old));
        }
        match new.or(old) {
            None => Err(fields.bad("rope_type", "the name of a scaling", "nothing")),
            Some("default") => {
                known(fields, &[])?;
                Ok(RopeScaling::None)
            }
            Some("linear") => {
                known(fields, &["factor"])?;
                let factor = factor(fields)?;
                Ok(if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor } })
            }
            Some("dynamic") => self.dynamic(fields, dim),
            Some("yarn") => self.yarn(fields),
            Some("llama3") => self.llama3(fields),
            Some("longrope" | "su") => self.long(fields, dim),
            Some(other) => {
                let expected = "default, linear, dynamic, yarn, llama3 or longrope";
                Err(fields.bad("rope_type", expected, other))
            }
        }
    }

    fn dynamic(self, fields: Fields<'_>, dim: usize) -> Result<RopeScaling, LoadError> {
        known(fields, &["factor"])?;
        let original_len = self.stated_len;
        if let Some(found) = self.original_len(fields)?
            && found != original_len
        {
            let expected = format!("max_position_embeddings ({original_len})");
            return Err(fields.bad("original_max_position_embeddings", expected, found));
        }
        if dim <= 2 {
            return Err(fields.bad("rope_type", "another scaling for two elements", "dynamic"));
        }
        Ok(RopeScaling::DynamicNtk { factor: factor(fields)?, original_len })
    }

    fn yarn(self, fields: Fields<'_>) -> Result<RopeScaling, LoadError> {
        let own = ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale"];
        known(fields, &[&own[..], &["mscale_all_dim", "truncate"]].concat())?;
        let original = self.original_len(fields)?;
        let original_len = original.unwrap_or(self.stated_len);
        let factor = if fields.get("factor").is_none() && original.is_some() {
            (self.stated_len as f64 / original_len as f64).max(1.0) as f32
        } else {
            factor(fields)?
        };
        let beta_fast = fields.positive_f32("beta_fast")?.unwrap_or(32.0);
        let beta_slow = fields.positive_f32("beta_slow")?.unwrap_or(1.0);
        if beta_slow > beta_fast {
            let expected = format!("at most beta_fast ({beta_fast})");
            return Err(fields.bad("beta_slow", expected, beta_slow));
        }
        // Peng et al. 2023, §3.4; `mscale` generalises its 0.1 (DeepSeek-V2, arXiv:2405.04434).
        let root = |mscale: f64| {
            if factor <= 1.0 { 1.0 } else { 0.1 * mscale * f64::from(factor).ln() + 1.0 }
        };
        let scales = (fields.positive_f64("mscale")?, fields.positive_f64("mscale_all_dim")?);
        let magnitude = match (fields.positive_f32("attention_factor")?, scales) {
            (Some(stated), _) => Some(stated),
            (None, (Some(scale), Some(all))) => Some((root(scale) / root(all)) as f32),
            (None, _) => None,
        };
        let truncate = fields.bool("truncate")?.unwrap_or(true);
        Ok(RopeScaling::Yarn { factor, original_len, beta_fast, beta_slow, magnitude, truncate })
    }

    fn llama3(self, fields: Fields<'_>) -> Result<RopeScaling, LoadError> {
        known(fields, &["factor", "low_freq_factor", "high_freq_factor"])?;
        let required = |key: &str| match fields.positive_f32(key)? {
            Some(value) => Ok(value),
            None => Err(fields.bad(key, "a positive number", "nothing")),
        };
        let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
        if low >= high {
            let expected = format!("less than high_freq_factor ({high})");
            return Err(fields.bad("low_freq_factor", expected, low));
        }
        Ok(RopeScaling::Llama3 {
            factor: factor(fields)?,
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_len: self.require_original_len(fields)?,
        })
    }

    fn long(self, fields: Fields<'_>, dim: usize) -> Result<RopeScaling, LoadError> {
        known(fields, &["factor", "attention_factor", "short_factor", "long_factor"])?;
        let original_len = self.require_original_len(fields)?;
        let ratio = self.stated_len as f64 / original_len as f64;
        let magnitude = match (fields.positive_f32("attention_factor")?, fields.get("factor")) {
            (Some(stated), _) => stated,
            (None, Some(_)) if (f64::from(factor(fields)?) - ratio).abs() > 1e-3 => {
                let expected = format!("{ratio}, max_position_embeddings over the original ones");
                return Err(fields.bad("factor", expected, factor(fields)?));
            }
            (None, _) if ratio <= 1.0 || original_len == 1 => 1.0,
            // Ding et al. 2024, §3.2.
            (None, _) => (1.0 + ratio.ln() / (original_len as f64).ln()).sqrt() as f32,
        };
        Ok(RopeScaling::Long {
            short: fields.divisors("short_factor", dim / 2)?,
            long: fields.divisors("long_factor", dim / 2)?,
            original_len,
            magnitude,
        })
    }

    /// The trained length, which Phi-3 states beside the scaling and others inside.
    fn original_len(self, fields: Fields<'_>) -> Result<Option<usize>, LoadError> {
        let key = "original_max_position_embeddings";
        let (inner, outer) =
            (fields.positive(key, u32::MAX)?, self.fields.positive(key, u32::MAX)?);
        self.agree(key, inner, outer)?;
        Ok(inner.or(outer))
    }

    fn require_original_len(self, fields: Fields<'_>) -> Result<usize, LoadError> {
        let key = "original_max_position_embeddings";
        self.original_len(fields)?.ok_or_else(|| fields.bad(key, "the trained length", "nothing"))
    }
}

fn factor(fields: Fields<'_>) -> Result<f32, LoadError> {
    match fields.positive_f32("factor")? {
        Some(factor) if factor >= 1.0 => Ok(factor),
        Some(factor) => Err(fields.bad("factor", "at least 1", factor)),
        None => Err(fields.bad("factor", "a number of at least 1", "nothing")),
    }
}

/// Refuses fields of a scaling that are neither in [`ANY`] nor in `own`.
fn known(fields: Fields<'_>, own: &[&str]) -> Result<(), LoadError> {
    let mut keys = fields.keys();
    match keys.find(|key| !ANY.contains(key) && !own.contains(key) && fields.get(key).is_some()) {
        Some(key) => Err(fields.bad(key, "no such field in this scaling", "one")),
        None => Ok(()),
    }
}
