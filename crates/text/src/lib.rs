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
//! This crate knows no devices, no files and no model; ids are plain `u32`.

mod chat;
mod detokenizer;
mod pre_tokenizer;
mod prompt;
mod provenance;
mod sha256;
mod specials;
mod stop;
mod template;
mod template_functions;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatMessage, RenderOptions, ToolCall};
pub use detokenizer::Detokenizer;
pub use prompt::{Prompt, PromptError, Segment, encode_completion, encode_prompt};
pub use specials::Specials;
pub use stop::{Released, StopMatcher};
pub use template::{ChatTemplate, TemplateError, TemplateLimits};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use vocabulary::Vocabulary;
