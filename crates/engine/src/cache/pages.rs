//! The books of the pages: free list, generations, reference counts, pages kept for their content, and
//! quarantine.
//!
//! This is bookkeeping only; the keys and values live in the device's pool. Each return to the free list
//! raises a page's generation, so a table entry that outlives its page is recognised by its old
//! generation (guardrails G-17), and each record carries a seal over its other fields, so that a change
//! that no rule made is recognised too. Pages have one size, so the pool cannot fragment externally.

use std::collections::BTreeMap;

use exrail_kernels::PageId;
use thiserror::Error;

use crate::faults::{Fault, Switchboard};

/// A table entry: a page and the generation it had when it was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageRef {
    /// Index in the pool.
    pub(crate) page: PageId,
    /// Generation at allocation.
    pub(crate) generation: u32,
}

/// A broken invariant of the page pool.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PageFault {
    /// A table names a page of another life.
    #[error("page {page}: table entry has generation {found}, the pool has {expected}")]
    Generation {
        /// Page index.
        page: u32,
        /// Generation in the pool.
        expected: u32,
        /// Generation in the table entry.
        found: u32,
    },
    /// A table names a page that nobody holds.
    #[error("page {page}: referenced by a table but not held in the pool")]
    NotHeld {
        /// Page index.
        page: u32,
    },
    /// The pool gave no pages although its books have them.
    #[error("page pool: expected {needed} pages of {free} free ones, found none")]
    Allocation {
        /// Pages that were asked for.
        needed: usize,
        /// Pages on the free list.
        free: usize,
    },
    /// The pool counts other references than the tables hold.
    #[error("page {page}: expected {expected} references by the tables, found {found} in the pool")]
    References {
        /// Page index.
        page: u32,
        /// Table entries that name the page.
        expected: u32,
        /// Count in the pool.
        found: u32,
    },
    /// A page is on the free list or among the kept ones too often, or is there while referenced.
    #[error("page {page}: free or kept {times} times with {references} references")]
    FreeList {
        /// Page index.
        page: u32,
        /// Occurrences on the free list and among the kept pages.
        times: u32,
        /// Count in the pool.
        references: u32,
    },
    /// A page's record was changed by something that is no rule of the books.
    #[error("page {page}: expected the seal of its record, found another")]
    Seal {
        /// Page index.
        page: u32,
    },
    /// A page that is about to be written is in more than one table.
    #[error("page {page}: about to be written, expected 1 reference, found {references}")]
    Alias {
        /// Page index.
        page: u32,
        /// Count in the pool.
        references: u32,
    },
    /// A page that is about to be written can be found by others.
    #[error("page {page}: about to be written, expected no shared content, found some")]
    Shared {
        /// Page index.
        page: u32,
    },
    /// A table names a page that holds other tokens than the table's sequence has.
    #[error("page {page}: expected the tokens of its sequence, found others")]
    Tokens {
        /// Page index.
        page: u32,
    },
    /// What a page holds is not what its hash says.
    #[error("page {page}: expected the content that its hash names, found another")]
    Content {
        /// Page index.
        page: u32,
    },
    /// The keys and values of a page that nobody writes are others than they were.
    #[error("page {page}: expected the keys and values that it had, found others")]
    Bytes {
        /// Page index.
        page: u32,
    },
    /// Free, kept, referenced and withdrawn pages do not add up to the pool.
    #[error(
        "page pool: {free} free + {kept} kept + {referenced} referenced + {quarantined} quarantined \
         pages, expected {total}"
    )]
    Conservation {
        /// Pages on the free list.
        free: usize,
        /// Pages kept for their content.
        kept: usize,
        /// Pages with a reference.
        referenced: usize,
        /// Pages out of use.
        quarantined: usize,
        /// Pages of the pool.
        total: usize,
    },
    /// A page became free and kept its generation.
    #[error("page pool: expected generations that add up to {expected}, found {found}")]
    Lives {
        /// Returns to the free list, modulo 2^32.
        expected: u32,
        /// Sum of the generations, modulo 2^32.
        found: u32,
    },
    /// So many pages are in quarantine that the sequence no longer fits.
    #[error("page pool: expected {needed} usable pages, found {usable}; restart the engine")]
    TooFew {
        /// Pages of the sequence.
        needed: usize,
        /// Pages out of quarantine.
        usable: usize,
    },
}

