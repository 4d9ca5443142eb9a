//! Norms, rotations and other operations on rows of activations.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use std::sync::Arc;

use cudarc::driver::DeviceRepr;
use exrail_kernels::{NormKind, Rope, RopeStyle, Span, TokenId};

use crate::found::{CudaFound, Slots};
use crate::memory::{bytes_of, bytes_of_u32, narrow};
use crate::stream::{Address, AnyArgument, Grid, Stream};
use crate::{CudaBuffer, CudaWeight};

/// Threads of a block that norms one row.
const NORM_THREADS: usize = 256;
/// Threads of a block that looks for the largest of a row, and values that each looks at.
const LARGEST_THREADS: usize = 512;
const LARGEST_EACH: usize = 8;
/// The most blocks that share a row.
const LARGEST_BLOCKS: usize = 64;

/// What a norm does with its result; the constants of `cu/norm.cu`.
#[derive(Clone, Copy)]
pub(crate) enum Into {
    Replace = 0,
    AddTo = 1,
}

/// A norm of rows.
pub(crate) struct Norm<'a> {
    pub(crate) kind: NormKind,
    pub(crate) weight: &'a CudaBuffer,
    pub(crate) bias: Option<&'a CudaBuffer>,
    pub(crate) width: usize,
    pub(crate) eps: f32,
}

impl Norm<'_> {
    /// `out[t] = norm(x[t])`, or adds it; x and out may be the same.
    pub(crate) fn run(&self, stream: &Stream, x: Address, n_rows: usize, out: Address, into: Into) {
        let kind = match self.kind {
            NormKind::Rms => 0_u32,
            NormKind::Layer => 1,
        };
        let weight = self.weight.at(self.width);
        let bias = self.bias.map_or(Address(0), |bias| bias.at(self.width));
        let (width, into) = (narrow(self.width), into as u32);
        let grid = Grid { blocks: (n_rows, 1), threads: NORM_THREADS, ..Grid::one(0) };
        stream.launch(
            "norm_rows",
            grid,
            &[&x, &weight, &bias, &out, &width, &self.eps, &kind, &into],
        );
    }
}

/// See [`exrail_kernels::Backend::embed`].
pub(crate) fn embed(
    stream: &Stream,
    table: &CudaWeight,
    ids: &[TokenId],
    scale: f32,
    out: &CudaBuffer,
) {
    assert!(ids.iter().all(|id| (id.0 as usize) < table.rows), "ids below {}", table.rows);
    let at = stream.upload(&bytes_of(ids, |id| id.0.to_le_bytes()));
    embed_at(stream, table, (at, 1, ids.len()), scale, out);
}

/// See [`exrail_kernels::Backend::embed_found`].
pub(crate) fn embed_found(
    stream: &Stream,
    table: &CudaWeight,
    found: &CudaFound,
    scale: f32,
    out: &CudaBuffer,
) {
    let [at, _] = found.places();
    stream.follow();
    // An index and a value, of which the kernel bounds the former.
    embed_at(stream, table, (at, 2, found.n_rows()), scale, out);
}

/// The first of `n_ids`, `stride` words apart, is at `ids`.
fn embed_at(
    stream: &Stream,
    table: &CudaWeight,
    (ids, stride, n_ids): (Address, u32, usize),
    scale: f32,
    out: &CudaBuffer,
) {
    let n_values = n_ids * table.columns;
    let (out, planes, n) = (out.at(n_values), table.planes(), narrow(n_ids));
    let n_threads = if table.dtype.is_quantised() { n_values / 32 } else { n_values };
    let kernel = format!("embed_{}", table.suffix());
    stream.launch(&kernel, Grid::each(n_threads), &[&planes, &ids, &stride, &scale, &out, &n]);
}

/// The sines and cosines of a step's rows. The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Rotation {
    turns: Address,
    n_pairs: u32,
    interleaved: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Rotation {}

impl Rotation {
    pub(crate) const NONE: Rotation = Rotation { turns: Address(0), n_pairs: 0, interleaved: 0 };

    /// Of rows at `positions`: made once a step, however many layers turn by it.
    ///
    /// # Panics
    /// When the pairs do not fit a head.
    pub(crate) fn of(
        stream: &Stream,
        rope: Option<&Rope>,
        positions: &[u32],
        head_dim: usize,
    ) -> Rotation {
        let Some(rope) = rope else {
            return Rotation::NONE;
        };
        let n_pairs = rope.inverse_frequencies.len();
        assert!(2 * n_pairs <= head_dim, "{n_pairs} pairs do not fit a head of {head_dim}");
        let at = stream.upload(&bytes_of(positions, u32::to_le_bytes));
        let frequencies = stream.upload(&bytes_of(&rope.inverse_frequencies, f32::to_le_bytes));
        let (n, pairs) = (narrow(positions.len()), narrow(n_pairs));
        let n_turns = positions.len() * n_pairs;
        let facts = [at.0, frequencies.0, u64::from(n), rope.magnitude.to_bits().into()];
        let (turns, is_new) = stream.kept_in_step(facts, 8 * n_turns);
        if is_new {
            let (grid, magnitude) = (Grid::each(n_turns), rope.magnitude);
            let arguments: [&dyn AnyArgument; 6] =
                [&at, &frequencies, &turns, &n, &pairs, &magnitude];
            stream.launch("rope_turns", grid, &arguments);
        }
        Rotation::from_table(turns, Some(rope), head_dim)
    }

