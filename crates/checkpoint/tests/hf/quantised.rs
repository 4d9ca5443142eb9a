//! Folders of packed layers (golden/quantised/folders.py), decoded bit for bit.

use std::collections::BTreeMap;

use exrail_checkpoint::{DecoderConfig, HfFolder, QuantMethod, Tensors, sha256_hex};
use exrail_tensor::DType;
use serde_json::{Value, json};

use crate::folder::{Folder, golden};

const METHODS: [&str; 4] = ["gptq", "awq", "exl2", "exl3"];

fn packed(method: &str) -> Folder {
    Folder::read(&format!("quantised/{method}"))
}

/// What the engine calls a layer of the folder.
fn canonical(layer: &str) -> String {
    let parts = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    if layer == "lm_head" {
        return "output.weight".to_owned();
    }
    let part = layer.strip_prefix("model.layers.0.").unwrap();
    let ours = parts.iter().find(|(theirs, _)| *theirs == part).unwrap().1;
    format!("blk.0.{ours}.weight")
}

#[test]
fn every_packed_layer_equals_the_golden_bit_for_bit() {
    for method in METHODS {
        let path = golden(&format!("quantised/{method}"));
        let digests: BTreeMap<String, String> =
            serde_json::from_slice(&std::fs::read(path.join("digests.json")).unwrap()).unwrap();
        let folder = HfFolder::open(&path).unwrap_or_else(|error| panic!("{error}"));
        for (layer, digest) in &digests {
            let view = folder.tensor(&canonical(layer)).unwrap();
            let rows = if layer == "lm_head" { 320 } else { 128 };
            assert_eq!(view.shape, [rows, 128], "{method}: {layer}");
            if view.dtype == DType::F16 {
                assert_eq!(sha256_hex(&view.bytes), *digest, "{method}: {layer}");
            } else {
                // Repacked; tests/native_blocks.rs compares these with the dequantiser.
                assert_eq!((method, view.dtype), ("gptq", DType::Q4_1), "{layer}");
            }
            assert!(view.to_f32().unwrap().iter().all(|x| x.is_finite()), "{method}: {layer}");
        }
        assert_eq!(folder.names().count(), 12, "{method}");
        assert_eq!(digests.len(), if method.starts_with("exl") { 8 } else { 7 }, "{method}");
    }
}

#[test]
fn packing_does_not_change_the_configuration() {
    for method in METHODS {
        let folder = packed(method).load().unwrap();
        let config = DecoderConfig::from_config_json(&packed(method).0["config.json"]).unwrap();
        assert_eq!(folder.config(), &config);
        assert_eq!(folder.quant_method().unwrap().name(), method);
    }
    let Some(QuantMethod::Gptq(gptq)) = packed("gptq").load().unwrap().quant_method() else {
        panic!("quantize_config.json")
    };
    assert_eq!((gptq.bits, gptq.group_size), (4, Some(32)));
}

#[test]
fn a_bias_of_zeros_is_ignored_and_another_refused() {
    let bias = "model.layers.0.mlp.down_proj.bias";
    assert_eq!(packed("gptq").load().unwrap().ignored(), [bias]);
    let changed = packed("gptq").weights(|tensors| tensors.get_mut(bias).unwrap().bytes[1] = 0x3c);
    assert_eq!(
        changed.refusal(),
        format!("tensor `{bias}` is not part of a `llama` model as supported here")
    );
}

#[test]
fn a_packed_head_is_used_although_the_embedding_is_tied() {
    for method in ["exl2", "exl3"] {
        let folder = packed(method).config("tie_word_embeddings", json!(true)).load().unwrap();
        assert!(!folder.config().tied_head);
        assert_eq!(folder.info("output.weight").unwrap().shape, [320, 128]);
    }
}

#[test]
fn padding_of_packed_layers_is_cut() {
    for method in ["exl2", "exl3"] {
        let whole = packed(method).load().unwrap();
        let folder = packed(method).config("intermediate_size", json!(100)).load().unwrap();
        for (name, shape) in
            [("blk.0.ffn_gate.weight", [100, 128]), ("blk.0.ffn_down.weight", [128, 100])]
        {
            let (whole, cut) = (whole.tensor(name).unwrap(), folder.tensor(name).unwrap());
            assert_eq!(cut.shape, shape, "{method}: {name}");
            for row in 0..shape[0] {
                let (from, to) = (row * 128 * 2, row * shape[1] * 2);
                let len = shape[1] * 2;
                assert_eq!(cut.bytes[to..to + len], whole.bytes[from..from + len], "{name}: {row}");
            }
        }
    }
    // Other methods do not pad.
    let message = packed("awq").config("intermediate_size", json!(100)).refusal();
    assert!(
        message.contains("mlp.gate_proj.weight") && message.contains("[100, 128]"),
        "{message}"
    );
    let message = packed("exl3").config("vocab_size", json!(256)).refusal();
    assert!(message.contains("model.embed_tokens.weight"), "{message}");
}

