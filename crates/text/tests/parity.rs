//! Small vocabularies with the properties of families whose own cannot be had, against the
//! libraries that define them, on 10,200 lines. Goldens: `golden/tokenizer/parity`.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

mod corpus;

use corpus::{BOTH, Back, compare, golden, json, vocabulary};
use exrail_text::{Tokenizer, Vocabulary};
use serde_json::Value;

fn from_json(family: &str) -> (Value, Tokenizer) {
    let path = golden().join(format!("{family}.tokenizer.json"));
    (json(&path), Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap())
}

/// The same vocabulary as a GGUF file stores it.
fn as_gguf(file: &Value, pre: &str) -> Vocabulary {
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let added = file["added_tokens"].as_array().unwrap();
    let mut tokens = vec![String::new(); vocab.len() + added.len()];
    let mut kinds = vec![1; tokens.len()];
    let at = |id: &Value| usize::try_from(id.as_u64().unwrap()).unwrap();
    for (token, id) in vocab {
        tokens[at(id)].clone_from(token);
    }
    for token in added {
        tokens[at(&token["id"])] = token["content"].as_str().unwrap().to_owned();
        kinds[at(&token["id"])] = if token["special"] == true { 3 } else { 4 };
    }
    let merges = file["model"]["merges"].as_array().unwrap();
    let merge =
        |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    Vocabulary {
        model: "gpt2".into(),
        pre: pre.into(),
        tokens,
        kinds,
        merges: merges.iter().map(merge).collect(),
        ..Vocabulary::default()
    }
}

fn check_byte_level(family: &str, pre: &str, back: Back) {
    let (file, tokenizer) = from_json(family);
    let golden = format!("{family}.tokenizer");
    compare(&golden, &tokenizer, &BOTH, back);
    let tokenizer = Tokenizer::from_vocabulary(as_gguf(&file, pre)).unwrap();
    compare(&golden, &tokenizer, &BOTH, back);
}

#[test]
fn e1_granite_equals_tokenizers() {
    check_byte_level("granite", "refact", Back::Bytes);
}

#[test]
fn e1_cohere2_equals_tokenizers() {
    // NFC changes text.
    check_byte_level("cohere2", "command-r", Back::Changed);
}

#[test]
fn e1_olmo2_equals_tokenizers() {
    check_byte_level("olmo2", "dbrx", Back::Bytes);
}

#[test]
fn e1_phi4_whose_literals_take_white_space_along_equals_tokenizers() {
    let (_, tokenizer) = from_json("phi4");
    compare("phi4.tokenizer", &tokenizer, &BOTH, Back::Bytes);
}

#[test]
fn e1_phi3_equals_sentencepiece() {
    let table = json(&golden().join("phi3.json"));
    let tokenizer = Tokenizer::from_vocabulary(vocabulary(&table)).unwrap();
    compare("phi3", &tokenizer, &BOTH, Back::Spaces);
}

#[test]
fn e1_unigram_equals_sentencepiece() {
    for family in ["t5", "t5-bytes"] {
        let table = json(&golden().join(format!("{family}.json")));
        let tokenizer = Tokenizer::from_vocabulary(vocabulary(&table)).unwrap();
        compare(family, &tokenizer, &BOTH, Back::Changed);
    }
}

#[test]
fn e1_unigram_of_tokenizer_json_equals_tokenizers() {
    let table = json(&golden().join("t5.json"));
    let vocab: Vec<(&Value, &Value)> = table["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .zip(table["scores"].as_array().unwrap())
        .collect();
    let spaces = serde_json::json!({
        "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true,
    });
    let file = serde_json::json!({
        "decoder": &spaces,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Precompiled", "precompiled_charsmap": &table["precompiled_charsmap"] },
            { "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " },
        ] },
        "pre_tokenizer": &spaces,
        "model": { "type": "Unigram", "unk_id": table["unknown"], "vocab": vocab },
    });
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
    compare("t5.tokenizer", &tokenizer, &BOTH, Back::Changed);
}
