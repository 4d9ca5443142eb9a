//! The definition of every operation: plain scalar Rust, one loop nest an operation, no blocking,
//! no threads. Slow on purpose; it serves tests and nothing else.
//!
//! Values are f32 in memory. Sums (dot products, means, variances, softmax) run in f64 and are
//! rounded to f32 once, so the reference's own error is half an ulp of the result and the bounds
//! of [`crate::conformance`] belong to the backend under test alone. Angles, exponentials, erf
//! and tanh are taken in f64 as well.

mod activation;
mod attention;
mod kv;
mod linear;
mod norm;
mod rope;
mod rows;

use exrail_tensor::{DType, dequantize};

pub use kv::ReferenceKvPool;

use crate::{
    AttentionShape, AttentionSpan, Backend, Draws, GateActivation, KernelError, KvMove, KvShape,
    KvSlot, Largest, NormKind, PageId, Rope, Span, TokenId, WeightView,
};

/// The scalar backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

/// A matrix, dequantised.
#[derive(Clone, Debug)]
pub struct ReferenceWeight {
    rows: usize,
    columns: usize,
    dtype: DType,
    values: Vec<f32>, // (rows, columns)
}

impl ReferenceWeight {
    /// The format that the matrix was stored in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dequantised values, `(rows, columns)`.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

impl Backend for Reference {
    type Weight = ReferenceWeight;
    type Buffer = Vec<f32>;
    type KvPool = ReferenceKvPool;
    type Found = Vec<Largest>;

    fn name(&self) -> String {
        "scalar reference, f32 activations, f64 sums".to_owned()
    }

    fn weight(&self, view: &WeightView<'_>) -> Result<Self::Weight, KernelError> {
        view.row_bytes()?;
        let mut values = vec![0.0; view.rows * view.columns];
        dequantize(view.dtype, view.bytes, &mut values)
            .expect("row_bytes checked that the bytes are whole blocks of this many values");
        Ok(ReferenceWeight { rows: view.rows, columns: view.columns, dtype: view.dtype, values })
    }

    fn weight_shape(&self, weight: &Self::Weight) -> (usize, usize) {
        (weight.rows, weight.columns)
    }

    fn buffer(&self, len: usize) -> Result<Self::Buffer, KernelError> {
        zeroed(len, "activations")
    }

    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) {
        buffer[..values.len()].copy_from_slice(values);
    }

    fn read(&self, buffer: &Self::Buffer, values: &mut [f32]) {
        values.copy_from_slice(&buffer[..values.len()]);
    }

    fn kv_pool(&self, shape: KvShape) -> Result<Self::KvPool, KernelError> {
        ReferenceKvPool::new(shape)
    }

    fn kv_copy_page(&self, pool: &mut Self::KvPool, from: PageId, to: PageId) {
        pool.copy_page(from, to);
    }

    fn kv_move(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        moves: &[KvMove],
        rope: Option<&Rope>,
    ) {
        pool.move_slots(layer, moves, rope);
    }

    fn kv_page_bytes(&self, pool: &Self::KvPool) -> usize {
        pool.page_bytes()
    }

    fn kv_read_page(&self, pool: &Self::KvPool, page: PageId, bytes: &mut [u8]) {
        pool.read_page(page, bytes);
    }

    fn kv_write_page(&self, pool: &mut Self::KvPool, page: PageId, bytes: &[u8]) {
        pool.write_page(page, bytes);
    }

    fn embed(&self, table: &Self::Weight, ids: &[TokenId], scale: f32, out: &mut Self::Buffer) {
        rows::embed(table, ids, scale, out);
    }

    fn norm(
        &self,
        kind: NormKind,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    ) {
        norm::norm(kind, x, n_rows, weight, eps, out);
    }

    fn norm_in_place(
        &self,
        kind: NormKind,
        x: &mut Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
    ) {
        norm::norm_in_place(kind, x, n_rows, weight, eps);
    }

