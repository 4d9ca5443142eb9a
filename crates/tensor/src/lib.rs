//! Element formats of model tensors: their sizes, their names, and their blocks turned into `f32`
//! and back.
//!
//! Formats follow ggml bit for bit (`ggml-common.h`, `ggml-quants.c`); the golden file of this
//! crate's tests was made by the Python package `gguf`. Nothing here multiplies matrices, opens
//! files or uses `unsafe`.

mod dtype;
mod format;

pub use dtype::{DType, ggml_type_name};
pub use format::{FormatError, dequantize, quantize};
