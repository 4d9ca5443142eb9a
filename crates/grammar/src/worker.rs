//! Work on what a client wrote, in a thread of its own: with a deep stack, an end in time, and panics that are errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::GrammarError;

/// Compilers recurse once or twice for each property of an object. Memory that is not touched is not used.
const STACK_BYTES: usize = 64 << 20;
/// How often somebody who waits for a place looks again.
const LOOK_EVERY: Duration = Duration::from_millis(2);

const WORKING: &str = "milliseconds to compile it";
const WAITING: &str = "milliseconds to wait while others are compiled";

/// Threads that compile, counted; one that outlived its deadline counts until it ends.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    taken: Arc<AtomicUsize>,
    most: usize,
}

struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Places {
    pub(crate) fn new(most: usize) -> Places {
        Places { taken: Arc::new(AtomicUsize::new(0)), most: most.max(1) }
    }

    fn take(&self, until: Instant) -> Option<Place> {
        loop {
            let more = |taken| (taken < self.most).then_some(taken + 1);
            if self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok() {
                return Some(Place(Arc::clone(&self.taken)));
            }
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// What `work` gives, within `limit_ms` milliseconds. A thread that takes longer is left behind; its own limits of
/// fuel and size end it, and until then it keeps its place.
pub(crate) fn within<T: Send + 'static>(
    places: &Places,
    limit_ms: u64,
    work: impl FnOnce() -> Result<T, GrammarError> + Send + 'static,
) -> Result<T, GrammarError> {
    let until = Instant::now() + Duration::from_millis(limit_ms);
    let too_slow = |what| GrammarError::TooLarge { what, limit: limit_ms, found: limit_ms };
    let Some(place) = places.take(until) else {
        return Err(too_slow(WAITING));
    };
    let (send, receive) = mpsc::sync_channel(1);
    let body = move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        drop(place);
        let result = result.unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<&str>().map(|it| (*it).to_owned());
            let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
            let message = message.unwrap_or_default();
            Err(GrammarError::Malformed(format!("the compiler stumbled over it: {message}")))
        });
        // Nobody listens any more behind the deadline.
        drop(send.send(result));
    };
    let thread = std::thread::Builder::new().name("exrail-grammar".into()).stack_size(STACK_BYTES);
    if let Err(error) = thread.spawn(body) {
        return Err(GrammarError::Malformed(format!("no thread to compile in: {error}")));
    }
    let left = until.saturating_duration_since(Instant::now());
    receive.recv_timeout(left).unwrap_or_else(|_| Err(too_slow(WORKING)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b2_a_panic_is_an_error_and_its_place_comes_back() {
        let places = Places::new(1);
        for _ in 0..3 {
            let found = within::<()>(&places, 10_000, || panic!("on purpose"));
            let Err(GrammarError::Malformed(message)) = found else { panic!("{found:?}") };
            assert!(message.contains("on purpose"));
        }
        assert_eq!(within(&places, 10_000, || Ok(7)), Ok(7));
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
        let guarded = heard(|work| within(&Places::new(1), 10_000, work));
        assert!(
            matches!(guarded, [Some(Err(GrammarError::Malformed(_))), Some(Ok(7))]),
            "{guarded:?}"
        );
        assert_eq!(heard(|work| work()), [None, None]);
    }

    #[test]
    fn b14_work_past_its_limit_is_refused_and_so_is_what_finds_no_place() {
        let places = Places::new(1);
        let (release, held) = mpsc::channel::<()>();
        let slow = within(&places, 20, move || {
            held.recv().unwrap_or_default();
            Ok(())
        });
        assert_eq!(slow, Err(GrammarError::TooLarge { what: WORKING, limit: 20, found: 20 }));
        let second = within(&places, 20, || Ok(()));
        assert_eq!(second, Err(GrammarError::TooLarge { what: WAITING, limit: 20, found: 20 }));
        drop(release);
        assert_eq!(within(&places, 10_000, || Ok(())), Ok(()));
    }
}
