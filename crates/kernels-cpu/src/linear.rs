//! The `linear` operations: which thread computes which row groups, and what happens to the sums.
#![expect(unsafe_code, reason = "threads write disjoint columns of one output")]

use crate::activation::{QuantBlock, Quantise, Tiles, Widest, n_blocks};
use crate::codes::{E2m1, Indices, Iq4, Planes, Split, Whole};
use crate::disjoint::{MatrixBlock, MatrixBlocks};
use crate::lanes::{Kernel, Lanes};
use crate::math;
use crate::pool::Pool;
use crate::processor::Processor;
use crate::product::{
    BrainElement, Brains, CodesFloat, CodesInt8, Floats, Format, HalfElement, Halves, Input,
    NibblesFloat, NibblesInt8, SingleElement, Supers,
};
use crate::tile::{BLOCK, Group, ROWS};
use crate::weight::CpuWeight;
use exrail_kernels::{Activation, GateActivation, InputRounding};
use exrail_tensor::DType;
use std::marker::PhantomData;
use std::ops::Range;

/// Multiplications below which waking the pool costs more than it saves (about 2 µs of one core).
const ALONE: usize = 1 << 17;
/// Rows of activations up to which a product waits for weights rather than for arithmetic.
const FEW_ROWS: usize = 8;
/// Bytes of weights that a core takes at once then, at the most: about 15 µs. The pool hands out less
/// towards the end.
const CHUNK_BYTES: usize = 256 << 10;
/// Activations that a thread rounds alone (about 2 µs); one row is never worth a second thread.
const QUANTISE_ALONE: usize = 2048;
/// Bytes of quantised activations that stay in a core's L2 next to the weights.
const PANEL_BYTES: usize = 384 << 10;

/// What happens to a dot product after the bias.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Epilogue<'a> {
    /// Overwrites.
    Store,
    /// Adds it times `scale` to what is there: the residual.
    Add { scale: f32 },
    /// Adds row i times `scales[i]` to row `rows[i]` of the output.
    AddRows { rows: &'a [u32], scales: &'a [f32] },
    /// Overwrites with the exact gelu.
    Gelu,
}

impl Epilogue<'_> {
    /// Row of the output that belongs to row i of the input.
    #[inline(always)]
    fn target(&self, i: usize) -> usize {
        match self {
            Epilogue::AddRows { rows, .. } => rows[i] as usize,
            Epilogue::Store | Epilogue::Add { .. } | Epilogue::Gelu => i,
        }
    }

    /// Rows that the output has for `n_rows` of the input.
    fn n_targets(&self, n_rows: usize) -> usize {
        match self {
            Epilogue::AddRows { rows, .. } => rows.iter().max().map_or(0, |&row| row as usize + 1),
            Epilogue::Store | Epilogue::Add { .. } | Epilogue::Gelu => n_rows,
        }
    }
}

/// One matrix of a product and where its results go, `(T, N)`.
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a CpuWeight,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) epilogue: Epilogue<'a>,
    pub(crate) out: &'a mut [f32],
}

/// The threads and instructions of an operation, and its reusable memory.
pub(crate) struct Engine<'a> {
    pub(crate) processor: Processor,
    pub(crate) pool: &'a Pool,
    pub(crate) activation: Activation,
    pub(crate) quantised: &'a mut Vec<QuantBlock>,
}

