//! The offline quantiser: 16-bit checkpoints to groupwise int4 and int8, rounded to nearest or
//! calibrated, written in the layout of GPTQ checkpoints.
//!
//! It works layer by layer and holds one layer at a time. It knows no tokenizer: calibration text
//! comes as token ids. It is generic over [`exrail_kernels::Backend`].
//!
//! Letters: N output features (rows), K input features (columns), G groups of a row, T tokens.

mod calibrate;
mod codes;
mod error;
mod factor;
mod fidelity;
mod finish;
mod hessian;
mod manifest;
mod options;
mod overlay;
mod pack;
mod plan;
mod recorder;
mod run;
mod shard;
mod work;

pub use calibrate::{Calibrated, calibrate};
pub use codes::Codes;
pub use error::QuantizeError;
pub use fidelity::WeightError;
pub use finish::MANIFEST;
pub use hessian::Hessian;
pub use manifest::{
    CalibrationIdentity, Identity, KeptTensor, Manifest, Method, QuantisedTensor, SourceFile,
};
pub use options::{Calibration, QuantizeOptions};
pub use pack::GptqTensors;
pub use run::{QuantizeProgress, quantize};
