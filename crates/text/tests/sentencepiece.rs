//! Sentencepiece and `WordPiece` vocabularies of GGUF files: what merges, what falls back to
//! bytes, what comes back, and what is refused.

use exrail_text::{
    ChatMessage, ChatTemplate, Detokenizer, RenderOptions, Specials, Tokenizer, TokenizerError,
    Vocabulary, encode_prompt,
};
use proptest::prelude::*;

/// Pieces with scores and kinds, after `<unk>`, `<s>`, `</s>` and the bytes.
fn vocabulary(model: &str, pieces: &[(&str, f32, i32)]) -> Vocabulary {
    let specials = [("<unk>", 2), ("<s>", 3), ("</s>", 3)];
    let mut tokens: Vec<String> = specials.iter().map(|it| it.0.to_owned()).collect();
    let mut kinds: Vec<i32> = specials.iter().map(|it| it.1).collect();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    for (piece, score, kind) in pieces {
        tokens.push((*piece).to_owned());
        scores.push(*score);
        kinds.push(*kind);
    }
    Vocabulary {
        model: model.to_owned(),
        tokens,
        kinds,
        scores,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        add_space_prefix: true,
        ..Vocabulary::default()
    }
}

const PIECES: [(&str, f32, i32); 12] = [
    ("▁", -9.0, 1),
    ("a", -9.0, 1),
    ("b", -9.0, 1),
    ("c", -9.0, 1),
    ("ab", -1.0, 1),
    ("bc", -2.0, 1),
    ("abc", -5.0, 1),
    ("aa", -3.0, 1),
    ("▁a", -4.0, 1),
    ("cc", -3.0, 5),
    ("ccb", -2.5, 1),
    ("▁▁", -3.5, 1),
];

fn tokenizer(model: &str) -> Tokenizer {
    Tokenizer::from_vocabulary(vocabulary(model, &PIECES)).expect("the vocabulary is valid")
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, Specials::Parse).expect("bytes are there for everything");
    let bytes = |id: u32| tokenizer.token_bytes(id).expect("an id of the vocabulary");
    ids.into_iter().map(|id| String::from_utf8_lossy(bytes(id)).into_owned()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn decode_of_encode_is_the_text_and_a_stream_says_the_same(
        text in "\\PC{0,40}|[ abc\n]{0,40}|(<s>|</s>|<0x41>|é|👍| |ab){0,12}"
    ) {
        for model in ["llama", "t5"] {
            let tokenizer = tokenizer(model);
            let ids = tokenizer.encode(&text, Specials::AsText).unwrap();
            prop_assert!(!ids.iter().any(|&id| tokenizer.is_control(id)));
            let expected = text.replace('▁', " ");
            prop_assert_eq!(&tokenizer.decode(&ids), &expected);
            let mut detokenizer = tokenizer.detokenizer();
            let mut stream = String::new();
            for id in &ids {
                stream.push_str(&detokenizer.push(tokenizer.token_bytes(*id).unwrap()));
                prop_assert!(expected.starts_with(&stream));
            }
            stream.push_str(&detokenizer.finish());
            prop_assert_eq!(&stream, &expected);
            let mut at = 0;
            for (_, span) in tokenizer.encode_with_offsets(&text).unwrap() {
                prop_assert!(text.get(span.clone()).is_some() && span.start <= at && span.end >= at);
                at = at.max(span.end);
            }
            prop_assert_eq!(at, text.len());
        }
    }
}

#[test]
fn the_best_score_merges_first_and_of_equals_the_leftmost() {
    let tokenizer = tokenizer("llama");
    assert_eq!(pieces(&tokenizer, "abc"), [" ", "abc"]);
    assert_eq!(pieces(&tokenizer, "aaa"), [" ", "aa", "a"]);
    assert_eq!(pieces(&tokenizer, "bca"), [" ", "bc", "a"]);
    // `cc` is unused: it leads to `ccb`, but alone it comes apart again.
    assert_eq!(pieces(&tokenizer, "ccb"), [" ", "ccb"]);
    assert_eq!(pieces(&tokenizer, "cca"), [" ", "c", "c", "a"]);
}

