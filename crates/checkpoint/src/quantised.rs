//! Quantised safetensors layers (GPTQ, AWQ, EXL2, EXL3) turned into dense half-precision matrices.
//!
//! Pure functions over named byte slices: no files, no kernels. A folder's adapter makes a
//! [`QuantMethod`] from `quantization_config` of `config.json`, asks [`layer_shape`] of each
//! module that has the tensors of [`QuantMethod::layer_tensors`], and [`dequantise_layer`] when it
//! needs the values. Values are halves, rounded where the reference implementations round.

use std::fmt;

use exrail_tensor::DType;
use half::f16;
use serde_json::Value;

use crate::{LoadError, awq, exl2, exl3, gptq};

/// Storage type of a [`RawTensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawType {
    /// Half precision.
    F16,
    /// 16-bit integers.
    I16,
    /// 32-bit integers.
    I32,
}

impl RawType {
    fn bytes(self) -> usize {
        match self {
            RawType::F16 | RawType::I16 => 2,
            RawType::I32 => 4,
        }
    }
}

/// A tensor as stored, little endian, row-major.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor<'a> {
    /// Type of the elements.
    pub dtype: RawType,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// The elements.
    pub bytes: &'a [u8],
}

impl RawTensor<'_> {
    pub(crate) fn word(&self, at: usize) -> u32 {
        let b = &self.bytes[4 * at..4 * at + 4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }

    pub(crate) fn short(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[2 * at], self.bytes[2 * at + 1]])
    }

    pub(crate) fn half(&self, at: usize) -> f32 {
        f16::from_bits(self.short(at)).to_f32()
    }
}

/// A dense matrix of half-precision bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dense {
    /// Output features N.
    pub rows: usize,
    /// Input features K.
    pub columns: usize,
    /// (N, K), row-major.
    pub halves: Vec<u16>,
}

/// A matrix as blocks of a format of this engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Format of the blocks.
    pub dtype: DType,
    /// Output features N.
    pub rows: usize,
    /// Input features K.
    pub columns: usize,
    /// Row-major blocks.
    pub bytes: Vec<u8>,
}

/// Where GPTQ stores a zero point z.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqZeros {
    /// As z - 1, modulo the width (`checkpoint_format` `gptq`, the default).
    LessOne,
    /// As z (`gptq_v2`).
    Plain,
}

/// Settings of a GPTQ checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptqConfig {
    /// Bits of a weight: 2, 3, 4 or 8.
    pub bits: u32,
    /// Input features that share a scale; `None` when all do (-1 in the file).
    pub group_size: Option<usize>,
    /// How zero points are stored.
    pub zeros: GptqZeros,
}

/// How AWQ packs its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AwqPacking {
    /// (K, N / 8), interleaved along N.
    Gemm,
    /// (N, K / 8), in order along K.
    Gemv,
}

/// Settings of an AWQ checkpoint, which always has four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AwqConfig {
    /// Input features that share a scale.
    pub group_size: usize,
    /// Layout of the words.
    pub packing: AwqPacking,
}

/// A method of quantising layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantMethod {
    /// `AutoGPTQ`, `GPTQModel`.
    Gptq(GptqConfig),
    /// `AutoAWQ`.
    Awq(AwqConfig),
    /// `exllamav2`; widths are in the tensors.
    Exl2,
    /// `exllamav3`; width and codebook are in the tensors.
    Exl3,
}

impl fmt::Display for QuantMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QuantMethod::Gptq(config) => write!(f, "GPTQ {} bit", config.bits),
            QuantMethod::Awq(_) => f.write_str("AWQ 4 bit"),
            QuantMethod::Exl2 => f.write_str("EXL2"),
            QuantMethod::Exl3 => f.write_str("EXL3"),
        }
    }
}

impl QuantMethod {
    /// Reads `quantization_config`.
    ///
    /// # Errors
    /// [`LoadError::BadValue`] for an unknown method, width, packing or group size.
    pub fn from_json(config: &Value) -> Result<QuantMethod, LoadError> {
        let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("none");
        match method {
            "gptq" => gptq_config(config).map(QuantMethod::Gptq),
            "awq" => awq_config(config).map(QuantMethod::Awq),
            "exl2" => Ok(QuantMethod::Exl2),
            "exl3" => Ok(QuantMethod::Exl3),
            other => {
                let expected = "gptq, awq, exl2 or exl3";
                Err(LoadError::bad_value("quantization_config.quant_method", expected, other))
            }
        }
    }

