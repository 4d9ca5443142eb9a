//! [`Scratch`]: the decoder's activations, allocated once.

use exrail_checkpoint::DecoderConfig;
use exrail_kernels::{Backend, KvSlot};

use crate::ModelError;
use crate::experts::ExpertScratch;

/// Activations of one step at its largest, and the logits of the last step.
///
/// T counts up to the rows and M up to the logit rows that it was made for.
pub struct Scratch<B: Backend> {
    pub(crate) max_rows: usize,
    pub(crate) max_logit_rows: usize,
    pub(crate) positions: Vec<u32>, // (T)
    pub(crate) slots: Vec<KvSlot>,  // (T)
    pub(crate) residual: B::Buffer, // (T, C)
    pub(crate) normed: B::Buffer,   // (T, C)
    pub(crate) queries: B::Buffer,  // (T, H * D)
    pub(crate) keys: B::Buffer,     // (T, K * D)
    pub(crate) values: B::Buffer,   // (T, K * D)
    pub(crate) attended: B::Buffer, // (T, H * D)
    pub(crate) gated: B::Buffer,    // (T, F)
    pub(crate) branch: B::Buffer,   // (T, C)
    pub(crate) experts: ExpertScratch<B>,
    /// Whether the last rows of this step were gathered into `last_residual`; else they are in
    /// `residual`.
    pub(crate) gathered: bool,
    pub(crate) last_residual: B::Buffer, // (M, C)
    pub(crate) last_queries: B::Buffer,  // (M, H * D)
    logits: B::Buffer,                   // (M, V)
    one_row: B::Buffer,                  // (V)
    vocab_size: usize,
    n_logit_rows: usize,
}

impl<B: Backend> Scratch<B> {
    /// Buffers for steps of up to `max_rows` rows, `max_logit_rows` of them with logits.
    pub(crate) fn new(
        backend: &B,
        config: &DecoderConfig,
        max_rows: usize,
        max_logit_rows: usize,
    ) -> Result<Self, ModelError> {
        let query_width = config.n_heads * config.head_dim;
        let kv_width = config.n_kv_heads * config.head_dim;
        let ffn_width = config.ffn_width.max(config.experts.map_or(0, |experts| experts.width));
        Ok(Self {
            max_rows,
            max_logit_rows,
            positions: Vec::with_capacity(max_rows),
            slots: Vec::with_capacity(max_rows),
            residual: backend.buffer(max_rows * config.width)?,
            normed: backend.buffer(max_rows * config.width)?,
            queries: backend.buffer(max_rows * query_width)?,
            keys: backend.buffer(max_rows * kv_width)?,
            values: backend.buffer(max_rows * kv_width)?,
            attended: backend.buffer(max_rows * query_width)?,
            gated: backend.buffer(max_rows * ffn_width)?,
            branch: backend.buffer(max_rows * config.width)?,
            experts: ExpertScratch::new(backend, config, max_rows)?,
            gathered: false,
            last_residual: backend.buffer(max_logit_rows * config.width)?,
            last_queries: backend.buffer(max_logit_rows * query_width)?,
            logits: backend.buffer(max_logit_rows * config.vocab_size)?,
            one_row: backend.buffer(config.vocab_size)?,
            vocab_size: config.vocab_size,
            n_logit_rows: 0,
        })
    }

    /// The last rows, work for their norm, and where the head writes the logits of this step's
    /// `n_rows` logit rows.
    pub(crate) fn logits_for(
        &mut self,
        n_rows: usize,
    ) -> (&B::Buffer, &mut B::Buffer, &mut B::Buffer) {
        self.n_logit_rows = n_rows;
        let x = if self.gathered { &self.last_residual } else { &self.residual };
        (x, &mut self.normed, &mut self.logits)
    }

    /// Rows of the last step that have logits.
    #[must_use]
    pub fn n_logit_rows(&self) -> usize {
        self.n_logit_rows
    }

    /// Copies the logits of the last step's logit row `index` out, `(V)`.
    ///
    /// # Panics
    /// When the last step had no such logit row, or `out` is not V long.
    pub fn logits(&mut self, backend: &B, index: usize, out: &mut [f32]) {
        assert!(index < self.n_logit_rows, "logit row {index} of {}", self.n_logit_rows);
        assert_eq!(out.len(), self.vocab_size, "one value a token");
        if index == 0 {
            // A decode step of one sequence has no other: one copy is enough.
            return backend.read(&self.logits, out);
        }
        let row = u32::try_from(index).expect("rows are far below 2^32");
        backend.gather_rows(&self.logits, self.vocab_size, &[row], &mut self.one_row);
        backend.read(&self.one_row, out);
    }

    /// Replaces `out` by the logits of all logit rows of the last step, `(M, V)`.
    pub fn read_logits(&self, backend: &B, out: &mut Vec<f32>) {
        out.resize(self.n_logit_rows * self.vocab_size, 0.0);
        backend.read(&self.logits, out);
    }
}
