#!/usr/bin/env python3
"""Makes a whole tiny Hugging Face folder per method: a Llama of one layer whose matrices are packed.

The packers are those of make.py. Beside the weights lies digests.json: the sha256 of the dense
half-precision weights (N, K) of every packed layer, by its name in the folder. The heads of exl2 and
exl3 are packed too, that of exl3 with its rows padded from 320 to 384 as exllamav3 pads; its digest is
that of the first 320.

    pip install numpy
    python golden/quantised/folders.py
"""

import hashlib
import json
import struct
from pathlib import Path

import make
import numpy as np

WIDTH, FFN, VOCAB = 128, 128, 320
LAYERS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, FFN),
    "mlp.up_proj": (WIDTH, FFN),
    "mlp.down_proj": (FFN, WIDTH),
}
EXL2_WIDTHS = [(6, 32), (5, 32), (4, 32), (2, 32)]
METHODS = {
    "gptq": lambda k, n: make.gptq(4, "gptq", 32, True, False, k, n, False),
    "awq": lambda k, n: make.awq("gemm", 32, k, n, False),
    "exl2": lambda k, n: make.exl2(EXL2_WIDTHS, n),
    "exl3": lambda k, n: make.exl3(3, "mcg", False, k, n),
}
QUANTISATION = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "exl2": {"quant_method": "exl2", "version": "0.3.2", "bits": 4.25, "head_bits": 6},
    "exl3": {"quant_method": "exl3", "version": "0.0.6", "bits": 3.0, "head_bits": 3},
}
# The file of AutoGPTQ, which does not name its method.
QUANTIZE = {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "damp_percent": 0.01}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "torch_dtype": "float16",
}


def stored(values):
    """Values of four significant bits, which compress well."""
    mantissa, exponent = np.frexp(values)
    return make.tensor(np.ldexp(np.round(mantissa * 16) / 16, exponent).astype("<f2"), "F16")


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, tensor in sorted(tensors.items()):
        start = len(data)
        data += bytes.fromhex(tensor["hex"])
        header[name] = {"dtype": tensor["type"], "shape": tensor["shape"], "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def folder(method):
    make.RNG = np.random.default_rng(20261127)
    block = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": stored(make.RNG.standard_normal((VOCAB, WIDTH)) * 0.5),
        "model.norm.weight": stored(1 + make.RNG.random(WIDTH) * 0.5),
        f"{block}.input_layernorm.weight": stored(1 + make.RNG.random(WIDTH) * 0.5),
        f"{block}.post_attention_layernorm.weight": stored(1 + make.RNG.random(WIDTH) * 0.5),
    }
    packed = {f"{block}.{name}": size for name, size in LAYERS.items()}
    if method in ("exl2", "exl3"):
        packed["lm_head"] = (WIDTH, 384 if method == "exl3" else VOCAB)
    else:
        tensors["lm_head.weight"] = stored(make.RNG.standard_normal((VOCAB, WIDTH)) * 0.1)
    digests = {}
    for name, (k, n) in packed.items():
        layer, weights = METHODS[method](k, n)
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer["tensors"].items()}
        rows = np.ascontiguousarray(weights[:VOCAB].astype("<f2"))
        digests[name] = hashlib.sha256(rows.tobytes()).hexdigest()
    if method == "gptq":
        # Early AutoGPTQ wrote biases of zeros.
        tensors[f"{block}.mlp.down_proj.bias"] = make.tensor(np.zeros(WIDTH, "<f2"), "F16")
    path = Path(__file__).parent / method
    path.mkdir(exist_ok=True)
    config = dict(CONFIG)
    if method in QUANTISATION:
        config["quantization_config"] = QUANTISATION[method]
    else:
        (path / "quantize_config.json").write_text(json.dumps(QUANTIZE, indent=2) + "\n")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")
    # exllamav2 and v3 write files of this name.
    name = "output.safetensors" if method == "exl2" else "model.safetensors"
    write_safetensors(path / name, tensors)


if __name__ == "__main__":
    for method in METHODS:
        folder(method)
