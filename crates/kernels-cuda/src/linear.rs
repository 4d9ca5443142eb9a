//! Matrix products: which kernel, on what activations, and what happens behind the sum.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use cudarc::driver::DeviceRepr;
use exrail_kernels::{Activation, GateActivation, NormKind, Normed};

use crate::kv::Pages;
use crate::layout::{Cut, WARPS};
use crate::memory::narrow;
use crate::queue::Kernel;
use crate::rows::{Into, Norm, Rotation};
use crate::stream::{Address, Grid, Stream};
use crate::{CudaBuffer, CudaOptions, CudaWeight};

/// Rows of activations that one warp decodes a weight for; `cu/linear.cu` has a kernel of each.
pub(crate) const TILES: [usize; 2] = [1, 8];
/// Rows of activations up to which products stream their weights (`matmul_few` of `cu/matmul.cu`), and
/// those of a tile beyond.
const FEW: usize = 64;
/// Rows and outputs of a tile of `matmul_many`, and the shared memory that it takes.
const TILE: (usize, usize) = (128, 128);
const TILE_BYTES: usize = (3 * TILE.0 + 2 * TILE.1) * 144;
/// Rows from which weights are written out as halves for Hopper's tensor cores (`cu/tiles.cu`).
const TILED_FROM: usize = 256;
/// The kernels of it, one for each way in which it ends.
pub(crate) const TILED: [&str; 4] =
    ["matmul_tiles_store", "matmul_tiles_add", "matmul_tiles_silu", "matmul_tiles_gelu_tanh"];
/// Rows and outputs of a tile, its threads, and the shared memory of four steps of 64 columns, which starts
/// on 1,024 bytes.
const TILED_TILE: (usize, usize) = (128, 256);
const TILED_THREADS: usize = 384;
const TILED_BYTES: usize = 4 * (TILED_TILE.0 + TILED_TILE.1) * 128 + 1024;
/// Columns of a step.
const TILED_COLUMNS: usize = 64;
/// The most bytes of weights that lie as halves at once.
const TILED_WEIGHT_BYTES: usize = 128 << 20;

/// The C++ enum of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
enum Order {
    Rows = 0,
    LanesOfMma = 1,
    Tiles = 2,
}

/// The C++ enum of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Finish {
    Store = 0,
    Add = 1,
    AddRows = 2,
    Silu = 3,
    GeluTanh = 4,
    Times = 5,
    Gelu = 6,
    Place = 7,
}

/// Which heads outputs are. The C++ enum of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub(crate) enum OfHeads {
    Queries = 0,
    Keys = 1,
    Values = 2,
}

/// How queries and keys turn, and where keys and values go. The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Placement {
    pub(crate) rotation: Rotation,
    pub(crate) pages: Pages,
    pub(crate) slots: Address,
    pub(crate) layer: u32,
    pub(crate) padding: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Placement {}

