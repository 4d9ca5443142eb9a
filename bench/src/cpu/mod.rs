//! `exrail-bench cpu`: this program and llama.cpp on the same files, in turns (A B A B …), every run
//! in fresh processes on an idle machine; one record with the ratios and the gates.

mod exrail;
mod gates;
mod peer;
mod reading;
mod report;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use exrail_checkpoint::sha256_file;
use serde::Serialize;
use serde_json::{Value, json};

use self::{
    exrail::Ours,
    gates::Gate,
    peer::Peers,
    reading::{Comparison, Reading, compare},
};
use crate::{
    machine::{self, Busy},
    record,
};

/// Seconds over which the idle share before the first run is taken.
const START_WINDOW: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(crate) struct CpuArguments {
    /// The GGUF files
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// The exrail program
    #[arg(long)]
    exrail: PathBuf,
    /// Folder of llama-bench, llama-batched-bench and llama-completion
    #[arg(long)]
    peers: PathBuf,
    #[command(flatten)]
    sizes: Sizes,
    /// Where the record goes
    #[arg(long, default_value = "bench/record")]
    record: PathBuf,
    /// Seconds to wait for an idle machine before each run
    #[arg(long, default_value_t = 60)]
    patience_s: u64,
    /// Measure on a busy machine; the record says so, and the gate on idleness fails
    #[arg(long)]
    force: bool,
}

/// What both sides do.
#[derive(Clone, Debug, Args, Serialize)]
struct Sizes {
    /// Threads of either side
    #[arg(long, default_value_t = 2, value_parser = positive)]
    threads: usize,
    /// Tokens of the prefill test
    #[arg(long, default_value_t = 512, value_parser = positive)]
    prompt: usize,
    /// Tokens of each sequence in the decode tests
    #[arg(long = "gen", default_value_t = 128, value_parser = positive)]
    #[serde(rename = "gen")]
    generated: usize,
    /// Cached positions of the deep decode test
    #[arg(long, default_value_t = 1000, value_parser = positive)]
    depth: usize,
    /// Sequences of the batched decode test
    #[arg(long, default_value_t = 8, value_parser = several)]
    batch: usize,
    /// Turns of each side
    #[arg(long, default_value_t = 5, value_parser = positive)]
    rounds: usize,
    /// Timed repetitions in a turn
    #[arg(long, default_value_t = 1, value_parser = positive)]
    repeat: usize,
}

fn positive(text: &str) -> Result<usize, String> {
    at_least(1, text)
}

fn several(text: &str) -> Result<usize, String> {
    at_least(2, text)
}

fn at_least(least: usize, text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().map_err(|error| error.to_string())?;
    (number >= least).then_some(number).ok_or(format!("expected at least {least}"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Side {
    Exrail,
    LlamaCpp,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Exrail => "exrail",
            Side::LlamaCpp => "llama.cpp",
        }
    }
}

/// One run of one side.
#[derive(Clone, Debug, Serialize)]
struct Turn {
    round: usize,
    side: Side,
    /// Share of idle time in the second before, in [0, 1].
    idle_before: f64,
    /// Share of time that the hypervisor gave to others during the run, in [0, 1].
    stolen: f64,
    readings: Vec<Reading>,
}

/// A file's share of the record.
#[derive(Debug, Serialize)]
struct ModelReport {
    model: String,
    file_bytes: u64,
    sha256: String,
    /// Why a side could not run it; then there is nothing to compare.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    /// What `exrail bench --json` said of it in the first round.
    #[serde(skip_serializing_if = "Value::is_null")]
    exrail: Value,
    turns: Vec<Turn>,
    comparisons: Vec<Comparison>,
    gates: Vec<Gate>,
}

/// Whether every gate passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Fail,
}

