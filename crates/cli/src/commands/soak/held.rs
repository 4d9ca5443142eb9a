//! Requests whose answers are held to a schema, and the look at what came.

use std::sync::OnceLock;

use exrail_grammar::Validator;
use serde_json::{Value, json};

use super::random::Random;

/// Schemas that are asked for.
const N_SCHEMAS: u64 = 8;

/// What an answer is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// A value of the schema of this number.
    Value(u64),
    /// Calls of a tool whose arguments are values of it.
    Calls(u64),
}

impl Held {
    pub(super) fn draw(random: &mut Random, may_call: bool) -> Held {
        let n = random.below(N_SCHEMAS);
        if may_call && random.chance(50) { Held::Calls(n) } else { Held::Value(n) }
    }

    /// Writes it into a request.
    pub(super) fn ask(self, body: &mut Value) {
        match self {
            Held::Value(n) => body["json_schema"] = schema(n),
            Held::Calls(n) => {
                let function = json!({"name": "put_down", "description": "Keeps it.",
                                      "parameters": schema(n)});
                body["tools"] = json!([{"type": "function", "function": function}]);
                body["tool_choice"] = json!("required");
            }
        }
    }

    /// What is wrong with an answer of this text, which ended so; the text of calls is their arguments. An
    /// answer that says that it is incomplete may be anything.
    pub(super) fn fault(self, text: &str, finish: &str) -> Option<String> {
        let (n, one) = match self {
            Held::Value(n) => (n, true),
            Held::Calls(n) => (n, false),
        };
        if !["stop", "length", "tool_calls"].contains(&finish) {
            return None;
        }
        let values: Result<Vec<Value>, _> =
            serde_json::Deserializer::from_str(text).into_iter().collect();
        let Ok(values) = values else { return Some(format!("no JSON, and told as whole: {text}")) };
        if values.is_empty() || (one && values.len() > 1) {
            return Some(format!("{} values, expected one: {text}", values.len()));
        }
        let broken = values.iter().find_map(|value| validator(n).check(value).err());
        broken.map(|invalid| format!("{invalid}, and told as whole: {text}"))
    }
}

fn validator(n: u64) -> &'static Validator {
    static VALIDATORS: [OnceLock<Validator>; N_SCHEMAS as usize] =
        [const { OnceLock::new() }; N_SCHEMAS as usize];
    let index = usize::try_from(n % N_SCHEMAS).expect("below a usize");
    VALIDATORS[index].get_or_init(|| Validator::new(&schema(n)).expect("a schema of this file"))
}

fn schema(n: u64) -> Value {
    let member = match n % 4 {
        0 => json!({"type": "integer", "minimum": 3, "maximum": 900}),
        1 => json!({"enum": ["north", "south", null]}),
        2 => json!({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4}),
        _ => json!({"type": "string", "maxLength": 24}),
    };
    let mut schema = json!({
        "type": "object",
        "properties": {"value": member, "is_sure": {"type": "boolean"}},
        "required": ["value", "is_sure"],
        "additionalProperties": false,
    });
    if n >= 4 {
        let inner = schema.take();
        schema = json!({"type": "object", "properties": {"n": {"const": n}, "inner": inner},
                        "required": ["n", "inner"], "additionalProperties": false});
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The look sees what the soak is to find, and lets alone what says that it is cut.
    #[test]
    fn an_answer_that_does_not_conform_is_a_fault() {
        let whole = "{\"value\": 7, \"is_sure\": true}";
        assert_eq!(Held::Value(0).fault(whole, "stop"), None);
        assert_eq!(Held::Calls(0).fault(&format!("{whole}{whole}"), "tool_calls"), None);
        for text in ["{\"value\": 1, \"is_sure\": true}", "{\"value\": 7", "", "words"] {
            assert!(Held::Value(0).fault(text, "stop").is_some(), "{text}");
            assert!(Held::Value(0).fault(text, "length").is_some(), "{text}");
            assert_eq!(Held::Value(0).fault(text, "schema_incomplete"), None);
        }
        assert!(Held::Value(0).fault(&format!("{whole} {whole}"), "stop").is_some());
        for n in 0..N_SCHEMAS {
            assert!(Held::Value(n).fault("{}", "stop").is_some());
        }
    }
}