#[test]
fn matrices_that_a_quantiser_has_split_are_separate() {
    let folder = packed("exl3").config("model_type", json!("phi3")).load().unwrap();
    assert!(!folder.config().storage.fused_qkv && !folder.config().storage.fused_gate_up);
    assert_eq!(folder.info("blk.0.attn_q.weight").unwrap().shape, [128, 128]);
    let fused = Folder::family("phi3").load().unwrap();
    assert!(fused.config().storage.fused_qkv && fused.config().storage.fused_gate_up);
}

#[test]
fn an_index_of_the_original_model_is_not_followed() {
    let index = json!({"weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}});
    let name = "model.safetensors.index.json";
    let folder = packed("exl2").with(name, index.to_string());
    assert_eq!(folder.load().unwrap().names().count(), 12);
    // Other methods do not leave one.
    let folder = packed("awq").without("model.safetensors").with(name, index.to_string());
    assert!(folder.refusal().contains("model-00001-of-00009.safetensors"));
}

#[test]
fn settings_that_change_the_weights_are_refused_by_name() {
    let gptq = |change: Value| {
        packed("gptq").json("quantize_config.json", |config| {
            config.extend(change.as_object().unwrap().clone());
        })
    };
    for (change, part) in [
        (json!({"pack_dtype": "int8"}), "quantization_config.pack_dtype"),
        (json!({"is_marlin_format": true}), "quantization_config.is_marlin_format"),
        (json!({"checkpoint_format": "marlin"}), "found marlin"),
        (json!({"bits": 5}), "found 5"),
        (json!({"quant_method": "hqq"}), "found hqq"),
        (json!({"group_size": null}), "quantization_config.group_size"),
    ] {
        let message = gptq(change).refusal();
        assert!(message.contains(part) && message.contains("quantize_config.json"), "{message}");
    }
    let empty = gptq(json!({"dynamic": {}, "quant_method": "gptq", "pack_dtype": "int32"}));
    assert!(empty.load().is_ok());
    // Layers of GPTQ say their own widths.
    assert!(gptq(json!({"dynamic": {"-:.*up.*": {}}})).load().is_ok());
    let awq = packed("awq").json("config.json", |config| {
        config["quantization_config"]["dynamic"] = json!({"-:.*down.*": {}});
    });
    assert!(awq.refusal().contains("quantization_config.dynamic"));
    let awq = packed("awq").json("config.json", |config| {
        config["quantization_config"]["zero_point"] = json!(false);
    });
    let message = awq.refusal();
    assert!(message.contains("config.json: `quantization_config.zero_point`"), "{message}");
    let both = gptq(json!({})).config(
        "quantization_config",
        json!({"quant_method": "gptq", "bits": 8, "group_size": 32}),
    );
    assert!(both.refusal().contains("as in config.json"), "{}", both.refusal());
    for method in ["bitsandbytes", "fp8", "compressed-tensors"] {
        let config = json!({"quant_method": method, "bits": 4});
        let message = Folder::family("llama").config("quantization_config", config).refusal();
        assert!(message.contains(&format!("expected gptq, awq, exl2 or exl3, found {method}")));
    }
}

#[test]
fn packed_layers_without_a_part_or_a_method_are_refused() {
    for (method, part) in [
        ("gptq", "qweight"),
        ("gptq", "scales"),
        ("awq", "qzeros"),
        ("exl3", "trellis"),
        ("exl3", "svh"),
    ] {
        let name = format!("model.layers.0.mlp.up_proj.{part}");
        let folder = packed(method).weights(|tensors| drop(tensors.remove(&name).unwrap()));
        assert!(folder.refusal().contains(&format!("`{name}`: expected a tensor")), "{method}");
    }
    let folder = packed("exl3").config("quantization_config", None);
    let message = folder.refusal();
    assert!(message.contains("tensor `lm_head.") && message.contains("not part of"), "{message}");
    // Fewer input features than the configuration says.
    let name = "model.layers.0.mlp.up_proj.qweight";
    let folder = packed("awq").weights(|tensors| {
        let stored = tensors.get_mut(name).unwrap();
        stored.shape[0] = 64;
        stored.bytes.truncate(64 * 16 * 4);
    });
    assert_eq!(
        folder.refusal(),
        "tensor `model.layers.0.mlp.up_proj.weight`: expected shape [128, 128] from the \
         configuration, found [128, 64]"
    );
    let beside = packed("gptq").weights(|tensors| {
        let dense = tensors["lm_head.weight"].clone();
        tensors.insert("model.layers.0.mlp.up_proj.weight".to_owned(), dense);
    });
    assert!(beside.refusal().contains("occurs twice"), "{}", beside.refusal());
}
