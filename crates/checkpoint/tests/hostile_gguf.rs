//! GGUF files that must be refused, each with its own error.

use exrail_checkpoint::{Gguf, LoadError};
use exrail_tensor::DType;
use exrail_testkit::{GgufValue, GgufWriter, TinyLlama, tiny_llama};

fn refusal(writer: &GgufWriter) -> LoadError {
    Gguf::parse(writer.finish()).expect_err("a hostile file")
}

fn raw_array(element_type: u32, len: u64, rest: &[u8]) -> GgufValue {
    let bytes = [element_type.to_le_bytes().as_slice(), &len.to_le_bytes(), rest].concat();
    GgufValue::Raw { type_id: 9, bytes }
}

#[test]
fn truncation_at_every_byte_of_the_header_is_an_error() {
    let bytes = tiny_llama(1, TinyLlama::default());
    let gguf = Gguf::parse(bytes.clone()).unwrap();
    let data_len: usize = gguf.tensors().map(|view| view.bytes.len()).sum();
    let header_len = bytes.len() - data_len;
    for len in 0..=header_len {
        let error = Gguf::parse(&bytes[..len]).expect_err("a truncated file");
        assert!(matches!(error, LoadError::Truncated { .. }), "{len}: {error}");
    }
    // Without the last byte the last tensor is short.
    let error = Gguf::parse(&bytes[..bytes.len() - 1]).unwrap_err();
    assert!(error.to_string().contains("output_norm.weight"), "{error}");
}

#[test]
fn other_magic_and_versions_are_refused() {
    let found = *b"GGML";
    let error = Gguf::parse(b"GGMLxxxxxxxxxxxxxxxxxxxxxxxx".as_slice()).unwrap_err();
    assert!(matches!(error, LoadError::BadMagic { found: f, .. } if f == found));
    for version in [0, 1, 4, 3_u32.swap_bytes()] {
        let error = refusal(&GgufWriter::new().version(version));
        assert!(matches!(error, LoadError::UnsupportedVersion { found } if found == version));
    }
}

#[test]
fn huge_counts_are_refused_before_memory_is_reserved() {
    for claimed in [1 << 17, u64::from(u32::MAX), u64::MAX] {
        let error = refusal(&GgufWriter::new().claim_tensors(claimed));
        assert!(matches!(error, LoadError::LimitExceeded { found, .. } if found == claimed));
        let error = refusal(&GgufWriter::new().claim_keys(claimed));
        assert!(matches!(error, LoadError::LimitExceeded { found, .. } if found == claimed));
    }
    assert!(matches!(refusal(&GgufWriter::new().claim_keys(100)), LoadError::Truncated { .. }));
    let error = Gguf::parse(GgufWriter::new().claim_tensors(9).header()).unwrap_err();
    assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
    for (type_id, len) in [(0, 1 << 23), (8, 1 << 20), (9, 1 << 20), (12, u64::MAX)] {
        let error = refusal(&GgufWriter::new().key("k", raw_array(type_id, len, &[])));
        let is_size =
            matches!(error, LoadError::Truncated { .. } | LoadError::LimitExceeded { .. });
        assert!(is_size, "{error}");
    }
    let long_text = GgufValue::Raw { type_id: 8, bytes: (1_u64 << 60).to_le_bytes().to_vec() };
    let error = refusal(&GgufWriter::new().key("k", long_text));
    assert!(matches!(error, LoadError::LimitExceeded { .. }), "{error}");
}

#[test]
fn arrays_nested_deeper_than_the_limit_are_refused() {
    let mut rest = Vec::new();
    for _ in 0..1000 {
        rest.extend(9_u32.to_le_bytes());
        rest.extend(1_u64.to_le_bytes());
    }
    let error = refusal(&GgufWriter::new().key("k", raw_array(9, 1, &rest)));
    assert!(error.to_string().contains("nesting of arrays"), "{error}");
}

#[test]
fn wrong_keys_are_refused() {
    let twice = GgufWriter::new().key("k", 1).key("k", 2);
    assert!(matches!(refusal(&twice), LoadError::DuplicateKey { key } if key == "k"));
    let empty = GgufWriter::new().key("", 1);
    assert!(matches!(refusal(&empty), LoadError::EmptyName { .. }));
    let not_text = GgufWriter::new().raw_key(b"k\xff", 1);
    assert!(matches!(refusal(&not_text), LoadError::BadText { at: 1, .. }));
    let unknown = GgufWriter::new().key("k", GgufValue::Raw { type_id: 13, bytes: vec![0; 8] });
    assert!(matches!(refusal(&unknown), LoadError::UnknownValueType { type_id: 13, .. }));
    let unknown = GgufWriter::new().key("k", raw_array(99, 1, &[0; 8]));
    assert!(matches!(refusal(&unknown), LoadError::UnknownValueType { type_id: 99, .. }));
    let not_bool = GgufWriter::new().key("k", GgufValue::Raw { type_id: 7, bytes: vec![2] });
    assert!(matches!(refusal(&not_bool), LoadError::BadValue { .. }));
}

