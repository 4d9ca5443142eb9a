//! `exrail quantize`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use exrail_checkpoint::{HfFolder, sha256_hex};
use exrail_kernels::Activation;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_quantize::{Calibration, MANIFEST, Manifest, QuantizeOptions, quantize};
use exrail_text::{Specials, Tokenizer};
use serde_json::json;

use crate::{Ended, options::QuantOption, output::Output, progress::Bars};

/// Quantise a 16-bit Hugging Face folder to int4 or int8.
///
/// The result is a folder in the layout of GPTQ checkpoints, with a manifest of what each matrix
/// lost. The embedding, the head, norms, biases, routers and matrices
/// below 1,024 weights stay as they are. A run that was interrupted goes on when it is started again.
#[derive(Debug, Args)]
pub(crate) struct Quantize {
    /// Folder with config.json and safetensors files of 16-bit or 32-bit weights.
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Folder to write; it must not exist.
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// Width of the weights.
    #[arg(long, value_enum)]
    mode: QuantOption,
    /// Weights of a row that share a scale.
    #[arg(long, value_enum, default_value = "32")]
    group: Group,
    /// Text to calibrate with (GPTQ); 16,000 words or more of what the model will read.
    #[arg(long, value_name = "TEXT")]
    calibrate: Option<PathBuf>,
    /// Threads of a calibration; one per physical core when absent.
    #[arg(long, value_name = "N", requires = "calibrate")]
    threads: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    #[value(name = "32")]
    Of32,
    #[value(name = "64")]
    Of64,
    #[value(name = "128")]
    Of128,
}

impl Group {
    fn len(self) -> usize {
        match self {
            Group::Of32 => 32,
            Group::Of64 => 64,
            Group::Of128 => 128,
        }
    }
}

impl Quantize {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let calibration =
            self.calibrate.as_ref().map(|text| calibration(&self.source, text)).transpose()?;
        let options = QuantizeOptions::new(self.mode.grid(), self.group.len(), calibration)?;
        // Exact activations: what calibration sees must not be rounded itself.
        let cpu = CpuOptions {
            threads: self.threads,
            activation: Activation::F32,
            ..CpuOptions::default()
        };
        let backend = CpuBackend::new(cpu)?;
        let mut bars = Bars::new(*output);
        let manifest =
            quantize(&backend, &self.source, &self.destination, &options, &mut |step| {
                bars.quantize(&step);
            })?;
        bars.clear();
        self.report(*output, &manifest);
        Ok(Ended::Done)
    }

    fn report(&self, output: Output, manifest: &Manifest) {
        let tensors = &manifest.quantised;
        let worst =
            tensors.iter().max_by(|a, b| a.error.relative_rms.total_cmp(&b.error.relative_rms));
        output.value(&json!({ "folder": self.destination, "manifest": manifest }));
        let destination = self.destination.display();
        let mode = match manifest.identity.calibration {
            Some(_) => "calibrated",
            None => "to nearest",
        };
        output.line(format!(
            "{destination}: {} matrices in {} bits, groups of {}, {mode}; {} tensors as they were",
            tensors.len(),
            manifest.identity.bits,
            manifest.identity.group,
            manifest.kept.len(),
        ));
        for tensor in tensors {
            if let Some(reason) = &tensor.fallback {
                output.line(format!(
                    "  {}: {} bits, groups of {}: {reason}",
                    tensor.name, tensor.bits, tensor.group
                ));
            }
        }
        if let Some(worst) = worst {
            let percent = 100.0 * worst.error.relative_rms;
            output.line(format!("largest weight error {percent:.2} % RMS: {}", worst.name));
        }
        output.line(format!("each tensor's error: {}", self.destination.join(MANIFEST).display()));
    }
}

/// The text in the vocabulary of the model.
fn calibration(source: &Path, text: &Path) -> Result<Calibration> {
    let bytes =
        std::fs::read(text).with_context(|| format!("calibration text {}", text.display()))?;
    let text_sha256 = sha256_hex(&bytes);
    let contents = String::from_utf8(bytes)
        .map_err(|error| anyhow!("calibration text {}: {error}", text.display()))?;
    let json = HfFolder::open(source)?.tokenizer_json()?;
    let json = json.with_context(|| {
        format!("{}: calibration needs a tokenizer.json, found none", source.display())
    })?;
    let tokenizer = Tokenizer::from_json(&json)?;
    Ok(Calibration { text_sha256, ids: tokenizer.encode(&contents, Specials::AsText)? })
}