impl Engine<'_> {
    /// Computes up to three products of the same x `(T, columns)`.
    pub(crate) fn products(&mut self, x: &[f32], n_rows: usize, products: &mut [Product<'_>]) {
        let columns = products[0].weight.columns();
        let wants_integers = products.iter().any(|p| self.is_integer(p.weight));
        let rounding = common_rounding(products.iter().map(|product| product.weight));
        let x = &x[..n_rows * columns];
        let n_blocks = self.quantise(x, columns, rounding, wants_integers);
        let input = self.input(x, columns, rounding, n_blocks);
        let mut parts = Vec::with_capacity(products.len());
        let mut n_groups = 0;
        for product in products.iter_mut() {
            assert_eq!(product.weight.columns(), columns, "products share their input");
            let n_columns = product.weight.rows();
            let first = n_groups;
            let n_targets = product.epilogue.n_targets(n_rows);
            n_groups += product.weight.n_groups();
            parts.push(Part {
                first,
                weight: product.weight,
                bias: product.bias.map(|bias| &bias[..n_columns]),
                epilogue: product.epilogue,
                n_targets,
                out: MatrixBlocks::new(product.out, n_targets, n_columns),
            });
        }
        let (processor, activation) = (self.processor, self.activation);
        let len_bytes = parts.iter().map(|part| part.weight.len_bytes()).sum();
        let job = Job { n_groups, n_rows, columns, len_bytes };
        self.share(&job, &|groups| {
            for part in &parts {
                let own = part.first..part.first + part.weight.n_groups();
                let shared = groups.start.max(own.start)..groups.end.min(own.end);
                if shared.is_empty() {
                    continue;
                }
                let local = shared.start - own.start..shared.end - own.start;
                // SAFETY: every group index is in one chunk, and the pool runs each chunk once.
                let out = unsafe {
                    part.out.block(0..part.n_targets, local.start * ROWS..local.end * ROWS)
                };
                let chunk = Chunk { processor, activation, input, n_rows, groups: local, out };
                let finish = Finish::One { bias: part.bias, epilogue: part.epilogue };
                chunk.run(&[part.weight], &finish);
            }
        });
    }

    /// `out = activation(x Gᵀ) * (x Uᵀ)`.
    pub(crate) fn gate(
        &mut self,
        x: &[f32],
        n_rows: usize,
        [gate, up]: [&CpuWeight; 2],
        gate_activation: GateActivation,
        out: &mut [f32],
    ) {
        assert_eq!((gate.rows(), gate.columns()), (up.rows(), up.columns()), "gate and up");
        let columns = gate.columns();
        let wants_integers = self.is_integer(gate) || self.is_integer(up);
        let rounding = common_rounding([gate, up]);
        let x = &x[..n_rows * columns];
        let n_blocks = self.quantise(x, columns, rounding, wants_integers);
        let input = self.input(x, columns, rounding, n_blocks);
        let out = MatrixBlocks::new(out, n_rows, gate.rows());
        let (processor, activation) = (self.processor, self.activation);
        let len_bytes = gate.len_bytes() + up.len_bytes();
        let job = Job { n_groups: gate.n_groups(), n_rows, columns: 2 * columns, len_bytes };
        self.share(&job, &|groups| {
            // SAFETY: every group index is in one chunk, and the pool runs each chunk once.
            let out = unsafe { out.block(0..n_rows, groups.start * ROWS..groups.end * ROWS) };
            let chunk = Chunk { processor, activation, input, n_rows, groups, out };
            chunk.run(&[gate, up], &Finish::Gate(gate_activation));
        });
    }

    pub(crate) fn is_integer(&self, weight: &CpuWeight) -> bool {
        let float = matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16);
        self.activation == Activation::Int8 && !float
    }

    /// Rounds the rows of x if that is `wanted`, and returns how many blocks they take.
    pub(crate) fn quantise(
        &mut self,
        x: &[f32],
        columns: usize,
        rounding: InputRounding,
        wanted: bool,
    ) -> usize {
        if !wanted {
            return 0;
        }
        let n_each = n_blocks(rounding);
        let n_all = n_each * x.len() / BLOCK;
        // What is left of other products is overwritten, or lies behind.
        if self.quantised.len() < n_all {
            self.quantised.resize(n_all, QuantBlock::default());
        }
        let (processor, tiles) = (self.processor, self.tiles(x, columns));
        let per_chunk = n_each * (QUANTISE_ALONE / columns).max(1) * columns / BLOCK;
        self.pool.run_chunks(&mut self.quantised[..n_all], per_chunk, &|i, blocks| {
            let first = i * per_chunk;
            processor.run(Quantise { x, columns, rounding, tiles, first, blocks });
        });
        n_all
    }

    /// The rows of x with the blocks that [`Engine::quantise`] made of them.
    pub(crate) fn input<'a>(
        &'a self,
        x: &'a [f32],
        columns: usize,
        rounding: InputRounding,
        n_blocks: usize,
    ) -> Input<'a> {
        let (quantised, tiles) = (&self.quantised[..n_blocks], self.tiles(x, columns));
        Input { x, columns, quantised, rounding, tiles }
    }

    fn tiles(&self, x: &[f32], columns: usize) -> Tiles {
        Tiles::new(x.len() / columns, self.processor.run(Widest))
    }

    /// Shares groups out, several at once, so that a disturbed core can take fewer.
    fn share(&self, job: &Job, run: &(dyn Fn(Range<usize>) + Sync)) {
        let n_groups = job.n_groups;
        if n_groups * ROWS * job.n_rows * job.columns < ALONE {
            return run(0..n_groups);
        }
        let most = if job.n_rows <= FEW_ROWS {
            CHUNK_BYTES * n_groups / job.len_bytes.max(1)
        } else {
            n_groups / (8 * self.pool.n_threads())
        };
        self.pool.run_several(n_groups, most.max(1), run);
    }
}

