//! Configurations and vocabularies that contradict their file or themselves.

use exrail_checkpoint::{
    BertConfig, DecoderConfig, Gguf, LoadError, Pooling, RopeScaling, VocabularyTable,
};
use exrail_tensor::DType;
use exrail_testkit::{GgufValue, GgufWriter, tiny_bert};

/// One key or tensor of a minimal decoder replaced, or left out when `None`.
#[derive(Default)]
struct Change<'a> {
    key: Option<(&'a str, Option<GgufValue>)>,
    tensor: Option<(&'a str, Option<&'a [usize]>)>,
    extra_tensor: Option<(&'a str, &'a [usize])>,
}

/// A decoder with one layer, width 8, 2 heads of 4, FFN 16, vocabulary 6 and 5 tokens.
fn minimal(change: &Change<'_>) -> Gguf {
    let texts = |list: &[&str]| GgufValue::Texts(list.iter().map(|&t| t.to_owned()).collect());
    let mut keys: Vec<(&str, GgufValue)> = vec![
        ("general.architecture", "llama".into()),
        ("llama.block_count", 1.into()),
        ("llama.context_length", 64.into()),
        ("llama.embedding_length", 8.into()),
        ("llama.feed_forward_length", 16.into()),
        ("llama.attention.head_count", 2.into()),
        ("llama.attention.head_count_kv", 1.into()),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5.into()),
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.tokens", texts(&["a", "b", "c", "d", "e"])),
        ("tokenizer.ggml.token_type", GgufValue::I32s(vec![1; 5])),
        ("tokenizer.ggml.bos_token_id", 0.into()),
    ];
    if let Some((key, value)) = &change.key {
        keys.retain(|(name, _)| name != key);
        keys.extend(value.clone().map(|value| (*key, value)));
    }
    let mut tensors: Vec<(&str, &[usize])> = vec![
        ("token_embd.weight", &[6, 8]),
        ("output_norm.weight", &[8]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[4, 8]),
        ("blk.0.attn_v.weight", &[4, 8]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("blk.0.ffn_gate.weight", &[16, 8]),
        ("blk.0.ffn_up.weight", &[16, 8]),
        ("blk.0.ffn_down.weight", &[8, 16]),
    ];
    if let Some((name, shape)) = change.tensor {
        tensors.retain(|(other, _)| *other != name);
        tensors.extend(shape.map(|shape| (name, shape)));
    }
    tensors.extend(change.extra_tensor);
    let mut writer = GgufWriter::new();
    for (key, value) in keys {
        writer = writer.key(key, value);
    }
    for (name, shape) in tensors {
        let values = vec![1.0_f32; shape.iter().product()];
        let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer = writer.tensor(name, DType::F32, shape, &data);
    }
    Gguf::parse(writer.finish()).expect("a valid container")
}

fn with_key(key: &str, value: impl Into<GgufValue>) -> Gguf {
    minimal(&Change { key: Some((key, Some(value.into()))), ..Change::default() })
}

#[test]
fn defaults_fill_absent_keys() {
    let config = DecoderConfig::from_gguf(&minimal(&Change::default())).unwrap();
    assert_eq!((config.head_dim, config.ropes[0].dim, config.vocab_size), (4, 4, 6));
    assert!((config.ropes[0].theta - 10_000.0).abs() < f32::EPSILON);
    assert!(config.tied_head);
    let table = VocabularyTable::from_gguf(&minimal(&Change::default())).unwrap();
    assert_eq!((table.pre.as_str(), table.tokens.len(), table.eos), ("default", 5, None));
}

#[test]
fn impossible_or_unsupported_values_are_refused_by_name() {
    for (key, value) in [
        ("general.architecture", GgufValue::from("qwen9")),
        ("llama.block_count", 0.into()),
        ("llama.block_count", 100_000.into()),
        ("llama.context_length", 0.into()),
        ("llama.context_length", u32::MAX.into()),
        ("llama.attention.head_count", 0.into()),
        ("llama.attention.head_count", 3.into()),
        ("llama.attention.head_count_kv", 3.into()),
        ("llama.attention.head_count_kv", 0.into()),
        ("llama.attention.key_length", 0.into()),
        ("llama.attention.value_length", 8.into()),
        ("llama.attention.layer_norm_rms_epsilon", 0.0.into()),
        ("llama.attention.layer_norm_rms_epsilon", f32::NAN.into()),
        ("llama.rope.freq_base", f32::INFINITY.into()),
        ("llama.rope.freq_base", (-1.0).into()),
        ("llama.rope.dimension_count", 3.into()),
        ("llama.rope.dimension_count", 6.into()),
        ("llama.rope.scaling.type", "longrope".into()),
        ("llama.rope.scale_linear", (-2.0).into()),
        ("llama.expert_count", 5000.into()),
        ("llama.vocab_size", 0.into()),
    ] {
        let error = DecoderConfig::from_gguf(&with_key(key, value.clone())).unwrap_err();
        let LoadError::BadValue { key: named, .. } = &error else {
            panic!("{key} = {value:?}: {error}");
        };
        assert_eq!(named, key, "{error}");
    }
    let error = DecoderConfig::from_gguf(&with_key("llama.block_count", "1")).unwrap_err();
    assert!(matches!(error, LoadError::WrongKeyType { .. }), "{error}");
}

