//! [`Fresh`]: which positions of a page pool the launches that wait write.
//!
//! A kernel may ask for keys and values before the kernels in front of it have ended, but not for those
//! that one of them writes. What was handed over earlier has ended when a list begins.

/// Nothing of a page.
const NONE: u32 = u32::MAX;

/// The first position of each page that the current list of launches writes.
#[derive(Debug)]
pub(crate) struct Fresh {
    list: u64,         // the list that `first` is about
    first: Vec<u32>,   // offset in each page
    pages: Vec<usize>, // those that have one
}

impl Fresh {
    /// Of a pool of `n_pages`.
    pub(crate) fn new(n_pages: usize) -> Fresh {
        Fresh { list: 0, first: vec![NONE; n_pages], pages: Vec::new() }
    }

    /// Notes that a launch of `list` writes a position.
    pub(crate) fn note(&mut self, list: u64, page: usize, offset: u32) {
        if list != self.list {
            self.pages.drain(..).for_each(|page| self.first[page] = NONE);
            self.list = list;
        }
        if self.first[page] == NONE {
            self.pages.push(page);
        }
        self.first[page] = self.first[page].min(offset);
    }

    /// The positions in front of which no launch of `list` writes, of a sequence in `pages`; at most
    /// `end`.
    pub(crate) fn old(
        &self,
        list: u64,
        pages: impl Iterator<Item = usize>,
        page_tokens: usize,
        end: usize,
    ) -> usize {
        if list != self.list {
            return end;
        }
        let written = |(i, page): (usize, usize)| {
            let first = self.first.get(page).copied().unwrap_or(0);
            (first != NONE).then(|| i * page_tokens + first as usize)
        };
        pages.enumerate().find_map(written).map_or(end, |position| position.min(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_old_up_to_the_first_that_this_list_writes() {
        let mut fresh = Fresh::new(6);
        let old = |fresh: &Fresh, list, end| fresh.old(list, [4, 1, 5].into_iter(), 256, end);
        assert_eq!(old(&fresh, 1, 600), 600);
        // A step of decode: the new position alone.
        fresh.note(1, 5, 88);
        assert_eq!(old(&fresh, 1, 601), 600);
        // A chunk of a prompt, of which one row attends: all of the chunk is new.
        fresh.note(1, 1, 200);
        fresh.note(1, 1, 201);
        fresh.note(1, 5, 0);
        assert_eq!(old(&fresh, 1, 600), 456);
        // The list was handed over: what it wrote is there.
        assert_eq!(old(&fresh, 2, 600), 600);
        // And what a later list writes is all that counts.
        fresh.note(2, 5, 90);
        assert_eq!(old(&fresh, 2, 700), 602);
        assert_eq!(fresh.old(2, [0, 2].into_iter(), 256, 300), 300);
    }

    #[test]
    fn a_page_that_no_pool_has_is_new() {
        let mut fresh = Fresh::new(1);
        fresh.note(3, 0, 7);
        assert_eq!(fresh.old(3, [9].into_iter(), 256, 100), 0);
    }
}
