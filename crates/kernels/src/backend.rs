//! Trait [`Backend`] and the plain types its operations speak.
//!
//! Letters: T rows (tokens) in the batch, C model width, H query heads, K key/value heads, D head
//! width, F FFN width, V vocabulary. Matrices are `(rows, columns)`, outermost first, contiguous.

use exrail_tensor::DType;
use thiserror::Error;

use crate::Draws;

/// Tokens in one KV page.
pub const PAGE_TOKENS: usize = 256;

/// An index into the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

/// An index into the page pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

/// Why an operation or an upload was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The bytes do not hold a matrix of that shape.
    #[error(
        "weight `{name}`: expected {expected} bytes for {rows}x{columns} {dtype}, found {found}"
    )]
    WeightBytes {
        /// Tensor name.
        name: String,
        /// Rows expected.
        rows: usize,
        /// Columns expected.
        columns: usize,
        /// Block format.
        dtype: DType,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A row is not a whole number of blocks.
    #[error(
        "weight `{name}`: expected columns in multiples of {block_len} for {dtype}, found {columns}"
    )]
    WeightColumns {
        /// Tensor name.
        name: String,
        /// Columns given.
        columns: usize,
        /// Block format.
        dtype: DType,
        /// Values in one block.
        block_len: usize,
    },
    /// The device has no kernel for this format.
    #[error("weight `{name}`: {device} has no kernel for {dtype}")]
    UnsupportedDtype {
        /// Tensor name.
        name: String,
        /// Block format.
        dtype: DType,
        /// Device name.
        device: String,
    },
    /// This machine does not run the instruction set that was asked for.
    #[error("instruction set {isa}: this machine does not have it")]
    UnsupportedIsa {
        /// Name of the instruction set.
        isa: String,
    },
    /// The device could not provide the memory.
    #[error("{device}: expected {wanted_bytes} bytes for {what}, the allocation failed")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        wanted_bytes: usize,
        /// Device name.
        device: String,
    },
}

/// How coarsely the activations that meet a matrix may be rounded in [`Activation::Int8`]; a device
/// may round more finely, and the exact mode does not ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InputRounding {
    /// To one int8 a value: half the work, where the model tolerates it.
    Once,
    /// Ten times as exactly at least: to a half, or to an int8 and another for the remainder.
    Twice,
}

/// One matrix as the checkpoint stores it: `rows` output features, each a run of `columns` weights.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    /// Tensor name, for errors.
    pub name: &'a str,
    /// Block format of `bytes`.
    pub dtype: DType,
    /// Output features N.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Row-major blocks.
    pub bytes: &'a [u8],
    /// What its activations tolerate. Matrices of one product are rounded as the one that tolerates
    /// least.
    pub rounding: InputRounding,
    /// Whether [`Backend::linear_largest`] may be asked of it: the head of a decoder. The device may
    /// store it so that most rows are told apart by a part of their bits.
    pub head: bool,
}

impl WeightView<'_> {
    /// Bytes of one row, after checking that `bytes` holds exactly `rows` of them.
    ///
    /// # Errors
    /// Columns that are not whole blocks, or a wrong byte count.
    pub fn row_bytes(&self) -> Result<usize, KernelError> {
        let Some(row_bytes) = self.dtype.row_bytes(self.columns) else {
            return Err(KernelError::WeightColumns {
                name: self.name.to_owned(),
                columns: self.columns,
                dtype: self.dtype,
                block_len: self.dtype.block_len(),
            });
        };
        // Saturation cannot pass the comparison: no slice holds `usize::MAX` bytes.
        let expected = row_bytes.saturating_mul(self.rows);
        if expected != self.bytes.len() {
            return Err(KernelError::WeightBytes {
                name: self.name.to_owned(),
                rows: self.rows,
                columns: self.columns,
                dtype: self.dtype,
                expected,
                found: self.bytes.len(),
            });
        }
        Ok(row_bytes)
    }
}

/// How matrix products treat their activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// f32 activations, f32 sums: the exact mode.
    F32,
    /// Activations rounded to int8 per 32 values, integer dot products: the fast mode.
    Int8,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit floats, for parity tests.
    F32,
    /// IEEE half precision, the default.
    F16,
    /// Eight bits, with a scale for each key and each value: those of one position and head. Moves
    /// an element by at most max|x| / 254 of its key or value; see [`int8_scale`].
    Int8,
}

