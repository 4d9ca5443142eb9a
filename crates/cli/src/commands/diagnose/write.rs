//! Where a diagnosis goes: its observations, its trace, its pages.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use exrail_server::{Services, TraceLog};
use exrail_verify::Diagnosis;
use serde_json::Value;

use crate::{commands::serve, load::CollectionSpec, paths};

/// Writes the observations, one JSON object a line, and returns where they are.
pub(super) fn observations(
    asked: Option<&Path>,
    diagnosis: &Diagnosis,
    observed: &[Value],
) -> Result<PathBuf> {
    let path = match asked {
        Some(path) => path.to_owned(),
        None => paths::data()?.join(format!("traces/{}.observations.jsonl", diagnosis.trace_id)),
    };
    let mut text = String::new();
    for line in observed {
        text.push_str(&line.to_string());
        text.push('\n');
    }
    file(&path, &text)?;
    Ok(path)
}

/// Appends the report to the log of diagnoses as a `probe.run`.
pub(super) fn trace(
    services: &Services,
    spec: &CollectionSpec,
    trace_id: &str,
    report: &Value,
) -> Result<()> {
    // A log of its own: a server may be writing into the other one.
    let log = TraceLog::open(&paths::data()?.join("traces/diagnose.jsonl"))?;
    let appended = log.append_probe(services, &spec.name, (trace_id, report.clone()));
    Ok(serve::runtime()?.block_on(appended)?)
}

/// Writes a file whole or not at all.
pub(super) fn file(path: &Path, text: &str) -> Result<()> {
    let shown = || format!("file {}", path.display());
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(shown)?;
    }
    let partial = path.with_extension("partial");
    let written = std::fs::File::create(&partial)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        drop(std::fs::remove_file(&partial));
    }
    written.with_context(shown)
}
