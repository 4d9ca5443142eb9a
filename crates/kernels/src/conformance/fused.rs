//! Operations that are several others in a row.
//!
//! **Norm and product.** A normed value errs by (C + 8) · u relative, so a product of normed rows by no
//! more than the product's own bound again (its n is C + 8, too): twice that bound. Where activations are
//! rounded, a device may round x · weight before the norm's factor, at most 1 / √eps, is known, and take
//! what is below 1e-35 there as zero.
//!
//! **Heads.** A normed head errs by (D + 8) · u relative and its rotation as `rope.rs` says, both
//! within r = (D + angle + 16) · u of the largest magnitude of the head. What was stored is seen through
//! attention: a score moves by at most s = scale · D · (2 r + 8 u) · max|q| max|k|, and the result by
//! (eˢ - 1) · 2 max|v|, and by (D + S) · u · max|v| for its own sums.
//!
//! **Norm, products and heads.** Held against the backend's own operations one after the other, which are
//! held against the reference: the queries to 1e-5 of their largest, because only the order of a sum and
//! a rotation's rounding may differ; what is seen of keys and values to 4e-3, a step of int8 and more.

use exrail_tensor::DType;

use super::linear::Pair;
use super::{ConformanceError, Suite, U, accepted, defined};
use crate::reference::Reference;
use crate::{
    Activation, AttentionShape, AttentionSpan, Backend, Draw, Draws, GateActivation, HeadNorms,
    HeadRows, KvDtype, KvShape, KvSlot, NormKind, Normed, PageId, Places, Rope, RopeStyle,
};

/// H, K, D, rotated pairs.
const HEADS: [(usize, usize, usize, usize); 4] =
    [(1, 1, 8, 4), (4, 2, 16, 5), (9, 3, 64, 32), (3, 1, 20, 10)];
/// Rows of a step, at most.
const MAX_ROWS: usize = 9;

