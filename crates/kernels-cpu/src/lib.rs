//! The CPU as a device: [`CpuBackend`] implements [`exrail_kernels::Backend`] with AVX-512 VNNI,
//! AVX2, NEON or portable code, chosen when it starts, on a pool of pinned threads.
//!
//! Way in: `backend` holds one method an operation; `linear` and `product` are the matrix
//! products on the tiles of `tile`, which `pack` makes of a checkpoint's rows, and `largest` is the
//! head of a greedy step; `attention` streams the KV pages of `kv`; `rows` has the rest.
//! Each algorithm is written once over the sixteen lanes of `lanes::Lanes`, and `arch` says what a
//! lane operation is on each instruction set. `pool` runs it all, and `bandwidth` measures how fast
//! its threads read memory.
//!
//! This crate knows no model: shapes and weights come through the trait.

#[macro_use]
mod unroll;

mod activation;
mod affinity;
mod arch;
mod attention;
mod backend;
mod bandwidth;
mod codes;
mod disjoint;
mod footprint;
mod kv;
mod lanes;
mod largest;
mod linear;
mod math;
mod memory;
mod pack;
mod pool;
mod processor;
mod product;
mod rows;
mod tile;
mod weight;

pub use backend::{CpuBackend, CpuBuffer, CpuOptions};
pub use bandwidth::ReadProbe;
pub use footprint::CpuFootprint;
pub use kv::CpuKvPool;
pub use processor::Isa;
pub use weight::CpuWeight;
