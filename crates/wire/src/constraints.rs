//! Hard rules of a request, and what a trace keeps of them (G-31).

use serde::Serialize;
use serde_json::Value;

use crate::FieldError;

/// The field.
pub(crate) const FIELD: &str = "constraints";

/// A rule that an answer must keep: plain text, or text and what contradicts it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConstraintField {
    /// What the model is told.
    pub text: String,
    /// Regular expressions, none of which an answer may match.
    pub forbid: Vec<String>,
}

impl ConstraintField {
    /// A list of rules; `null` is none.
    ///
    /// # Errors
    /// What has the wrong type, by its place: `constraints[1].forbid[0]`.
    pub fn list(value: Value) -> Result<Option<Vec<Self>>, FieldError> {
        match value {
            Value::Null => Ok(None),
            Value::Array(items) => {
                let rules = items.into_iter().enumerate().map(|(at, item)| Self::one(at, item));
                rules.collect::<Result<_, _>>().map(Some)
            }
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
                Err(bad(FIELD.into(), "a list of rules", &value))
            }
        }
    }

    fn one(at: usize, item: Value) -> Result<Self, FieldError> {
        let place = format!("{FIELD}[{at}]");
        let mut fields = match item {
            Value::String(text) => return Ok(Self { text, forbid: Vec::new() }),
            Value::Object(fields) => fields,
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {
                return Err(bad(place, "a text, or an object with `text`", &item));
            }
        };
        let text = match fields.remove("text") {
            Some(Value::String(text)) => text,
            Some(found) => return Err(bad(format!("{place}.text"), "a text", &found)),
            None => return Err(bad(format!("{place}.text"), "a text", &Value::Null)),
        };
        let patterns = match fields.remove("forbid") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(patterns)) => patterns,
            Some(found) => {
                return Err(bad(format!("{place}.forbid"), "a list of patterns", &found));
            }
        };
        if let Some(name) = fields.keys().next() {
            let problem = "unknown field, expected `text` or `forbid`; remove it".into();
            return Err(FieldError { field: format!("{place}.{name}"), problem });
        }
        let pattern = |(nth, pattern): (usize, Value)| {
            let place = || format!("{place}.forbid[{nth}]");
            let text = pattern.as_str().map(str::to_owned);
            text.ok_or_else(|| bad(place(), "a pattern as text", &pattern))
        };
        let forbid = patterns.into_iter().enumerate().map(pattern).collect::<Result<_, _>>()?;
        Ok(Self { text, forbid })
    }
}

fn bad(field: String, expected: &str, found: &Value) -> FieldError {
    let found = match found {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    FieldError { field, problem: format!("expected {expected}, found {found}") }
}

/// What became of the hard rules of a request, in its trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConstraintRecord {
    /// sha256 of the request's rules in sorted order, each followed by a zero byte.
    pub sha256: String,
    /// How many there are.
    pub n_rules: usize,
    /// Patterns that the answer was compared with.
    pub n_patterns: usize,
    /// `equal`: the tokens of the prompt say the same rules. `not_built`: there was no prompt.
    pub echo: &'static str,
    /// `not_available`: no model here judges whether a sentence contradicts a rule in other words than its patterns.
    pub nli: &'static str,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_and_objects_are_rules() {
        let list = json!(["Be kind.", {"text": "Name no price.", "forbid": ["[0-9]+ coins"]}, {"text": "x"}]);
        let rules = ConstraintField::list(list).unwrap().unwrap();
        let patterns: Vec<usize> = rules.iter().map(|rule| rule.forbid.len()).collect();
        assert_eq!((rules[0].text.as_str(), patterns), ("Be kind.", vec![0, 1, 0]));
        assert_eq!(ConstraintField::list(Value::Null).unwrap(), None);
    }

    #[test]
    fn what_is_no_rule_is_named_by_its_place() {
        let cases = [
            (json!("Be kind."), "constraints"),
            (json!({"text": "x"}), "constraints"),
            (json!(["a", 7]), "constraints[1]"),
            (json!([{"forbid": []}]), "constraints[0].text"),
            (json!([{"text": ["x"]}]), "constraints[0].text"),
            (json!([{"text": "x", "forbid": "y"}]), "constraints[0].forbid"),
            (json!([{"text": "x", "forbid": ["y", null]}]), "constraints[0].forbid[1]"),
            (json!([{"text": "x", "allow": []}]), "constraints[0].allow"),
        ];
        for (list, place) in cases {
            let error = ConstraintField::list(list.clone()).unwrap_err();
            assert_eq!(error.field, place, "{list}");
        }
    }
}
