//! [`Machine`]: how products are cut into blocks of threads, and the shared memory that they take.
//!
//! One row and several are cut alike, because where a run of rows ends says in which order sums are
//! added.

/// Warps of a block of threads that streams weights; the constant of `cu/input.cuh`.
pub(crate) const WARPS: usize = 16;
/// Rows of activations that a block of threads of several takes at once; see `linear::TILES`.
const TILE: usize = 8;
/// Blocks of 32 weights in a chunk.
const CHUNK: usize = 32;
/// Pairs of chunks a multiprocessor, from which two blocks of threads share it: with fewer, rounding the
/// activations twice costs more than the second block brings.
const TWO_FROM: usize = 24;

/// Outputs of a tile of `matmul_few`, what a row of sums has besides, and columns of a chunk; the constants
/// of `cu/matmul.cu`.
const FEW_OUTPUTS: usize = 16;
const FEW_PADDING: usize = 4;
const FEW_COLUMNS: usize = 128;
/// Warps that a multiprocessor has room for.
const FEW_WARPS: usize = 16;

/// What of a device the cuts depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) n_multiprocessors: usize,
    /// The most shared memory that a launch may add.
    pub(crate) max_shared_bytes: usize,
    /// Pairs of chunks that a warp has room for; `DEPTH` of `cu/ring.cuh`.
    pub(crate) depth: usize,
}

/// What of a matrix they depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) columns: usize,
    /// Bytes of 32 blocks of a row in a ring.
    pub(crate) chunk_bytes: usize,
    /// Whether the halves of a block have scales of their own.
    pub(crate) halves: bool,
}

impl Matrix {
    /// Bytes of shared memory of one rounded row; `Rounded` in `cu/input.cuh` has the same.
    fn row_bytes(self) -> usize {
        let sums = if self.halves { 8 } else { 4 };
        (self.columns / 32 * (64 + 4 + sums)).next_multiple_of(16)
    }
}

/// A cut of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) n_blocks: usize,
    pub(crate) n_warps: usize,
    pub(crate) shared_bytes: usize,
}

impl Machine {
    fn rings(self, matrix: Matrix) -> usize {
        WARPS * self.depth * 2 * matrix.chunk_bytes
    }

    /// Whether a row fits beside the rings and the sums of a hundred pairs of rows.
    pub(crate) fn row_fits(self, matrix: Matrix) -> bool {
        matrix.row_bytes() + self.rings(matrix) + 100 * 2 * 4 <= self.max_shared_bytes
    }

    /// A product of one row, or of tiles of several, that streams `n_pairs` of rows of weights.
    pub(crate) fn streamed(self, matrix: Matrix, n_pairs: usize, one: bool) -> Cut {
        let row = if self.row_fits(matrix) { matrix.row_bytes() } else { 0 };
        let sums = |n_blocks: usize, n_rows: usize| 4 * n_rows * 2 * n_pairs.div_ceil(n_blocks);
        let of_one = |n_blocks| row + self.rings(matrix) + sums(n_blocks, 1);
        let of_tile = |n_blocks| self.rings(matrix) + sums(n_blocks, TILE);
        let n_multiprocessors = self.n_multiprocessors.max(1);
        let n_chunks = n_pairs * (matrix.columns / 32).div_ceil(CHUNK);
        let two = n_chunks >= TWO_FROM * n_multiprocessors
            && 2 * of_one(2 * n_multiprocessors) <= self.max_shared_bytes;
        let mut n_blocks = n_multiprocessors * if two { 2 } else { 1 };
        let most = |n_blocks| of_one(n_blocks).max(of_tile(n_blocks));
        while most(n_blocks) > self.max_shared_bytes && n_blocks < n_pairs {
            n_blocks *= 2;
        }
        let n_blocks = n_blocks.min(n_pairs).max(1);
        let shared_bytes = if one { of_one(n_blocks) } else { of_tile(n_blocks) };
        Cut { n_blocks, n_warps: WARPS, shared_bytes }
    }

