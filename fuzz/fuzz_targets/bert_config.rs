//! The four JSON files of a sentence-transformers folder, separated by NUL bytes.

#![no_main]

use exrail_checkpoint::{BertConfig, BertFiles};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut files = bytes.split(|&byte| byte == 0);
    let mut next = || files.next().unwrap_or_default();
    let (config, modules, pooling) = (next(), next(), next());
    let sentence = files.next();
    if let Ok(config) = BertConfig::from_files(BertFiles { config, modules, pooling, sentence }) {
        assert!(config.width.is_multiple_of(config.n_heads));
        assert!(config.max_seq_length <= config.max_positions);
    }
});
