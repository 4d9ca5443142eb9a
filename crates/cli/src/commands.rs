//! One module a command; each has `run`.

pub(crate) mod ask;
pub(crate) mod bench;
pub(crate) mod calibrate;
pub(crate) mod chat;
pub(crate) mod demo;
pub(crate) mod devices;
pub(crate) mod diagnose;
pub(crate) mod embed;
pub(crate) mod fix;
pub(crate) mod gateway;
pub(crate) mod ingest;
pub(crate) mod inspect;
pub(crate) mod plan;
pub(crate) mod preflight;
pub(crate) mod probe;
pub(crate) mod pull;
pub(crate) mod quantize;
pub(crate) mod schema;
pub(crate) mod serve;
pub(crate) mod soak;
pub(crate) mod trace;
pub(crate) mod verify;