/// How [`KvDtype::Int8`] rounds one key or value x `(D)`: the factor before rounding and the scale
/// behind it, in f32.
///
/// A stored element is `scale * round(factor * x)`, ties to even, with `factor = 127 / max|x|` and
/// `scale = max|x| / 127`. Below 1e-35 both are zero; with a NaN or an infinity in x both are NaN,
/// so that the fault reaches what attends to it.
#[must_use]
pub fn int8_scale(x: &[f32]) -> (f32, f32) {
    if x.iter().any(|x| !x.is_finite()) {
        return (f32::NAN, f32::NAN);
    }
    let largest = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    if largest < 1e-35 { (0.0, 0.0) } else { (127.0 / largest, largest / 127.0) }
}

/// Shape of the page pool. One page holds [`PAGE_TOKENS`] positions of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers L.
    pub n_layers: usize,
    /// Key/value heads K.
    pub n_kv_heads: usize,
    /// Head width D.
    pub head_dim: usize,
    /// Pages in the pool.
    pub n_pages: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of one page: keys and values of all layers.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        let head_bytes = match self.dtype {
            KvDtype::F32 => 4 * self.head_dim,
            KvDtype::F16 => 2 * self.head_dim,
            KvDtype::Int8 => self.head_dim + 4,
        };
        2 * self.n_layers * PAGE_TOKENS * self.n_kv_heads * head_bytes
    }
}

/// Where one token's key and value go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSlot {
    /// Page in the pool.
    pub page: PageId,
    /// Offset inside the page, below [`PAGE_TOKENS`].
    pub offset: u32,
}

/// One position of a sequence that goes to another place of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvMove {
    /// Where its key and value are.
    pub from: KvSlot,
    /// Where they go; it may be the same.
    pub to: KvSlot,
    /// Its new position less the one that its key was rotated at.
    pub distance: i32,
}

/// A run of rows of one sequence in a causal attention call.
///
/// Row `first_row + i` sits at position `first_position + i` and sees positions
/// `0..=first_position + i`, of which [`AttentionShape::window`] keeps the last; position p lives in
/// `pages[p / PAGE_TOKENS]`. Positions that no row sees are not read: they may hold anything, and so
/// may the entries of `pages` that hold only such positions.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpan<'a> {
    /// First row of the batch.
    pub first_row: usize,
    /// Number of rows.
    pub n_rows: usize,
    /// Position of the first row.
    pub first_position: usize,
    /// Page table of the sequence.
    pub pages: &'a [PageId],
}

/// A run of rows that attend to each other without a mask (one text of an encoder batch).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub first_row: usize,
    /// Number of rows.
    pub n_rows: usize,
}

/// Head layout of an attention call, and what happens to the scores before softmax:
/// `score = scale * q·k`, then with a soft cap `cap * tanh(score / cap)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads H.
    pub n_heads: usize,
    /// Key/value heads K; H is a multiple of K and head h reads head h / (H / K).
    pub n_kv_heads: usize,
    /// Head width D.
    pub head_dim: usize,
    /// Usually 1 / sqrt(D).
    pub scale: f32,
    /// Bound on the magnitude of a score, positive (Gemma Team 2024, arXiv:2408.00118, §2).
    pub soft_cap: Option<f32>,
    /// Keys that a position sees, itself included, at least 1: position p sees `p - window + 1..=p`
    /// (Jiang et al. 2023, arXiv:2310.06825, §2). Causal attention only.
    pub window: Option<usize>,
}

/// The largest output of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Largest {
    /// Its row of the matrix; of equal ones the first. Beside a NaN it may be any number.
    pub index: u32,
    /// Its value; NaN where that, or what it was compared with, is not finite.
    pub value: f32,
}

