//! [`Fence`]: what the device had built when warming ended (G-05).
//!
//! What a device builds for a shape (graphs, memory) costs the first user of that shape time, and the
//! second finds it there: a server that was called warm is not. The engine's thread therefore looks at the
//! device's counters after every step, and says which of them grew.

use exrail_kernels::DeviceCounters;

/// The device's counters at the fence, and what has been told since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fence {
    at: DeviceCounters,
    told: DeviceCounters,
}

impl Fence {
    /// Closes the fence: from here on nothing is to be built.
    pub(crate) fn closed_at(built: DeviceCounters) -> Fence {
        Fence { at: built, told: DeviceCounters::default() }
    }

    /// What was built since it was closed. Warns of the first of each kind; more of them are in the
    /// counters.
    pub(crate) fn check(&mut self, built: &DeviceCounters) -> DeviceCounters {
        let since = built.since(&self.at);
        if since != self.told {
            for ((counter, n), (_, n_told)) in since.named().into_iter().zip(self.told.named()) {
                if n_told == 0 && n > 0 {
                    tracing::warn!(
                        counter,
                        grown_by = n,
                        "built behind the warm-up fence: expected every shape to be warm, found one that was \
                         not; its first user waited for it, see `exrail_built_after_fence` in /metrics"
                    );
                }
            }
            self.told = since;
        }
        since
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Where a subscriber writes what it is told.
    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Told {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is warned of while the device has built so much, step by step.
    fn warnings(fence: &mut Fence, steps: &[DeviceCounters]) -> Vec<String> {
        let told = Told::default();
        let writer = told.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            for built in steps {
                fence.check(built);
            }
        });
        let told = String::from_utf8(told.0.lock().unwrap().clone()).unwrap();
        told.lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_first_growth_of_each_counter_is_warned_of_by_name() {
        let graphs = |n| DeviceCounters { graph_captures: n, ..DeviceCounters::default() };
        let both = DeviceCounters { device_allocs: 2, ..graphs(6) };
        let mut fence = Fence::closed_at(graphs(4));
        assert_eq!(warnings(&mut fence, &[graphs(4), graphs(4)]), Vec::<String>::new());
        let told = warnings(&mut fence, &[graphs(5), graphs(5), graphs(6), both, both]);
        assert_eq!(told.len(), 2, "{told:?}");
        for (line, counter) in told.iter().zip(["graph_captures", "device_allocs"]) {
            assert!(line.contains("WARN") && line.contains(counter), "{line}");
        }
        assert_eq!(fence.check(&both), DeviceCounters { device_allocs: 2, ..graphs(2) });
        // A fence that closes again tells anew.
        let mut fence = Fence::closed_at(both);
        assert_eq!(warnings(&mut fence, &[DeviceCounters { device_allocs: 3, ..both }]).len(), 1);
    }
}
