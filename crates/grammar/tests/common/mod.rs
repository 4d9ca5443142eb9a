//! A small byte-level vocabulary and walks through grammars.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

use std::sync::{Arc, OnceLock};

use exrail_grammar::{Compiler, Grammar, GrammarError, Limits, Source};
use exrail_text::{Tokenizer, Vocabulary};
use serde_json::Value;

/// Pairs that are one token, best first.
const MERGES: [&str; 20] = [
    "\" }", "\" ,", "\" :", "{ \"", "Ġ Ġ", "Ċ Ġ", "t r", "tr ue", "u e", "a b", "n a", "m e",
    "na me", "] }", "} }", "[ ]", "{ }", "0 0", ", \"", "\" \"",
];

/// How byte-level vocabularies spell a byte.
fn spelled(byte: u8) -> char {
    let printable = |it: u8| matches!(it, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&it| !printable(it)).count();
    char::from_u32(256 + u32::try_from(before).unwrap()).unwrap()
}

/// Control tokens `<s>`, `</s>`, `<pad>`; a reserved token and an empty one; the bytes; the merges.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    let mut tokens: Vec<String> =
        ["<s>", "</s>", "<|tool|>", "<unused7>", ""].map(str::to_owned).to_vec();
    let mut kinds = vec![3, 3, 3, 1, 1];
    tokens.extend((0..=255).map(|byte| spelled(byte).to_string()));
    let merges: Vec<String> = MERGES.iter().map(|&it| it.to_owned()).collect();
    for merge in &merges {
        let token = merge.replace(' ', "");
        if !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    kinds.resize(tokens.len(), 1);
    let vocabulary = Vocabulary {
        model: "gpt2".into(),
        pre: "smollm".into(),
        tokens,
        kinds,
        merges,
        bos: Some(0),
        eos: Some(1),
        ..Vocabulary::default()
    };
    Arc::new(Tokenizer::from_vocabulary(vocabulary).unwrap())
}

/// One compiler for all tests of a program.
pub(crate) fn compiler() -> &'static Compiler {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    COMPILER.get_or_init(|| {
        let vocabulary = exrail_grammar::Vocabulary::new(&tokenizer()).unwrap();
        Compiler::new(vocabulary, Limits::default()).unwrap()
    })
}

/// Compiles a schema.
pub(crate) fn schema(schema: &Value) -> Result<Grammar, GrammarError> {
    compiler().compile(&Source::JsonSchema(schema.clone()))
}

/// Whether the mask lets a text through as a whole answer.
pub(crate) fn walks(grammar: &Grammar, text: &str) -> bool {
    let mut matcher = grammar.matcher();
    let ids = compiler().vocabulary().spell(text);
    ids.into_iter().all(|id| matcher.advance(id).is_ok()) && matcher.is_complete()
}

/// Whether a text passes the mask and the validator.
pub(crate) fn accepts(grammar: &Grammar, text: &str) -> bool {
    walks(grammar, text)
        && grammar.validator().is_none_or(|validator| validator.check_text(text).is_ok())
}
