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

/// Bytes cut into parts of one length, each for one thread.
pub(crate) struct Parts<'a> {
    bytes: *mut u8,
    n_parts: usize,
    part_len: usize,
    _bytes: PhantomData<&'a mut [u8]>,
}

// SAFETY: a shared `Parts` reaches memory only through `part`, whose caller promises that nobody
// else has that part.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    /// What is left behind the last whole part belongs to none.
    pub(crate) fn new(bytes: &'a mut [u8], part_len: usize) -> Parts<'a> {
        let n_parts = bytes.len() / part_len.max(1);
        Parts { bytes: bytes.as_mut_ptr(), n_parts, part_len, _bytes: PhantomData }
    }

    /// Part i.
    ///
    /// # Safety
    /// Nobody else has it.
    #[expect(clippy::mut_from_ref, reason = "every part is handed out to one thread")]
    pub(crate) unsafe fn part(&self, i: usize) -> &mut [u8] {
        assert!(i < self.n_parts, "part {i} of {}", self.n_parts);
        let start = self.bytes.wrapping_add(i * self.part_len);
        // SAFETY: part i is inside the bytes, and the caller promised that nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(start, self.part_len) }
    }
}

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