impl PageFault {
    /// The page that broke an invariant; `None` when it cannot be told.
    pub(crate) fn page(&self) -> Option<PageId> {
        match *self {
            PageFault::Generation { page, .. }
            | PageFault::NotHeld { page }
            | PageFault::References { page, .. }
            | PageFault::FreeList { page, .. }
            | PageFault::Seal { page }
            | PageFault::Alias { page, .. }
            | PageFault::Shared { page }
            | PageFault::Tokens { page }
            | PageFault::Content { page }
            | PageFault::Bytes { page } => Some(PageId(page)),
            PageFault::Allocation { .. }
            | PageFault::Conservation { .. }
            | PageFault::Lives { .. }
            | PageFault::TooFew { .. } => None,
        }
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    /// In at least one table.
    Held,
    /// In no table, for its content; by the time of its last use.
    Kept(u64),
    /// Out of use.
    Quarantined,
}

/// The record of one page.
#[derive(Clone, Copy, Debug)]
struct Record {
    place: Place,
    generation: u32,
    references: u32,
    /// Of the other fields and the page's index.
    seal: u32,
}

impl Record {
    fn new(page: PageId) -> Record {
        let mut record = Record { place: Place::Free, generation: 0, references: 0, seal: 0 };
        record.seal = record.seal_of(page);
        record
    }

    /// FNV-1a over 64-bit words, folded: any flipped bit changes it.
    fn seal_of(&self, page: PageId) -> u32 {
        let place = match self.place {
            Place::Free => 0,
            Place::Held => 1,
            Place::Quarantined => 2,
            Place::Kept(stamp) => 3 + stamp,
        };
        let counts = u64::from(self.generation) << 32 | u64::from(self.references);
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for word in [u64::from(page.0), counts, place] {
            hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
            hash ^= hash >> 29;
        }
        #[expect(clippy::cast_possible_truncation, reason = "both halves are folded into one")]
        let folded = (hash ^ hash >> 32) as u32;
        folded
    }

    fn is_whole(&self, page: PageId) -> bool {
        self.seal == self.seal_of(page)
    }
}

/// The books of one page pool.
#[derive(Debug)]
pub(crate) struct Pages {
    /// Pages without references; the last is handed out first, so that warm memory is reused.
    free: Vec<PageId>,
    /// Pages without references that hold something, by the time of their last use.
    kept: BTreeMap<u64, PageId>,
    records: Vec<Record>,
    n_quarantined: usize,
    /// Returns to the free list.
    n_freed: u32,
    /// The next time.
    clock: u64,
}

impl Pages {
    /// A pool of `n_pages` free pages.
    ///
    /// # Panics
    /// More than `u32::MAX` pages; [`PageId`] cannot name them.
    #[must_use]
    pub(crate) fn new(n_pages: usize) -> Pages {
        let n = u32::try_from(n_pages).expect("PageId is 32 bits wide");
        Pages {
            free: (0..n).rev().map(PageId).collect(),
            kept: BTreeMap::new(),
            records: (0..n).map(|page| Record::new(PageId(page))).collect(),
            n_quarantined: 0,
            n_freed: 0,
            clock: 0,
        }
    }

    /// Pages of the pool.
    #[must_use]
    pub(crate) fn total(&self) -> usize {
        self.records.len()
    }

    /// Pages that nobody holds and that hold nothing.
    #[must_use]
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that nobody holds and that hold something.
    #[must_use]
    pub(crate) fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Pages out of use.
    #[must_use]
    pub(crate) fn quarantined(&self) -> usize {
        self.n_quarantined
    }

    /// Whether nobody holds the page, and it holds something.
    pub(crate) fn is_kept(&self, page: PageId) -> bool {
        matches!(self.records[index(page)].place, Place::Kept(_))
    }

    /// Whether the page is out of use.
    pub(crate) fn is_quarantined(&self, page: PageId) -> bool {
        self.records[index(page)].place == Place::Quarantined
    }

