//! An answer that may hold tool calls; the first byte says of which family and into what pieces it is cut. However it is
//! cut the same comes out, nothing of it is lost, and a call is one of a known tool.

#![no_main]

use std::sync::LazyLock;

use exrail_text::tools::{
    CallLimits, CallParser, Piece, ThoughtLead, ToolFamily, ToolFormat, ToolSpec,
};
use exrail_text::{Tokenizer, Vocabulary};
use libfuzzer_sys::fuzz_target;

const FAMILIES: [ToolFamily; 5] = [
    ToolFamily::Hermes,
    ToolFamily::Llama3,
    ToolFamily::Mistral,
    ToolFamily::Gemma,
    ToolFamily::Generic,
];

/// A parser of each family, the thought absent, possible and open.
static PARSERS: LazyLock<Vec<CallParser>> = LazyLock::new(|| {
    let tokens = ["<s>", "a", "<think>", "</think>"].map(str::to_owned).to_vec();
    let (model, pre) = ("gpt2".to_owned(), "gpt-2".to_owned());
    let kinds = vec![3, 1, 4, 4];
    let vocabulary =
        Vocabulary { model, pre, tokens, kinds, eos: Some(0), ..Vocabulary::default() };
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).expect("a small vocabulary");
    let parameters = serde_json::json!({ "properties": { "a": { "type": "integer" } } });
    let tool = ToolSpec::new("f", None, parameters).expect("a tool");
    let limits = CallLimits { calls: 2, bytes: 256 };
    let leads = [ThoughtLead::Absent, ThoughtLead::MayOpen, ThoughtLead::IsOpen];
    let both = FAMILIES.iter().flat_map(|&family| leads.map(|lead| (family, lead)));
    both.map(|(family, lead)| {
        let format = ToolFormat::detect_as(family, None, &tokenizer);
        format.parser(std::slice::from_ref(&tool), lead, limits)
    })
    .collect()
});

/// Thought, text and calls; neighbours of one kind are joined.
fn read(parser: &CallParser, parts: impl Iterator<Item = String>) -> Vec<Piece> {
    let mut parser = parser.clone();
    let mut pieces: Vec<Piece> = parts.flat_map(|part| parser.push(&part)).collect();
    pieces.extend(parser.finish());
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(before)), Piece::Text(text))
            | (Some(Piece::Thought(before)), Piece::Thought(text)) => before.push_str(&text),
            (_, piece) => joined.push(piece),
        }
    }
    joined
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    let answer = String::from_utf8_lossy(rest).into_owned();
    let (which, cut) = (usize::from(first % 15), usize::from(first / 15) + 1);
    let parser = &PARSERS[which];
    let whole = read(parser, std::iter::once(answer.clone()));
    let characters: Vec<char> = answer.chars().collect();
    assert_eq!(whole, read(parser, characters.chunks(cut).map(|it| it.iter().collect())));
    let mut shown = String::new();
    let mut is_all_shown = true;
    for (at, piece) in whole.iter().enumerate() {
        match piece {
            Piece::Text(text) => shown.push_str(text),
            Piece::Malformed(it) => shown.push_str(&it.text),
            Piece::Call(call) => {
                assert_eq!(call.name, "f");
                assert!(serde_json::from_str::<serde_json::Value>(&call.arguments_json).is_ok());
                is_all_shown = false;
            }
            _ => {
                assert_eq!(at, 0, "a thought comes first");
                is_all_shown = false;
            }
        }
    }
    if is_all_shown && !answer.contains("think>") {
        assert_eq!(shown, answer);
    }
});