pub(crate) fn run(arguments: &CpuArguments) -> Result<Verdict> {
    let ours = Ours { program: &arguments.exrail, sizes: &arguments.sizes };
    let peers = Peers { folder: &arguments.peers, sizes: &arguments.sizes };
    let busy = if arguments.force { Busy::Accept } else { Busy::Refuse };
    let patience = Duration::from_secs(arguments.patience_s);
    let programs = json!({ "exrail": ours.describe()?, "llama_cpp": peers.describe()? });
    let idle_at_start = machine::wait_until_idle(START_WINDOW, patience, busy)?;
    let mut models = Vec::new();
    for model in &arguments.models {
        let report = measure(&ours, &peers, model, &|| {
            machine::wait_until_idle(Duration::from_secs(1), patience, busy)
        })?;
        report::tell(&mut io::stdout().lock(), &report)?;
        models.push(report);
    }
    let turns = models.iter().flat_map(|model| &model.turns);
    let least_idle = turns.map(|turn| turn.idle_before).fold(idle_at_start, f64::min);
    let idle = Gate::idle(least_idle);
    let passes = idle.passes() && models.iter().all(|m| m.gates.iter().all(Gate::passes));
    let verdict = if passes { Verdict::Pass } else { Verdict::Fail };

    let mut record = record::head("cpu");
    record["machine"] = models.iter().find_map(|m| m.exrail.get("machine")).cloned().into();
    record["programs"] = programs;
    record["sizes"] = json!(arguments.sizes);
    record["idle"] = json!({
        "at_start": idle_at_start,
        "least_before_a_run": least_idle,
        "not_idle_accepted": arguments.force,
    });
    record["verdict"] = json!(if passes { "pass" } else { "fail" });
    record["gates"] = json!([idle]);
    record["models"] = json!(models);
    let path = record::write(&arguments.record, "cpu", &record)?;
    let page = report::page(&record, &models, &idle)?;
    let beside = path.with_extension("md");
    std::fs::write(&beside, &page).with_context(|| beside.display().to_string())?;
    let mut out = io::stdout().lock();
    report::gates(&mut out, &models, &idle)?;
    writeln!(out, "record: {} and .md", path.display())?;
    Ok(verdict)
}

/// All turns of one file. A side that refuses it is told in the report and ends this file only.
fn measure(
    ours: &Ours<'_>,
    peers: &Peers<'_>,
    path: &Path,
    wait: &dyn Fn() -> Result<f64>,
) -> Result<ModelReport> {
    let model = record::last_part(&std::path::absolute(path)?.to_string_lossy());
    let file_bytes = std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
    ensure!(file_bytes > 0, "{}: expected a GGUF file, found no bytes", path.display());
    let sha256 = sha256_file(path, &mut |_| Ok(())).with_context(|| path.display().to_string())?;
    let mut report = ModelReport {
        model,
        file_bytes,
        sha256,
        refused: None,
        exrail: Value::Null,
        turns: Vec::new(),
        comparisons: Vec::new(),
        gates: Vec::new(),
    };
    for round in 1..=ours.sizes.rounds {
        for side in [Side::Exrail, Side::LlamaCpp] {
            report::progress(&report.model, round, side)?;
            let idle_before = wait()?;
            let before = machine::ticks()?;
            let readings = match side {
                Side::Exrail => ours.run(path).map(|(readings, told)| {
                    if round == 1 {
                        report.exrail = told;
                    }
                    readings
                }),
                Side::LlamaCpp => peers.run(path, round),
            };
            let stolen = before.stolen_until(machine::ticks()?);
            match readings {
                Ok(readings) => {
                    report.turns.push(Turn { round, side, idle_before, stolen, readings });
                }
                Err(error) => {
                    // A record names no folder of a machine.
                    let reason = format!("{}: {error:#}", side.name());
                    report.refused = Some(reason.replace(&*path.to_string_lossy(), &report.model));
                    report.gates = gates::of(&[], ours.sizes);
                    return Ok(report);
                }
            }
        }
    }
    report.comparisons = compare(&report.turns)?;
    report.gates = gates::of(&report.comparisons, ours.sizes);
    Ok(report)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        cpu: CpuArguments,
    }

    #[test]
    fn sizes_without_a_measurement_are_refused_by_name() {
        let needed = ["cpu", "a.gguf", "--exrail", "exrail", "--peers", "bin"];
        assert!(Line::try_parse_from(needed).is_ok());
        let options =
            ["--threads", "--prompt", "--gen", "--depth", "--batch", "--rounds", "--repeat"];
        for option in options {
            let line = [&needed[..], &[option, "0"]].concat();
            let error = Line::try_parse_from(line).unwrap_err().to_string();
            assert!(error.contains(option) && error.contains("at least"), "{error}");
        }
        // One sequence is no batch to compare with one sequence.
        assert!(Line::try_parse_from([&needed[..], &["--batch", "1"]].concat()).is_err());
        assert!(Line::try_parse_from(&needed[..1]).is_err());
    }
}
