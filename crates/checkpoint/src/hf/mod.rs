//! Hugging Face folders: `config.json`, safetensors and the small files beside them.
//!
//! ```text
//! config.json ── config.rs, rope.rs ──→ DecoderConfig ──┐
//! *.safetensors, index ── shards.rs ──→ names.rs ───────┴─→ HfFolder, a Tensors with GGUF names
//! ```

mod config;
mod family;
mod fields;
mod files;
mod folder;
mod names;
mod quantisation;
mod rope;
mod shards;
mod tensors;
mod text;

pub use folder::HfFolder;
pub use text::{GenerationSettings, NamedTemplate, TextSettings};
