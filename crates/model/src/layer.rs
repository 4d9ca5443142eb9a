//! [`Layer`]: the weights of one block.

use exrail_checkpoint::{BlockNorms, DecoderConfig, GateKind, QkNorm, tensor_name};
use exrail_kernels::{Backend, GateActivation, HeadRows, InputRounding, Normed, Places};

use crate::ModelError;
use crate::experts::Experts;
use crate::load::Loader;

/// A matrix and perhaps its bias.
pub(crate) struct Linear<B: Backend> {
    pub(crate) weight: B::Weight,
    pub(crate) bias: Option<B::Buffer>,
}

/// Query `(H * D, C)`, key and value `(K * D, C)`.
pub(crate) struct Qkv<B: Backend> {
    weights: [B::Weight; 3],
    biases: Option<[B::Buffer; 3]>,
}

/// Norm weights of queries and keys.
pub(crate) struct QkNorms<B: Backend> {
    pub(crate) query: B::Buffer, // (D), or (H * D)
    pub(crate) key: B::Buffer,   // (D), or (K * D)
}

/// The weights of one block; norms that its family lacks are `None`.
pub(crate) struct Layer<B: Backend> {
    pub(crate) attention_norm: Option<B::Buffer>, // (C)
    pub(crate) qkv: Qkv<B>,
    pub(crate) qk_norm: Option<QkNorms<B>>,
    pub(crate) attention_out: Linear<B>, // (C, H * D)
    pub(crate) attention_post_norm: Option<B::Buffer>, // (C)
    pub(crate) ffn_norm: Option<B::Buffer>, // (C)
    pub(crate) ffn: Ffn<B>,
    pub(crate) ffn_post_norm: Option<B::Buffer>, // (C)
}

/// The network of a block.
pub(crate) enum Ffn<B: Backend> {
    Dense(Dense<B>),
    Experts(Experts<B>),
}

/// A gated network: down(activation(gate x) · up x).
pub(crate) struct Dense<B: Backend> {
    gate: B::Weight,            // (F, C)
    up: B::Weight,              // (F, C)
    pub(crate) down: Linear<B>, // (C, F)
}

impl<B: Backend> Layer<B> {
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &DecoderConfig,
        layer_idx: usize,
    ) -> Result<Self, ModelError> {
        let width = config.width;
        let mut norm = |part: &str, len: usize, blocks: &[BlockNorms]| {
            let name = tensor_name(layer_idx, part);
            let wanted = blocks.contains(&config.blocks);
            wanted.then(|| loader.vector(&name, len)).transpose()
        };
        let (pre, sandwich) = (BlockNorms::Pre, BlockNorms::Sandwich);
        let (post, parallel) = (BlockNorms::Post, BlockNorms::Parallel);
        let attention_norm = norm("attn_norm.weight", width, &[pre, sandwich, parallel])?;
        let attention_post_norm = norm("post_attention_norm.weight", width, &[sandwich, post])?;
        let ffn_norm = norm("ffn_norm.weight", width, &[pre, sandwich])?;
        let ffn_post_norm = norm("post_ffw_norm.weight", width, &[sandwich, post])?;
        Ok(Self {
            attention_norm,
            attention_post_norm,
            ffn_norm,
            ffn_post_norm,
            qkv: Qkv::load(loader, config, layer_idx)?,
            qk_norm: load_qk_norm(loader, config, layer_idx)?,
            attention_out: Linear::load(
                loader,
                &tensor_name(layer_idx, "attn_output"),
                (width, config.query_width()),
                attention_rounding(config.blocks),
            )?,
            ffn: Ffn::load(loader, config, layer_idx)?,
        })
    }
}

/// Rounding the attention's output once costs SmolLM2-135M 1e-4 nats, and the other inputs of this
/// size ten times that; with a norm behind it, Gemma 3 270M loses 6e-4.
fn attention_rounding(blocks: BlockNorms) -> InputRounding {
    match blocks {
        BlockNorms::Pre | BlockNorms::Parallel => InputRounding::Once,
        BlockNorms::Sandwich | BlockNorms::Post => InputRounding::Twice,
    }
}

fn load_qk_norm<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &DecoderConfig,
    layer_idx: usize,
) -> Result<Option<QkNorms<B>>, ModelError> {
    let (query, key) = match config.qk_norm {
        None => return Ok(None),
        Some(QkNorm::Heads) => (config.head_dim, config.head_dim),
        Some(QkNorm::Whole) => (config.query_width(), config.kv_width()),
    };
    let query = loader.vector(&tensor_name(layer_idx, "attn_q_norm.weight"), query)?;
    let key = loader.vector(&tensor_name(layer_idx, "attn_k_norm.weight"), key)?;
    Ok(Some(QkNorms { query, key }))
}

impl<B: Backend> Linear<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        stem: &str,
        (rows, columns): (usize, usize),
        rounding: InputRounding,
    ) -> Result<Self, ModelError> {
        let weight = loader.matrix(&format!("{stem}.weight"), (rows, columns), rounding)?;
        let bias = loader.bias(&format!("{stem}.bias"), &[rows])?.and_then(|mut parts| parts.pop());
        Ok(Self { weight, bias })
    }
}

