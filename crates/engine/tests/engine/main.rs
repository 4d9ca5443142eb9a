//! The engine on tiny seeded models.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may fail like tests")]

mod constrained;
mod cpu;
mod encoder;
mod faults;
mod faulty;
mod fence;
mod generation;
mod memory;
mod prefixes;
mod rotation;
mod scheduling;
mod schemas;
mod sessions;
mod support;
