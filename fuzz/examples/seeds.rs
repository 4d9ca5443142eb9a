//! Writes valid inputs to `corpus/<target>/`, from which the fuzzer starts.

use std::fs;
use std::io;
use std::path::Path;

use exrail_testkit::{GgufValue, GgufWriter, TinyLlama, safetensors_bytes, tiny_bert, tiny_llama};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden");
    let targets = [
        "gguf",
        "gguf_parts",
        "safetensors",
        "hf_folder",
        "bert_config",
        "document",
        "tokenizer",
        "tool_calls",
        "json_schema",
        "gbnf",
    ];
    for target in targets {
        fs::create_dir_all(corpus.join(target))?;
    }

    let small =
        TinyLlama { n_layers: 1, width: 4, n_heads: 2, ffn_width: 4, ..TinyLlama::default() };
    for (name, tied) in [("tied", true), ("untied", false)] {
        fs::write(corpus.join("gguf").join(name), tiny_llama(1, TinyLlama { tied, ..small }))?;
    }

    fs::write(corpus.join("gguf_parts/two"), split_seed())?;
    tool_calls(&corpus.join("tool_calls"))?;
    let schema = r##"{"$defs":{"a":{"type":"string","pattern":"^[a-z]{2,}\\d$"}},"type":"object","properties":{"a":{"$ref":"#/$defs/a"},"b":{"oneOf":[{"type":"integer","minimum":3},{"enum":["x",null]}]},"c":{"type":"array","items":{"format":"date"},"uniqueItems":true}},"required":["a"],"additionalProperties":false}"##;
    fs::write(corpus.join("json_schema/many"), schema)?;
    let grammar = "root ::= \"(\" item{1,3} \")\" # comment\nitem ::= [a-z\\x41] | root | ([^\\n] \"\\\"\")?\n";
    fs::write(corpus.join("gbnf/recursive"), grammar)?;

    let tensors =
        [("a".to_owned(), vec![2, 2], vec![0.5; 4]), ("b".to_owned(), vec![1], vec![1.0])];
    fs::write(corpus.join("safetensors/two"), safetensors_bytes(&tensors))?;

    for folder in ["llama", "mixtral", "gemma3", "phi3", "qwen3_moe-mixed", "cohere2"] {
        let seed = hf_seed(&golden.join("families").join(folder))?;
        fs::write(corpus.join("hf_folder").join(folder), seed)?;
    }
    for folder in ["gptq", "awq", "exl3"] {
        let seed = hf_seed(&golden.join("quantised").join(folder))?;
        fs::write(corpus.join("hf_folder").join(folder), seed)?;
    }

    // The first byte picks the format, see the target.
    let markdown = "\x78---\na: b\n---\n# One\n\nText. More e.g. this.\n- a\n  b\n\n\
                    | h | i |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n<!-- x -->\nSub\n---\n$$\nx\n$$\n";
    fs::write(corpus.join("document/markdown"), markdown)?;
    fs::write(corpus.join("document/text"), "\x79One. Two!\n\nThree\x0cFour\n")?;
    let html = "\x7a<title>t</title><h1 id=a>One</h1><p>Text&shy;.<nav>n</nav><ul><li>a</ul>\
                <table><tr><td>1<td>2</table><pre>c\n d</pre>";
    fs::write(corpus.join("document/html"), html)?;

    tokenizers(&corpus.join("tokenizer"))?;

    let dir = corpus.join("bert_config/folder");
    tiny_bert(1, &dir)?;
    let names =
        ["config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"];
    let files = names.map(|name| fs::read(dir.join(name)));
    fs::remove_dir_all(&dir)?;
    let files = files.into_iter().collect::<io::Result<Vec<_>>>()?;
    fs::write(corpus.join("bert_config/tiny"), files.join(&0))
}

/// A model of two files with a tensor each.
/// An answer of each family; the first byte picks it, see the target.
fn tool_calls(dir: &Path) -> io::Result<()> {
    let answers = [
        (
            0,
            "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, \"}\"]}}\n</tool_call>",
        ),
        (
            1,
            "<think>b</think>\n<tool_call><function=f><parameter=a>1</parameter></function></tool_call>",
        ),
        (
            3,
            "{\"name\": \"f\", \"parameters\": {}}; {\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}",
        ),
        (3, "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}"),
        (6, "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}, \"id\": \"abcdef012\"}]"),
        (6, "[TOOL_CALLS]f[CALL_ID]abcdef012[ARGS]{\"a\": 1}[TOOL_CALLS]f[ARGS]{}"),
        (9, "```tool_call\n{\"name\": \"f\", \"arguments\": {}}\n```"),
        (14, "hm</think><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"),
    ];
    for (at, (family, answer)) in answers.iter().enumerate() {
        fs::write(dir.join(format!("answer-{at}")), [&[*family], answer.as_bytes()].concat())?;
    }
    Ok(())
}

