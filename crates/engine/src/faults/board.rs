//! The switchboard of tests and of feature `faults`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use exrail_kernels::PageId;

use super::{Fault, FaultPlan, Guard, Guards, InjectedFaults};

impl Fault {
    /// What a running engine can be made to do, in the order of its numbers on the board.
    pub(crate) const SCHEDULED: [Fault; 11] = [
        Fault::SkipReference,
        Fault::ReuseEarly,
        Fault::KeepGeneration,
        Fault::FlipToken,
        Fault::FlipRecord,
        Fault::FailAllocation,
        Fault::Nan,
        Fault::Panic,
        Fault::Delay,
        Fault::Hang,
        Fault::BreakTrace,
    ];

    /// Whether a page is out of use behind it.
    pub(crate) fn costs_a_page(self) -> bool {
        self.guard() == Some(Guard::Pages)
            && !matches!(self, Fault::KeepGeneration | Fault::FailAllocation)
    }
}

/// Kinds that a plan knows.
const N: usize = Fault::SCHEDULED.len();
/// Steps for which a fault waits for somebody whom it can hit.
const PATIENCE_STEPS: u64 = 160;
/// Least steps of rest between two faults; the draw adds up to as many. A sequence is computed anew three
/// times at most, and no fault is to be counted against another's victim.
const REST_STEPS: u64 = 24;
/// Steps that hang under one plan: each takes longer than the watchdog waits.
const MOST_HANGS: usize = 2;
/// The number on the board of no fault.
const NONE: usize = N;

/// Counts of one kind.
#[derive(Debug, Default)]
struct Kind {
    injected: AtomicU64,
    caught: AtomicU64,
    unmet: AtomicU64,
    slowest_steps: AtomicU64,
}

/// The one fault that is to come or to be caught, and all that were.
#[derive(Debug)]
pub struct FaultBoard {
    armed: AtomicUsize,
    outstanding: AtomicUsize,
    since: AtomicU64,
    step: AtomicU64,
    kinds: [Kind; N],
}

impl Default for FaultBoard {
    fn default() -> FaultBoard {
        FaultBoard {
            armed: AtomicUsize::new(NONE),
            outstanding: AtomicUsize::new(NONE),
            since: AtomicU64::new(0),
            step: AtomicU64::new(0),
            kinds: std::array::from_fn(|_| Kind::default()),
        }
    }
}

/// Takes one of what is left, if one is needed; false: there is none.
fn take(left: &mut usize, is_needed: bool) -> bool {
    let fewer = left.checked_sub(usize::from(is_needed));
    *left = fewer.unwrap_or(0);
    fewer.is_some()
}

fn number(fault: Fault) -> usize {
    Fault::SCHEDULED.iter().position(|one| *one == fault).unwrap_or(NONE)
}

impl FaultBoard {
    /// Whether this fault is to be injected now. Whoever asks and hears yes injects it.
    #[must_use]
    pub fn takes(&self, fault: Fault) -> bool {
        let at = number(fault);
        if at == NONE || !self.moves(&self.armed, at) {
            return false;
        }
        self.kinds[at].injected.fetch_add(1, Ordering::Relaxed);
        self.since.store(self.step.load(Ordering::Relaxed), Ordering::Relaxed);
        if fault.guard().is_some() {
            self.outstanding.store(at, Ordering::Release);
        }
        true
    }

    /// A guard has fired; the fault that it is for has been caught.
    pub fn caught(&self, guard: Guard) {
        let at = self.outstanding.load(Ordering::Acquire);
        let is_its = Fault::SCHEDULED.get(at).is_some_and(|fault| fault.guard() == Some(guard));
        if is_its && self.moves(&self.outstanding, at) {
            let since = self.since.load(Ordering::Relaxed);
            let steps = self.step.load(Ordering::Relaxed).saturating_sub(since);
            self.kinds[at].caught.fetch_add(1, Ordering::Relaxed);
            self.kinds[at].slowest_steps.fetch_max(steps, Ordering::Relaxed);
        }
    }

