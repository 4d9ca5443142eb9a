//! What is measured: the options as given, and the plan that they make.

use std::num::NonZeroUsize;

use anyhow::{Result, bail};
use clap::Args;
use exrail_kernels::{Activation, KvDtype};
use exrail_kernels_cpu::CpuOptions;
use serde::Serialize;

use crate::{
    device::DeviceOption,
    environment,
    options::{ActivationOption, KvOption},
};

/// The options of a measurement.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Measurement")]
pub(super) struct Workload {
    /// Prompt lengths of the prefill tests, into an empty cache.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "512")]
    prompt: Vec<NonZeroUsize>,
    /// Tokens of each sequence in the decode tests.
    #[arg(long = "gen", value_name = "N", default_value = "128")]
    generated: NonZeroUsize,
    /// Positions that are cached before decode begins.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Sequences that decode at once.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1")]
    batch: Vec<NonZeroUsize>,
    /// Repetitions of every test, after one to warm up.
    #[arg(long, value_name = "N", default_value = "5")]
    repeat: NonZeroUsize,
    /// Device: auto (the first GPU, or else the CPU), cpu or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = environment::DEVICE)]
    device: DeviceOption,
    /// Threads of the CPU; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<NonZeroUsize>,
    /// Rows of a prefill step at most.
    #[arg(long, value_name = "N", default_value = "512")]
    chunk: NonZeroUsize,
    /// How activations meet quantised weights.
    #[arg(long, value_enum, default_value = "int8")]
    activation: ActivationOption,
    /// Rows that do not depend on the other rows of their batch, see `exrail serve`.
    #[arg(long)]
    batch_invariant: bool,
    /// Element type of the KV cache.
    #[arg(long, value_enum, default_value = "f16")]
    kv: KvOption,
}

/// A measurement that can be made: no list is empty, names a value twice, or holds a zero where
/// there is nothing to measure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Plan {
    /// Tokens of each prefill test.
    pub(super) prompt: Vec<usize>,
    /// Tokens of each sequence in a decode test.
    #[serde(rename = "gen")]
    pub(super) generated: usize,
    /// Cached positions before decode.
    pub(super) depth: Vec<usize>,
    /// Sequences at once.
    pub(super) batch: Vec<usize>,
    /// Timed repetitions.
    pub(super) repeat: usize,
    /// As asked.
    pub(super) device: DeviceOption,
    /// As asked; `None`: one a physical core.
    pub(super) threads: Option<usize>,
    /// Rows of a prefill step at most.
    pub(super) chunk: usize,
    /// How activations meet quantised weights.
    pub(super) activation: ActivationOption,
    /// Whether a row may not depend on the other rows of its batch.
    pub(super) batch_invariant: bool,
    /// Element type of the KV cache.
    pub(super) kv: KvOption,
}

impl Workload {
    /// # Errors
    /// A list with a value twice, or a context beyond what a number holds.
    pub(super) fn plan(&self) -> Result<Plan> {
        let plain = |values: &[NonZeroUsize]| values.iter().map(|n| n.get()).collect::<Vec<_>>();
        let (prompt, batch) = (plain(&self.prompt), plain(&self.batch));
        for (option, values) in [("prompt", &prompt), ("depth", &self.depth), ("batch", &batch)] {
            refuse_twice(option, values)?;
        }
        let deepest = self.depth.iter().copied().max().unwrap_or(0);
        if deepest.checked_add(self.generated.get()).is_none() {
            bail!("--depth: expected a number of positions, found {deepest}");
        }
        Ok(Plan {
            prompt,
            generated: self.generated.get(),
            depth: self.depth.clone(),
            batch,
            repeat: self.repeat.get(),
            device: self.device,
            threads: self.threads.map(NonZeroUsize::get),
            chunk: self.chunk.get(),
            activation: self.activation,
            batch_invariant: self.batch_invariant,
            kv: self.kv,
        })
    }
}

fn refuse_twice(option: &str, values: &[usize]) -> Result<()> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("--{option}: expected different values, found {} twice", pair[0]);
    }
    Ok(())
}

