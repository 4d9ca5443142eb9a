"""Trains the small vocabularies of the families whose own cannot be had from PyPI.

    pip install tokenizers==0.23.3 sentencepiece==0.2.3
    python small.py

Each has the pre-tokenizer, normaliser and properties of its family's tokenizer.json and is trained
on the first 4,000 of the 10,200 lines: Granite 3, Cohere 2, OLMo 2 and Phi-4 (byte-level BPE),
Phi-3 (sentencepiece BPE with byte fallback) and T5 (Unigram with NFKC and byte-free unknowns).
"""

import io
import json
import pathlib

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import corpus
import fetch

HERE = pathlib.Path(__file__).parent
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLIT = pre_tokenizers.Split(Regex(CL100K), behavior="isolated", invert=False)
# Added tokens as the families have them; `!` takes white space along on both sides.
BYTE_LEVEL = {
    "granite": (None, [DIGITS, GPT2], ["<|end_of_text|>", "<fim_prefix>", "<|start_of_role|>", "<|end_of_role|>"]),
    "cohere2": (normalizers.NFC(), [DIGITS, GPT2], ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]),
    "olmo2": (None, [SPLIT, BYTES], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "phi4": (None, [SPLIT, BYTES], ["<|endoftext|>!", "<|im_start|>!", "<|im_end|>!"]),
}


def byte_level(name):
    normalizer, steps, added = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus.stored()[:4000], trainer)
    for token in added:
        both = token.endswith("!")
        tokenizer.add_tokens([AddedToken(token.rstrip("!"), lstrip=both, rstrip=both, normalized=False, special=True)])
    # An added token that stands for text, found only as a word of its own.
    tokenizer.add_tokens([AddedToken("<think>", single_word=name == "phi4", normalized=False)])
    (HERE / f"{name}.tokenizer.json").write_text(tokenizer.to_str(pretty=False))


def sentencepiece_model(name, specials=(), **options):
    out = io.BytesIO()
    lines = [line.replace("\n", " ").replace("\0", "") for line in corpus.stored()[:4000]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, num_threads=1, character_coverage=0.98, **options
    )
    table = fetch.sentencepiece(out.getvalue())
    for token in specials:
        table["tokens"].append(token)
        table["scores"].append(0.0)
        table["kinds"].append(fetch.CONTROL)
    table["strips_right"] = bool(specials)
    (HERE / f"{name}.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


def main():
    for name in BYTE_LEVEL:
        byte_level(name)
    sentencepiece_model(
        "phi3", ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"], model_type="bpe", vocab_size=1500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
    )
    sentencepiece_model("t5", model_type="unigram", vocab_size=1500, normalization_rule_name="nmt_nfkc")
    sentencepiece_model("t5-bytes", model_type="unigram", vocab_size=1500, normalization_rule_name="nfkc_cf", byte_fallback=True)


if __name__ == "__main__":
    main()