impl<B: Backend> Suite<'_, B> {
    /// Norms before products, and heads on their way to attention.
    pub(super) fn fused(&mut self) -> Result<(), ConformanceError> {
        for dtype in DType::ALL {
            let sizes: &[(usize, usize)] = match dtype.block_len() {
                1 => &[(17, 33), (67, 100)],
                32 => &[(17, 96), (67, 1056)],
                _ => &[(5, 256), (67, 768)],
            };
            for &(rows, columns) in sizes {
                for n_rows in [1, 3, MAX_ROWS] {
                    self.normed(NormKind::Rms, dtype, (rows, columns), n_rows)?;
                }
                self.normed(NormKind::Layer, dtype, (rows, columns), 2)?;
            }
        }
        for heads in HEADS {
            for n_rows in [1, 2, MAX_ROWS] {
                for (with_norms, with_rope) in [(false, true), (true, true), (true, false)] {
                    self.placed(heads, n_rows, with_norms, with_rope)?;
                }
            }
        }
        for dtype in [DType::F32, DType::Q8_0, DType::Q4_K] {
            for n_rows in [1, 2, MAX_ROWS] {
                for kv in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
                    self.norm_placed(dtype, n_rows, kv, RopeStyle::Interleaved)?;
                    self.norm_placed(dtype, n_rows, kv, RopeStyle::Halves)?;
                }
            }
        }
        Ok(())
    }

    fn normed(
        &mut self,
        kind: NormKind,
        dtype: DType,
        (rows, columns): (usize, usize),
        n_rows: usize,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let pairs = [
            self.pair("normed q", dtype, 2 * rows, columns)?,
            self.pair("normed k", dtype, rows, columns)?,
            self.pair("normed v", dtype, rows, columns)?,
        ];
        let case = format!("{} {kind:?} T={n_rows}", pairs[0].case);
        let x = self.random.activations(n_rows, columns);
        let weight = self.random.normals(columns, 1.0, 0.3);
        let eps = 1e-5;
        let rows_normed = defined(n_rows * columns, |r, out| {
            r.norm(kind, &x, n_rows, &weight, eps, out);
        });
        let (x_tested, weight_tested) = (self.upload(&case, &x)?, self.whole(&case, &weight)?);
        let mut work = self.output(&case, n_rows * columns)?;
        // A macro, because the work of one operation is free again when it returns.
        macro_rules! input {
            () => {
                Normed { x: &x_tested, n_rows, kind, weight: &weight_tested, eps, work: &mut work }
            };
        }

        let mut outs = Vec::new();
        for pair in &pairs {
            outs.push(self.output(&case, n_rows * pair.rows)?);
        }
        let [q, k, v] = &mut outs[..] else { unreachable!("three were pushed") };
        let weights = [0, 1, 2].map(|i| &pairs[i].tested);
        self.backend.norm_qkv(input!(), weights, None, [q, k, v]);
        for (pair, out) in pairs.iter().zip(&outs) {
            let expected = defined(n_rows * pair.rows, |r, out| {
                r.linear(&rows_normed, n_rows, &pair.reference, None, out);
            });
            let bound = self.normed_bound(&rows_normed, n_rows, pair, eps);
            self.check(&format!("{case} {}", pair.case), out, &expected, |i| bound[i])?;
        }

        let [_, gate, up] = &pairs;
        let len = n_rows * rows;
        let mut out = self.output(&case, len)?;
        let activation = GateActivation::Silu;
        self.backend.norm_gate(input!(), &gate.tested, &up.tested, activation, &mut out);
        let expected = defined(len, |r, out| {
            r.linear_gate(&rows_normed, n_rows, &gate.reference, &up.reference, activation, out);
        });
        let bounds = [gate, up].map(|pair| self.normed_bound(&rows_normed, n_rows, pair, eps));
        self.check_gate(&format!("{case} gate"), &out, &expected, &rows_normed, (gate, up), |i| {
            (bounds[0][i], bounds[1][i])
        })?;

        let mut logits = self.output(&case, len)?;
        self.backend.norm_linear(input!(), &gate.tested, &mut logits);
        let expected = defined(len, |r, out| {
            r.linear(&rows_normed, n_rows, &gate.reference, None, out);
        });
        let case = format!("{case} logits");
        self.check(&case, &logits, &expected, |i| bounds[0][i])?;
        let mut values = vec![0.0; len];
        self.backend.read(&logits, &mut values);
        let limit = rows.div_ceil(2);
        let found = self.backend.norm_largest(input!(), &gate.tested, limit, &mut logits);
        self.check_largest(&case, &self.backend.found(&found), &values, rows, limit)?;

        let draws: Vec<Draw> = (0..n_rows).map(|t| self.random.draw(t)).collect();
        let draws = Draws { limit, rows: &draws };
        let found = self.backend.norm_draw(input!(), &gate.tested, draws, &mut logits);
        let case = format!("{case} draw");
        self.check_found(&case, &self.backend.found(&found), &draws.of_rows(&values, rows))
    }

    fn normed_bound(
        &self,
        normed: &[f32],
        n_rows: usize,
        weight: &Pair<B::Weight>,
        eps: f32,
    ) -> Vec<f64> {
        let dropped = match self.activation {
            Activation::F32 => 0.0,
            Activation::Int8 => 1e-35 / eps.sqrt(),
        };
        let rows = vec![dropped; normed.len()];
        let len = n_rows * weight.rows;
        let dropped = defined(len, |r, out| r.linear(&rows, n_rows, &weight.magnitudes, None, out));
        let bound = self.product_bound(normed, n_rows, weight);
        bound.iter().zip(&dropped).map(|(&bound, &d)| 2.0 * bound + f64::from(d)).collect()
    }

    /// Rows of one sequence, and what its last row then sees.
    fn placed(
        &mut self,
        (n_heads, n_kv_heads, head_dim, n_pairs): (usize, usize, usize, usize),
        n_rows: usize,
        with_norms: bool,
        with_rope: bool,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!(
            "place_heads H={n_heads} K={n_kv_heads} D={head_dim} T={n_rows} norms={with_norms} rope={with_rope}"
        );
        let style = if n_rows == 2 { RopeStyle::Interleaved } else { RopeStyle::Halves };
        let inverse_frequencies =
            (0..n_pairs).map(|i| 1e4_f32.powf(-(i as f32) / n_pairs as f32)).collect();
        let rope = Rope { inverse_frequencies, style, magnitude: 1.0 };
        let rope = with_rope.then_some(&rope);
        let q = self.random.normals(n_rows * n_heads * head_dim, 0.0, 1.0);
        let [k, v] = [0, 1].map(|_| self.random.normals(n_rows * n_kv_heads * head_dim, 0.0, 1.0));
        let weights = [0, 1].map(|_| self.random.normals(head_dim, 1.0, 0.3));
        let positions: Vec<u32> = (0..n_rows as u32).collect();
        let pages = [PageId(1)];
        let slots: Vec<KvSlot> =
            positions.iter().map(|&offset| KvSlot { page: pages[0], offset }).collect();
        let dtype = KvDtype::F32;
        let kv_shape = KvShape { n_layers: 2, n_kv_heads, head_dim, n_pages: 2, dtype };

        let mut q_tested = self.upload(&case, &q)?;
        let (mut k_tested, mut v_tested) = (self.upload(&case, &k)?, self.upload(&case, &v)?);
        let [query, key] = [self.whole(&case, &weights[0])?, self.whole(&case, &weights[1])?];
        let mut pool = accepted(&case, self.backend.kv_pool(kv_shape))?;
        let eps = 1e-6;
        let norms = with_norms.then_some(HeadNorms { query: &query, key: &key, eps });
        let (queries, keys, values) = (&mut q_tested, &mut k_tested, &mut v_tested);
        let heads = HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
        self.backend.place_heads(heads, &positions, &mut pool, 1, &slots);

        let (mut q_placed, mut k_placed, mut v) = (q, k, v);
        let mut expected_pool = accepted(&case, Reference.kv_pool(kv_shape))?;
        let norms = HeadNorms { query: &weights[0], key: &weights[1], eps };
        let norms = with_norms.then_some(norms);
        let (queries, keys, values) = (&mut q_placed, &mut k_placed, &mut v);
        let heads = HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
        Reference.place_heads(heads, &positions, &mut expected_pool, 1, &slots);
        let most =
            |values: &[f32]| f64::from(values.iter().fold(0.0_f32, |most, x| most.max(x.abs())));
        let (q_most, k_most, v_most) = (most(&q_placed), most(&k_placed), most(&v));
        let relative = (head_dim + n_rows + 16) as f64 * U;
        self.check(&case, &q_tested, &q_placed, |_| 2.0 * relative * q_most)?;

        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape =
            AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap: None, window: None };
        let spans = [AttentionSpan { first_row: 0, n_rows, first_position: 0, pages: &pages }];
        let mut out = self.output(&case, n_rows * n_heads * head_dim)?;
        self.backend.attention(&q_tested, &pool, 1, shape, &spans, &mut out);
        let expected = defined(n_rows * n_heads * head_dim, |r, out| {
            r.attention(&q_placed, &expected_pool, 1, shape, &spans, out);
        });
        let moved =
            f64::from(scale) * head_dim as f64 * (4.0 * relative + 8.0 * U) * q_most * k_most;
        let bound = moved.exp_m1() * 2.0 * v_most + (head_dim + n_rows) as f64 * U * v_most;
        self.check(&format!("{case} attended"), &out, &expected, |_| bound)
    }

    /// Queries, keys and values in one operation and one after the other; what the last row sees of both.
    fn norm_placed(
        &mut self,
        dtype: DType,
        n_rows: usize,
        kv: KvDtype,
        style: RopeStyle,
    ) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("norm_place {dtype} T={n_rows} {kv:?} {style:?}");
        let placed = Placed::new(self, case, dtype, (n_rows, kv, style))?;
        let (expected_queries, expected) = placed.run(self, false)?;
        let (queries, attended) = placed.run(self, true)?;
        for (what, found, expected, part) in
            [("queries", queries, expected_queries, 1e-5), ("attended", attended, expected, 4e-3)]
        {
            let mut values = vec![0.0; n_rows * PLACED_HEADS.0 * PLACED_HEADS.2];
            self.backend.read(&expected, &mut values);
            let most = f64::from(values.iter().fold(0.0_f32, |most, x| most.max(x.abs())));
            self.check(&format!("{} {what}", placed.case), &found, &values, |_| part * most)?;
        }
        Ok(())
    }
}

