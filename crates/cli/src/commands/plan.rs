//! `exrail plan`.

use anyhow::Result;
use clap::Args;
use exrail_checkpoint::Checkpoint;
use exrail_engine::{Admission, Change, Fit, Mebibytes, MemoryPlan, Need};
use exrail_hub::Kind;
use exrail_kernels::Extent;
use serde_json::{Value, json};

use crate::{
    Ended,
    device::Planned,
    memory,
    options::{EngineArgs, Sources},
    output::Output,
    progress::Bars,
};

/// Estimate the memory that a model takes on a device, without loading it or needing the device.
///
/// Prints what weights, KV cache, activations and the device itself take, what is free, whether it fits,
/// and if not the smallest change that makes it fit. The commands that load a model refuse by the same
/// arithmetic. Exits 3 when it does not fit.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail plan model.gguf                                 on the device that would be chosen
  exrail plan model.gguf --device cuda:0 --memory 24GiB  on a card that is elsewhere
  exrail plan model.gguf --max-context 32768 --kv int8   with the options of serve")]
pub(crate) struct Plan {
    /// Generator: a name of the registry, a GGUF file or a Hugging Face folder.
    #[arg(value_name = "MODEL")]
    planned: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sources: Sources,
}

impl Plan {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let name = self.planned.as_deref().unwrap_or(&self.engine.model);
        let mut bars = Bars::new(*output);
        let model = self.sources.resolve(name, Kind::Generator, &mut bars)?;
        bars.clear();
        let planned = Planned::of(self.engine.device, self.engine.cpu(), self.engine.memory);
        let admission = Admission {
            device: planned.footprint,
            free: planned.free,
            need: Need::Engine(self.engine.engine()),
        };
        let (checkpoint, load) = (Checkpoint::open(&model.path)?, self.engine.load());
        let plan = admission.plan(&checkpoint, load)?;
        let fit = plan.fit(admission.free.as_ref());
        let change = match fit {
            Fit::MayFit { .. } | Fit::DoesNotFit { .. } => {
                admission.smallest_change(&checkpoint, load)?
            }
            Fit::Fits { .. } | Fit::NotAvailable => None,
        };
        let told = Told {
            model: &model.name,
            device: planned.device.to_string(),
            plan: &plan,
            admission: &admission,
            why: planned.why,
            fit,
            change,
        };
        output.value(&told.value());
        told.print(*output);
        Ok(match fit {
            Fit::DoesNotFit { .. } => Ended::NotPassed,
            Fit::Fits { .. } | Fit::MayFit { .. } | Fit::NotAvailable => Ended::Done,
        })
    }
}

/// A plan with what is said of it.
struct Told<'a> {
    model: &'a str,
    device: String,
    plan: &'a MemoryPlan,
    admission: &'a Admission<'a>,
    why: Option<String>,
    fit: Fit,
    change: Option<Change>,
}

impl Told<'_> {
    fn value(&self) -> Value {
        let extent = |bytes: Extent| json!({ "least": bytes.least, "most": bytes.most });
        let part =
            |(what, bytes): (String, Extent)| json!({ "what": what, "bytes": extent(bytes) });
        let (verdict, left, short) = match self.fit {
            Fit::Fits { left } => ("fits", Some(left), None),
            Fit::MayFit { short } => ("may_fit", None, Some(short)),
            Fit::DoesNotFit { short } => ("does_not_fit", None, Some(short)),
            Fit::NotAvailable => ("not_available", None, None),
        };
        json!({
            "model": self.model,
            "device": self.device,
            "parts": self.plan.parts().into_iter().map(part).collect::<Vec<_>>(),
            "total_bytes": extent(self.plan.total()),
            "reserve_basis": self.plan.reserve.basis,
            "kv_pages": self.plan.kv.n_pages,
            "host_tier_bytes": self.plan.host_tier_bytes,
            "free_bytes": self.admission.free.as_ref().map(|free| free.bytes),
            "free_basis": self.admission.free.as_ref().map(|free| &free.basis),
            "verdict": verdict,
            "left_bytes": left,
            "short_bytes": short,
            "reason": self.why,
            "change": self.change.map(|change| json!({
                "options": memory::options_of(&change),
                "total_bytes": change.total,
            })),
        })
    }

    fn print(&self, output: Output) {
        output.line(format!("{} on {}", self.model, self.device));
        for (what, bytes) in self.plan.parts() {
            row(output, &what, bytes, "");
        }
        row(output, "total", self.plan.total(), "");
        if let Some(free) = &self.admission.free {
            row(output, "free", Extent::exactly(free.bytes), &format!("  {}", free.basis));
        }
        output.line(format!("  reserve: {}", self.plan.reserve.basis));
        if !self.plan.is_host && self.plan.host_tier_bytes > 0 {
            let bytes = Mebibytes(self.plan.host_tier_bytes);
            output.line(format!(
                "  the second tier of the KV cache takes {bytes} of the host's memory"
            ));
        }
        output.line(match self.fit {
            Fit::Fits { left } => format!("fits, {} left", Mebibytes(left)),
            Fit::MayFit { short } => format!(
                "may fit: at worst {} lack; neighbouring blocks that share their scale take less, \
                 which only the weights say",
                Mebibytes(short)
            ),
            Fit::DoesNotFit { short } => format!("does not fit, {} lack", Mebibytes(short)),
            Fit::NotAvailable => {
                let why = self.why.as_deref().unwrap_or(memory::UNKNOWN);
                format!("not_available: {why}")
            }
        });
        match (&self.change, self.fit) {
            (Some(change), _) => {
                let options = memory::options_of(change);
                output.line(format!("fits with {options}: {}", Mebibytes(change.total)));
            }
            (None, Fit::DoesNotFit { .. }) => {
                output.line("no context, KV cache or rounding makes it fit");
            }
            (None, Fit::Fits { .. } | Fit::MayFit { .. } | Fit::NotAvailable) => {}
        }
    }
}

fn row(output: Output, what: &str, bytes: Extent, note: &str) {
    let Extent { least, most } = bytes;
    let most = Mebibytes(most);
    let range =
        if least == bytes.most { String::new() } else { format!("{} to ", Mebibytes(least)) };
    output.line(format!("  {what:44} {range}{most:>12}{note}"));
}