/// Once where all matrices tolerate it.
fn common_rounding<'a>(weights: impl IntoIterator<Item = &'a CpuWeight>) -> InputRounding {
    let mut roundings = weights.into_iter().map(CpuWeight::rounding);
    if roundings.all(|rounding| rounding == InputRounding::Once) {
        InputRounding::Once
    } else {
        InputRounding::Twice
    }
}

/// The size of a product: groups of weight rows, rows of activations, multiplications for one of
/// each, and bytes of all weights.
struct Job {
    n_groups: usize,
    n_rows: usize,
    columns: usize,
    len_bytes: usize,
}

/// One matrix of `products`, its groups numbered from `first`.
struct Part<'a> {
    first: usize,
    weight: &'a CpuWeight,
    bias: Option<&'a [f32]>,
    epilogue: Epilogue<'a>,
    n_targets: usize,
    out: MatrixBlocks<'a>,
}

/// Some row groups, all activation rows.
struct Chunk<'a> {
    processor: Processor,
    activation: Activation,
    input: Input<'a>,
    n_rows: usize,
    groups: Range<usize>,
    out: MatrixBlock<'a>,
}

impl Chunk<'_> {
    /// Activation rows by panels that stay in L2, inside them weight groups. The sums of a group go
    /// to a small buffer first, so that what follows does not depend on the weight format.
    fn run(self, weights: &[&CpuWeight], finish: &Finish<'_>) {
        let n_blocks = self.input.columns.div_ceil(BLOCK) * n_blocks(self.input.rounding);
        let row_bytes = size_of::<QuantBlock>() * n_blocks;
        let panel = (PANEL_BYTES / row_bytes.max(1)).next_multiple_of(8).min(self.n_rows);
        // Decode runs a thousand chunks a token: no allocation for few rows, no kilobyte for one.
        match weights.len() * panel {
            n_sums @ 0..=2 => {
                self.panels(panel, weights, finish, &mut [[0.0; ROWS]; 2][..n_sums]);
            }
            n_sums if n_sums <= 2 * FEW_ROWS => {
                self.panels(panel, weights, finish, &mut [[0.0; ROWS]; 2 * FEW_ROWS][..n_sums]);
            }
            n_sums => self.panels(panel, weights, finish, &mut vec![[0.0; ROWS]; n_sums]),
        }
    }

    /// `sums` has `panel` entries for each of the weights.
    fn panels(
        mut self,
        panel: usize,
        weights: &[&CpuWeight],
        finish: &Finish<'_>,
        sums: &mut [[f32; ROWS]],
    ) {
        for start in (0..self.n_rows).step_by(panel.max(1)) {
            let rows = start..self.n_rows.min(start + panel);
            for (i, group) in self.groups.clone().enumerate() {
                let mut parts = sums.chunks_exact_mut(rows.len());
                for weight in weights {
                    let sums = parts.next().expect("one part a weight");
                    let (input, row) = (self.input, rows.start);
                    let sums = Sums { group: weight.group(group), input, row, sums };
                    sums.run(weight.dtype(), self.activation, self.processor);
                }
                self.processor.run(FinishGroup {
                    finish,
                    sums: &sums[..weights.len() * rows.len()],
                    group,
                    rows: rows.clone(),
                    column: i * ROWS,
                    out: &mut self.out,
                });
            }
        }
    }
}

/// Dot products of one row group with consecutive activation rows, from `row`.
pub(crate) struct Sums<'a> {
    pub(crate) group: Group<'a>,
    pub(crate) input: Input<'a>,
    pub(crate) row: usize,
    pub(crate) sums: &'a mut [[f32; ROWS]],
}

