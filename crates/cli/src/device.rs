//! Choosing a device: the one place that names backends of devices.

use std::{fmt, str::FromStr, sync::Arc};

use anyhow::{Result, bail};
use exrail_engine::Free;
use exrail_kernels::{Backend, Footprint};
use exrail_kernels_cpu::{CpuBackend, CpuFootprint, CpuOptions};
use exrail_kernels_cuda::CudaFootprint;
use serde::{Serialize, Serializer};

use crate::memory;

/// What `--device` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceOption {
    /// The first GPU that the kernels run on, or else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number, in the driver's order.
    Cuda(usize),
}

impl FromStr for DeviceOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = |n: &str| n.parse().ok().map(DeviceOption::Cuda);
        let found = match text {
            "auto" => Some(DeviceOption::Auto),
            "cpu" => Some(DeviceOption::Cpu),
            "cuda" => Some(DeviceOption::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(cuda),
        };
        found.ok_or_else(|| format!("expected auto, cpu or cuda:N, found `{text}`"))
    }
}

impl fmt::Display for DeviceOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceOption::Auto => f.write_str("auto"),
            DeviceOption::Cpu => f.write_str("cpu"),
            DeviceOption::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Serialize for DeviceOption {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A device that was opened.
pub(crate) enum Device {
    Cpu(CpuBackend),
    #[cfg(feature = "cuda")]
    Cuda(exrail_kernels_cuda::CudaBackend),
}

/// Work that is compiled once for each backend.
pub(crate) trait Job {
    type Out;
    fn run<B: Measured>(self, backend: B) -> Result<Self::Out>;
}

/// A backend whose memory can be measured.
pub(crate) trait Measured: Backend + Clone {
    /// Asked for by `--threads`, and what there is.
    fn n_threads(&self) -> Option<usize>;

    /// What it would allocate, and what it has: `memory` if that is given, or else what it says is free.
    fn memory(&self, memory: Option<usize>) -> (Arc<dyn Footprint>, Option<Free>);

    /// The same device with rows that may depend on the other rows of their batch; `None` where none does,
    /// whatever is asked for.
    fn batch_dependent(&self) -> Option<Self>;

    /// Something that moves `bytes` of the device's memory and says how many bytes a second that
    /// was.
    ///
    /// # Errors
    /// Out of memory.
    fn probe(&self, bytes: usize) -> Result<Box<dyn FnMut() -> f64>>;
}

impl Measured for CpuBackend {
    fn n_threads(&self) -> Option<usize> {
        Some(CpuBackend::n_threads(self))
    }

    fn memory(&self, memory: Option<usize>) -> (Arc<dyn Footprint>, Option<Free>) {
        (Arc::new(self.footprint()), memory.map(memory::given).or_else(memory::of_system))
    }

    fn batch_dependent(&self) -> Option<Self> {
        None
    }

    fn probe(&self, bytes: usize) -> Result<Box<dyn FnMut() -> f64>> {
        let probe = exrail_kernels_cpu::ReadProbe::new(self, bytes)?;
        Ok(Box::new(move || probe.pass()))
    }
}

impl Device {
    /// Opens what an option names. With [`DeviceOption::Auto`] a GPU that cannot be used leaves the
    /// CPU, and the second part says why. `batch_invariant` asks for rows that do not depend on their
    /// batch, which the CPU's never do.
    ///
    /// # Errors
    /// The device is not there, or the kernels do not run on it.
    pub(crate) fn open(
        option: DeviceOption,
        cpu: CpuOptions,
        batch_invariant: bool,
    ) -> Result<(Device, Option<String>)> {
        match option {
            DeviceOption::Cpu => Ok((Device::Cpu(CpuBackend::new(cpu)?), None)),
            DeviceOption::Cuda(ordinal) => Ok((cuda::open(ordinal, cpu, batch_invariant)?, None)),
            DeviceOption::Auto => match cuda::open(0, cpu, batch_invariant) {
                Ok(device) => Ok((device, None)),
                Err(why) => Ok((Device::Cpu(CpuBackend::new(cpu)?), Some(why.to_string()))),
            },
        }
    }

    /// Name of the device and how it computes.
    pub(crate) fn name(&self) -> String {
        match self {
            Device::Cpu(backend) => backend.name(),
            #[cfg(feature = "cuda")]
            Device::Cuda(backend) => backend.name(),
        }
    }

    /// The CPU's backend, if this is the CPU.
    pub(crate) fn cpu(&self) -> Option<&CpuBackend> {
        match self {
            Device::Cpu(backend) => Some(backend),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => None,
        }
    }

    /// Runs a job on the device's backend.
    pub(crate) fn run<J: Job>(&self, job: J) -> Result<J::Out> {
        match self {
            Device::Cpu(backend) => job.run(backend.clone()),
            #[cfg(feature = "cuda")]
            Device::Cuda(backend) => job.run(backend.clone()),
        }
    }
}

/// A device to plan for, which need not be there.
pub(crate) struct Planned {
    /// What `--device` takes.
    pub(crate) device: DeviceOption,
    /// What it would allocate.
    pub(crate) footprint: Arc<dyn Footprint>,
    /// What it has; nothing where nobody says.
    pub(crate) free: Option<Free>,
    /// Why nobody says.
    pub(crate) why: Option<String>,
}

impl Planned {
    /// The device of an option, with `memory` if that is given. With [`DeviceOption::Auto`] the first
    /// GPU, or else the CPU.
    pub(crate) fn of(option: DeviceOption, cpu: CpuOptions, memory: Option<usize>) -> Planned {
        let has_gpu = || cuda::list().is_ok_and(|found| !found.is_empty());
        let device = match option {
            DeviceOption::Auto if has_gpu() => DeviceOption::Cuda(0),
            DeviceOption::Auto => DeviceOption::Cpu,
            DeviceOption::Cpu | DeviceOption::Cuda(_) => option,
        };
        let found = match (memory, device) {
            (Some(bytes), _) => Ok(memory::given(bytes)),
            (None, DeviceOption::Cuda(ordinal)) => cuda::free(ordinal).map_err(|e| e.to_string()),
            (None, DeviceOption::Auto | DeviceOption::Cpu) => {
                memory::of_system().ok_or_else(|| memory::UNKNOWN.to_owned())
            }
        };
        let is_open = memory.is_none() && found.is_ok();
        let footprint: Arc<dyn Footprint> = match device {
            DeviceOption::Cuda(_) => Arc::new(CudaFootprint { is_open }),
            DeviceOption::Auto | DeviceOption::Cpu => Arc::new(CpuFootprint::new(cpu)),
        };
        let (free, why) = match found {
            Ok(free) => (Some(free), None),
            Err(why) => (None, Some(why)),
        };
        Planned { device, footprint, free, why }
    }
}

/// One line of `exrail devices`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Listed {
    /// What `--device` takes.
    pub(crate) device: String,
    /// Name and size.
    pub(crate) detail: String,
}

