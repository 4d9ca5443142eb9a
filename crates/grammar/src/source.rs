//! What a caller writes.

use serde_json::Value;

/// A constraint as it was written.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Any JSON object.
    JsonObject,
    /// A value of this JSON Schema.
    JsonSchema(Value),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// A Lark grammar in llguidance's dialect, rule `start`.
    Lark(String),
    /// A grammar of llama.cpp (GBNF), rule `root`.
    Gbnf(String),
    /// A Lark grammar with holes: the rule `json_0` is a value of the first schema, `json_1` one of the second.
    /// For what is put together around schemas of clients, such as tool calls behind free text.
    Composed {
        /// The grammar, rule `start`. `<name>` stands for a control token.
        lark: String,
        /// The schemas; each is screened as one of its own.
        schemas: Vec<Value>,
    },
}
