//! Real vocabularies against the libraries that define them, on 10,200 lines. Those that belong
//! to no model of the tests are put where EXRAIL_TEST_VOCABULARIES says by
//! `golden/tokenizer/parity/fetch.py`.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

mod corpus;

use std::path::{Path, PathBuf};

use corpus::{BOTH, Back, compare, json, vocabulary};
use exrail_checkpoint::{Gguf, VocabularyTable};
use exrail_text::{Specials, Tokenizer, Vocabulary};
use serde_json::Value;

fn from_environment(name: &str) -> PathBuf {
    let value = std::env::var_os(name);
    value.unwrap_or_else(|| panic!("{name} is not set: run through make test")).into()
}

fn fetched(file: &str) -> PathBuf {
    from_environment("EXRAIL_TEST_VOCABULARIES").join(file)
}

fn check(family: &str, back: Back) {
    let tokenizer =
        Tokenizer::from_vocabulary(vocabulary(&json(&fetched(&format!("{family}.json"))))).unwrap();
    compare(family, &tokenizer, &BOTH, back);
}

fn from_gguf(path: &Path) -> Tokenizer {
    let table = VocabularyTable::from_gguf(&Gguf::open(path).unwrap()).unwrap();
    let vocabulary = Vocabulary {
        model: table.model,
        pre: table.pre,
        tokens: table.tokens,
        kinds: table.kinds,
        merges: table.merges,
        scores: table.scores,
        bos: table.bos,
        eos: table.eos,
        unknown: table.unknown,
        add_bos: table.add_bos,
        add_space_prefix: table.add_space_prefix,
        remove_extra_whitespaces: table.remove_extra_whitespaces,
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(vocabulary).unwrap()
}

#[test]
fn e1_mistral_of_sentencepiece_equals_sentencepiece() {
    for version in ["v1", "v2", "v3", "v7"] {
        check(&format!("mistral-{version}"), Back::Spaces);
    }
}

#[test]
fn e1_mistral_of_tokenizer_json_equals_tokenizers() {
    // The new scheme puts no space before a text that begins with one.
    for (scheme, back) in [("old", Back::Spaces), ("new", Back::Changed)] {
        let family = format!("mistral-v3-{scheme}.tokenizer");
        let tokenizer =
            Tokenizer::from_json(&std::fs::read(fetched(&format!("{family}.json"))).unwrap())
                .unwrap();
        compare(&family, &tokenizer, &BOTH, back);
    }
}

#[test]
fn e1_llama2_equals_sentencepiece() {
    compare("llama2", &from_gguf(&fetched("llama2.gguf")), &BOTH, Back::Spaces);
}

#[test]
fn e1_tekken_equals_tiktoken() {
    check("tekken-240718", Back::Bytes);
    check("tekken-240911", Back::Bytes);
}

#[test]
fn e1_llama3_equals_tiktoken() {
    check("llama3", Back::Bytes);
}

#[test]
fn e1_llama4_and_with_it_phi4_mini_equals_tiktoken() {
    check("llama4", Back::Bytes);
}

#[test]
fn e1_qwen2_equals_tiktoken_on_composed_text() {
    check("qwen2", Back::Changed);
}

#[test]
fn e1_command_r_equals_tokenizers() {
    // NFC changes text.
    compare("command-r", &from_gguf(&fetched("command-r.gguf")), &BOTH, Back::Changed);
}

#[test]
fn e1_smollm2_equals_tokenizers() {
    compare("smollm2", &from_gguf(&from_environment("EXRAIL_TEST_GENERATOR")), &BOTH, Back::Bytes);
}

#[test]
fn e1_gemma3_equals_sentencepiece() {
    compare("gemma3", &from_gguf(&from_environment("EXRAIL_TEST_GEMMA")), &BOTH, Back::Spaces);
}

#[test]
fn e1_minilm_equals_tokenizers_from_either_file() {
    let path = from_environment("EXRAIL_TEST_ENCODER").join("tokenizer.json");
    let tokenizer = Tokenizer::from_json(&std::fs::read(&path).unwrap()).unwrap();
    compare("minilm", &tokenizer, &BOTH, Back::Changed);
    let gguf = Tokenizer::from_vocabulary(as_gguf(&json(&path))).unwrap();
    compare("minilm", &gguf, &BOTH, Back::Changed);
    let ids = gguf.encode("It's fine, isn't it?", Specials::AsText).unwrap();
    assert_eq!(gguf.wrap_sentence(&ids).unwrap(), tokenizer.wrap_sentence(&ids).unwrap());
    assert_eq!(gguf.decode(&ids), "it ' s fine, isn ' t it?");
    assert_eq!(gguf.decode(&ids), tokenizer.decode(&ids));
}

/// A `WordPiece` vocabulary as llama.cpp's converter writes it.
fn as_gguf(file: &Value) -> Vocabulary {
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    let mut kinds = vec![1; tokens.len()];
    for (token, id) in vocab {
        let id = usize::try_from(id.as_u64().unwrap()).unwrap();
        let is_special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].contains(&token.as_str());
        kinds[id] = if is_special { 3 } else { 1 };
        tokens[id] = match token.strip_prefix("##") {
            _ if is_special => token.clone(),
            Some(rest) => rest.to_owned(),
            None => format!("\u{2581}{token}"),
        };
    }
    Vocabulary { model: "bert".into(), tokens, kinds, ..Vocabulary::default() }
}
