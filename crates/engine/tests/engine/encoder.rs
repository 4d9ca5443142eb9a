//! The sentence encoder on a tiny folder.

use exrail_engine::{EngineError, SentenceEncoder};
use exrail_kernels::reference::Reference;
use exrail_retrieval::{Encode, EncodeError};
use exrail_testkit::tiny_bert;

fn encoder(seed: u64) -> SentenceEncoder<Reference> {
    let dir = tempfile::tempdir().unwrap();
    tiny_bert(seed, dir.path()).unwrap();
    SentenceEncoder::load(Reference, dir.path()).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn vectors_have_unit_norm_and_do_not_depend_on_their_batch() {
    let encoder = encoder(1);
    let long = "the valve and the pump ".repeat(20);
    let texts = ["the pump", long.as_str(), "warranty of the battery", "the pump"];
    let together = encoder.encode(&texts).unwrap();
    for (text, vector) in texts.iter().zip(&together) {
        assert_eq!(vector.len(), encoder.facts().dim);
        // A sum of 64 squares near 1/64 each.
        assert!((dot(vector, vector) - 1.0).abs() < 64.0 * f32::EPSILON);
        let alone = encoder.encode(&[text]).unwrap();
        assert!((dot(&alone[0], vector) - 1.0).abs() < 1e-6);
    }
    assert!(together[0] == together[3]);
    assert!(dot(&together[0], &together[2]) < 0.999);
    assert!(encoder.encode(&[]).unwrap().is_empty());
}

#[test]
fn too_long_and_empty_texts_are_refused_by_number() {
    let encoder = encoder(1);
    let limit = encoder.facts().max_tokens;
    assert_eq!(limit, 254, "256 without [CLS] and [SEP]");
    let fits = "pump ".repeat(limit);
    assert_eq!(encoder.tokenize(&fits).len(), limit);
    encoder.encode(&[&fits]).unwrap();
    let over = "pump ".repeat(limit + 1);
    let refused = encoder.encode(&["pump", &over]).unwrap_err();
    assert!(
        matches!(refused, EncodeError::TooLong { index: 1, tokens: 255, limit: 254 }),
        "{refused}"
    );
    assert!(matches!(encoder.encode(&[" "]), Err(EncodeError::Empty { index: 0 })));
}

#[test]
fn the_fingerprint_follows_weights_and_contract() {
    assert_eq!(encoder(1).fingerprint(), encoder(1).fingerprint());
    assert_ne!(encoder(1).fingerprint(), encoder(2).fingerprint());
    assert_eq!(encoder(1).fingerprint().len(), 64);
}

#[test]
fn a_folder_without_tokenizer_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    tiny_bert(1, dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let refused = SentenceEncoder::load(Reference, dir.path()).err().unwrap();
    assert!(matches!(refused, EngineError::Io { .. }), "{refused}");
    assert!(refused.to_string().contains("tokenizer.json"));
}