impl Placement {
    const NONE: Placement = Placement {
        rotation: Rotation::NONE,
        pages: Pages::NONE,
        slots: NONE,
        layer: 0,
        padding: 0,
    };
}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Epilogue {
    rows: Address,
    scales: Address,
    scale: f32,
    finish: Finish,
    placement: Placement,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Epilogue {}

const NONE: Address = Address(0);

impl Epilogue {
    fn new(finish: Finish) -> Epilogue {
        let placement = Placement::NONE;
        Epilogue { rows: NONE, scales: NONE, scale: 1.0, finish, placement }
    }

    /// `out = x Wᵀ (+ bias)`.
    pub(crate) fn store() -> Epilogue {
        Epilogue::new(Finish::Store)
    }

    /// `out += scale * (x Wᵀ (+ bias))`.
    pub(crate) fn add(scale: f32) -> Epilogue {
        Epilogue { scale, ..Epilogue::new(Finish::Add) }
    }

    /// `out[rows[t]] += scales[t] * (x[t] Wᵀ)`.
    pub(crate) fn add_rows(rows: Address, scales: Address) -> Epilogue {
        Epilogue { rows, scales, ..Epilogue::new(Finish::AddRows) }
    }

    /// `out = activation(x Wᵀ)`.
    fn activated(activation: GateActivation) -> Epilogue {
        Epilogue::new(match activation {
            GateActivation::Silu => Finish::Silu,
            GateActivation::GeluTanh => Finish::GeluTanh,
        })
    }

    /// `out *= x Wᵀ`.
    fn times() -> Epilogue {
        Epilogue::new(Finish::Times)
    }

    /// Queries, keys and values `x Wᵀ (+ bias)` on their way to attention, where
    /// [`Input::places_heads`].
    pub(crate) fn place(placement: Placement) -> Epilogue {
        Epilogue { placement, ..Epilogue::new(Finish::Place) }
    }

    /// `out = gelu(x Wᵀ + bias)`.
    pub(crate) fn gelu() -> Epilogue {
        Epilogue::new(Finish::Gelu)
    }
}

/// One matrix of a product, and where its outputs go. The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Part {
    weight: crate::weight::Planes,
    out: Address,
    bias: Address,
    heads: OfHeads,
    padding: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Part {}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Parts {
    each: [Part; 3],
    n: u32,
    paired: u32,
    n_outputs: u32,
    n_pairs: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Parts {}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Row {
    x: Address,
    norm: Address,
    eps: f32,
    padding: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Row {}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Quantised {
    first: Address,
    second: Address,
    heads: Address,
    inverses: Address,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Quantised {}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Halves {
    values: Address,
    factors: Address,
    order: Order,
    padding: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Halves {}

/// How the rows of an input lie before its products.
#[derive(Clone, Copy)]
enum Prepared {
    /// As they are: f32, or one row that its product rounds on its way.
    Not,
    /// As int8, for products whose rows do not depend on each other.
    Rounded(Quantised),
    /// As halves, for tensor cores.
    Halves(Halves),
    /// As halves in tiles, for those of Hopper, and the kernel.
    Tiles(Halves, &'static str),
}

/// Bytes of the C++ struct `QuantHead`.
const HEAD_BYTES: usize = 12;

/// A matrix, where its outputs go, and perhaps its bias.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    weight: &'a CudaWeight,
    out: Address,
    bias: Address,
    heads: OfHeads,
}

impl<'a> Output<'a> {
    /// `out` has `n_rows` rows.
    ///
    /// # Panics
    /// When a buffer is short.
    pub(crate) fn new(
        weight: &'a CudaWeight,
        out: &CudaBuffer,
        n_rows: usize,
        bias: Option<&CudaBuffer>,
    ) -> Output<'a> {
        let bias = bias.map_or(NONE, |bias| bias.at(weight.rows));
        Output { weight, out: out.at(n_rows * weight.rows), bias, heads: OfHeads::Queries }
    }

    /// The same as keys or values.
    pub(crate) fn of(self, heads: OfHeads) -> Output<'a> {
        Output { heads, ..self }
    }

    fn part(&self) -> Part {
        let Output { out, bias, heads, .. } = *self;
        Part { weight: self.weight.planes(), out, bias, heads, padding: 0 }
    }
}

/// Activations `(T, columns)` that meet one or more matrices.
pub(crate) struct Input<'a> {
    stream: &'a Stream,
    row: Row,
    is_rounded: bool, // where it meets packed weights
    n_rows: usize,
    columns: usize,
    row_fits: bool, // beside the rings of every matrix
    batch_invariant: bool,
}

impl<'a> Input<'a> {
    /// Takes the activations as `weights`, all of which they meet, need them.
    ///
    /// # Panics
    /// When the matrices have different numbers of columns, or the buffer is short.
    pub(crate) fn new(
        stream: &'a Stream,
        options: CudaOptions,
        x: &CudaBuffer,
        n_rows: usize,
        weights: &[&CudaWeight],
    ) -> Input<'a> {
        let CudaOptions { activation, batch_invariant, .. } = options;
        let columns = weights[0].columns;
        assert!(weights.iter().all(|w| w.columns == columns), "matrices of one input");
        let packed = || weights.iter().filter(|weight| weight.dtype.is_quantised());
        let is_rounded = activation == Activation::Int8 && packed().next().is_some();
        let row = Row { x: x.at(n_rows * columns), norm: NONE, eps: 0.0, padding: 0 };
        let machine = stream.machine();
        let row_fits = packed().all(|weight| machine.row_fits(weight.matrix()));
        Input { stream, row, is_rounded, n_rows, columns, row_fits, batch_invariant }
    }

    /// The same behind a norm, which meets the rows on their way where all matrices are packed.
    pub(crate) fn normed(
        stream: &'a Stream,
        options: CudaOptions,
        normed: &mut Normed<'_, CudaBuffer>,
        weights: &[&CudaWeight],
    ) -> Input<'a> {
        let Normed { kind, x, n_rows, weight, eps, ref mut work } = *normed;
        stream.hand_over();
        let direct = Input::new(stream, options, x, n_rows, weights);
        let width = direct.columns;
        let all_packed = weights.iter().all(|weight| weight.dtype.is_quantised());
        if kind == NormKind::Rms && all_packed && direct.is_rounded {
            let row = Row { norm: weight.at(width), eps, ..direct.row };
            return Input { row, ..direct };
        }
        let norm = Norm { kind, weight, bias: None, width, eps };
        let len = n_rows * width;
        norm.run(stream, x.at(len), n_rows, work.at(len), Into::Replace);
        Input::new(stream, options, work, n_rows, weights)
    }

    /// Whether products of these rows can end with [`Epilogue::place`]: few rows and packed weights.
    pub(crate) fn places_heads(&self, weights: &[&CudaWeight]) -> bool {
        let fits = |w: &&CudaWeight| w.dtype.is_quantised() && w.rows.is_multiple_of(2);
        self.is_rounded && (1..=FEW).contains(&self.n_rows) && weights.iter().all(fits)
    }

    /// Products of matrices, which are launched together where they have one format.
    pub(crate) fn times(&self, outputs: &[Output<'_>], end: Epilogue) {
        let alike = |a: &Output<'_>, b: &Output<'_>| {
            let facts = |w: &CudaWeight| (w.dtype, w.shared);
            facts(a.weight) == facts(b.weight)
        };
        let prepared = self.prepare(self.tiled(outputs, false, end));
        for outputs in outputs.chunk_by(alike) {
            self.launch(outputs, false, end, prepared);
        }
    }

    /// `out = activation(x Gᵀ) * (x Uᵀ)`.
    pub(crate) fn gate(&self, gate: Output<'_>, up: &CudaWeight, activation: GateActivation) {
        let up = Output { weight: up, ..gate };
        let facts = |w: &CudaWeight| (w.dtype, w.shared);
        let end = Epilogue::activated(activation);
        let packed = self.is_rounded && gate.weight.dtype.is_quantised();
        if packed && facts(gate.weight) == facts(up.weight) {
            let prepared = self.prepare(self.tiled(&[gate, up], true, end));
            return self.launch(&[gate, up], true, end, prepared);
        }
        let prepared = self.prepare(None);
        self.launch(&[gate], false, end, prepared);
        self.launch(&[up], false, Epilogue::times(), prepared);
    }

    /// The kernel of `cu/tiles.cu` for all of these matrices, where it is worth its while.
    fn tiled(&self, outputs: &[Output<'_>], paired: bool, end: Epilogue) -> Option<&'static str> {
        let fits =
            |o: &Output<'_>| o.weight.dtype.is_quantised() && o.weight.rows.is_multiple_of(2);
        let large = self.n_rows >= TILED_FROM && self.columns.is_multiple_of(TILED_COLUMNS);
        if !large || !self.stream.is_hopper() || !outputs.iter().all(fits) {
            return None;
        }
        let [store, add, silu, gelu_tanh] = TILED;
        match (end.finish, paired) {
            (Finish::Store, false) => Some(store),
            (Finish::Add, false) => Some(add),
            (Finish::Silu, true) => Some(silu),
            (Finish::GeluTanh, true) => Some(gelu_tanh),
            (Finish::Store | Finish::Add, true)
            | (Finish::Silu | Finish::GeluTanh, false)
            | (Finish::AddRows | Finish::Times | Finish::Gelu | Finish::Place, _) => None,
        }
    }

    /// Rounds the rows in memory, unless a product does it on its way; for the kernel `tiled` of
    /// `cu/tiles.cu`, if there is one.
    fn prepare(&self, tiled: Option<&'static str>) -> Prepared {
        if !self.is_rounded || self.n_rows == 0 || self.n_rows == 1 && self.row_fits {
            return Prepared::Not;
        }
        let n_values = self.n_rows * self.columns;
        let grid = |threads| Grid { blocks: (self.n_rows, 1), threads, ..Grid::one(0) };
        let width = narrow(self.columns);
        let factors = self.stream.work("factors of rounded activations", 4 * self.n_rows);
        if self.n_rows > 1 && !self.batch_invariant {
            let (order, rows_together) = match tiled {
                Some(_) => (Order::Tiles, TILED_TILE.0),
                None if self.n_rows <= FEW => (Order::LanesOfMma, 8),
                None => (Order::Rows, 1),
            };
            // Four blocks of columns lie together, whether or not all are there.
            let n_columns = self.columns.next_multiple_of(128);
            let n_places = self.n_rows.next_multiple_of(rows_together) * n_columns;
            let values = self.stream.work("half activations", 2 * n_places);
            let out = Halves { values, factors, order, padding: 0 };
            self.stream.launch("halve", grid(512), &[&self.row, &out, &width]);
            return match tiled {
                Some(kernel) => Prepared::Tiles(out, kernel),
                None => Prepared::Halves(out),
            };
        }
        let out = Quantised {
            first: self.stream.work("int8 activations", n_values),
            second: self.stream.work("remainders of int8 activations", n_values),
            heads: self.stream.work("scales of int8 activations", n_values / 32 * HEAD_BYTES),
            inverses: factors,
        };
        self.stream.launch("quantise", grid(32 * WARPS), &[&self.row, &out, &width]);
        Prepared::Rounded(out)
    }

    /// One launch, or one for each matrix in f32; `outputs` have one format.
    fn launch(&self, outputs: &[Output<'_>], paired: bool, end: Epilogue, prepared: Prepared) {
        let first = outputs[0].weight;
        let (stream, n_rows) = (self.stream, narrow(self.n_rows));
        let kernels = stream.format(first.format);
        if !self.is_rounded || !first.dtype.is_quantised() {
            let i = usize::from(self.n_rows > 1);
            let (kernel, tile) = (kernels.exact[i], TILES[i]);
            for output in outputs {
                let n_tiles = self.n_rows.div_ceil(tile);
                let blocks = (output.weight.rows.div_ceil(8), n_tiles);
                let grid = Grid { blocks, ..Grid::one(0) };
                let part = output.part();
                stream.launch_kernel(kernel, grid, &[&part, &self.row.x, &end, &n_rows]);
            }
            return;
        }
        let each = outputs.iter().map(|output| output.weight.rows);
        let n_outputs: usize = each.clone().sum();
        let n_pairs = match paired {
            true => first.rows,
            false => each.map(|rows| rows.div_ceil(2)).sum(),
        };
        let mut parts = Parts {
            each: [outputs[0].part(); 3],
            n: narrow(outputs.len()),
            paired: paired.into(),
            n_outputs: narrow(n_outputs),
            n_pairs: narrow(n_pairs),
        };
        for (part, output) in parts.each.iter_mut().zip(outputs) {
            *part = output.part();
        }
        let rounded = kernels.rounded;
        match prepared {
            Prepared::Not => {
                let grid = self.grid(first, n_pairs, 0);
                stream.launch_kernel(rounded[0], grid, &[&parts, &self.row, &end]);
            }
            Prepared::Rounded(x) => {
                let grid = self.grid(first, n_pairs, 1);
                stream.launch_kernel(rounded[1], grid, &[&parts, &x, &end, &n_rows]);
            }
            Prepared::Halves(x) => {
                let (kernel, grid) = self.matmul(first, n_outputs);
                stream.launch_kernel(kernel, grid, &[&parts, &x, &end, &n_rows]);
            }
            Prepared::Tiles(x, kernel) => self.tiles(kernel, first, (&parts, x, end), n_outputs),
        }
    }

    /// The product on Hopper's tensor cores: as many outputs at once as there is room for their weights.
    fn tiles(
        &self,
        kernel: &str,
        weight: &CudaWeight,
        (parts, x, end): (&Parts, Halves, Epilogue),
        n_outputs: usize,
    ) {
        let (stream, n_rows) = (self.stream, narrow(self.n_rows));
        let unpack = stream.format(weight.format).unpack;
        let n_multiprocessors = stream.machine().n_multiprocessors;
        let most = TILED_WEIGHT_BYTES / (2 * self.columns) / TILED_TILE.1 * TILED_TILE.1;
        let most = most.max(TILED_TILE.1);
        for first in (0..n_outputs).step_by(most) {
            let n = most.min(n_outputs - first);
            let n_places = n.next_multiple_of(TILED_TILE.1) * self.columns;
            let w = stream.work("weights as halves", 2 * n_places);
            let (first, n_here) = (narrow(first), narrow(n));
            let grid = Grid::each(n * self.columns / 32);
            stream.launch_kernel(unpack, grid, &[parts, &w, &first, &n_here]);
            let n_tiles = self.n_rows.div_ceil(TILED_TILE.0) * n.div_ceil(TILED_TILE.1);
            let blocks = (n_tiles.min(n_multiprocessors), 1);
            let grid = Grid { blocks, threads: TILED_THREADS, ..Grid::one(TILED_BYTES) };
            stream.launch(kernel, grid, &[parts, &w, &x, &end, &n_rows, &first, &n_here]);
        }
    }

    /// The product on tensor cores for this number of rows.
    fn matmul(&self, weight: &CudaWeight, n_outputs: usize) -> (Kernel, Grid) {
        let kernels = self.stream.format(weight.format);
        if self.n_rows > FEW {
            let blocks = (self.n_rows.div_ceil(TILE.0), n_outputs.div_ceil(TILE.1));
            return (kernels.many, Grid { blocks, ..Grid::one(TILE_BYTES) });
        }
        let size = self.n_rows.div_ceil(8).next_power_of_two().ilog2() as usize;
        let cut =
            self.stream.machine().few(weight.column_bytes(), (self.columns, n_outputs), 1 << size);
        (kernels.few[size], cut.grid(1))
    }

    /// The grid of a product with one row or with tiles of several, by the place of the tile in [`TILES`].
    fn grid(&self, weight: &CudaWeight, n_pairs: usize, tile: usize) -> Grid {
        let cut = self.stream.machine().streamed(weight.matrix(), n_pairs, tile == 0);
        cut.grid(self.n_rows.div_ceil(TILES[tile]))
    }
}

impl Cut {
    fn grid(self, n_tiles: usize) -> Grid {
        let (blocks, threads) = ((self.n_blocks, n_tiles), 32 * self.n_warps);
        Grid { blocks, threads, ..Grid::one(self.shared_bytes) }
    }
}
