//! [`Manifest`]: what was done to which tensor, and what it cost.

use serde::{Deserialize, Serialize};

use crate::WeightError;

/// `exrail-quantize.json` of a quantised folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of this file.
    pub version: u32,
    /// Program and version that made the folder.
    pub quantizer: String,
    /// What it was made from and how.
    #[serde(flatten)]
    pub identity: Identity,
    /// The quantised matrices.
    pub quantised: Vec<QuantisedTensor>,
    /// The others, stored as they were.
    pub kept: Vec<KeptTensor>,
}

/// What decides every byte of the result. Two runs with the same identity write the same folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The files of the source.
    pub source: Vec<SourceFile>,
    /// Bits of a code.
    pub bits: u32,
    /// Weights that share a scale.
    pub group: usize,
    /// Calibration, if there was one; otherwise weights are rounded to nearest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibration: Option<CalibrationIdentity>,
}

/// A file of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Name in the folder.
    pub name: String,
    /// Hex sha256.
    pub sha256: String,
}

/// A calibration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationIdentity {
    /// Hex sha256 of the text.
    pub text_sha256: String,
    /// Its tokens.
    pub n_tokens: usize,
    /// Tokens that the model saw at once.
    pub sequence_len: usize,
}

/// How a matrix was rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Each weight to the nearest code.
    Nearest,
    /// With error feedback.
    Calibrated,
}

/// A quantised matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantisedTensor {
    /// Name in the source.
    pub name: String,
    /// Output and input features.
    pub shape: [usize; 2],
    /// How it was rounded.
    pub method: Method,
    /// Bits of a code.
    pub bits: u32,
    /// Weights that share a scale.
    pub group: usize,
    /// Why bits or group are not those asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fallback: Option<String>,
    /// Share of the mean squared input that was added to every input's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub damping: Option<f64>,
    /// What it lost.
    #[serde(flatten)]
    pub error: WeightError,
}

/// A tensor that was stored as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptTensor {
    /// Name in the source.
    pub name: String,
    /// Format of its elements.
    pub dtype: String,
    /// Why.
    pub reason: String,
}

/// What a unit of work (the tensors outside the layers, or one layer) adds to the manifest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct UnitReport {
    pub(crate) quantised: Vec<QuantisedTensor>,
    pub(crate) kept: Vec<KeptTensor>,
}
