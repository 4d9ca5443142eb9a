//! Real vocabularies: what is forced is spelled as their tokenizers spell it in the middle of a text.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

use std::path::PathBuf;
use std::sync::Arc;

use exrail_grammar::{Compiler, Limits, Source, Vocabulary};
use exrail_text::Tokenizer;
use serde_json::{Value, json};

fn fetched(file: &str) -> PathBuf {
    let folder = std::env::var_os("EXRAIL_TEST_VOCABULARIES");
    let folder = folder
        .unwrap_or_else(|| panic!("EXRAIL_TEST_VOCABULARIES is not set: run through make test"));
    PathBuf::from(folder).join(file)
}

/// A table as `golden/tokenizer/parity/fetch.py` writes it.
fn tokenizer(file: &str) -> Arc<Tokenizer> {
    let bytes = std::fs::read(fetched(file)).unwrap();
    let table: Value = serde_json::from_slice(&bytes).unwrap();
    let text = |key: &str| table[key].as_str().unwrap_or_default().to_owned();
    let id = |key: &str| table[key].as_u64().map(|id| u32::try_from(id).unwrap());
    fn list<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
        if value.is_null() { Vec::new() } else { serde_json::from_value(value.clone()).unwrap() }
    }
    let vocabulary = exrail_text::Vocabulary {
        model: text("model"),
        pre: text("pre"),
        tokens: list(&table["tokens"]),
        kinds: list(&table["kinds"]),
        merges: list(&table["merges"]),
        scores: list(&table["scores"]),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        add_space_prefix: table["add_space_prefix"].as_bool().unwrap_or_default(),
        ..exrail_text::Vocabulary::default()
    };
    Arc::new(Tokenizer::from_vocabulary(vocabulary).unwrap())
}

fn forced_of(file: &str) {
    let tokenizer = tokenizer(file);
    let vocabulary = Vocabulary::new(&tokenizer).unwrap();
    assert!(vocabulary.is_canonical(), "{file}");
    // No space appears in front of a text in the middle of another one.
    for text in ["name", "{\"a\": 1}", " and", "\",\"snippet_id\":\"", "é😀"] {
        let ids = vocabulary.spell(text);
        let bytes: Vec<u8> =
            ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).copied().collect();
        assert_eq!(String::from_utf8_lossy(&bytes), text, "{file}");
    }
    let compiler = Compiler::new(vocabulary.clone(), Limits::default()).unwrap();
    compiler.prepare().unwrap();
    let written = json!({"type": "object", "properties": {"citations": {"const": "not in context"}, "answer": {"type": "string"}},
        "required": ["citations", "answer"], "additionalProperties": false});
    let grammar = compiler.compile(&Source::JsonSchema(written)).unwrap();
    // What is forced is how the tokenizer writes it.
    let mut matcher = grammar.matcher();
    let mut bytes = Vec::new();
    let mut n_forced = 0;
    let wanted = "{\"citations\": \"not in context\", \"answer\": \"";
    while bytes.len() < wanted.len() {
        let forced = matcher.forced();
        n_forced += forced.len();
        let ids = if forced.is_empty() {
            vec![vocabulary.spell(&wanted[bytes.len()..])[0]]
        } else {
            forced
        };
        for id in ids {
            matcher.advance(id).unwrap();
            bytes.extend_from_slice(tokenizer.token_bytes(id).unwrap());
        }
        assert!(
            wanted.as_bytes().starts_with(&bytes) || bytes.starts_with(wanted.as_bytes()),
            "{file}"
        );
    }
    assert!(n_forced >= 3, "{file}: {n_forced}");
    let closing = matcher.closing(20).unwrap();
    assert!(closing.len() <= 3, "{file}: {closing:?}");
}

#[test]
fn sentencepiece_forces_no_space_that_stands_only_before_a_text() {
    forced_of("mistral-v3.json");
}

#[test]
fn byte_level_forces_as_it_spells() {
    forced_of("tekken-240911.json");
    forced_of("qwen2.json");
    forced_of("llama3.json");
}
