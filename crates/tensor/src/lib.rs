//! Element formats of model tensors: their sizes, their names, and their blocks turned into `f32`
//! and back.
//!
//! Formats follow ggml bit for bit (`ggml-common.h`, `ggml-quants.c`); the golden file of this
//! crate's tests was made by the Python package `gguf`. Nothing here multiplies matrices, opens
//! files or uses `unsafe`.

mod block;
mod block256;
mod block32;
mod block_few_bits;
mod block_table;
mod dtype;
mod format;
mod grid;

pub use block::Block;
pub use block_few_bits::{BlockQ2_K, BlockQ3_K, pack_signed_scales, unpack_signed_scales};
pub use block_table::{BlockIQ4_NL, BlockIQ4_XS, BlockMXFP4, E2M1_TABLE, IQ4_TABLE, e8m0_half};
pub use block32::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};
pub use block256::{BlockQ4_K, BlockQ5_K, BlockQ6_K, pack_scales, unpack_scales};
pub use dtype::{DType, ggml_type_name};
pub use format::{FormatError, dequantize, quantize};
pub use grid::IntGrid;
