//! Who owns which KV page: free list, generations, reference counts, and the audit over them.
//!
//! This is bookkeeping only; the keys and values live in the device's pool. A page goes through
//! `free → referenced (n ≥ 1) → free`, and each return to the free list raises its generation, so
//! a table entry that outlives its page is recognised by its old generation (guardrails G-17).
//! Pages have one size, so the pool cannot fragment externally.

use exrail_kernels::PageId;
use thiserror::Error;

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
    #[error("page {page}: referenced by a table but free in the pool")]
    NotHeld {
        /// Page index.
        page: u32,
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
    /// A page is on the free list twice, or is on it while referenced.
    #[error("page {page}: on the free list {times} times with {references} references")]
    FreeList {
        /// Page index.
        page: u32,
        /// Occurrences on the free list.
        times: u32,
        /// Count in the pool.
        references: u32,
    },
    /// Free and referenced pages do not add up to the pool.
    #[error("page pool: {free} free + {referenced} referenced pages, expected {total}")]
    Conservation {
        /// Pages on the free list.
        free: usize,
        /// Pages with a reference.
        referenced: usize,
        /// Pages of the pool.
        total: usize,
    },
}

/// The books of one page pool.
#[derive(Debug)]
pub(crate) struct Pages {
    /// Pages without references; the last is handed out first, so that warm memory is reused.
    free: Vec<PageId>,
    generations: Vec<u32>,
    references: Vec<u32>,
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
            generations: vec![0; n_pages],
            references: vec![0; n_pages],
        }
    }

    /// Pages of the pool.
    #[must_use]
    pub(crate) fn total(&self) -> usize {
        self.generations.len()
    }

    /// Pages that nobody holds.
    #[must_use]
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Hands out `n` pages with one reference each, or none at all if fewer are free.
    #[must_use]
    pub(crate) fn allocate(&mut self, n: usize) -> Option<Vec<PageRef>> {
        let keep = self.free.len().checked_sub(n)?;
        let taken = self.free.split_off(keep);
        Some(
            taken
                .into_iter()
                .rev()
                .map(|page| {
                    self.references[index(page)] = 1;
                    PageRef { page, generation: self.generations[index(page)] }
                })
                .collect(),
        )
    }

    /// Adds a reference, for a second table that shares the page. Nothing shares pages until prefix
    /// caching; the counts and the audit are ready for it.
    ///
    /// # Errors
    /// The entry is stale or the page is free.
    #[cfg(test)]
    pub(crate) fn retain(&mut self, entry: PageRef) -> Result<(), PageFault> {
        self.check(entry)?;
        self.references[index(entry.page)] += 1;
        Ok(())
    }

    /// Gives back one reference; the last one frees the page and ends its generation.
    ///
    /// # Errors
    /// The entry is stale or the page is free. The books are unchanged then.
    pub(crate) fn release(&mut self, entry: PageRef) -> Result<(), PageFault> {
        self.check(entry)?;
        let references = &mut self.references[index(entry.page)];
        *references -= 1;
        if *references == 0 {
            let generation = &mut self.generations[index(entry.page)];
            *generation = generation.wrapping_add(1);
            self.free.push(entry.page);
        }
        Ok(())
    }

    /// Whether a table entry still names the page it was given.
    ///
    /// # Errors
    /// The generation differs, or nobody holds the page.
    pub(crate) fn check(&self, entry: PageRef) -> Result<(), PageFault> {
        let (page, expected) = (entry.page.0, self.generations[index(entry.page)]);
        if entry.generation != expected {
            return Err(PageFault::Generation { page, expected, found: entry.generation });
        }
        if self.references[index(entry.page)] == 0 {
            return Err(PageFault::NotHeld { page });
        }
        Ok(())
    }

    /// Compares the books with every table: generations, reference counts, free list, conservation
    /// (free + referenced = total). O(pages of the pool).
    ///
    /// # Errors
    /// The first broken invariant.
    pub(crate) fn audit<'a>(
        &self,
        tables: impl IntoIterator<Item = &'a [PageRef]>,
    ) -> Result<(), PageFault> {
        let mut held = vec![0_u32; self.total()];
        for entry in tables.into_iter().flatten() {
            self.check(*entry)?;
            held[index(entry.page)] += 1;
        }
        let mut listed = vec![0_u32; self.total()];
        for page in &self.free {
            listed[index(*page)] += 1;
        }
        for (page, ((&expected, &found), &times)) in
            (0_u32..).zip(held.iter().zip(&self.references).zip(&listed))
        {
            if expected != found {
                return Err(PageFault::References { page, expected, found });
            }
            if times > 1 || (times == 1 && found > 0) {
                return Err(PageFault::FreeList { page, times, references: found });
            }
        }
        let referenced = self.references.iter().filter(|&&n| n > 0).count();
        if self.free.len() + referenced != self.total() {
            let (free, total) = (self.free.len(), self.total());
            return Err(PageFault::Conservation { free, referenced, total });
        }
        Ok(())
    }

    /// Forgets every table: all pages are free and all generations new. The way out after a failed
    /// audit, once every sequence was failed.
    pub(crate) fn reset(&mut self) {
        let n = u32::try_from(self.total()).expect("checked in new");
        self.free = (0..n).rev().map(PageId).collect();
        self.references.fill(0);
        for generation in &mut self.generations {
            *generation = generation.wrapping_add(1);
        }
    }
}