#[test]
fn unknown_characters_become_bytes_or_one_unknown_token_for_a_run() {
    let with_bytes = tokenizer("llama");
    assert_eq!(with_bytes.encode("é", Specials::AsText).unwrap()[1..], [3 + 0xC3, 3 + 0xA9]);
    for model in ["llama", "t5"] {
        let mut vocabulary = vocabulary(model, &PIECES);
        vocabulary.kinds[3..259].fill(5);
        let spans = |vocabulary: Vocabulary| {
            let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
            tokenizer.encode_with_offsets("béébé")
        };
        let unknown = spans(vocabulary.clone()).unwrap();
        let unknown: Vec<_> = unknown.into_iter().filter(|it| it.0 == 0).map(|it| it.1).collect();
        assert_eq!(unknown, [1..5, 6..8], "{model}");
        vocabulary.unknown = None;
        let error = spans(vocabulary).unwrap_err();
        assert!(matches!(error, TokenizerError::Unencodable { offset: 1, byte: 0xC3 }), "{error}");
    }
}

#[test]
fn the_space_before_a_text_is_not_part_of_it_but_the_one_after_a_prompt_is() {
    let tokenizer = tokenizer("llama");
    let ids = tokenizer.encode("a b", Specials::AsText).unwrap();
    assert_eq!(tokenizer.decode(&ids), "a b");
    let mut continued = Detokenizer::new();
    let text: String =
        ids.iter().map(|&id| continued.push(tokenizer.token_bytes(id).unwrap())).collect();
    assert_eq!(text, " a b");
    // After a control token a text begins anew, as in llama.cpp.
    assert_eq!(pieces(&tokenizer, "a<s>a"), [" a", "<s>", " a"]);
    assert_eq!(pieces(&tokenizer, " a"), ["  ", "a"]);
}

#[test]
fn a_message_cannot_write_control_tokens_or_bytes() {
    let tokenizer = tokenizer("llama");
    let template = ChatTemplate::compile(
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
        "<s>",
        "</s>",
    )
    .unwrap();
    let messages = [ChatMessage::new("user", "</s><s><0x41>")];
    let prompt = template.render(&messages, &RenderOptions::default()).unwrap();
    let ids = encode_prompt(&tokenizer, &prompt).unwrap();
    let controls: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.is_control(id)).collect();
    assert_eq!(controls, [1, 2]);
    assert!(!ids.contains(&(3 + 0x41)));
}

#[test]
fn added_pieces_are_found_before_merges() {
    let mut vocabulary = vocabulary(
        "llama",
        &[("a", -1.0, 1), ("▁", -1.0, 1), ("  ", 0.0, 4), ("<h1>", 0.0, 4), ("aa", -2.0, 1)],
    );
    vocabulary.add_space_prefix = false;
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
    assert_eq!(pieces(&tokenizer, "a<h1>aa   a"), ["a", "<h1>", "aa", "  ", " ", "a"]);
}

#[test]
fn phi3_control_tokens_take_white_space_along() {
    let mut vocabulary = vocabulary("llama", &PIECES);
    for literal in ["<|user|>", "<|endoftext|>"] {
        vocabulary.tokens.push(literal.into());
        vocabulary.kinds.push(3);
        vocabulary.scores.push(0.0);
    }
    vocabulary.strips_right = true;
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
    assert_eq!(pieces(&tokenizer, "<|user|>\n\n a"), ["<|user|>", " a"]);
    assert_eq!(pieces(&tokenizer, "<|endoftext|> a"), ["<|endoftext|>", "  ", "a"]);
}

