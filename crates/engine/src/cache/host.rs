//! The second tier: pages in the host's memory that had to make room on the device.
//!
//! A page is in one tier. What leaves the device is copied here with a checksum over its bytes, and what comes
//! back is compared with it first: a copy that changed meanwhile is dropped and counted, and the prefix is
//! computed from there on. All buffers are there from the start, so that nothing is allocated for a copy;
//! the one that came longest ago goes first, which of one prefix is its end.

use std::collections::{BTreeMap, HashMap};

use exrail_kernels::{KernelError, PageId};

use super::pins::Namespace;
use crate::checksum::checksum;
use crate::counters::HostCounters;
use crate::faults::Switchboard;

/// The pages of the device as they leave and come back.
pub(crate) trait DevicePages {
    /// Bytes of a page.
    fn page_bytes(&self) -> usize;
    /// Copies a page out.
    fn read(&mut self, page: PageId, bytes: &mut [u8]);
    /// Puts bytes back that [`DevicePages::read`] gave.
    fn write(&mut self, page: PageId, bytes: &[u8]);
}

/// What a page holds: all tokens up to its end, whose they are, and the hash of that chain.
#[derive(Clone, Debug)]
pub(super) struct Path {
    pub(super) hash: u64,
    pub(super) namespace: Namespace,
    pub(super) tokens: Vec<u32>,
}

#[derive(Debug)]
struct HostPage {
    path: Path,
    checksum: u64,
    bytes: Box<[u8]>,
}

/// Copies of pages, and buffers for more.
#[derive(Debug, Default)]
pub(super) struct HostTier {
    free: Vec<Box<[u8]>>,
    /// By the time they came.
    pages: BTreeMap<u64, HostPage>,
    by_hash: HashMap<u64, Vec<u64>>,
    clock: u64,
    counters: HostCounters,
}

impl HostTier {
    /// Room for `n_pages` of `page_bytes`, which is taken from the system now.
    pub(super) fn new(n_pages: usize, page_bytes: usize) -> Result<HostTier, KernelError> {
        let refused = |_| KernelError::OutOfMemory {
            what: "the host tier of the KV cache".to_owned(),
            wanted_bytes: n_pages.saturating_mul(page_bytes),
            device: "host".to_owned(),
        };
        let mut free = Vec::new();
        for _ in 0..n_pages {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(page_bytes).map_err(refused)?;
            bytes.resize(page_bytes, 0);
            free.push(bytes.into_boxed_slice());
        }
        let counters = HostCounters { pages_total: n_pages, ..HostCounters::default() };
        Ok(HostTier { free, counters, ..HostTier::default() })
    }

    /// Whether it has room for anything at all.
    pub(super) fn is_on(&self) -> bool {
        self.counters.pages_total > 0
    }

    pub(super) fn counters(&self) -> HostCounters {
        HostCounters { pages: self.pages.len(), ..self.counters }
    }

    /// Keeps what `read` gives, in the place of the copy that came longest ago when there is no other.
    pub(super) fn keep(
        &mut self,
        path: Path,
        read: impl FnOnce(&mut [u8]),
        switchboard: &Switchboard,
    ) {
        if let Some(stamp) = self.find(path.hash, &path.namespace, &path.tokens, switchboard) {
            self.drop_page(stamp);
        } else if self.free.is_empty()
            && let Some((&oldest, _)) = self.pages.first_key_value()
        {
            self.drop_page(oldest);
            self.counters.evicted += 1;
        }
        // Every buffer may be on its way back to the device.
        let Some(mut bytes) = self.free.pop() else { return };
        read(&mut bytes);
        let stamp = self.clock;
        self.clock += 1;
        self.by_hash.entry(path.hash).or_default().push(stamp);
        let checksum = checksum(&bytes);
        self.pages.insert(stamp, HostPage { path, checksum, bytes });
        self.counters.stored += 1;
    }

    /// Takes the copy of this page out, if it is here and what it was; its buffer is to be given back.
    pub(super) fn take(
        &mut self,
        hash: u64,
        namespace: &Namespace,
        tokens: &[u32],
        switchboard: &Switchboard,
    ) -> Option<Box<[u8]>> {
        let stamp = self.find(hash, namespace, tokens, switchboard)?;
        let page = self.remove(stamp)?;
        if checksum(&page.bytes) == page.checksum || switchboard.guards_are_off() {
            self.counters.returned += 1;
            return Some(page.bytes);
        }
        self.counters.corrupt += 1;
        tracing::error!("KV integrity: a page changed in the host's memory; it is computed anew");
        self.free.push(page.bytes);
        None
    }

    /// Whether the copy of this page is here.
    pub(super) fn holds(
        &self,
        hash: u64,
        namespace: &Namespace,
        tokens: &[u32],
        switchboard: &Switchboard,
    ) -> bool {
        self.find(hash, namespace, tokens, switchboard).is_some()
    }

    /// Takes a buffer of [`HostTier::take`] back.
    pub(super) fn give_back(&mut self, bytes: Box<[u8]>) {
        self.free.push(bytes);
    }

