//! What a program with feature `faults` can be told to do wrong while it boots.

use std::{str::FromStr, time::Duration};

use anyhow::{Result, bail};
use exrail_server::Phase;

/// Time of a phase that is late and no more.
const LATE: Duration = Duration::from_secs(2);

/// A fault of one phase, as `PHASE=KIND`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootFault {
    phase: String,
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
        let (phase, kind) = text.split_once('=').unwrap_or((text, ""));
        let kind = match kind {
            "late" => Kind::Late,
            "hang" => Kind::Hang,
            "fail" => Kind::Fail,
            "panic" => Kind::Panic,
            other => bail!("expected PHASE=late|hang|fail|panic, found `{other}`"),
        };
        Ok(Self { phase: phase.to_owned(), kind })
    }
}

impl BootFault {
    /// Does it, when its phase has begun.
    pub(crate) fn strike(&self, phase: Phase) -> Result<()> {
        if phase.name() != self.phase {
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
