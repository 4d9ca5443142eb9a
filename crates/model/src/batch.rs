//! [`Batch`]: the rows of one decoder step, and [`Rows`]: all of them but their tokens.

use exrail_kernels::{AttentionSpan, KvSlot, PAGE_TOKENS, TokenId};

/// Rows of one step, of one or many sequences, in prefill or decode.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token of each row, `(T)`.
    pub ids: &'a [TokenId],
    /// Whose rows they are: spans in order that cover the rows without gap or overlap. A span's
    /// earlier positions were written to its pages by earlier steps.
    pub spans: &'a [AttentionSpan<'a>],
    /// Rows whose logits are wanted, `(M)`, strictly ascending; may be empty.
    pub logit_rows: &'a [u32],
}

impl<'a> Batch<'a> {
    pub(crate) fn rows(&self) -> Rows<'a> {
        Rows { n_rows: self.ids.len(), spans: self.spans, logit_rows: self.logit_rows }
    }
}

/// A [`Batch`] whose tokens may be on the device alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) n_rows: usize,
    pub(crate) spans: &'a [AttentionSpan<'a>],
    pub(crate) logit_rows: &'a [u32],
}

impl<'a> Rows<'a> {
    /// Fills `positions` and `slots`, `(T)` each, after checking that the batch is whole.
    ///
    /// # Panics
    /// When spans do not cover the rows in order, a page table is too short, or logit rows are not
    /// ascending rows of the batch.
    pub(crate) fn place(&self, positions: &mut Vec<u32>, slots: &mut Vec<KvSlot>) {
        positions.clear();
        slots.clear();
        for span in self.spans {
            assert_eq!(span.first_row, positions.len(), "spans follow each other");
            for position in span.first_position..span.first_position + span.n_rows {
                let page = span.pages[position / PAGE_TOKENS];
                slots.push(KvSlot { page, offset: (position % PAGE_TOKENS) as u32 });
                positions.push(u32::try_from(position).expect("a context is far below 2^32"));
            }
        }
        assert_eq!(positions.len(), self.n_rows, "spans cover the batch");
        assert!(self.logit_rows.is_sorted_by(|a, b| a < b), "logit rows ascend");
        let last = self.logit_rows.last().map_or(0, |&row| row as usize + 1);
        assert!(last <= self.n_rows, "logit row {last} of {} rows", self.n_rows);
    }

    /// Whether the logit rows, which ascend, are all rows: a step of decode.
    pub(crate) fn all_rows_have_logits(&self) -> bool {
        self.logit_rows.len() == self.n_rows
    }

    /// The spans that remain when only the logit rows do: row i of them is `logit_rows[i]`.
    pub(crate) fn logit_spans(&self) -> Vec<AttentionSpan<'a>> {
        let mut kept: Vec<AttentionSpan<'a>> = Vec::with_capacity(self.logit_rows.len());
        let mut spans = self.spans.iter();
        let mut current = None;
        for (i, &row) in self.logit_rows.iter().enumerate() {
            let row = row as usize;
            let inside = |span: &AttentionSpan<'_>| row < span.first_row + span.n_rows;
            let adjoins = i > 0 && self.logit_rows[i - 1] as usize + 1 == row;
            match (current.filter(inside), kept.last_mut()) {
                (Some(_), Some(last)) if adjoins => last.n_rows += 1,
                (span, _) => {
                    let span: AttentionSpan<'a> = span
                        .or_else(|| spans.find(|span| inside(span)).copied())
                        .expect("`place` checked that every logit row lies in a span");
                    current = Some(span);
                    let first_position = span.first_position + row - span.first_row;
                    kept.push(AttentionSpan { first_row: i, n_rows: 1, first_position, ..span });
                }
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use exrail_kernels::PageId;

    use super::*;

    #[test]
    fn logit_spans_keep_positions_and_join_neighbours_of_one_sequence() {
        let (first, second) = ([PageId(3)], [PageId(1), PageId(2)]);
        let spans = [
            AttentionSpan { first_row: 0, n_rows: 4, first_position: 10, pages: &first },
            AttentionSpan { first_row: 4, n_rows: 5, first_position: 300, pages: &second },
        ];
        let rows = Rows { n_rows: 9, spans: &spans, logit_rows: &[1, 3, 4, 5, 8] };
        let kept: Vec<_> = rows
            .logit_spans()
            .iter()
            .map(|s| (s.first_row, s.n_rows, s.first_position, s.pages.len()))
            .collect();
        assert_eq!(kept, [(0, 1, 11, 1), (1, 1, 13, 1), (2, 2, 300, 2), (4, 1, 304, 2)]);
        assert!(Rows { logit_rows: &[], ..rows }.logit_spans().is_empty());
    }

    #[test]
    fn places_follow_the_page_table() {
        let pages = [PageId(9), PageId(4)];
        let spans = [AttentionSpan { first_row: 0, n_rows: 2, first_position: 255, pages: &pages }];
        let batch = Batch { ids: &[TokenId(0); 2], spans: &spans, logit_rows: &[1] };
        let (mut positions, mut slots) = (Vec::new(), Vec::new());
        batch.rows().place(&mut positions, &mut slots);
        assert_eq!(positions, [255, 256]);
        assert_eq!(slots[0], KvSlot { page: PageId(9), offset: 255 });
        assert_eq!(slots[1], KvSlot { page: PageId(4), offset: 0 });
    }

    #[test]
    #[should_panic(expected = "spans cover the batch")]
    fn rows_outside_spans_are_the_callers_error() {
        let batch = Batch { ids: &[TokenId(0); 2], spans: &[], logit_rows: &[] };
        batch.rows().place(&mut Vec::new(), &mut Vec::new());
    }
}
