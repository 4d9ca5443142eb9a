//! Fields of the JSON files: what is refused by name, what defaults mean, and where text is found.

use exrail_checkpoint::{DecoderConfig, GateKind, HfFolder, LoadError, RopeScaling};
use serde_json::{Value, json};

use crate::folder::Folder;

fn config(folder: &Folder) -> Result<DecoderConfig, LoadError> {
    DecoderConfig::from_config_json(&folder.0["config.json"])
}

/// The family's configuration with one field changed.
fn with(family: &str, key: &str, value: Value) -> Result<DecoderConfig, LoadError> {
    config(&Folder::family(family).config(key, value))
}

#[test]
fn impossible_or_unsupported_values_are_refused_by_name() {
    for (family, key, value) in [
        ("llama", "model_type", json!("gpt_neox")),
        ("llama", "model_type", json!(null)),
        ("llama", "model_type", json!(7)),
        ("llama", "hidden_size", json!(0)),
        ("llama", "hidden_size", json!(-1)),
        ("llama", "hidden_size", json!(64.5)),
        ("llama", "hidden_size", json!("64")),
        ("llama", "hidden_size", json!(null)),
        ("llama", "num_attention_heads", json!(6)),
        ("llama", "num_key_value_heads", json!(3)),
        ("llama", "num_hidden_layers", json!(100_000)),
        ("llama", "intermediate_size", json!(u64::MAX)),
        ("llama", "vocab_size", json!(1_u64 << 32)),
        ("llama", "max_position_embeddings", json!(1_u64 << 40)),
        ("llama", "rms_norm_eps", json!(0)),
        ("llama", "rms_norm_eps", json!(1e-60)),
        ("llama", "rms_norm_eps", json!(null)),
        ("llama", "rope_theta", json!(-1.0)),
        ("llama", "rope_theta", json!(1e300)),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "hidden_act", json!("gelu")),
        ("llama", "hidden_act", json!("relu2")),
        ("llama", "mlp_bias", json!(true)),
        ("llama", "attention_bias", json!("no")),
        ("llama", "sliding_window", json!(16)),
        ("llama", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("llama", "layer_types", json!(["full_attention"])),
        ("llama", "layer_types", json!(["full_attention", "chunked_attention"])),
        ("llama", "final_logit_softcapping", json!(30.0)),
        ("llama", "embedding_multiplier", json!(2.0)),
        ("llama", "clip_qkv", json!(8.0)),
        ("llama", "rope_interleaved", json!(true)),
        ("llama", "tie_word_embeddings", json!(1)),
        ("mistral", "attention_bias", json!(true)),
        ("mistral", "layer_types", json!(["sliding_attention", "full_attention"])),
        ("mistral", "sliding_window", json!(0)),
        ("mixtral", "num_local_experts", json!(0)),
        ("mixtral", "num_local_experts", json!(5000)),
        ("mixtral", "num_local_experts", json!(null)),
        ("mixtral", "num_experts_per_tok", json!(5)),
        ("qwen3_moe", "use_sliding_window", json!(true)),
        ("qwen3_moe", "shared_expert_intermediate_size", json!(32)),
        ("qwen3_moe", "moe_intermediate_size", json!(null)),
        ("qwen3_moe", "mlp_only_layers", json!([2])),
        ("qwen3_moe", "decoder_sparse_step", json!(0)),
        ("gemma2", "hidden_activation", json!("gelu")),
        ("gemma2", "query_pre_attn_scalar", json!(0)),
        ("gemma3", "use_bidirectional_attention", json!(true)),
        ("gemma3", "sliding_window_pattern", json!(0)),
        ("phi3", "original_max_position_embeddings", json!(null)),
        ("phi3", "partial_rotary_factor", json!(1.5)),
        ("phi3", "partial_rotary_factor", json!(0.01)),
        ("smollm3", "no_rope_layers", json!([1, 1, 1])),
        ("smollm3", "no_rope_layers", json!([1, 1, 1, 2])),
        ("cohere2", "use_qk_norm", json!(true)),
        ("cohere2", "use_parallel_block", json!(false)),
        ("cohere2", "rotary_pct", json!(0.5)),
        ("cohere2", "position_embedding_type", json!("alibi")),
        ("cohere2", "layer_switch", json!(3)),
        ("cohere2", "order_of_interleaved_layers", json!("global_attn_first")),
        ("cohere2", "use_embedding_sharing", json!(false)),
        ("cohere2", "layer_norm_eps", json!(null)),
    ] {
        let error = with(family, key, value.clone()).expect_err(key);
        let LoadError::BadValue { key: named, .. } = &error else { panic!("{key}: {error}") };
        assert!(named.ends_with(key), "{family}: {key} = {value}: {error}");
    }
    let error = with("llama", "model_type", json!("gpt_neox")).unwrap_err().to_string();
    assert!(error.contains("one of llama, mistral, mixtral, qwen2") && error.ends_with("gpt_neox"));
}