    /// A product on tensor cores of 8 · `n_tiles` rows; `column_bytes` are those of a block for each lane of
    /// a warp in a ring.
    pub(crate) fn few(
        self,
        column_bytes: usize,
        (columns, n_outputs): (usize, usize),
        n_tiles: usize,
    ) -> Cut {
        let n_output_tiles = if n_tiles < 8 { 2 } else { 1 };
        let outputs = FEW_OUTPUTS * n_output_tiles;
        let n_blocks = n_outputs.div_ceil(outputs);
        let bytes = |n_warps: usize| {
            let rings = n_warps * self.depth * 2 * n_output_tiles * column_bytes;
            rings.max(4 * n_warps * 8 * n_tiles * (outputs + FEW_PADDING))
        };
        // As many as are at work at once, but none without two chunks.
        let at_once = (FEW_WARPS * self.n_multiprocessors / n_blocks).max(1);
        let most = (columns / (2 * FEW_COLUMNS)).next_power_of_two().min(FEW_WARPS);
        let mut n_warps = (1_usize << at_once.ilog2()).clamp(4, FEW_WARPS).min(most);
        while bytes(n_warps) > self.max_shared_bytes {
            n_warps /= 2;
        }
        Cut { n_blocks, n_warps, shared_bytes: bytes(n_warps) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compute capability 8.6 and 8.9, 8.0, 9.0, without what kernels have besides.
    const MACHINES: [Machine; 3] = [
        Machine { n_multiprocessors: 128, max_shared_bytes: (99 << 10) - 4096, depth: 2 },
        Machine { n_multiprocessors: 108, max_shared_bytes: (163 << 10) - 4096, depth: 2 },
        Machine { n_multiprocessors: 132, max_shared_bytes: (227 << 10) - 4096, depth: 3 },
    ];
    /// Bytes of a chunk, and halves: Q4_0, Q6_K, Q8_0.
    const FORMATS: [(usize, bool); 3] = [(576, false), (848, true), (1088, false)];

    #[test]
    fn every_product_fits_and_one_row_is_cut_like_several() {
        for machine in MACHINES {
            for (chunk_bytes, halves) in FORMATS {
                for columns in [32, 576, 4096, 14_336, 28_672] {
                    let matrix = Matrix { columns, chunk_bytes, halves };
                    for n_pairs in [1, 100, 6144, 64_128, 131_072] {
                        let one = machine.streamed(matrix, n_pairs, true);
                        let tile = machine.streamed(matrix, n_pairs, false);
                        assert_eq!(one.n_blocks, tile.n_blocks, "{machine:?} {matrix:?} {n_pairs}");
                        let needed = if machine.row_fits(matrix) { one } else { tile };
                        for cut in [needed, tile] {
                            assert!(
                                cut.shared_bytes <= machine.max_shared_bytes,
                                "{cut:?} {matrix:?}"
                            );
                        }
                    }
                }
            }
            // Bytes of a column: Q4_0, Q6_K, Q8_0.
            for column_bytes in [640, 1024, 1152] {
                for n_tiles in [1, 2, 4, 8] {
                    for shape in [(32, 1), (576, 4096), (28_672, 4096), (4096, 128_256)] {
                        let cut = machine.few(column_bytes, shape, n_tiles);
                        assert!(cut.n_warps > 0, "{machine:?} {cut:?}");
                        assert!(
                            cut.shared_bytes <= machine.max_shared_bytes,
                            "{machine:?} {cut:?}"
                        );
                    }
                }
            }
        }
    }

    /// The fault that the checks are there for: the driver refuses such a launch.
    #[test]
    fn the_cut_of_a_large_card_does_not_fit_a_small_one() {
        let [small, _, large] = MACHINES;
        let matrix = Matrix { columns: 4096, chunk_bytes: 1088, halves: false };
        assert!(large.streamed(matrix, 6144, true).shared_bytes > small.max_shared_bytes);
        assert!(large.few(1152, (28_672, 4096), 1).shared_bytes > small.max_shared_bytes);
    }
}
