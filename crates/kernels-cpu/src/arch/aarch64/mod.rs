//! NEON.

pub(crate) mod neon;
