//! A GGUF file from its first byte to configuration and vocabulary. Wrong files are errors; right
//! ones have views inside the file.

#![no_main]

use exrail_checkpoint::{DecoderConfig, Gguf, VocabularyTable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    let mut n_bytes = 0;
    for view in gguf.tensors() {
        n_bytes += view.bytes.len();
        assert!(!view.is_empty());
    }
    assert!(n_bytes <= bytes.len());
    let vocabulary = VocabularyTable::from_gguf(&gguf);
    if let Ok(config) = DecoderConfig::from_gguf(&gguf) {
        assert!(config.ropes.iter().all(|rope| rope.dim <= config.head_dim));
        if let Ok(vocabulary) = vocabulary {
            assert!(vocabulary.tokens.len() <= config.vocab_size);
        }
    }
});
