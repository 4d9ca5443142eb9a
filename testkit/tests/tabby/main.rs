//! The double of TabbyAPI's server behaves as that one was read and measured to: a test for every
//! group of rules and for every fault.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod answers;
mod errors;
mod faults;
mod loading;
mod support;
