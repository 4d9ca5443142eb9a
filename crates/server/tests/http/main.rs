//! The router over a tiny seeded model: real engine, real index, real trace log, no socket.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod access;
mod answers;
mod cache;
mod constraints;
mod contract;
mod diagnostics;
#[path = "../../../engine/tests/engine/faulty.rs"]
mod faulty;
mod fence;
mod fingerprint;
mod hang_up;
mod hostile;
mod leak;
mod limits;
mod lint;
mod otlp;
mod rotation;
mod scheduling;
mod session_fence;
mod sessions;
mod steps;
mod structured;
mod support;
mod swap;
mod tools;
mod traces;
mod watchdog;
mod writing;
