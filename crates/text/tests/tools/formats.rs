//! Tokenizers and formats of every family, small enough to look at.

use std::path::Path;

use exrail_text::tools::{CallLimits, CallParser, Piece, ThoughtLead, ToolFormat, ToolSpec};
use exrail_text::{ChatTemplate, Tokenizer, Vocabulary};
use serde_json::json;

/// Kinds of tokens, as GGUF numbers them.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;

/// The GPT-2 alphabet (`bytes_to_unicode`).
fn alphabet() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let code = |byte| if printable(&byte) { byte } else { others.next().unwrap() };
    (0..256).map(code).map(|code| char::from_u32(code).unwrap()).collect()
}

/// Bytes, `</s>` as the end, and `more` tokens.
pub(crate) fn tokenizer(more: &[(&str, i32)]) -> Tokenizer {
    let alphabet = alphabet();
    let mut tokens: Vec<String> = alphabet.iter().map(char::to_string).collect();
    let mut kinds = vec![NORMAL; tokens.len()];
    tokens.push("</s>".to_owned());
    kinds.push(CONTROL);
    let eos = Some(u32::try_from(tokens.len() - 1).unwrap());
    for &(token, kind) in more {
        let spelled = token.bytes().map(|byte| alphabet[usize::from(byte)]).collect();
        tokens.push(if kind == NORMAL { spelled } else { token.to_owned() });
        kinds.push(kind);
    }
    let (model, pre) = ("gpt2".to_owned(), "gpt-2".to_owned());
    let vocabulary = Vocabulary { model, pre, tokens, kinds, eos, ..Vocabulary::default() };
    Tokenizer::from_vocabulary(vocabulary).unwrap()
}

/// One of the templates beside this file.
pub(crate) fn template(name: &str) -> ChatTemplate {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/templates/{name}.jinja"));
    ChatTemplate::compile(&std::fs::read_to_string(path).unwrap(), "<s>", "</s>").unwrap()
}

/// Format and tokenizer of `hermes`, `coder`, `thinking`, `llama3`, `mistral`, `mistral-args`, `gemma` or `generic`.
pub(crate) fn family(name: &str) -> (ToolFormat, Tokenizer) {
    let (source, tokens): (&str, &[(&str, i32)]) = match name {
        "hermes" => ("qwen2_5", &[("<tool_call>", USER_DEFINED), ("</tool_call>", USER_DEFINED)]),
        "thinking" => ("qwen2_5", &[("<think>", USER_DEFINED), ("</think>", USER_DEFINED)]),
        "llama3" => ("llama3_1", &[("<|python_tag|>", CONTROL)]),
        "mistral" => ("mistral_tools", &[("[TOOL_CALLS]", CONTROL)]),
        "mistral-args" => (
            "mistral_arguments",
            &[("[TOOL_CALLS]", CONTROL), ("[ARGS]", CONTROL), ("[CALL_ID]", CONTROL)],
        ),
        "gemma" => ("gemma", &[("<start_of_turn>", CONTROL)]),
        "generic" => ("smollm2", &[]),
        other => panic!("no family {other}"),
    };
    let tokenizer = tokenizer(tokens);
    (ToolFormat::detect(Some(&template(source)), &tokenizer), tokenizer)
}

/// `get_weather` with a city and days, and `ping` without arguments.
pub(crate) fn tools() -> Vec<ToolSpec> {
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "type": "string" }, "days": { "type": "integer" } },
        "required": ["city"]
    });
    vec![
        ToolSpec::new("get_weather", Some("Weather of a city".into()), parameters).unwrap(),
        ToolSpec::new("ping", None, json!(null)).unwrap(),
    ]
}

/// All pieces of an answer that comes in these parts; neighbours of one kind are joined.
pub(crate) fn read<'a>(
    parser: &CallParser,
    parts: impl IntoIterator<Item = &'a str>,
) -> Vec<Piece> {
    let mut parser = parser.clone();
    let mut pieces: Vec<Piece> = parts.into_iter().flat_map(|part| parser.push(part)).collect();
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

/// A parser of this family for [`tools`].
pub(crate) fn parser(name: &str, lead: ThoughtLead) -> CallParser {
    family(name).0.parser(&tools(), lead, CallLimits::default())
}
