//! Attention over pages and inside spans; see `cu/attention.cu`.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use cudarc::driver::DeviceRepr;
use exrail_kernels::{Activation, AttentionShape, AttentionSpan, KvDtype, PAGE_TOKENS, Span};

use crate::memory::{bytes_of_u32, narrow};
use crate::stream::{Address, AnyArgument, Grid, Stream};
use crate::{CudaBuffer, CudaKvPool, CudaOptions};

/// Threads of a block, which has one head of one row.
const THREADS: usize = 256;
/// Positions that one block attends to, and elements that a lane takes at once; the constants of
/// `cu/attention.cu`.
const RUN: usize = 128;
const VECTOR: usize = 8;
/// Widest head that the lanes of a warp hold at once.
const MAX_RUN_WIDTH: usize = 32 * VECTOR;
/// Bytes of the results of runs that are kept at once: rows of a long prompt take turns.
const PARTS_BYTES: usize = 64 << 20;
/// Bytes of the C++ struct `Row`.
const ROW_BYTES: usize = 24;
/// Widest head: what the lanes of a warp hold.
const MAX_HEAD_DIM: usize = 512;

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Shape {
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    soft_cap: f32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Shape {}

impl Shape {
    fn of(shape: AttentionShape) -> Shape {
        assert!(shape.n_heads.is_multiple_of(shape.n_kv_heads), "heads divide into groups");
        assert!(shape.head_dim <= MAX_HEAD_DIM, "heads up to {MAX_HEAD_DIM} wide");
        assert!(shape.window != Some(0), "a window holds at least one key");
        Shape {
            n_heads: narrow(shape.n_heads),
            n_kv_heads: narrow(shape.n_kv_heads),
            head_dim: narrow(shape.head_dim),
            window: narrow(shape.window.unwrap_or(0)),
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
        }
    }

    fn grid(self, n_rows: usize) -> Grid {
        let shared_bytes = THREADS / 32 * self.head_dim as usize * 4;
        Grid {
            blocks: (n_rows, self.n_heads as usize),
            threads: THREADS,
            ..Grid::one(shared_bytes)
        }
    }

    /// Blocks of threads that share the heads of a row: one for those of each key, or more, so that two for
    /// each multiprocessor have something to do. What a head gives does not depend on it.
    fn head_blocks(self, n_rows: usize, n_runs: usize, n_multiprocessors: usize) -> usize {
        let n_kv_heads = self.n_kv_heads as usize;
        let group = self.n_heads as usize / n_kv_heads;
        let enough = |&split: &usize| n_rows * n_kv_heads * split * n_runs >= 2 * n_multiprocessors;
        let mut splits = (1..=group).filter(|split| group.is_multiple_of(*split));
        n_kv_heads * splits.find(enough).unwrap_or(group)
    }
}

/// Names of the kernels that attend to runs, by the lanes that share a position.
pub(crate) fn run_names() -> impl Iterator<Item = String> {
    let of = |dtype| [1, 2, 4, 8, 16, 32].map(|lanes| format!("attention_run_{dtype}_{lanes}"));
    ["f32", "f16", "int8"].into_iter().flat_map(of)
}

/// Rows of a sequence from which tensor cores attend to 64 of them at once, and head widths that they
/// have kernels for: those of `cu/flash.cu`.
const TILE_FROM: usize = 9;
const TILE: usize = 64;
const TILE_WIDTHS: [usize; 4] = [32, 64, 96, 128];

/// Names of the kernels of `cu/flash.cu`.
pub(crate) fn tile_names() -> impl Iterator<Item = String> {
    let of = |dtype| TILE_WIDTHS.map(|width| format!("attention_tile_{dtype}_{width}"));
    ["f16", "int8"].into_iter().flat_map(of)
}

/// Whether tensor cores have a kernel for heads of this width, and may round queries for it.
fn on_tensor_cores(pool: &CudaKvPool, options: CudaOptions) -> bool {
    options.activation == Activation::Int8 && TILE_WIDTHS.contains(&pool.shape.head_dim)
}

/// Whether rows of a span take turns in tiles.
fn in_tiles(span: &AttentionSpan<'_>, pool: &CudaKvPool, options: CudaOptions) -> bool {
    span.n_rows >= TILE_FROM
        && !options.batch_invariant
        && on_tensor_cores(pool, options)
        && pool.shape.dtype != KvDtype::F32
}

/// Positions that a warp attends to at once with all heads of a key, the most heads, and the longest run: 32
/// pages. The constants of `cu/group.cu`.
const GROUP_POSITIONS: usize = 16;
const GROUP_HEADS: usize = 16;
const GROUP_RUN: usize = 32 * PAGE_TOKENS;
/// Runs that a cluster of blocks of threads puts together (in `cu/group.cu` too), and the most elements of a key that make one:
/// with more to read, the multiprocessors that a cluster finds no room on are missed.
const CLUSTER: usize = 8;
const CLUSTER_ELEMENTS: usize = 32 << 10;
/// What a part of a head has besides its sums.
const PART_BESIDES: usize = 4;

/// Head widths of which a block of twice as many warps has room.
const WIDE_WIDTHS: [usize; 2] = [32, 64];

/// Names of the kernels of `cu/group.cu`.
pub(crate) fn group_names() -> impl Iterator<Item = String> {
    let narrow = TILE_WIDTHS.into_iter().map(Group::narrow);
    narrow.chain(WIDE_WIDTHS.into_iter().map(Group::wide)).map(Group::name)
}

/// A kernel of `cu/group.cu`.
#[derive(Clone, Copy)]
struct Group {
    n_warps: usize,
    head_dim: usize,
}

impl Group {
    /// The one for blocks of threads that have a multiprocessor each.
    fn wide(head_dim: usize) -> Group {
        Group { n_warps: if WIDE_WIDTHS.contains(&head_dim) { 8 } else { 4 }, head_dim }
    }

    /// The one of which two share a multiprocessor.
    fn narrow(head_dim: usize) -> Group {
        Group { n_warps: 4, head_dim }
    }

    fn name(self) -> String {
        let name = if self.n_warps == 8 { "wide" } else { "group" };
        format!("attention_{name}_{}", self.head_dim)
    }

    /// Positions of its warps at once: runs are multiples of it.
    fn step(self) -> usize {
        self.n_warps * GROUP_POSITIONS
    }
}

/// Rows that attend one by one.
struct Rows {
    at: Address,
    n: usize,
    longest: usize, // positions that one of them sees, or that lie before those
}

impl Rows {
    fn behind(&self, n: usize) -> Address {
        Address(self.at.0 + (n * ROW_BYTES) as u64)
    }

    /// The longest context of which the grid is the same: so that a growing one seldom changes it.
    fn context(&self) -> usize {
        self.longest.next_power_of_two().max(PAGE_TOKENS)
    }

    /// The kernel of `cu/group.cu`, positions of a run, and blocks of threads of a cluster.
    ///
    /// All of a short context is one run, and there is nothing to put together; a cluster does that where the
    /// card has room for all of them at once, and each has little to read. Otherwise runs are as short as leave
    /// no block of threads waiting for another to end, two of which share a multiprocessor. Where nothing
    /// may depend on the other rows they are always the same.
    fn runs(&self, shape: Shape, stream: &Stream, options: CudaOptions) -> (Group, usize, usize) {
        let n_multiprocessors = stream.machine().n_multiprocessors;
        let (n_keys, head_dim) = (self.n * shape.n_kv_heads as usize, shape.head_dim as usize);
        let (wide, narrow) = (Group::wide(head_dim), Group::narrow(head_dim));
        if options.batch_invariant {
            return (narrow, PAGE_TOKENS, 1);
        }
        if self.longest <= PAGE_TOKENS {
            return (if n_keys <= n_multiprocessors { wide } else { narrow }, PAGE_TOKENS, 1);
        }
        let of_cluster = self.context().div_ceil(CLUSTER);
        let is_small = of_cluster * head_dim <= CLUSTER_ELEMENTS;
        if stream.is_hopper() && n_keys * CLUSTER <= n_multiprocessors && is_small {
            let run = of_cluster.max(wide.step());
            return (wide, run, self.context().div_ceil(run));
        }
        // One row goes as its warm-up went; several take what suits their positions.
        let seen = if self.n == 1 { self.context() } else { self.longest };
        let is_many = |run: usize| n_keys * seen.div_ceil(run) > 2 * n_multiprocessors;
        let mut run = narrow.step();
        while run < GROUP_RUN && is_many(run) {
            run *= 2;
        }
        (narrow, run, 1)
    }
}

/// Runs of all keys of all rows that [`Rows::runs`] gives at most where it chooses by how busy the card is: two a
/// multiprocessor of the positions seen, of which a context has at most twice as many.
const fn most_runs(n_multiprocessors: usize) -> usize {
    4 * n_multiprocessors
}

/// Where the results of runs are kept, and of how many rows at once. More rows or positions never take less memory,
/// and any take `least`: few rows may have more runs than many, and behind the warm-up nothing may grow.
fn parts(stream: &Stream, n_rows: usize, row_bytes: usize, least: usize) -> (Address, usize) {
    let bytes = (n_rows * row_bytes).min(PARTS_BYTES).max(row_bytes).max(least);
    (stream.work("runs of attention", bytes), (PARTS_BYTES / row_bytes).clamp(1, n_rows))
}

/// What every kernel takes first: queries, the pool, the layer, the table of pages, and the shape.
type Common = (Address, crate::kv::Pages, u32, Address, Shape);

/// All heads of a key at once, on tensor cores.
fn attend_in_groups(
    stream: &Stream,
    options: CudaOptions,
    (q, pages, layer, table, shape): Common,
    rows: &Rows,
    out: Address,
) {
    let (head_dim, n_heads, n_kv_heads) =
        (shape.head_dim as usize, shape.n_heads as usize, shape.n_kv_heads as usize);
    let (group, run, cluster) = rows.runs(shape, stream, options);
    let n_runs = rows.context().div_ceil(run);
    let head_bytes = 4 * (n_heads / n_kv_heads) * (head_dim + PART_BESIDES);
    let least = if options.batch_invariant {
        // Rows of a prompt attend one by one, too, and later ones see more positions than the warm-up's.
        PARTS_BYTES
    } else {
        most_runs(stream.machine().n_multiprocessors) * head_bytes
    };
    let (parts, rows_at_once) = parts(stream, rows.n, n_kv_heads * n_runs * head_bytes, least);
    let n_done = stream.counters(rows.n * n_kv_heads);
    let in_ring = stream.machine().depth * 2 * GROUP_POSITIONS * (head_dim + 8) * 2;
    let of_heads = (n_heads / n_kv_heads) * head_dim * 4;
    // What the blocks of a cluster send each other lies behind.
    let sent = if cluster > 1 { of_heads + 4 * cluster } else { 0 };
    let shared_bytes = group.n_warps * in_ring.max(of_heads) + sent;
    let (kernel, run) = (group.name(), narrow(run));
    for first in (0..rows.n).step_by(rows_at_once) {
        let at = rows.behind(first);
        let blocks = (rows_at_once.min(rows.n - first), n_kv_heads);
        let threads = 32 * group.n_warps;
        let grid = Grid { blocks, runs: n_runs, threads, shared_bytes, cluster };
        let arguments: [&dyn AnyArgument; 10] =
            [&q, &pages, &layer, &table, &shape, &at, &run, &out, &parts, &n_done];
        stream.launch(&kernel, grid, &arguments);
    }
}

/// See [`exrail_kernels::Backend::attention`]; the pool comes with its layer.
pub(crate) fn attention(
    stream: &Stream,
    options: CudaOptions,
    q: &CudaBuffer,
    (pool, layer): (&CudaKvPool, usize),
    shape: AttentionShape,
    spans: &[AttentionSpan<'_>],
    out: &CudaBuffer,
) {
    assert!(layer < pool.shape.n_layers, "layer {layer} of {}", pool.shape.n_layers);
    let (mut rows, mut tiles, mut table) = (Vec::new(), Vec::new(), Vec::new());
    let (mut n_needed, mut longest, list) = (0, 1, stream.list());
    for span in spans {
        let pages_at = table.len();
        let end = span.first_position + span.n_rows;
        let n_pages = end.div_ceil(PAGE_TOKENS);
        table.extend(span.pages[..n_pages].iter().map(|page| page.0 as usize));
        let tiled = in_tiles(span, pool, options);
        for first in (0..span.n_rows).step_by(TILE).filter(|_| tiled) {
            let n_rows = TILE.min(span.n_rows - first);
            tiles.extend([span.first_row + first, n_rows, span.first_position + first, pages_at]);
        }
        for i in 0..span.n_rows {
            let end = span.first_position + i + 1;
            let first = shape.window.map_or(0, |window| end.saturating_sub(window));
            for page in &span.pages[first / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS)] {
                pool.check_page(*page);
            }
            if !tiled {
                let seen = span.pages.iter().map(|page| page.0 as usize);
                let old = pool.fresh.old(list, seen, PAGE_TOKENS, end);
                rows.extend([span.first_row + i, first, end, pages_at, old, 0]);
                longest = longest.max(end);
            }
        }
        n_needed = n_needed.max(span.first_row + span.n_rows);
    }
    let n_rows = rows.len() / (ROW_BYTES / 4);
    let n_values = n_needed * shape.n_heads * shape.head_dim;
    let (q, out) = (q.at(n_values), out.at(n_values));
    let (pages, layer, shape) = (pool.pages(), narrow(layer), Shape::of(shape));
    let n_tiles = tiles.len() / 4;
    let rows = Rows { at: stream.upload(&bytes_of_u32(rows)), n: n_rows, longest };
    let tiles = stream.upload(&bytes_of_u32(tiles));
    let table = stream.upload(&bytes_of_u32(table));
    let (dtype, whole) = match pool.shape.dtype {
        KvDtype::F32 => ("f32", "attention_f32"),
        KvDtype::F16 => ("f16", "attention_f16"),
        KvDtype::Int8 => ("int8", "attention_int8"),
    };
    let head_dim = shape.head_dim as usize;
    if n_tiles > 0 {
        let shared_bytes = 2 * 2 * TILE * (head_dim + 8) * 2;
        let blocks = (n_tiles, shape.n_heads as usize);
        let grid = Grid { blocks, threads: 128, ..Grid::one(shared_bytes) };
        let kernel = format!("attention_tile_{dtype}_{head_dim}");
        stream.launch(&kernel, grid, &[&q, &pages, &layer, &table, &shape, &tiles, &out]);
    }
    if n_rows == 0 {
        return;
    }
    let common = (q, pages, layer, table, shape);
    let group = (shape.n_heads / shape.n_kv_heads) as usize;
    if on_tensor_cores(pool, options) && dtype == "f16" && group <= GROUP_HEADS {
        return attend_in_groups(stream, options, common, &rows, out);
    }
    if !head_dim.is_multiple_of(VECTOR) || head_dim > MAX_RUN_WIDTH {
        let grid = shape.grid(n_rows);
        stream.launch(whole, grid, &[&q, &pages, &layer, &table, &shape, &rows.at, &out]);
        return;
    }
    attend_in_runs(stream, dtype, common, &rows, out);
}

/// Some heads of a key one after the other, for every type and width.
fn attend_in_runs(
    stream: &Stream,
    dtype: &str,
    (q, pages, layer, table, shape): Common,
    rows: &Rows,
    out: Address,
) {
    let head_dim = shape.head_dim as usize;
    // A power of two, so that a growing context seldom changes the grid.
    let n_runs = rows.longest.div_ceil(RUN).next_power_of_two();
    let row_bytes = 4 * shape.n_heads as usize * n_runs * (head_dim + 2);
    let (parts, rows_at_once) = parts(stream, rows.n, row_bytes, PARTS_BYTES);
    let n_done = stream.counters(rows.n * shape.n_heads as usize);
    let lanes = (head_dim / VECTOR).next_power_of_two();
    let kernel = format!("attention_run_{dtype}_{lanes}");
    for first in (0..rows.n).step_by(rows_at_once) {
        let (n_rows, at) = (rows_at_once.min(rows.n - first), rows.behind(first));
        let n_needed = rows.longest.div_ceil(RUN);
        let n_blocks = shape.head_blocks(n_rows, n_needed, stream.machine().n_multiprocessors);
        let grid = Grid { blocks: (n_rows, n_blocks), runs: n_runs, ..shape.grid(n_rows) };
        let arguments: [&dyn AnyArgument; 9] =
            [&q, &pages, &layer, &table, &shape, &at, &out, &parts, &n_done];
        stream.launch(&kernel, grid, &arguments);
    }
}

/// See [`exrail_kernels::Backend::attention_full`]; keys come with values.
pub(crate) fn attention_full(
    stream: &Stream,
    q: &CudaBuffer,
    (k, v): (&CudaBuffer, &CudaBuffer),
    shape: AttentionShape,
    spans: &[Span],
    out: &CudaBuffer,
) {
    assert!(shape.window.is_none(), "only causal attention has a window");
    let each = |span: &Span| {
        let (first, n) = (span.first_row, span.n_rows);
        (first..first + n).flat_map(move |row| [row, 0, n, first, 0, 0])
    };
    let rows: Vec<usize> = spans.iter().flat_map(each).collect();
    let n_needed = spans.iter().map(|span| span.first_row + span.n_rows).max().unwrap_or(0);
    let n_rows = rows.len() / (ROW_BYTES / 4);
    let n_values = n_needed * shape.n_heads * shape.head_dim;
    let n_cached = n_needed * shape.n_kv_heads * shape.head_dim;
    let (q, out) = (q.at(n_values), out.at(n_values));
    let (k, v) = (k.at(n_cached), v.at(n_cached));
    let (shape, rows) = (Shape::of(shape), stream.upload(&bytes_of_u32(rows)));
    stream.launch("attention_full", shape.grid(n_rows), &[&q, &k, &v, &shape, &rows, &out]);
}