impl Sums<'_> {
    pub(crate) fn run(self, dtype: DType, activation: Activation, processor: Processor) {
        match (dtype, activation) {
            (DType::F32, _) => self.with::<Floats<SingleElement>>(processor),
            (DType::F16, _) => self.with::<Floats<HalfElement>>(processor),
            (DType::BF16, _) => self.with::<Floats<BrainElement>>(processor),
            (quantised, Activation::Int8) => match self.input.rounding {
                InputRounding::Once => self.integers::<1>(quantised, processor),
                InputRounding::Twice => self.integers::<2>(quantised, processor),
            },
            (quantised, Activation::F32) => self.floats(quantised, processor),
        }
    }

    fn integers<const P: usize>(self, dtype: DType, processor: Processor) {
        match dtype {
            DType::Q4_0 => self.with::<NibblesInt8<Halves<false>, P>>(processor),
            DType::Q4_1 => self.with::<NibblesInt8<Halves<true>, P>>(processor),
            DType::Q5_0 => self.with::<CodesInt8<Planes<4, 1, 16>, Halves<false>, P>>(processor),
            DType::Q5_1 => self.with::<CodesInt8<Planes<4, 1, 0>, Halves<true>, P>>(processor),
            DType::Q2_K => self.with::<CodesInt8<Planes<2, 0, 0>, Supers<true, 2>, P>>(processor),
            DType::Q3_K => self.with::<CodesInt8<Planes<2, 1, 4>, Supers<false, 2>, P>>(processor),
            DType::Q4_K => self.with::<NibblesInt8<Supers<true, 1>, P>>(processor),
            DType::Q5_K => self.with::<CodesInt8<Planes<4, 1, 0>, Supers<true, 1>, P>>(processor),
            DType::Q6_K => self.with::<CodesInt8<Planes<4, 2, 32>, Supers<false, 2>, P>>(processor),
            DType::IQ4_NL => self.with::<CodesInt8<Indices<Iq4>, Halves<false>, P>>(processor),
            DType::IQ4_XS => self.with::<CodesInt8<Indices<Iq4>, Supers<false, 1>, P>>(processor),
            DType::MXFP4 => self.with::<CodesInt8<Indices<E2m1>, Brains, P>>(processor),
            DType::Q8_0 | DType::F32 | DType::F16 | DType::BF16 => {
                if self.group.is_split() {
                    self.with::<CodesInt8<Split, Halves<false>, P>>(processor);
                } else {
                    self.with::<CodesInt8<Whole, Halves<false>, P>>(processor);
                }
            }
        }
    }

    fn floats(self, dtype: DType, processor: Processor) {
        match dtype {
            DType::Q4_0 => self.with::<NibblesFloat<Halves<false>>>(processor),
            DType::Q4_1 => self.with::<NibblesFloat<Halves<true>>>(processor),
            DType::Q5_0 => self.with::<CodesFloat<Planes<4, 1, 16>, Halves<false>>>(processor),
            DType::Q5_1 => self.with::<CodesFloat<Planes<4, 1, 0>, Halves<true>>>(processor),
            DType::Q2_K => self.with::<CodesFloat<Planes<2, 0, 0>, Supers<true, 2>>>(processor),
            DType::Q3_K => self.with::<CodesFloat<Planes<2, 1, 4>, Supers<false, 2>>>(processor),
            DType::Q4_K => self.with::<NibblesFloat<Supers<true, 1>>>(processor),
            DType::Q5_K => self.with::<CodesFloat<Planes<4, 1, 0>, Supers<true, 1>>>(processor),
            DType::Q6_K => self.with::<CodesFloat<Planes<4, 2, 32>, Supers<false, 2>>>(processor),
            DType::IQ4_NL => self.with::<CodesFloat<Indices<Iq4>, Halves<false>>>(processor),
            DType::IQ4_XS => self.with::<CodesFloat<Indices<Iq4>, Supers<false, 1>>>(processor),
            DType::MXFP4 => self.with::<CodesFloat<Indices<E2m1>, Brains>>(processor),
            DType::Q8_0 | DType::F32 | DType::F16 | DType::BF16 => {
                if self.group.is_split() {
                    self.with::<CodesFloat<Split, Halves<false>>>(processor);
                } else {
                    self.with::<CodesFloat<Whole, Halves<false>>>(processor);
                }
            }
        }
    }

    fn with<F: Format>(self, processor: Processor) {
        processor.run(SumsOf::<F>(self, PhantomData));
    }
}

