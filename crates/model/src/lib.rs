//! Architecture as data: one decoder forward pass (Llama family) and one encoder (BERT), generic
//! over [`exrail_kernels::Backend`].
//!
//! Weights come through [`exrail_checkpoint::Tensors`], whose shapes are checked here by name.
//! Nothing here schedules, samples, tokenizes, or knows a device.
//!
//! Letters: T rows in the batch, M logit rows, C model width, H query heads, K key/value heads,
//! D head width, F FFN width, V vocabulary.

mod batch;
mod decoder;
mod encoder;
mod error;
mod experts;
mod layer;
mod load;
mod needed;
mod rope;
mod scratch;

pub use batch::Batch;
pub use decoder::{Block, Decoder, embed_tokens, kv_shape};
pub use encoder::Encoder;
pub use error::ModelError;
pub use load::LoadProgress;
pub use needed::{Needed, RunSizes};
pub use scratch::Scratch;
