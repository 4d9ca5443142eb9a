//! [`Hessian`]: Σ x xᵀ over the inputs of a matrix, the second derivative of its squared output
//! error up to a factor.

/// Rows of a tile in registers.
const TILE_ROWS: usize = 4;
/// Columns of a tile in registers.
const TILE_COLUMNS: usize = 16;
/// Tokens that are summed in f32 before they join the f64 sum.
const CHUNK: usize = 256;

/// The sum of outer products of inputs, and how many there were.
#[derive(Clone, Debug, PartialEq)]
pub struct Hessian {
    columns: usize,
    n_tokens: usize,
    sum: Vec<f64>, // (K, K); the lower triangle and the tiles on the diagonal
}

impl Hessian {
    /// Of no inputs yet.
    #[must_use]
    pub fn new(columns: usize) -> Hessian {
        Hessian { columns, n_tokens: 0, sum: vec![0.0; columns * columns] }
    }

    /// Input features K.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Inputs so far.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// The sum, `(K, K)`; only its lower triangle is filled.
    #[must_use]
    pub fn lower(&self) -> &[f64] {
        &self.sum
    }

    /// Adds the inputs `x` `(T, K)`. Products are summed in f32 within 256 tokens and in f64 beyond.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn add(&mut self, x: &[f32]) {
        assert!(x.len().is_multiple_of(self.columns), "whole rows of {}", self.columns);
        self.n_tokens += x.len() / self.columns;
        for chunk in x.chunks(CHUNK * self.columns) {
            self.add_chunk(chunk);
        }
    }

    fn add_chunk(&mut self, x: &[f32]) {
        let k = self.columns;
        for first_row in (0..k).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(k - first_row);
            for first_column in (0..first_row + rows).step_by(TILE_COLUMNS) {
                let columns = TILE_COLUMNS.min(k - first_column);
                let tile = if (rows, columns) == (TILE_ROWS, TILE_COLUMNS) {
                    whole_tile(x, k, first_row, first_column)
                } else {
                    part_tile(x, k, (first_row, rows), (first_column, columns))
                };
                for (i, tile) in tile.iter().enumerate().take(rows) {
                    let at = (first_row + i) * k + first_column;
                    let sums = &mut self.sum[at..at + columns];
                    sums.iter_mut().zip(tile).for_each(|(sum, &value)| *sum += f64::from(value));
                }
            }
        }
    }
}

type Tile = [[f32; TILE_COLUMNS]; TILE_ROWS];

fn whole_tile(x: &[f32], k: usize, first_row: usize, first_column: usize) -> Tile {
    let mut tile = Tile::default();
    for x in x.chunks_exact(k) {
        let left = &x[first_row..first_row + TILE_ROWS];
        let right = &x[first_column..first_column + TILE_COLUMNS];
        for (sums, &a) in tile.iter_mut().zip(left) {
            for (sum, &b) in sums.iter_mut().zip(right) {
                *sum += a * b;
            }
        }
    }
    tile
}

fn part_tile(
    x: &[f32],
    k: usize,
    (first_row, rows): (usize, usize),
    (first_column, columns): (usize, usize),
) -> Tile {
    let mut tile = Tile::default();
    for x in x.chunks_exact(k) {
        for (sums, &a) in tile.iter_mut().zip(&x[first_row..first_row + rows]) {
            for (sum, &b) in sums.iter_mut().zip(&x[first_column..first_column + columns]) {
                *sum += a * b;
            }
        }
    }
    tile
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_sum_of_outer_products_whatever_the_pieces() {
        let (k, t) = (37, 301);
        let x: Vec<f32> = (0..t * k).map(|i| ((i * 97) % 61) as f32 / 61.0 - 0.5).collect();
        let mut whole = Hessian::new(k);
        whole.add(&x);
        assert_eq!(whole.n_tokens(), t);
        for i in 0..k {
            for j in 0..=i {
                let exact: f64 =
                    (0..t).map(|t| f64::from(x[t * k + i]) * f64::from(x[t * k + j])).sum();
                let found = whole.lower()[i * k + j];
                // Σ |terms| is below t / 4; each f32 sum of 256 terms errs by at most 256 ε of it.
                assert!((found - exact).abs() < 256.0 * 6e-8 * t as f64 / 4.0, "({i}, {j})");
            }
        }
        let mut pieces = Hessian::new(k);
        pieces.add(&x[..256 * k]);
        pieces.add(&x[256 * k..]);
        assert_eq!(pieces, whole);
    }
}
