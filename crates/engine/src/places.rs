//! Places in the waiting queue. Whoever submits takes one before the sequence is handed over, and the
//! engine's thread gives it back when the sequence leaves the queue.
//!
//! A refusal is told at submit, where the queue is out of reach: the engine's thread owns it. That is why
//! these numbers, alone in the engine, are behind a lock; both sides hold it for a few instructions, and
//! neither across a step or an await.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::SubmitError;

/// Most seconds that a refused caller is told to wait.
const MAX_RETRY_S: u64 = 60;
/// Weight of the last admission in the mean time between two, as a divisor.
const PACE_WEIGHT: u32 = 8;

/// How many may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaceLimits {
    /// Of all tenants together.
    pub(crate) all: usize,
    /// Of one tenant.
    pub(crate) tenant: usize,
}

impl PlaceLimits {
    /// Warm-up waits for nobody's leave.
    pub(crate) const NONE: PlaceLimits = PlaceLimits { all: usize::MAX, tenant: usize::MAX };
}

/// Who waits, and how fast the queue moves.
#[derive(Debug, Default)]
pub(crate) struct Places(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    taken: usize,
    /// Those with a place only.
    tenants: BTreeMap<Option<Box<str>>, usize>,
    /// Of the last admission behind which somebody still waited.
    last_admission: Option<Instant>,
    /// Mean time between two admissions while somebody waits.
    pace: Option<Duration>,
}

/// How a sequence left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Into the batch.
    Admitted,
    /// It ended there, or was never in it.
    Gone,
}

impl Places {
    /// Takes a place; says how many were taken before.
    ///
    /// # Errors
    /// The tenant's places are taken, or all are.
    pub(crate) fn take(
        &self,
        tenant: Option<&str>,
        limits: PlaceLimits,
    ) -> Result<usize, SubmitError> {
        let mut books = self.books();
        let own = books.tenants.get(&tenant.map(Box::from)).copied().unwrap_or(0);
        if own >= limits.tenant {
            let retry_after_s = books.retry_after_s(Instant::now());
            return Err(SubmitError::QueueFull { limit: limits.tenant, retry_after_s });
        }
        if books.taken >= limits.all {
            let retry_after_s = books.retry_after_s(Instant::now());
            return Err(SubmitError::Overloaded { limit: limits.all, retry_after_s });
        }
        books.tenants.insert(tenant.map(Box::from), own + 1);
        books.taken += 1;
        Ok(books.taken - 1)
    }

    /// Gives a place back.
    pub(crate) fn give_back(&self, tenant: Option<&str>, left: Left) {
        let mut books = self.books();
        let key = tenant.map(Box::from);
        let own = books.tenants.get(&key).copied().unwrap_or(0);
        if own > 1 {
            books.tenants.insert(key, own - 1);
        } else {
            books.tenants.remove(&key);
        }
        books.taken = books.taken.saturating_sub(1);
        if left == Left::Admitted {
            books.admitted(Instant::now());
        }
        if books.taken == 0 {
            // Nobody waits: the time to the next admission is that of the callers.
            books.last_admission = None;
        }
    }

    /// Places that are taken.
    pub(crate) fn taken(&self) -> usize {
        self.books().taken
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn admitted(&mut self, now: Instant) {
        if let Some(last) = self.last_admission {
            let interval = now.saturating_duration_since(last);
            self.pace = Some(match self.pace {
                Some(pace) => (pace * (PACE_WEIGHT - 1) + interval) / PACE_WEIGHT,
                None => interval,
            });
        }
        self.last_admission = Some(now);
    }

    /// The time in which half of what waits is admitted at the mean pace, or at that of a queue that has
    /// not moved for longer than that; 1 s to a minute, and 1 s where nothing was measured yet.
    fn retry_after_s(&self, now: Instant) -> u64 {
        let still = self.last_admission.map(|last| now.saturating_duration_since(last));
        let Some(pace) = self.pace.max(still) else { return 1 };
        let half = u32::try_from(self.taken.div_ceil(2)).unwrap_or(u32::MAX);
        let seconds = pace.saturating_mul(half).as_secs_f64().ceil();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
        let seconds = seconds as u64;
        seconds.clamp(1, MAX_RETRY_S)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PlaceLimits = PlaceLimits { all: 5, tenant: 3 };

    fn refusal(places: &Places, tenant: Option<&str>) -> SubmitError {
        places.take(tenant, LIMITS).unwrap_err()
    }

    #[test]
    fn one_tenant_cannot_take_the_places_of_all() {
        let places = Places::default();
        for n in 0..3 {
            assert_eq!(places.take(Some("a"), LIMITS), Ok(n));
        }
        let full = SubmitError::QueueFull { limit: 3, retry_after_s: 1 };
        assert_eq!(refusal(&places, Some("a")), full);
        assert_eq!(places.take(Some("b"), LIMITS), Ok(3));
        assert_eq!(places.take(None, LIMITS), Ok(4));
        let overloaded = SubmitError::Overloaded { limit: 5, retry_after_s: 1 };
        assert_eq!(refusal(&places, Some("b")), overloaded);
        places.give_back(Some("a"), Left::Gone);
        assert_eq!(places.take(Some("b"), LIMITS), Ok(4));
        // The mutation: without a bound of its own it takes what is left for the others.
        let places = Places::default();
        let no_bound = PlaceLimits { tenant: usize::MAX, ..LIMITS };
        assert!((0..5).all(|n| places.take(Some("a"), no_bound) == Ok(n)));
        assert_eq!(refusal(&places, Some("b")), overloaded);
    }

    #[test]
    fn places_that_were_given_back_leave_nothing() {
        let places = Places::default();
        for n in 0..1000 {
            let tenant = format!("key-{n}");
            places.take(Some(&tenant), LIMITS).unwrap();
            places.give_back(Some(&tenant), Left::Admitted);
        }
        assert_eq!((places.taken(), places.books().tenants.len()), (0, 0));
    }

    #[test]
    fn whoever_is_refused_waits_until_half_of_the_queue_has_gone() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut books = Books { taken: 8, ..Books::default() };
        assert_eq!(books.retry_after_s(at(0)), 1, "nothing was measured");
        for n in 0..20 {
            books.admitted(at(2 * n));
        }
        assert_eq!(books.retry_after_s(at(38)), 8, "four admissions at 2 s");
        // A queue that stands still is no faster than it was.
        assert_eq!(books.retry_after_s(at(38 + 10)), 40);
        assert_eq!(books.retry_after_s(at(38 + 1000)), MAX_RETRY_S);
    }
}