impl Largest {
    /// The largest of `values`, which are not empty.
    #[must_use]
    ///
    /// # Panics
    /// When they are.
    pub fn of(values: &[f32]) -> Largest {
        const LANES: usize = 16;
        let (blocks, rest) = values.as_chunks::<LANES>();
        let mut highest = [f32::NEG_INFINITY; LANES];
        // Zero times a number is zero, and anything else stays a NaN.
        let mut zeros = [0.0; LANES];
        for block in blocks {
            for ((highest, zero), &x) in highest.iter_mut().zip(&mut zeros).zip(block) {
                *highest = if x > *highest { x } else { *highest };
                *zero += 0.0 * x;
            }
        }
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let value = highest.iter().chain(rest).copied().reduce(larger).expect("a row has outputs");
        if !zeros.iter().chain(rest).copied().all(f32::is_finite) {
            return Largest { index: 0, value: f32::NAN };
        }
        let index = values.iter().position(|&x| x == value).expect("it is one of them");
        Largest {
            index: u32::try_from(index).expect("rows are far below 2^32"),
            value: values[index],
        }
    }

    /// The largest of the first `limit` values of each row of `values` `(T, width)`.
    ///
    /// # Panics
    /// When `limit` is zero or more than `width`.
    #[must_use]
    pub fn of_rows(values: &[f32], width: usize, limit: usize) -> Vec<Largest> {
        values.chunks_exact(width).map(|row| Largest::of(&row[..limit])).collect()
    }

    /// The larger of two, the earlier of equal ones.
    #[must_use]
    pub fn or(self, other: Largest) -> Largest {
        if !self.value.is_finite() || !other.value.is_finite() {
            return Largest { value: f32::NAN, ..self };
        }
        let wins =
            other.value > self.value || other.value == self.value && other.index < self.index;
        if wins { other } else { self }
    }
}

/// Which norm of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467).
    Rms,
    /// `(x - mean) / sqrt(variance + eps) * weight`, the biased variance, no bias (Ba et al. 2016,
    /// arXiv:1607.06450; Cohere's models).
    Layer,
}

/// The activation of a gated network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateActivation {
    /// `x / (1 + e^-x)` (Elfwing et al. 2018, arXiv:1702.03118).
    Silu,
    /// `x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))` (Hendrycks and Gimpel 2016, arXiv:1606.08415,
    /// §2).
    GeluTanh,
}

/// Which pairs a rotary embedding turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Pairs (2i, 2i+1): GGUF files of the Llama family, whose q/k rows are permuted.
    Interleaved,
    /// Pairs (i, i + R/2): Hugging Face checkpoints and NeoX-style GGUF files.
    Halves,
}

/// A rotary embedding: pair i of a head turns by `position * inverse_frequencies[i]` radians.
#[derive(Clone, Debug)]
pub struct Rope {
    /// One entry a pair; `2 * len()` leading dimensions of each head are rotated, the rest pass.
    pub inverse_frequencies: Vec<f32>,
    /// Pair layout.
    pub style: RopeStyle,
    /// Sine and cosine are multiplied by this: the attention factor of YaRN (Peng et al. 2023,
    /// arXiv:2309.00071, §3.4) and of Phi-3's long rotation; 1 otherwise.
    pub magnitude: f32,
}

/// Rows that meet a matrix through a norm.
#[derive(Debug)]
pub struct Normed<'a, Buffer> {
    /// The rows, `(T, C)`.
    pub x: &'a Buffer,
    /// T.
    pub n_rows: usize,
    /// Which norm.
    pub kind: NormKind,
    /// Its weight, `(C)`.
    pub weight: &'a Buffer,
    /// What the norm adds below the root.
    pub eps: f32,
    /// `(T, C)`: where a device may leave the normed rows. It may hold anything afterwards.
    pub work: &'a mut Buffer,
}

/// Queries, keys and values of a step on their way to attention.
#[derive(Debug)]
pub struct HeadRows<'a, Buffer> {
    /// `(T, H * D)`; normed and rotated in place.
    pub queries: &'a mut Buffer,
    /// `(T, K * D)`; may hold anything afterwards.
    pub keys: &'a mut Buffer,
    /// `(T, K * D)`; read alone, or filled by [`Backend::norm_place`].
    pub values: &'a mut Buffer,
    /// Query heads H.
    pub n_heads: usize,
    /// Key/value heads K.
    pub n_kv_heads: usize,
    /// Head width D.
    pub head_dim: usize,
    /// RMS norms of each query and each key head.
    pub norms: Option<HeadNorms<'a, Buffer>>,
    /// How queries and keys are rotated.
    pub rope: Option<&'a Rope>,
}