#[test]
fn rope_settings_are_refused_by_name() {
    let long = json!([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    for (family, scaling, key) in [
        ("llama", json!({"rope_type": "mrope"}), "rope_type"),
        ("llama", json!({"factor": 2.0}), "rope_type"),
        ("llama", json!([]), "rope_scaling"),
        ("llama", json!({"type": "linear"}), "factor"),
        ("llama", json!({"type": "linear", "factor": 0.5}), "factor"),
        ("llama", json!({"type": "linear", "factor": "x"}), "factor"),
        ("llama", json!({"type": "linear", "rope_type": "dynamic", "factor": 2.0}), "type"),
        ("llama", json!({"type": "dynamic", "factor": 2.0, "alpha": 1000.0}), "alpha"),
        (
            "llama",
            json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}),
            "original_max_position_embeddings",
        ),
        ("llama", json!({"type": "yarn", "factor": 2.0, "beta_slow": 64.0}), "beta_slow"),
        ("llama", json!({"type": "yarn"}), "factor"),
        ("llama", json!({"type": "yarn", "factor": 2.0, "x": 1}), "x"),
        (
            "llama",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
            "low_freq_factor",
        ),
        (
            "llama",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0}),
            "original_max_position_embeddings",
        ),
        ("phi3", json!({"type": "longrope", "short_factor": long}), "long_factor"),
        (
            "phi3",
            json!({"type": "longrope", "short_factor": [1.0], "long_factor": long}),
            "short_factor",
        ),
        (
            "phi3",
            json!({"type": "longrope", "short_factor": long, "long_factor": [1, 1, 1, 1, 1, 0]}),
            "long_factor",
        ),
        (
            "phi3",
            json!({"type": "longrope", "short_factor": long, "long_factor": long, "factor": 4.0}),
            "factor",
        ),
        (
            "phi3",
            json!({"type": "longrope", "short_factor": long, "long_factor": long,
                   "short_mscale": 1.2}),
            "short_mscale",
        ),
    ] {
        let error = with(family, "rope_scaling", scaling.clone()).expect_err(key);
        let LoadError::BadValue { key: named, .. } = &error else { panic!("{key}: {error}") };
        assert!(named.ends_with(key), "{scaling}: {error}");
    }
    let twice =
        Folder::family("llama-linear").config("rope_parameters", json!({"rope_type": "default"}));
    assert!(config(&twice).unwrap_err().to_string().contains("rope_scaling"));
    let nested = json!({"full_attention": {"rope_type": "default"}, "sliding_attention": {}});
    let error = with("llama", "rope_parameters", nested).unwrap_err().to_string();
    assert!(error.contains("one set for all layers of llama"), "{error}");
    let theta = json!({"rope_type": "default", "rope_theta": 5.0});
    let error = with("llama", "rope_parameters", theta).unwrap_err().to_string();
    assert!(error.contains("`rope_theta`: expected 5 as in the rope parameters, found 10000"));
}

