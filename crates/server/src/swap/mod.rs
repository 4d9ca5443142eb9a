//! Several generators on one device, one loaded at a time (G-01, G-05, G-25).
//!
//! A request names its model and gets a `Pass` to the engine that computes it, at once when that model is
//! loaded, and otherwise when it has been: what a request computes, names and records is all read from its
//! pass, so that two models cannot mix. While a pass is held its engine is not taken away, until a deadline.
//!
//! `desk.rs` has the rules, without threads or a clock; one thread, `keeper.rs`, owns the desk, and everybody
//! else sends it a message. Another thread at a time loads, by the [`Loader`] of whoever started the server.

mod desk;
mod keeper;
mod lineup;
#[cfg(test)]
mod tests;

use std::{
    error::Error,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use exrail_engine::{SequenceFault, SubmitError};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

pub use self::lineup::{Lineup, ModelState, ModelStatus, Totals};
use self::{
    desk::{Desk, Message, Ticket},
    keeper::Hands,
};
use crate::{
    boot::BootBoard,
    error::ApiError,
    state::{Services, Shelf},
    trace::TraceLog,
};

/// The rules of a server with several generators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwapLimits {
    /// Requests that may wait for their model.
    pub waiting: usize,
    /// Requests of one tenant that may.
    pub tenant_waiting: usize,
    /// A model that has work keeps its turn so long while others are asked for.
    pub turn: Duration,
    /// A model without work keeps it so long, so that a client between two requests does not lose it.
    pub linger: Duration,
    /// Requests that run get so long when their model has to go; then they fail.
    pub drain: Duration,
    /// How long the step may take in which an engine is ended; longer, and it is taken for one that hangs.
    pub stop: Duration,
    /// A model that could not be loaded is not tried again for so long; each further time twice as long.
    pub cool_down: Duration,
    /// Without a request for so long the model is unloaded; never when absent.
    pub idle_unload: Option<Duration>,
}

impl Default for SwapLimits {
    fn default() -> Self {
        Self {
            waiting: 256,
            tenant_waiting: 256,
            turn: Duration::from_secs(10),
            linger: Duration::from_millis(200),
            drain: Duration::from_secs(60),
            stop: Duration::from_secs(30),
            cool_down: Duration::from_secs(15),
            idle_unload: None,
        }
    }
}

/// Loads generators on behalf of a server.
pub trait Loader: Send + Sync + 'static {
    /// Runs every phase of a boot on the call's board, up to the sentinel. Looks first whether the model can
    /// be loaded at all, and calls [`LoadCall::vacate`] before anything of it is put on the device.
    ///
    /// # Errors
    /// A phase failed. Nothing of the model stays loaded then.
    fn load(&self, call: &LoadCall<'_>) -> Result<Services, Box<dyn Error + Send + Sync>>;
}

/// What waits for a place on the device is told when it is free.
type Vacate<'a> = dyn Fn(&mut dyn FnMut()) -> Result<(), NotVacated> + 'a;

/// One call of a [`Loader`].
pub struct LoadCall<'a> {
    /// The model, by its name in requests.
    pub model: &'a str,
    /// The model that is loaded and will be given up for it.
    pub current: Option<&'a str>,
    /// Where its phases are run.
    pub board: &'a Arc<BootBoard>,
    /// What is there already.
    pub shelf: &'a Shelf,
    vacate: &'a Vacate<'a>,
}

impl LoadCall<'_> {
    /// Waits until the loaded model has finished its turn and its requests, and ends it: its memory is free
    /// when this returns. `told` hears every second that this goes on.
    ///
    /// # Errors
    /// See [`NotVacated`]; the load must end then.
    pub fn vacate(&self, told: &mut dyn FnMut()) -> Result<(), NotVacated> {
        (self.vacate)(told)
    }
}

/// The place on the device was not given up.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotVacated {
    /// Whoever asked for the new model has gone.
    #[error("nobody waits for this model any more")]
    NotNeeded,
    /// A step of the old model hangs and holds its memory.
    #[error(
        "the engine of the loaded model did not end within {limit_s} s: a step of it hangs; restart the server"
    )]
    Stuck {
        /// How long it was waited for.
        limit_s: u64,
    },
    /// The server ends.
    #[error("the server ends")]
    Ending,
}

/// The generators that a server may load.
pub struct Fleet {
    /// Their names in requests. The one that is loaded first is added when it is not among them.
    pub names: Vec<String>,
    /// Who loads them; none where the first one is all there is.
    pub loader: Option<Arc<dyn Loader>>,
    /// When.
    pub limits: SwapLimits,
}

impl Fleet {
    /// The model that is loaded, for as long as the server runs.
    #[must_use]
    pub fn of_one() -> Self {
        Self { names: Vec::new(), loader: None, limits: SwapLimits::default() }
    }
}

/// Permission to use a generator. As long as it is held the engine is not taken away, but for a deadline.
pub(crate) struct Pass {
    services: Arc<Services>,
    seat: Arc<SeatMark>,
    desk: flume::Sender<Message>,
}

