"""Golden logits of SmolLM2-135M-Instruct (Q4_1): a Llama forward pass in plain numpy, float64.

    python golden/logits/make.py MODEL.gguf

Independent of exrail's code: the GGUF file is read and dequantised by the package `gguf`, the text is
tokenised by the package `tokenizers` from the vocabulary inside the file, and the forward pass below
follows the papers (RMSNorm arXiv:1910.07467, RoPE 2104.09864, GQA 2305.13245, SwiGLU 2002.05202).
Made with numpy 2, gguf 0.17 or later, tokenizers 0.22. README.md describes the file that it writes.
"""

import hashlib
import pathlib
import struct
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = pathlib.Path(__file__).parent
PROMPTS = ["prose", "code", "dialogue", "multilingual"]
N_POSITIONS, N_TOP, N_FIXED, N_FULL, SEED = 256, 64, 192, 8, 20240607
CONTROL = 3


class Model:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.field = lambda key: reader.fields[key].contents()
        self.tensors = {t.name: t for t in reader.tensors}
        assert self.field("general.architecture") == "llama"
        self.n_layers = self.field("llama.block_count")
        self.n_heads = self.field("llama.attention.head_count")
        self.n_kv_heads = self.field("llama.attention.head_count_kv")
        self.rope_dim = self.field("llama.rope.dimension_count")
        self.theta = self.field("llama.rope.freq_base")
        self.eps = self.field("llama.attention.layer_norm_rms_epsilon")
        self.embedding = self.weight("token_embd.weight")
        assert "output.weight" not in self.tensors, "the head of this model is tied"
        assert "rope_freqs.weight" not in self.tensors

    def weight(self, name):
        tensor = self.tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float64)

    def tokenizer(self):
        tokens = self.field("tokenizer.ggml.tokens")
        kinds = self.field("tokenizer.ggml.token_type")
        merges = [tuple(m.split(" ")) for m in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        assert self.field("tokenizer.ggml.pre") == "smollm"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds) if k == CONTROL]
        )
        return tokenizer

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weight(name)

    def rope(self, x):
        """Turns pairs (2i, 2i+1): the converter to GGUF permutes q and k rows for that. x (H, T, D)."""
        half = self.rope_dim // 2
        angles = np.outer(np.arange(x.shape[1]), self.theta ** (-np.arange(half) / half))
        cos, sin = np.cos(angles), np.sin(angles)
        out = x.copy()
        a, b = x[..., 0 : self.rope_dim : 2], x[..., 1 : self.rope_dim : 2]
        out[..., 0 : self.rope_dim : 2] = a * cos - b * sin
        out[..., 1 : self.rope_dim : 2] = a * sin + b * cos
        return out

    def attention(self, x, block):
        n = x.shape[0]

        def heads(name, count):
            return (x @ self.weight(f"{block}.{name}.weight").T).reshape(n, count, -1).transpose(1, 0, 2)

        q = self.rope(heads("attn_q", self.n_heads))
        k = self.rope(heads("attn_k", self.n_kv_heads))
        v = heads("attn_v", self.n_kv_heads)
        group = self.n_heads // self.n_kv_heads
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return (p @ v).transpose(1, 0, 2).reshape(n, -1) @ self.weight(f"{block}.attn_output.weight").T

    def feed_forward(self, x, block):
        gate = x @ self.weight(f"{block}.ffn_gate.weight").T
        up = x @ self.weight(f"{block}.ffn_up.weight").T
        return (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"{block}.ffn_down.weight").T

    def logits(self, ids):
        x = self.embedding[ids]
        for layer in range(self.n_layers):
            block = f"blk.{layer}"
            x = x + self.attention(self.norm(x, f"{block}.attn_norm.weight"), block)
            x = x + self.feed_forward(self.norm(x, f"{block}.ffn_norm.weight"), block)
        return self.norm(x, "output_norm.weight") @ self.embedding.T


def main():
    path = sys.argv[1]
    model = Model(path)
    tokenizer = model.tokenizer()
    ids = []
    for prompt in PROMPTS:
        text = (HERE / "texts" / f"{prompt}.txt").read_text(encoding="utf-8")
        encoded = tokenizer.encode(text).ids
        assert tokenizer.decode(encoded, skip_special_tokens=False) == text
        assert len(encoded) >= N_POSITIONS, f"{prompt}: {len(encoded)} tokens"
        ids.append(encoded[:N_POSITIONS])
    logits = np.stack([model.logits(np.array(row)) for row in ids])
    highest = logits.max(axis=-1, keepdims=True)
    logsumexp = (highest + np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True)))[..., 0]

    random = np.random.default_rng(SEED)
    fixed = np.sort(random.choice(logits.shape[-1], N_FIXED, replace=False))
    full = np.sort(random.choice(len(PROMPTS) * N_POSITIONS, N_FULL, replace=False))
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :N_TOP]
    header = (len(PROMPTS), N_POSITIONS, logits.shape[-1], N_TOP, N_FIXED, N_FULL)
    with open(HERE / "smollm2-135m-instruct-q4_1.bin", "wb") as out:
        out.write(b"EXRLOGIT" + struct.pack("<7I", 1, *header))
        for array, kind in [
            (ids, "<u4"),
            (fixed, "<u4"),
            (full, "<u4"),
            (logsumexp, "<f4"),
            (top, "<u4"),
            (np.take_along_axis(logits, top, axis=-1), "<f4"),
            (logits[..., fixed], "<f4"),
            (logits.reshape(-1, logits.shape[-1])[full], "<f4"),
        ]:
            out.write(np.ascontiguousarray(array, dtype=kind).tobytes())

    for p, prompt in enumerate(PROMPTS):
        targets = np.take_along_axis(logits[p, :-1], np.array(ids[p])[1:, None], axis=-1)[:, 0]
        loss = np.mean(logsumexp[p, :-1] - targets)
        print(f"{prompt}: {loss:.4f} nats a token, greedy next {tokenizer.decode([int(top[p, -1, 0])])!r}")
    print("model sha256", hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
