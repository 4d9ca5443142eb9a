//! `exrail-bench cpu`: both sides in turns (A B A B …), each run in a fresh process on an idle machine.

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use exrail_metrics::median;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    machine::{self, Busy},
    once::{OnceArguments, Run},
    peer, record,
};

#[derive(Debug, Args)]
pub(crate) struct CpuArguments {
    #[command(flatten)]
    test: OnceArguments,
    /// The llama-bench program
    #[arg(long)]
    peer: PathBuf,
    /// Runs of each side
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Where the record goes
    #[arg(long, default_value = "bench/record")]
    record: PathBuf,
    /// Seconds to wait for an idle machine before each run
    #[arg(long, default_value_t = 300)]
    patience_s: u64,
    /// Measure on a busy machine; the record says so
    #[arg(long)]
    allow_busy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Side {
    Exrail,
    LlamaCpp,
}

/// One process of one side.
#[derive(Debug, Serialize)]
struct Turn {
    round: usize,
    side: Side,
    /// Share of idle time in the second before, in [0, 1].
    idle_before: f64,
    #[serde(flatten)]
    run: Run,
}

/// Medians over all repetitions of one side, tokens per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Medians {
    prefill: f64,
    decode: f64,
}

pub(crate) fn run(arguments: &CpuArguments) -> Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: expected at least 1, found 0");
    let busy = if arguments.allow_busy { Busy::Accept } else { Busy::Refuse };
    let patience = Duration::from_secs(arguments.patience_s);
    let mut turns = Vec::new();
    for round in 1..=arguments.rounds {
        for side in [Side::Exrail, Side::LlamaCpp] {
            let idle_before = machine::wait_until_idle(patience, busy)?;
            let run = match side {
                Side::Exrail => run_ours(&arguments.test)?,
                Side::LlamaCpp => peer::run(&arguments.peer, &arguments.test)?,
            };
            turns.push(Turn { round, side, idle_before, run });
        }
    }
    let (ours, theirs) = (medians(&turns, Side::Exrail)?, medians(&turns, Side::LlamaCpp)?);
    let bandwidth = machine::read_bandwidth(arguments.test.threads);
    print_table(arguments, &turns, (ours, theirs), bandwidth)?;
    let record = to_record(arguments, &turns, (ours, theirs), bandwidth);
    let path = record::write(&arguments.record, "cpu", &record)?;
    writeln!(io::stdout(), "record: {}", path.display())?;
    Ok(())
}

/// Our side in a process of its own, as the other side is: neither finds the caches or the idle
/// threads that the other left.
fn run_ours(arguments: &OnceArguments) -> Result<Run> {
    let output = Command::new(env::current_exe().context("own program")?)
        .arg("cpu-once")
        .arg("--model")
        .arg(&arguments.model)
        .args(["--threads", &arguments.threads.to_string()])
        .args(["--prompt-tokens", &arguments.prompt_tokens.to_string()])
        .args(["--generated-tokens", &arguments.generated_tokens.to_string()])
        .args(["--repetitions", &arguments.repetitions.to_string()])
        .output()
        .context("own program")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "our side: {}: {}", output.status, told.trim());
    serde_json::from_slice(&output.stdout).context("our side: expected JSON")
}

fn medians(turns: &[Turn], side: Side) -> Result<Medians> {
    let all = |rates: fn(&Run) -> &Vec<f64>| -> Vec<f64> {
        let turns = turns.iter().filter(|turn| turn.side == side);
        turns.flat_map(|turn| rates(&turn.run)).copied().collect()
    };
    Ok(Medians {
        prefill: median(&all(|run| &run.prefill))?,
        decode: median(&all(|run| &run.decode))?,
    })
}

fn print_table(
    arguments: &CpuArguments,
    turns: &[Turn],
    (ours, theirs): (Medians, Medians),
    bandwidth: f64,
) -> Result<()> {
    let test = &arguments.test;
    let (prefill, decode) =
        (format!("pp{}", test.prompt_tokens), format!("tg{}", test.generated_tokens));
    let model = record::last_part(&test.model.to_string_lossy());
    let mut out = io::stdout().lock();
    writeln!(out, "{model}, {} threads, {}", test.threads, machine::processor())?;
    writeln!(out, "round  side       idle    {prefill:>7} tok/s  {decode:>7} tok/s")?;
    for turn in turns {
        let one = medians(std::slice::from_ref(turn), turn.side)?;
        let name = match turn.side {
            Side::Exrail => "exrail",
            Side::LlamaCpp => "llama.cpp",
        };
        let idle = turn.idle_before * 100.0;
        writeln!(
            out,
            "{:>5}  {name:<9} {idle:>5.1} % {:>14.1} {:>14.1}",
            turn.round, one.prefill, one.decode
        )?;
    }
    writeln!(
        out,
        "exrail / llama.cpp, medians: {prefill} {:.2}x, {decode} {:.2}x",
        ours.prefill / theirs.prefill,
        ours.decode / theirs.decode
    )?;
    if let Some(bytes) = weight_bytes(turns) {
        let rate = ours.decode * bytes as f64;
        writeln!(
            out,
            "decode reads {:.1} GB/s of weights, {:.0} % of the {:.1} GB/s that {} threads read \
             from memory",
            rate / 1e9,
            rate / bandwidth * 100.0,
            bandwidth / 1e9,
            test.threads
        )?;
    }
    Ok(())
}

fn weight_bytes(turns: &[Turn]) -> Option<u64> {
    turns.iter().find_map(|turn| turn.run.weight_bytes)
}

fn to_record(
    arguments: &CpuArguments,
    turns: &[Turn],
    (ours, theirs): (Medians, Medians),
    bandwidth: f64,
) -> Value {
    let test = &arguments.test;
    let mut record = record::head("cpu");
    record["model"] = record::last_part(&test.model.to_string_lossy()).into();
    record["threads"] = test.threads.into();
    record["prompt_tokens"] = test.prompt_tokens.into();
    record["generated_tokens"] = test.generated_tokens.into();
    record["allow_busy"] = arguments.allow_busy.into();
    record["turns"] = json!(turns);
    record["median_tokens_per_s"] = json!({ "exrail": ours, "llama_cpp": theirs });
    record["ratio"] = json!({
        "prefill": ours.prefill / theirs.prefill,
        "decode": ours.decode / theirs.decode,
    });
    record["read_bandwidth_bytes_per_s"] = json!(bandwidth);
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_taken_over_the_repetitions_of_one_side() {
        let turn = |side, decode: &[f64]| Turn {
            round: 1,
            side,
            idle_before: 1.0,
            run: Run { prefill: vec![1.0], decode: decode.to_vec(), ..Run::default() },
        };
        let turns = [
            turn(Side::Exrail, &[10.0, 30.0]),
            turn(Side::LlamaCpp, &[5.0]),
            turn(Side::Exrail, &[20.0]),
        ];
        assert_eq!(medians(&turns, Side::Exrail).unwrap(), Medians { prefill: 1.0, decode: 20.0 });
        assert_eq!(medians(&turns, Side::LlamaCpp).unwrap().decode, 5.0);
    }
}