fn index(page: PageId) -> usize {
    page.0 as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_stale_entry_is_recognised_after_its_page_was_reused() {
        let mut pages = Pages::new(1);
        let old = pages.allocate(1).unwrap()[0];
        pages.release(old).unwrap();
        let new = pages.allocate(1).unwrap()[0];
        assert_eq!(new.page, old.page);
        assert!(matches!(pages.release(old), Err(PageFault::Generation { page: 0, .. })));
        pages.check(new).unwrap();
    }

    #[test]
    fn double_release_is_refused_and_changes_nothing() {
        let mut pages = Pages::new(2);
        let entry = pages.allocate(1).unwrap()[0];
        pages.release(entry).unwrap();
        assert!(pages.release(entry).is_err());
        assert_eq!(pages.free(), 2);
        pages.audit([]).unwrap();
    }

    // Mutations: each switches one rule off by hand; the audit must see it.

    #[test]
    fn audit_catches_a_skipped_reference_increment() {
        let mut pages = Pages::new(3);
        let table = pages.allocate(2).unwrap();
        let sharing = [table[0]]; // without retain()
        let fault = pages.audit([&table[..], &sharing[..]]).unwrap_err();
        assert_eq!(fault, PageFault::References { page: table[0].page.0, expected: 2, found: 1 });
    }

    #[test]
    fn audit_catches_a_page_reused_while_referenced() {
        let mut pages = Pages::new(2);
        let table = pages.allocate(1).unwrap();
        pages.free.push(table[0].page);
        assert!(matches!(pages.audit([&table[..]]), Err(PageFault::FreeList { .. })));
    }

    #[test]
    fn audit_catches_a_lost_page() {
        let mut pages = Pages::new(2);
        pages.free.pop();
        let fault = pages.audit([]).unwrap_err();
        assert_eq!(fault, PageFault::Conservation { free: 1, referenced: 0, total: 2 });
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
                        match pages.allocate(argument) {
                            Some(table) => tables.push(table),
                            None => prop_assert!(free_before < argument),
                        }
                    }
                    1 if !tables.is_empty() => {
                        let copy = tables[argument % tables.len()].clone();
                        for entry in &copy {
                            pages.retain(*entry).unwrap();
                        }
                        tables.push(copy);
                    }
                    _ if !tables.is_empty() => {
                        let at = argument % tables.len();
                        for entry in tables.swap_remove(at) {
                            pages.release(entry).unwrap();
                        }
                    }
                    _ => {}
                }
                let mut naive: BTreeMap<u32, u32> = BTreeMap::new();
                for entry in tables.iter().flatten() {
                    *naive.entry(entry.page.0).or_default() += 1;
                }
                prop_assert_eq!(pages.free() + naive.len(), 12);
                pages.audit(tables.iter().map(Vec::as_slice)).unwrap();
            }
        }
    }
}
