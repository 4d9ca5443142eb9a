//! `exrail embed`.

use anyhow::{Result, bail};
use clap::Args;
use exrail_hub::Kind;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use serde_json::json;

use crate::{
    Ended, environment, load,
    options::{EncoderArgs, Sources},
    output::Output,
    progress::Bars,
};

/// Print sentence vectors, and the cosine of each text with the first.
#[derive(Debug, Args)]
pub(crate) struct Embed {
    /// The texts.
    #[arg(required = true)]
    texts: Vec<String>,
    /// Threads; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<usize>,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

impl Embed {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let mut bars = Bars::new(*output);
        let found = self.sources.resolve(&self.encoder.encoder, Kind::Encoder, &mut bars)?;
        bars.clear();
        let backend =
            CpuBackend::new(CpuOptions { threads: self.threads, ..CpuOptions::default() })?;
        let encoder = load::load_encoder(backend, &found)?;
        let texts: Vec<&str> = self.texts.iter().map(String::as_str).collect();
        let vectors = encoder.encode(&texts)?;
        let [first, ..] = vectors.as_slice() else { bail!("the encoder returned no vector") };
        for (text, vector) in texts.iter().zip(&vectors) {
            let cosine: f32 = first.iter().zip(vector).map(|(a, b)| a * b).sum();
            output.value(&json!({ "text": text, "cosine": cosine, "vector": vector }));
            let head: Vec<_> = vector.iter().take(4).map(|x| format!("{x:+.4}")).collect();
            output.line(format!("{cosine:+.4}  [{} … {}]  {text}", head.join(" "), vector.len()));
        }
        Ok(Ended::Done)
    }
}
