//! `exrail bench`: how fast a model runs on this machine, and what it costs in memory.
//!
//! This process only plans and tells. Every model is measured in processes of its own ([`child`]):
//! `repeat` that load it and give one token ([`first_token`]), and one for speed ([`speed`]), so
//! that neither memory nor caches of one measurement reach the next, and a model that cannot be
//! loaded ends nothing but its own row. Neither server nor sampling is measured, but for what guards
//! cost ([`guards`]), which an engine has to run for.

mod child;
mod first_token;
mod guards;
mod plan;
pub(super) mod process;
mod record;
mod speed;
mod table;
mod weights;

use std::path::Path;

use anyhow::Result;
use clap::{Args, ValueEnum};
use exrail_hub::Kind;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::{
    plan::{Plan, Workload},
    record::{FirstTokens, GuardsCost, Measured, ModelRecord, Spread},
    weights::Weights,
};
use crate::{
    Ended,
    options::{DEFAULT_MODEL, Sources},
    output::Output,
    progress::Bars,
};

/// Measure prefill, decode, load time and memory of models on this machine.
///
/// Prints tokens per second (median, smallest and largest of the repetitions), bytes that decode
/// streams a second and their share of what the same threads read from memory, the time from
/// process start to the first token, and resident memory. A model that cannot be loaded is told
/// with its reason; the others are measured, and the exit code is 1.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail bench                                     the default model, 512 and 128 tokens
  exrail bench a.gguf b.gguf --threads 8           two files, 8 threads
  exrail bench a.gguf --prompt 128,512,2048        prefill of three lengths
  exrail bench a.gguf --depth 0,1000 --batch 1,8   decode at 4 combinations
  exrail bench a.gguf --json > a.json              everything, with every sample
  exrail bench a.gguf --guards --batch 1,8 --repeat 30
                                                   what the inline guards cost")]
pub(crate) struct Bench {
    /// Generators: names of the registry or GGUF files. The default model when absent.
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    #[command(flatten)]
    workload: Workload,
    #[command(flatten)]
    sources: Sources,
    /// Measure instead what the inline guards cost: answers with all of them and without any, in turns.
    #[arg(long, conflicts_with = "depth")]
    guards: bool,
    /// What a child process of this command does.
    #[arg(long, value_enum, hide = true)]
    part: Option<Part>,
}

/// One process's share of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Part {
    /// Load, give one token, end.
    FirstToken,
    /// Load, then prefill and decode.
    Speed,
    /// Load twice, then answer with and without guards.
    Guards,
}

impl Bench {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let plan = self.workload.plan()?;
        if let Some(part) = self.part {
            let path = self.models.first().map_or("", String::as_str);
            output.value(&child::answer(part, &plan, Path::new(path))?);
            return Ok(Ended::Done);
        }
        let mut bars = Bars::new(*output);
        let names: Vec<&str> = match self.models.as_slice() {
            [] => vec![DEFAULT_MODEL],
            names => names.iter().map(String::as_str).collect(),
        };
        let records: Vec<ModelRecord> =
            names.iter().map(|name| self.model(name, &plan, &mut bars, *output)).collect();
        bars.clear();
        output.value(&json!({
            "kind": "bench",
            "version": 1,
            "program": format!("exrail {}", env!("CARGO_PKG_VERSION")),
            "date": jiff::Timestamp::now().to_string(),
            "machine": process::machine(),
            "plan": plan,
            "models": records,
        }));
        let refused = records.iter().any(|record| matches!(record, ModelRecord::Refused { .. }));
        Ok(if refused { Ended::Incomplete } else { Ended::Done })
    }

    /// Measures one model and prints its table, or the reason why it cannot be measured.
    fn model(&self, name: &str, plan: &Plan, bars: &mut Bars, output: Output) -> ModelRecord {
        let measured = if self.guards {
            self.measure_guards(name, plan, bars).map(ModelRecord::Guards)
        } else {
            self.measure(name, plan, bars).map(Box::new).map(ModelRecord::Measured)
        };
        bars.clear();
        match measured {
            Ok(record) => {
                match &record {
                    ModelRecord::Measured(measured) => table::print(output, plan, measured),
                    ModelRecord::Guards(cost) => table::print_guards(output, cost),
                    ModelRecord::Refused { .. } => {}
                }
                record
            }
            Err(error) => {
                let model = process::last_part(name);
                // A record names no folder of a machine.
                let refused = crate::output::explain(&error).replace(name, &model);
                output.line(format!("{model}\n  refused: {refused}\n"));
                ModelRecord::Refused { model, refused }
            }
        }
    }

    fn measure_guards(&self, name: &str, plan: &Plan, bars: &mut Bars) -> Result<GuardsCost> {
        let path = self.sources.resolve(name, Kind::Generator, bars)?.path;
        bars.clear();
        let shown = process::last_part(&path.to_string_lossy());
        GuardsCost::new(shown, child::guards(plan, &path)?)
    }

    fn measure(&self, name: &str, plan: &Plan, bars: &mut Bars) -> Result<Measured> {
        let path = self.sources.resolve(name, Kind::Generator, bars)?.path;
        let weights = Weights::of(&path)?;
        // Not counted: it brings the file into the page cache, and the memory of a virtual machine
        // back that its host took while it was idle.
        child::first_token(plan, &path)?;
        let mut runs = Vec::with_capacity(plan.repeat);
        for index in 0..plan.repeat {
            bars.bench("first token", index, plan.repeat);
            runs.push(child::first_token(plan, &path)?);
        }
        bars.clear();
        let speed = child::speed(plan, &path)?;
        let first = FirstTokens {
            process_s: Spread::of(runs.iter().map(|run| run.process_s).collect())?,
            load_s: Spread::of(runs.iter().map(|run| run.inside.load_s).collect())?,
            first_token_s: Spread::of(runs.iter().map(|run| run.inside.first_token_s).collect())?,
        };
        let inside = runs.swap_remove(0).inside;
        let shown = process::last_part(&path.to_string_lossy());
        Measured::new(shown, &weights, first, inside, speed)
    }
}
