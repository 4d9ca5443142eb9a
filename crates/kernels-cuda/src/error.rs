//! [`CudaError`]: why a device cannot be used.

use cudarc::driver::DriverError;
use thiserror::Error;

/// Why a device cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver.
    #[error(
        "CUDA: expected the NVIDIA driver's library (libcuda.so.1), found none; install the driver \
         (CUDA 13, 580 or later) or use --device cpu"
    )]
    NoDriver,
    /// The driver is older than the kernels.
    #[error(
        "CUDA: expected a driver for CUDA {expected} or later, found one for {found}; update it"
    )]
    OldDriver {
        /// Version that the kernels need.
        expected: String,
        /// Version of the driver.
        found: String,
    },
    /// No such card.
    #[error("cuda:{ordinal}: expected one of {n_devices} devices, found no such device")]
    NoDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        n_devices: usize,
    },
    /// The card is older than the kernels.
    #[error(
        "cuda:{ordinal} ({name}): expected compute capability {expected} or later, found {found}"
    )]
    OldDevice {
        /// Which one.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Oldest that the kernels run on.
        expected: String,
        /// What it has.
        found: String,
    },
    /// A kernel of this program is missing, or the driver refuses it.
    #[error("cuda:{ordinal}: kernel `{kernel}`: {reason}")]
    Kernel {
        /// Which device.
        ordinal: usize,
        /// Which one.
        kernel: String,
        /// What the driver says.
        reason: String,
    },
    /// The driver refused a call.
    #[error("cuda:{ordinal}: {call}: {reason}")]
    Driver {
        /// Which device.
        ordinal: usize,
        /// What was asked of it.
        call: &'static str,
        /// What it said.
        reason: String,
    },
}

impl CudaError {
    pub(crate) fn driver(ordinal: usize, call: &'static str) -> impl Fn(DriverError) -> CudaError {
        move |error| CudaError::Driver { ordinal, call, reason: error.to_string() }
    }
}
