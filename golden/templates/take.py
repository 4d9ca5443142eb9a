"""Takes the original chat templates of model families out of two packages.

    pip download --no-deps -d WHEELS trl==1.16.0 xinference==4.1.0
    python take.py WHEELS TEMPLATES

The templates belong to the models and keep the models' licences, so they are not part of this
repository. Needs nothing but Python.
"""

import json
import pathlib
import sys
import zipfile

TRL = {name: f"trl/chat_templates/{file}.jinja" for name, file in {
    "llama3": "llama3", "llama3.1": "llama3_1", "llama3.2": "llama3_2", "gemma2": "gemma",
    "gemma3": "gemma3", "phi3": "phi3", "phi3.5": "phi3_5", "qwen2.5": "qwen2_5", "qwen3": "qwen3",
    "qwen3-2507": "qwen3_instruct_2507", "cohere2": "cohere2",
}.items()}
XINFERENCE = {name: f"xinference/model/llm/models/{file}.json" for name, file in {
    "llama2": "llama-2-chat", "mistral-v0.1": "mistral-instruct-v0.1",
    "mistral-v0.3": "mistral-instruct-v0.3", "mistral-tekken": "mistral-nemo-instruct",
    "mixtral": "mixtral-instruct-v0.1", "mixtral-8x22b": "mixtral-8x22B-instruct-v0.1",
    "qwen2": "qwen2-instruct",
}.items()}


def originals(wheels):
    trl = zipfile.ZipFile(next(wheels.glob("trl-1.16.0-*.whl")))
    xinference = zipfile.ZipFile(next(wheels.glob("xinference-4.1.0-*.whl")))
    for family, path in TRL.items():
        yield family, f"trl 1.16.0: {path}", trl.read(path).decode()
    for family, path in XINFERENCE.items():
        spec = json.loads(xinference.read(path))
        spec = spec[0] if isinstance(spec, list) else spec
        yield family, f"xinference 4.1.0: {path}", spec["chat_template"]


def write(wheels, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for family, _, text in originals(wheels):
        (folder / f"{family}.jinja").write_bytes(text.encode())


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
