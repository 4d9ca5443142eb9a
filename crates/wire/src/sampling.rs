//! Fields that chat and text completions share.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::Unknown;

/// One stop string or several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// A single string.
    One(String),
    /// Up to as many as the server allows.
    Many(Vec<String>),
}

/// A field whose value has the wrong type or form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Name of the field.
    pub field: String,
    /// What was expected and found.
    pub problem: String,
}

/// How to sample; absent fields take the server's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingFields {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus mass in (0, 1].
    pub top_p: Option<f32>,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keep tokens with at least this share of the top probability, in [0, 1].
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of recent tokens; 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from tokens already generated, in [-2, 2].
    pub presence_penalty: Option<f32>,
    /// Subtracted per occurrence, in [-2, 2].
    pub frequency_penalty: Option<f32>,
    /// Added to logits: token id as a string, to a value in [-100, 100].
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Seed of the draw; absent draws a fresh one, which is reported in the trace.
    pub seed: Option<i64>,
}

impl SamplingFields {
    /// Takes the sampling fields out of a request's undeclared ones.
    ///
    /// They are not flattened by serde because serde then forgets which field was wrong.
    ///
    /// # Errors
    /// The first field of the wrong type.
    pub fn take(unknown: &mut Unknown) -> Result<Self, FieldError> {
        Ok(Self {
            temperature: field(unknown, "temperature")?,
            top_p: field(unknown, "top_p")?,
            top_k: field(unknown, "top_k")?,
            min_p: field(unknown, "min_p")?,
            repetition_penalty: field(unknown, "repetition_penalty")?,
            presence_penalty: field(unknown, "presence_penalty")?,
            frequency_penalty: field(unknown, "frequency_penalty")?,
            logit_bias: field(unknown, "logit_bias")?,
            seed: field(unknown, "seed")?,
        })
    }
}

pub(crate) fn field<T: DeserializeOwned>(
    unknown: &mut Unknown,
    name: &str,
) -> Result<Option<T>, FieldError> {
    let Some(value) = unknown.remove(name) else { return Ok(None) };
    serde_json::from_value(value)
        .map_err(|error| FieldError { field: name.into(), problem: error.to_string() })
}

/// Tokens spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, over all choices.
    pub completion_tokens: usize,
    /// Their sum.
    pub total_tokens: usize,
    /// How the prompt was served.
    pub prompt_tokens_details: UsageDetails,
}

/// Details of the prompt's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageDetails {
    /// Prompt tokens found in the cache.
    pub cached_tokens: usize,
}

impl Usage {
    /// Usage with its sum.
    #[must_use]
    pub fn new(prompt_tokens: usize, completion_tokens: usize, cached_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: UsageDetails { cached_tokens },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        let mut unknown = Unknown::from([("top_k".into(), serde_json::json!(-1))]);
        let error = SamplingFields::take(&mut unknown).unwrap_err();
        assert_eq!(error.field, "top_k");
    }

    #[test]
    fn fields_of_others_stay() {
        let mut unknown = Unknown::from([
            ("temperature".into(), serde_json::json!(0)),
            ("tools".into(), serde_json::json!([])),
        ]);
        let fields = SamplingFields::take(&mut unknown).unwrap();
        assert_eq!(fields.temperature, Some(0.0));
        assert_eq!(unknown.keys().collect::<Vec<_>>(), ["tools"]);
    }
}
