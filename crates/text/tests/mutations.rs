//! Damaged vocabularies: whatever is changed in one, it is refused or it encodes, and what it
//! encodes is in the vocabulary and decodes in a stream as it does whole.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

use exrail_text::{Specials, Tokenizer, TokenizerError, Vocabulary};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

const TEXTS: [&str; 3] = ["<s>ab  a é\u{301}👍 </s><x>12\r\n\t ", "", " '\u{2581}a<0x41>b"];

fn check(tokenizer: Result<Tokenizer, TokenizerError>) {
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    for text in TEXTS {
        for specials in [Specials::AsText, Specials::Parse] {
            let Ok(ids) = tokenizer.encode(text, specials) else { continue };
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_len()));
            let mut detokenizer = tokenizer.detokenizer();
            let bytes = ids.iter().map(|&id| tokenizer.token_bytes(id).unwrap());
            let mut stream: String = bytes.map(|bytes| detokenizer.push(bytes)).collect();
            stream.push_str(&detokenizer.finish());
            assert_eq!(stream, tokenizer.decode(&ids));
        }
        if let Ok(tokens) = tokenizer.encode_with_offsets(text) {
            assert!(tokens.iter().all(|(_, span)| text.get(span.clone()).is_some()));
        }
    }
}

fn files() -> Vec<Value> {
    let added = json!([
        { "id": 5, "content": "<x>", "special": true, "normalized": false, "lstrip": true, "rstrip": true, "single_word": true },
        { "id": 6, "content": "b a", "special": false, "normalized": true, "lstrip": true, "rstrip": true, "single_word": true },
    ]);
    let ids = json!({ "a": 0, "b": 1, "ab": 2, "▁": 3, "##b": 4 });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let spaces = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    let words = json!({ "type": "Split", "behavior": "MergedWithNext", "invert": true,
                        "pattern": { "Regex": "a|\\s+(?!\\S)|\\s+" } });
    vec![
        json!({
            "added_tokens": added, "pre_tokenizer": { "type": "Sequence", "pretokenizers": [words, bytes] },
            "normalizer": { "type": "Sequence", "normalizers": [{ "type": "NFC" }, { "type": "Strip", "strip_left": true, "strip_right": true }] },
            "decoder": bytes, "post_processor": bytes,
            "model": { "type": "BPE", "vocab": ids, "merges": ["a b"], "unk_token": "a", "ignore_merges": true },
        }),
        json!({
            "added_tokens": added, "normalizer": replace, "pre_tokenizer": spaces,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
                { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ] },
            "model": { "type": "BPE", "vocab": ids, "merges": [["a", "b"]], "unk_token": "b", "byte_fallback": true, "fuse_unk": true },
        }),
        json!({
            "added_tokens": added, "pre_tokenizer": { "type": "BertPreTokenizer" },
            "normalizer": { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true },
            "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
            "model": { "type": "WordPiece", "vocab": ids, "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9 },
        }),
        json!({
            "added_tokens": added, "pre_tokenizer": spaces, "decoder": spaces, "normalizer": { "type": "NFKC" },
            "model": { "type": "Unigram", "unk_id": 0, "byte_fallback": true,
                       "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁", -2.0], ["▁ab", -0.5], ["b", -3.0]] },
        }),
    ]
}

/// Pointers to all nodes of `value`.
fn nodes(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    if let Some(object) = value.as_object() {
        for (key, value) in object {
            let key = key.replace('~', "~0").replace('/', "~1");
            nodes(value, &format!("{at}/{key}"), found);
        }
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        nodes(value, &format!("{at}/{index}"), found);
    }
}

fn leaf() -> impl Strategy<Value = Value> {
    let values = [
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(1),
        json!(5),
        json!(7),
        json!(-1),
        json!(1e300),
        json!(u32::MAX),
        json!(""),
        json!("a"),
        json!("##"),
        json!("▁"),
        json!(" "),
        json!("é"),
        json!("a b"),
        json!("(?:)"),
        json!("x*"),
        json!("[^"),
        json!("\\s+"),
        json!([]),
        json!({}),
        json!(["a", "b"]),
        json!({ "String": "" }),
        json!({ "Regex": "" }),
        json!({ "type": "Lowercase" }),
        json!({ "type": "Whitespace" }),
        json!({ "type": "FixedLength", "length": 0 }),
        json!({ "type": "Punctuation", "behavior": "Removed" }),
        json!({ "type": "Prepend", "prepend": "" }),
        json!("BPE"),
        json!("Unigram"),
        json!("WordPiece"),
        json!("Removed"),
    ];
    select(values.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn a_tokenizer_json_with_other_values(which in 0..4_usize, changes in proptest::collection::vec((any::<Index>(), leaf()), 1..4)) {
        let mut file = files().swap_remove(which);
        for (at, value) in changes {
            let mut found = Vec::new();
            nodes(&file, "", &mut found);
            *file.pointer_mut(&found[at.index(found.len())]).unwrap() = value;
        }
        check(Tokenizer::from_json(file.to_string().as_bytes()));
    }

    #[test]
    fn a_tokenizer_json_with_other_bytes(which in 0..4_usize, changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..5)) {
        let mut bytes = files().swap_remove(which).to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        check(Tokenizer::from_json(&bytes));
    }

    #[test]
    fn a_table_of_any_tokens(
        model in select(vec!["gpt2", "llama", "t5", "bert"]),
        pre in select(vec!["smollm", "tekken", "default"]),
        entries in proptest::collection::vec(("(|a|b|ab|aab|▁|▁a|Ġ|Ġa|é|<s>|</s>|<0x61>|<0xC3>| |  |\\[CLS\\]|\\[SEP\\]|\\[UNK\\]|\\PC{0,3})", 1..7_i32, -9..9_i8), 1..16),
        merges in proptest::collection::vec("(a b|Ġ a|a ab| |a|Ġa b)", 0..3),
        named in proptest::collection::vec(proptest::option::of(0..16_u32), 3),
        flags in any::<u8>(),
    ) {
        let flag = |bit: u8| flags >> bit & 1 == 1;
        check(Tokenizer::from_vocabulary(Vocabulary {
            model: model.into(),
            pre: pre.into(),
            tokens: entries.iter().map(|it| it.0.clone()).collect(),
            kinds: entries.iter().map(|it| it.1).collect(),
            scores: entries.iter().map(|it| f32::from(it.2)).collect(),
            merges,
            bos: named[0],
            eos: named[1],
            unknown: named[2],
            add_bos: flag(0),
            add_space_prefix: flag(1),
            remove_extra_whitespaces: flag(2),
            lowercase: flag(3).then_some(flag(4)),
            strips_right: flag(5),
            ..Vocabulary::default()
        }));
    }
}
