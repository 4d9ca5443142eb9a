//! Work on what a client wrote, in a thread of its own: with a deep stack, an end in time, and panics that are errors.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::GrammarError;

/// Compilers recurse once or twice for each property of an object. Memory that is not touched is not used.
const STACK_BYTES: usize = 64 << 20;
/// How long a thread stays for the next piece of work. One that stays has its stack and its memory at hand; one that
/// goes gives back what a deep grammar made of them.
const STAY: Duration = Duration::from_secs(10);

const WORKING: &str = "milliseconds to compile it";
const WAITING: &str = "milliseconds to wait while others are compiled";

/// Threads that compile, at most `most` of them. One that outlived its deadline counts until it ends its work.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    most: usize,
}

struct Shared {
    state: Mutex<State>,
    /// Told of each piece of work, and of the end.
    called: Condvar,
}

#[derive(Default)]
struct State {
    /// The oldest in front.
    waiting: VecDeque<Piece>,
    n_threads: usize,
    n_idle: usize,
}

struct Piece {
    /// Whoever sets it first owns the piece: a thread that begins it, or the client that gave up.
    taken: Arc<AtomicBool>,
    work: Box<dyn FnOnce() + Send>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No thread panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does: one piece after the other, until none came for [`STAY`].
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(piece) = state.waiting.pop_front() {
                drop(state);
                if !piece.taken.swap(true, Ordering::AcqRel) {
                    (piece.work)();
                }
                state = self.lock();
                continue;
            }
            state.n_idle += 1;
            let empty = |state: &mut State| state.waiting.is_empty();
            let waited = self.called.wait_timeout_while(state, STAY, empty);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.n_idle -= 1;
            if state.waiting.is_empty() {
                state.n_threads -= 1;
                return;
            }
        }
    }
}

impl Workers {
    pub(crate) fn new(most: usize) -> Workers {
        let shared = Shared { state: Mutex::default(), called: Condvar::new() };
        Workers { shared: Arc::new(shared), most: most.max(1) }
    }

    /// Hands over a piece of work, to a thread that has none or to a new one where there may be another.
    fn hand_over(&self, piece: Piece) -> std::io::Result<()> {
        let mut state = self.shared.lock();
        if state.n_idle <= state.waiting.len() && state.n_threads < self.most {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("exrail-grammar".into());
            thread.stack_size(STACK_BYTES).spawn(move || shared.serve())?;
            state.n_threads += 1;
        }
        state.waiting.push_back(piece);
        drop(state);
        self.shared.called.notify_one();
        Ok(())
    }

    /// What `work` gives, within `limit_ms` milliseconds. A thread that takes longer is left behind; the work's own
    /// limits of fuel and size end it.
    pub(crate) fn within<T: Send + 'static>(
        &self,
        limit_ms: u64,
        work: impl FnOnce() -> Result<T, GrammarError> + Send + 'static,
    ) -> Result<T, GrammarError> {
        let (send, receive) = mpsc::sync_channel(1);
        let taken = Arc::new(AtomicBool::new(false));
        let work = Box::new(move || {
            // Nobody listens any more behind the deadline.
            drop(send.send(caught(work)));
        });
        self.hand_over(Piece { taken: Arc::clone(&taken), work }).map_err(|error| {
            GrammarError::Malformed(format!("no thread to compile in: {error}"))
        })?;
        receive.recv_timeout(Duration::from_millis(limit_ms)).unwrap_or_else(|_| {
            let what = if taken.swap(true, Ordering::AcqRel) { WORKING } else { WAITING };
            Err(GrammarError::TooLarge { what, limit: limit_ms, found: limit_ms })
        })
    }
}

