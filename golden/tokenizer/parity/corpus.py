"""The 10,200 lines that every tokenizer is compared on; tests/parity.rs makes the same ones.

    python corpus.py > pools.json

pools.json has lists of fragments. A line is a few of them, drawn with SplitMix64 (Steele, Lea and
Flood, 2014), some repeated, mostly with a space between.
"""

import json
import pathlib

N_LINES = 10_200
SEED = 20_240_229
MASK = (1 << 64) - 1

WORDS = """the of and to in is was that for with his as on be at by I this had not are but from or have an
they which one you were all her she there would their we him been has when who will no more if out so up
said what its about than into them can only other time new some could these two may first then do any
like my now over such our man even most made after also well where must years much your should
internationalisation antidisestablishmentarianism Hello World I'm you're WE'VE he'll she'd it's don't
o'clock JavaScript iPhone McDonald's naïve café Ärger Straße œuvre façade Zürich coöperate jalapeño
Ελληνικά καλημέρα русский язык привет мир українська мова Ťažký žluťoučký kůň İstanbul ığdır ẞ ſharp""".split()
FOREIGN = [
    "日本語のテキスト。", "東京都", "ひらがな", "カタカナ", "ﾊﾝｶｸ", "中文，测试！", "我喜欢学习", "繁體中文", "漢字123", "한국어 텍스트", "안녕하세요",
    "العربية", "السلام عليكم", "עברית", "שלום", "فارسی", "हिन्दी", "नमस्ते", "বাংলা", "தமிழ்", "ไทย", "สวัสดี", "ქართული", "Հայերեն",
    "አማርኛ", "မြန်မာ", "ខ្មែរ", "ລາວ", "Tiếng Việt", "Nguyễn", "e\u0301", "n\u0303", "a\u0300\u0301\u0302", "\u1e9b\u0323", "Å", "ﬁ", "ﬃ",
    "ㅎㅏㄴ", "\u1112\u1161\u11ab", "½", "²", "③", "Ⅷ", "٣", "१२", "𝔘𝔫𝔦", "ℝ∀x∈X∑", "™", "℃", "‰",
]
CODE = [
    "def f(x):\n    return x**2  # square\n", "fn main() {\n\tprintln!(\"{}\", 1 << 4);\n}\n", "if (a && b || !c) { x += y[i++]; }",
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;", "<div class=\"x\">&amp;</div>", "{\"key\": [1, 2.5, null, true]}",
    "https://example.org/a?b=c&d=%20#e", "\\begin{equation} \\alpha_i^2 \\end{equation}", "#!/bin/sh", "C:\\path\\to\\file.txt",
    "import numpy as np\n", "for (int i = 0; i < n; ++i)", "std::vector<std::string>", "let mut v: Vec<_> = vec![];", "a->b.c()",
    "x = {'a': 1}\r\n", "/* comment */", "// TODO", "\"\"\"doc\"\"\"", "0x1F", "1e-9", "snake_case", "camelCase", "kebab-case",
    "SCREAMING_CASE", "@decorator", "$var", "%d\\n", "()=>{}", "!!!", "???...", "-----", "=====", "***", "~/.ssh", "user@example.org",
    "//\n", "/a/b/", "){\n", ");\n\n", "}\n}\n", "<<", ">>=", "::", "`code`", "“quotes”", "— dash…", "’", "'s", "'S", "'ll", "'LL", "'ſ",
]
DIGITS = ["0", "7", "12", "123", "1234", "12345", "1234567890", "3.14159", "1,000,000.00", "2024-02-29T12:34:56Z", "v1.2.3", "-40", "9" * 13]
SPACES = [
    " ", "  ", "   ", "    ", " " * 7, " " * 16, " " * 33, "\t", "\t\t\t", "\n", "\n\n", "\n\n\n", "\n" * 9, "\r\n", "\r\n\r\n", " \n", "\n ",
    " \t \n \t ", "\u00a0", "\u3000", "\u2009\u2009", "\u200b", "\u200d", "\ufeff", "\u2028", "\u0085", " \u00a0 ", "\n  \n", "\u2581", "\u2581\u2581",
]
EMOJI = ["👍", "👍👍", "👨‍👩‍👧‍👦", "👩🏽‍💻", "🏳️‍🌈", "🇩🇪", "🇩🇪🇫🇷", "😀", "🤣😂", "❤️", "☀", "✅", "1️⃣", "🦀", "𓂀", "🧑‍🚀🚀", "🫠"]
SPECIALS = [
    "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unused7>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|start_of_role|>", "<|end_of_role|>",
    "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "<0x0A>", "<0x41>", "<think>", "</think>", "<tool_call>", "<table>", "<h1>", "<|im_end", "im_end|>",
    "<file_sep>", "<repo_name>", "<fim_prefix>", "<|reserved_special_token_0|>", "<|header_start|>", "<|eot|>", "<extra_id_0>", "##ing", "<<s>>",
]
RANGES = [(0x20, 0x7F), (0xA0, 0x180), (0x370, 0x378), (0x386, 0x3A2, 0x38B, 0x38D), (0x400, 0x460), (0x5D0, 0x5EB), (0x621, 0x63B), (0x300, 0x315),
          (0x905, 0x93A), (0xE01, 0xE3B), (0x10D0, 0x10F1), (0x2010, 0x2028), (0x2030, 0x205F), (0x20A0, 0x20B0), (0x2190, 0x2200),
          (0x2200, 0x2240), (0x2500, 0x2530), (0x3041, 0x3097), (0x30A1, 0x30FB), (0x4E00, 0x4E60), (0x9F00, 0x9F30), (0xAC00, 0xAC40),
          (0xFF01, 0xFF5F), (0x1D400, 0x1D420), (0x1F300, 0x1F321), (0x1F600, 0x1F640), (0x20000, 0x20010), (0xFB00, 0xFB07)]
CHARACTERS = [chr(c) for first, last, *holes in RANGES for c in range(first, last) if c not in holes and c != 0xAD]


def pools():
    # Listed twice is drawn twice as often.
    return [WORDS, WORDS, WORDS, FOREIGN, CODE, DIGITS, SPACES, EMOJI, SPECIALS, CHARACTERS]


def lines(pools):
    state = SEED

    def draw(below):
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) % below

    found = []
    for _ in range(N_LINES):
        line = ""
        for _ in range(1 + draw(12)):
            pool = pools[draw(len(pools))]
            fragment = pool[draw(len(pool))]
            if draw(12) == 0:
                fragment *= 2 + draw(6)
            line += fragment if draw(4) == 0 else fragment + " "
        found.append(line)
    return found


def stored():
    return lines(json.loads((pathlib.Path(__file__).parent / "pools.json").read_text()))


if __name__ == "__main__":
    print(json.dumps(pools(), ensure_ascii=True, indent=0))