    /// Of each kind.
    #[must_use]
    pub fn counts(&self) -> Vec<InjectedFaults> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let count = |(fault, kind): (&Fault, &Kind)| InjectedFaults {
            fault: *fault,
            injected: read(&kind.injected),
            caught: read(&kind.caught),
            unmet: read(&kind.unmet),
            slowest_steps: read(&kind.slowest_steps),
        };
        Fault::SCHEDULED.iter().zip(&self.kinds).map(count).collect()
    }

    /// Takes a fault from its place; false: it is not there any more.
    fn moves(&self, place: &AtomicUsize, at: usize) -> bool {
        place.compare_exchange(at, NONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// What was injected is gone before anybody could meet it: it hit nobody.
    fn vanished(&self, fault: Fault) {
        let at = number(fault);
        if self.moves(&self.outstanding, at) {
            self.kinds[at].injected.fetch_sub(1, Ordering::Relaxed);
            self.kinds[at].unmet.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_free(&self) -> bool {
        self.armed.load(Ordering::Acquire) == NONE
            && self.outstanding.load(Ordering::Acquire) == NONE
    }
}

/// Where a plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing comes before this step.
    Rests(u64),
    /// Waits for somebody to hit until this step.
    Armed(usize, u64),
    /// Waits for its guard until this step.
    Injected(u64),
}

/// A plan that is followed.
#[derive(Clone, Debug)]
struct Followed {
    plan: FaultPlan,
    random: u64,
    /// What is left of this round.
    round: Vec<usize>,
    stage: Stage,
    /// Steps in which every guard is to have looked.
    bound: u64,
    /// Pages that may still be lost.
    pages: usize,
    /// Steps that may still hang.
    hangs: usize,
}

/// Which rules are broken now, and whether anybody looks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Switchboard {
    /// Broken until further notice.
    pub(crate) faults: Vec<Fault>,
    pub(crate) guards_off: bool,
    board: Arc<FaultBoard>,
    followed: Option<Followed>,
    /// The sequence with which every step panics.
    victim: Option<u64>,
    /// The page whose content was changed.
    flipped: Option<PageId>,
}

impl Switchboard {
    /// One that tells this board.
    pub(crate) fn new(board: &Arc<FaultBoard>) -> Switchboard {
        Switchboard { board: Arc::clone(board), ..Switchboard::default() }
    }

    /// Whether the rule is broken.
    pub(crate) fn injects(&self, fault: Fault) -> bool {
        self.faults.contains(&fault) || self.board.takes(fault)
    }

    /// Whether checks and audits find nothing, whatever there is.
    pub(crate) fn guards_are_off(&self) -> bool {
        self.guards_off
    }

    /// A guard has fired.
    pub(crate) fn caught(&self, guard: Guard) {
        self.board.caught(guard);
    }

    /// The content of this page was changed.
    pub(crate) fn flips(&mut self, page: PageId) {
        self.flipped = Some(page);
    }

    /// The content of this page is given up before a guard looked.
    pub(crate) fn gives_up(&mut self, page: PageId) {
        if self.flipped == Some(page) {
            self.flipped = None;
            self.board.vanished(Fault::FlipToken);
        }
    }

    /// Every step with this sequence panics from here on.
    pub(crate) fn picks(&mut self, sequence: u64) {
        self.victim = Some(sequence);
    }

    /// Whether steps with this sequence panic.
    pub(crate) fn is_victim(&self, sequence: u64) -> bool {
        self.victim == Some(sequence)
    }

    /// Time of a step that hangs.
    pub(crate) fn hang(&self) -> Duration {
        self.followed.as_ref().map_or(Duration::ZERO, |followed| followed.plan.hang)
    }

    /// Follows a plan, with an audit of the pool every so many steps, that costs a quarter of these pages at
    /// most.
    pub(crate) fn follow(&mut self, plan: FaultPlan, audit_every: u64, n_pages: usize) {
        self.guards_off = plan.guards == Guards::Off;
        let now = self.board.step.load(Ordering::Relaxed);
        self.followed = Some(Followed {
            plan,
            random: plan.seed,
            round: Vec::new(),
            stage: Stage::Rests(now + REST_STEPS),
            bound: audit_every.saturating_add(2),
            pages: n_pages / 4,
            hangs: MOST_HANGS,
        });
    }

    /// Before the turn of step `step`: what comes next.
    pub(crate) fn advance(&mut self, step: u64) {
        self.board.step.store(step, Ordering::Relaxed);
        let Some(followed) = &mut self.followed else { return };
        followed.stage = match followed.stage {
            Stage::Rests(until) if step < until => return,
            Stage::Rests(_) => followed.arm(&self.board, step),
            Stage::Armed(at, until) if self.board.armed.load(Ordering::Acquire) == at => {
                if step < until || !self.board.moves(&self.board.armed, at) {
                    return;
                }
                self.board.kinds[at].unmet.fetch_add(1, Ordering::Relaxed);
                followed.rest(step)
            }
            Stage::Armed(..) => Stage::Injected(step.saturating_add(4 * followed.bound)),
            Stage::Injected(until) if step < until && !self.board.is_free() => return,
            Stage::Injected(_) => {
                // What no guard has caught by now counts as never caught.
                self.board.outstanding.store(NONE, Ordering::Release);
                followed.rest(step)
            }
        };
    }
}

impl Followed {
    fn arm(&mut self, board: &FaultBoard, step: u64) -> Stage {
        if self.round.is_empty() {
            self.round = self.shuffled();
        }
        let Some(at) = self.round.pop() else { return self.rest(step) };
        let fault = Fault::SCHEDULED[at];
        let (mut hangs, mut pages) = (self.hangs, self.pages);
        let is_left =
            take(&mut hangs, fault == Fault::Hang) && take(&mut pages, fault.costs_a_page());
        if !is_left {
            return self.rest(step);
        }
        (self.hangs, self.pages) = (hangs, pages);
        board.armed.store(at, Ordering::Release);
        Stage::Armed(at, step + PATIENCE_STEPS)
    }

    fn rest(&mut self, step: u64) -> Stage {
        Stage::Rests(step + REST_STEPS + self.below(REST_STEPS))
    }

    /// Each kind once (Durstenfeld 1964).
    fn shuffled(&mut self) -> Vec<usize> {
        let mut all: Vec<usize> = (0..N).collect();
        for at in (1..N).rev() {
            let other = usize::try_from(self.below(at as u64 + 1)).unwrap_or(0);
            all.swap(at, other);
        }
        all
    }

    /// A number below `bound`, by SplitMix64 (Steele, Lea and Flood 2014).
    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: FaultPlan = FaultPlan { seed: 5, hang: Duration::ZERO, guards: Guards::On };

    fn followed() -> (Arc<FaultBoard>, Switchboard) {
        let board = Arc::new(FaultBoard::default());
        let mut switchboard = Switchboard::new(&board);
        switchboard.follow(PLAN, 8, 64);
        (board, switchboard)
    }

    /// What is injected by whoever asks for everything in every step, with its step.
    fn injected(n_steps: u64, catches: bool) -> (Vec<(u64, Fault)>, Arc<FaultBoard>) {
        let (board, mut switchboard) = followed();
        let mut found = Vec::new();
        for step in 0..n_steps {
            switchboard.advance(step);
            for fault in Fault::SCHEDULED {
                if switchboard.injects(fault) {
                    found.push((step, fault));
                }
            }
            if catches && step % 3 == 0 {
                for guard in [Guard::Pages, Guard::Numbers, Guard::Panics, Guard::Traces] {
                    switchboard.caught(guard);
                }
            }
        }
        (found, board)
    }

    #[test]
    fn every_kind_comes_one_at_a_time_from_the_seed() {
        let (found, board) = injected(1000, true);
        let (again, _) = injected(1000, true);
        assert_eq!(found, again);
        for fault in Fault::SCHEDULED {
            assert!(found.iter().any(|(_, one)| *one == fault), "{}", fault.name());
        }
        assert!(found.windows(2).all(|pair| pair[1].0 - pair[0].0 >= REST_STEPS));
        for counts in board.counts() {
            let expected = if counts.fault.guard().is_some() { counts.injected } else { 0 };
            assert_eq!(counts.caught, expected, "{counts:?}");
            assert!(counts.slowest_steps <= 3 && counts.unmet == 0, "{counts:?}");
        }
    }

    #[test]
    fn what_nobody_catches_and_whom_it_does_not_hit_are_told_apart() {
        let (found, board) = injected(2000, false);
        assert!(found.len() > 11);
        assert!(board.counts().iter().all(|counts| counts.caught == 0));
        let (board, mut switchboard) = followed();
        (0..4000).for_each(|step| switchboard.advance(step));
        let counts = board.counts();
        assert!(counts.iter().all(|counts| counts.injected == 0));
        assert!(counts.iter().map(|counts| counts.unmet).sum::<u64>() > 5);
    }

    #[test]
    fn what_is_given_up_before_its_guard_looked_hit_nobody() {
        let board = Arc::new(FaultBoard::default());
        let mut switchboard = Switchboard::new(&board);
        board.armed.store(number(Fault::FlipToken), Ordering::Release);
        assert!(switchboard.injects(Fault::FlipToken));
        switchboard.flips(PageId(3));
        switchboard.gives_up(PageId(2));
        assert_eq!(board.counts()[number(Fault::FlipToken)].injected, 1);
        switchboard.gives_up(PageId(3));
        let counts = board.counts()[number(Fault::FlipToken)];
        assert_eq!((counts.injected, counts.unmet, counts.caught), (0, 1, 0));
        assert!(board.is_free());
    }

    #[test]
    fn a_guard_catches_its_own_fault_only() {
        let board = FaultBoard::default();
        board.armed.store(number(Fault::Nan), Ordering::Release);
        assert!(!board.takes(Fault::Panic) && board.takes(Fault::Nan) && !board.takes(Fault::Nan));
        board.caught(Guard::Pages);
        let caught = |board: &FaultBoard| board.counts()[number(Fault::Nan)].caught;
        assert_eq!(caught(&board), 0);
        board.caught(Guard::Numbers);
        board.caught(Guard::Numbers);
        assert_eq!(caught(&board), 1);
    }
}