/// What the work gives; a panic is an error.
fn caught<T>(work: impl FnOnce() -> Result<T, GrammarError>) -> Result<T, GrammarError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<&str>().map(|it| (*it).to_owned());
        let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
        let message = message.unwrap_or_default();
        Err(GrammarError::Malformed(format!("the compiler stumbled over it: {message}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b2_a_panic_is_an_error_and_its_place_comes_back() {
        let workers = Workers::new(1);
        for _ in 0..3 {
            let found = workers.within::<()>(10_000, || panic!("on purpose"));
            let Err(GrammarError::Malformed(message)) = found else { panic!("{found:?}") };
            assert!(message.contains("on purpose"));
        }
        assert_eq!(workers.within(10_000, || Ok(7)), Ok(7));
    }

    type Answer = Result<u32, GrammarError>;
    type Work = fn() -> Answer;

    /// What two clients hear of one thread that serves both, as an engine's does: one whose grammar breaks the
    /// compiler, and one behind it.
    fn heard(compile: fn(Work) -> Answer) -> [Option<Answer>; 2] {
        let (ask, asked) = mpsc::channel::<(Work, mpsc::Sender<Answer>)>();
        std::thread::scope(|scope| {
            let serving = scope.spawn(move || {
                for (work, reply) in asked {
                    reply.send(compile(work)).unwrap();
                }
            });
            let works: [Work; 2] = [|| panic!("on purpose"), || Ok(7)];
            let heard = works.map(|work| {
                let (reply, answer) = mpsc::channel();
                ask.send((work, reply)).ok()?;
                answer.recv().ok()
            });
            drop(ask);
            assert_eq!(serving.join().is_ok(), heard[1].is_some());
            heard
        })
    }

    /// B2 with its mutation: compiled in the thread of all, one client's panic is the end of everybody's service.
    #[test]
    fn mutation_b2_without_a_thread_that_catches_one_panic_ends_the_service_of_all() {
        let guarded = heard(|work| Workers::new(1).within(10_000, work));
        assert!(
            matches!(guarded, [Some(Err(GrammarError::Malformed(_))), Some(Ok(7))]),
            "{guarded:?}"
        );
        assert_eq!(heard(|work| work()), [None, None]);
    }

    #[test]
    fn one_thread_after_another_piece_is_the_same_and_there_are_no_more_than_allowed() {
        let workers = Workers::new(2);
        let thread = || Ok(std::thread::current().id());
        let first = workers.within(10_000, thread).unwrap();
        // It may not be back in its place when the next piece comes.
        let again = (0..1_000).any(|_| workers.within(10_000, thread) == Ok(first));
        assert!(again);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| workers.within(10_000, || Ok(())).unwrap());
            }
        });
        assert!(workers.shared.lock().n_threads <= 2);
    }

    #[test]
    fn work_whose_client_gave_up_before_it_began_is_never_begun() {
        let workers = Workers::new(1);
        let (release, held) = mpsc::channel::<()>();
        let (begin, begun) = mpsc::channel();
        assert!(
            workers
                .within(20, move || {
                    held.recv().unwrap_or_default();
                    Ok(())
                })
                .is_err()
        );
        assert!(
            workers
                .within(20, move || {
                    begin.send(()).unwrap_or_default();
                    Ok(())
                })
                .is_err()
        );
        drop(release);
        assert_eq!(workers.within(10_000, || Ok(7)), Ok(7));
        assert!(begun.recv().is_err());
    }

    #[test]
    fn b14_work_past_its_limit_is_refused_and_so_is_what_finds_no_place() {
        let workers = Workers::new(1);
        let (release, held) = mpsc::channel::<()>();
        let slow = workers.within(20, move || {
            held.recv().unwrap_or_default();
            Ok(())
        });
        assert_eq!(slow, Err(GrammarError::TooLarge { what: WORKING, limit: 20, found: 20 }));
        let second = workers.within(20, || Ok(()));
        assert_eq!(second, Err(GrammarError::TooLarge { what: WAITING, limit: 20, found: 20 }));
        drop(release);
        assert_eq!(workers.within(10_000, || Ok(())), Ok(()));
    }
}
