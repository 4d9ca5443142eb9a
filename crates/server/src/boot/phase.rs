//! The phases of a boot (G-01), by name.

use std::time::Duration;

/// The phases, in the order in which they run where nothing else is needed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Options and configuration were read and frozen.
    Config,
    /// Keys are present and well formed.
    Secrets,
    /// Files were compared with their declared hashes and with each other.
    Preflight,
    /// The device answers and has the instructions it needs.
    Device,
    /// Devices agree on their order.
    Collectives,
    /// Weights are loaded and repacked.
    Weights,
    /// The tokenizer and the chat template passed their checks.
    Tokenizer,
    /// KV pages are allocated.
    KvPool,
    /// Real 10-token generations ran.
    WarmUp,
    /// Grammars are compiled.
    Grammar,
    /// The sentence encoder is loaded.
    Encoder,
    /// Collections are open and their contracts hold.
    Index,
    /// Gates and calibrations are loaded.
    Policy,
    /// A real request ran through the production path and its answer was checked.
    Sentinel,
    /// Requests are served.
    Ready,
}

impl Phase {
    /// The name in `/readyz`, traces and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Secrets => "secrets",
            Self::Preflight => "preflight",
            Self::Device => "device",
            Self::Collectives => "collectives",
            Self::Weights => "weights",
            Self::Tokenizer => "tokenizer",
            Self::KvPool => "kv_pool",
            Self::WarmUp => "warmup",
            Self::Grammar => "grammar",
            Self::Encoder => "encoder",
            Self::Index => "index",
            Self::Policy => "policy",
            Self::Sentinel => "sentinel",
            Self::Ready => "ready",
        }
    }

    /// How long the phase usually takes at most, for `Retry-After`.
    pub(super) fn usual(self) -> Duration {
        match self {
            Self::Weights | Self::WarmUp => Duration::from_secs(5),
            Self::Config
            | Self::Secrets
            | Self::Preflight
            | Self::Device
            | Self::Collectives
            | Self::Tokenizer
            | Self::KvPool
            | Self::Grammar
            | Self::Encoder
            | Self::Index
            | Self::Policy
            | Self::Sentinel
            | Self::Ready => Duration::from_secs(1),
        }
    }
}
