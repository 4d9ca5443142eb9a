//! [`CudaBackend`]: the operations of [`Backend`] on a GPU.

use std::sync::Arc;

use exrail_kernels::{
    Activation, AttentionShape, AttentionSpan, Backend, GateActivation, KernelError, KvShape,
    KvSlot, Largest, NormKind, PageId, Rope, Span, TokenId, WeightView,
};

use crate::linear::{Epilogue, Input};
use crate::memory::bytes_of;
use crate::rows::{self, Into, Norm};
use crate::stream::Stream;
use crate::{CudaBuffer, CudaError, CudaKvPool, CudaWeight, DeviceFacts, attention};

/// How to open a [`CudaBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which card, in the driver's order.
    pub ordinal: usize,
    /// How quantised weights meet activations. F32, F16 and BF16 weights always meet f32.
    pub activation: Activation,
}

/// A GPU as a device. Clones share it; their operations run in the order of the calls.
///
/// A row's results do not depend on the other rows of its batch, and equal calls give equal bits.
///
/// # Panics
/// Operations panic when the driver reports an error: a device that failed once answers nothing any
/// more.
#[derive(Clone, Debug)]
pub struct CudaBackend {
    stream: Arc<Stream>,
    activation: Activation,
}

impl CudaBackend {
    /// Opens a card and loads the kernels.
    ///
    /// # Errors
    /// No driver, no such card, or one that the kernels do not run on.
    pub fn open(options: CudaOptions) -> Result<CudaBackend, CudaError> {
        let stream = Arc::new(Stream::open(options.ordinal)?);
        Ok(CudaBackend { stream, activation: options.activation })
    }

    /// The card.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.stream.facts
    }

    /// The same card with another treatment of activations.
    #[must_use]
    pub fn with_activation(&self, activation: Activation) -> CudaBackend {
        CudaBackend { stream: Arc::clone(&self.stream), activation }
    }

    /// CUDA graphs that were ever made: one for each list of launches that came a second time. It does
    /// not grow in steps of shapes that ran before.
    #[must_use]
    pub fn n_graphs(&self) -> u64 {
        self.stream.n_graphs()
    }

    /// The device's queue.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    fn input<'a>(&'a self, x: &CudaBuffer, n_rows: usize, weights: &[&CudaWeight]) -> Input<'a> {
        Input::new(&self.stream, self.activation, x, n_rows, weights)
    }
}

impl Backend for CudaBackend {
    type Weight = CudaWeight;
    type Buffer = CudaBuffer;
    type KvPool = CudaKvPool;

    fn name(&self) -> String {
        let activation = match self.activation {
            Activation::F32 => "f32",
            Activation::Int8 => "int8",
        };
        format!("{}, {activation} activations", self.stream.device())
    }

    fn weight(&self, view: &WeightView<'_>) -> Result<CudaWeight, KernelError> {
        CudaWeight::new(&self.stream, view)
    }

    fn weight_shape(&self, weight: &CudaWeight) -> (usize, usize) {
        (weight.rows, weight.columns)
    }

    fn buffer(&self, len: usize) -> Result<CudaBuffer, KernelError> {
        CudaBuffer::new(&self.stream, len)
    }

    fn write(&self, buffer: &mut CudaBuffer, values: &[f32]) {
        buffer.write(values);
    }

    fn read(&self, buffer: &CudaBuffer, values: &mut [f32]) {
        buffer.read(values);
    }

    fn kv_pool(&self, shape: KvShape) -> Result<CudaKvPool, KernelError> {
        CudaKvPool::new(&self.stream, shape)
    }

    fn kv_copy_page(&self, pool: &mut CudaKvPool, from: PageId, to: PageId) {
        pool.copy_page(&self.stream, from, to);
    }

    fn embed(&self, table: &CudaWeight, ids: &[TokenId], scale: f32, out: &mut CudaBuffer) {
        rows::embed(&self.stream, table, ids, scale, out);
    }

    fn norm(
        &self,
        kind: NormKind,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaBuffer,
        eps: f32,
        out: &mut CudaBuffer,
    ) {
        let (norm, len) = norm_of(kind, weight, None, eps, n_rows);
        let (x, out) = (x.at(len), out.at(len));
        norm.run(&self.stream, x, n_rows, out, Into::Replace);
    }

    fn norm_in_place(
        &self,
        kind: NormKind,
        x: &mut CudaBuffer,
        n_rows: usize,
        weight: &CudaBuffer,
        eps: f32,
    ) {
        let (norm, len) = norm_of(kind, weight, None, eps, n_rows);
        let x = x.at(len);
        norm.run(&self.stream, x, n_rows, x, Into::Replace);
    }

    fn norm_add(
        &self,
        kind: NormKind,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaBuffer,
        eps: f32,
        y: &mut CudaBuffer,
    ) {
        let (norm, len) = norm_of(kind, weight, None, eps, n_rows);
        let (x, y) = (x.at(len), y.at(len));
        norm.run(&self.stream, x, n_rows, y, Into::AddTo);
    }

    fn layer_norm(
        &self,
        x: &mut CudaBuffer,
        n_rows: usize,
        weight: &CudaBuffer,
        bias: &CudaBuffer,
        eps: f32,
    ) {
        let (norm, len) = norm_of(NormKind::Layer, weight, Some(bias), eps, n_rows);
        let x = x.at(len);
        norm.run(&self.stream, x, n_rows, x, Into::Replace);
    }

