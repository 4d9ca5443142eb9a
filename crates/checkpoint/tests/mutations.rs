//! Valid files with bytes changed: whatever comes of them, it is no panic.

use std::sync::LazyLock;

use exrail_checkpoint::{
    BertConfig, BertFiles, DecoderConfig, Gguf, SafetensorsFile, VocabularyTable,
};
use exrail_testkit::{TinyLlama, safetensors_bytes, tiny_llama};
use proptest::prelude::*;

static GGUF: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let spec =
        TinyLlama { n_layers: 1, width: 8, n_heads: 2, ffn_width: 8, ..TinyLlama::default() };
    tiny_llama(1, spec)
});

/// Bytes before the tensor data, where changes matter.
static HEADER_LEN: LazyLock<usize> = LazyLock::new(|| {
    let gguf = Gguf::parse(GGUF.clone()).expect("a valid file");
    GGUF.len() - gguf.tensors().map(|view| view.bytes.len()).sum::<usize>()
});

/// Everything that a loader does with a container.
fn load(bytes: Vec<u8>) {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    for view in gguf.tensors() {
        let last = view.bytes.last();
        assert_eq!(last.is_some(), !view.is_empty());
    }
    let config = DecoderConfig::from_gguf(&gguf);
    let vocabulary = VocabularyTable::from_gguf(&gguf);
    if let (Ok(config), Ok(vocabulary)) = (config, vocabulary) {
        assert!(vocabulary.tokens.len() <= config.vocab_size);
        assert!(config.n_heads.is_multiple_of(config.n_kv_heads));
    }
}

/// `bytes` with some of the first `len` bytes changed.
fn mutate(bytes: &[u8], len: usize, changes: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, value) in changes {
        let at = at.index(len);
        bytes[at] = *value;
    }
    bytes
}

/// Values that counts, types and lengths trip over more often than random ones.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![Just(0), Just(1), Just(0x7f), Just(0x80), Just(0xff), any::<u8>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_gguf_bytes_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 1..8),
    ) {
        load(mutate(&GGUF, *HEADER_LEN, &changes));
    }

    #[test]
    fn cut_gguf_files_never_panic(len in any::<prop::sample::Index>(), tail in any::<[u8; 16]>()) {
        let mut bytes = GGUF[..len.index(GGUF.len())].to_vec();
        bytes.extend(tail);
        load(bytes);
    }

    #[test]
    fn random_bytes_after_the_magic_never_panic(
        rest in prop::collection::vec(byte(), 0..256),
    ) {
        load([b"GGUF\x03\0\0\0".as_slice(), &rest].concat());
    }

    #[test]
    fn changed_safetensors_bytes_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 1..8),
    ) {
        let bytes = safetensors_bytes(&[
            ("a".to_owned(), vec![2, 2], vec![0.0; 4]),
            ("b".to_owned(), vec![1], vec![0.0]),
        ]);
        if let Ok(file) = SafetensorsFile::parse(mutate(&bytes, bytes.len(), &changes)) {
            for view in file.tensors() {
                prop_assert!(view.to_f32().is_ok());
            }
        }
    }

    #[test]
    fn any_bytes_as_bert_files_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let files =
            BertFiles { config: &bytes, modules: &bytes, pooling: &bytes, sentence: Some(&bytes) };
        prop_assert!(BertConfig::from_files(files).is_err());
    }
}
