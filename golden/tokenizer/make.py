"""Writes smollm2.json: token ids of the golden strings by llama.cpp's own tokenizer.

    python make.py generator MODEL.gguf LLAMA_SERVER > smollm2.json
    python make.py encoder MODEL_FOLDER > minilm.json     (needs `pip install tokenizers`)

llama.cpp cuts and merges with code of its own, so it is independent of the `tokenizers` crate
that exrail uses. The encoder golden comes from the Python package of the `tokenizers` library.
"""

import json
import subprocess
import sys
import time
import urllib.request

import strings

PORT = 18473


def post(path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def generator(model, server):
    process = subprocess.Popen(
        [server, "-m", model, "--port", str(PORT), "-c", "64", "-ngl", "0", "--no-warmup", "-t", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            try:
                post("/tokenize", {"content": "a"})
                break
            except OSError:
                time.sleep(0.5)
        ids = lambda text, parse: post(
            "/tokenize", {"content": text, "add_special": False, "parse_special": parse}
        )["tokens"]
        return [
            {"text": text, "parse": ids(text, True), "as_text": ids(text, False)}
            for text in strings.GENERATOR
        ]
    finally:
        process.terminate()


def encoder(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = []
    for text in strings.ENCODER:
        tokenizer.encode_special_tokens = False
        parse = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = True
        as_text = tokenizer.encode(text, add_special_tokens=True)
        rows.append({"text": text, "parse": parse, "wrapped": as_text.ids, "char_offsets": as_text.offsets[1:-1]})
    return rows


if __name__ == "__main__":
    rows = generator(*sys.argv[2:]) if sys.argv[1] == "generator" else encoder(*sys.argv[2:])
    print("[\n" + ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows) + "\n]")
