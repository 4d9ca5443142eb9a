//! `exrail pull`.

use anyhow::{Result, anyhow};
use clap::Args;
use exrail_hub::{Cache, Model, Registry};
use serde_json::json;

use crate::{Ended, options::Sources, output::Output, progress::Bars};

/// Download models by name into the cache and check every file.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// Names of the registry; lists the registry when absent.
    names: Vec<String>,
    #[command(flatten)]
    sources: Sources,
}

impl Pull {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let registry = self.sources.registry()?;
        if self.names.is_empty() {
            list(&registry, *output)?;
            return Ok(Ended::Done);
        }
        let cache = Cache::locate()?;
        for name in &self.names {
            let model = registry.model(name).ok_or_else(|| unknown(&registry, name))?;
            let mut bars = Bars::new(*output);
            let folder = cache.pull(model, self.sources.fetch(), &mut bars)?;
            bars.clear();
            let path = model.load.as_ref().map_or(folder.clone(), |load| folder.join(load));
            output.line(format!("{name}: {}", path.display()));
            output.value(&json!({ "name": name, "path": path, "bytes": model.total_bytes() }));
        }
        Ok(Ended::Done)
    }
}

fn unknown(registry: &Registry, name: &str) -> anyhow::Error {
    let known: Vec<_> = registry.models().iter().map(|model| model.name.as_str()).collect();
    anyhow!("model `{name}`: expected one of {}", known.join(", "))
}

fn list(registry: &Registry, output: Output) -> Result<()> {
    let models = registry.models();
    output.value(&serde_json::to_value(models)?);
    for Model { name, kind, title, licence, .. } in models {
        output.line(format!("{name:24} {kind:10} {licence:12} {title}"));
    }
    Ok(())
}
