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

    /// The keys that a kernel sees of positions up to `end`: those in front of `old` it may have asked for
    /// when its list began, the others when the launches in front of it had ended.
    fn seen(began: &[u32], ended: &[u32], old: usize, end: usize) -> Vec<u32> {
        (0..end).map(|p| if p < old { began[p] } else { ended[p] }).collect()
    }

    /// The mutation: with the books off, all positions count as old, and a kernel reads what a page held
    /// before its own list wrote there.
    #[test]
    fn mutation_without_the_books_a_kernel_reads_keys_of_another_sequence() {
        const PAGE: usize = 4;
        const LEFT_BEHIND: u32 = 1000;
        let pages = [2, 0, 1];
        for (first, end) in (0..12).flat_map(|first| (first + 1..=12).map(move |end| (first, end)))
        {
            let mut fresh = Fresh::new(3);
            let mut began = vec![LEFT_BEHIND; 12];
            (0..first).for_each(|p| began[p] = key(p));
            let mut ended = began.clone();
            for p in first..end {
                fresh.note(7, pages[p / PAGE], u32::try_from(p % PAGE).unwrap());
                ended[p] = key(p);
            }
            let own: Vec<u32> = (0..end).map(key).collect();
            let old = fresh.old(7, pages.into_iter(), PAGE, end);
            assert_eq!(seen(&began, &ended, old, end), own, "{first}..{end}");
            assert_eq!(old, first, "and it asks early for all that it may");
            let unbooked = Fresh::new(3).old(7, pages.into_iter(), PAGE, end);
            let fault = seen(&began, &ended, unbooked, end);
            assert_eq!(fault[first..], vec![LEFT_BEHIND; end - first], "{first}..{end}");
        }
    }

    fn key(position: usize) -> u32 {
        u32::try_from(position).unwrap()
    }

    #[test]
    fn a_page_that_no_pool_has_is_new() {
        let mut fresh = Fresh::new(1);
        fresh.note(3, 0, 7);
        assert_eq!(fresh.old(3, [9].into_iter(), 256, 100), 0);
    }
}
