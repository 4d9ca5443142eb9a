//! The `exrail` binary: parse → resolve → one function per command.
//!
//! Exit codes: 0 done (for `verify`, `diagnose` and `probe`: every gate passes), 1 error, 2 wrong usage or an input that cannot
//! be read, 3 a gate does not pass.

#[cfg(feature = "faults")]
mod boot_fault;
mod commands;
mod device;
mod environment;
mod keys;
mod load;
mod markdown;
mod memory;
mod options;
mod otlp;
mod output;
mod pack;
mod paths;
mod preflight;
mod progress;
mod swap;
mod usage;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::output::Output;

/// A program that can inject faults says so.
const VERSION: &str = if cfg!(feature = "faults") {
    concat!(env!("CARGO_PKG_VERSION"), "+faults")
} else {
    env!("CARGO_PKG_VERSION")
};

/// Serve quantised models behind guardrails, ask documents with traced citations, and measure
/// whether the answers can be trusted.
#[derive(Debug, Parser)]
#[command(name = "exrail", version = VERSION, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 done or passed, 1 error, 2 wrong usage or an input that cannot be \
    read, 3 gate not passed."
)]
struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the OpenAI-compatible API.
    Serve(commands::serve::Serve),
    /// Start what `serve` starts, print each phase, and end; `--plan` only prints the phases.
    Boot(commands::serve::BootCommand),
    /// Talk to a model on the terminal.
    Chat(commands::chat::Chat),
    /// Answer one question from a collection, with citations.
    Ask(commands::ask::Ask),
    /// Read documents into a collection.
    Ingest(commands::ingest::Ingest),
    /// Fit the gate that keeps unanswerable questions out, and store it beside the collection.
    Calibrate(commands::calibrate::Calibrate),
    /// Measure a collection and a model against a gold set and print the report.
    Verify(commands::verify::Verify),
    /// Measure everything once, judge it and name the smallest fix; or compare two such reports.
    Diagnose(Box<commands::diagnose::Diagnose>),
    /// Serve in front of another server: TabbyAPI, text-generation-webui, llama-server, vLLM, Ollama or the like.
    Gateway(commands::gateway::Gateway),
    /// Print what to do about a fault: a page for each guard and each breakpoint.
    Fix(commands::fix::Fix),
    /// Measure one part of a model by itself.
    Probe(commands::probe::Probe),
    /// Print sentence vectors.
    Embed(commands::embed::Embed),
    /// Compare a model with a manifest before its weights are loaded.
    Preflight(commands::preflight::Preflight),
    /// Download models by name.
    Pull(commands::pull::Pull),
    /// Print what a model file holds.
    Inspect(commands::inspect::Inspect),
    /// Quantise a 16-bit Hugging Face folder to int4 or int8.
    Quantize(commands::quantize::Quantize),
    /// Measure speed, load time and memory of models on this machine.
    Bench(commands::bench::Bench),
    /// Drive a server of its own with many clients for a long time, and judge what it did.
    Soak(commands::soak::Soak),
    /// Estimate the memory that a model takes on a device, without loading it.
    Plan(commands::plan::Plan),
    /// Print the JSON Schemas of what exrail writes.
    Schema(commands::schema::Schema),
    /// Check trace logs offline.
    Trace(commands::trace::Trace),
    /// List the devices that models can run on.
    Devices(commands::devices::Devices),
    /// Run everything once on the sample corpus: serve, ingest, ask, verify, report.
    Demo(commands::demo::Demo),
}

/// How a command ended when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Done, or passed.
    Done,
    /// Part of what was asked could not be done, and the output says which and why.
    Incomplete,
    /// A gate did not pass.
    NotPassed,
    /// What was to be looked at cannot be read.
    Unreadable,
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let checked = usage::check(&mut Cli::command(), &matches);
    let cli = checked.and_then(|()| Cli::from_arg_matches(&matches));
    let cli = cli.unwrap_or_else(|error| error.exit());
    let output = Output::new(cli.json);
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env(environment::LOG)
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    match run(cli.command, output) {
        Ok(Ended::Done) => ExitCode::SUCCESS,
        Ok(Ended::Incomplete) => ExitCode::FAILURE,
        Ok(Ended::NotPassed) => ExitCode::from(3),
        Ok(Ended::Unreadable) => ExitCode::from(2),
        Err(error) => {
            output.error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, output: Output) -> anyhow::Result<Ended> {
    let variables: Vec<_> = std::env::vars_os().map(|(name, _)| name).collect();
    environment::refuse_typos(variables.iter().map(OsString::as_os_str))?;
    match command {
        Command::Serve(command) => command.run(&output),
        Command::Boot(command) => command.run(&output),
        Command::Chat(command) => command.run(&output),
        Command::Ask(command) => command.run(&output),
        Command::Ingest(command) => command.run(&output),
        Command::Calibrate(command) => command.run(&output),
        Command::Verify(command) => command.run(&output),
        Command::Diagnose(command) => command.run(&output),
        Command::Gateway(command) => command.run(&output),
        Command::Fix(command) => command.run(&output),
        Command::Probe(command) => command.run(&output),
        Command::Embed(command) => command.run(&output),
        Command::Preflight(command) => command.run(&output),
        Command::Pull(command) => command.run(&output),
        Command::Inspect(command) => command.run(&output),
        Command::Quantize(command) => command.run(&output),
        Command::Bench(command) => command.run(&output),
        Command::Soak(command) => command.run(&output),
        Command::Plan(command) => command.run(&output),
        Command::Schema(command) => command.run(&output),
        Command::Trace(command) => command.run(&output),
        Command::Devices(command) => command.run(&output),
        Command::Demo(command) => command.run(&output),
    }
}
