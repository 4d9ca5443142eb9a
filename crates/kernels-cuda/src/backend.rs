//! [`CudaBackend`]: the operations of [`Backend`] on a GPU.

use std::sync::Arc;

use exrail_kernels::{
    Activation, AttentionShape, AttentionSpan, Backend, DeviceCounters, Draws, GateActivation,
    HeadRows, KernelError, KvMove, KvShape, KvSlot, Largest, NormKind, Normed, PageId, Places,
    Rope, Span, TokenId, WeightView,
};

use crate::found::{CudaFound, Slots};
use crate::linear::{Epilogue, Input, OfHeads, Output};
use crate::memory::bytes_of;
use crate::rows::{self, Into, Norm};
use crate::stream::Stream;
use crate::{CudaBuffer, CudaError, CudaKvPool, CudaWeight, DeviceFacts, attention, draw};

/// How to open a [`CudaBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which card, in the driver's order.
    pub ordinal: usize,
    /// How quantised weights meet activations. F32, F16 and BF16 weights always meet f32.
    pub activation: Activation,
    /// Whether a row's results may not depend on the other rows of its batch, in the last bit. Products
    /// of several rows then do without tensor cores; `docs/cuda.md` says what that costs.
    pub batch_invariant: bool,
}

impl CudaOptions {
    /// The card of this number, with int8 activations.
    #[must_use]
    pub fn new(ordinal: usize) -> CudaOptions {
        CudaOptions { ordinal, activation: Activation::Int8, batch_invariant: false }
    }
}

/// A GPU as a device. Clones share it; their operations run in the order of the calls.
///
/// Equal calls give equal bits.
///
/// # Panics
/// Operations panic when the driver reports an error: a device that failed once answers nothing any
/// more.
#[derive(Clone, Debug)]
pub struct CudaBackend {
    stream: Arc<Stream>,
    slots: Arc<Slots>,
    options: CudaOptions,
}

impl CudaBackend {
    /// Opens a card and loads the kernels.
    ///
    /// # Errors
    /// No driver, no such card, or one that the kernels do not run on.
    pub fn open(options: CudaOptions) -> Result<CudaBackend, CudaError> {
        let stream = Arc::new(Stream::open(options.ordinal)?);
        Ok(CudaBackend { stream, slots: Arc::default(), options })
    }

    /// The card.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.stream.facts
    }

    /// What it was opened with.
    #[must_use]
    pub fn options(&self) -> CudaOptions {
        self.options
    }

    /// The same card with another treatment of activations.
    #[must_use]
    pub fn with_activation(&self, activation: Activation) -> CudaBackend {
        let options = CudaOptions { activation, ..self.options };
        CudaBackend { options, ..self.clone() }
    }

    /// The same card in another mode, see [`CudaOptions::batch_invariant`]. Weights, pools and buffers of the
    /// one are those of the other.
    #[must_use]
    pub fn with_batch_invariant(&self, batch_invariant: bool) -> CudaBackend {
        let options = CudaOptions { batch_invariant, ..self.options };
        CudaBackend { options, ..self.clone() }
    }

    /// CUDA graphs that were ever made: one for each list of launches that came a second time. It does
    /// not grow in steps of shapes that ran before.
    #[must_use]
    pub fn n_graphs(&self) -> u64 {
        self.stream.built().graph_captures
    }

    /// The device's queue.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    fn input<'a>(&'a self, x: &CudaBuffer, n_rows: usize, weights: &[&CudaWeight]) -> Input<'a> {
        Input::new(&self.stream, self.options, x, n_rows, weights)
    }

    fn normed<'a>(&'a self, mut x: Normed<'_, CudaBuffer>, weights: &[&CudaWeight]) -> Input<'a> {
        Input::normed(&self.stream, self.options, &mut x, weights)
    }
}

/// The three products of attention's input.
fn qkv<'a>(
    n_rows: usize,
    weights: [&'a CudaWeight; 3],
    biases: Option<[&CudaBuffer; 3]>,
    outs: [&mut CudaBuffer; 3],
) -> [Output<'a>; 3] {
    let [q, k, v] = outs;
    let output = |i: usize, out: &CudaBuffer| {
        Output::new(weights[i], out, n_rows, biases.map(|biases| biases[i]))
    };
    [output(0, q), output(1, k).of(OfHeads::Keys), output(2, v).of(OfHeads::Values)]
}

fn check_gate(gate: &CudaWeight, up: &CudaWeight) {
    assert_eq!((gate.rows, gate.columns), (up.rows, up.columns), "gate and up have one shape");
}

impl Backend for CudaBackend {
    type Weight = CudaWeight;
    type Buffer = CudaBuffer;
    type KvPool = CudaKvPool;
    type Found = CudaFound;

    fn name(&self) -> String {
        let activation = match self.options.activation {
            Activation::F32 => "f32",
            Activation::Int8 => "int8",
        };
        let mode = if self.options.batch_invariant { ", batch-invariant" } else { "" };
        format!("{}, {activation} activations{mode}", self.stream.device())
    }

