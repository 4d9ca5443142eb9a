"""The families as data: one small config.json each, with every feature of the family switched on.

`config` is what the folder's config.json says, in the spelling that published checkpoints use
(`rope_theta` and `rope_scaling` rather than the `rope_parameters` of transformers 5). `off` switches
one feature off at a time: the logits must then differ, or the golden file would not test it.
Folders that name the same `weights` hold the same tensors, so a repository stores them once.
"""

WIDTH, HEADS, KV_HEADS, VOCAB = 64, 4, 2, 320
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "use_cache": True,
}
NO_SCALING = {"rope_scaling": None}


def llama(off, **config):
    return {
        "architecture": "LlamaForCausalLM",
        "config": {"model_type": "llama", "attention_bias": False, "mlp_bias": False, **config},
        "weights": "llama",
        "off": off,
    }


MISTRAL = {"model_type": "mistral", "head_dim": 32, "sliding_window": 16}
MIXTRAL = {
    "model_type": "mixtral",
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "rope_theta": 1000000.0,
}
QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "output_router_logits": False,
}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
GEMMA2_OFF = {
    "attention soft cap": {"attn_logit_softcapping": None},
    "final soft cap": {"final_logit_softcapping": None},
    "window": {"sliding_window": 200},
    "window in layer 0 only": {"layer_types": ["full_attention", "sliding_attention"]},
}
PHI3 = {
    "model_type": "phi3",
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": True,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.25, 1.5, 1.8, 2.2],
    "long_factor": [1.2, 2.0, 3.5, 5.0, 7.5, 9.0],
}

