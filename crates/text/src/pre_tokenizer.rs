//! How text is cut into words before byte-pair merges, by the name a GGUF file gives.
//!
//! GGUF stores only a name (`tokenizer.ggml.pre`); the rule itself is in the `tokenizer.json` of
//! the model family. Each rule below is that of the family named; llama.cpp's own are the same
//! where it says so, and approximate for Tekken and GPT-4o. A name that is not listed is
//! refused: a wrong rule still produces ids, only worse ones (field-faults E1).

use tokenizers::NormalizerWrapper;
use tokenizers::normalizers::unicode::NFC;

use crate::TokenizerError;
use crate::splitter::Splitter;
use crate::words::Step;

/// GPT-2 (`encoder.py` of openai/gpt-2).
pub(crate) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3 (`original/tokenizer.model` of Meta-Llama-3), and cl100k of openai/tiktoken, which is
/// written differently and means the same: `OLMo` 2, Phi-4, Granite 4.
pub(crate) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2, 2.5 and 3: as Llama 3 with every digit alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Tekken (`config.pattern` of mistral-common's `tekken.json`).
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// `o200k_base` of openai/tiktoken: Phi-4-mini, Llama 4.
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Every digit alone, before anything else.
const DIGIT: &str = r"\p{N}";
/// The steps of llama.cpp's rule for files without a name.
const DEFAULT_STEPS: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// Everything about a family that the vocabulary itself does not say.
struct Rule {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// Text is composed (NFC) before it is cut.
    composes: bool,
    /// A word that is in the vocabulary is taken whole, without trying merges; so in vocabularies
    /// that come from tiktoken's format.
    whole_words: bool,
}

const RULES: [Rule; 9] = [
    Rule {
        names: &["smollm", "starcoder", "refact", "codeshell", "exaone"],
        patterns: &[DIGIT, GPT2],
        composes: false,
        whole_words: false,
    },
    Rule { names: &["command-r"], patterns: &[DIGIT, GPT2], composes: true, whole_words: false },
    Rule {
        names: &["gpt-2", "gpt2", "phi-2", "jais"],
        patterns: &[GPT2],
        composes: false,
        whole_words: false,
    },
    Rule { names: &["olmo", "mpt"], patterns: &[GPT2], composes: true, whole_words: false },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"],
        patterns: &[LLAMA3],
        composes: false,
        whole_words: true,
    },
    Rule {
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[QWEN2],
        composes: true,
        whole_words: false,
    },
    Rule { names: &["tekken"], patterns: &[TEKKEN], composes: false, whole_words: true },
    Rule { names: &["gpt-4o", "llama4"], patterns: &[O200K], composes: false, whole_words: true },
    Rule { names: &["default"], patterns: &DEFAULT_STEPS, composes: false, whole_words: false },
];

/// A rule, compiled.
pub(crate) struct Family {
    pub(crate) steps: Vec<Step>,
    pub(crate) normalizer: Option<NormalizerWrapper>,
    /// A word that is in the vocabulary is taken whole, without trying merges.
    pub(crate) whole_words: bool,
}

/// Names that [`family`] knows, for messages.
pub(crate) fn known_names() -> String {
    let names: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
    names.join(", ")
}

/// Returns the family that `tokenizer.ggml.pre` names.
pub(crate) fn family(pre: &str) -> Result<Family, TokenizerError> {
    let Some(rule) = RULES.iter().find(|rule| rule.names.contains(&pre)) else {
        let found = pre.to_owned();
        return Err(TokenizerError::UnknownPreTokenizer { found, known: known_names() });
    };
    let mut steps = Vec::with_capacity(rule.patterns.len() + 1);
    for pattern in rule.patterns {
        steps.push(Step::isolate(Splitter::new(pattern)?));
    }
    steps.push(Step::bytes());
    Ok(Family {
        steps,
        normalizer: rule.composes.then(|| NFC.into()),
        whole_words: rule.whole_words,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_one_rule_and_compiles() {
        let names: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
        for name in &names {
            assert!(family(name).is_ok(), "{name}");
            assert_eq!(names.iter().filter(|it| *it == name).count(), 1, "{name}");
        }
        let error = family("frob").err().unwrap().to_string();
        assert!(error.contains("frob") && error.contains("tekken"), "{error}");
    }
}
