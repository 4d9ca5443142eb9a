//! The thread pool: named, pinned workers that share one job's chunks with the calling thread.
//!
//! A job is a number of chunks and a closure. Every thread has a home range of consecutive chunks,
//! so that it reads weights as one stream, which the processor's own prefetchers follow; when its own
//! are done it takes those that the others have left, the last ones first, so that a slow core does
//! fewer. A thread takes a quarter of what is left of a range, so that the last
//! ones, which the others wait for, are small (Polychronopoulos and Kuck 1987). The gate is one word:
//! `epoch << 32 | open << 31 | workers inside`.
//!
//! ```text
//! caller: write job; gate := (epoch+1, open, 0); wake sleepers; take chunks until none is left;
//!         close the gate; wait until nobody is inside
//! worker: spin a few microseconds, then sleep, until the gate is open with a new epoch;
//!         compare-and-swap itself inside; take chunks; leave
//! ```
//!
//! The caller waits only for workers that got inside: one that the system has descheduled, or that
//! still sleeps, delays nobody, because it can no longer enter once the gate is closed.
#![expect(unsafe_code, reason = "the job borrows from the caller's stack")]

use crate::affinity::{self, Core};
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Rounds of `spin_loop` before a worker sleeps: about 20 µs on a Zen 4 core, several times the gap
/// between two operations of a decode step.
const SPIN_ROUNDS: u32 = 1000;
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

thread_local! {
    static IN_JOB: Cell<bool> = const { Cell::new(false) };
}

/// A pool of `n_threads() - 1` workers; the caller is the remaining thread.
#[derive(Debug)]
pub(crate) struct Pool {
    state: Arc<State>,
    // Held for one job: callers on several threads take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(Range<usize>) + Sync),
    /// Chunks that a thread takes at once.
    most: usize,
}

/// Own cache line, so that the counters do not slow each other down.
#[repr(align(128))]
#[derive(Debug, Default)]
struct Line<T>(T);

struct State {
    gate: Line<AtomicU64>,
    /// What is left of each thread's home range, the caller's first.
    left: Vec<Line<Left>>,
    job: UnsafeCell<Option<Job>>,
    sleepers: Vec<Sleeper>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// Consecutive chunks that nobody has taken yet: the first one in the lower half of the word, the
/// end in the upper half.
#[derive(Debug, Default)]
struct Left(AtomicU64);

impl Left {
    fn fill(&self, chunks: Range<usize>) {
        self.0.store((chunks.end as u64) << 32 | chunks.start as u64, Ordering::Relaxed);
    }

    /// Takes the first chunks, or the last ones: a quarter of what is left, one or up to `most`.
    fn take(&self, first: bool, most: usize) -> Option<Range<usize>> {
        // Reading first keeps the line shared once a range is used up.
        let mut left = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (left & u64::from(u32::MAX), left >> 32);
            if start >= end {
                return None;
            }
            let n = ((end - start) / 4).clamp(1, most as u64);
            let (taken, rest) =
                if first { (start..start + n, left + n) } else { (end - n..end, left - (n << 32)) };
            match self.0.compare_exchange_weak(left, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken.start as usize..taken.end as usize),
                Err(now) => left = now,
            }
        }
    }
}

#[derive(Debug, Default)]
struct Sleeper {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("gate", &self.gate.0).finish_non_exhaustive()
    }
}

// SAFETY: `job` is the only field that is not `Sync`. It is written by the holder of `turn` while
// the gate is closed with nobody inside, and read only by workers inside an open gate; the closure
// it points to is `Sync`.
unsafe impl Sync for State {}
// SAFETY: the pointer in `job` is only followed as described for `Sync`, on any thread.
unsafe impl Send for State {}

