//! The engine on tiny seeded models.

mod faults;
mod generation;
mod support;