/// H, K, D, and columns, of [`Placed`].
const PLACED_HEADS: (usize, usize, usize) = (4, 2, 16);
const PLACED_COLUMNS: usize = 256;

/// Rows on their way through a norm and three products into a pool.
struct Placed<B: Backend> {
    case: String,
    n_rows: usize,
    kv: KvDtype,
    rope: Rope,
    weights: Vec<B::Weight>,
    biases: Vec<B::Buffer>, // of more than one row
    x: B::Buffer,
    norm: B::Buffer,
}

impl<B: Backend> Placed<B> {
    fn widths() -> [usize; 3] {
        let (n_heads, n_kv_heads, head_dim) = PLACED_HEADS;
        [n_heads, n_kv_heads, n_kv_heads].map(|heads| heads * head_dim)
    }

    fn new(
        suite: &mut Suite<'_, B>,
        case: String,
        dtype: DType,
        (n_rows, kv, style): (usize, KvDtype, RopeStyle),
    ) -> Result<Self, ConformanceError> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for rows in Self::widths() {
            weights.push(suite.pair("norm_place", dtype, rows, PLACED_COLUMNS)?.tested);
            let bias = suite.random.normals(rows, 0.0, 1.0);
            biases.push(suite.upload(&case, &bias)?);
        }
        let x = suite.random.activations(n_rows, PLACED_COLUMNS);
        let norm = suite.random.normals(PLACED_COLUMNS, 1.0, 0.3);
        let (x, norm) = (suite.upload(&case, &x)?, suite.whole(&case, &norm)?);
        let inverse_frequencies = vec![1.0, 0.3, 0.1, 0.03, 0.01];
        let rope = Rope { inverse_frequencies, style, magnitude: 1.0 };
        Ok(Self { case, n_rows, kv, rope, weights, biases, x, norm })
    }

    /// The queries, and what attention makes of them.
    fn run(
        &self,
        suite: &mut Suite<'_, B>,
        at_once: bool,
    ) -> Result<(B::Buffer, B::Buffer), ConformanceError> {
        let (case, n_rows) = (&self.case, self.n_rows);
        let (n_heads, n_kv_heads, head_dim) = PLACED_HEADS;
        let [query, kv, _] = Self::widths();
        let mut attended = suite.output(case, n_rows * query)?;
        let mut queries = suite.output(case, n_rows * query)?;
        let (mut keys, mut values) =
            (suite.output(case, n_rows * kv)?, suite.output(case, n_rows * kv)?);
        let mut work = suite.output(case, n_rows * PLACED_COLUMNS)?;
        let kv_shape = KvShape { n_layers: 2, n_kv_heads, head_dim, n_pages: 2, dtype: self.kv };
        let mut pool = accepted(case, suite.backend.kv_pool(kv_shape))?;
        let (first, pages) = (7, [PageId(1)]);
        let positions: Vec<u32> = (first..).take(n_rows).collect();
        let slots: Vec<KvSlot> =
            (0..).take(n_rows).map(|offset| KvSlot { page: pages[0], offset }).collect();

        let backend = suite.backend;
        let (kind, eps, weight) = (NormKind::Rms, 1e-5, &self.norm);
        let input = Normed { x: &self.x, n_rows, kind, weight, eps, work: &mut work };
        let [q, k, v] = &self.weights[..] else { unreachable!("three were made") };
        let biases = (n_rows > 1).then(|| [0, 1, 2].map(|i| &self.biases[i]));
        let (norms, rope) = (None, Some(&self.rope));
        if !at_once {
            let outs = [&mut queries, &mut keys, &mut values];
            backend.norm_qkv(input, [q, k, v], biases, outs);
            let (queries, keys, values) = (&mut queries, &mut keys, &mut values);
            let heads =
                HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
            backend.place_heads(heads, &positions, &mut pool, 1, &slots);
        } else {
            let (queries, keys, values) = (&mut queries, &mut keys, &mut values);
            let heads =
                HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
            let (positions, slots) = (&positions[..], &slots[..]);
            let places = Places { pool: &mut pool, layer: 1, positions, slots };
            backend.norm_place(input, [q, k, v], biases, heads, places);
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape =
            AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap: None, window: None };
        let spans = [AttentionSpan { first_row: 0, n_rows, first_position: 0, pages: &pages }];
        backend.attention(&queries, &pool, 1, shape, &spans, &mut attended);
        Ok((queries, attended))
    }
}