/// [`Sums`] of one format.
struct SumsOf<'a, F>(Sums<'a>, PhantomData<F>);

impl<F: Format> Kernel for SumsOf<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let SumsOf(Sums { group, input, row, sums }, _) = self;
        let mut next = 0;
        while next < sums.len() {
            let first = row + next;
            let n_rows = (input.tiles.of(first).end - first).min(F::WIDEST);
            let sums = &mut sums[next..];
            if F::WIDEST >= 8 && L::WIDEST >= 8 && n_rows == 8 {
                tile::<L, F, 8>(lanes, group, (input, first), sums);
            } else if L::WIDEST >= 4 && n_rows == 4 {
                tile::<L, F, 4>(lanes, group, (input, first), sums);
            } else {
                tile::<L, F, 1>(lanes, group, (input, first), sums);
            }
            next += n_rows;
        }
    }
}

#[inline(always)]
fn tile<L: Lanes, F: Format, const N: usize>(
    lanes: L,
    group: Group<'_>,
    (input, row): (Input<'_>, usize),
    out: &mut [[f32; ROWS]],
) {
    let sums = F::accumulate::<L, N>(lanes, group, input, row);
    for n in 0..N {
        lanes.store(sums[n], &mut out[n]);
    }
}

/// What happens to the sums.
enum Finish<'a> {
    /// Bias and epilogue.
    One { bias: Option<&'a [f32]>, epilogue: Epilogue<'a> },
    /// `activation(gate) * up`; the sums of the gate come first.
    Gate(GateActivation),
}

/// Finishes one group's sums.
struct FinishGroup<'a, 'o> {
    finish: &'a Finish<'a>,
    sums: &'a [[f32; ROWS]],
    group: usize,
    rows: Range<usize>,
    /// First column inside the chunk's block.
    column: usize,
    out: &'a mut MatrixBlock<'o>,
}

impl Kernel for FinishGroup<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for (i, row) in self.rows.clone().enumerate() {
            let target_row = match self.finish {
                Finish::One { epilogue, .. } => epilogue.target(row),
                Finish::Gate(_) => row,
            };
            let target = sixteen(self.out.row(target_row), self.column);
            let sum = lanes.load(&self.sums[i]);
            let value = match *self.finish {
                Finish::Gate(activation) => {
                    let up = lanes.load(&self.sums[self.rows.len() + i]);
                    let gate = match activation {
                        GateActivation::Silu => math::silu(lanes, sum),
                        GateActivation::GeluTanh => math::gelu_tanh(lanes, sum),
                    };
                    lanes.mul(gate, up)
                }
                Finish::One { bias, epilogue } => {
                    let value = match bias {
                        Some(bias) => {
                            let bias = &bias[self.group * ROWS..][..target.len()];
                            lanes.add(sum, load_part(lanes, bias))
                        }
                        None => sum,
                    };
                    match epilogue {
                        Epilogue::Store => value,
                        Epilogue::Add { scale } => {
                            lanes.fma(value, lanes.splat(scale), load_part(lanes, target))
                        }
                        Epilogue::AddRows { scales, .. } => {
                            lanes.fma(value, lanes.splat(scales[row]), load_part(lanes, target))
                        }
                        Epilogue::Gelu => math::gelu(lanes, value),
                    }
                }
            };
            store_part(lanes, value, target);
        }
    }
}

/// At most sixteen values from `first`.
#[inline(always)]
fn sixteen(row: &mut [f32], first: usize) -> &mut [f32] {
    let end = row.len().min(first + ROWS);
    &mut row[first..end]
}

/// Up to sixteen values, padded with zeros.
#[inline(always)]
pub(crate) fn load_part<L: Lanes>(lanes: L, values: &[f32]) -> L::V {
    if let Some(values) = values.as_array::<16>() {
        return lanes.load(values);
    }
    let mut padded = [0.0; 16];
    padded[..values.len()].copy_from_slice(values);
    lanes.load(&padded)
}

/// The first `out.len()` lanes, at most sixteen.
#[inline(always)]
pub(crate) fn store_part<L: Lanes>(lanes: L, v: L::V, out: &mut [f32]) {
    if let Some(out) = out.as_mut_array::<16>() {
        return lanes.store(v, out);
    }
    let mut padded = [0.0; 16];
    lanes.store(v, &mut padded);
    out.copy_from_slice(&padded[..out.len()]);
}
