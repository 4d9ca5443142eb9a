//! Model files for measuring load as models do, and their weights look like weights.

use exrail_checkpoint::{DecoderConfig, Gguf};
use exrail_tensor::{DType, dequantize};
use exrail_testkit::{SYNTHETIC_LLAMAS, SyntheticLlama, synthetic_llama};

fn written(shape: &SyntheticLlama) -> Gguf {
    let file = tempfile::NamedTempFile::new().expect("a file");
    synthetic_llama(file.path(), shape, 1).expect("it is written");
    Gguf::open(file.path()).expect("it opens")
}

/// Checks that a matrix has this format, and weights of variance 1 / columns.
fn check_gain(gguf: &Gguf, name: &str, dtype: DType, columns: u32) {
    let tensor = gguf.tensor(name).expect("the tensor is there");
    assert_eq!(tensor.dtype, dtype, "{name}");
    let mut values = vec![0.0; tensor.bytes.len() / dtype.block_bytes() * dtype.block_len()];
    dequantize(dtype, &tensor.bytes, &mut values).expect("whole blocks");
    let squares: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
    let gain = squares / values.len() as f64 * f64::from(columns);
    assert!((0.9..1.1).contains(&gain), "{name}: variance times columns {gain}");
}

#[test]
fn a_head_of_no_whole_superblocks_has_eight_bits() {
    let shape = SyntheticLlama {
        n_layers: 1,
        width: 192,
        n_heads: 3,
        n_kv_heads: 1,
        head_dim: 64,
        ffn_width: 512,
        vocab_size: 700,
        ..SYNTHETIC_LLAMAS[4]
    };
    let gguf = written(&shape);
    assert!(gguf.tensor("output.weight").is_none(), "the head is the embedding");
    check_gain(&gguf, "token_embd.weight", DType::Q8_0, 192);
}

#[test]
fn a_synthetic_model_has_its_shape_and_weights_of_unit_gain() {
    let shape = SyntheticLlama {
        n_layers: 2,
        width: 256,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        ffn_width: 512,
        vocab_size: 700,
        ..SYNTHETIC_LLAMAS[0]
    };
    let gguf = written(&shape);
    let config = DecoderConfig::from_gguf(&gguf).expect("it is a decoder");
    assert_eq!((config.n_layers(), config.width, config.ffn_width), (2, 256, 512));
    assert_eq!((config.n_heads, config.n_kv_heads, config.vocab_size), (4, 2, 700));
    for (name, dtype, columns) in [
        ("blk.1.ffn_down.weight", DType::Q4_0, 512),
        ("blk.0.attn_k.weight", DType::Q4_0, 256),
        ("output.weight", DType::Q6_K, 256),
    ] {
        check_gain(&gguf, name, dtype, columns);
    }
    let tensor = gguf.tensor("blk.0.ffn_up.weight").expect("the tensor is there");
    let groups = tensor.bytes.chunks_exact(4 * DType::Q4_0.block_bytes());
    let scales: Vec<Vec<&[u8]>> = groups
        .map(|group| group.chunks_exact(DType::Q4_0.block_bytes()).map(|b| &b[..2]).collect())
        .collect();
    assert!(scales.iter().all(|group| group.iter().all(|scale| *scale == group[0])));
    assert!(scales.iter().any(|group| group[0] != scales[0][0]), "all groups have one scale");
}
