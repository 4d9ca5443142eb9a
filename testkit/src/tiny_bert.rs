//! [`tiny_bert`]: a sentence-transformers folder with a small BERT encoder.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Random;

const N_LAYERS: usize = 2;
const WIDTH: usize = 64;
const N_HEADS: usize = 4;
const FFN_WIDTH: usize = 128;
const MAX_POSITIONS: usize = 512;
const MAX_SEQ_LENGTH: usize = 256;
const N_TOKEN_TYPES: usize = 2;
const SPECIALS: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
const WORDS: &str = "the of and to in is was for that it with as on be at by this had not are but \
    from or have an they which one you were all her she there would their we him been has when who \
    will no more if out so up said what its about than into them can only other time new some could \
    these two may first then do any my now such like our over man me even most made after also did \
    many pump pressure valve order price customer delivery invoice return refund warranty temperature \
    water battery manual safety limit maximum minimum days hours ##s ##ed ##ing ##er ##ly ##tion ##al";

/// Writes a folder as sentence-transformers does: `config.json`, `model.safetensors`,
/// `tokenizer.json` (lower-casing `WordPiece` with `[CLS]` and `[SEP]`), `modules.json`,
/// `sentence_bert_config.json` and `1_Pooling/config.json`.
///
/// The encoder has 2 layers of width 64, mean pooling and normalisation. Word embeddings are ten
/// times larger than those of positions, so that texts with words in common get similar vectors.
///
/// # Errors
/// When a file cannot be written.
pub fn tiny_bert(seed: u64, dir: &Path) -> io::Result<()> {
    let vocabulary = vocabulary();
    fs::create_dir_all(dir.join("1_Pooling"))?;
    let write = |name: &str, value: &Value| fs::write(dir.join(name), value.to_string());
    write("config.json", &config(vocabulary.len()))?;
    write("tokenizer.json", &tokenizer(&vocabulary))?;
    write("modules.json", &modules())?;
    write(
        "sentence_bert_config.json",
        &json!({"max_seq_length": MAX_SEQ_LENGTH, "do_lower_case": false}),
    )?;
    write(
        "1_Pooling/config.json",
        &json!({
            "word_embedding_dimension": WIDTH,
            "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": true,
            "pooling_mode_max_tokens": false,
            "pooling_mode_mean_sqrt_len_tokens": false,
        }),
    )?;
    fs::write(dir.join("model.safetensors"), safetensors_bytes(&weights(seed, vocabulary.len())))
}

/// A safetensors file of `F32` tensors: name, shape (outermost first), values.
///
/// # Panics
/// When a shape does not have as many elements as there are values.
#[must_use]
pub fn safetensors_bytes(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, shape, values) in tensors {
        let len: usize = shape.iter().product();
        assert_eq!(len, values.len(), "`{name}`: values for shape {shape:?}");
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        let offsets = [start, data.len()];
        let info = json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), info);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

/// Specials, printable ASCII without upper case as starts and as continuations, then words.
fn vocabulary() -> Vec<String> {
    let characters = || (b'!'..=b'~').filter(|byte| !byte.is_ascii_uppercase()).map(char::from);
    let mut seen = HashSet::new();
    let specials = SPECIALS.iter().map(|&special| special.to_owned());
    specials
        .chain(characters().map(String::from))
        .chain(characters().map(|c| format!("##{c}")))
        .chain(WORDS.split_whitespace().map(str::to_owned))
        .filter(|token| seen.insert(token.clone()))
        .collect()
}

fn config(vocab_size: usize) -> Value {
    json!({
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "intermediate_size": FFN_WIDTH,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": MAX_POSITIONS,
        "position_embedding_type": "absolute",
        "type_vocab_size": N_TOKEN_TYPES,
        "pad_token_id": 0,
        "vocab_size": vocab_size,
    })
}

fn modules() -> Value {
    let module = |idx: usize, path: &str, kind: &str| {
        let kind = format!("sentence_transformers.models.{kind}");
        json!({"idx": idx, "name": idx.to_string(), "path": path, "type": kind})
    };
    json!([
        module(0, "", "Transformer"),
        module(1, "1_Pooling", "Pooling"),
        module(2, "2_Normalize", "Normalize"),
    ])
}

fn tokenizer(vocabulary: &[String]) -> Value {
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let ids: Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let special =
        |name: &str, type_id: usize| json!({"SpecialToken": {"id": name, "type_id": type_id}});
    let sequence =
        |name: &str, type_id: usize| json!({"Sequence": {"id": name, "type_id": type_id}});
    let special_tokens = json!({
        "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
        "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)],
            "pair": [
                special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0),
                sequence("B", 1), special("[SEP]", 1),
            ],
            "special_tokens": special_tokens,
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": ids,
        },
    })
}

fn weights(seed: u64, vocab_size: usize) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut weights = Weights { seed, tensors: Vec::new() };
    weights.table("embeddings.word_embeddings.weight", vocab_size, 1.0);
    weights.table("embeddings.position_embeddings.weight", MAX_POSITIONS, 0.1);
    weights.table("embeddings.token_type_embeddings.weight", N_TOKEN_TYPES, 0.1);
    weights.norm("embeddings.LayerNorm");
    for i in 0..N_LAYERS {
        let layer = format!("encoder.layer.{i}");
        for name in ["query", "key", "value"] {
            weights.linear(&format!("{layer}.attention.self.{name}"), WIDTH, WIDTH);
        }
        weights.linear(&format!("{layer}.attention.output.dense"), WIDTH, WIDTH);
        weights.norm(&format!("{layer}.attention.output.LayerNorm"));
        weights.linear(&format!("{layer}.intermediate.dense"), FFN_WIDTH, WIDTH);
        weights.linear(&format!("{layer}.output.dense"), WIDTH, FFN_WIDTH);
        weights.norm(&format!("{layer}.output.LayerNorm"));
    }
    weights.linear("pooler.dense", WIDTH, WIDTH);
    weights.tensors
}

struct Weights {
    seed: u64,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl Weights {
    fn add(&mut self, name: String, shape: Vec<usize>, scale: f32, mean: f32) {
        let len = shape.iter().product();
        let mut values = Random::named(self.seed, &name).gaussians(len, scale);
        values.iter_mut().for_each(|x| *x += mean);
        self.tensors.push((name, shape, values));
    }

    fn table(&mut self, name: &str, rows: usize, scale: f32) {
        self.add(name.to_owned(), vec![rows, WIDTH], scale, 0.0);
    }

    /// A layer norm's gain around one and shift around zero.
    fn norm(&mut self, name: &str) {
        self.add(format!("{name}.weight"), vec![WIDTH], 0.1, 1.0);
        self.add(format!("{name}.bias"), vec![WIDTH], 0.1, 0.0);
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize) {
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let scale = 1.0 / (columns as f32).sqrt();
        self.add(format!("{name}.weight"), vec![rows, columns], scale, 0.0);
        self.add(format!("{name}.bias"), vec![rows], 0.1, 0.0);
    }
}
