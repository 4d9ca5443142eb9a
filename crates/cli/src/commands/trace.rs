//! `exrail trace`.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use exrail_retrieval::Collection;
use exrail_verify::trace::{LogReport, verify_log};

use crate::{Ended, output::Output, paths};

/// Breaches that are printed for people; `--json` has a thousand.
const SHOWN: usize = 20;

/// Work with trace logs.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    #[command(subcommand)]
    command: TraceCommand,
}

#[derive(Debug, Subcommand)]
enum TraceCommand {
    /// Check a trace log offline: schemas, hashes, spans, citations, order.
    Verify(VerifyLog),
}

/// Check a trace log offline.
///
/// Every line is compared with the published schema of its event, every hash that the log holds the text of is
/// computed again, and spans, citations, counts, the order of records and the agreement of a search with its answer
/// are checked. With a collection, each retrieved snippet is compared with what is stored. Exits 0 when nothing is
/// broken, 1 when something is, and 2 when log or collection cannot be read.
#[derive(Debug, Args)]
struct VerifyLog {
    /// The log, JSON lines as `serve --trace-log` writes them.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The collection that the answers were drawn from: a name or a folder.
    #[arg(long, value_name = "NAME|DIR")]
    collection: Option<String>,
}

impl Trace {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let TraceCommand::Verify(command) = &self.command;
        let report = match command.read() {
            Ok(report) => report,
            Err(error) => {
                output.error(&error);
                return Ok(Ended::Unreadable);
            }
        };
        print(*output, &report, command.collection.is_some());
        output.value(&serde_json::to_value(&report)?);
        Ok(if report.n_breaches == 0 { Ended::Done } else { Ended::Incomplete })
    }
}

impl VerifyLog {
    fn read(&self) -> Result<LogReport> {
        let stored = match &self.collection {
            None => None,
            Some(name) => {
                let dir = paths::collection(name)?;
                let read = Collection::read(&dir);
                Some(read.with_context(|| format!("collection {}", dir.display()))?)
            }
        };
        let read = |path: &Path| verify_log(BufReader::new(File::open(path)?), stored.as_ref());
        read(&self.file).with_context(|| format!("trace log {}", self.file.display()))
    }
}

fn print(output: Output, report: &LogReport, with_collection: bool) {
    output.line(format!("{} records", report.n_lines));
    for (event, n_records) in &report.n_by_event {
        output.line(format!("  {event:18} {n_records:>8}"));
    }
    output.line(format!("\n{:18} {:>8} {:>8}", "rule", "checked", "broken"));
    for count in &report.rules {
        let row = format!("{:18} {:>8} {:>8}", count.rule.name(), count.n_checked, count.n_broken);
        output.line(row);
    }
    for found in report.breaches.iter().take(SHOWN) {
        let trace = found.trace_id.as_deref().unwrap_or("no trace");
        output.line(format!("line {}, {trace}: {}", found.line, found.breach));
    }
    if report.n_breaches > SHOWN {
        output.line(format!("and {} more; --json prints a thousand", report.n_breaches - SHOWN));
    }
    if report.torn_bytes > 0 {
        let n_bytes = report.torn_bytes;
        output.line(format!(
            "{n_bytes} bytes behind the last line break: a writer was killed, and nobody got an answer for them"
        ));
    }
    if !with_collection {
        output.line("stored: not checked, no --collection");
    }
    output.line(match report.n_breaches {
        0 => "nothing is broken".to_owned(),
        n_breaches => format!("{n_breaches} broken"),
    });
}
