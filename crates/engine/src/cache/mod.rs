//! The KV cache: who owns which page, and which pages hold a prefix that others may read.
//!
//! [`KvCache`] owns all of it. `pages` are the books (free list, generations, references, pages kept
//! for their content, quarantine); `prefixes` say what a page holds; `pins` under which conditions it
//! may be read; `audit` compares everything with the tables of the running sequences, and `sums` what is in
//! the pages with what was in them.
//!
//! # Sharing
//! Only whole pages are shared, and only once finite logits were computed from all of them. A page's
//! content is named by its tokens, by the page before it (or, for a first page, by the pins and the
//! tenant), and by the hash of that chain; the hash finds candidates, the comparison of the tokens
//! decides. The page that holds a prompt's last token is always computed, for its logits are needed. A
//! sequence writes only pages that it alone holds and that nobody can find, so that there is nothing to
//! copy on write. One that will write pages which it has filled (rotation in place) gets copies of what is
//! known, and makes its own pages known when it ends, unless it has written them since.
//!
//! # A page's life
//! `free → held (n ≥ 1) → free`, or, when its content can be found, `held → kept → held` again, or
//! `kept → free` when somebody needs the room: the longest unused first, and of one prefix its end
//! first. Its content then goes to the second tier, if there is one (`host`). Each return to `free` raises the generation.

mod audit;
mod host;
mod pages;
mod pins;
mod prefixes;
mod sums;

use exrail_kernels::{KernelError, PAGE_TOKENS, PageId};

use crate::faults::{Fault, Switchboard};

pub(crate) use self::audit::TableView;
pub(crate) use self::host::DevicePages;
use self::host::HostTier;
pub use self::pages::PageFault;
pub(crate) use self::pages::PageRef;
use self::pages::Pages;
pub(crate) use self::pins::{Namespace, Pins};
use self::prefixes::Prefixes;
use self::sums::Sums;
use crate::counters::HostCounters;
use crate::session::Placed;

/// Pages of the pool and what they hold.
#[derive(Debug)]
pub(crate) struct KvCache {
    pages: Pages,
    prefixes: Prefixes,
    /// What had to make room.
    host: HostTier,
    /// Over what the pages hold.
    sums: Sums,
    /// Table entries per page while tables are checked, all 0 between checks.
    held: Vec<u32>,
    pub(crate) switchboard: Switchboard,
}

/// What a sequence needs.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    /// Pages of its table.
    pub(crate) n_pages: usize,
    /// Known tokens.
    pub(crate) tokens: &'a [u32],
    /// Whose prefixes it may read; `None` reads none.
    pub(crate) namespace: Option<&'a Namespace>,
    /// Whether the whole table must be the sequence's own: what is known it gets as copies.
    pub(crate) own: bool,
}

/// A table for one sequence.
#[derive(Debug, Default)]
pub(crate) struct Admitted {
    /// In the order of positions.
    pub(crate) pages: Vec<PageRef>,
    /// Pages at the front whose keys and values are there already.
    pub(crate) n_cached: usize,
    /// Whole pages of known tokens that were looked for and not found.
    pub(crate) n_missed: usize,
    /// Kept pages that were given up for it.
    pub(crate) n_evicted: usize,
    /// Pages to be copied, from and to, before anything else is asked of the device: those at the front of
    /// an own table whose content is known.
    pub(crate) copies: Vec<(PageId, PageId)>,
}

impl KvCache {
    /// A pool of `n_pages` free pages that hold nothing.
    ///
    /// # Panics
    /// More than `u32::MAX` pages; a page's id cannot name them.
    pub(crate) fn new(n_pages: usize, switchboard: Switchboard) -> KvCache {
        KvCache {
            pages: Pages::new(n_pages),
            prefixes: Prefixes::new(n_pages),
            host: HostTier::default(),
            sums: Sums::new(n_pages),
            held: vec![0; n_pages],
            switchboard,
        }
    }

    /// Keeps up to `n_pages` of `page_bytes` in the host's memory when they must make room.
    ///
    /// # Errors
    /// The host has not the memory.
    pub(crate) fn keep_on_host(
        &mut self,
        n_pages: usize,
        page_bytes: usize,
    ) -> Result<(), KernelError> {
        self.host = HostTier::new(n_pages, page_bytes)?;
        Ok(())
    }