    fn linear(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaWeight,
        bias: Option<&CudaBuffer>,
        out: &mut CudaBuffer,
    ) {
        let out = out.at(n_rows * weight.rows);
        let bias = bias.map(|bias| bias.at(weight.rows));
        self.input(x, n_rows, &[weight]).times(weight, Epilogue::store(out, bias));
    }

    fn linear_largest(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaWeight,
        limit: usize,
        work: &mut CudaBuffer,
    ) -> Vec<Largest> {
        self.linear(x, n_rows, weight, None, work);
        rows::largest(&self.stream, work, n_rows, weight.rows, limit)
    }

    fn linear_qkv(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weights: [&CudaWeight; 3],
        biases: Option<[&CudaBuffer; 3]>,
        outs: [&mut CudaBuffer; 3],
    ) {
        let input = self.input(x, n_rows, &weights);
        for (i, out) in outs.into_iter().enumerate() {
            let out = out.at(n_rows * weights[i].rows);
            let bias = biases.map(|biases| biases[i].at(weights[i].rows));
            input.times(weights[i], Epilogue::store(out, bias));
        }
    }

    fn linear_add(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaWeight,
        bias: Option<&CudaBuffer>,
        scale: f32,
        y: &mut CudaBuffer,
    ) {
        let y = y.at(n_rows * weight.rows);
        let bias = bias.map(|bias| bias.at(weight.rows));
        self.input(x, n_rows, &[weight]).times(weight, Epilogue::add(y, bias, scale));
    }

    fn linear_add_rows(
        &self,
        x: &CudaBuffer,
        weight: &CudaWeight,
        rows: &[u32],
        scales: &[f32],
        y: &mut CudaBuffer,
    ) {
        assert_eq!(rows.len(), scales.len(), "one scale a row");
        let n_needed = rows.iter().max().map_or(0, |&row| row as usize + 1);
        let y = y.at(n_needed * weight.rows);
        let input = self.input(x, rows.len(), &[weight]);
        let rows = self.stream.upload(&bytes_of(rows, u32::to_le_bytes));
        let scales = self.stream.upload(&bytes_of(scales, f32::to_le_bytes));
        input.times(weight, Epilogue::add_rows(y, rows, scales));
    }

    fn linear_gate(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        gate: &CudaWeight,
        up: &CudaWeight,
        activation: GateActivation,
        out: &mut CudaBuffer,
    ) {
        assert_eq!((gate.rows, gate.columns), (up.rows, up.columns), "gate and up have one shape");
        let out = out.at(n_rows * gate.rows);
        let input = self.input(x, n_rows, &[gate, up]);
        input.times(gate, Epilogue::activated(out, activation));
        input.times(up, Epilogue::times(out));
    }

    fn linear_gelu(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaWeight,
        bias: &CudaBuffer,
        out: &mut CudaBuffer,
    ) {
        let out = out.at(n_rows * weight.rows);
        let bias = bias.at(weight.rows);
        self.input(x, n_rows, &[weight]).times(weight, Epilogue::gelu(out, bias));
    }

    fn rope(
        &self,
        x: &mut CudaBuffer,
        n_heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) {
        rows::rope(&self.stream, x, n_heads, head_dim, positions, rope);
    }

    fn kv_write(
        &self,
        pool: &mut CudaKvPool,
        layer: usize,
        k: &CudaBuffer,
        v: &CudaBuffer,
        slots: &[KvSlot],
    ) {
        pool.write(&self.stream, layer, k, v, slots);
    }

    fn attention(
        &self,
        q: &CudaBuffer,
        pool: &CudaKvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut CudaBuffer,
    ) {
        attention::attention(&self.stream, q, (pool, layer), shape, spans, out);
    }

    fn attention_full(
        &self,
        q: &CudaBuffer,
        k: &CudaBuffer,
        v: &CudaBuffer,
        shape: AttentionShape,
        spans: &[Span],
        out: &mut CudaBuffer,
    ) {
        attention::attention_full(&self.stream, q, (k, v), shape, spans, out);
    }

    fn gather_rows(&self, x: &CudaBuffer, width: usize, rows: &[u32], out: &mut CudaBuffer) {
        rows::gather_rows(&self.stream, x, width, rows, out);
    }

    fn add(&self, x: &mut CudaBuffer, y: &CudaBuffer, len: usize) {
        rows::add(&self.stream, x, y, len);
    }

    fn scale_and_cap(&self, x: &mut CudaBuffer, len: usize, scale: f32, soft_cap: Option<f32>) {
        rows::scale_and_cap(&self.stream, x, len, scale, soft_cap);
    }

    fn mean_rows(&self, x: &CudaBuffer, width: usize, spans: &[Span], out: &mut CudaBuffer) {
        rows::mean_rows(&self.stream, x, width, spans, out);
    }
}

/// A norm of rows as wide as its weight, and how many values it reads.
fn norm_of<'a>(
    kind: NormKind,
    weight: &'a CudaBuffer,
    bias: Option<&'a CudaBuffer>,
    eps: f32,
    n_rows: usize,
) -> (Norm<'a>, usize) {
    let width = weight.len();
    (Norm { kind, weight, bias, width, eps }, n_rows * width)
}
