//! The engine on tiny seeded models.

mod cpu;
mod encoder;
mod faults;
mod generation;
mod support;