    /// Forgets all copies.
    pub(super) fn clear(&mut self) {
        self.by_hash.clear();
        self.free.extend(std::mem::take(&mut self.pages).into_values().map(|page| page.bytes));
    }

    fn find(
        &self,
        hash: u64,
        namespace: &Namespace,
        tokens: &[u32],
        switchboard: &Switchboard,
    ) -> Option<u64> {
        let is_it = |stamp: &&u64| {
            self.pages.get(*stamp).is_some_and(|page| page.path.is(namespace, tokens, switchboard))
        };
        self.by_hash.get(&hash)?.iter().find(is_it).copied()
    }

    fn drop_page(&mut self, stamp: u64) {
        if let Some(page) = self.remove(stamp) {
            self.free.push(page.bytes);
        }
    }

    fn remove(&mut self, stamp: u64) -> Option<HostPage> {
        let page = self.pages.remove(&stamp)?;
        if let Some(stamps) = self.by_hash.get_mut(&page.path.hash) {
            stamps.retain(|other| *other != stamp);
            if stamps.is_empty() {
                self.by_hash.remove(&page.path.hash);
            }
        }
        Some(page)
    }

    /// Flips a bit of every copy.
    #[cfg(test)]
    pub(super) fn flip_bits(&mut self) {
        for page in self.pages.values_mut() {
            // The sign of a value, so that whoever reads it says something else.
            page.bytes.iter_mut().for_each(|byte| *byte ^= 0x80);
        }
    }
}

impl Path {
    /// Whether it is of these tokens, compared one by one, and of this namespace.
    fn is(&self, namespace: &Namespace, tokens: &[u32], switchboard: &Switchboard) -> bool {
        *self.tokens == *tokens && self.namespace.is_as(namespace, switchboard)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use exrail_kernels::KvDtype;

    use super::*;
    use crate::cache::Pins;

    fn namespace(tenant: Option<&str>) -> Namespace {
        let pins = Arc::new(Pins::for_tests("model", KvDtype::F16));
        Namespace { pins, tenant: tenant.map(Arc::from) }
    }

    /// All of one hash, so that the comparison decides.
    fn path(n: u32, tenant: Option<&str>) -> Path {
        Path { hash: 7, namespace: namespace(tenant), tokens: vec![n; 4] }
    }

    fn tier(n_pages: usize, kept: impl IntoIterator<Item = u32>) -> HostTier {
        let mut tier = HostTier::new(n_pages, 64).unwrap();
        for n in kept {
            tier.keep(path(n, None), |bytes| bytes.fill(n as u8), &Switchboard::default());
        }
        tier
    }

    fn taken(tier: &mut HostTier, n: u32, tenant: Option<&str>) -> Option<u8> {
        let Path { hash, namespace, tokens } = path(n, tenant);
        let bytes = tier.take(hash, &namespace, &tokens, &Switchboard::default())?;
        let first = bytes[0];
        tier.give_back(bytes);
        Some(first)
    }

    #[test]
    fn what_came_longest_ago_goes_first_and_a_page_is_taken_once() {
        let mut tier = tier(3, [1, 2, 3, 1, 4]);
        assert_eq!(
            tier.counters(),
            HostCounters {
                pages_total: 3,
                pages: 3,
                stored: 5,
                returned: 0,
                evicted: 1,
                corrupt: 0,
            }
        );
        assert_eq!(
            [1, 2, 3, 4].map(|n| taken(&mut tier, n, None)),
            [Some(1), None, Some(3), Some(4)]
        );
        assert_eq!(taken(&mut tier, 1, None), None);
        assert_eq!((tier.counters().pages, tier.free.len()), (0, 3));
    }

    #[test]
    fn another_tenant_finds_nothing_under_the_same_hash() {
        let mut tier = tier(2, [1]);
        assert_eq!(taken(&mut tier, 1, Some("a")), None);
        assert_eq!(taken(&mut tier, 2, None), None);
        assert_eq!(taken(&mut tier, 1, None), Some(1));
    }

    #[test]
    fn a_copy_that_changed_is_dropped_and_counted() {
        let mut tier = tier(2, [1]);
        tier.pages.values_mut().for_each(|page| page.bytes[63] ^= 1);
        assert_eq!(taken(&mut tier, 1, None), None);
        let counters = tier.counters();
        assert_eq!((counters.corrupt, counters.returned, tier.free.len()), (1, 0, 2));
    }

    #[test]
    fn with_all_buffers_on_their_way_a_page_is_dropped_and_nothing_breaks() {
        let mut tier = tier(1, [1]);
        let Path { hash, namespace, tokens } = path(1, None);
        let bytes = tier.take(hash, &namespace, &tokens, &Switchboard::default()).unwrap();
        tier.keep(path(2, None), |_| panic!("there is no buffer"), &Switchboard::default());
        tier.give_back(bytes);
        assert_eq!(taken(&mut tier, 2, None), None);
        tier.clear();
        assert_eq!(tier.free.len(), 1);
    }
}
