//! Dequantisation against the Python package `gguf`, bit for bit (golden/tensor/make.py).

use exrail_tensor::{DType, dequantize};

const GOLDEN: &str = include_str!("../../../golden/tensor/dequantise.json");

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).expect("ascii"), 16).expect("hex"))
        .collect()
}

#[test]
fn every_format_equals_gguf_bit_for_bit() {
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), DType::ALL.len());
    for case in cases {
        let type_id = u32::try_from(case["ggml_type"].as_u64().unwrap()).unwrap();
        let dtype = DType::from_ggml(type_id).unwrap();
        assert_eq!(case["dtype"].as_str().unwrap(), dtype.to_string());
        let expected: Vec<u32> = unhex(case["values"].as_str().unwrap())
            .chunks(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let mut values = vec![0.0; expected.len()];
        dequantize(dtype, &unhex(case["blocks"].as_str().unwrap()), &mut values).unwrap();
        let found: Vec<u32> = values.iter().map(|x| x.to_bits()).collect();
        assert_eq!(found, expected, "{dtype}");
    }
}
