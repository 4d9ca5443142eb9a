"""Writes parity.json: what the reference tokenizers make of the 10,200 lines.

    pip install gguf protobuf==7.36.2 sentencepiece==0.2.3 tiktoken==0.14.0 tokenizers==0.23.3
    python fetch.py VOCABULARIES && python make.py VOCABULARIES SMOLLM2.gguf GEMMA3.gguf MINILM_FOLDER

Per family and way of reading special tokens: SHA-256 over all ids, the first 8 digits of one for
each 100 lines, and the ids of the first 30 lines. The references are the libraries that the models
were trained with: sentencepiece, tiktoken (Llama 3 and 4, Qwen, Tekken) and tokenizers.
"""

import base64
import hashlib
import json
import pathlib
import re
import struct
import sys
import unicodedata

import gguf
import sentencepiece
import tiktoken
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

import corpus
import fetch

HERE = pathlib.Path(__file__).parent
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": LLAMA3,
    "llama4": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
KEEPS_RIGHT = ["<unk>", "<s>", "<|endoftext|>"]


def between(encode, table):
    """Ids with control literals as tokens: what lies between them is a text of its own."""
    controls = {token: at for at, (token, kind) in enumerate(zip(table["tokens"], table["kinds"])) if kind in (fetch.CONTROL, fetch.UNKNOWN)}
    pattern = re.compile("|".join(re.escape(token) for token in sorted(controls, key=len, reverse=True)))

    def parse(text):
        ids, at = [], 0
        while found := pattern.search(text, at):
            ids += encode(text[at:found.start()]) + [controls[found[0]]]
            at = found.end()
            if table.get("strips_right") and found[0] not in KEEPS_RIGHT:
                at += len(text[at:]) - len(text[at:].lstrip())
        return ids + encode(text[at:])

    return parse


def sentencepiece_reference(table):
    model = proto.ModelProto()
    for token, score, kind in zip(table["tokens"], table["scores"], table["kinds"]):
        model.pieces.add(piece=token.replace(" ", "\u2581") if kind == fetch.ADDED else token, score=score, type=kind)
    # A model has one unknown piece; files mark it as a control token.
    model.pieces[table["unknown"]].type = fetch.UNKNOWN
    model.trainer_spec.model_type = 2 if table["model"] == "llama" else 1
    model.trainer_spec.byte_fallback = fetch.BYTE in table["kinds"]
    model.trainer_spec.vocab_size = len(table["tokens"])
    model.trainer_spec.unk_piece = table["tokens"][table["unknown"]]
    model.normalizer_spec.name = "stored"
    model.normalizer_spec.precompiled_charsmap = base64.b64decode(table.get("precompiled_charsmap", ""))
    model.normalizer_spec.add_dummy_prefix = table["add_space_prefix"]
    model.normalizer_spec.remove_extra_whitespaces = table["remove_extra_whitespaces"]
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return reference.encode, between(reference.encode, table)


def tiktoken_reference(table):
    bytes_of = {char: byte for byte, char in enumerate(fetch.alphabet())}
    ordinary = [at for at, kind in enumerate(table["kinds"]) if kind == fetch.NORMAL]
    first = ordinary[0]
    ranks = {bytes(bytes_of[char] for char in table["tokens"][at]): at - first for at in ordinary}
    reference = tiktoken.Encoding("reference", pat_str=PATTERNS[table["pre"]], mergeable_ranks=ranks, special_tokens={})
    compose = (lambda text: unicodedata.normalize("NFC", text)) if table["pre"] == "qwen2" else (lambda text: text)
    encode = lambda text: [first + at for at in reference.encode_ordinary(compose(text))]
    return encode, between(encode, table)


def tokenizers_reference(tokenizer):
    def encode(text, as_text):
        tokenizer.encode_special_tokens = as_text
        return tokenizer.encode(text, add_special_tokens=False).ids

    return lambda text: encode(text, True), lambda text: encode(text, False)


def unigram_json(table):
    """A Unigram model as Hugging Face converts it; tests/parity.rs writes the same."""
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return tokenizers.Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None, "decoder": spaces,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": table["precompiled_charsmap"]},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]},
        "pre_tokenizer": spaces,
        "model": {"type": "Unigram", "unk_id": table["unknown"], "vocab": list(zip(table["tokens"], table["scores"])), "byte_fallback": False},
    }))


def from_gguf(path):
    reader = gguf.GGUFReader(path)
    value = lambda key, default=None: reader.fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in reader.fields else default
    return {
        "model": value("model"), "tokens": value("tokens"), "scores": value("scores"), "kinds": value("token_type"), "merges": value("merges"),
        "unknown": value("unknown_token_id"), "add_space_prefix": value("add_space_prefix", True),
        "remove_extra_whitespaces": value("remove_extra_whitespaces", False),
    }


def byte_pairs(path, normalizer=None):
    """SmolLM2 and Command-R, as their tokenizer.json says; Command-R's composes text."""
    table = from_gguf(path)
    vocab = {token: at for at, token in enumerate(table["tokens"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in table["merges"]]))
    if normalizer:
        tokenizer.normalizer = normalizer
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    specials = [token for token, kind in zip(table["tokens"], table["kinds"]) if kind != fetch.NORMAL]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizers_reference(tokenizer)


def digest(lines):
    blocks, total = [], hashlib.sha256()
    for at in range(0, len(lines), 100):
        data = b"".join(struct.pack(f"<{len(ids) + 1}I", *ids, 0xFFFFFFFF) for ids in lines[at:at + 100])
        blocks.append(hashlib.sha256(data).hexdigest()[:8])
        total.update(data)
    return {"total": total.hexdigest(), "blocks": " ".join(blocks), "first": lines[:30]}


def families(vocabularies, smollm2_gguf, gemma3_gguf, minilm):
    stored = {path.stem: path for folder in [HERE, vocabularies] for path in sorted(folder.glob("*.json"))}
    for name, path in sorted(stored.items()):
        if name in ("pools", "parity"):
            continue
        if name.endswith(".tokenizer"):
            yield name, tokenizers_reference(tokenizers.Tokenizer.from_file(str(path)))
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        yield name, (tiktoken_reference if table["model"] == "gpt2" else sentencepiece_reference)(table)
    yield "t5.tokenizer", tokenizers_reference(unigram_json(json.loads((HERE / "t5.json").read_text(encoding="utf-8"))))
    yield "smollm2", byte_pairs(smollm2_gguf)
    yield "llama2", sentencepiece_reference(from_gguf(vocabularies / "llama2.gguf"))
    yield "command-r", byte_pairs(vocabularies / "command-r.gguf", normalizers.NFC())
    yield "gemma3", sentencepiece_reference(from_gguf(gemma3_gguf))
    wordpiece = tokenizers.Tokenizer.from_file(f"{minilm}/tokenizer.json")
    wordpiece.no_truncation()
    wordpiece.no_padding()
    yield "minilm", tokenizers_reference(wordpiece)


def main(vocabularies, *models):
    lines = corpus.stored()
    made = {"corpus": hashlib.sha256("\0".join(lines).encode()).hexdigest(), "families": {}}
    for name, (as_text, parse) in families(pathlib.Path(vocabularies), *models):
        made["families"][name] = {"as_text": digest([as_text(line) for line in lines]), "parse": digest([parse(line) for line in lines])}
        print(name, made["families"][name]["as_text"]["total"][:8], file=sys.stderr)
    text = json.dumps(made)
    (HERE / "parity.json").write_text(text.replace('"parse": {', '\n"parse": {').replace('"as_text": {', '\n"as_text": {') + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
