//! The KV cache: who owns which page, and which pages hold a prefix that others may read.
//!
//! [`KvCache`] owns all of it. `pages` are the books (free list, generations, references, pages kept
//! for their content, quarantine); `prefixes` say what a page holds; `pins` under which conditions it
//! may be read; `audit` compares everything with the tables of the running sequences.
//!
//! # Sharing
//! Only whole pages are shared, and only once finite logits were computed from all of them. A page's
//! content is named by its tokens, by the page before it (or, for a first page, by the pins and the
//! tenant), and by the hash of that chain; the hash finds candidates, the comparison of the tokens
//! decides. The page that holds a prompt's last token is always computed, for its logits are needed. A
//! sequence writes only pages that it alone holds and that nobody can find, so that there is nothing to
//! copy on write.
//!
//! # A page's life
//! `free → held (n ≥ 1) → free`, or, when its content can be found, `held → kept → held` again, or
//! `kept → free` when somebody needs the room: the longest unused first, and of one prefix its end
//! first. Each return to `free` raises the generation.

mod audit;
mod pages;
mod pins;
mod prefixes;

use exrail_kernels::{PAGE_TOKENS, PageId};

use crate::faults::{Fault, Switchboard};

pub(crate) use self::audit::TableView;
pub use self::pages::PageFault;
pub(crate) use self::pages::PageRef;
use self::pages::Pages;
pub(crate) use self::pins::{Namespace, Pins};
use self::prefixes::Prefixes;

/// Pages of the pool and what they hold.
#[derive(Debug)]
pub(crate) struct KvCache {
    pages: Pages,
    prefixes: Prefixes,
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
            held: vec![0; n_pages],
            switchboard,
        }
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

    /// A table of `n_pages` that begins with the longest known prefix; `None` while there are too few
    /// pages, and then nothing has changed.
    ///
    /// # Errors
    /// A prefix names a page of another life, or the pool has not the pages that its books say. Nothing was
    /// handed out.
    pub(crate) fn admit(&mut self, wanted: &Wanted<'_>) -> Result<Option<Admitted>, PageFault> {
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
        let n_evicted = self.make_room(n_new);
        let new = match self.pages.allocate(n_new, &self.switchboard) {
            Some(new) => new,
            None if self.switchboard.guards_are_off() => Vec::new(),
            None => {
                self.release(&found);
                return Err(PageFault::Allocation { needed: n_new, free: self.pages.free() });
            }
        };
        let n_cached = found.len();
        let pages = [found, new].concat();
        Ok(Some(Admitted { pages, n_cached, n_missed: most - n_cached, n_evicted }))
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
    }

    /// Forgets every table and every content; pages in quarantine stay there.
    pub(crate) fn reset(&mut self) {
        self.prefixes.clear();
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

    /// Frees kept pages until `n` are free or none is kept; returns how many.
    fn make_room(&mut self, n: usize) -> usize {
        let mut n_evicted = 0;
        while self.pages.free() < n {
            let Some(page) = self.pages.evict_oldest(&self.switchboard) else { break };
            self.switchboard.gives_up(page);
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
