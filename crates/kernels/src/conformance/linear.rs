//! Matrix products and the embedding.
//!
//! **Float bound.** n · u · Σ|wᵢxᵢ|, with n = columns + 8 for the bias, the residual and the store.
//! A kernel for a block format may sum the integer part and the offset apart (d·Σqx and m·Σx), so
//! for those |wᵢ| is replaced by 3 · max|w| of the run of 32 weights around it: no split of a weight
//! on any of the grids has parts that sum to more.
//!
//! **Int8 bound.** Rounding to a grid of step d = max|x| / 127 per 32 activations moves each by at
//! most d/2, so the product moves by Σ|wᵢ| · dᵢ/2; computing d in f32 adds less than 1/1000 of it.
//!
//! **Behind the product.** |silu'| < 1.1 and |gelu'| < 1.13, exact or by tanh, carry a product's bound
//! through; a kernel's own exp may err by 16 u relative, its erf by 4 u absolute and its gelu by
//! tanh by 4 u |x|. A scale multiplies the bound and rounds once.
//!
//! Every bound has `f32::MIN_POSITIVE` per summand on top, so that denormals may be flushed.

use exrail_tensor::{DType, quantize};

use super::{ConformanceError, ROW_COUNTS, Suite, U, accepted, defined};
use crate::reference::{Reference, ReferenceWeight};
use crate::{Activation, Backend, GateActivation, InputRounding, Largest, TokenId, WeightView};

/// Activations that share one int8 scale.
const INT8_RUN: usize = 32;

/// A matrix on the backend and as the reference sees it.
pub(super) struct Pair<W> {
    pub(super) case: String,
    pub(super) rows: usize,
    columns: usize,
    pub(super) tested: W,
    pub(super) reference: ReferenceWeight,
    pub(super) magnitudes: ReferenceWeight, // |w|
    spreads: ReferenceWeight,               // |w|, or 3 max|w| of 32 for block formats
}