impl<B: Backend> Qkv<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        config: &DecoderConfig,
        layer_idx: usize,
    ) -> Result<Self, ModelError> {
        let (query, kv, width) = (config.query_width(), config.kv_width(), config.width);
        let three = "three parts were asked for";
        if config.storage.fused_qkv {
            let rows = [query, kv, kv];
            let weights = loader.parts(
                &tensor_name(layer_idx, "attn_qkv.weight"),
                &rows,
                width,
                InputRounding::Twice,
            )?;
            let biases = loader.bias(&tensor_name(layer_idx, "attn_qkv.bias"), &rows)?;
            return Ok(Self {
                weights: weights.try_into().ok().expect(three),
                biases: biases.map(|biases| biases.try_into().ok().expect(three)),
            });
        }
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (part, rows) in [("attn_q", query), ("attn_k", kv), ("attn_v", kv)] {
            let linear = Linear::load(
                loader,
                &tensor_name(layer_idx, part),
                (rows, width),
                InputRounding::Twice,
            )?;
            weights.push(linear.weight);
            biases.push(linear.bias);
        }
        // A part without a bias beside one with: its bias is zero.
        let any = biases.iter().any(Option::is_some);
        let mut all = Vec::new();
        for (bias, rows) in biases.into_iter().zip([query, kv, kv]) {
            all.push(bias.map_or_else(|| loader.backend.buffer(rows), Ok)?);
        }
        Ok(Self {
            weights: weights.try_into().ok().expect(three),
            biases: any.then(|| all.try_into().ok().expect(three)),
        })
    }

    pub(crate) fn run(
        &self,
        backend: &B,
        input: &B::Buffer,
        n_rows: usize,
        outs: [&mut B::Buffer; 3],
    ) {
        let biases = self.biases.as_ref().map(|biases| biases.each_ref());
        backend.linear_qkv(input, n_rows, self.weights.each_ref(), biases, outs);
    }

    pub(crate) fn run_normed(
        &self,
        backend: &B,
        input: Normed<'_, B::Buffer>,
        outs: [&mut B::Buffer; 3],
    ) {
        let biases = self.biases.as_ref().map(|biases| biases.each_ref());
        backend.norm_qkv(input, self.weights.each_ref(), biases, outs);
    }

    pub(crate) fn run_placed(
        &self,
        backend: &B,
        input: Normed<'_, B::Buffer>,
        heads: HeadRows<'_, B::Buffer>,
        places: Places<'_, B::KvPool>,
    ) {
        let biases = self.biases.as_ref().map(|biases| biases.each_ref());
        backend.norm_place(input, self.weights.each_ref(), biases, heads, places);
    }
}

/// The kernels' name of a gate.
pub(crate) fn activation(config: &DecoderConfig) -> GateActivation {
    match config.gate {
        GateKind::Silu => GateActivation::Silu,
        GateKind::GeluTanh => GateActivation::GeluTanh,
    }
}

impl<B: Backend> Ffn<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        config: &DecoderConfig,
        layer_idx: usize,
    ) -> Result<Self, ModelError> {
        let (width, ffn_width) = (config.width, config.ffn_width);
        if let Some(experts) = config.experts.filter(|_| config.layers[layer_idx].has_experts) {
            return Ok(Ffn::Experts(Experts::load(loader, config, experts, layer_idx)?));
        }
        let name = |part: &str| tensor_name(layer_idx, part);
        // Half of a layer's weights are here, and they tolerate the single rounding best.
        let once = InputRounding::Once;
        let (gate, up) = if config.storage.fused_gate_up {
            let rows = [ffn_width, ffn_width];
            let mut parts = loader.parts(&name("ffn_up.weight"), &rows, width, once)?;
            let up = parts.pop().expect("two parts were asked for");
            (parts.pop().expect("two parts were asked for"), up)
        } else {
            let gate = loader.matrix(&name("ffn_gate.weight"), (ffn_width, width), once)?;
            (gate, loader.matrix(&name("ffn_up.weight"), (ffn_width, width), once)?)
        };
        let down =
            Linear::load(loader, &name("ffn_down"), (width, ffn_width), InputRounding::Twice)?;
        Ok(Ffn::Dense(Dense { gate, up, down }))
    }
}

impl<B: Backend> Dense<B> {
    /// `gated` becomes activation(gate x) · up x, through a norm where there is one.
    pub(crate) fn open(
        &self,
        backend: &B,
        input: NetworkInput<'_, B>,
        config: &DecoderConfig,
        gated: &mut B::Buffer,
    ) {
        let (gate, up, activation) = (&self.gate, &self.up, activation(config));
        match input {
            NetworkInput::Plain(x, n_rows) => {
                backend.linear_gate(x, n_rows, gate, up, activation, gated);
            }
            NetworkInput::Normed(x) => backend.norm_gate(x, gate, up, activation, gated),
        }
    }
}

/// The rows that a network reads.
pub(crate) enum NetworkInput<'a, B: Backend> {
    Plain(&'a B::Buffer, usize),
    Normed(Normed<'a, B::Buffer>),
}
