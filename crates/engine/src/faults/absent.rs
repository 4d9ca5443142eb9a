//! What is left of the switchboard in a build that injects nothing: constants.

use std::sync::Arc;
use std::time::Duration;

use exrail_kernels::PageId;

use super::{Fault, FaultPlan, Guard, InjectedFaults};

/// Nothing.
#[derive(Debug, Default)]
pub struct FaultBoard;

impl FaultBoard {
    /// Never.
    #[must_use]
    pub const fn takes(&self, _: Fault) -> bool {
        false
    }

    /// Nothing to note.
    pub const fn caught(&self, _: Guard) {}

    /// None.
    #[must_use]
    pub const fn counts(&self) -> Vec<InjectedFaults> {
        Vec::new()
    }
}

/// Nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Switchboard;

#[expect(clippy::unused_self, reason = "the same calls as with faults, without a state")]
impl Switchboard {
    /// Of a board that has nothing.
    pub(crate) fn new(_: &Arc<FaultBoard>) -> Switchboard {
        Switchboard
    }

    /// Never.
    pub(crate) const fn injects(&self, _: Fault) -> bool {
        false
    }

    /// Never.
    pub(crate) const fn guards_are_off(&self) -> bool {
        false
    }

    /// Nothing to note.
    pub(crate) const fn caught(&self, _: Guard) {}

    /// Nothing is planned.
    pub(crate) const fn advance(&mut self, _: u64) {}

    /// There is no plan.
    pub(crate) const fn follow(&mut self, _: FaultPlan, _: u64, _: usize) {}

    /// Nothing was.
    pub(crate) const fn flips(&mut self, _: PageId) {}

    /// Nothing was.
    pub(crate) const fn gives_up(&mut self, _: PageId) {}

    /// Nobody.
    pub(crate) const fn picks(&mut self, _: u64) {}

    /// Never.
    pub(crate) const fn is_victim(&self, _: u64) -> bool {
        false
    }

    /// None.
    pub(crate) const fn hang(&self) -> Duration {
        Duration::ZERO
    }
}
