//! A JSON Schema of any bytes, screened and compiled over the bytes as vocabulary. It ends within its limits; what
//! is taken has a first mask, and its own closing is a whole answer.

#![no_main]

#[path = "../../crates/grammar/tests/common/mod.rs"]
mod common;

use std::sync::OnceLock;

use exrail_grammar::{Compiler, Limits, Source, Vocabulary};
use libfuzzer_sys::fuzz_target;

fn compiler() -> &'static Compiler {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    COMPILER.get_or_init(|| {
        let vocabulary = Vocabulary::new(&common::tokenizer()).expect("it has an end and all of ASCII");
        let limits = Limits { source_bytes: 1 << 14, compile_ms: 2_000, ..Limits::default() };
        Compiler::new(vocabulary, limits).expect("the vocabulary is fit for it")
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(schema) = serde_json::from_slice(bytes) else { return };
    let Ok(grammar) = compiler().compile(&Source::JsonSchema(schema)) else { return };
    let mut matcher = grammar.matcher();
    assert!(matcher.mask().expect("the first mask was computed before").n_allowed() > 0);
    if let Some(closing) = matcher.closing(32) {
        for id in closing {
            matcher.advance(id).expect("a closing is a way through the masks");
        }
        assert!(matcher.is_complete());
    }
});
