"""Golden logits of gemma-3-270m (Q4_K_M): a Gemma 3 forward pass in plain numpy, float64.

    python golden/logits/make_gemma.py MODEL.gguf

Independent of exrail's code: the GGUF file is read and dequantised by the package `gguf`, the text is
tokenised below from the scores inside the file, and the forward pass follows the Gemma 3 report
(arXiv:2503.19786) and the papers of its parts (RMSNorm arXiv:1910.07467, RoPE 2104.09864, GQA
2305.13245, GeGLU 2002.05202). Before anything is written, the same forward pass must give the logits of
transformers for `golden/families/gemma3`. Made with numpy 2 and gguf 0.17 or later. README.md describes
the file that it writes.
"""

import hashlib
import pathlib
import re
import struct
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

HERE = pathlib.Path(__file__).parent
TINY = HERE.parent / "families" / "gemma3"
# The texts of a prompt, joined, how many tokens of them, and of which positions logits are stored:
# (how many, from, to), drawn.
PROMPTS = [
    (["code"], 64, [(64, 0, 64)]),
    (["multilingual"], 64, [(64, 0, 64)]),
    (["prose", "code", "multilingual"], 600, [(24, 0, 512), (40, 512, 600)]),
]
N_TOP, N_FIXED, SEED = 64, 128, 20240607
GREEDY = ["The capital of France is", "Monday, Tuesday,", "1, 2, 3, 4,"]
N_GREEDY = 8
GLOBAL_EVERY = 6  # the last of six layers sees everything; GGUF has no key for it
USER_DEFINED = 4