    /// Hands out `n` free pages with one reference each, or none at all if fewer are free.
    #[must_use]
    pub(crate) fn allocate(&mut self, n: usize, faults: &Switchboard) -> Option<Vec<PageRef>> {
        if n > 0
            && let Some(page) = self.first_held()
            && faults.injects(Fault::ReuseEarly)
        {
            self.change(page, |record| record.references = 0);
            self.set_free(page, faults);
        }
        if n > 0 && faults.injects(Fault::FailAllocation) {
            return None;
        }
        let keep = self.free.len().checked_sub(n)?;
        let taken = self.free.split_off(keep);
        let hand_out = |page| {
            self.change(page, |record| {
                record.place = Place::Held;
                record.references = 1;
            });
            PageRef { page, generation: self.records[index(page)].generation }
        };
        Some(taken.into_iter().rev().map(hand_out).collect())
    }

    /// Adds a reference, for one more table that names the page; a kept page is held again.
    ///
    /// # Errors
    /// The entry is stale or the page is free.
    pub(crate) fn retain(&mut self, entry: PageRef, faults: &Switchboard) -> Result<(), PageFault> {
        self.check_life(entry)?;
        let was = self.records[index(entry.page)].place;
        let n = u32::from(was != Place::Held || !faults.injects(Fault::SkipReference));
        if let Place::Kept(stamp) = was {
            self.kept.remove(&stamp);
        }
        self.change(entry.page, |record| {
            record.place = Place::Held;
            record.references += n;
        });
        Ok(())
    }

    /// Gives back one reference; the last one frees the page and ends its generation, or keeps it for
    /// its content.
    ///
    /// # Errors
    /// The entry is stale or nobody holds the page. The books are unchanged then.
    pub(crate) fn release(
        &mut self,
        entry: PageRef,
        keep: bool,
        faults: &Switchboard,
    ) -> Result<(), PageFault> {
        self.check_held(entry)?;
        self.change(entry.page, |record| record.references -= 1);
        if self.records[index(entry.page)].references == 0 {
            if keep {
                let stamp = self.clock;
                self.clock += 1;
                self.kept.insert(stamp, entry.page);
                self.change(entry.page, |record| record.place = Place::Kept(stamp));
            } else {
                self.set_free(entry.page, faults);
            }
        }
        Ok(())
    }

    /// Frees the kept page that was used longest ago.
    pub(crate) fn evict_oldest(&mut self, faults: &Switchboard) -> Option<PageId> {
        let (_, page) = self.kept.pop_first()?;
        self.set_free(page, faults);
        Some(page)
    }

    /// The page's content is of no use any more: frees it if it was kept for that alone.
    pub(crate) fn discard(&mut self, page: PageId, faults: &Switchboard) {
        if let Place::Kept(stamp) = self.records[index(page)].place {
            self.kept.remove(&stamp);
            self.set_free(page, faults);
        }
    }

    /// Takes a page out of use, wherever it is. Its record is whole afterwards.
    pub(crate) fn quarantine(&mut self, page: PageId) {
        self.free.retain(|free| *free != page);
        self.kept.retain(|_, kept| *kept != page);
        let record = &mut self.records[index(page)];
        self.n_quarantined += usize::from(record.place != Place::Quarantined);
        record.place = Place::Quarantined;
        record.references = 0;
        record.generation = record.generation.wrapping_add(1);
        record.seal = record.seal_of(page);
        // A page whose generation was the fault must not leave the sum wrong behind it.
        self.n_freed = self.sum_of_generations();
    }

    /// Whether a table entry still names the page it was given.
    ///
    /// # Errors
    /// The record is not whole, the generation differs, or nobody holds the page.
    pub(crate) fn check(&self, entry: PageRef) -> Result<(), PageFault> {
        if !self.records[index(entry.page)].is_whole(entry.page) {
            return Err(PageFault::Seal { page: entry.page.0 });
        }
        self.check_held(entry)
    }

    /// Whether an entry names a page that is held or kept in the same life.
    ///
    /// # Errors
    /// The generation differs, or the page is neither held nor kept.
    pub(crate) fn check_life(&self, entry: PageRef) -> Result<(), PageFault> {
        let (page, record) = (entry.page.0, &self.records[index(entry.page)]);
        let (expected, found) = (record.generation, entry.generation);
        if found != expected {
            return Err(PageFault::Generation { page, expected, found });
        }
        match record.place {
            Place::Held | Place::Kept(_) => Ok(()),
            Place::Free | Place::Quarantined => Err(PageFault::NotHeld { page }),
        }
    }

