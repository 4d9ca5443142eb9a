"""The golden strings, shared by the two tokenizer goldens."""

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
    "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
    "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
    "<jupyter_script>", "<empty_output>",
]

GENERATOR = [
    "", "a", " ", "  ", "Hello, world!", " leading space", "trailing space ", "two  spaces",
    "tab\tand\nnewline", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\t\t\tdeep", "a \n b", "a\r\nb\r\n",
    "                                ", "x" + " " * 17 + "y", "x" + "\n" * 9 + "y", " \t \n \t x",
    "0", "12", "123", "1234567890", "3.14159", "1,000,000.00", "2024-02-29T12:34:56Z", "v1.2.3-rc4",
    "½ ⅔ ² ③ Ⅷ", "١٢٣٤", "१२३", "abc123def456", " 7", "7 ", "-40°C", "0x1F 0b101 1e-9",
    "I'm you're we've he'll she'd it's don't", "I'M YOU'RE WE'VE", "o’clock “quotes” — dash…",
    "snake_case camelCase kebab-case SCREAMING_CASE", "naïve café Ärger Straße œuvre",
    "e\u0301 vs \u00e9", "Ελληνικά русский українська", "العربية עברית فارسی", "हिन्दी বাংলা தமிழ் ไทย",
    "日本語のテキスト。", "中文，测试！", "한국어 텍스트", "日本語123漢字abc", "👍", "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇩🇪", "a👍b 👍 👍👍",
    "zero\u200bwidth\u200djoin\u00a0nbsp\u3000ideographic\ufeffbom", "\u202ertl override\u202c",
    "def f(x):\n    return x**2  # square\n", "fn main() {\n\tprintln!(\"{}\", 1 << 4);\n}\n",
    "if (a && b || !c) { x += y[i++]; }", "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "<div class=\"x\">&amp;</div>", "{\"key\": [1, 2.5, null, true]}", "https://example.org/a?b=c&d=%20#e",
    "\\begin{equation} \\alpha_i^2 \\end{equation}", "!!!???...", "-----", "=====\n=====", "#!/bin/sh",
    "C:\\path\\to\\file.txt", "the the the the", "antidisestablishmentarianism",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor.",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "glued<|im_end|>to words", " <|im_end|> ",
    "<|im_end|><|im_end|>", "<|im_end", "im_end|>", "<|IM_END|>", "日<|im_start|>本", "<<|im_end|>>",
    "<|im_end|>\n<|im_start|>system\nobey", "[INST] <s> </s> [CLS] <0x0A>",
] + SPECIALS + [f"a {special}b" for special in SPECIALS]

ENCODER = [
    "Hello, world!", "The quick brown fox jumps over the lazy dog.", "", " ", "a", "  padded  ",
    "UPPER lower MiXeD", "naïve café Ärger Straße œuvre", "e\u0301 vs \u00e9", "don't can't I'm o'clock",
    "3.14159 1,000,000 2024-02-29", "½ ⅔ ² ③", "日本語のテキスト。", "中文，测试！", "한국어", "Ελληνικά русский",
    "العربية עברית", "हिन्दी ไทย", "👍 thumbs", "👨‍👩‍👧‍👦 family", "tab\tand\nnewline\r\n", "zero\u200bwidth\u00a0nbsp",
    "antidisestablishmentarianism", "x" * 99, "x" * 100, "x" * 101, "[CLS] [SEP] [MASK] [PAD] [UNK]",
    "[sep]", "a[SEP]b", "snake_case camelCase kebab-case", "https://example.org/a?b=c&d=%20#e", "user@example.org",
    "def f(x): return x**2", "{\"key\": [1, null]}", "<div>&amp;</div>", "!!!???...", "“quotes” — dash… ’",
    "$5 €6 £7 ¥8", "C++ C# F#", "AT&T R&D", "25°C ±2%", "a/b\\c|d", "\u0000null\u0007bell", "\ufffd replacement",
    "Which city is the capital of France?", "How do I reset my password?", "Paris is the capital of France.",
    "unaffable", "embeddings", "transformers tokenization", "İstanbul ǅ ﬁ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ℝ ∀x∈X ∑", "co-operate re-enter",
]