#[test]
fn missing_keys_are_named() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let gguf = minimal(&Change { key: Some((key, None)), ..Change::default() });
        let error = DecoderConfig::from_gguf(&gguf).unwrap_err();
        assert!(matches!(&error, LoadError::MissingKey { key: k } if k == key), "{error}");
    }
}

#[test]
fn sizes_must_agree_with_tensors() {
    for (key, value) in [
        ("llama.embedding_length", 16),
        ("llama.feed_forward_length", 32),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 8),
        ("llama.attention.key_length", 1 << 31),
        ("llama.vocab_size", 7),
    ] {
        let error = DecoderConfig::from_gguf(&with_key(key, value)).unwrap_err();
        assert!(matches!(error, LoadError::WrongShape { .. }), "{key}: {error}");
    }
    let error = DecoderConfig::from_gguf(&with_key("llama.block_count", 2)).unwrap_err();
    assert_eq!(error.to_string(), "tensor `blk.1.attn_norm.weight` is missing, expected shape [8]");
    let shape: &[usize] = &[8, 6];
    for name in ["token_embd.weight", "blk.0.ffn_down.weight", "blk.0.attn_norm.weight"] {
        for shape in [None, Some(shape), Some(&[8, 8, 1])] {
            let change = Change { tensor: Some((name, shape)), ..Change::default() };
            let error = DecoderConfig::from_gguf(&minimal(&change)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}

#[test]
fn a_tensor_that_would_be_ignored_is_refused() {
    for name in [
        "blk.0.attn_norm.bias",
        "blk.1.attn_q.weight",
        "blk.00.attn_q.weight",
        "blk.0.attn_q_norm.weight",
        "x",
    ] {
        let change = Change { extra_tensor: Some((name, &[8])), ..Change::default() };
        let error = DecoderConfig::from_gguf(&minimal(&change)).unwrap_err();
        let LoadError::UnexpectedTensor { tensor, .. } = &error else { panic!("{error}") };
        assert_eq!(tensor, name);
    }
}

#[test]
fn rope_factors_are_read_and_checked() {
    let with = |shape| {
        let extra_tensor = Some(("rope_freqs.weight", shape));
        DecoderConfig::from_gguf(&minimal(&Change { extra_tensor, ..Change::default() }))
    };
    assert_eq!(with(&[2]).unwrap().ropes[0].scaling, RopeScaling::Factors(vec![1.0; 2]));
    assert!(matches!(with(&[4]), Err(LoadError::WrongShape { .. })));
}

#[test]
fn e11_contradictory_vocabularies_are_refused_by_name() {
    let tokens = |n: usize| GgufValue::Texts((0..n).map(|i| i.to_string()).collect());
    for (key, value) in [
        // Seven tokens do not fit in six embedding rows.
        ("tokenizer.ggml.tokens", tokens(7)),
        ("tokenizer.ggml.tokens", tokens(0)),
        ("tokenizer.ggml.token_type", GgufValue::I32s(vec![1; 4])),
        ("tokenizer.ggml.token_type", GgufValue::I32s(vec![1, 1, 1, 1, 99])),
        ("tokenizer.ggml.scores", GgufValue::F32s(vec![0.0; 6])),
        ("tokenizer.ggml.bos_token_id", 5.into()),
        ("tokenizer.ggml.eot_token_id", u32::MAX.into()),
        ("tokenizer.ggml.eos_token_id", GgufValue::I32(-1)),
    ] {
        let error = VocabularyTable::from_gguf(&with_key(key, value)).unwrap_err();
        assert!(matches!(&error, LoadError::BadValue { key: k, .. } if k == key), "{error}");
    }
    // G3: a wrong element type must not be read as text.
    let numbers = GgufValue::I32s(vec![1; 5]);
    let error =
        VocabularyTable::from_gguf(&with_key("tokenizer.ggml.tokens", numbers)).unwrap_err();
    assert!(matches!(error, LoadError::WrongKeyType { .. }), "{error}");
}

#[test]
fn what_a_vocabulary_does_to_text_is_read_or_taken_from_its_kind() {
    let table = |key: &str, value: GgufValue| VocabularyTable::from_gguf(&with_key(key, value));
    let bytes = |type_id: u32| {
        let mut array = type_id.to_le_bytes().to_vec();
        array.extend(3_u64.to_le_bytes());
        array.extend([1, 2, 255]);
        GgufValue::Raw { type_id: 9, bytes: array }
    };
    // Unsigned or signed bytes.
    for type_id in [0, 1] {
        let read = table("tokenizer.ggml.precompiled_charsmap", bytes(type_id)).unwrap();
        assert_eq!(read.precompiled_charsmap, [1, 2, 255]);
    }
    let error = table("tokenizer.ggml.precompiled_charsmap", "x".into()).unwrap_err();
    assert!(matches!(error, LoadError::WrongKeyType { .. }), "{error}");
    let on = |key: &str| table(&format!("tokenizer.ggml.{key}"), GgufValue::Bool(true)).unwrap();
    assert!(on("remove_extra_whitespaces").remove_extra_whitespaces);
    assert!(on("add_eos_token").add_eos && on("add_space_prefix").add_space_prefix);
    assert_eq!(on("normalizer.lowercase").lowercase, Some(true));
    assert_eq!(on("normalizer.strip_accents").strip_accents, Some(true));
    assert_eq!(table("tokenizer.ggml.seperator_token_id", 4.into()).unwrap().separator, Some(4));

    for (model, prefix, bos, eos) in
        [("gpt2", false, false, false), ("llama", true, true, false), ("t5", true, false, true)]
    {
        let read = table("tokenizer.ggml.model", model.into()).unwrap();
        assert_eq!((read.add_space_prefix, read.add_bos, read.add_eos), (prefix, bos, eos));
        assert!(!read.remove_extra_whitespaces && read.precompiled_charsmap.is_empty());
        assert!(read.lowercase.is_none() && !read.strips_right);
    }
    assert!(table("tokenizer.ggml.pre", "tekken".into()).unwrap().add_bos);
}

fn bert_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    tiny_bert(1, dir.path()).expect("a writable folder");
    dir
}

#[test]
fn tiny_bert_is_read() {
    let config = BertConfig::from_dir(bert_folder().path()).unwrap();
    assert_eq!((config.n_layers, config.width, config.n_heads), (2, 64, 4));
    assert_eq!((config.max_positions, config.max_seq_length), (512, 256));
    assert_eq!((config.pooling, config.normalize), (Pooling::Mean, true));
}

#[test]
fn unsupported_encoders_are_refused_by_file_and_field() {
    for (file, from, to, named) in [
        ("config.json", "\"bert\"", "\"roberta\"", "model_type"),
        ("config.json", "\"gelu\"", "\"relu\"", "hidden_act"),
        ("config.json", "\"absolute\"", "\"relative_key\"", "position_embedding_type"),
        ("config.json", "\"num_attention_heads\":4", "\"num_attention_heads\":5", "heads"),
        ("config.json", "\"hidden_size\":64", "\"hidden_size\":0", "hidden_size"),
        ("config.json", "\"vocab_size\":", "\"vocab_size\":-", "config.json"),
        ("config.json", "1e-12", "-1", "layer_norm_eps"),
        ("modules.json", "models.Normalize", "models.Dense", "Dense"),
        ("modules.json", "1_Pooling", "../x", "modules.json: path"),
        ("modules.json", "1_Pooling", "/x", "modules.json: path"),
        ("sentence_bert_config.json", "256", "513", "max_seq_length"),
        ("1_Pooling/config.json", "tokens\":true", "tokens\":false", "pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", "cls_token\":false", "cls_token\":true", "pooling_mode_cls"),
        ("1_Pooling/config.json", "dimension\":64", "dimension\":63", "word_embedding_dimension"),
    ] {
        let dir = bert_folder();
        let path = dir.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file}: {text}");
        std::fs::write(&path, text.replace(from, to)).unwrap();
        let error = BertConfig::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains(named), "{file}: {error}");
        assert!(error.contains(&dir.path().display().to_string()), "{file}: {error}");
    }
}

#[test]
fn a_missing_or_oversized_file_is_named() {
    let dir = bert_folder();
    std::fs::write(dir.path().join("config.json"), vec![b' '; 2 << 20]).unwrap();
    let error = BertConfig::from_dir(dir.path()).unwrap_err();
    assert!(matches!(error.root(), LoadError::LimitExceeded { .. }), "{error}");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    let error = BertConfig::from_dir(dir.path()).unwrap_err();
    assert!(matches!(error, LoadError::Io { .. }), "{error}");
    let dir = bert_folder();
    std::fs::remove_file(dir.path().join("sentence_bert_config.json")).unwrap();
    assert_eq!(BertConfig::from_dir(dir.path()).unwrap().max_seq_length, 512);
}
