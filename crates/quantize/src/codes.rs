//! [`Codes`]: a matrix on an [`IntGrid`], one scale a group of a row.

use exrail_tensor::IntGrid;
use half::f16;

/// A quantised matrix `(N, K)`: weight = scale of its group · code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Codes {
    /// Which integers.
    pub grid: IntGrid,
    /// Output features N.
    pub rows: usize,
    /// Input features K, a multiple of `group`.
    pub columns: usize,
    /// Input features that share a scale.
    pub group: usize,
    /// Half-precision bits, (N, G).
    pub scales: Vec<u16>,
    /// (N, K).
    pub codes: Vec<i8>,
}

impl Codes {
    /// Every weight of `values` `(N, K)` rounded to nearest, with scales that fit the weights of
    /// their group best.
    ///
    /// # Panics
    /// When `values` are not whole rows, or rows not whole groups.
    #[must_use]
    pub fn nearest(grid: IntGrid, values: &[f32], columns: usize, group: usize) -> Codes {
        assert!(values.len().is_multiple_of(columns), "whole rows of {columns}");
        assert!(columns.is_multiple_of(group), "{columns} columns in groups of {group}");
        let mut scales = Vec::with_capacity(values.len() / group);
        let mut codes = Vec::with_capacity(values.len());
        for values in values.chunks_exact(group) {
            let scale = grid.scale(values, None);
            let step = step(scale);
            scales.push(scale);
            codes.extend(values.iter().map(|&value| grid.code(value, step)));
        }
        Codes { grid, rows: values.len() / columns, columns, group, scales, codes }
    }

    /// Groups of a row, G.
    #[must_use]
    pub fn n_groups(&self) -> usize {
        self.columns / self.group
    }

    /// The weights of row `row`, `(K)`: products of a half and a small integer, exact in f32.
    pub fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let codes = &self.codes[row * self.columns..(row + 1) * self.columns];
        let scales = &self.scales[row * self.n_groups()..(row + 1) * self.n_groups()];
        let groups = codes.chunks_exact(self.group).zip(scales);
        groups.flat_map(|(codes, &scale)| {
            let step = step(scale);
            codes.iter().map(move |&code| step * f32::from(code))
        })
    }

    /// The same weights as blocks of [`IntGrid::dtype`], scales repeated where groups are larger
    /// than blocks.
    ///
    /// # Panics
    /// When groups are not whole blocks of 32.
    #[must_use]
    pub fn blocks(&self) -> Vec<u8> {
        assert!(self.group.is_multiple_of(32), "groups of {} are not whole blocks", self.group);
        let mut bytes = Vec::with_capacity(self.codes.len() / 32 * self.grid.dtype().block_bytes());
        for (codes, &scale) in self.codes.chunks_exact(self.group).zip(&self.scales) {
            for block in codes.as_chunks::<32>().0 {
                self.grid.write_block(scale, block, &mut bytes);
            }
        }
        bytes
    }
}

/// The value of a scale.
pub(crate) fn step(scale: u16) -> f32 {
    f16::from_bits(scale).to_f32()
}