    fn check_held(&self, entry: PageRef) -> Result<(), PageFault> {
        self.check_life(entry)?;
        if self.references(entry.page) == 0 {
            return Err(PageFault::NotHeld { page: entry.page.0 });
        }
        Ok(())
    }

    /// Tables that name the page, as the books have it.
    pub(crate) fn references(&self, page: PageId) -> u32 {
        self.records[index(page)].references
    }

    /// Compares the books with themselves and with the table entries per page, `held` `(pages)`: seals,
    /// reference counts, free list and kept pages, conservation, generations. O(pages of the pool).
    ///
    /// # Errors
    /// The first broken invariant.
    pub(crate) fn audit(&self, held: &[u32]) -> Result<(), PageFault> {
        let mut listed = vec![0_u32; self.total()];
        for page in self.free.iter().chain(self.kept.values()) {
            listed[index(*page)] += 1;
        }
        let mut referenced = 0;
        for (page, ((record, &expected), &times)) in
            (0_u32..).zip(self.records.iter().zip(held).zip(&listed))
        {
            let found = record.references;
            if !record.is_whole(PageId(page)) {
                return Err(PageFault::Seal { page });
            }
            if expected != found {
                return Err(PageFault::References { page, expected, found });
            }
            if times > 1 || times == 1 && (found > 0 || record.place == Place::Quarantined) {
                return Err(PageFault::FreeList { page, times, references: found });
            }
            referenced += usize::from(found > 0);
        }
        let (free, kept, quarantined) = (self.free.len(), self.kept.len(), self.n_quarantined);
        let total = self.total();
        if free + kept + referenced + quarantined != total {
            let fault = PageFault::Conservation { free, kept, referenced, quarantined, total };
            return Err(fault);
        }
        let (expected, found) = (self.n_freed, self.sum_of_generations());
        if expected != found {
            return Err(PageFault::Lives { expected, found });
        }
        Ok(())
    }

    /// Forgets every table and every content: all pages that are not in quarantine are free, and all
    /// generations new.
    pub(crate) fn reset(&mut self) {
        self.free.clear();
        self.kept.clear();
        self.n_quarantined = 0;
        for (page, record) in (0_u32..).map(PageId).zip(&mut self.records) {
            record.references = 0;
            record.generation = record.generation.wrapping_add(1);
            if record.place == Place::Quarantined {
                self.n_quarantined += 1;
            } else {
                record.place = Place::Free;
                self.free.push(page);
            }
            record.seal = record.seal_of(page);
        }
        self.free.reverse();
        self.n_freed = self.sum_of_generations();
    }

    fn set_free(&mut self, page: PageId, faults: &Switchboard) {
        let n = u32::from(!faults.injects(Fault::KeepGeneration));
        self.n_freed = self.n_freed.wrapping_add(1);
        self.change(page, |record| {
            record.place = Place::Free;
            record.generation = record.generation.wrapping_add(n);
        });
        self.free.push(page);
    }

    /// The first page that is in a table.
    pub(super) fn first_held(&self) -> Option<PageId> {
        let pages = (0_u32..).map(PageId).zip(&self.records);
        pages.filter(|(_, record)| record.place == Place::Held).map(|(page, _)| page).next()
    }

    /// Changes a record by a rule. One that was not whole before is not afterwards either, so that the
    /// next check still finds it.
    fn change(&mut self, page: PageId, rule: impl FnOnce(&mut Record)) {
        let record = &mut self.records[index(page)];
        let was_whole = record.is_whole(page);
        rule(record);
        if was_whole {
            record.seal = record.seal_of(page);
        }
    }

    fn sum_of_generations(&self) -> u32 {
        self.records.iter().fold(0, |sum, record| sum.wrapping_add(record.generation))
    }

    /// Flips bits of the count of a page's references, as a stray write would.
    pub(crate) fn flip_references(&mut self, page: PageId, bits: u32) {
        self.records[index(page)].references ^= bits;
    }