/// What the passes to one engine share.
#[derive(Debug)]
pub(super) struct SeatMark {
    turn: u64,
    /// Set before an engine is ended that still has requests.
    is_cut: AtomicBool,
    drain: Duration,
}

impl Deref for Pass {
    type Target = Services;

    fn deref(&self) -> &Services {
        &self.services
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        // Without a keeper nobody counts.
        drop(self.desk.send(Message::Done { turn: self.seat.turn }));
    }
}

impl Pass {
    /// The engine itself, for what outlives the request.
    pub(crate) fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// Says of a failure that it comes from the swap, if it does.
    pub(crate) fn explain(&self, error: ApiError) -> ApiError {
        let is_end = matches!(
            error,
            ApiError::Sequence(SequenceFault::Stopped)
                | ApiError::Submit(SubmitError::Stopped)
                | ApiError::Lost
        );
        if is_end && self.seat.is_cut.load(Ordering::Acquire) {
            let (model, limit_s) = (self.services.model_name.clone(), self.seat.drain.as_secs());
            return ApiError::SwappedOut { model, limit_s };
        }
        error
    }
}

/// Who asks for a generator.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asking {
    pub(crate) tenant: Option<String>,
    /// When the answer must be there.
    pub(crate) deadline: Option<Instant>,
}

/// The way to the generators; cheap to clone.
#[derive(Clone)]
pub struct Models {
    desk: flume::Sender<Message>,
    lineup: watch::Receiver<Arc<Lineup>>,
    shelf: Arc<Shelf>,
    limits: SwapLimits,
    /// Seconds since 1970.
    started_at: i64,
    _owner: Arc<Owner>,
}

/// Ends the keeper with the last handle.
struct Owner(flume::Sender<Message>);

impl Drop for Owner {
    fn drop(&mut self) {
        drop(self.0.send(Message::Stop(None)));
    }
}

impl Models {
    /// Starts the keeper of a fleet of which one model is loaded, in so much time.
    pub(crate) fn start(
        loaded: Arc<Services>,
        took: Duration,
        fleet: Fleet,
        traces: TraceLog,
    ) -> Self {
        let (desk, inbox) = flume::unbounded();
        let shelf = Arc::new(Shelf::of(&loaded));
        let (limits, started_at) = (fleet.limits, loaded.loaded_at);
        let rules = Desk::new(loaded, took, fleet.names, limits, desk.clone());
        let (shown, lineup) = watch::channel(Arc::new(rules.lineup()));
        let (loader, stop) = (fleet.loader, limits.stop);
        let hands = Hands::new(desk.clone(), loader, Arc::clone(&shelf), traces, stop);
        keeper::start(rules, inbox, hands, shown);
        Self { _owner: Arc::new(Owner(desk.clone())), desk, lineup, shelf, limits, started_at }
    }

    /// Every model and its state.
    #[must_use]
    pub fn lineup(&self) -> Arc<Lineup> {
        Arc::clone(&self.lineup.borrow())
    }

    /// What does not go with a generator.
    #[must_use]
    pub fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// The rules.
    pub(crate) fn limits(&self) -> SwapLimits {
        self.limits
    }

    /// When the first generator was loaded, in seconds since 1970.
    pub(crate) fn started_at(&self) -> i64 {
        self.started_at
    }

    /// A pass to the model of that name, the first one when absent; waits until it is loaded.
    ///
    /// # Errors
    /// There is no such model, it cannot be loaded, too many wait, or the deadline passes.
    pub(crate) async fn pass(
        &self,
        model: Option<&str>,
        asking: &Asking,
    ) -> Result<Pass, ApiError> {
        let lineup = self.lineup();
        let model = match model {
            None => 0,
            Some(name) => lineup.index(name).ok_or_else(|| ApiError::UnknownModel {
                found: name.into(),
                known: lineup.known(),
            })?,
        };
        drop(lineup);
        // Tells the desk when this future is dropped before its answer came, after the receiver is.
        let mut looks_again = LooksAgain(Some(&self.desk));
        let (reply, answer) = oneshot::channel();
        let Asking { tenant, deadline } = asking.clone();
        let ticket = Ticket { model, tenant, deadline, since: Instant::now(), reply };
        let stopped = || ApiError::Submit(SubmitError::Stopped);
        self.desk.send(Message::Ask(ticket)).map_err(|_| stopped())?;
        let answered = answer.await;
        looks_again.0 = None;
        answered.map_err(|_| stopped())?
    }

    /// Ends the loaded engine and waits for that; requests that still run fail.
    pub fn stop(&self) {
        let (done, ended) = flume::bounded(1);
        if self.desk.send(Message::Stop(Some(done))).is_ok() {
            // Nothing is sent when the keeper has gone already.
            ended.recv().ok();
        }
    }
}

struct LooksAgain<'a>(Option<&'a flume::Sender<Message>>);

impl Drop for LooksAgain<'_> {
    fn drop(&mut self) {
        if let Some(desk) = self.0 {
            drop(desk.send(Message::LookAgain));
        }
    }
}
