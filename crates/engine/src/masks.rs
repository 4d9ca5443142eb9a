//! Threads that compute masks while a step is computed.
//!
//! A matcher travels to a thread and comes back with the mask of the next token, before the token is drawn. They
//! start with the first sequence that has a grammar and end with the engine; an engine that nobody asks for one
//! has none. Nor has one whose steps keep every core busy: there a thread of masks takes the core of a thread of
//! the step, and all others wait for that for some milliseconds, where a mask costs some microseconds
//! (`bench/record/`). It is then computed behind the step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use exrail_grammar::{Mask, Matcher, MatcherError};

/// Most threads: a mask takes far less than the step that it is computed beside.
const MOST_THREADS: usize = 4;

/// A matcher that is back.
#[derive(Debug)]
pub(crate) struct Computed {
    pub(crate) matcher: Box<Matcher>,
    pub(crate) mask: Result<Mask, MatcherError>,
    pub(crate) time: Duration,
}

#[derive(Debug)]
struct Asked {
    matcher: Box<Matcher>,
    back: flume::Sender<Computed>,
}

/// The threads of one engine.
#[derive(Debug)]
pub(crate) struct MaskThreads {
    has_core: bool,
    /// `None`: not started.
    asked: Option<flume::Sender<Asked>>,
}

impl MaskThreads {
    /// Beside steps that keep so many threads busy.
    pub(crate) fn beside(n_busy: usize) -> MaskThreads {
        MaskThreads { has_core: n_busy < n_processors(), asked: None }
    }

    /// Whether a mask is computed while a step is.
    pub(crate) fn have_a_core(&self) -> bool {
        self.has_core
    }

    /// Hands a matcher to a thread; it comes out of what is returned. Where no thread can be had, it is computed
    /// here.
    pub(crate) fn compute(&mut self, matcher: Box<Matcher>) -> flume::Receiver<Computed> {
        let (back, computed) = flume::bounded(1);
        let threads = self.asked.get_or_insert_with(start);
        if let Err(flume::SendError(asked)) = threads.send(Asked { matcher, back }) {
            answer(asked);
        }
        computed
    }
}

/// A thread for every four processors, at least one.
fn start() -> flume::Sender<Asked> {
    let (sender, asked) = flume::unbounded::<Asked>();
    for n in 0..(n_processors() / 4).clamp(1, MOST_THREADS) {
        let asked = asked.clone();
        let run = move || asked.iter().for_each(answer);
        let thread = std::thread::Builder::new().name(format!("exrail-masks-{n}"));
        if let Err(error) = thread.spawn(run) {
            tracing::warn!(%error, "masks are computed in the engine's thread");
        }
    }
    sender
}

fn n_processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// Whoever asked may have ended meanwhile.
fn answer(asked: Asked) {
    let Asked { mut matcher, back } = asked;
    let begun = Instant::now();
    let mask = catch_unwind(AssertUnwindSafe(|| matcher.mask()));
    let mask = mask.unwrap_or_else(|_| Err(MatcherError::Failed("it panicked".to_owned())));
    back.send(Computed { matcher, mask, time: begun.elapsed() }).ok();
}