FAMILIES = {
    "llama": llama({"theta": {"rope_theta": 500.0}}) | {"gguf": "f16"},
    "llama-llama3": llama(
        {"scaling": NO_SCALING},
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    | {"gguf": "f16"},
    "llama-linear": llama({"scaling": NO_SCALING}, rope_scaling={"type": "linear", "factor": 4.0})
    | {"gguf": "f16"},
    # Base 10000 up to 32 tokens, a larger one from there on: only the long sequence is scaled.
    "llama-dynamic": llama(
        {"scaling": NO_SCALING},
        max_position_embeddings=32,
        rope_scaling={"type": "dynamic", "factor": 4.0},
    ),
    "llama-yarn": llama(
        {
            "scaling": NO_SCALING,
            "betas": {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        },
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.25,
        },
    )
    | {"gguf": "f16"},
    "mistral": {
        "architecture": "MistralForCausalLM",
        "config": MISTRAL,
        "off": {"window": {"sliding_window": None}, "window 15": {"sliding_window": 15}},
    },
    "mixtral": {
        "architecture": "MixtralForCausalLM",
        "config": MIXTRAL,
        "shards": 2,
        "gguf": "f16",
        "off": {"top 2": {"num_experts_per_tok": 1}},
    },
    "qwen2": {
        "architecture": "Qwen2ForCausalLM",
        "config": QWEN2 | {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1},
        "gguf": "f16",
        "off": {"theta": {"rope_theta": 500.0}},
    },
    "qwen2-tied": {
        "architecture": "Qwen2ForCausalLM",
        "config": QWEN2
        | {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
        "dtype": "BF16",
        "off": {
            "window": {"use_sliding_window": False},
            "window only from layer 1": {"max_window_layers": 0},
        },
    },
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "config": {
            "model_type": "qwen3",
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
        },
        "dtype": "BF16",
        "shards": 2,
        "gguf": "bf16",
        "off": {"theta": {"rope_theta": 500.0}},
    },
    "qwen3_moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "config": QWEN3_MOE
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        "gguf": "f16",
        "off": {"normed weights": {"norm_topk_prob": False}, "top 2": {"num_experts_per_tok": 1}},
    },
    # Step 2 makes layers 1 and 3 sparse, the list takes layer 1 back: only layer 3 has experts.
    "qwen3_moe-mixed": {
        "architecture": "Qwen3MoeForCausalLM",
        "config": QWEN3_MOE
        | {
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
        "dtype": "BF16",
        "off": {"raw weights": {"norm_topk_prob": True}, "top 2": {"num_experts_per_tok": 1}},
    },
    "gemma2": {
        "architecture": "Gemma2ForCausalLM",
        "config": GEMMA2 | {"query_pre_attn_scalar": 32},
        "dtype": "BF16",
        "gguf": "bf16",
        "off": GEMMA2_OFF | {"query scale": {"query_pre_attn_scalar": 16}},
    },
    # As in the 27B model, queries are scaled by width / heads and not by the width of a head.
    "gemma2-scalar": {
        "architecture": "Gemma2ForCausalLM",
        "config": GEMMA2 | {"query_pre_attn_scalar": 16},
        "dtype": "BF16",
        "weights": "gemma2",
        "off": GEMMA2_OFF | {"query scale": {"query_pre_attn_scalar": 32}},
    },
    "gemma3": {
        "architecture": "Gemma3ForCausalLM",
        "config": {
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 16,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
        "dtype": "BF16",
        "gguf": "bf16",
        "off": {
            "window": {"sliding_window": 200},
            "global layer": {"sliding_window_pattern": 7},
            "scaling of the global layer": NO_SCALING,
            "local theta": {"rope_local_base_freq": 1000000.0},
            "query scale": {"query_pre_attn_scalar": 32},
        },
    },
    # Rotates 12 of 16 dimensions; up to 32 tokens by the short factors, then by the long ones.
    "phi3": {
        "architecture": "Phi3ForCausalLM",
        "config": PHI3
        | {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 32,
            "rope_scaling": LONGROPE,
            "sliding_window": None,
        },
        "weights": "phi3",
        "gguf": "f16",
        "off": {
            "short factors": {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 6}},
            "long factors": {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 6}},
            "attention factor": {"max_position_embeddings": 64},
        },
    },
    "phi3-window": {
        "architecture": "Phi3ForCausalLM",
        "config": PHI3 | {"original_max_position_embeddings": 256, "sliding_window": 16},
        "weights": "phi3",
        "off": {
            "window": {"sliding_window": None},
            "whole rotation": {"partial_rotary_factor": 0.75},
        },
    },
    "smollm3": {
        "architecture": "SmolLM3ForCausalLM",
        "config": {
            "model_type": "smollm3",
            "num_hidden_layers": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0],
        },
        "gguf": "f16",
        "off": {"layer without rope": {"no_rope_layers": [1, 1, 1, 1]}},
    },
    "granite": {
        "architecture": "GraniteForCausalLM",
        "config": {
            "model_type": "granite",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "gguf": "f16",
        "off": {
            "embedding multiplier": {"embedding_multiplier": 1.0},
            "attention multiplier": {"attention_multiplier": 0.25},
            "residual multiplier": {"residual_multiplier": 1.0},
            "logits scaling": {"logits_scaling": 1.0},
        },
    },
    "cohere2": {
        "architecture": "Cohere2ForCausalLM",
        "config": {
            "model_type": "cohere2",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.5,
            "sliding_window": 16,
            "sliding_window_pattern": 4,
            "layer_switch": 4,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0,
            "rope_theta": 50000.0,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": False,
            "use_qk_norm": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
        "gguf": "f16",
        "off": {
            "window": {"sliding_window": 200},
            "logit scale": {"logit_scale": 1.0},
            "global layer without rope": {"layer_types": ["sliding_attention"] * 4},
        },
    },
    "olmo2": {
        "architecture": "Olmo2ForCausalLM",
        "config": {
            "model_type": "olmo2",
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
            "attention_bias": False,
        },
        "gguf": "f16",
        "off": {"theta": {"rope_theta": 500.0}},
    },
}


def config(name):
    """The contents of config.json."""
    family = FAMILIES[name]
    merged = BASE | family["config"]
    if name == "cohere2":
        del merged["rms_norm_eps"]
    dtype = {"F16": "float16", "BF16": "bfloat16"}[family.get("dtype", "F16")]
    return {"architectures": [family["architecture"]], **merged, "torch_dtype": dtype}


def shapes(name):
    """Name and shape of every tensor of the checkpoint, in the names of published checkpoints."""
    c = config(name)
    kind, width, ffn = c["model_type"], c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim", width // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    found = {"model.embed_tokens.weight": (VOCAB, width)}
    for layer in range(c["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        found |= {f"{block}.{norm}.weight": (width,) for norm in norms(kind)}
        attention = f"{block}.self_attn"
        if kind == "phi3":
            found[f"{attention}.qkv_proj.weight"] = (q + 2 * kv, width)
        else:
            rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            found |= {f"{attention}.{n}.weight": (rows[n], width) for n in rows}
            if kind == "qwen2":
                found |= {f"{attention}.{n}.bias": (rows[n],) for n in rows}
        found[f"{attention}.o_proj.weight"] = (width, q)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            found |= {f"{attention}.{n}_norm.weight": (head_dim,) for n in "qk"}
        if kind == "olmo2":
            found |= {f"{attention}.q_norm.weight": (q,), f"{attention}.k_norm.weight": (kv,)}
        found |= feed_forward(c, kind, layer, f"{block}", width, ffn)
    found["model.norm.weight"] = (width,)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCAB, width)
    return found


def norms(kind):
    before, after = ["input_layernorm"], ["post_attention_layernorm"]
    if kind in ("gemma2", "gemma3_text"):
        return before + after + ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if kind == "olmo2":
        return after + ["post_feedforward_layernorm"]
    return before if kind == "cohere2" else before + after


def feed_forward(c, kind, layer, block, width, ffn):
    def gated(prefix, rows, names=("gate_proj", "up_proj", "down_proj")):
        gate, up, down = names
        return {
            f"{prefix}.{gate}.weight": (rows, width),
            f"{prefix}.{up}.weight": (rows, width),
            f"{prefix}.{down}.weight": (width, rows),
        }

    if kind == "phi3":
        return {
            f"{block}.mlp.gate_up_proj.weight": (2 * ffn, width),
            f"{block}.mlp.down_proj.weight": (width, ffn),
        }
    if kind == "mixtral":
        moe, n, names = f"{block}.block_sparse_moe", c["num_local_experts"], ("w1", "w3", "w2")
        found = {f"{moe}.gate.weight": (n, width)}
        for expert in range(n):
            found |= gated(f"{moe}.experts.{expert}", ffn, names)
        return found
    sparse = kind == "qwen3_moe" and (layer + 1) % c["decoder_sparse_step"] == 0
    if sparse and layer not in c["mlp_only_layers"]:
        found = {f"{block}.mlp.gate.weight": (c["num_experts"], width)}
        for expert in range(c["num_experts"]):
            found |= gated(f"{block}.mlp.experts.{expert}", c["moe_intermediate_size"])
        return found
    return gated(f"{block}.mlp", ffn)