impl<B: Backend> Suite<'_, B> {
    /// All products over all formats, and the embedding.
    pub(super) fn linear(&mut self) -> Result<(), ConformanceError> {
        for dtype in DType::ALL {
            let sizes: &[(usize, usize)] = match dtype.block_len() {
                1 => &[(5, 1), (17, 33), (3, 64), (67, 100)],
                32 => &[(1, 32), (17, 96), (67, 288)],
                _ => &[(5, 256), (67, 768)],
            };
            for &(rows, columns) in sizes {
                self.embed(dtype, rows, columns)?;
                self.embed_found(dtype, rows, columns)?;
                for n_rows in ROW_COUNTS {
                    self.plain_linear(dtype, rows, columns, n_rows)?;
                    self.linear_add(dtype, rows, columns, n_rows)?;
                    self.linear_qkv(dtype, rows, columns, n_rows)?;
                    self.linear_add_rows(dtype, rows, columns, n_rows)?;
                    self.linear_gate(GateActivation::Silu, dtype, (rows, columns), n_rows)?;
                    self.linear_gelu(dtype, rows, columns, n_rows)?;
                }
                for n_rows in [1, 3] {
                    self.linear_largest(dtype, rows, columns, n_rows)?;
                }
                self.linear_gate(GateActivation::GeluTanh, dtype, (rows, columns), 7)?;
            }
        }
        Ok(())
    }

    fn embed(&mut self, dtype: DType, rows: usize, columns: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let table = self.pair("embed", dtype, rows, columns)?;
        let ids: Vec<TokenId> = (0..9).map(|_| TokenId(self.random.below(rows) as u32)).collect();
        let len = ids.len() * columns;
        for scale in [1.0, 25.3] {
            let mut out = self.output(&table.case, len)?;
            self.backend.embed(&table.tested, &ids, scale, &mut out);
            let expected = defined(len, |r, out| r.embed(&table.reference, &ids, scale, out));
            let spreads = defined(len, |r, out| r.embed(&table.spreads, &ids, scale, out));
            let case = format!("{} scale={scale}", table.case);
            self.check(&case, &out, &expected, |i| 3.0 * U * f64::from(spreads[i]))?;
        }
        Ok(())
    }

    /// The tokens of two questions, of which the first is read when the second was asked. One row has no
    /// largest value: it may get any row of the table, and the others get theirs.
    fn embed_found(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let table = self.pair("embed_found", dtype, rows, columns)?;
        let (n_rows, scale) = (5, 25.3);
        let mut asked = [(); 2].map(|()| self.random.normals(n_rows * rows, 0.0, 1.0));
        asked[0][2 * rows] = f32::NAN;
        let mut found = Vec::new();
        for values in &asked {
            let mut x = self.upload(&table.case, values)?;
            found.push(self.backend.largest(&x, n_rows, rows, rows));
            self.backend.write(&mut x, &vec![f32::NAN; values.len()]);
        }
        for (i, (values, found)) in asked.iter().zip(&found).enumerate() {
            let case = format!("{} question={i}", table.case);
            let mut out = self.output(&case, n_rows * columns)?;
            self.backend.embed_found(&table.tested, found, scale, &mut out);
            self.check_largest(&case, &self.backend.found(found), values, rows, rows)?;
            let largest = Largest::of_rows(values, rows, rows);
            let ids: Vec<TokenId> = largest.iter().map(|row| TokenId(row.index)).collect();
            let [expected, spreads] = [&table.reference, &table.spreads]
                .map(|table| defined(n_rows * columns, |r, out| r.embed(table, &ids, scale, out)));
            self.check(&case, &out, &expected, |i| {
                let any = largest[i / columns].value.is_nan();
                if any { f64::INFINITY } else { 3.0 * U * f64::from(spreads[i]) }
            })?;
        }
        Ok(())
    }

    fn plain_linear(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let weight = self.pair("linear", dtype, rows, columns)?;
        let case = format!("{} T={n_rows}", weight.case);
        let x = self.random.activations(n_rows, columns);
        let x_tested = self.upload(&case, &x)?;
        let bias = self.random.normals(rows, 0.0, 1.0);
        let bias_tested = self.upload(&case, &bias)?;
        let bound = self.product_bound(&x, n_rows, &weight);
        for (label, bias, bias_tested) in
            [("no bias", None, None), ("bias", Some(&bias), Some(&bias_tested))]
        {
            let mut out = self.output(&case, n_rows * rows)?;
            self.backend.linear(&x_tested, n_rows, &weight.tested, bias_tested, &mut out);
            let expected = defined(n_rows * rows, |r, out| {
                r.linear(&x, n_rows, &weight.reference, bias, out);
            });
            let case = format!("{case} {label}");
            self.check(&case, &out, &expected, |i| bound[i] + U * magnitude(bias, i))?;
        }
        Ok(())
    }

    /// Not within a bound but the very outputs of `linear`: sharp ones, equal ones, one beyond the
    /// limit, and one that is no number.
    fn linear_largest(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        for kind in ["sharp", "flat", "zero", "nan"] {
            self.next_case();
            let rounding = self.next_rounding();
            let case = format!("linear_largest {dtype} {rows}x{columns} T={n_rows} {kind}");
            let mut values = self.random.normals(rows * columns, 0.0, 0.5);
            let mut x = self.random.activations(n_rows, columns);
            let limit = rows.div_ceil(2);
            match kind {
                "flat" => values.chunks_exact_mut(columns).for_each(|row| row.fill(0.25)),
                "zero" => x.fill(0.0),
                "nan" => x[columns / 2] = f32::NAN,
                _ => values[(limit - 1) * columns..limit * columns].copy_from_slice(&x[..columns]),
            }
            let bytes = quantize(dtype, &values).expect("the sizes above are whole blocks");
            let name = case.as_str();
            let view =
                WeightView { name, dtype, rows, columns, bytes: &bytes, rounding, head: true };
            let weight = accepted(&case, self.backend.weight(&view))?;
            let x = self.upload(&case, &x)?;
            let mut out = self.output(&case, n_rows * rows)?;
            self.backend.linear(&x, n_rows, &weight, None, &mut out);
            let mut outputs = vec![0.0; n_rows * rows];
            self.backend.read(&out, &mut outputs);
            let found = self.backend.linear_largest(&x, n_rows, &weight, limit, &mut out);
            self.check_largest(&case, &self.backend.found(&found), &outputs, rows, limit)?;
        }
        Ok(())
    }

    /// Compares the largest of every row with the rows' values.
    pub(super) fn check_largest(
        &self,
        case: &str,
        found: &[Largest],
        values: &[f32],
        width: usize,
        limit: usize,
    ) -> Result<(), ConformanceError> {
        self.check_found(case, found, &Largest::of_rows(values, width, limit))
    }

    fn linear_add(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let weight = self.pair("linear_add", dtype, rows, columns)?;
        let case = format!("{} T={n_rows}", weight.case);
        let x = self.random.activations(n_rows, columns);
        let y = self.random.normals(n_rows * rows, 0.0, 10.0);
        let bias = self.random.normals(rows, 0.0, 1.0);
        let x_tested = self.upload(&case, &x)?;
        let bias_tested = self.upload(&case, &bias)?;
        let bound = self.product_bound(&x, n_rows, &weight);
        for (label, bias, bias_tested, scale) in [
            ("no bias", None, None, 1.0),
            ("bias", Some(&bias), Some(&bias_tested), 1.0),
            ("bias and scale", Some(&bias), Some(&bias_tested), -0.22),
        ] {
            let mut sum = self.upload(&case, &y)?;
            let (tested, reference) = (&weight.tested, &weight.reference);
            self.backend.linear_add(&x_tested, n_rows, tested, bias_tested, scale, &mut sum);
            let mut expected = y.clone();
            Reference.linear_add(&x, n_rows, reference, bias, scale, &mut expected);
            let case = format!("{case} {label}");
            self.check(&case, &sum, &expected, |i| {
                scaled_bound(scale, bound[i] + 2.0 * U * magnitude(bias, i))
                    + 2.0 * U * f64::from(y[i].abs())
            })?;
        }
        Ok(())
    }

    /// What an expert adds to some rows, in no order; the others must stay as they are.
    fn linear_add_rows(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let weight = self.pair("linear_add_rows", dtype, rows, columns)?;
        let case = format!("{} T={n_rows}", weight.case);
        // A shuffled part of 2 T rows (Fisher and Yates).
        let mut targets: Vec<u32> = (0..2 * n_rows as u32).collect();
        for i in (1..targets.len()).rev() {
            targets.swap(i, self.random.below(i + 1));
        }
        targets.truncate(n_rows);
        let mut scales = self.random.normals(n_rows, 0.0, 1.0);
        scales[0] = 0.0;
        let x = self.random.activations(n_rows, columns);
        let y = self.random.normals(2 * n_rows * rows, 0.0, 10.0);
        let x_tested = self.upload(&case, &x)?;
        let mut sum = self.upload(&case, &y)?;
        self.backend.linear_add_rows(&x_tested, &weight.tested, &targets, &scales, &mut sum);
        let mut expected = y.clone();
        Reference.linear_add_rows(&x, &weight.reference, &targets, &scales, &mut expected);
        let bound = self.product_bound(&x, n_rows, &weight);
        let mut bounds = vec![0.0; y.len()];
        for (i, (&target, &scale)) in targets.iter().zip(&scales).enumerate() {
            for n in 0..rows {
                let at = target as usize * rows + n;
                bounds[at] =
                    scaled_bound(scale, bound[i * rows + n]) + 2.0 * U * f64::from(y[at].abs());
            }
        }
        self.check(&case, &sum, &expected, |i| bounds[i])?;

        let mut same = self.upload(&case, &y)?;
        self.backend.linear_add_rows(&x_tested, &weight.tested, &[], &[], &mut same);
        self.check(&format!("{case} no rows"), &same, &y, |_| 0.0)
    }

    fn linear_qkv(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let q = self.pair("linear_qkv q", dtype, 3 * rows, columns)?;
        let k = self.pair("linear_qkv k", dtype, rows, columns)?;
        let v = self.pair("linear_qkv v", dtype, rows + 1, columns)?;
        let pairs = [q, k, v];
        let case = format!("{} T={n_rows}", pairs[0].case);
        let x = self.random.activations(n_rows, columns);
        let x_tested = self.upload(&case, &x)?;
        let biases = [0, 1, 2].map(|i| self.random.normals(pairs[i].rows, 0.0, 1.0));
        let [bias_q, bias_k, bias_v] = &biases;
        let tested =
            [self.upload(&case, bias_q)?, self.upload(&case, bias_k)?, self.upload(&case, bias_v)?];
        for (label, with_bias) in [("no bias", None), ("bias", Some([0, 1, 2].map(|i| &tested[i])))]
        {
            let mut out_q = self.output(&case, n_rows * pairs[0].rows)?;
            let mut out_k = self.output(&case, n_rows * pairs[1].rows)?;
            let mut out_v = self.output(&case, n_rows * pairs[2].rows)?;
            let weights = [0, 1, 2].map(|i| &pairs[i].tested);
            let outs = [&mut out_q, &mut out_k, &mut out_v];
            self.backend.linear_qkv(&x_tested, n_rows, weights, with_bias, outs);
            for (i, out) in [&out_q, &out_k, &out_v].into_iter().enumerate() {
                let pair = &pairs[i];
                let bias = with_bias.map(|_| &biases[i]);
                let expected = defined(n_rows * pair.rows, |r, out| {
                    r.linear(&x, n_rows, &pair.reference, bias, out);
                });
                let bound = self.product_bound(&x, n_rows, pair);
                let case = format!("{} T={n_rows} {label}", pair.case);
                self.check(&case, out, &expected, |i| bound[i] + U * magnitude(bias, i))?;
            }
        }
        Ok(())
    }

    fn linear_gate(
        &mut self,
        activation: GateActivation,
        dtype: DType,
        (rows, columns): (usize, usize),
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let op = format!("linear_gate {activation:?}");
        let gate = self.pair(&op, dtype, rows, columns)?;
        let up = self.pair(&op, dtype, rows, columns)?;
        let case = format!("{} T={n_rows}", gate.case);
        let x = self.random.activations(n_rows, columns);
        let x_tested = self.upload(&case, &x)?;
        let len = n_rows * rows;
        let mut out = self.output(&case, len)?;
        self.backend.linear_gate(&x_tested, n_rows, &gate.tested, &up.tested, activation, &mut out);
        let expected = defined(len, |r, out| {
            r.linear_gate(&x, n_rows, &gate.reference, &up.reference, activation, out);
        });
        let bounds = [&gate, &up].map(|pair| self.product_bound(&x, n_rows, pair));
        self.check_gate(&case, &out, &expected, &x, (&gate, &up), |i| (bounds[0][i], bounds[1][i]))
    }

    /// Compares a gate's output; `bounds` are those of the two products of `x`.
    pub(super) fn check_gate(
        &self,
        case: &str,
        out: &B::Buffer,
        expected: &[f32],
        x: &Vec<f32>,
        (gate, up): (&Pair<B::Weight>, &Pair<B::Weight>),
        bounds: impl Fn(usize) -> (f64, f64),
    ) -> Result<(), ConformanceError> {
        let (n_rows, len) = (x.len() / gate.columns, expected.len());
        let gates = defined(len, |r, out| r.linear(x, n_rows, &gate.reference, None, out));
        let ups = defined(len, |r, out| r.linear(x, n_rows, &up.reference, None, out));
        // The larger slope, and the larger error of a kernel's own function, of both activations.
        let (slope, own) = (1.13, 4.0 * U);
        self.check(case, out, expected, |i| {
            // |f(g)| <= |g| for both, which spares a second formula here.
            let (g, u) = (f64::from(gates[i].abs()), f64::from(ups[i].abs()));
            let (gate_bound, up_bound) = bounds(i);
            let moved = slope * gate_bound * (u + up_bound) + g * up_bound;
            moved
                + own * g * (u + up_bound)
                + 16.0 * U * f64::from(expected[i].abs())
                + f64::from(f32::MIN_POSITIVE)
        })
    }

    fn linear_gelu(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let weight = self.pair("linear_gelu", dtype, rows, columns)?;
        let case = format!("{} T={n_rows}", weight.case);
        let x = self.random.activations(n_rows, columns);
        let bias = self.random.normals(rows, 0.0, 1.0);
        let x_tested = self.upload(&case, &x)?;
        let bias_tested = self.upload(&case, &bias)?;
        let len = n_rows * rows;
        let mut out = self.output(&case, len)?;
        self.backend.linear_gelu(&x_tested, n_rows, &weight.tested, &bias_tested, &mut out);
        let expected =
            defined(len, |r, out| r.linear_gelu(&x, n_rows, &weight.reference, &bias, out));
        let products =
            defined(len, |r, out| r.linear(&x, n_rows, &weight.reference, Some(&bias), out));
        let bound = self.product_bound(&x, n_rows, &weight);
        self.check(&case, &out, &expected, |i| {
            1.13 * (bound[i] + U * magnitude(Some(&bias), i))
                + 4.0 * U * f64::from(products[i].abs())
                + f64::from(f32::MIN_POSITIVE)
        })
    }

    /// A random matrix with rows of zeros and an offset, so that block minima matter.
    pub(super) fn pair(
        &mut self,
        op: &str,
        dtype: DType,
        rows: usize,
        columns: usize,
    ) -> Result<Pair<B::Weight>, ConformanceError> {
        let case = format!("{op} {dtype} {rows}x{columns}");
        let mut values = self.random.normals(rows * columns, 0.3, 0.5);
        if rows > 2 {
            values[columns..2 * columns].fill(0.0);
        }
        let bytes = quantize(dtype, &values).expect("the sizes above are whole blocks");
        // Every operation must take a head, which may be stored in another way.
        let (rounding, head) = (self.next_rounding(), self.n_cases.is_multiple_of(3));
        let view = WeightView { name: &case, dtype, rows, columns, bytes: &bytes, rounding, head };
        let tested = accepted(&case, self.backend.weight(&view))?;
        let found = self.backend.weight_shape(&tested);
        if found != (rows, columns) {
            let device = self.backend.name();
            return Err(ConformanceError::Shape { case, expected: (rows, columns), found, device });
        }
        let reference = accepted(&case, Reference.weight(&view))?;
        let magnitudes: Vec<f32> = reference.values().iter().map(|w| w.abs()).collect();
        let spreads = match dtype.block_len() {
            1 => magnitudes.clone(),
            _ => magnitudes
                .chunks_exact(32)
                .flat_map(|run| [3.0 * run.iter().fold(0.0f32, |m, &w| m.max(w)); 32])
                .collect(),
        };
        let magnitudes = f32_weight(rows, columns, &magnitudes);
        let spreads = f32_weight(rows, columns, &spreads);
        Ok(Pair { case, rows, columns, tested, reference, magnitudes, spreads })
    }

    /// Each in turn, two cases long, so that both meet buffers with and without a tail.
    fn next_rounding(&self) -> InputRounding {
        if (self.n_cases / 2).is_multiple_of(2) {
            InputRounding::Once
        } else {
            InputRounding::Twice
        }
    }

    /// How far each value of `x Wᵀ` may lie from the reference, `(T, N)`.
    pub(super) fn product_bound(
        &self,
        x: &[f32],
        n_rows: usize,
        weight: &Pair<B::Weight>,
    ) -> Vec<f64> {
        let half_steps: Vec<f32> = match self.activation {
            Activation::F32 => vec![0.0; x.len()],
            Activation::Int8 => x
                .chunks_exact(weight.columns)
                .flat_map(|row| row.chunks(INT8_RUN))
                .flat_map(|run| {
                    let highest = run.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    std::iter::repeat_n(highest / 254.0, run.len())
                })
                .collect(),
        };
        let reach: Vec<f32> = x.iter().zip(&half_steps).map(|(x, half)| x.abs() + half).collect();
        let len = n_rows * weight.rows;
        let summed = defined(len, |r, out| r.linear(&reach, n_rows, &weight.spreads, None, out));
        let moved =
            defined(len, |r, out| r.linear(&half_steps, n_rows, &weight.magnitudes, None, out));
        let n = (weight.columns + 8) as f64;
        let denormals = n * f64::from(f32::MIN_POSITIVE);
        summed
            .iter()
            .zip(&moved)
            .map(|(&summed, &moved)| {
                n * U * f64::from(summed) + 1.001 * f64::from(moved) + denormals
            })
            .collect()
    }
}

fn f32_weight(rows: usize, columns: usize, values: &[f32]) -> ReferenceWeight {
    let bytes = quantize(DType::F32, values).expect("f32 has no blocks");
    let rounding = InputRounding::Twice;
    let view = WeightView {
        name: "bound",
        dtype: DType::F32,
        rows,
        columns,
        bytes: &bytes,
        rounding,
        head: false,
    };
    Reference.weight(&view).expect("the bytes were made for this shape")
}

/// |bias| behind output `index`.
fn magnitude(bias: Option<&Vec<f32>>, index: usize) -> f64 {
    bias.map_or(0.0, |bias| f64::from(bias[index % bias.len()].abs()))
}

/// The bound of a value that is multiplied by `scale`, and how far that may round.
fn scaled_bound(scale: f32, bound: f64) -> f64 {
    f64::from(scale.abs()) * bound + f64::from(f32::MIN_POSITIVE)
}
