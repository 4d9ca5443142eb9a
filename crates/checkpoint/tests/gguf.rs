//! GGUF files that must load, and what their views show.

use exrail_checkpoint::{
    DecoderConfig, Gguf, LoadError, Metadata, RopeScaling, Tensors, Value, VocabularyTable,
};
use exrail_tensor::{DType, quantize};
use exrail_testkit::{CHAT_TEMPLATE, GgufValue, GgufWriter, TinyLlama, tiny_llama};

fn parse(bytes: Vec<u8>) -> Gguf {
    Gguf::parse(bytes).expect("a valid file")
}

#[test]
fn tiny_llama_of_every_format_loads_and_its_configuration_agrees() {
    for dtype in DType::ALL {
        for tied in [true, false] {
            let spec = TinyLlama { tied, ..TinyLlama::with_dtype(dtype) };
            let gguf = parse(tiny_llama(1, spec));
            let config = DecoderConfig::from_gguf(&gguf).unwrap();
            assert_eq!(config.n_layers(), spec.n_layers);
            assert_eq!(config.width, spec.width);
            assert_eq!(config.head_dim, spec.width / spec.n_heads);
            assert_eq!(config.n_kv_heads, spec.n_kv_heads);
            assert_eq!(config.ffn_width, spec.ffn_width);
            assert_eq!(config.context_len, spec.context_len);
            assert_eq!(config.tied_head, tied);
            assert_eq!(config.ropes[0].scaling, RopeScaling::None);
            let embedding = gguf.tensor("token_embd.weight").unwrap();
            assert_eq!(embedding.dtype, dtype);
            assert_eq!(embedding.shape, [config.vocab_size, config.width]);
            let table = VocabularyTable::from_gguf(&gguf).unwrap();
            assert_eq!(table.tokens.len(), config.vocab_size);
        }
    }
}

#[test]
fn vocabulary_table_is_what_was_written() {
    let table = VocabularyTable::from_gguf(&parse(tiny_llama(1, TinyLlama::default()))).unwrap();
    assert_eq!((table.model.as_str(), table.pre.as_str()), ("gpt2", "smollm"));
    assert_eq!(table.tokens[..3], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]);
    assert_eq!(table.kinds[..4], [3, 3, 3, 1]);
    assert_eq!((table.bos, table.eos, table.eot), (Some(1), Some(2), None));
    assert_eq!((table.unknown, table.padding), (Some(0), Some(2)));
    assert_eq!(table.merges[0], "Ġ t");
    assert!(table.scores.is_empty() && !table.add_bos && !table.add_space_prefix);
}

#[test]
fn chat_template_and_file_length_are_given() {
    let bytes = tiny_llama(1, TinyLlama::default());
    let len = bytes.len() as u64;
    let gguf = parse(bytes);
    assert_eq!(gguf.chat_template(), Some(CHAT_TEMPLATE));
    assert_eq!(gguf.file_len(), len);
}

#[test]
fn opening_a_file_equals_parsing_its_bytes() {
    let bytes = tiny_llama(5, TinyLlama::with_dtype(DType::Q8_0));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    let (mapped, owned) = (Gguf::open(file.path()).unwrap(), parse(bytes));
    assert!(mapped.metadata().iter().eq(owned.metadata().iter()));
    for (a, b) in mapped.tensors().zip(owned.tensors()) {
        assert_eq!((a.name, a.dtype, a.shape, a.bytes), (b.name, b.dtype, b.shape, b.bytes));
    }
}

#[test]
fn tensor_values_survive_the_file_under_any_alignment() {
    let values: Vec<f32> = (0_u8..12).map(f32::from).collect();
    let data = quantize(DType::F32, &values).unwrap();
    for alignment in [1, 8, 32, 4096] {
        for version in [2, 3] {
            let writer = GgufWriter::new()
                .version(version)
                .alignment(alignment)
                .tensor("a", DType::F32, &[3, 4], &data)
                .tensor("b", DType::F32, &[12], &data);
            let gguf = parse(writer.finish());
            assert_eq!(gguf.version(), version);
            assert_eq!(gguf.require("a", &[3, 4]).unwrap().to_f32().unwrap(), values);
            assert_eq!(gguf.require("b", &[12]).unwrap().to_f32().unwrap(), values);
        }
    }
}

fn keys() -> Metadata {
    let array_of_arrays = [
        [9_u32.to_le_bytes().as_slice(), &1_u64.to_le_bytes()].concat(),
        [7_u32.to_le_bytes().as_slice(), &2_u64.to_le_bytes(), &[1, 0]].concat(),
    ]
    .concat();
    let writer = GgufWriter::new()
        .key("u8", GgufValue::Raw { type_id: 0, bytes: vec![200] })
        .key("i16", GgufValue::Raw { type_id: 3, bytes: vec![0xff, 0xff] })
        .key("u64", GgufValue::U64(1 << 40))
        .key("f64", GgufValue::Raw { type_id: 12, bytes: 0.5_f64.to_le_bytes().to_vec() })
        .key("nested", GgufValue::Raw { type_id: 9, bytes: array_of_arrays })
        .key("text", "täxt")
        .key("yes", true);
    parse(writer.finish()).metadata().clone()
}

#[test]
fn integers_of_any_width_are_read_when_they_fit() {
    let keys = keys();
    assert_eq!(keys.u32("u8").unwrap(), Some(200));
    assert_eq!(keys.u32("absent").unwrap(), None);
    assert_eq!(keys.f32("f64").unwrap(), Some(0.5));
    assert_eq!(keys.str("text").unwrap(), Some("täxt"));
    assert_eq!(keys.bool("yes").unwrap(), Some(true));
    assert!(matches!(keys.get("nested"), Some(Value::Array(_))));
    let order: Vec<&str> = keys.iter().map(|(key, _)| key).collect();
    assert_eq!(order, ["u8", "i16", "u64", "f64", "nested", "text", "yes"]);
}

#[test]
fn a_key_of_another_type_or_range_is_an_error_and_not_absent() {
    let keys = keys();
    assert!(matches!(keys.u32("i16"), Err(LoadError::BadValue { .. })));
    assert!(matches!(keys.u32("u64"), Err(LoadError::BadValue { .. })));
    assert_eq!(
        keys.u32("text").unwrap_err().to_string(),
        "metadata key `text`: expected u32, found string"
    );
    assert!(matches!(keys.strings("nested"), Err(LoadError::WrongKeyType { .. })));
    assert!(matches!(keys.require_str("absent"), Err(LoadError::MissingKey { .. })));
}
