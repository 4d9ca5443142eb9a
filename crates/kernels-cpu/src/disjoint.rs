//! Writing different parts of one output from several threads.
#![expect(unsafe_code, reason = "disjoint mutable parts of one slice")]

use std::marker::PhantomData;
use std::ops::Range;

/// A `(T, N)` matrix cut into blocks, each for one thread.
#[derive(Clone, Copy)]
pub(crate) struct MatrixBlocks<'a> {
    start: *mut f32,
    n_rows: usize,
    n_columns: usize,
    _matrix: PhantomData<&'a mut [f32]>,
}

/// A rectangle of a matrix that one thread owns.
pub(crate) struct MatrixBlock<'a> {
    /// The matrix row 0 at the block's first column.
    start: *mut f32,
    rows: Range<usize>,
    n_columns: usize,
    width: usize,
    _matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: the blocks are exclusive parts of a `&mut [f32]`, which may be used on any thread.
unsafe impl Send for MatrixBlocks<'_> {}
// SAFETY: a shared `MatrixBlocks` reaches memory only through `block`, whose caller promises that
// blocks do not overlap.
unsafe impl Sync for MatrixBlocks<'_> {}

impl<'a> MatrixBlocks<'a> {
    /// # Panics
    /// When `matrix` is shorter than `n_rows * n_columns`.
    pub(crate) fn new(matrix: &'a mut [f32], n_rows: usize, n_columns: usize) -> MatrixBlocks<'a> {
        assert!(matrix.len() >= n_rows * n_columns, "output of {n_rows}x{n_columns}");
        MatrixBlocks { start: matrix.as_mut_ptr(), n_rows, n_columns, _matrix: PhantomData }
    }

    /// The columns of `columns` (cut at the last one) in the rows of `rows`.
    ///
    /// # Safety
    /// No other live block shares an element with this one.
    pub(crate) unsafe fn block(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> MatrixBlock<'a> {
        assert!(columns.start <= self.n_columns && rows.end <= self.n_rows);
        MatrixBlock {
            start: self.start.wrapping_add(columns.start),
            rows,
            n_columns: self.n_columns,
            width: columns.end.min(self.n_columns).saturating_sub(columns.start),
            _matrix: PhantomData,
        }
    }
}

impl MatrixBlock<'_> {
    /// This block's part of one row of the matrix.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row));
        let start = self.start.wrapping_add(row * self.n_columns);
        // SAFETY: `MatrixBlocks::new` checked the size of the matrix, `row` and the block's columns
        // are inside it, and the caller of `block` promised that nobody else has these elements.
        unsafe { std::slice::from_raw_parts_mut(start, self.width) }
    }
}
