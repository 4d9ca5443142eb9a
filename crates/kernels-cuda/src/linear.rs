//! Matrix products: which kernel, on what activations, and what happens behind the sum.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use cudarc::driver::DeviceRepr;
use exrail_kernels::{Activation, GateActivation, InputRounding};

use crate::memory::narrow;
use crate::stream::{Address, Grid, Stream};
use crate::{CudaBuffer, CudaWeight};

/// Rows of activations that one warp decodes a weight for; `cu/linear.cu` has a kernel of each.
pub(crate) const TILES: [usize; 2] = [1, 8];

/// The C++ enum of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
enum Finish {
    Store = 0,
    Add = 1,
    AddRows = 2,
    Silu = 3,
    GeluTanh = 4,
    Times = 5,
    Gelu = 6,
}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Epilogue {
    out: Address,
    bias: Address,
    rows: Address,
    scales: Address,
    scale: f32,
    finish: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Epilogue {}

const NONE: Address = Address(0);

impl Epilogue {
    fn new(finish: Finish, out: Address) -> Epilogue {
        let finish = finish as u32;
        Epilogue { out, bias: NONE, rows: NONE, scales: NONE, scale: 1.0, finish }
    }

    /// `out = x Wᵀ (+ bias)`.
    pub(crate) fn store(out: Address, bias: Option<Address>) -> Epilogue {
        Epilogue { bias: bias.unwrap_or(NONE), ..Epilogue::new(Finish::Store, out) }
    }

    /// `out += scale * (x Wᵀ (+ bias))`.
    pub(crate) fn add(out: Address, bias: Option<Address>, scale: f32) -> Epilogue {
        Epilogue { bias: bias.unwrap_or(NONE), scale, ..Epilogue::new(Finish::Add, out) }
    }

    /// `out[rows[t]] += scales[t] * (x[t] Wᵀ)`.
    pub(crate) fn add_rows(out: Address, rows: Address, scales: Address) -> Epilogue {
        Epilogue { rows, scales, ..Epilogue::new(Finish::AddRows, out) }
    }

    /// `out = activation(x Wᵀ)`.
    pub(crate) fn activated(out: Address, activation: GateActivation) -> Epilogue {
        let finish = match activation {
            GateActivation::Silu => Finish::Silu,
            GateActivation::GeluTanh => Finish::GeluTanh,
        };
        Epilogue::new(finish, out)
    }

    /// `out *= x Wᵀ`.
    pub(crate) fn times(out: Address) -> Epilogue {
        Epilogue::new(Finish::Times, out)
    }

    /// `out = gelu(x Wᵀ + bias)`.
    pub(crate) fn gelu(out: Address, bias: Address) -> Epilogue {
        Epilogue { bias, ..Epilogue::new(Finish::Gelu, out) }
    }
}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Quantised {
    first: Address,
    second: Address,
    heads: Address,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Quantised {}

/// Bytes of the C++ struct `QuantHead`.
const HEAD_BYTES: usize = 12;

/// Activations `(T, columns)` that meet one or more matrices.
pub(crate) struct Input<'a> {
    stream: &'a Stream,
    x: Address,
    quantised: Option<(Quantised, InputRounding)>,
    n_rows: usize,
    columns: usize,
}

impl<'a> Input<'a> {
    /// Takes the activations as `weights`, all of which they meet, need them.
    ///
    /// # Panics
    /// When the matrices have different numbers of columns, or the buffer is short.
    pub(crate) fn new(
        stream: &'a Stream,
        activation: Activation,
        x: &CudaBuffer,
        n_rows: usize,
        weights: &[&CudaWeight],
    ) -> Input<'a> {
        let columns = weights[0].columns;
        assert!(weights.iter().all(|w| w.columns == columns), "matrices of one input");
        let x = x.at(n_rows * columns);
        let packed = weights.iter().filter(|weight| weight.dtype.is_quantised());
        let twice = |rounding| matches!(rounding, InputRounding::Twice);
        let rounding = match activation {
            Activation::F32 => None,
            Activation::Int8 => packed.map(|weight| weight.rounding).reduce(|a, b| {
                if twice(a) || twice(b) { InputRounding::Twice } else { InputRounding::Once }
            }),
        };
        let mut input = Input { stream, x, quantised: None, n_rows, columns };
        if let Some(rounding) = rounding.filter(|_| n_rows > 0) {
            input.quantised = Some((input.quantise(twice(rounding)), rounding));
        }
        input
    }

    fn quantise(&self, twice: bool) -> Quantised {
        let n_values = self.n_rows * self.columns;
        let n_blocks = n_values / 32;
        let out = Quantised {
            first: self.stream.work("int8 activations", n_values),
            second: self.stream.work("remainders of int8 activations", n_values),
            heads: self.stream.work("scales of int8 activations", n_blocks * HEAD_BYTES),
        };
        let (n, twice) = (narrow(n_blocks), u32::from(twice));
        self.stream.launch("quantise", Grid::warps(n_blocks), &[&self.x, &out, &n, &twice]);
        out
    }

    /// One product.
    pub(crate) fn times(&self, weight: &CudaWeight, end: Epilogue) {
        let n_rows = narrow(self.n_rows);
        let tile = if self.n_rows == 1 { TILES[0] } else { TILES[1] };
        let blocks = (weight.rows.div_ceil(8), self.n_rows.div_ceil(tile));
        let grid = Grid { blocks, ..Grid::one(0) };
        let (planes, suffix) = (weight.planes(), weight.suffix());
        match self.quantised.filter(|_| weight.dtype.is_quantised()) {
            Some((x, rounding)) => {
                let mode = match rounding {
                    InputRounding::Once => "once",
                    InputRounding::Twice => "twice",
                };
                let kernel = format!("linear_{mode}_{suffix}_{tile}");
                self.stream.launch(&kernel, grid, &[&planes, &x, &end, &n_rows]);
            }
            None => {
                let kernel = format!("linear_f32_{suffix}_{tile}");
                self.stream.launch(&kernel, grid, &[&planes, &self.x, &end, &n_rows]);
            }
        }
    }
}
