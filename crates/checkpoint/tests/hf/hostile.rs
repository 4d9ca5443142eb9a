//! Folders whose files are missing, broken or contradict each other: refused with the name of the
//! file and of what is wrong in it.

use exrail_checkpoint::{HfFolder, LoadError, Tensors};
use serde_json::{Value, json};

use crate::folder::{Folder, Stored, file};

const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` in: {message}");
    }
}

fn shard_of(folder: &Folder, tensor: &str) -> String {
    let index: Value = serde_json::from_slice(&folder.0[INDEX]).unwrap();
    index["weight_map"][tensor].as_str().unwrap().to_owned()
}

#[test]
fn a_missing_shard_is_named() {
    let folder = Folder::family("mixtral").without(SECOND);
    assert_names(&folder.refusal(), &[SECOND, "cannot be read"]);
    let folder = Folder::family("llama").without("model.safetensors");
    assert_names(&folder.refusal(), &["model.safetensors", "cannot be read"]);
    let folder = Folder::family("llama").without("config.json");
    assert_names(&folder.refusal(), &["config.json", "cannot be read"]);
}

#[test]
fn index_and_shards_must_hold_the_same_tensors() {
    let tensor = "model.layers.1.self_attn.q_proj.weight";
    let whole = Folder::family("mixtral");
    let shard = shard_of(&whole, tensor);
    let other = if shard == FIRST { SECOND } else { FIRST };
    let removed = whole.clone().tensors(&shard, |tensors| drop(tensors.remove(tensor).unwrap()));
    assert_names(&removed.refusal(), &[INDEX, tensor, &shard, "found nowhere"]);

    let mut moved: Option<Stored> = None;
    let moved_away = whole.clone().tensors(&shard, |tensors| moved = tensors.remove(tensor));
    let stored = moved.unwrap();
    let into_other = |folder: Folder| {
        folder.tensors(other, |tensors| drop(tensors.insert(tensor.to_owned(), stored.clone())))
    };
    assert_names(&into_other(moved_away).refusal(), &[INDEX, tensor, &format!("found {other}")]);
    assert_names(&into_other(whole.clone()).refusal(), &[tensor, "twice"]);

    let unlisted = whole.json(INDEX, |index| {
        index["weight_map"].as_object_mut().unwrap().remove(tensor).unwrap();
    });
    assert_names(&unlisted.refusal(), &[INDEX, tensor, &shard, "found no entry"]);
}

#[test]
fn a_tensor_that_the_index_names_twice_is_refused() {
    let text = String::from_utf8(Folder::family("mixtral").0[INDEX].to_vec()).unwrap();
    let entry = format!("\"lm_head.weight\": \"{FIRST}\"");
    let doubled = text.replace(&entry, &format!("{entry}, {entry}"));
    assert_ne!(text, doubled);
    let message = Folder::family("mixtral").with(INDEX, doubled).refusal();
    assert_names(&message, &[INDEX, "lm_head.weight", "twice"]);
}

#[test]
fn shards_outside_the_folder_are_refused() {
    for path in [
        "../model.safetensors",
        "..",
        ".",
        "",
        "/model.safetensors",
        "a/model.safetensors",
        "a\\model.safetensors",
        "./model.safetensors",
        "model.bin",
        "model.safetensors/",
    ] {
        let folder = Folder::family("mixtral").json(INDEX, |index| {
            index["weight_map"]["lm_head.weight"] = json!(path);
        });
        assert_names(&folder.refusal(), &[INDEX, "lm_head.weight", "a safetensors file beside it"]);
    }
    for map in [json!([]), json!({"a": 1}), json!("x"), json!(null)] {
        let folder =
            Folder::family("mixtral").json(INDEX, |index| index["weight_map"] = map.clone());
        assert_names(&folder.refusal(), &[INDEX, "not valid"]);
    }
}

#[test]
fn tensors_must_have_the_shapes_of_the_configuration() {
    for (key, value, tensor) in [
        ("vocab_size", 321, "model.embed_tokens.weight"),
        ("intermediate_size", 95, "model.layers.0.mlp.gate_proj.weight"),
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight"),
        ("head_dim", 32, "model.layers.0.self_attn.q_proj.weight"),
        ("hidden_size", 128, "model.embed_tokens.weight"),
    ] {
        let message = Folder::family("llama").config(key, json!(value)).refusal();
        assert_names(&message, &[tensor, "expected shape", "from the configuration"]);
    }
    let message = Folder::family("llama").config("num_hidden_layers", json!(3)).refusal();
    assert_names(&message, &["model.layers.2.input_layernorm.weight", "is missing", "[64]"]);
    let message = Folder::family("llama").config("num_hidden_layers", json!(1)).refusal();
    assert_names(&message, &["model.layers.1.", "not part of a `llama` model"]);
    let message = Folder::family("mixtral").config("num_local_experts", json!(5)).refusal();
    assert_names(&message, &["block_sparse_moe.gate.weight", "[5, 64]"]);
    let name = "model.norm.weight";
    let flat = Folder::family("llama").weights(|tensors| {
        tensors.get_mut(name).unwrap().shape = vec![1, 64];
    });
    assert_names(&flat.refusal(), &[name, "[64]", "[1, 64]"]);
}

#[test]
fn tensors_that_would_be_ignored_are_refused() {
    let with = |name: &str, stored: Stored| {
        Folder::family("llama").weights(|tensors| drop(tensors.insert(name.to_owned(), stored)))
    };
    let vector =
        || Stored { dtype: "F16".to_owned(), shape: vec![64], bytes: [0, 0x3c].repeat(64) };
    for name in [
        "x",
        "model.x.weight",
        "blk.0.attn_q.weight",
        "token_embd.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.00.input_layernorm.weight",
        "model.layers.+1.input_layernorm.weight",
        "model.layers.9.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.layers.0.mlp.down_proj.qweight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "lm_head.bias",
        "score.weight",
        "vision_tower.x.weight",
    ] {
        let folder = with(name, vector());
        assert_names(&folder.refusal(), &[name, "not part of a `llama` model"]);
    }
    let frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert_eq!(with(frequencies, vector()).load().unwrap().ignored(), [frequencies]);
    let name = "model.layers.0.mlp.down_proj.weight";
    let bytes = Stored { dtype: "I8".to_owned(), shape: vec![64, 96], bytes: vec![0; 64 * 96] };
    assert_names(&with(name, bytes).refusal(), &[name, "format I8 is not supported", "BF16"]);
    let eighth = Stored { dtype: "F8_E4M3".to_owned(), shape: vec![1], bytes: vec![0] };
    assert_names(&with(name, eighth).refusal(), &[name, "format F8_E4M3 is not supported"]);
}

#[test]
fn biases_must_be_there_when_the_configuration_says_so() {
    let biased = Folder::family("llama").config("attention_bias", json!(true));
    assert_names(&biased.refusal(), &["model.layers.0.self_attn.q_proj.bias", "missing"]);
    let add = |folder: Folder, projection: &str, len: usize| {
        folder.weights(|tensors| {
            for layer in 0..2 {
                let name = format!("model.layers.{layer}.self_attn.{projection}.bias");
                let bytes = vec![0; 2 * len];
                let stored = Stored { dtype: "F16".to_owned(), shape: vec![len], bytes };
                tensors.insert(name, stored);
            }
        })
    };
    let mut folder = biased;
    for (projection, len) in [("q_proj", 64), ("k_proj", 32), ("v_proj", 32)] {
        folder = add(folder, projection, len);
    }
    assert_names(&folder.refusal(), &["model.layers.0.self_attn.o_proj.bias", "missing"]);
    let folder = add(folder, "o_proj", 64).load().unwrap();
    assert!(folder.config().requires_qkv_bias);
    assert_eq!(folder.info("blk.1.attn_output.bias").unwrap().shape, [64]);
    let message = Folder::family("qwen2")
        .weights(|tensors| drop(tensors.remove("model.layers.1.self_attn.k_proj.bias").unwrap()))
        .refusal();
    assert_names(&message, &["model.layers.1.self_attn.k_proj.bias", "missing"]);
}

#[test]
fn a_tied_head_may_only_be_a_copy() {
    let embedding = "model.embed_tokens.weight";
    let copied = Folder::family("smollm3").weights(|tensors| {
        let copy = tensors[embedding].clone();
        tensors.insert("lm_head.weight".to_owned(), copy);
    });
    let folder = copied.load().unwrap();
    assert!(folder.config().tied_head && folder.info("output.weight").is_none());
    assert_eq!(folder.ignored(), ["lm_head.weight"]);
    let other = copied.weights(|tensors| tensors.get_mut("lm_head.weight").unwrap().bytes[7] ^= 1);
    assert_names(&other.refusal(), &["tie_word_embeddings", "lm_head.weight"]);
    let alone = other.weights(|tensors| drop(tensors.remove(embedding).unwrap()));
    assert_names(&alone.refusal(), &[embedding, "missing, expected shape [320, 64]"]);
    let untied = Folder::family("smollm3").config("tie_word_embeddings", json!(false));
    assert_names(&untied.refusal(), &["lm_head.weight", "missing"]);
}

#[test]
fn truncation_at_every_stage_is_an_error_that_names_the_file() {
    let name = "model.safetensors";
    let whole = Folder::family("llama");
    let bytes = whole.0[name].clone();
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let ends = [0, 7, 8, 9, 8 + header / 2, 8 + header - 1, 8 + header, 8 + header + 1];
    for len in ends.into_iter().chain([bytes.len() / 2, bytes.len() - 1]) {
        let message = whole.clone().with(name, &bytes[..len]).refusal();
        assert_names(&message, &[name]);
    }
}

#[test]
fn headers_that_overflow_are_refused() {
    let name = "model.safetensors";
    let with = |bytes: Vec<u8>| Folder::family("llama").with(name, bytes).refusal();
    for length in [1 << 23, 1 << 62, u64::MAX] {
        let mut bytes = Folder::family("llama").0[name].to_vec();
        bytes[..8].copy_from_slice(&u64::to_le_bytes(length));
        assert_names(&with(bytes), &[name, "length of the safetensors header"]);
    }
    for header in [
        r#"{"a":{"dtype":"F16","shape":[4294967296,4294967296,4],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[18446744073709551614,0]}}"#,
        r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,18446744073709551616]}}"#,
        r#"{"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#,
    ] {
        assert_names(&with(file(header, &[0; 4])), &[name, "not a valid safetensors file"]);
    }
}

#[test]
fn json_files_that_are_none_or_too_large_are_named() {
    let huge = vec![b' '; 5 << 20];
    for name in
        ["config.json", "generation_config.json", "tokenizer_config.json", "quantize_config.json"]
    {
        for text in ["", "{", "[]", "nul", "\"x\"", "{\"a\":1}}"] {
            let message = Folder::family("llama").with(name, text).refusal();
            assert_names(&message, &[name]);
        }
        let error = Folder::family("llama").with(name, &huge).load().unwrap_err();
        assert!(matches!(error.root(), LoadError::LimitExceeded { .. }), "{error}");
        assert_names(&error.to_string(), &[name]);
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_names(&Folder::family("llama").with("config.json", deep).refusal(), &["recursion"]);
}

#[test]
fn a_folder_on_disk_equals_one_in_memory_and_is_named_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in &Folder::family("llama").config("vocab_size", json!(7)).0 {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let message = HfFolder::open(dir.path()).unwrap_err().to_string();
    assert_names(&message, &[&dir.path().display().to_string(), "model.embed_tokens.weight"]);
    let templates = dir.path().join("additional_chat_templates");
    std::fs::create_dir(&templates).unwrap();
    std::fs::write(templates.join("rag.jinja"), "documents").unwrap();
    std::fs::write(dir.path().join("config.json"), &Folder::family("llama").0["config.json"])
        .unwrap();
    let folder = HfFolder::open(dir.path()).unwrap();
    assert_eq!(folder.text().template("rag"), Some("documents"));
    assert_eq!(folder.weight_files(), [dir.path().join("model.safetensors")]);
    drop(folder);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let message = HfFolder::open(dir.path()).unwrap_err().to_string();
    assert_names(&message, &[&dir.path().join("model.safetensors").display().to_string()]);
}
