//! The published JSON Schemas (draft 2020-12) of what exrail writes: a record of the trace log for each event, and
//! a stored snippet. Every one stands alone and allows no field that it does not name.

/// A published schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// The event, or `chunk`.
    pub name: &'static str,
    /// The schema.
    pub json: &'static str,
}

macro_rules! published {
    ($($name:literal),+ $(,)?) => {
        &[$(Published { name: $name, json: include_str!(concat!("../schemas/", $name, ".json")) }),+]
    };
}

/// One for each event of the trace log, by name.
pub const TRACE: &[Published] = published![
    "answer.decide",
    "boot.phase",
    "cache.rotate",
    "guard.fire",
    "infer.run",
    "ingest.write",
    "model.load",
    "model.unload",
    "probe.run",
    "relay.run",
    "retrieve.run",
];

/// One for each other thing that is stored.
pub const STORED: &[Published] = published!["chunk"];

/// SHA-256 over [`TRACE`], each followed by a zero byte, 64 hexadecimal digits: the `schema_hash` among the pins of a
/// record.
pub const SHA256: &str = "df82d5b2b4f23dfe08460c46967681a61e870e99a5f6a1393548d278313560dc";

/// The schema of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Published> {
    TRACE.iter().chain(STORED).find(|published| published.name == name)
}
