//! Tiny seeded models for tests: whole files that every loader must accept, made in milliseconds,
//! and a writer for files that every loader must refuse. Large ones with random weights serve
//! benchmarks. And servers that behave as foreign ones were measured to, for a gateway's tests.
//!
//! The same seed gives the same bytes on every platform: random numbers come from integer
//! arithmetic and IEEE additions only. Functions here panic on wrong arguments; they serve tests.

mod fault_proxy;
mod gguf_writer;
mod random;
mod scripted_upstream;
mod serving;
mod synthetic;
mod tabby;
mod tiny_bert;
mod tiny_llama;

pub use fault_proxy::{FaultProxy, ProxyFault};
pub use gguf_writer::{GgufValue, GgufWriter};
pub use random::Random;
pub use scripted_upstream::{ScriptedOptions, ScriptedUpstream};
pub use synthetic::{SYNTHETIC_LLAMAS, SyntheticLlama, synthetic_llama};
pub use tabby::{Tabby, TabbyFaults, TabbyOptions};
pub use tiny_bert::{safetensors_bytes, tiny_bert};
pub use tiny_llama::{CHAT_TEMPLATE, TinyLlama, tiny_llama};
