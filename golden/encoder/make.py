"""Golden vectors of all-MiniLM-L6-v2: a BERT forward pass in plain numpy, float64.

    python golden/encoder/make.py MODEL_FOLDER

Independent of exrail's code: the safetensors header is read here, text is tokenised by the package
`tokenizers`, gelu uses math.erf, and the forward pass follows arXiv:1810.04805 with post-norm blocks
(arXiv:1706.03762). One sentence at a time, so nothing is padded. README.md describes the output.
"""

import hashlib
import json
import math
import pathlib
import struct
import sys

import numpy as np
from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).parent
erf = np.frompyfunc(math.erf, 1, 1)


class Model:
    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        assert config["hidden_act"] == "gelu" and config["position_embedding_type"] == "absolute"
        self.n_layers, self.n_heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.eps = config["layer_norm_eps"]
        data = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        self.tensors = {}
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__" and entry["dtype"] == "F32":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                values = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
                self.tensors[name] = values.astype(np.float64)

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + self.eps)
        return centred / deviation * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def attention(self, x, block):
        def heads(name):
            y = self.linear(x, f"{block}.self.{name}")
            return y.reshape(x.shape[0], self.n_heads, -1).transpose(1, 0, 2)

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return self.linear((p @ v).transpose(1, 0, 2).reshape(x.shape), f"{block}.output.dense")

    def encode(self, ids):
        embeddings = "embeddings"
        x = self.tensors[f"{embeddings}.word_embeddings.weight"][ids]
        x = x + self.tensors[f"{embeddings}.position_embeddings.weight"][: len(ids)]
        x = x + self.tensors[f"{embeddings}.token_type_embeddings.weight"][0]
        x = self.norm(x, f"{embeddings}.LayerNorm")
        for layer in range(self.n_layers):
            block = f"encoder.layer.{layer}"
            x = self.norm(x + self.attention(x, f"{block}.attention"), f"{block}.attention.output.LayerNorm")
            inner = self.linear(x, f"{block}.intermediate.dense")
            inner = 0.5 * inner * (1 + erf(inner / math.sqrt(2)).astype(np.float64))
            x = self.norm(x + self.linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm")
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)


def main():
    folder = pathlib.Path(sys.argv[1])
    model = Model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer.enable_truncation(limit)
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer.encode(sentence).ids for sentence in sentences]
    vectors = np.stack([model.encode(np.array(row)) for row in ids])
    with open(HERE / "all-minilm-l6-v2.bin", "wb") as out:
        out.write(b"EXRENCOD" + struct.pack("<3I", 1, *vectors.shape))
        for row in ids:
            out.write(struct.pack(f"<{len(row) + 1}I", len(row), *row))
        out.write(np.ascontiguousarray(vectors, "<f4").tobytes())
    print(f"{len(ids)} sentences, {min(map(len, ids))} to {max(map(len, ids))} tokens")
    print("cosine of the first two", float(vectors[0] @ vectors[1]))
    print("model sha256", hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