#[test]
fn every_scaling_is_read_with_its_settings() {
    let scaling =
        |value: Value| with("llama", "rope_scaling", value).unwrap().ropes[0].scaling.clone();
    assert_eq!(scaling(json!({"type": "linear", "factor": 1})), RopeScaling::None);
    assert_eq!(scaling(json!({"rope_type": "default"})), RopeScaling::None);
    let yarn = |magnitude, truncate| RopeScaling::Yarn {
        factor: 4.0,
        original_len: 256,
        beta_fast: 32.0,
        beta_slow: 1.0,
        magnitude,
        truncate,
    };
    assert_eq!(
        scaling(json!({"type": "yarn", "factor": 4.0, "finetuned": true})),
        yarn(None, true)
    );
    let stated = json!({"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": false});
    assert_eq!(scaling(stated), yarn(Some(1.5), false));
    let equal = json!({"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7});
    assert_eq!(scaling(equal), yarn(Some(1.0), true));
    // Without a factor it is the ratio of the lengths: 256 / 64.
    let ratio = scaling(json!({"type": "yarn", "original_max_position_embeddings": 64}));
    assert!(matches!(ratio, RopeScaling::Yarn { original_len: 64, factor: 4.0, .. }), "{ratio:?}");
    // Qwen 2.5 states the trained length and a factor: four times that can be served.
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
    let config = with("llama", "rope_scaling", yarn).unwrap();
    assert_eq!((config.context_len, config.max_context_len), (256, 1024));
    assert_eq!(config.with_context_len(1000).unwrap().context_len, 1000);
}

#[test]
fn absent_fields_mean_what_they_mean_to_transformers() {
    let without =
        |family: &str, key: &str| config(&Folder::family(family).config(key, None)).unwrap();
    assert_eq!(without("mistral", "sliding_window").layers[0].window, None, "beyond the context");
    let long = Folder::family("mistral")
        .config("sliding_window", None)
        .config("max_position_embeddings", json!(32768));
    assert_eq!(config(&long).unwrap().layers[0].window, Some(4096));
    assert!((without("mixtral", "rope_theta").ropes[0].theta - 1e6).abs() < 1.0);
    assert_eq!(without("qwen3", "head_dim").head_dim, 128);
    assert_eq!(without("llama", "num_key_value_heads").n_kv_heads, 4);
    assert!(without("gemma2", "tie_word_embeddings").tied_head);
    assert!(!without("llama", "tie_word_embeddings").tied_head);
    assert_eq!(without("gemma2", "attn_logit_softcapping").attention_soft_cap, Some(50.0));
    let off = with("gemma2", "attn_logit_softcapping", json!(null)).unwrap();
    assert_eq!(off.attention_soft_cap, None);
    assert!((without("gemma2", "query_pre_attn_scalar").attention_scale - 0.0625).abs() < 1e-7);
    assert!((without("cohere2", "logit_scale").logit_scale - 0.0625).abs() < 1e-7);
    assert!((without("granite", "attention_multiplier").attention_scale - 1.0).abs() < 1e-7);
    assert!(!without("qwen3_moe", "norm_topk_prob").experts.unwrap().normalise);
    assert_eq!(without("llama", "hidden_act").gate, GateKind::Silu);
    let ropes: Vec<Option<usize>> =
        without("smollm3", "no_rope_layers").layers.iter().map(|layer| layer.rope).collect();
    assert_eq!(ropes, [Some(0), Some(0), Some(0), None]);
    let longer = with("smollm3", "no_rope_layers", json!([0, 1, 1, 1, 7])).expect_err("a seven");
    assert!(longer.to_string().contains("no_rope_layers"), "{longer}");
    let longer = with("smollm3", "no_rope_layers", json!([0, 1, 1, 1, 0])).unwrap();
    assert_eq!((longer.layers[0].rope, longer.layers[3].rope), (None, Some(0)));
}

#[test]
fn the_decoder_of_a_multimodal_folder_loads() {
    let plain = Folder::family("gemma3");
    let text: Value = serde_json::from_slice(&plain.0["config.json"]).unwrap();
    let outer = json!({"model_type": "gemma3", "text_config": text, "vision_config": {},
                       "eos_token_id": [0, 2]});
    for (root, head) in [
        ("model.language_model.", "model.vision_tower.x.weight"),
        ("language_model.model.", "vision_tower.x.weight"),
    ] {
        let nested = plain.clone().with("config.json", outer.to_string()).weights(|tensors| {
            let moved = std::mem::take(tensors).into_iter();
            let rename = |name: String| name.replacen("model.", root, 1);
            tensors.extend(moved.map(|(name, stored)| (rename(name), stored)));
            let stored = tensors[&format!("{root}norm.weight")].clone();
            tensors.insert(head.to_owned(), stored);
        });
        let folder = nested.load().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(folder.config(), plain.load().unwrap().config());
        assert_eq!(folder.ignored(), [head]);
    }
    // gemma-3-4b-it states little; the rest are the defaults of its class.
    let sparse = json!({"model_type": "gemma3", "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}});
    let config = DecoderConfig::from_config_json(sparse.to_string().as_bytes()).unwrap();
    assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim), (8, 4, 256));
    assert_eq!((config.vocab_size, config.context_len), (262_208, 131_072));
    let error = DecoderConfig::from_config_json(br#"{"model_type": "gemma3"}"#).unwrap_err();
    assert!(error.to_string().contains("text_config"), "{error}");
}

fn text_of(tokenizer: &Value) -> Result<HfFolder, LoadError> {
    let folder = Folder::family("llama").without("chat_template.jinja");
    folder.with("tokenizer_config.json", tokenizer.to_string()).load()
}

#[test]
fn chat_templates_are_found_in_every_place() {
    let one = text_of(&json!({"chat_template": "{{ a }}"})).unwrap();
    assert_eq!(one.text().chat_template(), Some("{{ a }}"));
    let named = json!({"chat_template": [{"name": "default", "template": "d"},
                                         {"name": "tool_use", "template": "t"}],
                       "eos_token": {"content": "</s>", "lstrip": false}});
    let named = text_of(&named).unwrap();
    assert_eq!(named.text().chat_template(), Some("d"));
    assert_eq!(named.text().template("tool_use"), Some("t"));
    assert_eq!(named.text().eos.as_deref(), Some("</s>"));
    assert_eq!(text_of(&json!({})).unwrap().text().chat_template(), None);
    let two =
        json!({"chat_template": [{"name": "a", "template": "1"}, {"name": "b", "template": "2"}]});
    assert_eq!(text_of(&two).unwrap().text().chat_template(), None);

    let both = Folder::family("llama")
        .without("chat_template.jinja")
        .with("tokenizer_config.json", r#"{"chat_template": "old"}"#)
        .with("chat_template.json", r#"{"chat_template": "newer"}"#);
    assert_eq!(both.load().unwrap().text().chat_template(), Some("newer"));
    let all = both.with("chat_template.jinja", "newest");
    assert_eq!(all.load().unwrap().text().chat_template(), Some("newest"));
    let more = all.with("additional_chat_templates/tool_use.jinja", "tools");
    let more = more.load().unwrap();
    assert_eq!(more.text().chat_template(), Some("newest"));
    assert_eq!(more.text().template("tool_use"), Some("tools"));

    for (wrong, part) in [
        (json!({"chat_template": 1}), "chat_template"),
        (json!({"chat_template": [{"name": "a"}]}), "chat_template"),
        (json!({"bos_token": {"id": 1}}), "bos_token"),
        (json!({"add_bos_token": "yes"}), "add_bos_token"),
    ] {
        let error = text_of(&wrong).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("tokenizer_config.json"), "{error}");
    }
    let folder = Folder::family("llama").with("chat_template.jinja", b"a\xffb");
    assert!(folder.refusal().contains("chat_template.jinja"), "{}", folder.refusal());
}

#[test]
fn end_tokens_come_from_generation_config_or_config() {
    let with = |value: Value| {
        Folder::family("llama").with("generation_config.json", value.to_string()).load()
    };
    assert_eq!(with(json!({"eos_token_id": 5})).unwrap().generation().eos, [5]);
    assert_eq!(with(json!({"eos_token_id": [5, 6]})).unwrap().generation().eos, [5, 6]);
    assert_eq!(with(json!({"top_k": 20})).unwrap().generation().eos, [0]);
    assert_eq!(with(json!({"top_k": 20})).unwrap().generation().top_k, Some(20));
    let absent = Folder::family("llama").without("generation_config.json");
    let absent = absent.config("pad_token_id", json!(-1)).load().unwrap();
    assert_eq!((&absent.generation().eos[..], absent.generation().padding), (&[0][..], None));
    for (wrong, part) in [
        (json!({"eos_token_id": [1, -2]}), "eos_token_id"),
        (json!({"eos_token_id": "</s>"}), "eos_token_id"),
        (json!({"eos_token_id": vec![1; 2000]}), "eos_token_id"),
        (json!({"bos_token_id": 1_u64 << 32}), "bos_token_id"),
        (json!({"temperature": -1.0}), "temperature"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"min_p": "a"}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
    ] {
        let error = with(wrong).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("generation_config.json"), "{error}");
    }
}
