//! [`Decoder`]: blocks of grouped-query attention with rotary positions and a gated network, after
//! Llama (Touvron et al. 2023, arXiv:2302.13971, §2.2). What families do differently is data:
//! [`DecoderConfig`].

mod block;

use exrail_checkpoint::{BlockNorms, DecoderConfig, NormKind, QkNorm, Tensors};
use exrail_kernels::{
    AttentionShape, AttentionSpan, Backend, Draw, Draws, HeadNorms, HeadRows, InputRounding,
    KvDtype, KvMove, KvShape, Normed, Places, Rope, TokenId,
};

pub use block::{Block, embed_tokens};

use crate::batch::Rows;
use crate::experts::Experts;
use crate::layer::{Dense, Ffn, Layer, NetworkInput, QkNorms};
use crate::load::Loader;
use crate::rope::rope;
use crate::{Batch, LoadProgress, ModelError, Scratch};

/// A decoder on a device.
pub struct Decoder<B: Backend> {
    config: DecoderConfig,
    embedding: B::Weight, // (V, C)
    layers: Vec<Layer<B>>,
    norm: B::Buffer, // (C)
    head: Head<B::Weight>,
    ropes: Vec<Rope>,
}

/// The matrix that turns the last state into logits.
enum Head<W> {
    /// The embedding table.
    Tied,
    /// Its own matrix, `(V, C)`.
    Own(W),
}

