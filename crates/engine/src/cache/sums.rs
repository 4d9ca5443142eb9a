//! Checksums over the keys and values of pages that can be found, which nobody writes again.
//!
//! The books say whose a page is and not what is in it: a stray write of a kernel, or memory that loses a
//! bit, changes answers without breaking a rule. To read every byte before every step would cost more than
//! the step, so that each audit reads one page, in turn: the first time for its checksum, from then on to
//! compare. A change is found within two rounds of the pages that can be found; what was read of
//! them meanwhile is out.

use exrail_kernels::PageId;

use super::host::DevicePages;
use super::pages::{PageFault, PageRef, index};
use crate::checksum::checksum;

#[derive(Debug)]
pub(super) struct Sums {
    /// By page: whose life it was taken in, and the checksum.
    taken: Vec<Option<(PageRef, u64)>>,
    /// The page where the next look begins.
    next: usize,
}

impl Sums {
    pub(super) fn new(n_pages: usize) -> Sums {
        Sums { taken: vec![None; n_pages], next: 0 }
    }

    /// The next page, in turn, whose content can be found; `find` says so of one.
    pub(super) fn turn(&mut self, find: impl Fn(PageId) -> Option<PageRef>) -> Option<PageRef> {
        let n_pages = self.taken.len();
        let ids = (self.next..n_pages).chain(0..self.next);
        let pages = ids.filter_map(|at| u32::try_from(at).ok()).map(PageId);
        let found = pages.filter_map(find).next()?;
        self.next = (index(found.page) + 1) % n_pages;
        Some(found)
    }

    /// Takes a page's checksum, or compares it with the one that was taken in the same life.
    ///
    /// # Errors
    /// [`PageFault::Bytes`].
    pub(super) fn look(
        &mut self,
        entry: PageRef,
        device: &mut dyn DevicePages,
    ) -> Result<(), PageFault> {
        let mut bytes = vec![0; device.page_bytes()];
        device.read(entry.page, &mut bytes);
        let found = checksum(&bytes);
        let taken = &mut self.taken[index(entry.page)];
        match *taken {
            Some((of, expected)) if of == entry && expected != found => {
                Err(PageFault::Bytes { page: entry.page.0 })
            }
            _ => {
                *taken = Some((entry, found));
                Ok(())
            }
        }
    }
}
