//! How text is cut into words before byte-pair merges, by the name a GGUF file gives.
//!
//! GGUF stores only a name (`tokenizer.ggml.pre`); the rule itself is in the `tokenizer.json` of
//! the model family. Each rule below is that of the family named. A name that is not listed is
//! refused: a wrong rule still produces ids, only worse ones (field-faults E1).

use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::TokenizerError;

/// Llama 3 (`original/tokenizer.model` of Meta-Llama-3 and its `tokenizer.json`).
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2 and 2.5: as Llama 3 with every digit alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2 (`encoder.py` of openai/gpt-2).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// First, third and fourth step of llama.cpp's rule for files without a name.
const DEFAULT_STEPS: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// Everything about a family that the vocabulary itself does not say.
pub(crate) struct Family {
    pub(crate) pre_tokenizer: PreTokenizerWrapper,
    pub(crate) normalizer: Option<NormalizerWrapper>,
    /// A word that is in the vocabulary is taken whole, without trying merges.
    pub(crate) ignore_merges: bool,
}

/// Returns the family that `tokenizer.ggml.pre` names.
pub(crate) fn family(pre: &str) -> Result<Family, TokenizerError> {
    let bytes_only = || ByteLevel::new(false, false, false).into();
    let split = |patterns: &[&str]| -> Result<PreTokenizerWrapper, TokenizerError> {
        let mut steps = Vec::with_capacity(patterns.len() + 1);
        for pattern in patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let step = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|source| TokenizerError::Library { doing: "compiling a split", source })?;
            steps.push(step.into());
        }
        steps.push(bytes_only());
        Ok(Sequence::new(steps).into())
    };
    let family = |pre_tokenizer| Family { pre_tokenizer, normalizer: None, ignore_merges: false };
    Ok(match pre {
        "smollm" => family(
            Sequence::new(vec![
                Digits::new(true).into(),
                ByteLevel::new(false, false, true).into(),
            ])
            .into(),
        ),
        "gpt-2" | "gpt2" => family(ByteLevel::new(false, false, true).into()),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Family { ignore_merges: true, ..family(split(&[LLAMA3])?) }
        }
        "qwen2" => Family { normalizer: Some(NFC.into()), ..family(split(&[QWEN2])?) },
        "default" => family(split(&DEFAULT_STEPS)?),
        unknown => return Err(TokenizerError::UnknownPreTokenizer { found: unknown.to_owned() }),
    })
}