    /// `quant_method` of configuration files.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            QuantMethod::Gptq(_) => "gptq",
            QuantMethod::Awq(_) => "awq",
            QuantMethod::Exl2 => "exl2",
            QuantMethod::Exl3 => "exl3",
        }
    }

    /// Suffixes of the tensors that make a layer of this method, the deciding one first. `g_idx`,
    /// `suh`/`su`, `svh`/`sv`, `mcg` and `mul1` may be absent.
    #[must_use]
    pub fn layer_tensors(&self) -> &'static [&'static str] {
        match self {
            QuantMethod::Gptq(_) => &["qweight", "qzeros", "scales", "g_idx"],
            QuantMethod::Awq(_) => &["qweight", "qzeros", "scales"],
            QuantMethod::Exl2 => &["q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups"],
            QuantMethod::Exl3 => &["trellis", "suh", "svh", "su", "sv", "mcg", "mul1"],
        }
    }
}

/// Finds tensors by full name.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<RawTensor<'a>>;

/// Output and input features (N, K) of the layer `prefix`, without decoding it.
///
/// # Errors
/// When a tensor is missing or its type, shape or byte count do not fit.
pub fn layer_shape<'a>(
    method: &QuantMethod,
    prefix: &'a str,
    tensors: Lookup<'a>,
) -> Result<(usize, usize), LoadError> {
    let layer = Layer { prefix, tensors };
    match method {
        QuantMethod::Gptq(config) => gptq::shape(&layer, *config),
        QuantMethod::Awq(config) => awq::shape(&layer, *config),
        QuantMethod::Exl2 => exl2::shape(&layer),
        QuantMethod::Exl3 => exl3::shape(&layer),
    }
}

/// The weights of the layer `prefix`.
///
/// # Errors
/// As [`layer_shape`], and when an index in the tensors is out of range.
pub fn dequantise_layer<'a>(
    method: &QuantMethod,
    prefix: &'a str,
    tensors: Lookup<'a>,
) -> Result<Dense, LoadError> {
    let layer = Layer { prefix, tensors };
    match method {
        QuantMethod::Gptq(config) => gptq::dequantise(&layer, *config),
        QuantMethod::Awq(config) => awq::dequantise(&layer, *config),
        QuantMethod::Exl2 => exl2::dequantise(&layer),
        QuantMethod::Exl3 => exl3::dequantise(&layer),
    }
}

/// The block format that the layer `prefix` can be repacked to, so that it runs quantised; `None`
/// when it has to be dequantised. Decodes no weight.
///
/// GPTQ of 4 and 8 bits in groups of whole blocks of neighbouring input features, scales repeated
/// for groups that are larger: zero points in the middle give `Q4_0` and `Q8_0`, which hold the
/// products of scale and code exactly ([`dequantise_layer`] rounds them to half). Other zero points
/// of 4 bits give `Q4_1`, whose minimum is scale · zero point rounded to half.
///
/// # Errors
/// As [`layer_shape`].
pub fn native_type<'a>(
    method: &QuantMethod,
    prefix: &'a str,
    tensors: Lookup<'a>,
) -> Result<Option<DType>, LoadError> {
    match method {
        QuantMethod::Gptq(config) => {
            let native = gptq::native(&Layer { prefix, tensors }, *config)?;
            Ok(native.map(gptq::Native::dtype))
        }
        QuantMethod::Awq(_) | QuantMethod::Exl2 | QuantMethod::Exl3 => Ok(None),
    }
}

/// The layer `prefix` in the format of [`native_type`].
///
/// # Errors
/// As [`layer_shape`].
pub fn native_blocks<'a>(
    method: &QuantMethod,
    prefix: &'a str,
    tensors: Lookup<'a>,
) -> Result<Option<Blocks>, LoadError> {
    match method {
        QuantMethod::Gptq(config) => gptq::blocks(&Layer { prefix, tensors }, *config),
        QuantMethod::Awq(_) | QuantMethod::Exl2 | QuantMethod::Exl3 => Ok(None),
    }
}

/// The tensors of one layer, each checked when it is taken.
pub(crate) struct Layer<'a> {
    prefix: &'a str,
    tensors: Lookup<'a>,
}

impl<'a> Layer<'a> {
    pub(crate) fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    pub(crate) fn refuse(
        &self,
        suffix: &str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> LoadError {
        LoadError::bad_value(&self.name(suffix), expected, found)
    }

    /// The tensor, if there, with `n_dimensions` and as many bytes as its shape implies.
    pub(crate) fn optional(
        &self,
        suffix: &str,
        dtype: RawType,
        n_dimensions: usize,
    ) -> Result<Option<RawTensor<'a>>, LoadError> {
        let Some(tensor) = (self.tensors)(&self.name(suffix)) else { return Ok(None) };
        if tensor.dtype != dtype {
            return Err(self.refuse(
                suffix,
                format!("elements of type {dtype:?}"),
                format!("{:?}", tensor.dtype),
            ));
        }
        if tensor.shape.len() != n_dimensions {
            let expected = format!("{n_dimensions} dimensions");
            return Err(self.refuse(suffix, expected, format!("{:?}", tensor.shape)));
        }
        let n_bytes = tensor.shape.iter().try_fold(dtype.bytes(), |n, &d| n.checked_mul(d));
        if n_bytes != Some(tensor.bytes.len()) {
            let expected = format!("the bytes of shape {:?}", tensor.shape);
            return Err(self.refuse(suffix, expected, format!("{} bytes", tensor.bytes.len())));
        }
        Ok(Some(tensor))
    }

