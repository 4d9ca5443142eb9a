//! Where data lies when no path is given.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// `$EXRAIL_HOME`, else `$XDG_DATA_HOME/exrail`, else `$HOME/.local/share/exrail`.
pub(crate) fn data() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    set(exrail_hub::HOME_VARIABLE)
        .map(PathBuf::from)
        .or_else(|| set("XDG_DATA_HOME").map(|base| PathBuf::from(base).join("exrail")))
        .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".local/share/exrail")))
        .context("no data folder: set EXRAIL_HOME, XDG_DATA_HOME or HOME")
}

/// A collection by name, or the folder itself when a path was given.
pub(crate) fn collection(name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.components().count() > 1 || path.is_dir() {
        return Ok(path.into());
    }
    Ok(data()?.join("collections").join(name))
}

/// The calibration that lies beside a collection.
pub(crate) fn calibration(collection: &Path) -> PathBuf {
    collection.join("calibration.json")
}
