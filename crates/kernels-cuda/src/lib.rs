//! An NVIDIA GPU as a device: `CudaBackend` implements `exrail_kernels::Backend` with the kernels
//! of `cu/`, which are compiled when this crate is built with feature `cuda` and find the driver when
//! a device is opened.
//!
//! Way in: `backend` holds one method an operation; `linear` is the matrix products on the planes of
//! `weight`, which come through `loader`, `attention` and `kv` the page pool, `rows` the rest, and
//! `found` what it finds on its way back. `device` opens a card and says what is there; `stream` owns
//! everything that is asked of the driver afterwards, and `queue` what waits for it.
//!
//! This crate knows no model: shapes and weights come through the trait.
#![cfg(feature = "cuda")]

mod attention;
mod backend;
mod device;
mod error;
mod found;
mod fresh;
mod kv;
mod layout;
mod linear;
mod loader;
mod memory;
mod probe;
mod queue;
mod rows;
mod stream;
mod weight;

pub use backend::{CudaBackend, CudaOptions};
pub use device::{DeviceFacts, devices};
pub use error::CudaError;
pub use found::CudaFound;
pub use kv::CudaKvPool;
pub use memory::CudaBuffer;
pub use probe::CopyProbe;
pub use weight::CudaWeight;
