//! A grammar of llama.cpp of any bytes, translated and compiled over the bytes as vocabulary. It ends within its
//! limits and is taken or refused.

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
        let limits = Limits { source_bytes: 1 << 12, compile_ms: 2_000, ..Limits::default() };
        Compiler::new(vocabulary, limits).expect("the vocabulary is fit for it")
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(grammar) = compiler().compile(&Source::Gbnf(text.to_owned())) {
        assert!(grammar.matcher().mask().expect("the first mask was computed before").n_allowed() > 0);
    }
});
