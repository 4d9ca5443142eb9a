//! How many rows of prompts a step may have, so that steps stay short.
//!
//! Cancels, deadlines and new requests are seen between two steps. A chunk of a prompt that takes a second on
//! a slow CPU would delay all of them by a second, and a step of minutes would look like an engine that hangs.
//! Where the device computes in the engine's own thread, the chunk is therefore as long as fits the target
//! at the measured pace, within the configured one. There the bits of a row do not depend on
//! the chunk that it is computed in; a device that runs ahead is fast enough for whole chunks.

use std::time::Duration;

/// How long a step with rows of prompts may take unless configured: less than the 100 ms within which a cancel
/// is to be seen.
pub(crate) const STEP_TARGET: Duration = Duration::from_millis(75);
/// Rows below which a chunk is not cut: fewer share too little of each weight that is read.
const MIN_CHUNK: usize = 16;
/// Weight of the last step in the mean, as a divisor.
const WEIGHT: u32 = 4;

/// The measured pace of one engine.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Most rows, as configured.
    limit: usize,
    /// Mean time of one row of a prompt; `None` before the first.
    row: Option<Duration>,
    /// How long a step may take; `None`: as long as it does.
    target: Option<Duration>,
}

impl Pace {
    /// Chunks of `limit` rows at most, cut to the target if there is one.
    pub(crate) fn new(limit: usize, target: Option<Duration>) -> Pace {
        Pace { limit, row: None, target }
    }

    /// Rows of prompts that the next step may have.
    pub(crate) fn chunk(&self) -> usize {
        let Some(target) = self.target else { return self.limit };
        let shortest = MIN_CHUNK.min(self.limit);
        let Some(row) = self.row else { return shortest };
        let rows = target.as_nanos() / row.as_nanos().max(1);
        usize::try_from(rows).unwrap_or(usize::MAX).clamp(shortest, self.limit)
    }

    /// Takes the time of a step with so many rows; steps without prompts say nothing of chunks.
    pub(crate) fn note(&mut self, n_rows: usize, took: Duration) {
        let n_rows = u32::try_from(n_rows).unwrap_or(u32::MAX);
        if (n_rows as usize) < MIN_CHUNK.min(self.limit) {
            return;
        }
        let row = took / n_rows;
        self.row = Some(self.row.map_or(row, |mean| (mean * (WEIGHT - 1) + row) / WEIGHT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_millis(50);

    /// The chunks of a device whose rows take so long, one step after the other.
    fn chunks(limit: usize, row: Duration, n_steps: usize) -> Vec<usize> {
        let mut pace = Pace::new(limit, Some(TARGET));
        let chunk = |_| {
            let rows = pace.chunk();
            pace.note(rows, row * u32::try_from(rows).unwrap());
            rows
        };
        (0..n_steps).map(chunk).collect()
    }

    #[test]
    fn a_chunk_fits_the_target_on_a_slow_device_and_is_whole_on_a_fast_one() {
        // 1,000 rows a second: 50 in 50 ms. The first step is short, since nothing is known.
        assert_eq!(chunks(256, Duration::from_millis(1), 3), [16, 50, 50]);
        assert_eq!(chunks(256, Duration::from_micros(10), 2), [16, 256]);
        // So slow that no chunk fits: what is the least.
        assert_eq!(chunks(256, Duration::from_secs(1), 3), [16, 16, 16]);
        assert_eq!(chunks(8, Duration::from_micros(10), 2), [8, 8]);
    }

    #[test]
    fn it_follows_a_device_that_becomes_slower() {
        let mut pace = Pace::new(256, Some(TARGET));
        pace.note(256, Duration::from_millis(5));
        assert_eq!(pace.chunk(), 256);
        for _ in 0..20 {
            pace.note(64, Duration::from_millis(64));
        }
        assert!((50..=52).contains(&pace.chunk()), "{}", pace.chunk());
    }

    /// The mutation: with whole chunks a step of this device takes five times the target.
    #[test]
    fn without_it_a_step_takes_as_long_as_the_configured_chunk() {
        let mut pace = Pace::new(256, None);
        pace.note(16, Duration::from_millis(16));
        let step = Duration::from_millis(1) * u32::try_from(pace.chunk()).unwrap();
        assert!(step > 5 * TARGET);
    }
}
