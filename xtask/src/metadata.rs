//! The workspace's crates and their dependencies, out of `cargo metadata`.

use std::{env, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::layers::Crate;

const PREFIX: &str = "exrail-";

/// Asks cargo for the workspace below `root`.
///
/// # Errors
/// cargo's own failure, or output of another form.
pub(crate) fn read(root: &Path) -> Result<Vec<Crate>> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    parse(&serde_json::from_slice(&output.stdout).context("cargo metadata")?)
}

fn parse(metadata: &Value) -> Result<Vec<Crate>> {
    let packages = metadata["packages"].as_array().context("cargo metadata without packages")?;
    packages.iter().map(parse_package).collect()
}

fn parse_package(package: &Value) -> Result<Crate> {
    let name = package["name"].as_str().context("package without a name")?;
    let dependencies =
        package["dependencies"].as_array().with_context(|| format!("{name}: no dependencies"))?;
    // A build dependency runs at build time but is as real as a normal one; only `dev` is a test's.
    let normal = dependencies
        .iter()
        .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
        .filter_map(|dependency| dependency["name"].as_str()?.strip_prefix(PREFIX))
        .map(str::to_owned)
        .collect();
    Ok(Crate { name: name.strip_prefix(PREFIX).unwrap_or(name).to_owned(), normal })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dev_and_foreign_dependencies_do_not_count() {
        let metadata = serde_json::json!({"packages": [{
            "name": "exrail-engine",
            "dependencies": [
                {"name": "exrail-model", "kind": null},
                {"name": "exrail-hub", "kind": "build"},
                {"name": "exrail-kernels-cpu", "kind": "dev"},
                {"name": "flume", "kind": null},
            ],
        }]});
        let expected = Crate { name: "engine".into(), normal: vec!["model".into(), "hub".into()] };
        assert_eq!(parse(&metadata).unwrap(), [expected]);
    }
}