    /// Takes a page off the free list and forgets it.
    #[cfg(test)]
    pub(crate) fn lose_a_page(&mut self) {
        self.free.pop();
    }
}

/// Where a page stands in lists of all pages.
pub(crate) fn index(page: PageId) -> usize {
    page.0 as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    use super::*;

    /// Nothing is broken.
    fn whole() -> Switchboard {
        Switchboard::default()
    }

    /// Table entries per page.
    fn held<'a>(pages: &Pages, tables: impl IntoIterator<Item = &'a [PageRef]>) -> Vec<u32> {
        let mut held = vec![0; pages.total()];
        for entry in tables.into_iter().flatten() {
            held[index(entry.page)] += 1;
        }
        held
    }

    #[test]
    fn a_stale_entry_is_recognised_after_its_page_was_reused() {
        let mut pages = Pages::new(1);
        let old = pages.allocate(1, &whole()).unwrap()[0];
        pages.release(old, false, &whole()).unwrap();
        let new = pages.allocate(1, &whole()).unwrap()[0];
        assert_eq!(new.page, old.page);
        assert!(matches!(
            pages.release(old, false, &whole()),
            Err(PageFault::Generation { page: 0, .. })
        ));
        pages.check(new).unwrap();
    }

    #[test]
    fn double_release_is_refused_and_changes_nothing() {
        let mut pages = Pages::new(2);
        let entry = pages.allocate(1, &whole()).unwrap()[0];
        pages.release(entry, false, &whole()).unwrap();
        assert!(pages.release(entry, false, &whole()).is_err());
        assert_eq!(pages.free(), 2);
        pages.audit(&held(&pages, [])).unwrap();
    }

    // Mutations: each switches one rule off by hand; the audit must see it.

    #[test]
    fn audit_catches_a_skipped_reference_increment() {
        let mut pages = Pages::new(3);
        let table = pages.allocate(2, &whole()).unwrap();
        let sharing = [table[0]]; // without retain()
        let fault = pages.audit(&held(&pages, [&table[..], &sharing[..]])).unwrap_err();
        assert_eq!(fault, PageFault::References { page: table[0].page.0, expected: 2, found: 1 });
    }

    #[test]
    fn audit_catches_a_page_reused_while_referenced() {
        let mut pages = Pages::new(2);
        let table = pages.allocate(1, &whole()).unwrap();
        pages.free.push(table[0].page);
        assert!(matches!(
            pages.audit(&held(&pages, [&table[..]])),
            Err(PageFault::FreeList { .. })
        ));
    }

    #[test]
    fn audit_catches_a_lost_page() {
        let mut pages = Pages::new(2);
        pages.free.pop();
        let fault = pages.audit(&held(&pages, [])).unwrap_err();
        assert_eq!(
            fault,
            PageFault::Conservation { free: 1, kept: 0, referenced: 0, quarantined: 0, total: 2 }
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Random allocate, share and free against a naive map of page → holders.
        #[test]
        fn books_agree_with_a_naive_map(actions in prop::collection::vec((0..3_u8, 0..6_usize), 0..200)) {
            let mut pages = Pages::new(12);
            let mut tables: Vec<Vec<PageRef>> = Vec::new();
            for (action, argument) in actions {
                match action {
                    0 => {
                        let free_before = pages.free();
                        match pages.allocate(argument, &whole()) {
                            Some(table) => tables.push(table),
                            None => prop_assert!(free_before < argument),
                        }
                    }
                    1 if !tables.is_empty() => {
                        let copy = tables[argument % tables.len()].clone();
                        for entry in &copy {
                            pages.retain(*entry, &whole()).unwrap();
                        }
                        tables.push(copy);
                    }
                    _ if !tables.is_empty() => {
                        let at = argument % tables.len();
                        for entry in tables.swap_remove(at) {
                            pages.release(entry, false, &whole()).unwrap();
                        }
                    }
                    _ => {}
                }
                let mut naive: BTreeMap<u32, u32> = BTreeMap::new();
                for entry in tables.iter().flatten() {
                    *naive.entry(entry.page.0).or_default() += 1;
                }
                prop_assert_eq!(pages.free() + naive.len(), 12);
                pages.audit(&held(&pages, tables.iter().map(Vec::as_slice))).unwrap();
            }
        }
    }
}
