//! Quantised layers against golden/quantised/make.py, bit for bit, and against hostile input.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;

use exrail_checkpoint::{
    LoadError, QuantMethod, RawTensor, RawType, dequantise_layer, layer_shape, native_blocks,
    sha256_hex,
};
use proptest::prelude::*;
use serde_json::{Value, json};

const GOLDEN: &str = include_str!("../../../golden/quantised/layers.json");

#[derive(Clone)]
struct Stored {
    dtype: RawType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

struct Case {
    name: String,
    method: QuantMethod,
    tensors: HashMap<String, Stored>,
    json: Value,
}

fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn sizes(value: &Value) -> Vec<usize> {
    let numbers = value.as_array().unwrap().iter();
    numbers.map(|n| usize::try_from(n.as_u64().unwrap()).unwrap()).collect()
}

fn stored(json: &Value) -> Stored {
    let dtype = match json["type"].as_str().unwrap() {
        "F16" => RawType::F16,
        "I16" => RawType::I16,
        "I32" => RawType::I32,
        other => panic!("type {other}"),
    };
    Stored { dtype, shape: sizes(&json["shape"]), bytes: unhex(json["hex"].as_str().unwrap()) }
}

fn cases() -> Vec<Case> {
    let golden: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
    let case = |json: Value| {
        let tensors = json["tensors"].as_object().unwrap().iter();
        Case {
            name: json["name"].as_str().unwrap().to_owned(),
            method: QuantMethod::from_json(&json["config"]).unwrap(),
            tensors: tensors.map(|(name, t)| (format!("layer.{name}"), stored(t))).collect(),
            json,
        }
    };
    golden.into_iter().map(case).collect()
}

fn look<'a>(tensors: &'a HashMap<String, Stored>, name: &str) -> Option<RawTensor<'a>> {
    let t = tensors.get(name)?;
    Some(RawTensor { dtype: t.dtype, shape: &t.shape, bytes: &t.bytes })
}

#[test]
fn every_layer_equals_the_golden_bit_for_bit() {
    let cases = cases();
    assert_eq!(cases.len(), 38);
    for case in cases {
        let lookup = |name: &str| look(&case.tensors, name);
        let shape = layer_shape(&case.method, "layer", &lookup).unwrap();
        assert_eq!(vec![shape.0, shape.1], sizes(&case.json["shape"]), "{}", case.name);
        let dense = dequantise_layer(&case.method, "layer", &lookup).unwrap();
        assert_eq!((dense.rows, dense.columns), shape);
        let first: Vec<usize> = dense.halves[..4].iter().map(|&h| usize::from(h)).collect();
        assert_eq!(first, sizes(&case.json["first"]), "{}", case.name);
        let bytes: Vec<u8> = dense.halves.iter().flat_map(|h| h.to_le_bytes()).collect();
        assert_eq!(sha256_hex(&bytes), case.json["sha256"].as_str().unwrap(), "{}", case.name);
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let optional = ["g_idx", "mcg", "mul1"];
    for case in cases() {
        for name in case.tensors.keys() {
            let lookup = |asked: &str| look(&case.tensors, asked).filter(|_| asked != name);
            if optional.iter().any(|o| name.ends_with(o)) {
                continue;
            }
            let error = dequantise_layer(&case.method, "layer", &lookup).unwrap_err();
            assert!(error.to_string().contains("layer."), "{error}");
        }
    }
}

#[test]
fn unknown_settings_are_refused_by_name() {
    for (config, part) in [
        (json!({"quant_method": "hqq"}), "hqq"),
        (json!({"bits": 4}), "none"),
        (json!({"quant_method": "gptq", "bits": 5, "group_size": 128}), "5"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), "0"),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}),
            "marlin",
        ),
        (json!({"quant_method": "awq", "bits": 3, "group_size": 128}), "3"),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "ipex"}), "ipex"),
    ] {
        let error = QuantMethod::from_json(&config).unwrap_err();
        assert!(matches!(error, LoadError::BadValue { .. }));
        assert!(error.to_string().ends_with(&format!("found {part}")), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn hostile_layers_never_panic(
        which in 0_usize..38,
        tensor in any::<prop::sample::Index>(),
        dimension in any::<prop::sample::Index>(),
        size in prop::sample::select(vec![0, 1, 3, 8, 16, 64, usize::MAX / 16, usize::MAX]),
        byte in any::<prop::sample::Index>(),
        value in any::<u8>(),
        keep_bytes in any::<bool>(),
    ) {
        static CASES: std::sync::LazyLock<Vec<Case>> = std::sync::LazyLock::new(cases);
        let case = &CASES[which];
        let mut tensors = case.tensors.clone();
        let mut names: Vec<String> = tensors.keys().cloned().collect();
        names.sort();
        let changed = tensors.get_mut(&names[tensor.index(names.len())]).unwrap();
        let at = byte.index(changed.bytes.len());
        changed.bytes[at] = value;
        if !keep_bytes && !changed.shape.is_empty() {
            let at = dimension.index(changed.shape.len());
            changed.shape[at] = size;
            let len = changed.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
            let width = if changed.dtype == RawType::I32 { 4 } else { 2 };
            if let Some(len) = len.filter(|&len| len < 1 << 16) {
                changed.bytes.resize(len * width, value);
            }
        }
        let lookup = |name: &str| look(&tensors, name);
        let shape = layer_shape(&case.method, "layer", &lookup);
        if let Ok(dense) = dequantise_layer(&case.method, "layer", &lookup) {
            prop_assert_eq!((dense.rows, dense.columns), shape.unwrap());
            prop_assert_eq!(dense.halves.len(), dense.rows * dense.columns);
        }
        if let Ok(Some(blocks)) = native_blocks(&case.method, "layer", &lookup) {
            let row_bytes = blocks.dtype.row_bytes(blocks.columns);
            prop_assert_eq!(row_bytes.map(|n| n * blocks.rows), Some(blocks.bytes.len()));
        }
    }
}