    /// With the cosines and sines at `turns`.
    ///
    /// # Panics
    /// When the pairs do not fit a head.
    pub(crate) fn from_table(turns: Address, rope: Option<&Rope>, head_dim: usize) -> Rotation {
        let Some(rope) = rope else {
            return Rotation::NONE;
        };
        let n_pairs = rope.inverse_frequencies.len();
        assert!(2 * n_pairs <= head_dim, "{n_pairs} pairs do not fit a head of {head_dim}");
        let interleaved = match rope.style {
            RopeStyle::Interleaved => 1,
            RopeStyle::Halves => 0,
        };
        Rotation { turns, n_pairs: narrow(n_pairs), interleaved }
    }
}

/// See [`exrail_kernels::Backend::rope`].
pub(crate) fn rope(
    stream: &Stream,
    x: &CudaBuffer,
    n_heads: usize,
    head_dim: usize,
    positions: &[u32],
    rope: &Rope,
) {
    let x = x.at(positions.len() * n_heads * head_dim);
    let rotation = Rotation::of(stream, Some(rope), positions, head_dim);
    let (n, heads, dim) = (narrow(positions.len()), narrow(n_heads), narrow(head_dim));
    let grid = Grid::each(positions.len() * n_heads * rope.inverse_frequencies.len());
    stream.launch("rope", grid, &[&x, &rotation, &n, &heads, &dim]);
}

/// See [`exrail_kernels::Backend::gather_rows`].
pub(crate) fn gather_rows(
    stream: &Stream,
    x: &CudaBuffer,
    width: usize,
    rows: &[u32],
    out: &CudaBuffer,
) {
    let n_needed = rows.iter().max().map_or(0, |&row| row as usize + 1);
    let (x, to) = (x.at(n_needed * width), out.at(rows.len() * width));
    let at = stream.upload(&bytes_of(rows, u32::to_le_bytes));
    let (n, columns) = (narrow(rows.len()), narrow(width));
    let grid = Grid::each(rows.len() * width);
    stream.launch("gather_rows", grid, &[&x, &at, &to, &n, &columns]);
}

/// See [`exrail_kernels::Backend::add`].
pub(crate) fn add(stream: &Stream, x: &CudaBuffer, y: &CudaBuffer, len: usize) {
    let (x, y, n) = (x.at(len), y.at(len), narrow(len));
    stream.launch("add", Grid::each(len), &[&x, &y, &n]);
}

/// See [`exrail_kernels::Backend::scale_and_cap`].
pub(crate) fn scale_and_cap(
    stream: &Stream,
    x: &CudaBuffer,
    len: usize,
    scale: f32,
    soft_cap: Option<f32>,
) {
    let (x, n, cap) = (x.at(len), narrow(len), soft_cap.unwrap_or(0.0));
    stream.launch("scale_and_cap", Grid::each(len), &[&x, &n, &scale, &cap]);
}

/// See [`exrail_kernels::Backend::mean_rows`].
pub(crate) fn mean_rows(
    stream: &Stream,
    x: &CudaBuffer,
    width: usize,
    spans: &[Span],
    out: &CudaBuffer,
) {
    let n_needed = spans.iter().map(|span| span.first_row + span.n_rows).max().unwrap_or(0);
    let (x, out) = (x.at(n_needed * width), out.at(spans.len() * width));
    let each = spans.iter().flat_map(|span| [span.first_row, span.n_rows]);
    let at = stream.upload(&bytes_of_u32(each));
    let (n, columns) = (narrow(spans.len()), narrow(width));
    let grid = Grid::each(spans.len() * width);
    stream.launch("mean_rows", grid, &[&x, &at, &out, &n, &columns]);
}

/// See [`exrail_kernels::Backend::largest`].
pub(crate) fn largest(
    stream: &Arc<Stream>,
    slots: &Arc<Slots>,
    x: &CudaBuffer,
    n_rows: usize,
    width: usize,
    limit: usize,
) -> CudaFound {
    let found = find_largest(stream, slots, x, n_rows, width, limit);
    found.asked();
    found
}

/// The same, of an answer that something is still to be written to.
pub(crate) fn find_largest(
    stream: &Arc<Stream>,
    slots: &Arc<Slots>,
    x: &CudaBuffer,
    n_rows: usize,
    width: usize,
    limit: usize,
) -> CudaFound {
    assert!((1..=width).contains(&limit), "{limit} of {width} outputs");
    let found = CudaFound::new(slots, stream, n_rows);
    let (at, [out, seen]) = (x.at(n_rows * width), found.places());
    let (columns, first) = (narrow(width), narrow(limit));
    let n_blocks = limit.div_ceil(LARGEST_THREADS * LARGEST_EACH).min(LARGEST_BLOCKS);
    let parts = stream.work("largest outputs of parts", 8 * n_blocks * n_rows);
    let n_done = stream.counters(n_rows);
    let grid = Grid { blocks: (n_blocks, n_rows), threads: LARGEST_THREADS, ..Grid::one(0) };
    let arguments: [&dyn AnyArgument; 7] = [&at, &out, &seen, &parts, &n_done, &columns, &first];
    stream.launch("largest", grid, &arguments);
    found
}
