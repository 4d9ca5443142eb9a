//! The cache compared with the tables that name its pages.

use exrail_kernels::{PAGE_TOKENS, PageId};

use super::KvCache;
use super::host::DevicePages;
use super::pages::{PageFault, PageRef, index};

/// What the cache is compared with: the table of one running sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableView<'a> {
    /// Tokens known so far.
    pub(crate) tokens: &'a [u32],
    /// Pages in the order of positions.
    pub(crate) pages: &'a [PageRef],
    /// Positions that are written or being written.
    pub(crate) n_fed: usize,
}

impl KvCache {
    /// Before each step, whatever the sampling of audits: no table names a page of another life or one
    /// whose record is not whole, all references of these pages are counted, and a page that is about
    /// to be written has one owner and cannot be found by others. O(pages of the tables).
    ///
    /// # Errors
    /// The first broken invariant.
    pub(crate) fn check_tables(&mut self, tables: &[TableView<'_>]) -> Result<(), PageFault> {
        if self.switchboard.guards_are_off() {
            return Ok(());
        }
        self.count(tables);
        let checked = tables.iter().try_for_each(|table| self.check_table(table));
        self.uncount(tables);
        checked
    }

    /// All of [`KvCache::check_tables`], and: free, kept, referenced and withdrawn pages are the pool,
    /// each once; generations add up; every content is what its hash says; and shared pages hold the
    /// tokens of the sequences that read them. O(pages of the pool and their tokens).
    ///
    /// # Errors
    /// The first broken invariant.
    pub(crate) fn audit(&mut self, tables: &[TableView<'_>]) -> Result<(), PageFault> {
        if self.switchboard.guards_are_off() {
            return Ok(());
        }
        self.check_tables(tables)?;
        self.count(tables);
        let books = self.pages.audit(&self.held);
        self.uncount(tables);
        books?;
        let unsound = (0_u32..)
            .take(self.pages.total())
            .find(|&page| !self.prefixes.is_sound(PageId(page), &self.switchboard));
        if let Some(page) = unsound {
            return Err(PageFault::Content { page });
        }
        tables.iter().try_for_each(|table| self.check_tokens(table))
    }

    /// Whether one page whose content can be found still has the keys and values that it had: the next one,
    /// in turn.
    ///
    /// # Errors
    /// [`PageFault::Bytes`].
    pub(crate) fn audit_bytes(&mut self, device: &mut dyn DevicePages) -> Result<(), PageFault> {
        if self.switchboard.guards_are_off() {
            return Ok(());
        }
        let next = self.sums.turn(|page| self.prefixes.entry(page));
        next.map_or(Ok(()), |entry| self.sums.look(entry, device))
    }

    fn check_table(&self, table: &TableView<'_>) -> Result<(), PageFault> {
        let first_written = table.n_fed / PAGE_TOKENS;
        for (at, entry) in table.pages.iter().enumerate() {
            self.pages.check(*entry)?;
            let page = entry.page.0;
            let (expected, found) =
                (self.held[index(entry.page)], self.pages.references(entry.page));
            if expected != found {
                return Err(PageFault::References { page, expected, found });
            }
            if at >= first_written {
                self.check_own(*entry)?;
            }
        }
        Ok(())
    }

    /// Before pages are written over that a sequence has filled: they are as
    /// [`KvCache::check_tables`] wants those that a step writes.
    ///
    /// # Errors
    /// The first page that is of another life, in another table, or can be found by others.
    pub(crate) fn check_owned(&self, pages: &[PageRef]) -> Result<(), PageFault> {
        if self.switchboard.guards_are_off() {
            return Ok(());
        }
        pages.iter().try_for_each(|entry| {
            self.pages.check(*entry)?;
            self.check_own(*entry)
        })
    }

    /// One table has the page, and nobody can find it.
    fn check_own(&self, entry: PageRef) -> Result<(), PageFault> {
        let (page, references) = (entry.page.0, self.pages.references(entry.page));
        if references != 1 {
            return Err(PageFault::Alias { page, references });
        }
        if self.prefixes.holds(entry) {
            return Err(PageFault::Shared { page });
        }
        Ok(())
    }

    fn check_tokens(&self, table: &TableView<'_>) -> Result<(), PageFault> {
        let whole = table.tokens.chunks_exact(PAGE_TOKENS).zip(table.pages);
        let mut other = whole.filter(|(tokens, entry)| !self.prefixes.agrees(**entry, tokens));
        match other.next() {
            Some((_, entry)) => Err(PageFault::Tokens { page: entry.page.0 }),
            None => Ok(()),
        }
    }

    fn count(&mut self, tables: &[TableView<'_>]) {
        for entry in tables.iter().flat_map(|table| table.pages) {
            self.held[index(entry.page)] += 1;
        }
    }

    fn uncount(&mut self, tables: &[TableView<'_>]) {
        for entry in tables.iter().flat_map(|table| table.pages) {
            self.held[index(entry.page)] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use exrail_kernels::KvDtype;

    use super::*;
    use crate::cache::{Namespace, Pins, Wanted};
    use crate::faults::Switchboard;

    /// A device that nothing leaves: there is no second tier.
    struct NoPages;

    impl DevicePages for NoPages {
        fn page_bytes(&self) -> usize {
            panic!("nobody looks")
        }

        fn read(&mut self, _: PageId, _: &mut [u8]) {
            panic!("nothing leaves");
        }

        fn write(&mut self, _: PageId, _: &[u8]) {
            panic!("nothing comes back");
        }
    }

    fn namespace() -> Namespace {
        let pins = Pins::for_tests("model", KvDtype::F16);
        Namespace { pins: Arc::new(pins), tenant: None }
    }

    /// Two tables of two pages over the same tokens, the first page of which they share.
    fn shared() -> (KvCache, Vec<u32>, [Vec<PageRef>; 2]) {
        let mut cache = KvCache::new(4, Switchboard::default());
        let tokens: Vec<u32> = (0..300).collect();
        let namespace = namespace();
        let tables = [(); 2].map(|()| {
            let wanted =
                Wanted { n_pages: 2, tokens: &tokens, namespace: Some(&namespace), own: false };
            let admitted = cache.admit(&wanted, &mut NoPages).unwrap().unwrap();
            cache.share(&namespace, &tokens, &admitted.pages, 1);
            admitted.pages
        });
        assert_eq!(tables[0][0], tables[1][0]);
        assert_ne!(tables[0][1], tables[1][1]);
        (cache, tokens, tables)
    }

    /// What the audit says of the two tables when this many positions are written.
    fn audited(guards: bool, n_fed: usize, n_tables: usize) -> Result<(), PageFault> {
        let (mut cache, tokens, tables) = shared();
        if n_tables == 1 {
            assert_eq!(cache.release(&tables[1]), 0);
        }
        if !guards {
            cache.switch_guards_off();
        }
        let view = |pages| TableView { tokens: &tokens, pages, n_fed };
        let views: Vec<_> = tables[..n_tables].iter().map(|table| view(table)).collect();
        cache.audit(&views)
    }

    #[test]
    fn a_shared_page_is_written_by_nobody() {
        assert_eq!(audited(true, 256, 2), Ok(()));
        assert!(matches!(audited(true, 255, 2), Err(PageFault::Alias { references: 2, .. })));
        assert_eq!(audited(false, 255, 2), Ok(()));
        assert_eq!(audited(true, 256, 1), Ok(()));
        assert!(matches!(audited(true, 255, 1), Err(PageFault::Shared { .. })));
        assert_eq!(audited(false, 255, 1), Ok(()));
    }

    #[test]
    fn a_reader_has_the_tokens_of_what_it_reads() {
        let run = |guards: bool| {
            let (mut cache, mut tokens, [table, other]) = shared();
            assert_eq!(cache.release(&other), 0);
            if !guards {
                cache.switch_guards_off();
            }
            tokens[255] += 1;
            cache.audit(&[TableView { tokens: &tokens, pages: &table, n_fed: 300 }])
        };
        assert!(matches!(run(true), Err(PageFault::Tokens { .. })));
        assert_eq!(run(false), Ok(()));
    }
}