fn split_seed() -> Vec<u8> {
    let u16_value = |value: u8| GgufValue::Raw { type_id: 2, bytes: vec![value, 0] };
    let parts = ["a", "b"].into_iter().zip(0..).map(|(name, number)| {
        GgufWriter::new()
            .key("split.no", u16_value(number))
            .key("split.count", u16_value(2))
            .key("split.tensors.count", GgufValue::I32(2))
            .key("general.architecture", "llama")
            .raw_data(&[1; 32])
            .raw_tensor(name.as_bytes(), &[8], 0, 0)
            .finish()
    });
    parts.flat_map(|part| [&(part.len() as u32).to_le_bytes()[..], &part].concat()).collect()
}

/// The parts of a folder in the order of the target, headers without their data.
fn hf_seed(dir: &Path) -> io::Result<Vec<u8>> {
    let part = |name: &str| fs::read(dir.join(name)).unwrap_or_default();
    let header = |name: &str| -> Vec<u8> {
        let file = part(name);
        let Some((len, rest)) = file.split_first_chunk::<8>() else { return Vec::new() };
        rest[..usize::try_from(u64::from_le_bytes(*len)).unwrap_or_default()].to_vec()
    };
    let index = part("model.safetensors.index.json");
    let shards = if index.is_empty() {
        ["model.safetensors", "other.safetensors"]
    } else {
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    };
    let parts = [
        fs::read(dir.join("config.json"))?,
        index,
        header(shards[0]),
        header(shards[1]),
        part("quantize_config.json"),
        part("generation_config.json"),
        part("tokenizer_config.json"),
    ];
    Ok(parts.join(&0))
}

/// Vocabularies with a text each; the target says how they are laid out.
fn tokenizers(dir: &Path) -> io::Result<()> {
    let table = |selector: u8, entries: &[(u8, &str)], text: &str| {
        let mut bytes = vec![selector];
        for (kind, token) in entries {
            bytes.extend([*kind, 0]);
            bytes.extend(token.as_bytes());
            bytes.push(255);
        }
        bytes.extend(text.as_bytes());
        bytes
    };
    let pieces = [
        (2, "<unk>"),
        (3, "<s>"),
        (3, "</s>"),
        (6, "<0x41>"),
        (1, "\u{2581}"),
        (1, "a"),
        (1, "b"),
        (5, "ab"),
        (4, "  "),
        (1, "\u{2581}ab"),
        (4, "<think>"),
    ];
    for selector in 0..128 {
        let text = "<s> ab  aab A\u{e9}</s>\n<think> 12";
        fs::write(dir.join(format!("pieces-{selector}")), table(selector, &pieces, text))?;
    }
    let merges = [
        (2, "<unk>"),
        (3, "<s>"),
        (1, "a"),
        (1, "b"),
        (1, "ab"),
        (1, "\u{120}"),
        (1, "\u{120}ab"),
        (7, "a b"),
        (7, "\u{120} ab"),
    ];
    for pre in 0..8 {
        fs::write(dir.join(format!("merges-{pre}")), table(pre << 2, &merges, "ab ab  <s>ab"))?;
    }
    let words =
        [(3, "[UNK]"), (3, "[CLS]"), (3, "[SEP]"), (1, "\u{2581}a"), (1, "b"), (1, "\u{2581},")];
    fs::write(dir.join("words"), table(3, &words, "ab, Ab [SEP] \u{e9}"))?;
    let parts = [
        (r#""BPE","merges":["a b"],"unk_token":"a""#, r#"{"a":0,"b":1,"ab":2}"#),
        (
            r###""WordPiece","unk_token":"a","continuing_subword_prefix":"##""###,
            r###"{"a":0,"##b":1}"###,
        ),
        (r#""Unigram","unk_id":0"#, r#"[["a",0.0],["b",-1.0],["\u2581ab",-2.5]]"#),
    ];
    let decoders = [
        r#"{"type":"ByteLevel"}"#,
        r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###,
        r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"\u2581"},"content":" "},{"type":"ByteFallback"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#,
    ];
    let steps = [
        r#"{"type":"Sequence","pretokenizers":[{"type":"Digits","individual_digits":true},{"type":"Split","pattern":{"Regex":"a|\\s+(?!\\S)|\\s+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":true,"use_regex":true,"trim_offsets":true}]}"#,
        r#"{"type":"BertPreTokenizer"}"#,
        r#"{"type":"Metaspace","replacement":"\u2581","prepend_scheme":"first","split":false}"#,
    ];
    for (at, ((model, vocab), (decoder, steps))) in
        parts.iter().zip(decoders.iter().zip(steps)).enumerate()
    {
        let json = format!(
            r#"{{"added_tokens":[{{"id":3,"content":"<x>","special":true,"lstrip":true,"rstrip":true,"single_word":true,"normalized":false}}],"normalizer":{{"type":"NFC"}},"pre_tokenizer":{steps},"decoder":{decoder},"model":{{"type":{model},"vocab":{vocab}}}}}"#
        );
        let mut bytes = vec![255];
        bytes.extend(json.as_bytes());
        bytes.extend("\0ab <x> ab12".as_bytes());
        fs::write(dir.join(format!("json-{at}")), bytes)?;
    }
    Ok(())
}