/// All devices that can be used, and why there is no GPU among them.
///
/// # Errors
/// The CPU has no kernels.
pub(crate) fn list() -> Result<(Vec<Listed>, Option<String>)> {
    let cpu = CpuBackend::new(CpuOptions::default())?.name();
    let mut listed = vec![Listed { device: "cpu".into(), detail: cpu }];
    match cuda::list() {
        Ok(found) if found.is_empty() => {
            Ok((listed, Some("CUDA: the driver has no device".into())))
        }
        Ok(found) => {
            listed.extend(found);
            Ok((listed, None))
        }
        Err(why) => Ok((listed, Some(why.to_string()))),
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use exrail_kernels_cuda::{CudaBackend, CudaOptions, devices};

    use super::*;

    impl Measured for CudaBackend {
        fn n_threads(&self) -> Option<usize> {
            None
        }

        fn memory(&self, memory: Option<usize>) -> (Arc<dyn Footprint>, Option<Free>) {
            let ordinal = self.facts().ordinal;
            let free = || free(ordinal).inspect_err(|why| tracing::warn!(%why)).ok();
            let footprint = CudaFootprint { is_open: memory.is_none() };
            (Arc::new(footprint), memory.map(memory::given).or_else(free))
        }

        fn batch_dependent(&self) -> Option<Self> {
            Some(self.with_batch_invariant(false))
        }

        fn probe(&self, bytes: usize) -> Result<Box<dyn FnMut() -> f64>> {
            let mut probe = exrail_kernels_cuda::CopyProbe::new(self, bytes)?;
            Ok(Box::new(move || probe.pass()))
        }
    }

    pub(super) fn open(ordinal: usize, cpu: CpuOptions, batch_invariant: bool) -> Result<Device> {
        if cpu.threads.is_some() {
            bail!("--threads: expected --device cpu, found a GPU");
        }
        let options = CudaOptions { ordinal, activation: cpu.activation, batch_invariant };
        Ok(Device::Cuda(CudaBackend::open(options)?))
    }

    /// What the driver says is free.
    pub(super) fn free(ordinal: usize) -> Result<Free> {
        let bytes = exrail_kernels_cuda::free_memory(ordinal)?;
        Ok(Free { bytes, basis: format!("free of cuda:{ordinal}") })
    }

    pub(super) fn list() -> Result<Vec<Listed>> {
        let listed = devices()?.into_iter().map(|facts| {
            let (major, minor) = facts.capability;
            let gib = facts.memory_bytes as f64 / f64::from(1 << 30);
            let n = facts.n_multiprocessors;
            let detail = format!(
                "{}, compute capability {major}.{minor}, {n} multiprocessors, {gib:.1} GiB",
                facts.name
            );
            Listed { device: format!("cuda:{}", facts.ordinal), detail }
        });
        Ok(listed.collect())
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::*;

    const ABSENT: &str = "CUDA: expected a program built with feature `cuda`, found one without; \
                          build with --features cuda, or use --device cpu";

    pub(super) fn open(_: usize, _: CpuOptions, _: bool) -> Result<Device> {
        bail!(ABSENT)
    }

    pub(super) fn free(_: usize) -> Result<Free> {
        bail!(ABSENT)
    }

    pub(super) fn list() -> Result<Vec<Listed>> {
        bail!(ABSENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_and_printed_alike() {
        for text in ["auto", "cpu", "cuda:0", "cuda:11"] {
            assert_eq!(text.parse::<DeviceOption>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceOption::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            let error = text.parse::<DeviceOption>().unwrap_err();
            assert_eq!(error, format!("expected auto, cpu or cuda:N, found `{text}`"));
        }
    }

    #[test]
    fn the_cpu_is_always_listed() {
        let (listed, why) = list().unwrap();
        assert_eq!(listed[0].device, "cpu");
        assert_eq!(why.is_some(), listed.len() == 1);
    }
}
