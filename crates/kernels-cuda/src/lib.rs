//! An NVIDIA GPU as a device: `CudaBackend` implements `exrail_kernels::Backend` with the kernels
//! of `cu/`, which are compiled when this crate is built with feature `cuda` and find the driver when
//! a device is opened.
//!
//! Way in: `backend` holds one method an operation; `linear` is the matrix products on the planes of
//! `weight`, which come through `loader`, `attention` and `kv` the page pool, `rows` the rest, `draw` the
//! draws, and `found` what it finds on its way back. `device` opens a card and says what is there; `stream` owns
//! everything that is asked of the driver afterwards, and `queue` what waits for it.
//!
//! `footprint` says what the GPU would allocate, from the arithmetic of `planes`; these two are all that
//! there is without feature `cuda`.
//!
//! This crate knows no model: shapes and weights come through the trait.

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod backend;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod draw;
#[cfg(feature = "cuda")]
mod error;
mod footprint;
#[cfg(feature = "cuda")]
mod found;
#[cfg(feature = "cuda")]
mod fresh;
#[cfg(feature = "cuda")]
mod kv;
#[cfg(feature = "cuda")]
mod layout;
#[cfg(feature = "cuda")]
mod linear;
#[cfg(feature = "cuda")]
mod loader;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
mod moves;
mod planes;
#[cfg(feature = "cuda")]
mod probe;
#[cfg(feature = "cuda")]
mod queue;
#[cfg(feature = "cuda")]
mod rows;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(feature = "cuda")]
mod weight;

#[cfg(feature = "cuda")]
pub use backend::{CudaBackend, CudaOptions};
#[cfg(feature = "cuda")]
pub use device::{DeviceFacts, devices, free_memory};
#[cfg(feature = "cuda")]
pub use error::CudaError;
pub use footprint::CudaFootprint;
#[cfg(feature = "cuda")]
pub use found::CudaFound;
#[cfg(feature = "cuda")]
pub use kv::CudaKvPool;
#[cfg(feature = "cuda")]
pub use memory::CudaBuffer;
#[cfg(feature = "cuda")]
pub use probe::CopyProbe;
#[cfg(feature = "cuda")]
pub use weight::CudaWeight;
