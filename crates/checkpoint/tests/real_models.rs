//! The downloaded models, against what their publishers state about them.

use std::path::PathBuf;

use exrail_checkpoint::{
    BertConfig, DecoderConfig, Gguf, Pooling, RopeScaling, SafetensorsFile, Tensors,
    VocabularyTable, sha256_file,
};
use exrail_tensor::DType;

fn model(variable: &str) -> PathBuf {
    std::env::var_os(variable).map(PathBuf::from).expect("run through make test")
}

#[test]
fn smollm2_loads_with_its_published_sizes() {
    let path = model("EXRAIL_TEST_GENERATOR");
    let gguf = Gguf::open(&path).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    assert_eq!((config.n_layers(), config.width, config.n_heads), (30, 576, 9));
    assert_eq!((config.n_kv_heads, config.head_dim, config.ffn_width), (3, 64, 1536));
    assert_eq!((config.vocab_size, config.context_len), (49152, 8192));
    assert!((config.ropes[0].theta - 100_000.0).abs() < f32::EPSILON);
    assert!(config.tied_head && config.ropes[0].scaling == RopeScaling::None);
    assert_eq!(gguf.tensors().count(), 272);
    let q = gguf.require("blk.0.attn_q.weight", &[576, 576]).unwrap();
    assert_eq!(q.dtype, DType::Q4_1);
    assert!(q.to_f32().unwrap().iter().all(|x| x.is_finite()));
    assert!(gguf.chat_template().unwrap().contains("<|im_start|>"));

    let table = VocabularyTable::from_gguf(&gguf).unwrap();
    assert_eq!((table.model.as_str(), table.pre.as_str()), ("gpt2", "smollm"));
    assert_eq!(table.tokens.len(), 49152);
    assert_eq!((table.bos, table.eos, table.add_bos), (Some(1), Some(2), false));

    let mut hashed = 0;
    let mut progress = |n| {
        hashed = n;
        Ok(())
    };
    let digest = sha256_file(&path, &mut progress).unwrap();
    assert_eq!((digest.len(), hashed), (64, gguf.file_len()));
}

#[test]
fn minilm_loads_with_its_published_sizes() {
    let dir = model("EXRAIL_TEST_ENCODER");
    let config = BertConfig::from_dir(&dir).unwrap();
    assert_eq!((config.n_layers, config.width, config.n_heads), (6, 384, 12));
    assert_eq!((config.ffn_width, config.vocab_size), (1536, 30522));
    assert_eq!((config.max_positions, config.max_seq_length), (512, 256));
    assert_eq!((config.pooling, config.normalize), (Pooling::Mean, true));
    let file = SafetensorsFile::open(&dir.join("model.safetensors")).unwrap();
    file.require("embeddings.word_embeddings.weight", &[30522, 384]).unwrap();
    let last = "encoder.layer.5.output.dense.weight";
    let view = file.require(last, &[384, 1536]).unwrap();
    assert!(view.to_f32().unwrap().iter().all(|x| x.is_finite()));
}
