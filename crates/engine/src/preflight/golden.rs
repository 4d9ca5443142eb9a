//! Texts whose token ids say that a tokenizer is the same one (G-09): what families of tokenizers are
//! known to disagree about, each in a line.

use exrail_text::{ChatMessage, ChatTemplate, RenderOptions, Specials, Tokenizer, encode_prompt};
use serde_json::{Map, Value, json};

/// Texts that every tokenizer gives back as they were.
pub const ROUND_TRIP: [&str; 8] = [
    "Hello, world!",
    "  two spaces\tand\ttabs \n\n",
    "1234567890 3.14159",
    "naïve café, Übergröße, ß",
    "日本語 と 한국어",
    "👩‍👩‍👧‍👦 🇩🇪",
    "fn main() { println!(\"{}\", 1 << 3); }",
    "<not a special token>",
];

/// Further ones, which some tokenizers normalise.
const TEXTS: [&str; 60] = [
    // Words and case.
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "HELLO hello Hello hELLO",
    "don't can't I'll we've they'd it's he'S",
    "co-operate re-enter e-mail",
    "antidisestablishmentarianism",
    "https://example.org/a/b?c=d&e=%20f#g",
    "user.name+tag@example.co.uk",
    // Whitespace runs.
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n\n",
    "\t\t",
    "\r\n",
    " leading",
    "trailing ",
    "a  b   c    d",
    "line\n  indented\n\tand tabbed\n",
    "no-break\u{a0}space and ideographic\u{3000}space",
    // Digits.
    "0",
    "7 42 365 1024 65536 1000000",
    "1,234,567.89",
    "0x1F 0b1010 1e-9 -273.15",
    "2026-11-29T05:23:00Z",
    "٣٤٥ १२३ ⅷ ½ ²",
    // Punctuation.
    "!?.,;:'\"()[]{}",
    "... … — – -- ---",
    "«quoted» “curly” ‘single’ 「corner」",
    "$€£¥ ₿ % ‰ § ¶",
    "a/b\\c|d~e^f`g",
    "#hashtag @mention *bold* _italic_ ~~gone~~",
    // Scripts.
    "Ελληνικά αλφάβητο",
    "Русский язык, ёлка",
    "العربية مع تَشْكِيل",
    "עברית עִם נִקּוּד",
    "हिन्दी देवनागरी क्षत्रिय",
    "ภาษาไทยไม่มีช่องว่าง",
    "繁體中文與简体中文",
    "ひらがなカタカナ漢字",
    "대한민국 한글",
    "Tiếng Việt có dấu",
    "İstanbul ıssız",
    // Composition: the same letter in one and in two code points, ligatures, invisible characters.
    "é e\u{301} ñ n\u{303}",
    "ﬁ ﬂ ﬃ Å Å",
    "zero\u{200b}width\u{200d}joiner\u{feff}mark",
    "\u{202e}right to left\u{202c}",
    "soft\u{ad}hyphen",
    // Emoji.
    "🙂",
    "👍🏽 👩🏿‍🚀 🏳️‍🌈",
    "1️⃣ ❤️ ❤",
    "🇯🇵🇫🇷",
    // Code.
    "def f(x: int) -> str:\n    return f\"{x!r}\"\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c; }",
    "SELECT * FROM t WHERE a = 'x''y' -- comment",
    "<div class=\"a\">&amp; &lt;b&gt;</div>",
    "{\"a\": [1, 2.5, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "#!/bin/sh\nset -eu; echo \"$HOME\" | sed 's/a/b/g' > /dev/null 2>&1",
    "$$\\int_0^1 x^2\\,dx = \\tfrac{1}{3}$$",
    "{{ jinja }} {% if x %} ${shell} {field}",
];

/// Conversations by their roles; what a template makes of them is compared too.
const CHATS: [&[&str]; 3] = [&["user"], &["system", "user"], &["user", "assistant", "user"]];

/// Texts to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Golden {
    /// Encoded as text.
    pub(super) as_text: Vec<String>,
    /// Encoded as control tokens.
    pub(super) controls: Vec<String>,
}

impl Golden {
    /// The texts of this program and every control token of the tokenizer.
    pub(super) fn of(tokenizer: &Tokenizer) -> Golden {
        let ids = 0..u32::try_from(tokenizer.vocab_len()).unwrap_or(u32::MAX);
        let controls = ids.filter(|&id| tokenizer.is_control(id));
        let literals = controls.filter_map(|id| tokenizer.token_bytes(id));
        let literals = literals.filter_map(|bytes| std::str::from_utf8(bytes).ok());
        Golden {
            as_text: ROUND_TRIP.iter().chain(&TEXTS).map(|&text| text.to_owned()).collect(),
            controls: literals.map(str::to_owned).collect(),
        }
    }

    /// Those that a manifest declares.
    pub(super) fn declared(manifest: &Value) -> Golden {
        let keys = |name: &str| {
            let map = manifest["golden"][name].as_object();
            map.into_iter().flat_map(Map::keys).cloned().collect()
        };
        Golden { as_text: keys("as_text"), controls: keys("controls") }
    }

    /// Ids of each text, what does not come back as it was, and ids of the conversations.
    pub(super) fn measure(&self, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Value {
        let mut changed = Map::new();
        let mut encode = |text: &String, specials| {
            // A text without a token for one of its bytes is null here and there.
            let ids = tokenizer.encode(text, specials).ok();
            let back = ids.as_ref().map(|ids| tokenizer.decode(ids));
            if let Some(back) = back.filter(|back| back != text) {
                changed.insert(text.clone(), back.into());
            }
            (text.clone(), json!(ids))
        };
        let as_text: Map<_, _> =
            self.as_text.iter().map(|text| encode(text, Specials::AsText)).collect();
        let controls: Map<_, _> =
            self.controls.iter().map(|text| encode(text, Specials::Parse)).collect();
        let chats: Map<_, _> =
            CHATS.iter().map(|roles| (roles.join(" "), chat(roles, tokenizer, template))).collect();
        json!({ "as_text": as_text, "controls": controls, "changed": changed, "chats": chats })
    }
}

/// Ids of a conversation of these roles; the template's words where it refuses them.
fn chat(roles: &[&str], tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Value {
    let Some(template) = template else { return Value::Null };
    let contents = ["What is 2 + 2?", "It is 4.", "Why?"];
    let messages = roles.iter().zip(contents).map(|(&role, text)| ChatMessage::new(role, text));
    let messages: Vec<_> = messages.collect();
    let options = RenderOptions {
        add_generation_prompt: true,
        // Templates that show the date must show the same one each time.
        now: Some(std::time::UNIX_EPOCH),
        ..RenderOptions::default()
    };
    match template.render(&messages, &options) {
        Ok(prompt) => match encode_prompt(tokenizer, &prompt) {
            Ok(ids) => json!(ids),
            Err(error) => json!(error.to_string()),
        },
        Err(error) => json!(error.to_string()),
    }
}
