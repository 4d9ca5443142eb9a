//! The 10,200 lines of `golden/tokenizer/parity`, what the references make of them, and the
//! comparison.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

use std::path::{Path, PathBuf};

use exrail_text::{Specials, Tokenizer, Vocabulary};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

const N_LINES: usize = 10_200;
const SEED: u64 = 20_240_229;
const LINES_PER_BLOCK: usize = 100;

/// The folder of the goldens.
pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/tokenizer/parity")
}

/// A JSON file.
pub(crate) fn json(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap()
}

/// As `lines` of corpus.py.
fn lines() -> Vec<String> {
    let pools: Vec<Vec<String>> =
        serde_json::from_value(json(&golden().join("pools.json"))).unwrap();
    let mut state = SEED;
    let mut draw = |below: usize| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) % below as u64).unwrap()
    };
    let mut line = || {
        let mut line = String::new();
        for _ in 0..=draw(12) {
            let pool = &pools[draw(pools.len())];
            let fragment = &pool[draw(pool.len())];
            let times = if draw(12) == 0 { 2 + draw(6) } else { 1 };
            line.push_str(&fragment.repeat(times));
            if draw(4) != 0 {
                line.push(' ');
            }
        }
        line
    };
    (0..N_LINES).map(|_| line()).collect()
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A vocabulary that fetch.py or small.py wrote.
pub(crate) fn vocabulary(table: &Value) -> Vocabulary {
    let text = |key: &str| table[key].as_str().unwrap_or_default().to_owned();
    let flag = |key: &str| table[key].as_bool().unwrap_or_default();
    let id = |key: &str| table[key].as_u64().map(|id| u32::try_from(id).unwrap());
    Vocabulary {
        model: text("model"),
        pre: text("pre"),
        tokens: list(&table["tokens"]),
        kinds: list(&table["kinds"]),
        merges: list(&table["merges"]),
        scores: list(&table["scores"]),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        add_space_prefix: flag("add_space_prefix"),
        remove_extra_whitespaces: flag("remove_extra_whitespaces"),
        precompiled_charsmap: base64(&text("precompiled_charsmap")),
        strips_right: flag("strips_right"),
        ..Vocabulary::default()
    }
}

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    if value.is_null() { Vec::new() } else { serde_json::from_value(value.clone()).unwrap() }
}

fn base64(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let value = |digit: u8| digits.iter().position(|&it| it == digit).unwrap_or(0);
    let padding = text.bytes().filter(|&digit| digit == b'=').count();
    let mut bytes = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let bits = four.iter().fold(0, |bits, &digit| bits << 6 | value(digit));
        bytes.extend(&u32::try_from(bits).unwrap().to_be_bytes()[1..]);
    }
    bytes.truncate(bytes.len() - padding);
    bytes
}

/// What decoding gives back of what was encoded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Back {
    /// Every byte.
    Bytes,
    /// Every byte, but a space for each U+2581.
    Spaces,
    /// A text changed by the normaliser.
    Changed,
}

/// Ways of reading special tokens, as the golden names them.
pub(crate) const BOTH: [(Specials, &str); 2] =
    [(Specials::AsText, "as_text"), (Specials::Parse, "parse")];

/// Compares the ids of all lines with those of the reference. Whatever the vocabulary, a stream
/// says the same as the whole, and what a lossless one decodes is the line.
pub(crate) fn compare(family: &str, tokenizer: &Tokenizer, ways: &[(Specials, &str)], back: Back) {
    let golden = json(&golden().join("parity.json"));
    let lines = lines();
    assert_eq!(golden["corpus"], hex(&Sha256::digest(lines.join("\0").as_bytes())));
    for &(specials, way) in ways {
        let golden = &golden["families"][family][way];
        let found: Vec<Vec<u32>> = lines
            .iter()
            .map(|line| {
                tokenizer.encode(line, specials).unwrap_or_else(|it| panic!("{it}: {line:?}"))
            })
            .collect();
        let first = golden["first"].as_array().unwrap();
        for ((line, found), expected) in lines.iter().zip(&found).zip(first) {
            assert_eq!(*found, list::<u32>(expected), "{family} {way}: {line:?}");
        }
        let mut total = Sha256::new();
        let blocks = golden["blocks"].as_str().unwrap().split(' ');
        let mut wrong = Vec::new();
        for ((index, block), expected) in found.chunks(LINES_PER_BLOCK).enumerate().zip(blocks) {
            let ids = block.iter().flat_map(|ids| ids.iter().copied().chain([u32::MAX]));
            let bytes: Vec<u8> = ids.flat_map(u32::to_le_bytes).collect();
            if !hex(&Sha256::digest(&bytes)).starts_with(expected) {
                wrong.push(index);
            }
            total.update(&bytes);
        }
        assert!(wrong.is_empty(), "{family} {way}: blocks {wrong:?} of 100 lines differ");
        assert_eq!(golden["total"], hex(&total.finalize()), "{family} {way}");
        for (line, ids) in lines.iter().zip(&found).step_by(7) {
            let whole = tokenizer.decode(ids);
            let mut detokenizer = tokenizer.detokenizer();
            let bytes = ids.iter().map(|&id| tokenizer.token_bytes(id).unwrap());
            let mut stream: String = bytes.map(|bytes| detokenizer.push(bytes)).collect();
            stream.push_str(&detokenizer.finish());
            assert_eq!(stream, whole, "{family}");
            // A literal may take spaces along.
            let expected = match back {
                Back::Bytes => line.clone(),
                Back::Spaces => line.replace('\u{2581}', " "),
                Back::Changed => continue,
            };
            if specials == Specials::AsText {
                assert_eq!(whole, expected, "{family}");
            }
        }
    }
}