impl Plan {
    /// Most sequences at once.
    pub(super) fn most_sequences(&self) -> usize {
        self.batch.iter().copied().max().unwrap_or(1)
    }

    /// Most cached positions before decode.
    pub(super) fn deepest(&self) -> usize {
        self.depth.iter().copied().max().unwrap_or(0)
    }

    /// Positions that a sequence needs.
    pub(super) fn longest(&self) -> usize {
        self.prompt.iter().copied().max().unwrap_or(0).max(self.deepest() + self.generated)
    }

    pub(super) fn cpu(&self) -> CpuOptions {
        let activation = match self.activation {
            ActivationOption::Int8 => Activation::Int8,
            ActivationOption::F32 => Activation::F32,
        };
        CpuOptions { threads: self.threads, activation, ..CpuOptions::default() }
    }

    pub(super) fn kv_dtype(&self) -> KvDtype {
        match self.kv {
            KvOption::F16 => KvDtype::F16,
            KvOption::F32 => KvDtype::F32,
            KvOption::Int8 => KvDtype::Int8,
        }
    }

    /// The options that make the same plan in another process.
    pub(super) fn arguments(&self) -> Vec<String> {
        let list =
            |values: &[usize]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let activation = match self.activation {
            ActivationOption::Int8 => "int8",
            ActivationOption::F32 => "f32",
        };
        let kv = match self.kv {
            KvOption::F16 => "f16",
            KvOption::F32 => "f32",
            KvOption::Int8 => "int8",
        };
        let mut pairs = vec![
            ("--prompt", list(&self.prompt)),
            ("--gen", self.generated.to_string()),
            ("--depth", list(&self.depth)),
            ("--batch", list(&self.batch)),
            ("--repeat", self.repeat.to_string()),
            ("--chunk", self.chunk.to_string()),
            ("--activation", activation.to_owned()),
            ("--kv", kv.to_owned()),
            ("--device", self.device.to_string()),
        ];
        if let Some(threads) = self.threads {
            pairs.push(("--threads", threads.to_string()));
        }
        let pairs = pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        let flag = self.batch_invariant.then(|| "--batch-invariant".to_owned());
        pairs.chain(flag).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        workload: Workload,
    }

    fn plan(arguments: &[&str]) -> Result<Plan> {
        Line::try_parse_from([&["bench"], arguments].concat())?.workload.plan()
    }

    #[test]
    fn a_plan_survives_the_way_to_another_process() {
        let given = ["--prompt", "64,512", "--gen", "7", "--depth", "0,1000", "--batch", "8,1"];
        let more = ["--repeat", "3", "--chunk", "32", "--threads", "2", "--device", "cpu"];
        let plan_of = |arguments: &[&str]| plan(arguments).unwrap();
        let first = plan_of(
            &[&given[..], &more, &["--activation", "f32", "--kv", "f32", "--batch-invariant"]]
                .concat(),
        );
        let arguments = first.arguments();
        let again: Vec<&str> = arguments.iter().map(String::as_str).collect();
        assert_eq!(plan_of(&again), first);
        assert_eq!((first.longest(), first.most_sequences()), (1007, 8));
        assert_eq!(plan_of(&[]).longest(), 512);
    }

    #[test]
    fn what_cannot_be_measured_is_refused_by_name() {
        for option in ["--prompt", "--gen", "--batch", "--repeat", "--threads", "--chunk"] {
            let error = plan(&[option, "0"]).unwrap_err().to_string();
            assert!(error.contains(option), "{error}");
        }
        for (option, value) in [("--depth", "-1"), ("--prompt", "8,"), ("--kv", "q4")] {
            assert!(plan(&[option, value]).is_err(), "{option} {value}");
        }
        let error = plan(&["--depth", "5,0,5"]).unwrap_err().to_string();
        assert_eq!(error, "--depth: expected different values, found 5 twice");
        let error = plan(&["--depth", &usize::MAX.to_string()]).unwrap_err().to_string();
        assert!(error.contains("--depth"), "{error}");
    }
}
