//! Checks of the repository that cargo itself does not make: `cargo xtask layers`.
//!
//! Builds and tests are not run from here; the Makefile does that.

mod layers;
mod metadata;
mod table;

use std::{
    env, fs,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: cargo xtask layers   check the crates against ARCHITECTURE.md";

fn main() -> ExitCode {
    let task = env::args().nth(1);
    let result = match task.as_deref() {
        Some("layers") => check_layers(),
        Some(other) => Err(anyhow::anyhow!("unknown task `{other}`\n{USAGE}")),
        None => Err(anyhow::anyhow!("no task given\n{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ignored = writeln!(io::stderr(), "xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Compares the dependencies of all workspace crates with the layer table.
fn check_layers() -> Result<()> {
    let root = repository_root()?;
    let path = root.join("ARCHITECTURE.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let table = table::parse(&text)?;
    let crates = metadata::read(&root)?;
    let violations = layers::check(&table, &crates);
    let mut out = io::stdout().lock();
    if violations.is_empty() {
        let n_edges: usize = crates.iter().map(|entry| entry.normal.len()).sum();
        writeln!(out, "layers: {} crates, {n_edges} dependencies, all downwards", crates.len())?;
        return Ok(());
    }
    for violation in &violations {
        writeln!(out, "layers: {violation}")?;
    }
    bail!("{} violations of the layer table in ARCHITECTURE.md", violations.len())
}

fn repository_root() -> Result<PathBuf> {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.parent().context("xtask lies in the repository")?;
    Ok(root.to_path_buf())
}