    pub(crate) fn require(
        &self,
        suffix: &str,
        dtype: RawType,
        n_dimensions: usize,
    ) -> Result<RawTensor<'a>, LoadError> {
        self.optional(suffix, dtype, n_dimensions)?
            .ok_or_else(|| self.refuse(suffix, "a tensor", "none"))
    }

    /// The tensor with exactly `shape`.
    pub(crate) fn exact(
        &self,
        suffix: &str,
        dtype: RawType,
        shape: &[usize],
    ) -> Result<RawTensor<'a>, LoadError> {
        let tensor = self.require(suffix, dtype, shape.len())?;
        if tensor.shape == shape {
            return Ok(tensor);
        }
        Err(self.refuse(suffix, format!("shape {shape:?}"), format!("{:?}", tensor.shape)))
    }
}

/// An all-zero matrix; the size is bounded by the packed bytes that the caller has checked.
pub(crate) fn dense(layer: &Layer<'_>, rows: usize, columns: usize) -> Result<Dense, LoadError> {
    let len = rows.checked_mul(columns).filter(|&n| n <= 1 << 34 && n > 0);
    let Some(len) = len else {
        return Err(layer.refuse("shape", "1 to 2^34 weights", format!("{rows} x {columns}")));
    };
    Ok(Dense { rows, columns, halves: vec![0; len] })
}

/// The half nearest to `value`, which must be exact so that there is one rounding.
pub(crate) fn half_bits(value: f32) -> u16 {
    f16::from_f32(value).to_bits()
}

/// `bits` bits at bit `at` of the little-endian stream of words that `word` numbers.
pub(crate) fn stream_bits(word: impl Fn(usize) -> u32, at: usize, bits: u32) -> u32 {
    let (index, shift) = (at / 32, at % 32);
    let mut value = word(index) >> shift;
    if shift + bits as usize > 32 {
        value |= word(index + 1) << (32 - shift);
    }
    value & ((1 << bits) - 1)
}

fn gptq_config(config: &Value) -> Result<GptqConfig, LoadError> {
    let bits = number(config, "bits")?;
    let bits = match bits {
        2 => 2,
        3 => 3,
        4 => 4,
        8 => 8,
        _ => return Err(LoadError::bad_value("quantization_config.bits", "2, 3, 4 or 8", bits)),
    };
    let format = config.get("checkpoint_format").or_else(|| config.get("format"));
    let zeros = match format.and_then(Value::as_str) {
        None | Some("gptq") => GptqZeros::LessOne,
        Some("gptq_v2") => GptqZeros::Plain,
        Some(other) => {
            let key = "quantization_config.checkpoint_format";
            return Err(LoadError::bad_value(key, "gptq or gptq_v2", other));
        }
    };
    Ok(GptqConfig { bits, group_size: group_size(config)?, zeros })
}

fn awq_config(config: &Value) -> Result<AwqConfig, LoadError> {
    let bits = number(config, "bits")?;
    if bits != 4 {
        return Err(LoadError::bad_value("quantization_config.bits", "4 for awq", bits));
    }
    let version = config.get("version").and_then(Value::as_str).unwrap_or("gemm");
    let packing = match version.to_ascii_lowercase().as_str() {
        "gemm" => AwqPacking::Gemm,
        "gemv" => AwqPacking::Gemv,
        other => {
            let key = "quantization_config.version";
            return Err(LoadError::bad_value(key, "gemm or gemv", other));
        }
    };
    let Some(group_size) = group_size(config)? else {
        return Err(LoadError::bad_value(
            "quantization_config.group_size",
            "a positive number",
            -1,
        ));
    };
    Ok(AwqConfig { group_size, packing })
}

fn number(config: &Value, key: &str) -> Result<i64, LoadError> {
    let value = config.get(key);
    value.and_then(Value::as_i64).ok_or_else(|| {
        let found = value.map_or_else(|| "nothing".to_owned(), Value::to_string);
        LoadError::bad_value(&format!("quantization_config.{key}"), "an integer", found)
    })
}

fn group_size(config: &Value) -> Result<Option<usize>, LoadError> {
    let found = number(config, "group_size")?;
    if found == -1 {
        return Ok(None);
    }
    usize::try_from(found).ok().filter(|&n| n > 0).map(Some).ok_or_else(|| {
        LoadError::bad_value("quantization_config.group_size", "-1 or a positive number", found)
    })
}
