//! [`Recorder`]: a backend that also sums the outer products of what its matrices multiply.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use exrail_kernels::{
    AttentionShape, AttentionSpan, Backend, Draws, GateActivation, KernelError, KvMove, KvShape,
    KvSlot, Largest, NormKind, PageId, Rope, Span, TokenId, WeightView,
};

use crate::Hessian;

/// Runs everything on `B`, and keeps a [`Hessian`] for each matrix that it was told to watch.
pub(crate) struct Recorder<B> {
    inner: B,
    watched: HashSet<String>,
    sums: Mutex<Sums>,
}

#[derive(Default)]
struct Sums {
    by_key: HashMap<String, Hessian>,
    /// The matrix under whose name the inputs of another one are summed.
    keys: HashMap<String, String>,
    rows: Vec<f32>,
}

/// A matrix and its name.
pub(crate) struct Watched<W> {
    name: String,
    columns: usize,
    inner: W,
}

impl<B: Backend> Recorder<B> {
    /// Watches the matrices called `watched`.
    pub(crate) fn new(inner: B, watched: HashSet<String>) -> Self {
        Recorder { inner, watched, sums: Mutex::default() }
    }

    /// The sum over all inputs of the matrix `name` so far; `None` when it had none.
    pub(crate) fn hessian<T>(&self, name: &str, read: impl FnOnce(&Hessian) -> T) -> Option<T> {
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.by_key.get(sums.keys.get(name)?).map(read)
    }

    /// Adds `x` `(T, columns)`, the input of all of `weights`, which have the same columns.
    fn record(&self, x: &B::Buffer, n_rows: usize, weights: &[&Watched<B::Weight>]) {
        let Some(first) = weights.iter().find(|weight| self.watched.contains(&weight.name)) else {
            return;
        };
        if n_rows == 0 {
            return;
        }
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let Sums { by_key, keys, rows } = &mut *sums;
        for weight in weights {
            keys.entry(weight.name.clone()).or_insert_with(|| first.name.clone());
        }
        rows.resize(n_rows * first.columns, 0.0);
        self.inner.read(x, rows);
        let new = || Hessian::new(first.columns);
        by_key.entry(first.name.clone()).or_insert_with(new).add(rows);
    }
}

impl<B: Backend> Backend for Recorder<B> {
    type Weight = Watched<B::Weight>;
    type Buffer = B::Buffer;
    type KvPool = B::KvPool;
    type Found = B::Found;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn weight(&self, view: &WeightView<'_>) -> Result<Self::Weight, KernelError> {
        let inner = self.inner.weight(view)?;
        Ok(Watched { name: view.name.to_owned(), columns: view.columns, inner })
    }

    fn weight_shape(&self, weight: &Self::Weight) -> (usize, usize) {
        self.inner.weight_shape(&weight.inner)
    }

    fn buffer(&self, len: usize) -> Result<Self::Buffer, KernelError> {
        self.inner.buffer(len)
    }

    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) {
        self.inner.write(buffer, values);
    }

    fn read(&self, buffer: &Self::Buffer, values: &mut [f32]) {
        self.inner.read(buffer, values);
    }

    fn kv_pool(&self, shape: KvShape) -> Result<Self::KvPool, KernelError> {
        self.inner.kv_pool(shape)
    }

    fn kv_copy_page(&self, pool: &mut Self::KvPool, from: PageId, to: PageId) {
        self.inner.kv_copy_page(pool, from, to);
    }

    fn kv_move(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        moves: &[KvMove],
        rope: Option<&Rope>,
    ) {
        self.inner.kv_move(pool, layer, moves, rope);
    }

    fn kv_page_bytes(&self, pool: &Self::KvPool) -> usize {
        self.inner.kv_page_bytes(pool)
    }

    fn kv_read_page(&self, pool: &Self::KvPool, page: PageId, bytes: &mut [u8]) {
        self.inner.kv_read_page(pool, page, bytes);
    }

    fn kv_write_page(&self, pool: &mut Self::KvPool, page: PageId, bytes: &[u8]) {
        self.inner.kv_write_page(pool, page, bytes);
    }

    fn embed(&self, table: &Self::Weight, ids: &[TokenId], scale: f32, out: &mut Self::Buffer) {
        self.inner.embed(&table.inner, ids, scale, out);
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
        self.inner.norm(kind, x, n_rows, weight, eps, out);
    }

    fn norm_in_place(
        &self,
        kind: NormKind,
        x: &mut Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
    ) {
        self.inner.norm_in_place(kind, x, n_rows, weight, eps);
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
        self.inner.norm_add(kind, x, n_rows, weight, eps, y);
    }

    fn layer_norm(
        &self,
        x: &mut Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        bias: &Self::Buffer,
        eps: f32,
    ) {
        self.inner.layer_norm(x, n_rows, weight, bias, eps);
    }

    fn linear(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
    ) {
        self.record(x, n_rows, &[weight]);
        self.inner.linear(x, n_rows, &weight.inner, bias, out);
    }

    fn largest(&self, x: &Self::Buffer, n_rows: usize, width: usize, limit: usize) -> Self::Found {
        self.inner.largest(x, n_rows, width, limit)
    }

    fn draw(&self, x: &mut Self::Buffer, width: usize, draws: Draws<'_>) -> Self::Found {
        self.inner.draw(x, width, draws)
    }

    fn found(&self, found: &Self::Found) -> Vec<Largest> {
        self.inner.found(found)
    }

    fn linear_qkv(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weights: [&Self::Weight; 3],
        biases: Option<[&Self::Buffer; 3]>,
        outs: [&mut Self::Buffer; 3],
    ) {
        self.record(x, n_rows, &weights);
        self.inner.linear_qkv(x, n_rows, weights.map(|weight| &weight.inner), biases, outs);
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
        self.record(x, n_rows, &[weight]);
        self.inner.linear_add(x, n_rows, &weight.inner, bias, scale, y);
    }

    fn linear_add_rows(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: &[u32],
        scales: &[f32],
        y: &mut Self::Buffer,
    ) {
        self.record(x, rows.len(), &[weight]);
        self.inner.linear_add_rows(x, &weight.inner, rows, scales, y);
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
        self.record(x, n_rows, &[gate, up]);
        self.inner.linear_gate(x, n_rows, &gate.inner, &up.inner, activation, out);
    }

    fn linear_gelu(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: &Self::Buffer,
        out: &mut Self::Buffer,
    ) {
        self.record(x, n_rows, &[weight]);
        self.inner.linear_gelu(x, n_rows, &weight.inner, bias, out);
    }

    fn rope(
        &self,
        x: &mut Self::Buffer,
        n_heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) {
        self.inner.rope(x, n_heads, head_dim, positions, rope);
    }

    fn kv_write(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        slots: &[KvSlot],
    ) {
        self.inner.kv_write(pool, layer, k, v, slots);
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
        self.inner.attention(q, pool, layer, shape, spans, out);
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
        self.inner.attention_full(q, k, v, shape, spans, out);
    }

    fn gather_rows(&self, x: &Self::Buffer, width: usize, rows: &[u32], out: &mut Self::Buffer) {
        self.inner.gather_rows(x, width, rows, out);
    }

    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) {
        self.inner.add(x, y, len);
    }

    fn scale_and_cap(&self, x: &mut Self::Buffer, len: usize, scale: f32, soft_cap: Option<f32>) {
        self.inner.scale_and_cap(x, len, scale, soft_cap);
    }

    fn mean_rows(&self, x: &Self::Buffer, width: usize, spans: &[Span], out: &mut Self::Buffer) {
        self.inner.mean_rows(x, width, spans, out);
    }
}
