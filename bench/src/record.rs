//! Records: one JSON file a measurement, kept in `bench/record/`.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::machine;

/// What every record begins with: when, what code, what machine, what command.
pub(crate) fn head(kind: &str) -> Value {
    json!({
        "kind": kind,
        "date": jiff::Timestamp::now().to_string(),
        "commit": machine::commit(),
        "processor": machine::processor(),
        "cores": machine::cores(),
        "command": command(),
    })
}

/// The command line, with paths cut to their last part: a record names no folder of a machine.
fn command() -> Vec<String> {
    env::args().map(|argument| last_part(&argument)).collect()
}

pub(crate) fn last_part(argument: &str) -> String {
    match Path::new(argument).file_name() {
        Some(name) if Path::new(argument).is_absolute() => name.to_string_lossy().into_owned(),
        Some(_) | None => argument.to_owned(),
    }
}

/// Writes `record` to `folder/<kind>-<date>.json` and returns the path.
///
/// # Errors
/// The folder or file cannot be written.
pub(crate) fn write(folder: &Path, kind: &str, record: &Value) -> Result<PathBuf> {
    let stamp = jiff::Timestamp::now().strftime("%Y-%m-%dT%H%M%S");
    let path = folder.join(format!("{kind}-{stamp}.json"));
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let text = format!("{}\n", serde_json::to_string_pretty(record)?);
    fs::write(&path, text).with_context(|| path.display().to_string())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_no_folder_of_the_machine() {
        assert_eq!(last_part("/home/somebody/model.gguf"), "model.gguf");
        assert_eq!(last_part("--threads"), "--threads");
    }
}