/// The token of each row of a step.
enum Tokens<'a, Found> {
    Known(&'a [TokenId]),
    /// Of an earlier step; maybe not there yet.
    Found(&'a Found),
}

/// The pool that sequences of such a decoder live in.
#[must_use]
pub fn kv_shape(config: &DecoderConfig, n_pages: usize, dtype: KvDtype) -> KvShape {
    KvShape {
        n_layers: config.n_layers(),
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        n_pages,
        dtype,
    }
}

impl<B: Backend> Decoder<B> {
    /// Prepares the weights of a GGUF file or a folder.
    ///
    /// # Errors
    /// A missing or misshapen tensor by name, a format without a kernel, or no memory.
    pub fn load(
        backend: &B,
        config: &DecoderConfig,
        tensors: &dyn Tensors,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let n_total = tensors.names().count();
        let progress_at_start = LoadProgress { n_total, ..LoadProgress::default() };
        let mut loader = Loader { backend, tensors, report: progress, progress: progress_at_start };
        let (vocab_size, width) = (config.vocab_size, config.width);
        let (name, shape) = ("token_embd.weight", (vocab_size, width));
        let embedding = if config.tied_head {
            loader.head(name, shape)?
        } else {
            loader.matrix(name, shape, InputRounding::Twice)?
        };
        let mut layers = Vec::with_capacity(config.n_layers());
        for layer_idx in 0..config.n_layers() {
            layers.push(Layer::load(&mut loader, config, layer_idx)?);
        }
        let ropes = config.ropes.iter().map(|r| rope(r, config.context_len)).collect();
        let norm = loader.vector("output_norm.weight", width)?;
        let head = if config.tied_head {
            Head::Tied
        } else {
            Head::Own(loader.head("output.weight", shape)?)
        };
        Ok(Self { config: config.clone(), embedding, layers, norm, head, ropes })
    }

    /// The hyperparameters that it was loaded with.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The pool that this decoder's sequences live in.
    #[must_use]
    pub fn kv_shape(&self, n_pages: usize, dtype: KvDtype) -> KvShape {
        kv_shape(&self.config, n_pages, dtype)
    }

    /// Moves keys and values of all layers between places of the pool, one after the other, and turns each key
    /// by its distance as its layer's rotation says. Every rotation here is by an angle that grows in
    /// proportion to the position, at frequencies that are fixed when the model is loaded, so that a key can
    /// always be turned; see [`Backend::kv_move`] for what that costs in precision.
    ///
    /// # Panics
    /// When `pool` is not of [`Decoder::kv_shape`], or does not have a place.
    pub fn move_cached(&self, backend: &B, pool: &mut B::KvPool, moves: &[KvMove]) {
        for (layer_idx, layer) in self.config.layers.iter().enumerate() {
            backend.kv_move(pool, layer_idx, moves, layer.rope.map(|rope| &self.ropes[rope]));
        }
    }

    /// Activations for steps of up to `max_rows` rows, `max_logit_rows` of them with logits.
    ///
    /// # Errors
    /// Out of memory.
    pub fn scratch(
        &self,
        backend: &B,
        max_rows: usize,
        max_logit_rows: usize,
    ) -> Result<Scratch<B>, ModelError> {
        Scratch::new(backend, &self.config, max_rows, max_logit_rows)
    }

    /// Runs one step: writes the keys and values of every row to its pages, and leaves the logits
    /// of the batch's logit rows in `scratch`.
    ///
    /// Behind the keys and values of the last layer only logit rows are computed: in a prefill
    /// chunk without any, the last layer's attention and network do not run at all.
    ///
    /// # Panics
    /// When the batch has more rows or logit rows than `scratch`, a token id outside the
    /// vocabulary, or spans that [`Batch`] does not allow; or when `pool` is not of
    /// [`Decoder::kv_shape`].
    pub fn forward(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        batch: &Batch<'_>,
    ) {
        self.run(backend, scratch, pool, (Tokens::Known(batch.ids), batch.rows()));
        self.logits(backend, scratch, batch.logit_rows.len());
    }

    /// Runs one step as [`Decoder::forward`] does, and asks for a token of every logit row, drawn from the
    /// logits that `forward` gives as [`exrail_kernels::Draw`] defines. There are no logits to read
    /// afterwards, and where the most likely token of one row is asked for, most of them were never
    /// computed.
    ///
    /// # Panics
    /// As [`Decoder::forward`], when there are not as many draws as logit rows, or when their limit is zero
    /// or beyond the vocabulary.
    pub fn forward_drawn(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        batch: &Batch<'_>,
        draws: Draws<'_>,
    ) -> B::Found {
        assert_eq!(draws.rows.len(), batch.logit_rows.len(), "a draw for each logit row");
        self.run(backend, scratch, pool, (Tokens::Known(batch.ids), batch.rows()));
        self.drawn(backend, scratch, draws)
    }

    /// Runs the step behind the one that gave `last`, as [`Decoder::forward_drawn`] does: row t gets the
    /// token that was found for row t, which need not be there yet; where its value is no number, any token.
    /// `spans` are one row each, as many as were found.
    ///
    /// # Panics
    /// As [`Decoder::forward_drawn`].
    pub fn follow_drawn(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        last: &B::Found,
        spans: &[AttentionSpan<'_>],
        draws: Draws<'_>,
    ) -> B::Found {
        assert_eq!(draws.rows.len(), spans.len(), "a draw for each row");
        let logit_rows: Vec<u32> = (0..).take(spans.len()).collect();
        let rows = Rows { n_rows: spans.len(), spans, logit_rows: &logit_rows };
        self.run(backend, scratch, pool, (Tokens::Found(last), rows));
        self.drawn(backend, scratch, draws)
    }

    /// Draws the tokens of the logit rows.
    fn drawn(&self, backend: &B, scratch: &mut Scratch<B>, draws: Draws<'_>) -> B::Found {
        let (vocab_size, limit, n_rows) = (self.config.vocab_size, draws.limit, draws.rows.len());
        assert!((1..=vocab_size).contains(&limit), "{limit} tokens of {vocab_size}");
        if draws.rows.iter().all(Draw::is_greedy) {
            return self.largest(backend, scratch, n_rows, limit);
        }
        if self.has_plain_logits() {
            let (x, normed, work) = scratch.logits_for(0);
            let input = self.last_norm(x, n_rows, normed);
            return backend.norm_draw(input, self.head(), draws, work);
        }
        self.logits(backend, scratch, n_rows);
        let (_, _, logits) = scratch.logits_for(0);
        backend.draw(logits, vocab_size, draws)
    }

    /// Asks for the most likely tokens of the logit rows.
    fn largest(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        n_rows: usize,
        limit: usize,
    ) -> B::Found {
        let vocab_size = self.config.vocab_size;
        if n_rows > 0 && self.has_plain_logits() {
            let (x, normed, work) = scratch.logits_for(0);
            let input = self.last_norm(x, n_rows, normed);
            return backend.norm_largest(input, self.head(), limit, work);
        }
        // A cap may make different logits equal, and then the first counts.
        self.logits(backend, scratch, n_rows);
        let (_, _, logits) = scratch.logits_for(0);
        backend.largest(logits, n_rows, vocab_size, limit)
    }

    /// All layers, the last one for the logit rows.
    fn run(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        (tokens, rows): (Tokens<'_, B::Found>, Rows<'_>),
    ) {
        let (n_rows, n_logit_rows) = (rows.n_rows, rows.logit_rows.len());
        assert!(n_rows <= scratch.max_rows, "{n_rows} rows of {}", scratch.max_rows);
        assert!(
            n_logit_rows <= scratch.max_logit_rows,
            "{n_logit_rows} logit rows of {}",
            scratch.max_logit_rows
        );
        rows.place(&mut scratch.positions, &mut scratch.slots);

        let (scale, residual) = (self.config.embedding_scale, &mut scratch.residual);
        match tokens {
            Tokens::Known(ids) => {
                let vocab_size = self.config.vocab_size;
                let known = ids.iter().all(|id| (id.0 as usize) < vocab_size);
                assert!(known, "ids below {vocab_size}");
                backend.embed(&self.embedding, ids, scale, residual);
            }
            Tokens::Found(last) => backend.embed_found(&self.embedding, last, scale, residual),
        }
        let last = self.layers.len() - 1;
        for layer_idx in 0..last {
            self.cache(backend, scratch, pool, layer_idx, n_rows);
            let queries = &scratch.queries;
            let shape = self.attention_shape(layer_idx);
            backend.attention(queries, pool, layer_idx, shape, rows.spans, &mut scratch.attended);
            self.mix(backend, scratch, layer_idx, n_rows);
        }
        self.cache(backend, scratch, pool, last, n_rows);
        self.finish(backend, scratch, pool, rows);
    }

    /// Queries of a layer into `scratch`, rotated; keys and values into the pool.
    fn cache(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        pool: &mut B::KvPool,
        layer_idx: usize,
        n_rows: usize,
    ) {
        let (layer, config) = (&self.layers[layer_idx], &self.config);
        let Scratch { residual, normed, queries, keys, values, positions, slots, .. } = scratch;
        let (kind, eps) = (self.norm_kind(), config.norm.eps);
        let (mut norms, mut whole_norms) = (None, None);
        if let Some(QkNorms { query, key }) = &layer.qk_norm {
            match config.qk_norm {
                Some(QkNorm::Heads) => norms = Some(HeadNorms { query, key, eps }),
                Some(QkNorm::Whole) | None => whole_norms = Some((query, key)),
            }
        }
        let rope = config.layers[layer_idx].rope.map(|rope| &self.ropes[rope]);
        let DecoderConfig { n_heads, n_kv_heads, head_dim, .. } = *config;
        let heads = HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope };
        let places = Places { pool, layer: layer_idx, positions, slots };
        let is_parallel = config.blocks == BlockNorms::Parallel;
        if let (Some(weight), None, false) = (&layer.attention_norm, whole_norms, is_parallel) {
            let input = Normed { x: residual, n_rows, kind, weight, eps, work: normed };
            return layer.qkv.run_placed(backend, input, heads, places);
        }
        let outs = [&mut *heads.queries, &mut *heads.keys, &mut *heads.values];
        match &layer.attention_norm {
            // The network will read the normed rows, too.
            Some(weight) if is_parallel => {
                backend.norm(kind, residual, n_rows, weight, eps, normed);
                layer.qkv.run(backend, normed, n_rows, outs);
            }
            Some(weight) => {
                let input = Normed { x: residual, n_rows, kind, weight, eps, work: normed };
                layer.qkv.run_normed(backend, input, outs);
            }
            None => layer.qkv.run(backend, residual, n_rows, outs),
        }
        if let Some((query, key)) = whole_norms {
            let kind = exrail_kernels::NormKind::Rms;
            backend.norm_in_place(kind, heads.queries, n_rows, query, eps);
            backend.norm_in_place(kind, heads.keys, n_rows, key, eps);
        }
        let Places { pool, layer, positions, slots } = places;
        backend.place_heads(heads, positions, pool, layer, slots);
    }

    /// Adds a layer's attention output and its network to the residual.
    fn mix(&self, backend: &B, scratch: &mut Scratch<B>, layer_idx: usize, n_rows: usize) {
        let (layer, config) = (&self.layers[layer_idx], &self.config);
        let (kind, eps) = (self.norm_kind(), config.norm.eps);
        let scale = config.residual_scale;
        let Scratch { residual, attended, branch, .. } = scratch;
        let out = &layer.attention_out;
        match &layer.attention_post_norm {
            Some(weight) => {
                backend.linear(attended, n_rows, &out.weight, out.bias.as_ref(), branch);
                backend.norm_add(kind, branch, n_rows, weight, eps, residual);
            }
            None => {
                let bias = out.bias.as_ref();
                backend.linear_add(attended, n_rows, &out.weight, bias, scale, residual);
            }
        }
        match &layer.ffn {
            Ffn::Dense(dense) => self.dense(backend, scratch, (layer, dense), n_rows),
            Ffn::Experts(experts) => self.experts(backend, scratch, (layer, experts), n_rows),
        }
    }

    /// Adds the output of a network of one piece to the residual.
    fn dense(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        (layer, dense): (&Layer<B>, &Dense<B>),
        n_rows: usize,
    ) {
        let config = &self.config;
        let (kind, eps) = (self.norm_kind(), config.norm.eps);
        let Scratch { residual, normed, branch, gated, .. } = scratch;
        let input = match &layer.ffn_norm {
            Some(weight) => NetworkInput::Normed(Normed {
                x: residual,
                n_rows,
                kind,
                weight,
                eps,
                work: normed,
            }),
            // Without a norm of its own the network reads the residual (post-norm blocks) or, side
            // by side with attention, what attention read.
            None if config.blocks == BlockNorms::Post => NetworkInput::Plain(residual, n_rows),
            None => NetworkInput::Plain(normed, n_rows),
        };
        dense.open(backend, input, config, gated);
        let down = &dense.down;
        match &layer.ffn_post_norm {
            Some(weight) => {
                backend.linear(gated, n_rows, &down.weight, down.bias.as_ref(), branch);
                backend.norm_add(kind, branch, n_rows, weight, eps, residual);
            }
            None => {
                let (bias, scale) = (down.bias.as_ref(), config.residual_scale);
                backend.linear_add(gated, n_rows, &down.weight, bias, scale, residual);
            }
        }
    }

    /// Adds the output of a network of experts to the residual.
    fn experts(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        (layer, all): (&Layer<B>, &Experts<B>),
        n_rows: usize,
    ) {
        let config = &self.config;
        let (kind, eps) = (self.norm_kind(), config.norm.eps);
        let Scratch { residual, normed, branch, gated, experts, .. } = scratch;
        if let Some(weight) = &layer.ffn_norm {
            backend.norm(kind, residual, n_rows, weight, eps, normed);
        }
        let work = (gated, experts);
        match &layer.ffn_post_norm {
            Some(weight) => {
                let input = if config.blocks == BlockNorms::Post { &*residual } else { &*normed };
                backend.write(branch, &vec![0.0; n_rows * config.width]);
                all.run_add(backend, (input, n_rows), config, work, 1.0, branch);
                backend.norm_add(kind, branch, n_rows, weight, eps, residual);
            }
            None => {
                let scale = config.residual_scale;
                all.run_add(backend, (normed, n_rows), config, work, scale, residual);
            }
        }
    }

    /// The rest of the last layer, for the logit rows alone.
    fn finish(&self, backend: &B, scratch: &mut Scratch<B>, pool: &B::KvPool, all: Rows<'_>) {
        let (rows, n_rows) = (all.logit_rows, all.logit_rows.len());
        if n_rows == 0 {
            return;
        }
        let config = &self.config;
        let last = self.layers.len() - 1;
        let shape = self.attention_shape(last);
        scratch.gathered = !all.all_rows_have_logits();
        if !scratch.gathered {
            let Scratch { queries, attended, .. } = scratch;
            backend.attention(queries, pool, last, shape, all.spans, attended);
            return self.mix(backend, scratch, last, n_rows);
        }
        let Scratch { residual, queries, attended, last_residual, last_queries, normed, .. } =
            scratch;
        backend.gather_rows(residual, config.width, rows, last_residual);
        backend.gather_rows(queries, shape.n_heads * shape.head_dim, rows, last_queries);
        if config.blocks == BlockNorms::Parallel {
            // The network reads what attention read, of these rows.
            backend.gather_rows(normed, config.width, rows, &mut scratch.branch);
            std::mem::swap(normed, &mut scratch.branch);
        }
        backend.attention(last_queries, pool, last, shape, &all.logit_spans(), attended);
        // The residual of the other rows is not needed any more, so its place is free.
        std::mem::swap(residual, last_residual);
        self.mix(backend, scratch, last, n_rows);
        std::mem::swap(&mut scratch.residual, &mut scratch.last_residual);
    }

    /// The logits of the logit rows.
    fn logits(&self, backend: &B, scratch: &mut Scratch<B>, n_rows: usize) {
        let (x, work, logits) = scratch.logits_for(n_rows);
        if n_rows == 0 {
            return;
        }
        backend.norm_linear(self.last_norm(x, n_rows, work), self.head(), logits);
        if !self.has_plain_logits() {
            let (scale, cap) = (self.config.logit_scale, self.config.logit_soft_cap);
            backend.scale_and_cap(logits, n_rows * self.config.vocab_size, scale, cap);
        }
    }

    /// The norm before the head.
    fn last_norm<'a>(
        &'a self,
        x: &'a B::Buffer,
        n_rows: usize,
        work: &'a mut B::Buffer,
    ) -> Normed<'a, B::Buffer> {
        let (kind, eps) = (self.norm_kind(), self.config.norm.eps);
        Normed { x, n_rows, kind, weight: &self.norm, eps, work }
    }

    fn head(&self) -> &B::Weight {
        match &self.head {
            Head::Tied => &self.embedding,
            Head::Own(head) => head,
        }
    }

    /// Whether a logit is the output of the head.
    fn has_plain_logits(&self) -> bool {
        let (scale, cap) = (self.config.logit_scale, self.config.logit_soft_cap);
        scale.to_bits() == 1.0_f32.to_bits() && cap.is_none()
    }

    fn norm_kind(&self) -> exrail_kernels::NormKind {
        match self.config.norm.kind {
            NormKind::Rms => exrail_kernels::NormKind::Rms,
            NormKind::Layer => exrail_kernels::NormKind::Layer,
        }
    }

    fn attention_shape(&self, layer_idx: usize) -> AttentionShape {
        let config = &self.config;
        AttentionShape {
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale,
            soft_cap: config.attention_soft_cap,
            window: config.layers[layer_idx].window,
        }
    }
}
