//! What a program with feature `faults` can be told to do wrong while it boots.

use std::{str::FromStr, time::Duration};

use anyhow::{Result, bail};
use exrail_server::Phase;

/// Time of a phase that is late and no more.
const LATE: Duration = Duration::from_secs(2);

/// The phases that `load.rs` runs.
const PHASES: [Phase; 13] = [
    Phase::Config,
    Phase::Secrets,
    Phase::Preflight,
    Phase::Device,
    Phase::Weights,
    Phase::Tokenizer,
    Phase::KvPool,
    Phase::WarmUp,
    Phase::Grammar,
    Phase::Encoder,
    Phase::Index,
    Phase::Policy,
    Phase::Sentinel,
];

/// A fault of one phase, as `PHASE=KIND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootFault {
    phase: Phase,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It takes longer, and within its deadline.
    Late,
    /// It never ends, and says nothing.
    Hang,
    /// It says that it cannot have what it needs.
    Fail,
    Panic,
}

impl FromStr for BootFault {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, kind) = text.split_once('=').unwrap_or((text, ""));
        let Some(phase) = PHASES.into_iter().find(|phase| phase.name() == name) else {
            let names = PHASES.map(Phase::name).join(", ");
            bail!("expected a phase that faults are injected in ({names}), found `{name}`");
        };
        let kind = match kind {
            "late" => Kind::Late,
            "hang" => Kind::Hang,
            "fail" => Kind::Fail,
            "panic" => Kind::Panic,
            other => bail!("expected PHASE=late|hang|fail|panic, found `{other}`"),
        };
        Ok(Self { phase, kind })
    }
}

impl BootFault {
    /// Does it, when its phase has begun.
    pub(crate) fn strike(&self, phase: Phase) -> Result<()> {
        if phase != self.phase {
            return Ok(());
        }
        match self.kind {
            Kind::Late => std::thread::sleep(LATE),
            Kind::Hang => loop {
                std::thread::park();
            },
            Kind::Fail => bail!("an allocation was refused, because it was asked to be"),
            Kind::Panic => panic!("injected panic"),
        }
        Ok(())
    }
}
