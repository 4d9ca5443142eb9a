//! A Hugging Face folder: configuration, index, headers of two shards, and the small files beside
//! them, separated by NUL. Wrong folders are errors; of right ones every tensor can be asked for.

#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;

use exrail_checkpoint::{DecoderConfig, HfFolder, LoadError, Tensors};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

/// Data that is made for a header at most.
const MAX_DATA_BYTES: u64 = 1 << 18;

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.split(|&byte| byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let config = next();
    if let Ok(config) = DecoderConfig::from_config_json(config) {
        check(&config);
    }
    let mut files: BTreeMap<String, Arc<[u8]>> = BTreeMap::new();
    files.insert("config.json".to_owned(), config.into());
    let index = next();
    let shards = if index.is_empty() {
        ["model.safetensors", "other.safetensors"]
    } else {
        files.insert("model.safetensors.index.json".to_owned(), index.into());
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    };
    for shard in shards {
        files.insert(shard.to_owned(), safetensors(next()).into());
    }
    for name in ["quantize_config.json", "generation_config.json", "tokenizer_config.json"] {
        let part = next();
        if !part.is_empty() {
            files.insert(name.to_owned(), part.into());
        }
    }
    let Ok(folder) = HfFolder::parse(files) else { return };
    check(folder.config());
    for name in folder.names() {
        let info = folder.info(name).expect("a name of the folder");
        match folder.tensor(name) {
            Ok(view) => {
                assert_eq!((view.dtype, view.shape), (info.dtype, info.shape));
                assert!(view.to_f32().is_ok(), "{view:?}");
            }
            // Only packed layers are decoded, and may hold an index out of range.
            Err(error) => {
                assert!(folder.quant_method().is_some(), "{error}");
                assert!(matches!(error.root(), LoadError::BadValue { .. }), "{error}");
            }
        }
    }
});

/// What every accepted configuration promises.
fn check(config: &DecoderConfig) {
    assert!(config.n_heads.is_multiple_of(config.n_kv_heads));
    assert!((1..=config.max_context_len).contains(&config.context_len));
    for rope in &config.ropes {
        assert!(rope.dim <= config.head_dim && rope.dim.is_multiple_of(2) && rope.dim > 0);
        assert!(rope.theta_for(config.max_context_len) > 0.0);
    }
    for layer in &config.layers {
        assert!(layer.rope.is_none_or(|rope| rope < config.ropes.len()));
        assert!(layer.window != Some(0));
    }
}

/// A file of this header, with as much data as it says.
fn safetensors(header: &[u8]) -> Vec<u8> {
    let end = |info: &Value| info.get("data_offsets")?.get(1)?.as_u64();
    let json: Value = serde_json::from_slice(header).unwrap_or_default();
    let ends = json.as_object().into_iter().flat_map(|map| map.values()).filter_map(end);
    let len = ends.max().unwrap_or_default().min(MAX_DATA_BYTES);
    let mut file = [&(header.len() as u64).to_le_bytes()[..], header].concat();
    file.resize(file.len() + len as usize, 0x11);
    file
}
