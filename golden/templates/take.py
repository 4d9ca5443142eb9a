r"""Takes the original chat templates of model families out of three packages.

    pip download --no-deps --no-binary llama-cpp-python -d PACKAGES \
        trl==1.16.0 xinference==4.1.0 llama-cpp-python==0.3.36
    python take.py PACKAGES TEMPLATES

The source package of llama-cpp-python has that of llama.cpp, and with it templates.

The templates belong to the models and keep the models' licences, so they are not part of this
repository. Needs nothing but Python.
"""

import json
import pathlib
import sys
import tarfile
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
LLAMA_CPP = {name: f"vendor/llama.cpp/models/templates/{file}.jinja" for name, file in {
    "smollm3": "HuggingFaceTB-SmolLM3-3B", "granite3.3": "ibm-granite-granite-3.3-2B-Instruct",
    "granite4.0": "ibm-granite-granite-4.0", "granite4.1": "ibm-granite-granite-4.1",
    "cohere2-tools": "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "mistral-small3.2": "Mistral-Small-3.2-24B-Instruct-2506",
}.items()}


def originals(packages):
    trl = zipfile.ZipFile(next(packages.glob("trl-1.16.0-*.whl")))
    xinference = zipfile.ZipFile(next(packages.glob("xinference-4.1.0-*.whl")))
    llama_cpp = tarfile.open(packages / "llama_cpp_python-0.3.36.tar.gz")
    for family, path in TRL.items():
        yield family, f"trl 1.16.0: {path}", trl.read(path).decode()
    for family, path in XINFERENCE.items():
        spec = json.loads(xinference.read(path))
        spec = spec[0] if isinstance(spec, list) else spec
        yield family, f"xinference 4.1.0: {path}", spec["chat_template"]
    for family, path in LLAMA_CPP.items():
        text = llama_cpp.extractfile(f"llama_cpp_python-0.3.36/{path}").read().decode()
        yield family, f"llama-cpp-python 0.3.36: {path}", text


def write(packages, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for family, _, text in originals(packages):
        (folder / f"{family}.jinja").write_bytes(text.encode())


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
