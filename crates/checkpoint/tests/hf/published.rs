//! `config.json` as published: fields that do not matter here are no reason to refuse one.

use exrail_checkpoint::{DecoderConfig, RopeScaling};

/// Llama-3.2-3B.
const LLAMA: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128, "hidden_act": "silu",
  "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
}"#;
/// Qwen2.5-3B.
const QWEN2: &str = r#"{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 11008, "max_position_embeddings": 32768, "max_window_layers": 36,
  "model_type": "qwen2", "num_attention_heads": 16, "num_hidden_layers": 36,
  "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
  "use_sliding_window": false, "vocab_size": 151936
}"#;
/// Qwen3-30B-A3B.
const QWEN3_MOE: &str = r#"{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
  "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
  "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
  "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}"#;

fn config(json: &str) -> DecoderConfig {
    DecoderConfig::from_config_json(json.as_bytes()).unwrap()
}

#[test]
fn llama_3_2_is_read() {
    let config = config(LLAMA);
    assert_eq!((config.n_layers(), config.query_width(), config.kv_width()), (28, 3072, 1024));
    assert_eq!((config.context_len, config.max_context_len), (131_072, 131_072));
    assert!(config.tied_head);
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_len: 8192,
    };
    assert_eq!(config.ropes[0].scaling, scaling);
}

#[test]
fn qwen_2_5_is_read() {
    let config = config(QWEN2);
    assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim), (16, 2, 128));
    assert!(config.requires_qkv_bias && config.tied_head);
    assert!(config.layers.iter().all(|layer| layer.window.is_none() && layer.rope == Some(0)));
}

#[test]
fn qwen_3_moe_is_read() {
    let config = config(QWEN3_MOE);
    assert_eq!((config.head_dim, config.query_width(), config.width), (128, 4096, 2048));
    let experts = config.experts.unwrap();
    assert_eq!((experts.n_experts, experts.n_used, experts.width), (128, 8, 768));
    assert!(experts.normalise && config.layers.iter().all(|layer| layer.has_experts));
}