    fn norm_add(
        &self,
        kind: NormKind,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
        y: &mut Self::Buffer,
    ) {
        norm::norm_add(kind, x, n_rows, weight, eps, y);
    }

    fn layer_norm(
        &self,
        x: &mut Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        bias: &Self::Buffer,
        eps: f32,
    ) {
        norm::layer_norm(x, n_rows, weight, bias, eps);
    }

    fn linear(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
    ) {
        linear::linear(x, n_rows, weight, bias, out);
    }

    fn largest(&self, x: &Vec<f32>, n_rows: usize, width: usize, limit: usize) -> Vec<Largest> {
        Largest::of_rows(&x[..n_rows * width], width, limit)
    }

    fn draw(&self, x: &mut Vec<f32>, width: usize, draws: Draws<'_>) -> Vec<Largest> {
        draws.of_rows(&x[..draws.rows.len() * width], width)
    }

    fn found(&self, found: &Vec<Largest>) -> Vec<Largest> {
        found.clone()
    }

    fn linear_qkv(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weights: [&Self::Weight; 3],
        biases: Option<[&Self::Buffer; 3]>,
        outs: [&mut Self::Buffer; 3],
    ) {
        for (i, out) in outs.into_iter().enumerate() {
            linear::linear(x, n_rows, weights[i], biases.map(|biases| biases[i]), out);
        }
    }

    fn linear_add(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        scale: f32,
        y: &mut Self::Buffer,
    ) {
        linear::linear_add(x, n_rows, weight, bias, scale, y);
    }

    fn linear_add_rows(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: &[u32],
        scales: &[f32],
        y: &mut Self::Buffer,
    ) {
        linear::linear_add_rows(x, weight, rows, scales, y);
    }

    fn linear_gate(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        gate: &Self::Weight,
        up: &Self::Weight,
        activation: GateActivation,
        out: &mut Self::Buffer,
    ) {
        linear::linear_gate(x, n_rows, gate, up, activation, out);
    }

    fn linear_gelu(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: &Self::Buffer,
        out: &mut Self::Buffer,
    ) {
        linear::linear_gelu(x, n_rows, weight, bias, out);
    }

    fn rope(
        &self,
        x: &mut Self::Buffer,
        n_heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) {
        rope::rope(x, n_heads, head_dim, positions, rope);
    }

    fn kv_write(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        slots: &[KvSlot],
    ) {
        pool.write(layer, k, v, slots);
    }

    fn attention(
        &self,
        q: &Self::Buffer,
        pool: &Self::KvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut Self::Buffer,
    ) {
        attention::attention(q, (pool, layer), shape, spans, out);
    }

    fn attention_full(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: AttentionShape,
        spans: &[Span],
        out: &mut Self::Buffer,
    ) {
        attention::attention_full(q, (k, v), shape, spans, out);
    }

    fn gather_rows(&self, x: &Self::Buffer, width: usize, rows: &[u32], out: &mut Self::Buffer) {
        rows::gather_rows(x, width, rows, out);
    }

    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) {
        rows::add(x, y, len);
    }

    fn scale_and_cap(&self, x: &mut Self::Buffer, len: usize, scale: f32, soft_cap: Option<f32>) {
        rows::scale_and_cap(x, len, scale, soft_cap);
    }

    fn mean_rows(&self, x: &Self::Buffer, width: usize, spans: &[Span], out: &mut Self::Buffer) {
        rows::mean_rows(x, width, spans, out);
    }
}

/// A zeroed vector, or the error that a machine without the memory gets instead of an abort.
fn zeroed(len: usize, what: &str) -> Result<Vec<f32>, KernelError> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| KernelError::OutOfMemory {
        what: what.to_owned(),
        wanted_bytes: len.saturating_mul(4),
        device: "scalar reference".to_owned(),
    })?;
    values.resize(len, 0.0);
    Ok(values)
}
