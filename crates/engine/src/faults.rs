//! Faults on demand: in tests, and with feature `faults` in a running engine, where they come one at a time
//! from a seed. In any other build every question is answered `false` by a constant, and nothing of it is
//! left.
//!
//! [`FaultBoard`] is shared: whoever injects takes the fault from it, and the guard that catches it says so there.
//! The engine's thread alone decides what comes next ([`Switchboard::advance`]): the next fault waits until
//! the last one was caught, so that nobody else's guard can be taken for its own.

#[cfg(any(test, feature = "faults"))]
mod board;
#[cfg(not(any(test, feature = "faults")))]
#[path = "faults/absent.rs"]
mod board;

use std::time::Duration;

pub use self::board::FaultBoard;
pub(crate) use self::board::Switchboard;

/// One kind of fault, counted; none is ever made in a build that injects nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectedFaults {
    /// Which.
    pub fault: Fault,
    /// How many were injected.
    pub injected: u64,
    /// How many of them a guard caught.
    pub caught: u64,
    /// How many found nobody whom they could hit.
    pub unmet: u64,
    /// Most steps from an injection to its guard.
    pub slowest_steps: u64,
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A reader of a shared page is not counted.
    SkipReference,
    /// The next allocation gets a page that somebody holds.
    ReuseEarly,
    /// A page that becomes free keeps its generation.
    KeepGeneration,
    /// A bit of a token of a cached page is another.
    FlipToken,
    /// A bit of a page's record is another.
    FlipRecord,
    /// The pool gives no pages although there are some.
    FailAllocation,
    /// The logits of one row are no numbers.
    Nan,
    /// Each step with one sequence in it panics.
    Panic,
    /// A step takes longer.
    Delay,
    /// A step takes longer than the watchdog waits.
    Hang,
    /// A trace record is written in part.
    BreakTrace,
    /// All contents have one hash. Of tests only, as the following are.
    OneHash,
    /// A content is taken by its hash alone.
    TrustHash,
    /// The tenant is no part of the namespace.
    OneTenant,
}

/// Who catches a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The checks of the page books (G-17).
    Pages,
    /// The look at each token's logits.
    Numbers,
    /// The boundary of a step.
    Panics,
    /// The look at each write of the trace log (G-14).
    Traces,
}

impl Fault {
    /// Its name in `/metrics`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Fault::SkipReference => "skip_reference",
            Fault::ReuseEarly => "reuse_early",
            Fault::KeepGeneration => "keep_generation",
            Fault::FlipToken => "flip_token",
            Fault::FlipRecord => "flip_record",
            Fault::FailAllocation => "fail_allocation",
            Fault::Nan => "nan",
            Fault::Panic => "panic",
            Fault::Delay => "delay",
            Fault::Hang => "hang",
            Fault::BreakTrace => "break_trace",
            Fault::OneHash => "one_hash",
            Fault::TrustHash => "trust_hash",
            Fault::OneTenant => "one_tenant",
        }
    }

    /// Who is to catch it. `None`: nobody inside, because a late step is no broken one; what a hanging step
    /// does to `/livez` is seen from outside.
    #[must_use]
    pub fn guard(self) -> Option<Guard> {
        match self {
            Fault::SkipReference
            | Fault::ReuseEarly
            | Fault::KeepGeneration
            | Fault::FlipToken
            | Fault::FlipRecord
            | Fault::FailAllocation => Some(Guard::Pages),
            Fault::Nan => Some(Guard::Numbers),
            Fault::Panic => Some(Guard::Panics),
            Fault::BreakTrace => Some(Guard::Traces),
            Fault::Delay | Fault::Hang | Fault::OneHash | Fault::TrustHash | Fault::OneTenant => {
                None
            }
        }
    }
}

/// How faults are injected into a running engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultPlan {
    /// Of their order and distances.
    pub seed: u64,
    /// Time of a step that hangs.
    pub hang: Duration,
    /// Whether the checks of the page books find nothing, whatever there is: what users then see.
    pub guards: Guards,
}

/// Whether guards look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guards {
    /// As always.
    On,
    /// Those of the page books do not.
    Off,
}
