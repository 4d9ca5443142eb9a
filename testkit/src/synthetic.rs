//! Model files of real shapes with random weights, for measuring speed and memory: what they say is
//! noise.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use exrail_tensor::{Block, BlockQ4_0, BlockQ6_K, BlockQ8_0, DType, quantize};

use crate::tiny_llama::{add_tokenizer, filled_tokens};
use crate::{GgufWriter, Random};

/// Sizes of a decoder of architecture `llama`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyntheticLlama {
    /// What the sizes are those of.
    pub name: &'static str,
    /// Layers.
    pub n_layers: usize,
    /// Model width.
    pub width: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Head width.
    pub head_dim: usize,
    /// FFN width.
    pub ffn_width: usize,
    /// Vocabulary.
    pub vocab_size: usize,
    /// Base of the rotation.
    pub rope_base: f32,
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// The shapes that speed is compared on.
pub const SYNTHETIC_LLAMAS: [SyntheticLlama; 5] = [
    SyntheticLlama {
        name: "llama-2-7b",
        n_layers: 32,
        width: 4096,
        n_heads: 32,
        n_kv_heads: 32,
        head_dim: 128,
        ffn_width: 11_008,
        vocab_size: 32_000,
        rope_base: 10_000.0,
        tied: false,
    },
    SyntheticLlama {
        name: "llama-3-8b",
        n_layers: 32,
        width: 4096,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        ffn_width: 14_336,
        vocab_size: 128_256,
        rope_base: 500_000.0,
        tied: false,
    },
    SyntheticLlama {
        name: "llama-3.2-1b",
        n_layers: 16,
        width: 2048,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 64,
        ffn_width: 8192,
        vocab_size: 128_256,
        rope_base: 500_000.0,
        tied: true,
    },
    SyntheticLlama {
        name: "llama-3-70b",
        n_layers: 80,
        width: 8192,
        n_heads: 64,
        n_kv_heads: 8,
        head_dim: 128,
        ffn_width: 28_672,
        vocab_size: 128_256,
        rope_base: 500_000.0,
        tied: false,
    },
    SyntheticLlama {
        name: "smollm2-135m",
        n_layers: 30,
        width: 576,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        ffn_width: 1536,
        vocab_size: 49_152,
        rope_base: 100_000.0,
        tied: true,
    },
];

/// Weights that share a scale: those of a GPTQ or AWQ checkpoint with groups of 128, which `Q4_0` holds
/// in four blocks with the same scale.
const GROUP_BLOCKS: usize = 4;
/// Bytes of a tensor that are made at once.
const CHUNK_BYTES: usize = 4 << 20;
/// The context that the file claims.
const CONTEXT_LEN: u32 = 8192;

#[derive(Clone, Copy)]
enum Kind {
    Norm,
    Int4,
    SixBits,
    EightBits,
}

impl Kind {
    fn dtype(self) -> DType {
        match self {
            Kind::Norm => DType::F32,
            Kind::Int4 => DType::Q4_0,
            Kind::SixBits => DType::Q6_K,
            Kind::EightBits => DType::Q8_0,
        }
    }
}

struct Tensor {
    name: String,
    kind: Kind,
    rows: usize, // 0: a vector
    columns: usize,
}

impl Tensor {
    fn n_bytes(&self) -> usize {
        let row = self.kind.dtype().row_bytes(self.columns).expect("the shapes are whole blocks");
        row * self.rows.max(1)
    }
}

