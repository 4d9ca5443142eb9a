//! `exrail preflight`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use exrail_engine::Manifest;
use exrail_hub::Kind;
use serde_json::json;

use crate::{
    Ended,
    options::Sources,
    output::Output,
    preflight::{Declared, hashing, save},
    progress::Bars,
};

/// Compare a model with a manifest of what it was, before its weights are loaded: hashes, shapes, special
/// ids, rotary settings, formats, chat template and the ids of golden texts. Exit code 3 when they differ.
#[derive(Debug, Args)]
pub(crate) struct Preflight {
    /// Generator: a name of the registry, a GGUF file or a Hugging Face folder.
    #[arg(value_name = "NAME|PATH")]
    model: String,
    /// Write the manifest of this model, instead of comparing it with one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["manifest", "force"],
          required_unless_present = "manifest")]
    write: Option<PathBuf>,
    #[command(flatten)]
    declared: Declared,
    #[command(flatten)]
    sources: Sources,
}

impl Preflight {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let mut bars = Bars::new(*output);
        let model = self.sources.resolve(&self.model, Kind::Generator, &mut bars)?;
        if let Some(file) = &self.write {
            return write(&model.path, file, &mut bars, *output);
        }
        let compared = self.declared.compare(&model.path, &mut bars)?;
        let compared = compared.context("expected --manifest FILE or --write FILE")?;
        output.value(&compared.to_json());
        compared.print(*output);
        match compared.verdict() {
            Ok(line) => {
                output.line(line);
                Ok(Ended::Done)
            }
            Err(refused) => {
                output.line(refused);
                Ok(Ended::NotPassed)
            }
        }
    }
}

fn write(model: &Path, file: &Path, bars: &mut Bars, output: Output) -> Result<Ended> {
    let manifest = Manifest::of(model, &mut hashing(model, bars))?;
    bars.clear();
    save(&manifest, file)?;
    output.value(&json!({ "written": file }));
    output.line(format!("written {}; keep it apart from the model", file.display()));
    Ok(Ended::Done)
}