    /// What the second tier holds and did.
    pub(crate) fn host(&self) -> HostCounters {
        self.host.counters()
    }

    /// Pages that can be handed out now: free ones and kept ones.
    pub(crate) fn available(&self) -> usize {
        self.pages.free() + self.pages.kept()
    }

    /// Pages that are kept for their content alone.
    pub(crate) fn kept(&self) -> usize {
        self.pages.kept()
    }

    /// Pages that are out of use.
    pub(crate) fn quarantined(&self) -> usize {
        self.pages.quarantined()
    }

    /// Pages that are in use or can be.
    pub(crate) fn usable(&self) -> usize {
        self.pages.total() - self.pages.quarantined()
    }

    /// A table of `n_pages` that begins with the longest known prefix, of which what is in the host's memory
    /// comes back to the device; `None` while there are too few pages, and then nothing has changed.
    ///
    /// # Errors
    /// A prefix names a page of another life, or the pool has not the pages that its books say. Nothing was
    /// handed out.
    pub(crate) fn admit(
        &mut self,
        wanted: &Wanted<'_>,
        device: &mut dyn DevicePages,
    ) -> Result<Option<Admitted>, PageFault> {
        if wanted.own {
            return self.admit_own(wanted, device);
        }
        let most = wanted.namespace.map_or(0, |_| shareable(wanted.tokens.len()));
        if self.available() + most < wanted.n_pages {
            return Ok(None);
        }
        let found = match wanted.namespace {
            Some(namespace) => {
                self.prefixes.find(namespace, wanted.tokens, most, &self.switchboard)
            }
            None => Vec::new(),
        };
        let n_kept = found.iter().filter(|entry| self.pages.is_kept(entry.page)).count();
        let n_new = wanted.n_pages - found.len();
        if self.available() - n_kept < n_new {
            return Ok(None);
        }
        for entry in &found {
            self.pages.check_life(*entry)?;
        }
        for entry in &found {
            self.pages.retain(*entry, &self.switchboard)?;
        }
        // Out of the second tier before others go there, so that they do not take their places.
        let back = self.take_back(wanted, found.len(), most);
        let n_evicted = self.make_room(n_new, device);
        let new = match self.allocate(n_new, &found) {
            Ok(new) => new,
            Err(fault) => {
                back.into_iter().for_each(|bytes| self.host.give_back(bytes));
                return Err(fault);
            }
        };
        let n_back = back.len().min(new.len());
        self.put_back(&new, back, device);
        let (n_cached, pages) = (found.len() + n_back, [found, new].concat());
        if let Some(namespace) = wanted.namespace.filter(|_| n_back > 0) {
            self.share(namespace, wanted.tokens, &pages, n_cached);
        }
        let n_missed = most - n_cached;
        Ok(Some(Admitted { pages, n_cached, n_missed, n_evicted, copies: Vec::new() }))
    }

    /// A table of new pages, the first of which are copies of the longest known prefix. Where there is no
    /// room for both, the prefix is computed again: whoever waited for it would wait for ever.
    fn admit_own(
        &mut self,
        wanted: &Wanted<'_>,
        device: &mut dyn DevicePages,
    ) -> Result<Option<Admitted>, PageFault> {
        let n_pages = wanted.n_pages;
        if self.available() < n_pages {
            return Ok(None);
        }
        let most = wanted.namespace.map_or(0, |_| shareable(wanted.tokens.len()));
        let mut found = wanted.namespace.map_or_else(Vec::new, |namespace| {
            self.prefixes.find(namespace, wanted.tokens, most, &self.switchboard)
        });
        let n_kept = found.iter().filter(|entry| self.pages.is_kept(entry.page)).count();
        if self.available() - n_kept < n_pages {
            found.clear();
        }
        for entry in &found {
            self.pages.check_life(*entry)?;
        }
        // Held while room is made, or else they could be what is given up.
        for entry in &found {
            self.pages.retain(*entry, &self.switchboard)?;
        }
        let n_evicted = self.make_room(n_pages, device);
        let pages = self.allocate(n_pages, &found)?;
        self.release(&found);
        let copies = found.iter().zip(&pages).map(|(from, to)| (from.page, to.page)).collect();
        let n_cached = found.len();
        Ok(Some(Admitted { pages, n_cached, n_missed: most - n_cached, n_evicted, copies }))
    }

