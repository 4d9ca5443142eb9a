//! A vocabulary and a text for it. The first byte says what follows: below 128 a table as a GGUF
//! file has it, one entry between any two bytes 255 and the text last; from 128 a
//! `tokenizer.json`, a NUL and the text. What loads encodes in bounded time or refuses, gives no
//! control token for text, and decodes in a stream as it does whole.

#![no_main]

use exrail_text::{Specials, Tokenizer, Vocabulary};
use libfuzzer_sys::fuzz_target;

const MODELS: [&str; 4] = ["gpt2", "llama", "t5", "bert"];
const PRE: [&str; 8] =
    ["smollm", "command-r", "gpt-2", "llama-bpe", "qwen2", "tekken", "llama4", "default"];

/// An entry is a kind, a score and a token; kind 7 is a merge, kind 8 the map of characters.
fn table(selector: u8, entries: &[&[u8]]) -> Vocabulary {
    let flag = |bit: u8| selector & 1 << bit != 0;
    let mut vocabulary = Vocabulary {
        model: MODELS[usize::from(selector) % 4].into(),
        pre: PRE[usize::from(selector >> 2) % 8].into(),
        unknown: flag(2).then_some(0),
        bos: flag(3).then_some(1),
        add_space_prefix: flag(4),
        remove_extra_whitespaces: flag(5),
        strips_right: flag(6),
        lowercase: Some(flag(3)),
        ..Vocabulary::default()
    };
    for entry in entries {
        let [kind, score, token @ ..] = entry else { continue };
        let text = String::from_utf8_lossy(token).into_owned();
        match kind % 10 {
            7 => vocabulary.merges.push(text),
            8 => vocabulary.precompiled_charsmap = token.to_vec(),
            kind => {
                vocabulary.tokens.push(text);
                vocabulary.kinds.push(kind.into());
                vocabulary.scores.push(f32::from(score.cast_signed()) / 8.0);
            }
        }
    }
    vocabulary
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&selector, rest)) = bytes.split_first() else { return };
    let (tokenizer, text) = if selector < 128 {
        let mut fields: Vec<&[u8]> = rest.split(|&byte| byte == 255).collect();
        let Some(text) = fields.pop() else { return };
        (Tokenizer::from_vocabulary(table(selector, &fields)), text)
    } else {
        let end = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
        (Tokenizer::from_json(&rest[..end]), rest.get(end + 1..).unwrap_or_default())
    };
    let Ok(tokenizer) = tokenizer else { return };
    let text = String::from_utf8_lossy(text);
    for specials in [Specials::AsText, Specials::Parse] {
        let Ok(ids) = tokenizer.encode(&text, specials) else { continue };
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_len()));
        let mut detokenizer = tokenizer.detokenizer();
        let pieces = ids.iter().filter_map(|&id| tokenizer.token_bytes(id));
        let mut stream: String = pieces.map(|bytes| detokenizer.push(bytes)).collect();
        stream.push_str(&detokenizer.finish());
        assert_eq!(stream, tokenizer.decode(&ids));
    }
    if let Ok(tokens) = tokenizer.encode_with_offsets(&text) {
        assert!(tokens.iter().all(|(_, span)| text.get(span.clone()).is_some()));
    }
});
