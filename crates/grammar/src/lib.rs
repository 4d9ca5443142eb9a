//! What an answer may be: grammars over a vocabulary, the tokens that each state allows, and the check of what
//! came out.
//!
//! ```text
//! Source (a JSON Schema, a regex, Lark, GBNF) ─ Compiler ─> Grammar ─ matcher ─> Matcher: mask, advance, forced
//! ```
//!
//! The automaton is llguidance's; here stand what it may be asked, within which bounds, and what is refused
//! instead of ignored. This crate knows no sequences and no HTTP.

mod cache;
mod closing;
mod compiler;
mod error;
mod gbnf;
mod lark;
mod matcher;
mod measure;
mod plain;
mod screen;
mod source;
mod strict_json;
mod validate;
mod vocabulary;
mod worker;
mod written;

pub use compiler::{Compiler, Grammar, Limits};
pub use error::{GrammarError, MatcherError};
pub use matcher::{Mask, Matcher};
pub use source::Source;
pub use validate::{Invalid, Validator};
pub use vocabulary::Vocabulary;
pub use written::written;