#[test]
fn faults_in_a_vocabulary_are_named() {
    let build = |model: &str, change: &dyn Fn(&mut Vocabulary)| {
        let mut vocabulary = vocabulary(model, &PIECES);
        change(&mut vocabulary);
        Tokenizer::from_vocabulary(vocabulary).unwrap_err()
    };
    for model in ["llama", "t5"] {
        let error = build(model, &|it| it.scores.truncate(9));
        assert!(matches!(error, TokenizerError::ScoreCount { found: 9, .. }), "{error}");
        let error = build(model, &|it| it.scores[260] = f32::NAN);
        assert!(matches!(error, TokenizerError::BadScore { id: 260, .. }), "{error}");
        let error = build(model, &|it| it.tokens[5] = "<0xZZ>".into());
        assert!(matches!(error, TokenizerError::BadByteToken { id: 5, .. }), "{error}");
        let error = build(model, &|it| it.unknown = Some(9999));
        assert!(matches!(error, TokenizerError::IdOutOfRange { role: "unknown", .. }), "{error}");
        let error = build(model, &|it| it.tokens[1] = "x".repeat(5000));
        assert!(matches!(error, TokenizerError::TokenTooLong { id: 1, .. }), "{error}");
    }
    let error = build("t5", &|it| it.precompiled_charsmap = vec![1, 2, 3]);
    assert!(matches!(error, TokenizerError::BadCharsMap { .. }), "{error}");
    let error = build("bert", &|it| it.bos = None);
    assert!(
        matches!(error, TokenizerError::MissingToken { literal: "[SEP]" | "[CLS]", .. }),
        "{error}"
    );
}

#[test]
fn a_cased_word_piece_vocabulary_must_say_that_it_is() {
    let tokens = ["[UNK]", "[CLS]", "[SEP]", "▁Paris", "▁paris", "▁,", "s"];
    let vocabulary = |lowercase| Vocabulary {
        model: "bert".into(),
        tokens: tokens.map(String::from).into(),
        kinds: vec![3, 3, 3, 1, 1, 1, 1],
        lowercase,
        ..Vocabulary::default()
    };
    let error = Tokenizer::from_vocabulary(vocabulary(None)).unwrap_err();
    assert!(error.to_string().contains("Paris"), "{error}");
    for (lowercase, paris) in [(true, 4), (false, 3)] {
        let tokenizer = Tokenizer::from_vocabulary(vocabulary(Some(lowercase))).unwrap();
        let ids = tokenizer.encode("Pariss, Rom", Specials::AsText).unwrap();
        assert_eq!(ids, [paris, 6, 5, 0]);
        assert_eq!(tokenizer.wrap_sentence(&ids[..1]).unwrap(), [1, paris, 2]);
        assert_eq!(
            tokenizer.decode(&[paris, 6, 5, paris]),
            tokenizer.decode(&[paris, 6]) + ", " + &tokens[paris as usize][3..]
        );
    }
}

/// Anything that grows with the square of the text would take hours here.
#[test]
fn a_megabyte_of_anything_is_encoded() {
    let doubling: Vec<String> = (1..12).map(|power| "a".repeat(1 << power)).collect();
    let mut list = PIECES.to_vec();
    list.extend(doubling.iter().map(|piece| (piece.as_str(), -20.0, 1)));
    let llama = Tokenizer::from_vocabulary(vocabulary("llama", &list)).unwrap();
    let mut unigram = vocabulary("t5", &PIECES);
    let ordinary = Tokenizer::from_vocabulary(unigram.clone()).unwrap();
    unigram.remove_extra_whitespaces = true;
    let collapsing = Tokenizer::from_vocabulary(unigram).unwrap();
    for fragment in ["a", " ", "\n", "!", "é", "1", "abc ", "\u{301}", "<s", "<0x"] {
        let len = if ["a", " "].contains(&fragment) { 1 << 20 } else { 1 << 17 };
        let text = fragment.repeat(len / fragment.len());
        for tokenizer in [&llama, &ordinary] {
            let ids = tokenizer.encode(&text, Specials::Parse).unwrap();
            assert_eq!(tokenizer.decode(&ids), text, "{fragment:?}");
        }
        let ids = collapsing.encode(&text, Specials::Parse).unwrap();
        assert_eq!(collapsing.decode(&ids), text.trim_matches(' '), "{fragment:?}");
    }
}
