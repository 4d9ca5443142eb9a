//! Safetensors files: what loads, and what must be refused.

use exrail_checkpoint::{LoadError, RawType, SafetensorsFile, Tensors};
use exrail_tensor::DType;
use exrail_testkit::safetensors_bytes;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn sample() -> Vec<u8> {
    let values = |n: u8| (0..n).map(f32::from).collect();
    safetensors_bytes(&[
        ("b".to_owned(), vec![2, 3], values(6)),
        ("a".to_owned(), vec![4], values(4)),
    ])
}

#[test]
fn values_survive_the_file() {
    let parsed = SafetensorsFile::parse(sample()).unwrap();
    assert_eq!(parsed.names().collect::<Vec<_>>(), ["a", "b"]);
    let b = parsed.require("b", &[2, 3]).unwrap();
    assert_eq!(b.to_f32().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert!(matches!(parsed.require("b", &[3, 2]), Err(LoadError::WrongShape { .. })));
    assert!(matches!(parsed.require("c", &[1]), Err(LoadError::MissingTensor { .. })));
}

#[test]
fn opening_equals_parsing() {
    let named = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(named.path(), sample()).unwrap();
    let opened = SafetensorsFile::open(named.path()).unwrap();
    assert_eq!(opened.tensors().count(), 2);
    assert_eq!(opened.file_len(), sample().len() as u64);
}

#[test]
fn half_types_are_kept_and_integers_skipped() {
    let header = r#"{"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},
        "b":{"dtype":"BF16","shape":[1,2],"data_offsets":[4,8]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}"#;
    let data = [0, 0x3c, 0, 0xc0, 0x80, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let parsed = SafetensorsFile::parse(file(header, &data)).unwrap();
    assert_eq!(parsed.tensor("h").unwrap().to_f32().unwrap(), [1.0, -2.0]);
    let b = parsed.tensor("b").unwrap();
    assert_eq!((b.dtype, b.to_f32().unwrap()), (DType::BF16, vec![1.0, 0.0]));
    assert!(parsed.tensor("ids").is_none());
    assert_eq!(parsed.names().collect::<Vec<_>>(), ["b", "h"]);
    assert_eq!(parsed.stored_names().collect::<Vec<_>>(), ["b", "h", "ids"]);
    assert_eq!(parsed.stored_type("ids").as_deref(), Some("I64"));
}

#[test]
fn packed_tensors_are_given_as_they_are() {
    let header = r#"{"w":{"dtype":"I32","shape":[1,2],"data_offsets":[0,8]},
        "s":{"dtype":"I16","shape":[1],"data_offsets":[8,10]},
        "h":{"dtype":"F16","shape":[],"data_offsets":[10,12]},
        "b":{"dtype":"BF16","shape":[1],"data_offsets":[12,14]}}"#;
    let parsed = SafetensorsFile::parse(file(header, &(0..14).collect::<Vec<u8>>())).unwrap();
    let raw = parsed.raw("w").unwrap();
    assert_eq!(
        (raw.dtype, raw.shape, raw.bytes),
        (RawType::I32, &[1, 2][..], &[0, 1, 2, 3, 4, 5, 6, 7][..])
    );
    assert_eq!(parsed.raw("s").unwrap().bytes, [8, 9]);
    let half = parsed.raw("h").unwrap();
    assert_eq!((half.dtype, half.shape, half.bytes), (RawType::F16, &[][..], &[10, 11][..]));
    assert!(parsed.raw("b").is_none() && parsed.raw("x").is_none());
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let bytes = sample();
    for len in 0..bytes.len() {
        assert!(SafetensorsFile::parse(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn hostile_headers_are_refused() {
    for length in [1 << 60, u64::MAX, 99_999_999] {
        let mut bytes = sample();
        bytes[..8].copy_from_slice(&u64::to_le_bytes(length));
        let error = SafetensorsFile::parse(bytes).unwrap_err();
        assert!(matches!(error, LoadError::LimitExceeded { .. }), "{error}");
    }
    for header in [
        "",
        "{",
        "[]",
        r#"{"a":1}"#,
        r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,10]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
    ] {
        let error = SafetensorsFile::parse(file(header, &[0; 12])).unwrap_err();
        assert!(matches!(error, LoadError::Safetensors { .. }), "{header}: {error}");
    }
    let doubles = r#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#;
    let error = SafetensorsFile::parse(file(doubles, &[0; 8])).unwrap_err();
    assert!(error.to_string().contains("format F64 is not supported"), "{error}");
}
