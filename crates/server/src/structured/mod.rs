//! The schema lock (G-13): what leaves conforms, or nothing does.
//!
//! ```text
//! request in:  fields ─ Demand::of_chat ─> Demand ─ compile ─> Grammar for the engine, Lock for the answer
//! answer out:  text ─ Gate (one a choice) ─> Part: thought, content, call
//! ```
//!
//! The engine's mask keeps an answer inside its grammar; the lock does not rely on it. A value is validated whole
//! before its end is told, a call comes out at its last bracket, valid against its parameters, and a cut one
//! never does.

mod contract;
mod demand;
mod lock;
mod settle;
#[cfg(test)]
mod tests;

pub(crate) use demand::{Demand, Opening, Structured};
pub(crate) use lock::{Broken, Call, Gate, Lock, Part, Reply};
pub(crate) use settle::{GUARD, Hold, settle};