class Model:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}
        self.cached = {}
        assert self.field("general.architecture") == "gemma3"
        self.n_layers = self.field("gemma3.block_count")
        self.width = self.field("gemma3.embedding_length")
        self.n_heads = self.field("gemma3.attention.head_count")
        self.n_kv_heads = self.field("gemma3.attention.head_count_kv")
        self.head_dim = self.field("gemma3.attention.key_length")
        self.window = self.field("gemma3.attention.sliding_window")
        self.theta = self.field("gemma3.rope.freq_base")
        self.local_theta = self.field("gemma3.rope.freq_base_swa", 10000.0)
        assert self.field("gemma3.rope.scaling.type", "linear") == "linear"
        self.factor = self.field("gemma3.rope.scaling.factor", 1.0)
        self.eps = self.field("gemma3.attention.layer_norm_rms_epsilon")
        assert "gemma3.final_logit_softcapping" not in self.fields
        assert "output.weight" not in self.tensors, "the head of this model is tied"

    def field(self, key, *default):
        if default and key not in self.fields:
            return default[0]
        return self.fields[key].contents()

    def weight(self, name):
        if name not in self.cached:
            tensor = self.tensors[name]
            shape = tuple(int(n) for n in reversed(tensor.shape))
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            self.cached[name] = values.astype(np.float64)
        return self.cached[name]

    def norm(self, x, name):
        """The converter to GGUF adds the 1 of Gemma's `1 + weight`."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weight(name)

    def rope(self, x, is_global):
        """Turns pairs (i, i + D/2). x (H, T, D)."""
        half = self.head_dim // 2
        theta, factor = (self.theta, self.factor) if is_global else (self.local_theta, 1.0)
        angles = np.outer(np.arange(x.shape[1]) / factor, theta ** (-np.arange(half) / half))
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def attention(self, x, layer):
        n, block = x.shape[0], f"blk.{layer}"
        is_global = layer % GLOBAL_EVERY == GLOBAL_EVERY - 1

        def heads(name, count):
            rows = x @ self.weight(f"{block}.{name}.weight").T
            return rows.reshape(n, count, self.head_dim).transpose(1, 0, 2)

        q = self.norm(heads("attn_q", self.n_heads), f"{block}.attn_q_norm.weight")
        k = self.norm(heads("attn_k", self.n_kv_heads), f"{block}.attn_k_norm.weight")
        v = heads("attn_v", self.n_kv_heads)
        q, k = self.rope(q, is_global), self.rope(k, is_global)
        group = self.n_heads // self.n_kv_heads
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        # The 270M, 1B, 4B and 12B models scale by the head width.
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(self.head_dim)
        distance = np.arange(n)[:, None] - np.arange(n)
        hidden = distance < 0
        if not is_global:
            hidden |= distance >= self.window
        scores[:, hidden] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return (p @ v).transpose(1, 0, 2).reshape(n, -1) @ self.weight(f"{block}.attn_output.weight").T

    def feed_forward(self, x, block):
        gate = x @ self.weight(f"{block}.ffn_gate.weight").T
        up = x @ self.weight(f"{block}.ffn_up.weight").T
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * up) @ self.weight(f"{block}.ffn_down.weight").T

    def logits(self, ids, positions):
        x = self.weight("token_embd.weight")[ids] * np.sqrt(self.width)
        for layer in range(self.n_layers):
            block = f"blk.{layer}"
            y = self.attention(self.norm(x, f"{block}.attn_norm.weight"), layer)
            x = x + self.norm(y, f"{block}.post_attention_norm.weight")
            y = self.feed_forward(self.norm(x, f"{block}.ffn_norm.weight"), block)
            x = x + self.norm(y, f"{block}.post_ffw_norm.weight")
        return self.norm(x, "output_norm.weight")[positions] @ self.weight("token_embd.weight").T


class Vocabulary:
    """SentencePiece: of all adjacent pairs that are a token, the one with the best score is merged."""

    def __init__(self, model):
        assert model.field("tokenizer.ggml.model") == "llama"
        assert not model.field("tokenizer.ggml.add_space_prefix")
        self.bos = model.field("tokenizer.ggml.bos_token_id")
        self.tokens = model.field("tokenizer.ggml.tokens")
        self.scores = model.field("tokenizer.ggml.scores")
        self.id = {token: i for i, token in enumerate(self.tokens)}
        kinds = model.field("tokenizer.ggml.token_type")
        whole = [t for t, kind in zip(self.tokens, kinds) if kind == USER_DEFINED]
        whole.sort(key=len, reverse=True)
        self.whole = re.compile("(" + "|".join(map(re.escape, whole)) + ")")

    def pieces(self, text):
        parts = list(text)
        while True:
            pairs = [(self.id.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            ranked = [(-self.scores[token], i) for token, i in pairs if token is not None]
            if not ranked:
                return parts
            i = min(ranked)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    def encode(self, text):
        ids = [self.bos]
        # Odd entries are the user-defined tokens between the others.
        for i, part in enumerate(self.whole.split(text)):
            pieces = [part] if i % 2 else self.pieces(part.replace(" ", "▁"))
            ids += [self.id[piece] for piece in pieces]
        assert self.decode(ids[1:]) == text
        return ids

    def decode(self, ids):
        return "".join(self.tokens[i] for i in ids).replace("▁", " ")


def logsumexp(logits):
    highest = logits.max(axis=-1, keepdims=True)
    return (highest + np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True)))[..., 0]


def check_with_transformers():
    data = (TINY / "golden.bin").read_bytes()
    assert data[:8] == b"EXRFAMIL"
    version, n_sequences, vocabulary = struct.unpack_from("<3I", data, 8)
    assert version == 1
    lengths = struct.unpack_from(f"<{n_sequences}I", data, 20)
    at = 20 + 4 * n_sequences
    ids = np.frombuffer(data, "<u4", sum(lengths), at)
    golden = np.frombuffer(data, "<f4", sum(lengths) * vocabulary, at + 4 * len(ids)).reshape(-1, vocabulary)
    model, first, furthest = Model(TINY / "model.gguf"), 0, 0.0
    for n in lengths:
        own = model.logits(ids[first : first + n], np.arange(n))
        furthest = max(furthest, float(np.abs(own - golden[first : first + n]).max()))
        first += n
    print(f"golden/families/gemma3: {furthest:.1e} from transformers")
    assert furthest <= 1e-4


def greedy(model, vocabulary, prompt):
    ids, answer, margins = vocabulary.encode(prompt), [], []
    for _ in range(N_GREEDY):
        row = model.logits(np.array(ids + answer), np.array([-1]))[0]
        second, first = np.argsort(row, kind="stable")[-2:]
        answer.append(int(first))
        margins.append(round(float(row[first] - row[second]), 3))
    print(f"greedy {prompt!r} {ids} -> {vocabulary.decode(answer)!r} {answer}, margins {margins}", flush=True)


def write(path, model, prompts, fixed):
    """`prompts`: per prompt the ids, the stored positions and their logits."""
    logits = np.concatenate([rows for _, _, rows in prompts])
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :N_TOP]
    with open(path, "wb") as out:
        out.write(b"EXRLOGSP" + struct.pack("<5I", 1, len(prompts), logits.shape[-1], N_TOP, N_FIXED))
        for array, kind in [
            ([len(ids) for ids, _, _ in prompts], "<u4"),
            ([len(positions) for _, positions, _ in prompts], "<u4"),
            (np.concatenate([ids for ids, _, _ in prompts]), "<u4"),
            (np.concatenate([positions for _, positions, _ in prompts]), "<u4"),
            (fixed, "<u4"),
            (logsumexp(logits), "<f4"),
            (top, "<u4"),
            (np.take_along_axis(logits, top, axis=-1), "<f4"),
            (logits[:, fixed], "<f4"),
        ]:
            out.write(np.ascontiguousarray(array, dtype=kind).tobytes())


def main():
    path = pathlib.Path(sys.argv[1])
    check_with_transformers()
    model = Model(path)
    vocabulary = Vocabulary(model)
    random = np.random.default_rng(SEED)
    fixed = np.sort(random.choice(len(vocabulary.tokens), N_FIXED, replace=False))
    prompts = []
    for texts, n, draws in PROMPTS:
        text = "".join((HERE / "texts" / f"{name}.txt").read_text(encoding="utf-8") for name in texts)
        ids = vocabulary.encode(text)
        assert len(ids) >= n, f"{texts}: {len(ids)} tokens"
        ids = np.array(ids[:n])
        drawn = [random.choice(np.arange(a, b), count, replace=False) for count, a, b in draws]
        positions = np.sort(np.concatenate(drawn))
        rows = model.logits(ids, positions)
        prompts.append((ids, positions, rows))
        inner = positions < n - 1
        targets = rows[inner, ids[positions[inner] + 1]]
        loss = np.mean(logsumexp(rows[inner]) - targets)
        print(f"{'+'.join(texts)}: {loss:.4f} nats a token, largest logit {np.abs(rows).max():.1f}", flush=True)
    write(HERE / "gemma-3-270m-q4_k_m.bin", model, prompts, fixed)

    ids, positions, rows = prompts[-1]
    model.window = len(ids)
    changed = np.abs(model.logits(ids, positions) - rows).max(axis=-1)
    late = positions >= 512
    print(f"without the window: {changed[~late].max():.1e} before 512, {changed[late].min():.1e} to "
          f"{changed[late].max():.1e} from there")
    for prompt in GREEDY:
        greedy(model, vocabulary, prompt)
    print("model sha256", hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
