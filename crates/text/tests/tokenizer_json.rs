//! `tokenizer.json` for generation: roles of tokens, added tokens, hostile and unsupported files.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

use exrail_text::{Specials, TokenRoles, Tokenizer, TokenizerError, encode_completion};
use serde_json::{Value, json};

/// A sentencepiece model as Hugging Face converts it.
fn file() -> Value {
    let mut vocab = json!({ "<unk>": 0, "<s>": 1, "</s>": 2 });
    for (id, token) in (3..259).zip((0..256).map(|byte| format!("<0x{byte:02X}>"))) {
        vocab[token] = json!(id);
    }
    for (id, token) in (259..).zip(["▁", "a", "b", "ab", "▁ab"]) {
        vocab[token] = json!(id);
    }
    let added = |id: u32, content: &str, special: bool| {
        json!({ "id": id, "content": content, "special": special, "normalized": false,
                "lstrip": false, "rstrip": false, "single_word": false })
    };
    json!({
        "version": "1.0",
        "added_tokens": [
            added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true),
            added(264, "<|im_end|>", true), added(265, "<think>", false),
        ],
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": ["a b", ["▁", "ab"]],
        },
    })
}

fn build(file: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_json(file.to_string().as_bytes())
}

fn refusal(change: impl Fn(&mut Value)) -> TokenizerError {
    let mut file = file();
    change(&mut file);
    build(&file).unwrap_err()
}

#[test]
fn bytes_come_together_across_tokens() {
    let tokenizer = build(&file()).unwrap();
    for text in ["ab é👍 ab", " ab", "", "<s>", "<0x41>"] {
        let ids = tokenizer.encode(text, Specials::AsText).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        let mut detokenizer = tokenizer.detokenizer();
        let pieces: Vec<String> =
            ids.iter().map(|&id| detokenizer.push(tokenizer.token_bytes(id).unwrap())).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
    }
}

#[test]
fn special_tokens_need_permission_and_added_ones_do_not() {
    let tokenizer = build(&file()).unwrap();
    let ids = |text, specials| tokenizer.encode(text, specials).unwrap();
    assert_eq!(ids("ab<|im_end|>ab", Specials::Parse), [262, 264, 262]);
    assert!(!ids("ab<|im_end|>ab", Specials::AsText).contains(&264));
    assert_eq!(ids("<think>ab", Specials::AsText), [265, 262]);
    assert!(tokenizer.is_control(264) && !tokenizer.is_control(265));
    assert_eq!(tokenizer.control_literal_in("x<think></s>"), Some("</s>"));
}

#[test]
fn an_added_token_that_stands_for_spaces_gives_them_back() {
    // As in Gemma's file: the token that merges write is also in the list of added ones.
    let mut file = file();
    file["model"]["vocab"]["▁▁"] = json!(264);
    file["model"]["merges"].as_array_mut().unwrap().push(json!("▁ ▁"));
    file["added_tokens"][3]["id"] = json!(265);
    (file["added_tokens"][4]["id"], file["added_tokens"][4]["content"]) = (json!(264), json!("▁▁"));
    let tokenizer = build(&file).unwrap();
    let ids = tokenizer.encode("a  b", Specials::AsText).unwrap();
    assert_eq!(ids, [260, 264, 261]);
    assert_eq!(tokenizer.decode(&ids), "a  b");
}

#[test]
fn added_tokens_take_white_space_and_need_room_as_the_file_says() {
    let mut file = file();
    file["added_tokens"][3]["lstrip"] = json!(true);
    file["added_tokens"][3]["rstrip"] = json!(true);
    file["added_tokens"][1]["single_word"] = json!(true);
    file["added_tokens"][4]["rstrip"] = json!(true);
    let tokenizer = build(&file).unwrap();
    let ids = |text| tokenizer.encode(text, Specials::Parse).unwrap();
    assert_eq!(ids("ab \n<|im_end|>\t ab"), [262, 264, 262]);
    assert_eq!(ids("<think>  ab"), [265, 262]);
    assert!(ids("-<s>-").contains(&1));
    assert!(!ids("a<s>").contains(&1));
}

#[test]
fn roles_are_taken_as_they_are_given_or_refused() {
    let tokenizer = || build(&file()).unwrap();
    let roles = TokenRoles { bos: Some(1), eos: vec![2, 2, 264], add_bos: None };
    let with_roles = tokenizer().with_roles(&roles).unwrap();
    assert_eq!((with_roles.bos(), with_roles.eos_ids()), (Some(1), &[2, 264][..]));
    // The post-processor puts `<s>` first, so that is how the model was trained.
    assert!(with_roles.add_bos());
    assert_eq!(encode_completion(&with_roles, "ab", Specials::AsText).unwrap(), [1, 262]);
    let without = TokenRoles { add_bos: Some(false), ..roles.clone() };
    assert!(!tokenizer().with_roles(&without).unwrap().add_bos());
    assert_ne!(with_roles.fingerprint(), tokenizer().with_roles(&without).unwrap().fingerprint());

    assert_eq!(tokenizer().named_token("eos", "</s>").unwrap(), 2);
    let error = tokenizer().named_token("eos", "<end>").unwrap_err();
    assert!(matches!(error, TokenizerError::NoSuchToken { role: "eos", .. }), "{error}");
    let far = TokenRoles { eos: vec![999], ..TokenRoles::default() };
    let error = tokenizer().with_roles(&far).unwrap_err();
    assert!(
        matches!(error, TokenizerError::IdOutOfRange { role: "eos", found: 999, .. }),
        "{error}"
    );
    let none = TokenRoles { add_bos: Some(true), ..TokenRoles::default() };
    assert!(matches!(tokenizer().with_roles(&none).unwrap_err(), TokenizerError::MissingBos));
}