#[test]
fn wrong_alignments_are_refused() {
    for alignment in [0, 3, 48, 1 << 22] {
        let error = refusal(&GgufWriter::new().key("general.alignment", alignment));
        assert!(matches!(error, LoadError::BadValue { .. }), "{error}");
    }
    let error = refusal(&GgufWriter::new().key("general.alignment", "32"));
    assert!(matches!(error, LoadError::WrongKeyType { .. }), "{error}");
}

#[test]
fn wrong_shapes_are_refused() {
    let with = |dimensions: &[u64], dtype: DType| {
        refusal(&GgufWriter::new().raw_tensor(b"t", dimensions, dtype.to_ggml(), 0))
    };
    for dimensions in [&[][..], &[1; 5][..]] {
        let error = with(dimensions, DType::F32);
        assert!(matches!(error, LoadError::BadValue { .. }), "{error}");
    }
    for dimensions in [
        &[0][..],
        &[4, 0],
        &[u64::MAX],
        &[1 << 42, 1 << 42],
        &[1 << 32, 1 << 30],
        &[u64::MAX, u64::MAX, u64::MAX, u64::MAX],
    ] {
        let error = with(dimensions, DType::F32);
        assert!(matches!(error, LoadError::BadShape { .. }), "{dimensions:?}: {error}");
    }
    let error = with(&[576, 2], DType::Q4_K);
    assert_eq!(
        error.to_string(),
        "tensor `t`: a row that is not a whole number of blocks in shape [2, 576] (outermost first)"
    );
    let error = with(&[(1 << 42) + 1], DType::F32);
    assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
}

#[test]
fn a_million_dimensions_are_refused() {
    let mut bytes = GgufWriter::new().claim_tensors(1).header();
    bytes.extend(1_u64.to_le_bytes());
    bytes.extend(b"t");
    bytes.extend(1_000_000_u32.to_le_bytes());
    bytes.resize(4096, 1);
    let error = Gguf::parse(bytes).unwrap_err();
    assert!(matches!(error, LoadError::BadValue { .. }), "{error}");
}

#[test]
fn wrong_offsets_are_refused() {
    let f32_id = DType::F32.to_ggml();
    let base = || GgufWriter::new().raw_data(&[0; 96]).raw_tensor(b"a", &[8], f32_id, 0);
    assert!(Gguf::parse(base().raw_tensor(b"b", &[8], f32_id, 32).finish()).is_ok());
    let misaligned = refusal(&base().raw_tensor(b"b", &[8], f32_id, 40));
    assert!(matches!(misaligned, LoadError::Misaligned { offset: 40, alignment: 32, .. }));
    for offset in [96, 1 << 40, u64::MAX - 31] {
        let outside = refusal(&base().raw_tensor(b"b", &[8], f32_id, offset));
        assert!(matches!(outside, LoadError::Truncated { .. }), "{outside}");
    }
    let partly = refusal(&base().raw_tensor(b"b", &[16], f32_id, 64));
    assert!(matches!(partly, LoadError::Truncated { expected: 64, found: 32, .. }), "{partly}");
    let same = refusal(&base().raw_tensor(b"b", &[8], f32_id, 0));
    assert!(matches!(same, LoadError::Overlap { .. }), "{same}");
    let long = GgufWriter::new()
        .raw_data(&[0; 96])
        .raw_tensor(b"long", &[24], f32_id, 0)
        .raw_tensor(b"inside", &[8], f32_id, 64);
    assert_eq!(refusal(&long).to_string(), "tensors `long` and `inside` overlap in the file");
}

#[test]
fn unsupported_formats_are_named() {
    let with = |type_id| refusal(&GgufWriter::new().raw_tensor(b"t", &[256], type_id, 0));
    assert!(with(16).to_string().contains("format IQ2_XXS is not supported"));
    let supported = DType::ALL.map(|dtype| dtype.to_string()).join(", ");
    assert!(with(16).to_string().ends_with(&supported), "{}", with(16));
    assert!(with(4).to_string().contains("format 4 is not supported"));
    assert!(with(u32::MAX).to_string().contains("4294967295"));
}

#[test]
fn wrong_tensor_names_are_refused() {
    let id = DType::F32.to_ggml();
    let base = || GgufWriter::new().raw_data(&[0; 64]).raw_tensor(b"t", &[8], id, 0);
    let twice = refusal(&base().raw_tensor(b"t", &[8], id, 32));
    assert!(matches!(twice, LoadError::DuplicateTensor { tensor } if tensor == "t"));
    let empty = refusal(&base().raw_tensor(b"", &[8], id, 32));
    assert!(matches!(empty, LoadError::EmptyName { .. }));
    let long = refusal(&base().raw_tensor(&[b'x'; 65], &[8], id, 32));
    assert!(matches!(long, LoadError::LimitExceeded { limit: 64, found: 65, .. }));
}

#[test]
fn a_missing_file_and_a_folder_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("absent.gguf");
    let error = Gguf::open(&path).unwrap_err();
    assert!(error.to_string().contains("absent.gguf"), "{error}");
    let error = Gguf::open(dir.path()).unwrap_err();
    assert!(matches!(error, LoadError::Io { .. }), "{error}");
    std::fs::write(&path, b"").unwrap();
    let error = Gguf::open(&path).unwrap_err();
    assert!(matches!(error.root(), LoadError::Truncated { .. }), "{error}");
    assert!(error.to_string().contains("absent.gguf"), "{error}");
}