    fn release_unused(&self) {
        self.stream.end_of_loading();
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn built(&self) -> DeviceCounters {
        self.stream.built()
    }

    fn close_fence(&self, closed: bool) {
        self.stream.close_fence(closed);
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

    fn kv_move(&self, pool: &mut CudaKvPool, layer: usize, moves: &[KvMove], rope: Option<&Rope>) {
        pool.move_slots(&self.stream, layer, moves, rope);
    }

    fn kv_page_bytes(&self, pool: &CudaKvPool) -> usize {
        pool.page_bytes()
    }

    fn kv_read_page(&self, pool: &CudaKvPool, page: PageId, bytes: &mut [u8]) {
        pool.read_page(page, bytes);
    }

    fn kv_write_page(&self, pool: &mut CudaKvPool, page: PageId, bytes: &[u8]) {
        pool.write_page(page, bytes);
    }

    fn embed(&self, table: &CudaWeight, ids: &[TokenId], scale: f32, out: &mut CudaBuffer) {
        rows::embed(&self.stream, table, ids, scale, out);
    }

    fn embed_found(&self, table: &CudaWeight, found: &CudaFound, scale: f32, out: &mut CudaBuffer) {
        rows::embed_found(&self.stream, table, found, scale, out);
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
        let output = Output::new(weight, out, n_rows, bias);
        self.input(x, n_rows, &[weight]).times(&[output], Epilogue::store());
    }

    fn norm_linear(&self, x: Normed<'_, CudaBuffer>, weight: &CudaWeight, out: &mut CudaBuffer) {
        let output = Output::new(weight, out, x.n_rows, None);
        self.normed(x, &[weight]).times(&[output], Epilogue::store());
    }

    fn largest(&self, x: &CudaBuffer, n_rows: usize, width: usize, limit: usize) -> CudaFound {
        rows::largest(&self.stream, &self.slots, x, n_rows, width, limit)
    }

    fn draw(&self, x: &mut CudaBuffer, width: usize, draws: Draws<'_>) -> CudaFound {
        draw::draw(&self.stream, &self.slots, x, width, draws)
    }

    fn found(&self, found: &CudaFound) -> Vec<Largest> {
        found.read()
    }

    fn norm_largest(
        &self,
        x: Normed<'_, CudaBuffer>,
        weight: &CudaWeight,
        limit: usize,
        work: &mut CudaBuffer,
    ) -> CudaFound {
        let n_rows = x.n_rows;
        self.norm_linear(x, weight, work);
        self.largest(work, n_rows, weight.rows, limit)
    }

    fn linear_qkv(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weights: [&CudaWeight; 3],
        biases: Option<[&CudaBuffer; 3]>,
        outs: [&mut CudaBuffer; 3],
    ) {
        let outputs = qkv(n_rows, weights, biases, outs);
        self.input(x, n_rows, &weights).times(&outputs, Epilogue::store());
    }

    fn norm_qkv(
        &self,
        x: Normed<'_, CudaBuffer>,
        weights: [&CudaWeight; 3],
        biases: Option<[&CudaBuffer; 3]>,
        outs: [&mut CudaBuffer; 3],
    ) {
        let outputs = qkv(x.n_rows, weights, biases, outs);
        self.normed(x, &weights).times(&outputs, Epilogue::store());
    }

    fn norm_place(
        &self,
        x: Normed<'_, CudaBuffer>,
        weights: [&CudaWeight; 3],
        biases: Option<[&CudaBuffer; 3]>,
        heads: HeadRows<'_, CudaBuffer>,
        places: Places<'_, CudaKvPool>,
    ) {
        let Places { pool, layer, positions, slots } = places;
        assert_eq!([positions.len(), slots.len()], [x.n_rows; 2], "one place a row");
        let outs = [&mut *heads.queries, &mut *heads.keys, &mut *heads.values];
        let outputs = qkv(x.n_rows, weights, biases, outs);
        let input = self.normed(x, &weights);
        let placement = input.places_heads(&weights);
        let placement =
            placement.then(|| pool.placement(&self.stream, &heads, positions, layer, slots));
        match placement.flatten() {
            Some(placement) => input.times(&outputs, Epilogue::place(placement)),
            None => {
                input.times(&outputs, Epilogue::store());
                pool.place_heads(&self.stream, heads, positions, layer, slots);
            }
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
        let output = Output::new(weight, y, n_rows, bias);
        self.input(x, n_rows, &[weight]).times(&[output], Epilogue::add(scale));
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
        let output = Output::new(weight, y, n_needed, None);
        let input = self.input(x, rows.len(), &[weight]);
        let rows = self.stream.upload(&bytes_of(rows, u32::to_le_bytes));
        let scales = self.stream.upload(&bytes_of(scales, f32::to_le_bytes));
        input.times(&[output], Epilogue::add_rows(rows, scales));
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
        check_gate(gate, up);
        let output = Output::new(gate, out, n_rows, None);
        self.input(x, n_rows, &[gate, up]).gate(output, up, activation);
    }

    fn norm_gate(
        &self,
        x: Normed<'_, CudaBuffer>,
        gate: &CudaWeight,
        up: &CudaWeight,
        activation: GateActivation,
        out: &mut CudaBuffer,
    ) {
        check_gate(gate, up);
        let output = Output::new(gate, out, x.n_rows, None);
        self.normed(x, &[gate, up]).gate(output, up, activation);
    }

    fn linear_gelu(
        &self,
        x: &CudaBuffer,
        n_rows: usize,
        weight: &CudaWeight,
        bias: &CudaBuffer,
        out: &mut CudaBuffer,
    ) {
        let output = Output::new(weight, out, n_rows, Some(bias));
        self.input(x, n_rows, &[weight]).times(&[output], Epilogue::gelu());
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

    fn place_heads(
        &self,
        heads: HeadRows<'_, CudaBuffer>,
        positions: &[u32],
        pool: &mut CudaKvPool,
        layer: usize,
        slots: &[KvSlot],
    ) {
        assert_eq!(positions.len(), slots.len(), "one place a row");
        pool.place_heads(&self.stream, heads, positions, layer, slots);
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
        attention::attention(&self.stream, self.options, q, (pool, layer), shape, spans, out);
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
