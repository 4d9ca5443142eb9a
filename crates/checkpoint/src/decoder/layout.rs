//! Which tensors a decoder has, and that a checkpoint has exactly those.
//!
//! Names are those of GGUF files, whatever the checkpoint calls them: `blk.3.attn_q.weight`. One
//! expert's matrix is `blk.3.ffn_gate.7.weight`, or a slice of `blk.3.ffn_gate_exps.weight`.

use std::collections::HashSet;

use super::{BlockNorms, DecoderConfig, QkNorm};
use crate::{LoadError, Tensors};

/// A tensor of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTensor {
    /// Name without the layer, such as `attn_q.weight`.
    pub part: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Whether a checkpoint may lack it: biases.
    pub optional: bool,
}

/// Name of a part of layer `layer_idx`.
#[must_use]
pub fn tensor_name(layer_idx: usize, part: &str) -> String {
    format!("blk.{layer_idx}.{part}")
}

impl DecoderConfig {
    /// The tensors outside the layers with their shapes; the head only when it is not tied.
    #[must_use]
    pub fn outer_tensors(&self) -> Vec<(&'static str, Vec<usize>)> {
        let table = vec![self.vocab_size, self.width];
        let mut tensors =
            vec![("token_embd.weight", table.clone()), ("output_norm.weight", vec![self.width])];
        if !self.tied_head {
            tensors.push(("output.weight", table));
        }
        tensors
    }

    /// The tensors of layer `layer_idx`.
    ///
    /// # Panics
    /// When there is no such layer.
    #[must_use]
    pub fn layer_tensors(&self, layer_idx: usize) -> Vec<LayerTensor> {
        let mut parts = Parts::default();
        self.add_norms(&mut parts);
        self.add_attention(&mut parts);
        match self.experts.filter(|_| self.layers[layer_idx].has_experts) {
            None if self.storage.fused_gate_up => {
                parts.matrix("ffn_up", 2 * self.ffn_width, self.width);
                parts.matrix("ffn_down", self.width, self.ffn_width);
            }
            None => {
                for part in ["ffn_gate", "ffn_up"] {
                    parts.matrix(part, self.ffn_width, self.width);
                }
                parts.matrix_with_bias("ffn_down", self.width, self.ffn_width);
            }
            Some(experts) => {
                parts.matrix("ffn_gate_inp", experts.n_experts, self.width);
                for (part, rows, columns) in [
                    ("ffn_gate", experts.width, self.width),
                    ("ffn_up", experts.width, self.width),
                    ("ffn_down", self.width, experts.width),
                ] {
                    if self.storage.stacked_experts {
                        let shape = vec![experts.n_experts, rows, columns];
                        parts.add(format!("{part}_exps.weight"), shape, false);
                    } else {
                        for expert in 0..experts.n_experts {
                            parts.matrix(&format!("{part}.{expert}"), rows, columns);
                        }
                    }
                }
            }
        }
        parts.0
    }

    fn add_norms(&self, parts: &mut Parts) {
        let names: &[&str] = match self.blocks {
            BlockNorms::Pre => &["attn_norm", "ffn_norm"],
            BlockNorms::Sandwich => {
                &["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"]
            }
            BlockNorms::Post => &["post_attention_norm", "post_ffw_norm"],
            BlockNorms::Parallel => &["attn_norm"],
        };
        for name in names {
            parts.vector(&format!("{name}.weight"), self.width);
        }
        let (query, key) = match self.qk_norm {
            None => return,
            Some(QkNorm::Heads) => (self.head_dim, self.head_dim),
            Some(QkNorm::Whole) => (self.query_width(), self.kv_width()),
        };
        parts.vector("attn_q_norm.weight", query);
        parts.vector("attn_k_norm.weight", key);
    }

    fn add_attention(&self, parts: &mut Parts) {
        let (query, kv) = (self.query_width(), self.kv_width());
        let separate = [("attn_q", query), ("attn_k", kv), ("attn_v", kv)];
        let fused = [("attn_qkv", query + 2 * kv)];
        let inputs: &[(&str, usize)] = if self.storage.fused_qkv { &fused } else { &separate };
        for &(part, rows) in inputs {
            parts.matrix(part, rows, self.width);
            parts.add(format!("{part}.bias"), vec![rows], !self.requires_qkv_bias);
        }
        parts.matrix_with_bias("attn_output", self.width, query);
    }

    /// Checks that `tensors` has every tensor of the decoder in its shape, and no other but those
    /// in `besides`: a bias or a gate that is read past gives fluent nonsense instead of an error.
    pub(crate) fn check_tensors(
        &self,
        tensors: &dyn Tensors,
        besides: &[&str],
    ) -> Result<(), LoadError> {
        let mut known: HashSet<String> = besides.iter().map(|&name| name.to_owned()).collect();
        for (name, shape) in self.outer_tensors() {
            tensors.require_info(name, &shape)?;
            known.insert(name.to_owned());
        }
        for layer_idx in 0..self.n_layers() {
            for tensor in self.layer_tensors(layer_idx) {
                let name = tensor_name(layer_idx, &tensor.part);
                if !tensor.optional || tensors.info(&name).is_some() {
                    tensors.require_info(&name, &tensor.shape)?;
                }
                known.insert(name);
            }
        }
        match tensors.names().find(|&name| !known.contains(name)) {
            None => Ok(()),
            Some(name) => Err(LoadError::UnexpectedTensor {
                tensor: name.to_owned(),
                architecture: self.architecture.clone(),
            }),
        }
    }
}

/// Collects the tensors of a layer.
#[derive(Default)]
struct Parts(Vec<LayerTensor>);

impl Parts {
    fn add(&mut self, part: String, shape: Vec<usize>, optional: bool) {
        self.0.push(LayerTensor { part, shape, optional });
    }

    fn vector(&mut self, part: &str, len: usize) {
        self.add(part.to_owned(), vec![len], false);
    }

    fn matrix(&mut self, part: &str, rows: usize, columns: usize) {
        self.add(format!("{part}.weight"), vec![rows, columns], false);
    }

    fn matrix_with_bias(&mut self, part: &str, rows: usize, columns: usize) {
        self.matrix(part, rows, columns);
        self.add(format!("{part}.bias"), vec![rows], true);
    }
}
