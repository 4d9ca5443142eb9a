//! What can be read of the engine from outside while it runs: atomics that its thread writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use exrail_kernels::DeviceCounters;

use crate::error::SubmitError;
use crate::faults::FaultBoard;
use crate::places::{Left, PlaceLimits, Places};
use crate::sequence::Traffic;

/// Whether the engine takes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineState {
    /// Takes work.
    Running,
    /// Stopped as asked.
    Stopped,
    /// Gave up after repeated panics; every sequence was failed.
    Faulted,
}

/// The second tier of the KV cache; totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// Pages that it has room for; 0: there is none.
    pub pages_total: usize,
    /// Pages that it holds.
    pub pages: usize,
    /// Pages that were copied out.
    pub stored: u64,
    /// Pages that came back.
    pub returned: u64,
    /// Pages that were given up for others.
    pub evicted: u64,
    /// Pages whose bytes had changed when they were wanted back.
    pub corrupt: u64,
}

/// What grammars did (G-13); totals since the start, counted when an answer ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrammarCounters {
    /// Answers under a grammar, however they ended.
    pub answers: u64,
    /// Those of them that ended as [`crate::Finish::SchemaIncomplete`].
    pub incomplete: u64,
    /// Those of them whose automaton failed.
    pub faults: u64,
    /// Tokens that were drawn under a mask.
    pub masked_tokens: u64,
    /// Tokens that were bound to follow and cost no step.
    pub forced_tokens: u64,
    /// Tokens of ends that were followed because no other fitted.
    pub closing_tokens: u64,
    /// Drawn tokens where the model's first choice was not allowed.
    pub argmax_masked: u64,
    /// Answers whose allowed probability was low for several tokens in a row.
    pub low_mass: u64,
    /// Microseconds that masks took, mostly beside steps.
    pub mask_us: u64,
}

/// A snapshot. Totals count user traffic since the start; warm-up leaves no trace in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Whether the engine takes work.
    pub state: EngineState,
    /// Admitted sequences.
    pub sequences_running: usize,
    /// Queued sequences.
    pub sequences_waiting: usize,
    /// Pages of the pool.
    pub pages_total: usize,
    /// Pages that can be handed out: nobody holds them. Those kept for their content are among them.
    pub pages_free: usize,
    /// Free pages that are kept for their content, until somebody needs the room.
    pub pages_cached: usize,
    /// Pages out of use since they broke an invariant; neither free nor held.
    pub pages_quarantined: usize,
    /// Prompt tokens computed.
    pub tokens_prompt: u64,
    /// Token events sent.
    pub tokens_generated: u64,
    /// Forward passes with at least one user row.
    pub steps: u64,
    /// Sequences taken into the queue.
    pub submitted: u64,
    /// Sequences that ended by themselves.
    pub finished: u64,
    /// Those of them that went round in a circle (G-19).
    pub degenerate: u64,
    /// Sequences that their caller gave up.
    pub cancelled: u64,
    /// Sequences that the engine gave up.
    pub failed: u64,
    /// Those of them whose deadline passed.
    pub late: u64,
    /// Steps that panicked.
    pub panics: u64,
    /// Violations of the page books (G-17).
    pub kv_faults: u64,
    /// What the device has built since it was opened, warm-up included; as of the last step.
    pub built: DeviceCounters,
    /// The part of it that was built behind the warm-up fence, which is to be nothing; `None` before the
    /// fence is closed.
    pub built_after_fence: Option<DeviceCounters>,
    /// Audits of the whole page pool.
    pub kv_audits: u64,
    /// Sequences that were computed anew because a page that they shared was withdrawn.
    pub kv_restarts: u64,
    /// Whole pages of prompts that were found in the cache.
    pub prefix_hits: u64,
    /// Whole pages of prompts that were looked for and not found.
    pub prefix_misses: u64,
    /// Cached pages that were given up for others.
    pub prefix_evictions: u64,
    /// What had to make room and is kept in the host's memory.
    pub host: HostCounters,
    /// Contexts that were rotated (G-16).
    pub rotations: u64,
    /// Answers that went back to before a loop.
    pub roll_backs: u64,
    /// Answers under a grammar.
    pub grammar: GrammarCounters,
    /// Time since the engine last finished a step or became busy. A turn without a step, such as one that
    /// looks for lost pages, is no progress.
    pub since_progress: Duration,
}

impl Counters {
    /// Liveness (G-04, field faults H1 and H7): there is work, and no step finished for `limit`. An engine
    /// that is only busy finishes steps, see [`crate::EngineOptions::step_target`].
    #[must_use]
    pub fn is_stalled(&self, limit: Duration) -> bool {
        self.sequences_running + self.sequences_waiting > 0 && self.since_progress > limit
    }
}

