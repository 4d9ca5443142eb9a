//! One upstream: whether it may be asked now, what it has proved, and how much it has to do.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use exrail_wire::Pins;
use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::{
    capability::Capability,
    client::Client,
    detect::Detected,
    fault::{FaultVerdict, UpstreamFault},
};

/// Faults in a row, of any kind, that close the fence.
const FAULTS_IN_A_ROW: u64 = 5;

/// What is given of an upstream.
#[derive(Clone, Debug)]
pub struct UpstreamOptions {
    /// Its name in records and answers.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// Its key.
    pub key: Option<String>,
    /// The model that it has to serve; any when absent.
    pub expected_model: Option<String>,
    /// Upstreams of a lower number are asked first.
    pub priority: u32,
    /// Its share among those of its priority, at least 1.
    pub weight: u32,
}

/// How far the fence of an upstream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FencePhase {
    /// It is looked for.
    Detect,
    /// It generates, and nobody else gets its tokens.
    WarmUp,
    /// It did not do so, and is asked again later.
    Failed,
    /// It may be asked.
    Open,
}

/// What the warm-up of an upstream showed.
#[derive(Clone, Debug, Serialize)]
pub struct WarmUp {
    /// Generations.
    pub generations: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Requests at once, from the first bucket to the last.
    pub buckets: Vec<usize>,
    /// Time to the first event of the very first generation, ms.
    pub first_ms: f64,
    /// The same of the later ones, their median, ms.
    pub warm_ms: f64,
    /// Largest over the buckets of the first one's time over the median of the others.
    pub cold_ratio: f64,
    /// Whether two greedy answers to one prompt were the same.
    pub repeats_itself: bool,
    /// SHA-256 of that answer.
    pub sentinel_sha256: String,
}

/// An upstream that was proved.
#[derive(Clone, Debug)]
pub struct Proved {
    /// What it is.
    pub detected: Detected,
    /// What its warm-up showed.
    pub warm_up: WarmUp,
    /// Whether it keeps to a schema.
    pub json_schema: Capability,
    /// Of its records.
    pub pins: Pins,
}

/// Whether an upstream may be asked.
#[derive(Clone, Debug)]
pub enum Fence {
    /// It may not.
    Closed {
        /// How far it is.
        phase: FencePhase,
        /// Why it is closed.
        reason: String,
    },
    /// It may.
    Open(Arc<Proved>),
}

/// One upstream.
#[derive(Debug)]
pub struct Upstream {
    /// What is given of it.
    pub options: UpstreamOptions,
    pub(crate) client: Client,
    fence: watch::Sender<Fence>,
    in_flight: AtomicUsize,
    faults_in_a_row: AtomicU64,
    /// Rung when a fault leaves it open whether it still is what it was.
    pub(crate) suspicion: Notify,
    /// Not asked before then: it said that it is busy.
    rests_until: Mutex<Option<Instant>>,
}

/// A request that is at an upstream.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Upstream>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Upstream {
    /// Behind a closed fence.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(options: UpstreamOptions) -> Result<Self, crate::AddressError> {
        let client = Client::new(&options.address, options.key.as_deref())?;
        let closed =
            Fence::Closed { phase: FencePhase::Detect, reason: "not looked at yet".into() };
        Ok(Self {
            client,
            options,
            fence: watch::Sender::new(closed),
            in_flight: AtomicUsize::new(0),
            faults_in_a_row: AtomicU64::new(0),
            suspicion: Notify::new(),
            rests_until: Mutex::new(None),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Its fence now.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.fence.borrow().clone()
    }

    /// What it has proved, if its fence is open.
    #[must_use]
    pub fn proved(&self) -> Option<Arc<Proved>> {
        match &*self.fence.borrow() {
            Fence::Open(proved) => Some(Arc::clone(proved)),
            Fence::Closed { .. } => None,
        }
    }

    /// Tells of every change of its fence.
    pub(crate) fn changes(&self) -> watch::Receiver<Fence> {
        self.fence.subscribe()
    }

    /// Lets requests through.
    pub(crate) fn open(&self, proved: Proved) {
        self.faults_in_a_row.store(0, Ordering::Relaxed);
        // It generated just now, whatever it said before.
        *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.fence.send_replace(Fence::Open(Arc::new(proved)));
    }

    /// Lets no further request through.
    pub(crate) fn close(&self, phase: FencePhase, reason: impl Into<String>) {
        self.fence.send_replace(Fence::Closed { phase, reason: reason.into() });
    }

    /// Requests that are there now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request in, until what is returned goes.
    pub(crate) fn take(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// How long it wants to be left alone.
    #[must_use]
    pub fn rests(&self) -> Option<Duration> {
        let until = *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.and_then(|until| until.checked_duration_since(Instant::now()))
    }

    /// Takes note of an answer.
    pub(crate) fn succeeded(&self, of: &Arc<Proved>) {
        if self.is_open_by(of) {
            self.faults_in_a_row.store(0, Ordering::Relaxed);
        }
    }

    /// Whether the fence is open by this proof: what began before another one says nothing about it.
    fn is_open_by(&self, of: &Arc<Proved>) -> bool {
        matches!(&*self.fence.borrow(), Fence::Open(proved) if Arc::ptr_eq(proved, of))
    }

    /// Takes note of a fault of a request that passed by this proof.
    pub(crate) fn failed(&self, of: &Arc<Proved>, fault: &UpstreamFault) {
        if let UpstreamFault::Busy { retry_after_s } = fault {
            let until = Instant::now() + Duration::from_secs(*retry_after_s);
            *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        }
        let verdict = fault.verdict();
        if verdict == FaultVerdict::Nothing || !self.is_open_by(of) {
            return;
        }
        let in_a_row = self.faults_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        if verdict == FaultVerdict::Closes || in_a_row >= FAULTS_IN_A_ROW {
            let reason = format!("{}: {fault}", fault.code());
            self.fence.send_if_modified(|fence| match fence {
                Fence::Open(proved) if Arc::ptr_eq(proved, of) => {
                    *fence = Fence::Closed { phase: FencePhase::Detect, reason };
                    true
                }
                Fence::Open(_) | Fence::Closed { .. } => false,
            });
        } else if verdict == FaultVerdict::Suspects {
            self.suspicion.notify_one();
        }
    }
}
