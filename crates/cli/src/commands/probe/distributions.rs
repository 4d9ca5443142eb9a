//! `exrail probe distributions`: what a loaded model computes against what its manifest says that it did.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use exrail_engine::{EngineHandle, Manifest};
use exrail_hub::Kind;
use exrail_server::oracle::EngineOracle;
use exrail_text::Specials;
use exrail_verify::{GoldenDistributions, GoldenDivergence};
use serde_json::json;

use super::ProbedModel;
use crate::{
    Ended,
    output::Output,
    preflight::{Declared, save},
    progress::Bars,
};

#[derive(Debug, Args)]
pub(super) struct DistributionProbe {
    #[command(flatten)]
    model: ProbedModel,
    /// Manifest of the model, made with `exrail preflight MODEL --write FILE`.
    #[arg(long, value_name = "FILE")]
    manifest: PathBuf,
    /// Write the distributions of the model into the manifest, instead of comparing them.
    #[arg(long)]
    write: bool,
}

impl DistributionProbe {
    pub(super) fn run(&self, output: Output) -> Result<Ended> {
        let mut bars = Bars::new(output);
        let path = self.model.sources.resolve(self.model.name(), Kind::Generator, &mut bars)?.path;
        let declared = Declared { manifest: Some(self.manifest.clone()), force: None };
        let compared = declared.compare(&path, &mut bars)?.context("expected a manifest")?;
        compared.verdict()?;
        let shown = self.manifest.display();
        if !self.write && compared.golden().is_none() {
            anyhow::bail!(
                "manifest {shown}: expected golden distributions, found none; write them with --write"
            );
        }
        let services = self.model.boot(output)?;
        let engine = &services.engine;
        let ended = match compared.golden().filter(|_| !self.write) {
            None => self.write(engine, output),
            Some(golden) => compare(engine, golden, output),
        };
        engine.shutdown();
        ended
    }

    fn write(&self, engine: &EngineHandle, output: Output) -> Result<Ended> {
        let manifest = Manifest::read(&self.manifest)?;
        let tokenizer = engine.tokenizer();
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let text = tokenizer.encode(&manifest.golden_text(), Specials::AsText)?;
        let ids: Vec<u32> = bos.into_iter().chain(text).collect();
        let backend = engine.facts().backend.clone();
        let golden = GoldenDistributions::of(&EngineOracle::new(engine), &ids, backend)?;
        save(&manifest.with_distributions(serde_json::to_value(golden)?), &self.manifest)?;
        output.value(&json!({ "written": self.manifest }));
        output.line(format!("written {}; keep it apart from the model", self.manifest.display()));
        Ok(Ended::Done)
    }
}

fn compare(engine: &EngineHandle, golden: &GoldenDistributions, output: Output) -> Result<Ended> {
    let found = golden.compare(&EngineOracle::new(engine), &mut || ())?;
    let backend = &engine.facts().backend;
    output.value(&json!({ "distributions": found, "device": backend, "passes": found.passes() }));
    let GoldenDivergence { kl, max, behind, limit, made_on } = &found;
    let passes = found.passes();
    output.line(format!("golden             {made_on}"));
    output.line(format!("now                {backend}"));
    output.line(format!(
        "KL                 at most {max:.1e} nats, behind {behind} tokens; limit {limit}, {} places",
        kl.len()
    ));
    output.line(format!("verdict            {}", if passes { "pass" } else { "fail" }));
    Ok(if passes { Ended::Done } else { Ended::NotPassed })
}
