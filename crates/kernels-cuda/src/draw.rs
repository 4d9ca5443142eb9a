//! Draws of tokens from rows of logits.

use std::sync::Arc;

use exrail_kernels::{Draw, Draws};

use crate::CudaBuffer;
use crate::found::{CudaFound, Slots};
use crate::memory::{bytes_of, narrow};
use crate::rows;
use crate::stream::{Address, AnyArgument, Grid, Stream};

/// Threads of a block that weighs a part of a row, values that each weighs, and the most of such blocks.
const WEIGH_THREADS: usize = 512;
const WEIGH_EACH: usize = 8;
const WEIGH_BLOCKS: usize = 64;
/// Threads of the block that picks a row's token, and bins that it counts in: `N_BINS` of `cu/draw.cu`.
const PICK_THREADS: usize = 1024;
/// Bins of weights from 2⁻⁴⁰ to 1 by their leading bits, eight for each power of two: `N_COARSE` of
/// `cu/draw.cu`.
const COARSE_BINS: usize = 8 * 40 + 1;
/// Bytes of a bin in shared memory: a count, and a mass in four parts.
const BIN_BYTES: usize = 4 * (1 + 4);
/// Bytes of a bin in memory: a mass and a count.
const BINNED_BYTES: usize = 8 + 4;
/// Values of a row whose masses a bin has room for.
const MAX_VALUES: usize = 1 << 21;

/// See [`exrail_kernels::Backend::draw`].
pub(crate) fn draw(
    stream: &Arc<Stream>,
    slots: &Arc<Slots>,
    x: &CudaBuffer,
    width: usize,
    draws: Draws<'_>,
) -> CudaFound {
    let Draws { limit, rows } = draws;
    assert!(limit <= MAX_VALUES, "{limit} of at most {MAX_VALUES} values a row");
    let n_rows = rows.len();
    // The token of a row without temperature, and what the weights of the others are relative to.
    let found = rows::find_largest(stream, slots, x, n_rows, width, limit);
    let (at, [out, seen]) = (x.at(n_rows * width), found.places());
    let (columns, first) = (narrow(width), narrow(limit));
    // Masses of 8 bytes, then counts of 4.
    let n_bins = n_rows * COARSE_BINS;
    // Zero when it is made, and left so: other counters stay where they are, and with them the lists of
    // launches that know their place.
    let masses = stream.work("bins of draws", BINNED_BYTES * n_bins);
    let counts = Address(masses.0 + 8 * n_bins as u64);
    let asked = stream.upload(&bytes_of(rows, packed));
    let grid =
        |blocks, threads, n_bins: usize| Grid { blocks, threads, ..Grid::one(n_bins * BIN_BYTES) };

    let n_blocks = limit.div_ceil(WEIGH_THREADS * WEIGH_EACH).min(WEIGH_BLOCKS);
    let arguments: [&dyn AnyArgument; 7] = [&at, &out, &asked, &masses, &counts, &columns, &first];
    stream.launch("draw_weigh", grid((n_blocks, n_rows), WEIGH_THREADS, COARSE_BINS), &arguments);

    let arguments: [&dyn AnyArgument; 8] =
        [&at, &out, &seen, &asked, &masses, &counts, &columns, &first];
    stream.launch("draw_pick", grid((n_rows, 1), PICK_THREADS, PICK_THREADS), &arguments);
    found.asked();
    found
}

/// The C++ struct of the same name.
fn packed(draw: Draw) -> [u8; 32] {
    let least = if draw.min_p > 0.0 { draw.min_p.to_bits() } else { 0 };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&draw.numerator.to_le_bytes());
    bytes[8..16].copy_from_slice(&draw.share().to_le_bytes());
    bytes[16..20].copy_from_slice(&draw.temperature.to_le_bytes());
    bytes[20..24].copy_from_slice(&draw.top_k.to_le_bytes());
    bytes[24..28].copy_from_slice(&least.to_le_bytes());
    bytes
}
