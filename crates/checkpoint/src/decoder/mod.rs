//! [`DecoderConfig`]: the architecture of a decoder as data, whatever family and file it comes from.
//!
//! ```text
//! GGUF metadata ── gguf.rs ──┐
//!                            ├─→ DecoderConfig ── layout.rs ──→ every tensor there, none unknown
//! config.json ──── hf/ ──────┘
//! ```

mod config;
mod family;
mod gguf;
mod keys;
mod layout;

pub use config::{
    BlockNorms, DecoderConfig, Experts, GateKind, LayerConfig, NormConfig, NormKind, QkNorm,
    RopeConfig, RopePairs, RopeScaling, Storage,
};
pub(crate) use family::{FAMILIES, Family, GlobalRope, LayerPattern};
pub(crate) use gguf::{MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, within};
pub use layout::{LayerTensor, tensor_name};
