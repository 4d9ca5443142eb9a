"""Tiny seeded models of every family with golden logits from transformers.

    python golden/families/make.py checkpoint          # numpy, tokenizers; deterministic
    python golden/families/make.py logits              # torch, transformers
    python golden/families/make.py gguf CONVERTER      # torch, transformers, llama.cpp's converter

Each step takes names of families as further arguments, all of them by default, goes on after a
failure and prints what failed. families.py holds the families as data, README.md what is written.
"""

import hashlib
import json
import pathlib
import shutil
import struct
import sys
import tempfile
import traceback

import numpy as np

from families import FAMILIES, VOCAB, config, shapes

HERE = pathlib.Path(__file__).parent
LENGTHS = (48, 9)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CORPUS = """The window is smaller than the text, so the first words are out of sight of the last ones.
A model of a few thousand weights knows nothing, but it must know it in the same way everywhere.
the and ing tion that with this from have not are was for you all one there their what when which
"""


def rounded(values):
    """To four significant bits, so that F32, F16 and BF16 hold the same number."""
    mantissa, exponent = np.frexp(values)
    exact = np.ldexp(np.round(mantissa * 16) / 16, exponent)
    return np.where(np.abs(exact) < 2.0**-14, 0.0, exact).astype(np.float32)


def weights(name):
    """The tensors, drawn in the order of their names; nothing keeps a neutral 0 or 1."""
    seed = hashlib.sha256(FAMILIES[name].get("weights", name).encode()).digest()[:4]
    random = np.random.RandomState(int.from_bytes(seed, "little"))
    gemma = config(name)["model_type"].startswith("gemma")  # multiplies by 1 + weight
    tensors = {}
    for tensor, shape in sorted(shapes(name).items()):
        noise = random.standard_normal(shape)
        if tensor.endswith("norm.weight"):
            values = 0.3 * noise + (0.0 if gemma else 1.0)
        elif tensor.endswith(".bias"):
            values = 0.5 * noise
        else:
            values = (0.4 if ".gate.weight" in tensor else 0.2) * noise
        tensors[tensor] = rounded(values)
    return tensors


def encoded(tensors, dtype):
    """A safetensors file."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in tensors.items():
        if dtype == "F16":
            blob = values.astype("<f2").tobytes()
        else:
            blob = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(folder):
    """A byte-level BPE in GPT-2's split of text: 3 special tokens, 256 bytes, 61 merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": SPECIAL[1],
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 256,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def checkpoint(name):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config(name))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [0, 2], "do_sample": True, "temperature": 0.7},
    )
    write_tokenizer(folder)
    tensors, dtype = weights(name), FAMILIES[name].get("dtype", "F16")
    n_shards = FAMILIES[name].get("shards", 1)
    if n_shards == 1:
        (folder / "model.safetensors").write_bytes(encoded(tensors, dtype))
        return
    names, where, total = list(tensors), {}, 0
    per_shard = -(-len(names) // n_shards)
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = {n: tensors[n] for n in names[shard * per_shard : (shard + 1) * per_shard]}
        (folder / file).write_bytes(encoded(part, dtype))
        where |= dict.fromkeys(part, file)
        total += sum(2 * values.size for values in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def sequences():
    """The token ids, the same in every family: all kinds of tokens, none twice in a row."""
    random = np.random.RandomState(20261125)
    return [np.concatenate([[1], random.permutation(np.arange(3, VOCAB))[: n - 1]]) for n in LENGTHS]


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(kind), f"{kind}: {info[kind]}"
    return model.eval()


def run(model):
    import torch

    with torch.inference_mode():
        return [
            model(torch.tensor(ids[None]), use_cache=False).logits[0].float().numpy()
            for ids in sequences()
        ]


def variant(folder, overrides):
    """The logits with some settings of config.json replaced."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary)
        for file in folder.glob("model*"):
            if file.suffix != ".gguf":
                shutil.copy(file, copy)
        original = json.loads((folder / "config.json").read_text())
        write_json(copy / "config.json", original | overrides)
        return run(load(copy))


def distances(one, other):
    return [round(float(np.abs(a - b).max()), 5) for a, b in zip(one, other)]


def influences(model, golden):
    """What zeroing each parameter does to the logits: the largest change, per kind of tensor."""
    import torch

    found = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.zero_()
            found[name] = max(distances(golden, run(model)))
            parameter.copy_(saved)
    return found


def logits(name):
    folder = HERE / name
    model = load(folder)
    golden = run(model)
    values = np.concatenate(golden)
    assert np.isfinite(values).all() and values.shape == (sum(LENGTHS), VOCAB)
    with (folder / "golden.bin").open("wb") as file:
        file.write(b"EXRFAMIL" + struct.pack("<5I", 1, len(LENGTHS), VOCAB, *LENGTHS))
        for ids in sequences():
            file.write(ids.astype("<u4").tobytes())
        file.write(values.astype("<f4").tobytes())
    with tempfile.TemporaryDirectory() as temporary:
        model.config.save_pretrained(temporary)
        text = json.loads((pathlib.Path(temporary) / "config.json").read_text())
    write_json(folder / "config-v5.json", text)
    influence = influences(model, golden)
    least = min(influence, key=influence.get)
    checks = {
        "parameters": sum(values.size for values in weights(name).values()),
        "logits": {"deviation": float(values.std()), "largest": float(np.abs(values).max())},
        "off": {what: distances(golden, variant(folder, o)) for what, o in FAMILIES[name]["off"].items()},
        "least influence": {least: influence[least]},
    }
    write_json(folder / "checks.json", checks)
    print(name, json.dumps(checks))
    quiet = [what for what, found in checks["off"].items() if max(found) < 0.05]
    assert not quiet, f"no influence: {quiet}"
    assert influence[least] > 0.05, f"no influence: {least}"


def gguf(name):
    """llama.cpp's converter, told which split of text the tokenizer uses."""
    import torch
    from conversion import get_model_class
    from conversion.base import TextModel, gguf as writer

    outtype = FAMILIES[name].get("gguf")
    if outtype is None:
        return
    model_class = get_model_class(FAMILIES[name]["architecture"])
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    model_class.set_vocab = lambda self: self._set_vocab_gpt2()
    ftype = {"f16": writer.LlamaFileType.MOSTLY_F16, "bf16": writer.LlamaFileType.MOSTLY_BF16}
    target = HERE / name / "model.gguf"
    with torch.inference_mode():
        # llama.cpp expects special tokens of Phi-3 in a model whose name says so.
        title = name.replace("phi3", "tiny")
        model_class(HERE / name, ftype[outtype], target, model_name=title).write()
    print(name, target.stat().st_size)


def main():
    step, rest = sys.argv[1], sys.argv[2:]
    if step == "gguf":
        converter = rest.pop(0)
        sys.path[1:1] = [converter, f"{converter}/gguf-py"]
    failed = []
    for name in rest or FAMILIES:
        try:
            {"checkpoint": checkpoint, "logits": logits, "gguf": gguf}[step](name)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    print(step, "failed:", failed or "none")


if __name__ == "__main__":
    main()