/// The live numbers. The engine thread writes; handles read, and reserve queue places.
#[derive(Debug)]
pub(crate) struct Gauges {
    start: Instant,
    state: AtomicU8,
    last_progress_ms: AtomicU64,
    running: AtomicUsize,
    places: Places,
    pages_total: usize,
    pages_free: AtomicUsize,
    pages_cached: AtomicUsize,
    pages_quarantined: AtomicUsize,
    host: HostGauges,
    totals: [AtomicU64; Total::COUNT],
    built: Built,
    built_after_fence: Built,
    fence_is_closed: AtomicBool,
    faults: Arc<FaultBoard>,
}

/// [`DeviceCounters`] that one thread writes and others read.
#[derive(Debug, Default)]
struct Built {
    module_loads: AtomicU64,
    graph_captures: AtomicU64,
    gemm_autotunes: AtomicU64,
    device_allocs: AtomicU64,
    nccl_inits: AtomicU64,
}

impl Built {
    fn store(&self, counters: &DeviceCounters) {
        self.module_loads.store(counters.module_loads, Ordering::Relaxed);
        self.graph_captures.store(counters.graph_captures, Ordering::Relaxed);
        self.gemm_autotunes.store(counters.gemm_autotunes, Ordering::Relaxed);
        self.device_allocs.store(counters.device_allocs, Ordering::Relaxed);
        self.nccl_inits.store(counters.nccl_inits, Ordering::Relaxed);
    }

    fn load(&self) -> DeviceCounters {
        DeviceCounters {
            module_loads: self.module_loads.load(Ordering::Relaxed),
            graph_captures: self.graph_captures.load(Ordering::Relaxed),
            gemm_autotunes: self.gemm_autotunes.load(Ordering::Relaxed),
            device_allocs: self.device_allocs.load(Ordering::Relaxed),
            nccl_inits: self.nccl_inits.load(Ordering::Relaxed),
        }
    }
}

/// [`HostCounters`] that one thread writes and others read.
#[derive(Debug, Default)]
struct HostGauges {
    pages_total: AtomicUsize,
    pages: AtomicUsize,
    stored: AtomicU64,
    returned: AtomicU64,
    evicted: AtomicU64,
    corrupt: AtomicU64,
}

impl HostGauges {
    fn store(&self, counters: &HostCounters) {
        self.pages_total.store(counters.pages_total, Ordering::Relaxed);
        self.pages.store(counters.pages, Ordering::Relaxed);
        self.stored.store(counters.stored, Ordering::Relaxed);
        self.returned.store(counters.returned, Ordering::Relaxed);
        self.evicted.store(counters.evicted, Ordering::Relaxed);
        self.corrupt.store(counters.corrupt, Ordering::Relaxed);
    }

    fn load(&self) -> HostCounters {
        HostCounters {
            pages_total: self.pages_total.load(Ordering::Relaxed),
            pages: self.pages.load(Ordering::Relaxed),
            stored: self.stored.load(Ordering::Relaxed),
            returned: self.returned.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
            corrupt: self.corrupt.load(Ordering::Relaxed),
        }
    }
}

/// Index of a total.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Total {
    PromptTokens,
    GeneratedTokens,
    Steps,
    Submitted,
    Finished,
    Degenerate,
    Cancelled,
    Failed,
    Late,
    Panics,
    KvFaults,
    KvAudits,
    KvRestarts,
    PrefixHits,
    PrefixMisses,
    PrefixEvictions,
    Rotations,
    RollBacks,
    Constrained,
    SchemaIncomplete,
    GrammarFaults,
    MaskedTokens,
    ForcedTokens,
    ClosingTokens,
    ArgmaxMasked,
    LowMass,
    MaskMicroseconds,
}

impl Total {
    const COUNT: usize = Total::MaskMicroseconds as usize + 1;
}

impl Gauges {
    pub(crate) fn new(pages_total: usize) -> Gauges {
        Gauges {
            start: Instant::now(),
            state: AtomicU8::new(0),
            last_progress_ms: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            places: Places::default(),
            pages_total,
            pages_free: AtomicUsize::new(pages_total),
            pages_cached: AtomicUsize::new(0),
            pages_quarantined: AtomicUsize::new(0),
            host: HostGauges::default(),
            totals: std::array::from_fn(|_| AtomicU64::new(0)),
            built: Built::default(),
            built_after_fence: Built::default(),
            fence_is_closed: AtomicBool::new(false),
            faults: Arc::default(),
        }
    }

    /// Takes a place in the queue, or refuses at the limits. The first work after idleness starts
    /// the progress clock, so that an idle hour does not look like a stall.
    pub(crate) fn enter_queue(
        &self,
        tenant: Option<&str>,
        limits: PlaceLimits,
    ) -> Result<(), SubmitError> {
        let n_before = self.places.take(tenant, limits)?;
        if n_before == 0 && self.running.load(Ordering::Acquire) == 0 {
            self.progress();
        }
        Ok(())
    }

    pub(crate) fn leave_queue(&self, tenant: Option<&str>, left: Left) {
        self.places.give_back(tenant, left);
    }

