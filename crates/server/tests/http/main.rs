//! The router over a tiny seeded model: real engine, real index, real trace log, no socket.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod access;
mod answers;
mod cache;
mod fence;
mod fingerprint;
mod scheduling;
mod support;
mod traces;