/// Where the rows of a step are, and where their keys and values go.
#[derive(Debug)]
pub struct Places<'a, Pool> {
    /// The pool.
    pub pool: &'a mut Pool,
    /// Its layer.
    pub layer: usize,
    /// Position of each row, `(T)`.
    pub positions: &'a [u32],
    /// Place of each row's key and value, `(T)`.
    pub slots: &'a [KvSlot],
}

/// Norms of queries and keys, head by head (Henry et al. 2020, arXiv:2010.04245).
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a, Buffer> {
    /// Weight of the queries' norm, `(D)`.
    pub query: &'a Buffer,
    /// Weight of the keys' norm, `(D)`.
    pub key: &'a Buffer,
    /// What the norms add below the root.
    pub eps: f32,
}

/// A device: the operations that the decoder and the encoder are written in.
///
/// What a device has built since it was opened (G-05). Building takes milliseconds that the first user of
/// a shape would wait for; after the warm-up fence nothing of it is to grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Modules of kernels that were loaded.
    pub module_loads: u64,
    /// Graphs that were made of launches.
    pub graph_captures: u64,
    /// Products whose kernel was chosen by trying. No device here tries: choices are computed from the
    /// shape and the card, and this stays 0.
    pub gemm_autotunes: u64,
    /// Allocations of the device's own memory; 0 where that is the system's.
    pub device_allocs: u64,
    /// Communicators between devices. No device here joins others, and this stays 0.
    pub nccl_inits: u64,
}

impl DeviceCounters {
    /// Every counter with its name in G-05.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 5] {
        let DeviceCounters {
            module_loads,
            graph_captures,
            gemm_autotunes,
            device_allocs,
            nccl_inits,
        } = *self;
        [
            ("module_loads", module_loads),
            ("graph_captures", graph_captures),
            ("gemm_autotunes", gemm_autotunes),
            ("device_allocs", device_allocs),
            ("nccl_inits", nccl_inits),
        ]
    }

    /// What was built since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &DeviceCounters) -> DeviceCounters {
        DeviceCounters {
            module_loads: self.module_loads.saturating_sub(earlier.module_loads),
            graph_captures: self.graph_captures.saturating_sub(earlier.graph_captures),
            gemm_autotunes: self.gemm_autotunes.saturating_sub(earlier.gemm_autotunes),
            device_allocs: self.device_allocs.saturating_sub(earlier.device_allocs),
            nccl_inits: self.nccl_inits.saturating_sub(earlier.nccl_inits),
        }
    }

    /// Whether nothing was built.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == DeviceCounters::default()
    }
}