    /// New pages for a table; what was found for it is given back where the pool has not what its books say.
    fn allocate(&mut self, n: usize, found: &[PageRef]) -> Result<Vec<PageRef>, PageFault> {
        match self.pages.allocate(n, &self.switchboard) {
            Some(new) => Ok(new),
            None if self.switchboard.guards_are_off() => Ok(Vec::new()),
            None => {
                self.release(found);
                Err(PageFault::Allocation { needed: n, free: self.pages.free() })
            }
        }
    }

    /// The pages in the host's memory that follow on the first `n_found` of a prefix.
    fn take_back(&mut self, wanted: &Wanted<'_>, n_found: usize, most: usize) -> Vec<Box<[u8]>> {
        let Some(namespace) = wanted.namespace.filter(|_| self.host.is_on()) else {
            return Vec::new();
        };
        let tokens = &wanted.tokens[..most * PAGE_TOKENS];
        let hashes = self.prefixes.hashes(namespace, tokens, &self.switchboard);
        let mut back = Vec::new();
        for (page, hash) in hashes.into_iter().enumerate().skip(n_found) {
            let tokens = &tokens[..(page + 1) * PAGE_TOKENS];
            let Some(bytes) = self.host.take(hash, namespace, tokens, &self.switchboard) else {
                break;
            };
            back.push(bytes);
        }
        back
    }

    fn put_back(&mut self, pages: &[PageRef], back: Vec<Box<[u8]>>, device: &mut dyn DevicePages) {
        for (at, bytes) in back.into_iter().enumerate() {
            if let Some(entry) = pages.get(at) {
                device.write(entry.page, &bytes);
            }
            self.host.give_back(bytes);
        }
    }

    /// The pages of the longest known prefix of these tokens, all whole pages of them at most.
    pub(crate) fn find(&self, namespace: &Namespace, tokens: &[u32]) -> Vec<PageRef> {
        self.prefixes.find(namespace, tokens, tokens.len() / PAGE_TOKENS, &self.switchboard)
    }

    /// Brings what is in the host's memory of these tokens back to the device, as far as there is room.
    ///
    /// # Errors
    /// As [`KvCache::admit`].
    pub(crate) fn recall(
        &mut self,
        namespace: &Namespace,
        tokens: &[u32],
        device: &mut dyn DevicePages,
    ) -> Result<(), PageFault> {
        let n_found = self.find(namespace, tokens).len();
        let hashes = self.prefixes.hashes(namespace, tokens, &self.switchboard);
        let left = hashes.into_iter().enumerate().skip(n_found);
        let n_left = left.take_while(|&(page, hash)| {
            let tokens = &tokens[..(page + 1) * PAGE_TOKENS];
            self.host.holds(hash, namespace, tokens, &self.switchboard)
        });
        let n_left = n_left.count();
        if n_left == 0 {
            return Ok(());
        }
        let n_pages = n_found + n_left;
        // The token behind them is nobody's: without it the last page would be one to compute.
        let tokens = [&tokens[..n_pages * PAGE_TOKENS], &[0]].concat();
        let wanted = Wanted { n_pages, tokens: &tokens, namespace: Some(namespace), own: false };
        if let Some(admitted) = self.admit(&wanted, device)? {
            self.release(&admitted.pages);
        }
        Ok(())
    }

    /// Makes the last page of these tokens known, whole pages whose others are known, with these bytes.
    ///
    /// # Errors
    /// A prefix names a page of another life. Nothing was written.
    pub(crate) fn place(
        &mut self,
        namespace: &Namespace,
        tokens: &[u32],
        bytes: &[u8],
        device: &mut dyn DevicePages,
    ) -> Result<Placed, PageFault> {
        let n_pages = tokens.len() / PAGE_TOKENS;
        if self.find(namespace, tokens).len() == n_pages {
            return Ok(Placed::Known);
        }
        let wanted = Wanted { n_pages, tokens, namespace: Some(namespace), own: false };
        let Some(Admitted { pages, n_cached, .. }) = self.admit(&wanted, device)? else {
            return Ok(Placed::NoRoom);
        };
        let follows = n_cached + 1 == n_pages;
        if let Some(last) = pages.last().filter(|_| follows) {
            device.write(last.page, bytes);
            self.share(namespace, tokens, &pages, n_pages);
        }
        // A table of its own, so that of the whole prefix the beginning stays longest.
        self.release(&pages);
        Ok(if follows { Placed::Known } else { Placed::Lost })
    }

