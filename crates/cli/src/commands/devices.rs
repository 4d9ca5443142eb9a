//! `exrail devices`.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::{Ended, device, output::Output};

/// List what `--device` can name on this machine, and say why there is no GPU among it.
#[derive(Debug, Args)]
pub(crate) struct Devices {}

impl Devices {
    #[expect(clippy::unused_self, reason = "every command has this method")]
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let (listed, no_gpu) = device::list()?;
        for entry in &listed {
            output.line(format!("{:8} {}", entry.device, entry.detail));
        }
        if let Some(why) = &no_gpu {
            output.note(why);
        }
        output.value(&json!({ "devices": listed, "no_gpu": no_gpu }));
        Ok(Ended::Done)
    }
}