/// Writes a GGUF file: int4 with groups of 128, embedding and head with 6 bits, or 8 where a row is no
/// whole superblocks, all from `seed`.
///
/// # Errors
/// The file cannot be written.
pub fn synthetic_llama(path: &Path, shape: &SyntheticLlama, seed: u64) -> io::Result<()> {
    let tensors = tensors(shape);
    let number = |n: usize| u32::try_from(n).expect("sizes of models");
    let mut writer = GgufWriter::new()
        .key("general.architecture", "llama")
        .key("general.name", shape.name)
        .key("llama.block_count", number(shape.n_layers))
        .key("llama.context_length", CONTEXT_LEN)
        .key("llama.embedding_length", number(shape.width))
        .key("llama.feed_forward_length", number(shape.ffn_width))
        .key("llama.attention.head_count", number(shape.n_heads))
        .key("llama.attention.head_count_kv", number(shape.n_kv_heads))
        .key("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .key("llama.rope.freq_base", shape.rope_base)
        .key("llama.rope.dimension_count", number(shape.head_dim))
        .key("llama.vocab_size", number(shape.vocab_size));
    writer = add_tokenizer(writer, &filled_tokens(shape.vocab_size));
    let mut offset = 0;
    for tensor in &tensors {
        let mut dimensions = vec![tensor.columns as u64];
        if tensor.rows > 0 {
            dimensions.push(tensor.rows as u64);
        }
        let type_id = tensor.kind.dtype().to_ggml();
        writer = writer.raw_tensor(tensor.name.as_bytes(), &dimensions, type_id, offset as u64);
        offset = (offset + tensor.n_bytes()).next_multiple_of(32);
    }
    let mut header = writer.header();
    header.resize(header.len().next_multiple_of(32), 0);
    let mut file = BufWriter::with_capacity(CHUNK_BYTES, File::create(path)?);
    file.write_all(&header)?;
    for tensor in &tensors {
        write(&mut file, tensor, seed)?;
    }
    file.flush()
}

fn tensors(shape: &SyntheticLlama) -> Vec<Tensor> {
    let (width, query, kv) =
        (shape.width, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
    let matrix = |name: String, kind: Kind, rows: usize, columns: usize| Tensor {
        name,
        kind,
        rows,
        columns,
    };
    let norm = |name: String| Tensor { name, kind: Kind::Norm, rows: 0, columns: width };
    // Rows that are no whole superblocks keep eight bits in real files, too.
    let coarse = width.is_multiple_of(DType::Q6_K.block_len());
    let head = if coarse { Kind::SixBits } else { Kind::EightBits };
    let mut all = vec![matrix("token_embd.weight".into(), head, shape.vocab_size, width)];
    for i in 0..shape.n_layers {
        all.push(norm(format!("blk.{i}.attn_norm.weight")));
        for (part, rows, columns) in [
            ("attn_q", query, width),
            ("attn_k", kv, width),
            ("attn_v", kv, width),
            ("attn_output", width, query),
            ("ffn_gate", shape.ffn_width, width),
            ("ffn_up", shape.ffn_width, width),
            ("ffn_down", width, shape.ffn_width),
        ] {
            all.push(matrix(format!("blk.{i}.{part}.weight"), Kind::Int4, rows, columns));
        }
        all.push(norm(format!("blk.{i}.ffn_norm.weight")));
    }
    all.push(norm("output_norm.weight".into()));
    if !shape.tied {
        all.push(matrix("output.weight".into(), head, shape.vocab_size, width));
    }
    all
}

/// Codes without a pattern, and scales that give weights of variance 1 / columns.
fn write(file: &mut impl Write, tensor: &Tensor, seed: u64) -> io::Result<()> {
    let mut random = Random::named(seed, &tensor.name);
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let deviation = 1.0 / (tensor.columns as f32).sqrt();
    let (n_bytes, mut written) = (tensor.n_bytes(), 0);
    let mut chunk = Vec::with_capacity(CHUNK_BYTES + 1024);
    while written < n_bytes {
        chunk.clear();
        while chunk.len() < CHUNK_BYTES && written + chunk.len() < n_bytes {
            match tensor.kind {
                Kind::Norm => chunk.extend(1.0_f32.to_le_bytes()),
                // Uniform codes -8..8 have a deviation of 4.6, -32..32 one of 18.5, -128..128 one of 73.9.
                Kind::Int4 => {
                    let d = half(deviation / 4.6 * spread(&mut random));
                    for _ in 0..GROUP_BLOCKS {
                        let qs = bytes::<16>(&mut random);
                        chunk.extend(BlockQ4_0 { d, qs }.to_bytes());
                    }
                }
                Kind::SixBits => {
                    let d = half(deviation / (18.5 * 4.0) * spread(&mut random));
                    let (ql, qh) = (bytes::<128>(&mut random), bytes::<64>(&mut random));
                    chunk.extend(BlockQ6_K { ql, qh, scales: [4; 16], d }.to_bytes());
                }
                Kind::EightBits => {
                    let d = half(deviation / 73.9 * spread(&mut random));
                    let qs = bytes::<32>(&mut random).map(u8::cast_signed);
                    chunk.extend(BlockQ8_0 { d, qs }.to_bytes());
                }
            }
        }
        file.write_all(&chunk)?;
        written += chunk.len();
    }
    file.write_all(&[0; 32][..written.next_multiple_of(32) - written])
}

/// The bits of the nearest half-precision number.
fn half(x: f32) -> u16 {
    let bytes = quantize(DType::F16, &[x]).expect("F16 has blocks of one");
    u16::from_le_bytes(bytes.try_into().expect("two bytes a number"))
}

/// 0.75 to 1.25.
fn spread(random: &mut Random) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "below 2^10")]
    let part = random.below(1024) as f32 / 1024.0;
    0.75 + part / 2.0
}

fn bytes<const N: usize>(random: &mut Random) -> [u8; N] {
    let mut out = [0; N];
    for part in out.chunks_mut(8) {
        part.copy_from_slice(&random.u64().to_le_bytes()[..part.len()]);
    }
    out
}