/// Defined by [`crate::reference`]; every implementation runs [`crate::conformance`].
/// Operations run in the order of the calls, and what is read of their results is there when the call
/// returns. Those with a body are several of the others in a
/// row, which a device may run as one. They panic when buffers are shorter than the
/// shapes say: the caller is the model, whose shapes were checked at load.
pub trait Backend: Send + Sync + 'static {
    /// A matrix prepared for this device (repacked, uploaded).
    type Weight: Send + Sync;
    /// f32 activations on the device.
    type Buffer: Send + Sync;
    /// The KV page pool on the device.
    type KvPool: Send;
    /// The largest or drawn outputs of T rows, asked for and maybe not there yet. It may be dropped unread.
    type Found: Send;

    /// For reports, such as `cpu avx512-vnni, 2 threads, int8 activations`.
    fn name(&self) -> String;

    /// Gives memory that loading needed and nothing uses any more back to the system, as far as
    /// the device can tell. Called when a model is ready; changes no value.
    fn release_unused(&self) {}

    /// Whether operations run while the host goes on, so that a step gains by being asked for before
    /// the one in front of it was read. Where they do not, a step that turns out to be needless is lost.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Threads of the host that a step keeps busy to its end, the caller's included. Other work of a step finds a
    /// free core only where there are more than these.
    fn host_threads(&self) -> usize {
        1
    }

    /// What it has built since it was opened; all zeros of a device that builds nothing. Asked for after
    /// every step.
    fn built(&self) -> DeviceCounters {
        DeviceCounters::default()
    }

    /// Says whether the warm-up fence is closed: from then on it builds nothing that it can do without, and
    /// runs a shape that it has built nothing for as it is. A new device's fence is open.
    fn close_fence(&self, closed: bool) {
        let _ = closed;
    }

    /// Prepares a matrix.
    ///
    /// # Errors
    /// Wrong byte count, or a format without a kernel.
    fn weight(&self, view: &WeightView<'_>) -> Result<Self::Weight, KernelError>;
    /// `(N, columns)` of a prepared matrix.
    fn weight_shape(&self, weight: &Self::Weight) -> (usize, usize);

    /// A zeroed buffer of `len` values.
    ///
    /// # Errors
    /// Out of memory.
    fn buffer(&self, len: usize) -> Result<Self::Buffer, KernelError>;
    /// Copies values to the head of a buffer.
    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]);
    /// Copies the head of a buffer out.
    fn read(&self, buffer: &Self::Buffer, values: &mut [f32]);

    /// A zeroed page pool.
    ///
    /// # Errors
    /// Out of memory.
    fn kv_pool(&self, shape: KvShape) -> Result<Self::KvPool, KernelError>;
    /// Copies page `from` over page `to`, all layers.
    fn kv_copy_page(&self, pool: &mut Self::KvPool, from: PageId, to: PageId);
    /// Moves keys and values of one layer between places of the pool, one after the other: a move reads what
    /// those before it left. `rope` is the one that the keys were rotated with.
    ///
    /// On its way a key turns by its distance, without the magnitude, which it has, and is rounded again
    /// as [`KvDtype`] says: what was written at p and moved by d is what would have been written at p + d,
    /// but for one more rounding. Int8 keys are turned as they are read, so that each turn moves an element by
    /// max|x| / 254 more. Values, and keys that turn by nothing (distance 0, or no rope), keep their bits.
    /// Panics when a place is not in the pool, or the pairs do not fit a head.
    fn kv_move(&self, pool: &mut Self::KvPool, layer: usize, moves: &[KvMove], rope: Option<&Rope>);
    /// Bytes of one page as [`Backend::kv_read_page`] gives it.
    fn kv_page_bytes(&self, pool: &Self::KvPool) -> usize;
    /// Copies a page out, all layers, with the scales of [`KvDtype::Int8`]; `bytes` are
    /// [`Backend::kv_page_bytes`]. Their order is this device's own, and means nothing to another one.
    fn kv_read_page(&self, pool: &Self::KvPool, page: PageId, bytes: &mut [u8]);
    /// Puts a page back that [`Backend::kv_read_page`] gave, over whatever `page` holds.
    fn kv_write_page(&self, pool: &mut Self::KvPool, page: PageId, bytes: &[u8]);

    /// `out[t] = scale * table[ids[t]]`, dequantised; out `(T, C)`.
    fn embed(&self, table: &Self::Weight, ids: &[TokenId], scale: f32, out: &mut Self::Buffer);
    /// [`Backend::embed`] of the T tokens that were found, which need not be there yet; where a value is
    /// NaN, of any row of the table.
    fn embed_found(
        &self,
        table: &Self::Weight,
        found: &Self::Found,
        scale: f32,
        out: &mut Self::Buffer,
    ) {
        let (n_ids, _) = self.weight_shape(table);
        let last = u32::try_from(n_ids - 1).unwrap_or(u32::MAX);
        let ids = self.found(found).into_iter().map(|row| TokenId(row.index.min(last)));
        self.embed(table, &ids.collect::<Vec<_>>(), scale, out);
    }
    /// `out[t] = norm(x[t])`; x, out `(T, C)`, weight `(C)`.
    fn norm(
        &self,
        kind: NormKind,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    );
    /// `x[t] = norm(x[t])`. Norms of queries and keys (Henry et al. 2020, arXiv:2010.04245): with a
    /// weight `(D)` each head is a row of `n_rows = T * H`, with a weight `(H * D)` each token is.
    fn norm_in_place(
        &self,
        kind: NormKind,
        x: &mut Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
    );
    /// `y[t] += norm(x[t])`: the norm behind a block, and its residual; x, y `(T, C)`.
    fn norm_add(
        &self,
        kind: NormKind,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        eps: f32,
        y: &mut Self::Buffer,
    );
    /// `x[t] = (x[t] - mean) / sqrt(variance + eps) * weight + bias`, in place; x `(T, C)`.
    fn layer_norm(
        &self,
        x: &mut Self::Buffer,
        n_rows: usize,
        weight: &Self::Buffer,
        bias: &Self::Buffer,
        eps: f32,
    );
    /// `out = x Wᵀ (+ bias)`; x `(T, columns)`, out `(T, N)`.
    fn linear(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
    );
    /// Asks for the largest of the first `limit` values of every row of x `(T, width)`, which may hold
    /// anything else as soon as this returns. Panics when `limit` is zero or more than `width`.
    fn largest(&self, x: &Self::Buffer, n_rows: usize, width: usize, limit: usize) -> Self::Found;
    /// Asks for a draw from every row of x `(T, width)`, as [`crate::Draw::of`] defines it, to the last
    /// bit: the token's index beside the largest value. x may hold anything afterwards. Panics when the limit
    /// is zero or more than `width`.
    fn draw(&self, x: &mut Self::Buffer, width: usize, draws: Draws<'_>) -> Self::Found;
    /// What was asked for, `(T)`; waits for it. It can be asked again.
    fn found(&self, found: &Self::Found) -> Vec<Largest>;
    /// Asks for the largest of the first `limit` outputs of every row of `x Wᵀ`; x `(T, columns)`. The
    /// same index and value as [`Backend::linear`] gives; `work` `(T, N)` may hold anything afterwards.
    fn linear_largest(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        limit: usize,
        work: &mut Self::Buffer,
    ) -> Self::Found {
        let (n_outputs, _) = self.weight_shape(weight);
        self.linear(x, n_rows, weight, None, work);
        self.largest(work, n_rows, n_outputs, limit)
    }
    /// Three products of one x (query, key, value), so that x is quantised once.
    fn linear_qkv(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weights: [&Self::Weight; 3],
        biases: Option<[&Self::Buffer; 3]>,
        outs: [&mut Self::Buffer; 3],
    );
    /// [`Backend::linear_qkv`] behind a norm.
    fn norm_qkv(
        &self,
        x: Normed<'_, Self::Buffer>,
        weights: [&Self::Weight; 3],
        biases: Option<[&Self::Buffer; 3]>,
        outs: [&mut Self::Buffer; 3],
    ) {
        self.norm(x.kind, x.x, x.n_rows, x.weight, x.eps, x.work);
        self.linear_qkv(x.work, x.n_rows, weights, biases, outs);
    }

    /// [`Backend::norm_qkv`] into the rows of `heads`, which may hold anything before, and
    /// [`Backend::place_heads`] of those. Keys and values of `heads` may hold anything afterwards.
    fn norm_place(
        &self,
        x: Normed<'_, Self::Buffer>,
        weights: [&Self::Weight; 3],
        biases: Option<[&Self::Buffer; 3]>,
        heads: HeadRows<'_, Self::Buffer>,
        places: Places<'_, Self::KvPool>,
    ) {
        let outs = [&mut *heads.queries, &mut *heads.keys, &mut *heads.values];
        self.norm_qkv(x, weights, biases, outs);
        let Places { pool, layer, positions, slots } = places;
        self.place_heads(heads, positions, pool, layer, slots);
    }
    /// [`Backend::linear_gate`] behind a norm.
    fn norm_gate(
        &self,
        x: Normed<'_, Self::Buffer>,
        gate: &Self::Weight,
        up: &Self::Weight,
        activation: GateActivation,
        out: &mut Self::Buffer,
    ) {
        self.norm(x.kind, x.x, x.n_rows, x.weight, x.eps, x.work);
        self.linear_gate(x.work, x.n_rows, gate, up, activation, out);
    }
    /// [`Backend::linear`] behind a norm: the logits of a head.
    fn norm_linear(
        &self,
        x: Normed<'_, Self::Buffer>,
        weight: &Self::Weight,
        out: &mut Self::Buffer,
    ) {
        self.norm(x.kind, x.x, x.n_rows, x.weight, x.eps, x.work);
        self.linear(x.work, x.n_rows, weight, None, out);
    }
    /// [`Backend::linear_largest`] behind a norm: of what [`Backend::norm_linear`] gives.
    fn norm_largest(
        &self,
        x: Normed<'_, Self::Buffer>,
        weight: &Self::Weight,
        limit: usize,
        work: &mut Self::Buffer,
    ) -> Self::Found {
        self.norm(x.kind, x.x, x.n_rows, x.weight, x.eps, x.work);
        self.linear_largest(x.work, x.n_rows, weight, limit, work)
    }
    /// Asks for a draw from every row that [`Backend::norm_linear`] gives; `work` `(T, N)` may hold anything
    /// afterwards.
    fn norm_draw(
        &self,
        x: Normed<'_, Self::Buffer>,
        weight: &Self::Weight,
        draws: Draws<'_>,
        work: &mut Self::Buffer,
    ) -> Self::Found {
        self.norm_linear(x, weight, work);
        self.draw(work, self.weight_shape(weight).0, draws)
    }
    /// `y += scale * (x Wᵀ (+ bias))`: the residual add; y `(T, N)`.
    fn linear_add(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        scale: f32,
        y: &mut Self::Buffer,
    );
    /// `y[rows[i]] += scales[i] * (x[i] Wᵀ)`: what one expert adds to the tokens that were sent to it
    /// (Jiang et al. 2024, arXiv:2401.04088, §2.1). x has `rows.len()` rows, maybe none; `rows` are
    /// distinct.
    fn linear_add_rows(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: &[u32],
        scales: &[f32],
        y: &mut Self::Buffer,
    );
    /// `out = activation(x Gᵀ) * (x Uᵀ)` (Shazeer 2020, arXiv:2002.05202); out `(T, F)`.
    fn linear_gate(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        gate: &Self::Weight,
        up: &Self::Weight,
        activation: GateActivation,
        out: &mut Self::Buffer,
    );
    /// `out = gelu(x Wᵀ + bias)` with the exact (erf) gelu; out `(T, N)`.
    fn linear_gelu(
        &self,
        x: &Self::Buffer,
        n_rows: usize,
        weight: &Self::Weight,
        bias: &Self::Buffer,
        out: &mut Self::Buffer,
    );
    /// Rotates `x` `(T, n_heads * head_dim)` in place; row t sits at `positions[t]`.
    fn rope(
        &self,
        x: &mut Self::Buffer,
        n_heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    );
    /// Stores key and value rows `(T, K * D)` of one layer at `slots[t]`.
    fn kv_write(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        slots: &[KvSlot],
    );
    /// Norms queries and keys, rotates them at `positions[t]`, and stores keys and values of one
    /// layer at `slots[t]`.
    fn place_heads(
        &self,
        heads: HeadRows<'_, Self::Buffer>,
        positions: &[u32],
        pool: &mut Self::KvPool,
        layer: usize,
        slots: &[KvSlot],
    ) {
        let HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope } = heads;
        let n_rows = positions.len();
        if let Some(HeadNorms { query, key, eps }) = norms {
            self.norm_in_place(NormKind::Rms, queries, n_rows * n_heads, query, eps);
            self.norm_in_place(NormKind::Rms, keys, n_rows * n_kv_heads, key, eps);
        }
        if let Some(rope) = rope {
            self.rope(queries, n_heads, head_dim, positions, rope);
            self.rope(keys, n_kv_heads, head_dim, positions, rope);
        }
        self.kv_write(pool, layer, keys, values, slots);
    }
    /// Causal attention over pages; q, out `(T, H * D)`.
    fn attention(
        &self,
        q: &Self::Buffer,
        pool: &Self::KvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut Self::Buffer,
    );
    /// Unmasked attention inside each span; q, out `(T, H * D)`, k, v `(T, K * D)`. Panics when the
    /// shape has a window.
    fn attention_full(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: AttentionShape,
        spans: &[Span],
        out: &mut Self::Buffer,
    );
    /// `out[i] = x[rows[i]]`; x `(T, width)`.
    fn gather_rows(&self, x: &Self::Buffer, width: usize, rows: &[u32], out: &mut Self::Buffer);
    /// `x += y` over the first `len` values.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize);
    /// `x = scale * x` over the first `len` values, then with a cap `cap * tanh(x / cap)`: logits
    /// (Gemma Team 2024, arXiv:2408.00118, §2). NaN stays NaN.
    fn scale_and_cap(&self, x: &mut Self::Buffer, len: usize, scale: f32, soft_cap: Option<f32>);
    /// `out[s] = mean over the rows of span s`; x `(T, width)`, out `(spans, width)`.
    fn mean_rows(&self, x: &Self::Buffer, width: usize, spans: &[Span], out: &mut Self::Buffer);
}