    /// Gives back a table, its end first, so that of one prefix the beginning stays longest. Entries of
    /// pages in quarantine are passed over. Returns the entries that were stale.
    pub(crate) fn release(&mut self, table: &[PageRef]) -> usize {
        let mut n_stale = 0;
        for entry in table.iter().rev() {
            if self.pages.is_quarantined(entry.page) {
                continue;
            }
            let keep = self.prefixes.holds(*entry);
            let released = self.pages.release(*entry, keep, &self.switchboard);
            n_stale += usize::from(released.is_err());
        }
        n_stale
    }

    /// Makes the first `n_full` pages of a table known: all their positions were computed, and finite
    /// logits from them. Pages whose content is known already stay their sequence's own.
    pub(crate) fn share(
        &mut self,
        namespace: &Namespace,
        tokens: &[u32],
        table: &[PageRef],
        n_full: usize,
    ) {
        self.prefixes.add(namespace, tokens, &table[..n_full], &self.switchboard);
    }

    /// Lets nobody find the content of these pages any more.
    pub(crate) fn forget(&mut self, table: &[PageRef]) {
        for entry in table {
            if self.prefixes.holds(*entry) {
                self.switchboard.gives_up(entry.page);
                self.prefixes.forget(entry.page);
                self.pages.discard(entry.page, &self.switchboard);
            }
        }
    }

    /// Takes a page out of use until the engine starts again. Its holders must give their tables back.
    pub(crate) fn quarantine(&mut self, page: PageId) {
        self.prefixes.forget(page);
        self.pages.quarantine(page);
        // What left while the books were wrong may be something else than they said.
        self.host.clear();
    }

    /// Forgets every table and every content; pages in quarantine stay there.
    pub(crate) fn reset(&mut self) {
        self.prefixes.clear();
        self.host.clear();
        self.pages.reset();
    }

    /// Whether a table entry names a page of another life.
    pub(crate) fn is_stale(&self, entry: PageRef) -> bool {
        self.pages.check_life(entry).is_err()
    }

    /// Does to the books what a stray write would, when it is asked for.
    pub(crate) fn disturb(&mut self) {
        if let Some(page) = self.prefixes.first()
            && self.switchboard.injects(Fault::FlipToken)
        {
            self.switchboard.flips(page);
            self.prefixes.flip_token(page);
        }
        if let Some(page) = self.pages.first_held()
            && self.switchboard.injects(Fault::FlipRecord)
        {
            self.pages.flip_references(page, 1);
        }
    }

    /// Frees kept pages until `n` are free or none is kept, and keeps their content in the host's memory where
    /// that has room; returns how many.
    fn make_room(&mut self, n: usize, device: &mut dyn DevicePages) -> usize {
        let mut n_evicted = 0;
        while self.pages.free() < n {
            let Some(page) = self.pages.evict_oldest(&self.switchboard) else { break };
            self.switchboard.gives_up(page);
            if self.host.is_on()
                && let Some(path) = self.prefixes.path(page)
            {
                self.host.keep(path, |bytes| device.read(page, bytes), &self.switchboard);
            }
            self.prefixes.forget(page);
            n_evicted += 1;
        }
        n_evicted
    }
}

/// What tests break by hand.
#[cfg(test)]
impl KvCache {
    pub(crate) fn inject(&mut self, faults: &[Fault]) {
        self.switchboard.faults = faults.to_vec();
    }

    pub(crate) fn switch_guards_off(&mut self) {
        self.switchboard.guards_off = true;
    }

    pub(crate) fn flip_references(&mut self, page: PageId, bits: u32) {
        self.pages.flip_references(page, bits);
    }

    pub(crate) fn flip_token(&mut self, page: PageId) {
        self.prefixes.flip_token(page);
    }

    pub(crate) fn flip_host_bits(&mut self) {
        self.host.flip_bits();
    }

    pub(crate) fn is_kept(&self, page: PageId) -> bool {
        self.pages.is_kept(page)
    }

    pub(crate) fn lose_a_page(&mut self) {
        self.pages.lose_a_page();
    }
}

/// Whole pages of a sequence that may come from the cache: its last token is computed always.
fn shareable(n_tokens: usize) -> usize {
    n_tokens.saturating_sub(1) / PAGE_TOKENS
}
