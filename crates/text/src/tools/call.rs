//! What a parser gives: pieces of an answer.

use serde_json::{Map, Value};

/// A piece of an answer, in order.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Piece {
    /// What the model thought, without its markers. How it is cut depends on the pushes; its concatenation
    /// does not.
    Thought(String),
    /// Text for the reader; cut as the thought is.
    Text(String),
    /// A whole call of one of the tools.
    Call(ParsedCall),
    /// What looked like a call and is none.
    Malformed(Malformed),
}

/// A call that is whole: well-formed JSON without duplicate keys, of a known tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedCall {
    /// From 0, by order in the answer.
    pub index: usize,
    /// The tool.
    pub name: String,
    /// Its arguments. Whether they conform to its schema is for the validator to say.
    pub arguments: Map<String, Value>,
    /// The arguments as JSON, as the model wrote it: numbers keep all their digits.
    pub arguments_json: String,
}

/// What looked like a call and is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// All of it: its markers, and blanks before it that belong to no other text.
    pub text: String,
    /// What is wrong.
    pub fault: CallFault,
}

/// Why a text is not a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallFault {
    /// The answer ended inside it.
    #[error("tool call: expected its end, found the end of the answer")]
    Cut,
    /// No JSON: a trailing comma, an unknown escape, a key that comes twice.
    #[error("tool call: expected JSON, found {what} at byte {at}")]
    NotJson {
        /// What stands there.
        what: &'static str,
        /// Byte of the JSON, from 0.
        at: usize,
    },
    /// JSON, or an element in angle brackets, of another shape than a call.
    #[error("tool call: expected {expected}")]
    NotACall {
        /// What a call of the family looks like.
        expected: &'static str,
    },
    /// A name that no tool has.
    #[error("tool call: expected the name of a tool, found `{name}`")]
    UnknownTool {
        /// The name, at most its first 80 characters.
        name: String,
    },
    /// Something behind the call and before the marker that ends it.
    #[error("tool call: expected its end, found further text")]
    ExtraText,
    /// More calls than allowed.
    #[error("tool call: expected at most {limit} in an answer, found one more")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// A call that does not end within the limit.
    #[error("tool call: expected at most {limit} bytes, found no end")]
    TooLong {
        /// The limit.
        limit: usize,
    },
}
