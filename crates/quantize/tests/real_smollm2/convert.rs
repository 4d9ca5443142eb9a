//! A GGUF file of the Llama family as a Hugging Face folder with F16 weights.
//!
//! There is no published 16-bit checkpoint among the test models, so the weights of a quantised
//! one, dequantised, stand for it.

use std::collections::BTreeMap;
use std::path::Path;

use exrail_checkpoint::{DecoderConfig, Gguf, TensorView, VocabularyTable};
use half::f16;
use serde_json::{Map, Value, json};

const MODULES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Writes `config.json`, `model.safetensors` and `tokenizer.json`.
pub(crate) fn convert(gguf: &Path, dir: &Path) {
    let gguf = Gguf::open(gguf).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    assert_eq!(config.architecture, "llama", "only Llama's rows are permuted as here");
    std::fs::create_dir_all(dir).unwrap();
    let mut tensors = BTreeMap::new();
    for view in gguf.tensors() {
        tensors.insert(stored_name(view.name), (view.shape.to_vec(), halves(&view, &config)));
    }
    write_safetensors(&dir.join("model.safetensors"), &tensors);
    let vocabulary = VocabularyTable::from_gguf(&gguf).unwrap();
    write_json(&dir.join("config.json"), &config_json(&config, &vocabulary));
    write_json(&dir.join("tokenizer.json"), &tokenizer_json(&vocabulary));
}

fn stored_name(name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.").unwrap().split_once('.').unwrap();
    let part = part.strip_suffix(".weight").unwrap();
    let stored = MODULES.iter().find(|(ours, _)| *ours == part).unwrap().1;
    format!("model.layers.{layer}.{stored}.weight")
}

/// The values in half precision; the rows of queries and keys as before the GGUF converter permuted
/// them, halves of a head instead of pairs.
fn halves(view: &TensorView<'_>, config: &DecoderConfig) -> Vec<u8> {
    let values = view.to_f32().unwrap();
    let rotates = [".attn_q.", ".attn_k."].iter().any(|part| view.name.contains(part));
    let columns = *view.shape.last().unwrap();
    let half = config.head_dim / 2;
    let row_of = |row: usize| {
        let (head, at) = (row / config.head_dim, row % config.head_dim);
        head * config.head_dim + 2 * (at % half) + at / half
    };
    let rows = values.len() / columns;
    let order = (0..rows).map(|row| if rotates { row_of(row) } else { row });
    let ordered = order.flat_map(|row| &values[row * columns..(row + 1) * columns]);
    ordered.flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
}

fn write_safetensors(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<u8>)>) {
    let (mut header, mut at) = (Map::new(), 0);
    for (name, (shape, bytes)) in tensors {
        let offsets = [at, at + bytes.len()];
        let entry = json!({ "dtype": "F16", "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), entry);
        at += bytes.len();
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    tensors.values().for_each(|(_, bytes)| file.extend(bytes));
    std::fs::write(path, file).unwrap();
}

fn config_json(config: &DecoderConfig, vocabulary: &VocabularyTable) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layers(),
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.context_len,
        "rms_norm_eps": config.norm.eps,
        "rope_theta": config.ropes[0].theta,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "float16",
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
    })
}

/// Byte-level BPE that takes digits one by one, as `SmolLM2`'s.
fn tokenizer_json(vocabulary: &VocabularyTable) -> Value {
    assert_eq!((&*vocabulary.model, &*vocabulary.pre), ("gpt2", "smollm"));
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate();
    let added: Vec<Value> = tokens
        .filter(|(_, (_, kind))| matches!(kind, 3 | 4))
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == 3,
            })
        })
        .collect();
    let ids = vocabulary.tokens.iter().enumerate();
    let vocab: Map<String, Value> = ids.map(|(id, token)| (token.clone(), id.into())).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                {
                    "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": true,
                },
            ],
        },
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": vocabulary.merges,
        },
    })
}

fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}
