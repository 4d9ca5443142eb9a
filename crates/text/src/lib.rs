//! Text on its way into a model and out of it: tokenizers, chat templates, streaming text, stop
//! strings.
//!
//! ```text
//! messages ─ ChatTemplate::render ─> Prompt ─ encode_prompt ─> token ids
//! token ids ─ Tokenizer::token_bytes ─> Detokenizer ─> StopMatcher ─> text for the client
//! ```
//!
//! Two things are guarded here and nowhere else. What a message says can never become a control
//! token ([`encode_prompt`]), and a chat template, which comes with the model file and is
//! therefore untrusted code, runs with bounded work, output and time ([`TemplateLimits`]).
//! How models call tools is in [`tools`].
//! This crate knows no devices, no files and no model; ids are plain `u32`.

mod bpe;
mod charsmap;
mod chat;
mod detokenizer;
mod error;
mod from_gguf;
mod from_json;
mod json_file;
mod json_spelling;
mod lint;
mod normaliser;
mod odd;
mod pieces;
mod pre_tokenizer;
mod prompt;
mod provenance;
mod sentencepiece;
mod sha256;
mod specials;
mod spellings;
mod splitter;
mod stop;
mod template;
mod template_functions;
mod template_parts;
mod token_table;
mod tokenizer;
pub mod tools;
mod unigram;
mod vocabulary;
mod words;

pub use chat::{ChatMessage, RenderOptions, ToolCall};
pub use detokenizer::Detokenizer;
pub use error::TokenizerError;
pub use from_json::TokenRoles;
pub use lint::{LintFinding, LintRule, lint_prompt};
pub use odd::OddCharacters;
pub use prompt::{
    PlacedPrompt, Prompt, PromptError, Segment, SlotTokens, encode_completion, encode_messages,
    encode_prompt, encode_slots,
};
pub use specials::Specials;
pub use stop::{Released, StopMatcher};
pub use template::{ChatTemplate, TemplateError, TemplateLimits};
pub use tokenizer::Tokenizer;
pub use vocabulary::Vocabulary;