    /// What is injected on demand, and what was caught of it.
    pub(crate) fn faults(&self) -> &Arc<FaultBoard> {
        &self.faults
    }

    pub(crate) fn progress(&self) {
        self.last_progress_ms.store(self.now_ms(), Ordering::Release);
    }

    pub(crate) fn set_running(&self, running: usize) {
        self.running.store(running, Ordering::Release);
    }

    /// Pages by their state; the rest is held.
    pub(crate) fn set_pages(&self, free: usize, cached: usize, quarantined: usize) {
        self.pages_free.store(free, Ordering::Release);
        self.pages_cached.store(cached, Ordering::Release);
        self.pages_quarantined.store(quarantined, Ordering::Release);
    }

    pub(crate) fn set_host(&self, counters: &HostCounters) {
        self.host.store(counters);
    }

    /// What the device has built, and what of it behind the fence; `None` while that is open.
    pub(crate) fn set_built(&self, built: &DeviceCounters, after_fence: Option<&DeviceCounters>) {
        self.built.store(built);
        self.built_after_fence.store(after_fence.unwrap_or(&DeviceCounters::default()));
        self.fence_is_closed.store(after_fence.is_some(), Ordering::Release);
    }

    pub(crate) fn set_state(&self, state: EngineState) {
        let code = match state {
            EngineState::Running => 0,
            EngineState::Stopped => 1,
            EngineState::Faulted => 2,
        };
        self.state.store(code, Ordering::Release);
    }

    pub(crate) fn count(&self, traffic: Traffic, total: Total, n: usize) {
        match traffic {
            Traffic::User => {
                self.totals[total as usize].fetch_add(n as u64, Ordering::Relaxed);
            }
            Traffic::WarmUp => {}
        }
    }

    pub(crate) fn state(&self) -> EngineState {
        match self.state.load(Ordering::Acquire) {
            0 => EngineState::Running,
            1 => EngineState::Stopped,
            _ => EngineState::Faulted,
        }
    }

    pub(crate) fn snapshot(&self) -> Counters {
        let total = |total: Total| self.totals[total as usize].load(Ordering::Relaxed);
        let last = self.last_progress_ms.load(Ordering::Acquire);
        let fence_is_closed = self.fence_is_closed.load(Ordering::Acquire);
        Counters {
            state: self.state(),
            sequences_running: self.running.load(Ordering::Acquire),
            sequences_waiting: self.places.taken(),
            pages_total: self.pages_total,
            pages_free: self.pages_free.load(Ordering::Acquire),
            pages_cached: self.pages_cached.load(Ordering::Acquire),
            pages_quarantined: self.pages_quarantined.load(Ordering::Acquire),
            tokens_prompt: total(Total::PromptTokens),
            tokens_generated: total(Total::GeneratedTokens),
            steps: total(Total::Steps),
            submitted: total(Total::Submitted),
            finished: total(Total::Finished),
            degenerate: total(Total::Degenerate),
            cancelled: total(Total::Cancelled),
            failed: total(Total::Failed),
            late: total(Total::Late),
            panics: total(Total::Panics),
            kv_faults: total(Total::KvFaults),
            built: self.built.load(),
            built_after_fence: fence_is_closed.then(|| self.built_after_fence.load()),
            kv_audits: total(Total::KvAudits),
            kv_restarts: total(Total::KvRestarts),
            prefix_hits: total(Total::PrefixHits),
            prefix_misses: total(Total::PrefixMisses),
            prefix_evictions: total(Total::PrefixEvictions),
            host: self.host.load(),
            rotations: total(Total::Rotations),
            roll_backs: total(Total::RollBacks),
            grammar: GrammarCounters {
                answers: total(Total::Constrained),
                incomplete: total(Total::SchemaIncomplete),
                faults: total(Total::GrammarFaults),
                masked_tokens: total(Total::MaskedTokens),
                forced_tokens: total(Total::ForcedTokens),
                closing_tokens: total(Total::ClosingTokens),
                argmax_masked: total(Total::ArgmaxMasked),
                low_mass: total(Total::LowMass),
                mask_us: total(Total::MaskMicroseconds),
            },
            since_progress: Duration::from_millis(self.now_ms().saturating_sub(last)),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_engine_is_not_stalled_and_one_with_old_work_is() {
        let gauges = Gauges::new(4);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!gauges.snapshot().is_stalled(Duration::from_millis(10)));
        let limits = PlaceLimits { all: 1, tenant: 1 };
        gauges.enter_queue(None, limits).unwrap();
        assert!(!gauges.snapshot().is_stalled(Duration::from_millis(10)));
        std::thread::sleep(Duration::from_millis(20));
        assert!(gauges.snapshot().is_stalled(Duration::from_millis(10)));
        assert!(gauges.enter_queue(None, limits).is_err(), "the queue is full");
        gauges.progress();
        assert!(!gauges.snapshot().is_stalled(Duration::from_millis(10)));
    }
}