impl Pool {
    /// A pool of `n_threads` threads in total, one a core of `cores`. The caller is the first; a
    /// worker that the system refuses to start is left out.
    pub(crate) fn new(n_threads: usize, cores: &[Core]) -> Pool {
        let n_workers = n_threads.saturating_sub(1);
        let state = Arc::new(State {
            gate: Line(AtomicU64::new(0)),
            left: (0..=n_workers).map(|_| Line::default()).collect(),
            job: UnsafeCell::new(None),
            sleepers: (0..n_workers).map(|_| Sleeper::default()).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::with_capacity(n_workers);
        for index in 0..n_workers {
            let shared = Arc::clone(&state);
            let core = cores.get(index + 1).copied();
            let started = std::thread::Builder::new()
                .name(format!("exrail-cpu-{}", index + 1))
                .spawn(move || {
                    if let Some(core) = core {
                        affinity::pin(core);
                    }
                    shared.work(index);
                });
            match started {
                Ok(worker) => workers.push(worker),
                Err(_) => break,
            }
        }
        Pool { state, turn: Mutex::default(), workers }
    }

    /// Workers and the caller.
    pub(crate) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `run(i)` exactly once for every i below `n_chunks`, on any of the threads, and returns
    /// when all calls have. Inside a job it runs on the calling thread alone.
    ///
    /// # Panics
    /// When a call panicked (the pool stays usable), or with 2^32 chunks or more.
    pub(crate) fn run(&self, n_chunks: usize, run: &(dyn Fn(usize) + Sync)) {
        self.run_several(n_chunks, 1, &|chunks| chunks.for_each(run));
    }

    /// [`Pool::run`] that calls `run` with one or several chunks, up to `most`, each once.
    pub(crate) fn run_several(
        &self,
        n_chunks: usize,
        most: usize,
        run: &(dyn Fn(Range<usize>) + Sync),
    ) {
        assert!(u32::try_from(n_chunks).is_ok() && most > 0, "{n_chunks} chunks, {most} at once");
        if n_chunks == 0 {
            return;
        }
        if n_chunks == 1 || self.workers.is_empty() || IN_JOB.get() {
            (0..n_chunks).step_by(most).for_each(|i| run(i..n_chunks.min(i.saturating_add(most))));
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &*self.state;
        let pointer: *const (dyn Fn(Range<usize>) + Sync + '_) = run;
        // SAFETY: only the lifetime changes. The pointer is followed by workers inside the gate, and
        // this function does not return or unwind before the gate is closed and empty.
        let run_unbound = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(Range<usize>) + Sync + '_),
                *const (dyn Fn(Range<usize>) + Sync + 'static),
            >(pointer)
        };
        // SAFETY: `turn` is held, and the last holder left the gate closed and empty.
        unsafe { *state.job.get() = Some(Job { run: run_unbound, most }) };
        for (thread, left) in state.left.iter().enumerate() {
            left.0.fill(state.home(thread, n_chunks));
        }
        let epoch = (state.gate.0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Sequentially consistent against `asleep`: either the worker sees the new gate before it
        // sleeps, or this thread sees that it sleeps.
        state.gate.0.store((epoch << 32) | OPEN, Ordering::SeqCst);
        state.wake();
        IN_JOB.set(true);
        let own = catch_unwind(AssertUnwindSafe(|| state.take_chunks(0, most, run)));
        IN_JOB.set(false);
        state.close();
        let worker_panicked = state.panicked.swap(false, Ordering::Relaxed);
        drop(turn);
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        assert!(!worker_panicked, "a kernel panicked on a pool thread");
    }

    /// Calls `run(i, chunk)` for every chunk of `chunk_len` values (the last may be shorter), on any
    /// of the threads.
    pub(crate) fn run_chunks<T: Send>(
        &self,
        values: &mut [T],
        chunk_len: usize,
        run: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        if values.len() <= chunk_len {
            return run(0, values);
        }
        // Each lock is taken once: every index is handed out once.
        let chunks: Vec<Mutex<&mut [T]>> = values.chunks_mut(chunk_len).map(Mutex::new).collect();
        self.run(chunks.len(), &|i| {
            run(i, &mut chunks[i].lock().unwrap_or_else(PoisonError::into_inner));
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its chunks; its own result carries nothing.
            drop(worker.join());
        }
    }
}

impl State {
    /// The chunks of a thread, 0 the caller.
    fn home(&self, thread: usize, n_chunks: usize) -> Range<usize> {
        let n_threads = self.left.len();
        thread * n_chunks / n_threads..(thread + 1) * n_chunks / n_threads
    }

    /// Its own chunks, then what is left of the next thread's, and so on.
    fn take_chunks(&self, thread: usize, most: usize, run: &(dyn Fn(Range<usize>) + Sync)) {
        for home in (thread..self.left.len()).chain(0..thread) {
            while let Some(chunks) = self.left[home].0.take(home == thread, most) {
                run(chunks);
            }
        }
    }

    fn wake(&self) {
        for sleeper in &self.sleepers {
            if sleeper.asleep.load(Ordering::SeqCst)
                && let Some(thread) = sleeper.thread.get()
            {
                thread.unpark();
            }
        }
    }

    /// Lets nobody in any more and waits for those inside.
    fn close(&self) {
        let mut gate = self.gate.0.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut rounds = 0;
        while gate & INSIDE != 0 {
            rounds += 1;
            if rounds < SPIN_ROUNDS {
                std::hint::spin_loop();
            } else {
                // The worker lost its core in the middle of a chunk: do not take it away again.
                std::thread::yield_now();
            }
            gate = self.gate.0.load(Ordering::Acquire);
        }
    }

    fn work(&self, index: usize) {
        // `get_or_init` cannot lose: only this thread sets its own entry.
        self.sleepers[index].thread.get_or_init(std::thread::current);
        IN_JOB.set(true);
        let mut seen = 0;
        while let Some(gate) = self.wait(index, seen) {
            if self.enter(gate) {
                seen = gate >> 32;
                // SAFETY: this thread is counted inside, so the caller waits for it and nobody
                // writes the job.
                let job = unsafe { *self.job.get() }.expect("an open gate has a job");
                // SAFETY: the closure outlives the time this thread is counted inside.
                let run = unsafe { &*job.run };
                let take = || self.take_chunks(index + 1, job.most, run);
                let result = catch_unwind(AssertUnwindSafe(take));
                if result.is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.gate.0.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Counts this thread inside if the gate is still open in the same epoch.
    fn enter(&self, mut gate: u64) -> bool {
        let epoch = gate >> 32;
        while gate & OPEN != 0 && gate >> 32 == epoch {
            match self.gate.0.compare_exchange_weak(
                gate,
                gate + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return true,
                Err(now) => gate = now,
            }
        }
        false
    }

    /// The gate when it is open in an epoch other than `seen`; `None` when the pool stops.
    fn wait(&self, index: usize, seen: u64) -> Option<u64> {
        let ready = |gate: u64| gate & OPEN != 0 && gate >> 32 != seen;
        loop {
            for _ in 0..SPIN_ROUNDS {
                let gate = self.gate.0.load(Ordering::Acquire);
                if ready(gate) {
                    return Some(gate);
                }
                std::hint::spin_loop();
            }
            let sleeper = &self.sleepers[index];
            sleeper.asleep.store(true, Ordering::SeqCst);
            let gate = self.gate.0.load(Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if !ready(gate) {
                std::thread::park();
            }
            sleeper.asleep.store(false, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn pool(n: usize) -> Pool {
        Pool::new(n, &affinity::cores())
    }

    #[test]
    fn every_chunk_runs_once_when_several_are_taken() {
        for threads in [1, 2, 5] {
            let pool = pool(threads);
            for (n_chunks, most) in [(1, 1), (7, 3), (100, 1), (1000, 7), (1000, usize::MAX)] {
                let counts: Vec<AtomicUsize> = (0..n_chunks).map(|_| AtomicUsize::new(0)).collect();
                pool.run_several(n_chunks, most, &|chunks| {
                    assert!(!chunks.is_empty() && chunks.len() <= most);
                    for count in &counts[chunks] {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn every_chunk_runs_once_over_many_jobs() {
        let pool = pool(4);
        for n in 0..2000 {
            let counts: Vec<AtomicUsize> = (0..n % 37).map(|_| AtomicUsize::new(0)).collect();
            pool.run(counts.len(), &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "job {n}");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = pool(3);
        for bad in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, &|i| {
                    std::thread::sleep(std::time::Duration::from_micros(50));
                    assert!(i != bad, "chunk {bad}");
                });
            }));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            pool.run(8, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 8);
        }
    }

    #[test]
    fn a_nested_job_runs_and_its_panic_passes_both_levels() {
        let pool = pool(3);
        let done = AtomicUsize::new(0);
        pool.run(6, &|_| {
            pool.run(5, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(done.load(Ordering::Relaxed), 30);
        let nested = || pool.run(6, &|i| pool.run(5, &|j| assert!(i * j != 8)));
        assert!(catch_unwind(AssertUnwindSafe(nested)).is_err());
    }

    #[test]
    fn submitters_on_two_threads_take_turns() {
        let pool = pool(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(7, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 2 * 500 * 7);
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let pool = pool(2);
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let both = std::sync::Barrier::new(2);
            // Two chunks that wait for each other need two threads.
            pool.run(2, &|_| {
                both.wait();
            });
        }
    }
}
