//! What comes out loads, natively, and runs near the original.

use exrail_checkpoint::{HfFolder, Tensors};
use exrail_quantize::{MANIFEST, Manifest, Method};
use exrail_tensor::{DType, IntGrid};

use crate::{calibration, family, ids, logits, mean_kld, options, quantised};

const FAMILIES: [&str; 14] = [
    "llama-llama3",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3_moe-mixed",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "granite",
    "cohere2",
    "olmo2",
];

#[test]
fn every_family_loads_natively_and_int8_is_nearer_than_int4() {
    let tokens = ids(40, 9);
    for name in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let reference = logits(&family(name), &tokens);
        let mut klds = Vec::new();
        for (grid, dtype) in [(IntGrid::Int8, DType::Q8_0), (IntGrid::Int4, DType::Q4_0)] {
            let destination = dir.path().join(dtype.to_string());
            let manifest = quantised(&family(name), &destination, &options(grid, None));
            assert!(!manifest.quantised.is_empty());
            let folder = HfFolder::open(&destination).unwrap();
            let blocks = folder.names().filter_map(|name| folder.info(name));
            let n_blocks = blocks.filter(|info| info.dtype == dtype).count();
            let same = manifest.quantised.iter().filter(|tensor| tensor.bits == grid.bits());
            assert_eq!(n_blocks, same.count(), "{name}: all layers are native");
            klds.push(mean_kld(&reference, &logits(&destination, &tokens)));
        }
        // Random weights: no bound means much, but the order and the size of int8's error do.
        assert!(klds[0] < 5e-3, "{name}: {klds:?}");
        assert!(klds[0] < 0.2 * klds[1], "{name}: {klds:?}");
    }
}

#[test]
fn calibration_leaves_a_smaller_output_error_in_every_matrix() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama-llama3", "qwen3", "gemma3", "mixtral"] {
        let destination = dir.path().join(name);
        let manifest =
            quantised(&family(name), &destination, &options(IntGrid::Int4, Some(calibration())));
        let plain_dir = dir.path().join(format!("{name}-plain"));
        let plain = quantised(&family(name), &plain_dir, &options(IntGrid::Int4, None));
        for (tensor, plain) in manifest.quantised.iter().zip(&plain.quantised) {
            assert_eq!(tensor.name, plain.name);
            assert_eq!((tensor.method, plain.method), (Method::Calibrated, Method::Nearest));
            // Nearest weights have the smaller weight error by construction; outputs count.
            assert!(plain.error.relative_rms <= tensor.error.relative_rms * 1.001, "{tensor:?}");
            let output = tensor.error.output_relative_rms.unwrap();
            assert!(output < tensor.error.relative_rms, "{tensor:?}");
        }
        let written = std::fs::read_to_string(destination.join(MANIFEST)).unwrap();
        let read: Manifest = serde_json::from_str(&written).unwrap();
        assert_eq!(read.identity, manifest.identity);
        assert_eq!(read.identity.calibration.unwrap().n_tokens, 2100);
    }
}

#[test]
fn what_stands_beside_the_weights_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let destination = dir.path().join("out");
    quantised(&family("qwen3"), &destination, &options(IntGrid::Int4, None));
    for name in
        ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    {
        let source = std::fs::read(family("qwen3").join(name)).unwrap();
        assert_eq!(std::fs::read(destination.join(name)).unwrap(), source, "{name}");
    }
    let config = std::fs::read_to_string(destination.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["model_type"], "qwen3");
    let quantization = &config["quantization_config"];
    assert_eq!((&quantization["bits"], &quantization["group_size"]), (&4.into(), &32.into()));
    let mut names: Vec<String> = std::fs::read_dir(&destination)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.iter().any(|name| name.contains("lock") || name.contains("tmp")), "{names:?}");
}

#[test]
fn what_falls_back_is_said_and_loads_beside_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let destination = dir.path().join("out");
    let options = exrail_quantize::QuantizeOptions::new(IntGrid::Int4, 64, None).unwrap();
    // The residual stream of this family is 64 wide, its networks 96.
    let manifest = quantised(&family("llama"), &destination, &options);
    let (four, eight): (Vec<_>, Vec<_>) =
        manifest.quantised.iter().partition(|tensor| tensor.bits == 4);
    assert!(!four.is_empty() && !eight.is_empty(), "{manifest:?}");
    assert!(four.iter().all(|tensor| tensor.fallback.is_none() && tensor.group == 64));
    for tensor in &eight {
        let reason = tensor.fallback.as_ref().unwrap();
        assert!(reason.contains("does not fit 4 bits in groups of 64"), "{reason}");
        assert_eq!(tensor.group, 32);
    }
    let folder = HfFolder::open(&destination).unwrap();
    let dtype = |name: &str| folder.info(name).unwrap().dtype;
    assert_eq!(dtype("blk.0.ffn_up.weight"), DType::Q4_0);
    assert_eq!(dtype("blk.0.ffn_down.weight"), DType::Q8_0);
    let tokens = ids(40, 9);
    let kld = mean_kld(&logits(&family("llama"), &tokens), &logits(&destination, &tokens));
    assert!(kld < 0.5, "{kld}");
}