#[test]
fn an_ordinary_token_that_ends_generation_is_a_control_token_from_then_on() {
    let roles = TokenRoles { eos: vec![265], ..TokenRoles::default() };
    let tokenizer = build(&file()).unwrap().with_roles(&roles).unwrap();
    assert!(tokenizer.is_control(265));
    assert_eq!(tokenizer.eos_ids(), [264, 265]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let named = |change: &dyn Fn(&mut Value), name: &str| {
        let error = refusal(change);
        assert!(error.to_string().contains(name), "{error}");
    };
    named(&|it| it["model"]["type"] = json!("WordLevel"), "WordLevel");
    named(&|it| it["model"]["type"] = json!("Unigram"), "Unigram with ids");
    named(&|it| it["model"]["dropout"] = json!(0.5), "dropout");
    named(
        &|it| it["model"]["continuing_subword_prefix"] = json!("##"),
        "continuing_subword_prefix",
    );
    named(&|it| it["model"]["end_of_word_suffix"] = json!("</w>"), "end_of_word_suffix");
    named(&|it| it["decoder"] = Value::Null, "decoder");
    named(&|it| it["decoder"] = json!({ "type": "CTC" }), "CTC");
    named(&|it| it["decoder"]["decoders"][0]["content"] = json!("_"), "Replace");
    named(
        &|it| {
            it["pre_tokenizer"] = json!({ "type": "Split", "behavior": "Isolated", "invert": false,
                                          "pattern": { "Regex": "(a)\\1" } });
        },
        "(a)\\1",
    );
    named(&|it| it["pre_tokenizer"] = json!({ "type": "Frob" }), "Frob");
    named(&|it| it["normalizer"] = json!({ "type": "Frob" }), "Frob");
    // These make the tokenizers crate panic.
    named(&|it| it["normalizer"] = json!({ "type": "Prepend", "prepend": "" }), "Prepend");
    named(&|it| it["pre_tokenizer"] = json!({ "type": "FixedLength", "length": 0 }), "FixedLength");
    named(
        &|it| {
            it["normalizer"] = json!({ "type": "Strip", "strip_left": true, "strip_right": true });
            it["added_tokens"][4]["content"] = json!(" ");
            it["added_tokens"][4]["normalized"] = json!(true);
        },
        "added_tokens.content",
    );
    named(
        &|it| it["normalizer"] = json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" }),
        "trie",
    );
}

#[test]
fn hostile_files_are_refused_and_never_panic() {
    for (merge, change) in [("a zz", "out"), ("ab", "one part"), ("a b c", "three")] {
        let error = refusal(|it| it["model"]["merges"] = json!([merge]));
        assert!(matches!(error, TokenizerError::BadMerge { rank: 0, .. }), "{change}: {error}");
    }
    // The concatenation would overrun a buffer inside the tokenizers crate.
    let error = refusal(|it| it["model"]["merges"] = json!(["<0x00> <0x01>"]));
    assert!(matches!(error, TokenizerError::BadMerge { .. }), "{error}");
    let error = refusal(|it| it["added_tokens"][3]["id"] = json!(270));
    assert!(matches!(error, TokenizerError::AddedTokenId { expected: 270, .. }), "{error}");
    let error = refusal(|it| it["model"]["vocab"]["far"] = json!(u32::MAX));
    assert!(matches!(error, TokenizerError::VocabularySize { .. }), "{error}");
    let error = refusal(|it| it["model"]["vocab"]["far"] = json!(4_000_000));
    assert!(matches!(error, TokenizerError::VocabularySize { .. }), "{error}");
    let error = refusal(|it| it["added_tokens"][4]["content"] = json!("x".repeat(5000)));
    assert!(matches!(error, TokenizerError::TokenTooLong { .. }), "{error}");
    // Each step triples the text.
    let step = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaa" });
    let error = refusal(|it| {
        it["normalizer"] = json!({ "type": "Sequence", "normalizers": vec![&step; 30] })
    });
    assert!(error.to_string().contains("growth"), "{error}");
    let step = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false });
    let error = refusal(|it| {
        it["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": vec![&step; 30] })
    });
    assert!(error.to_string().contains("growth"), "{error}");
    for json in ["", "{}", "[]", "null", "{\"model\":{}}", "{\"model\":{\"vocab\":{}}}"] {
        assert!(Tokenizer::from_json(json.as_bytes()).is_err(), "{json}");
    }
}

/// Anything that grows with the square of the text would take hours here.
#[test]
fn a_megabyte_of_anything_is_encoded() {
    let tokenizer = build(&file()).unwrap();
    let byte_level = {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../golden/tokenizer/parity/olmo2.tokenizer.json");
        Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap()
    };
    for fragment in ["a", " ", "\n", "!", "é", "1", "ab ", " \n", "\u{301}", "<think", "\u{3000}"]
    {
        let len = if ["a", " "].contains(&fragment) { 1 << 20 } else { 1 << 17 };
        let text = fragment.repeat(len / fragment.len());
        for tokenizer in [&tokenizer, &byte_level] {
            let ids = tokenizer.encode(&text, Specials::Parse).unwrap();
            assert_eq!(tokenizer.decode(&ids), text, "{fragment:?}");
        }
    }
}
