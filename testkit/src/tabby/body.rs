//! Bodies of requests: JSON or not, and the details of a 422 as the real server's validators
//! write them.

use axum::http::{HeaderMap, header};
use serde_json::{Map, Value, json};

use super::refusal::Refusal;

/// A body before its key has been looked at.
#[derive(Debug)]
pub(super) enum Sent {
    Json(Value),
    /// Not declared to be JSON.
    Text(String),
    Nothing,
}

/// Reads a body. Unparsable JSON is refused here, before any key is looked at.
pub(super) fn read(headers: &HeaderMap, bytes: &[u8]) -> Result<Sent, Refusal> {
    if bytes.is_empty() {
        return Ok(Sent::Nothing);
    }
    let declared = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = declared.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    let is_json =
        kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"));
    if !is_json {
        return Ok(Sent::Text(String::from_utf8_lossy(bytes).into_owned()));
    }
    serde_json::from_slice(bytes).map(Sent::Json).map_err(|error| {
        Refusal::Invalid(vec![json!({"type": "json_invalid", "loc": ["body", error.column()],
            "msg": "JSON decode error", "input": {}, "ctx": {"error": error.to_string()}})])
    })
}

/// The fields of a body that must be an object.
pub(super) fn fields(sent: Sent) -> Result<Map<String, Value>, Refusal> {
    let input = match sent {
        Sent::Json(Value::Object(fields)) => return Ok(fields),
        Sent::Nothing => {
            return Err(Refusal::Invalid(vec![json!({"type": "missing", "loc": ["body"],
                "msg": "Field required", "input": null})]));
        }
        Sent::Json(other) => other,
        Sent::Text(text) => Value::String(text),
    };
    Err(Refusal::Invalid(vec![json!({"type": "model_attributes_type", "loc": ["body"],
        "msg": "Input should be a valid dictionary or object to extract fields from",
        "input": input})]))
}

/// A bound of a number.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound {
    AtLeast(f64),
    Above(f64),
    AtMost(f64),
}

/// What is wrong with a body.
#[derive(Debug, Default)]
pub(super) struct Checks {
    details: Vec<Value>,
}

impl Checks {
    /// The 422, if anything is wrong.
    pub(super) fn end(self) -> Result<(), Refusal> {
        if self.details.is_empty() { Ok(()) } else { Err(Refusal::Invalid(self.details)) }
    }

    /// A field of the body that is not there.
    pub(super) fn missing(&mut self, path: &[&str], body: &Map<String, Value>) {
        self.missing_at(location(path), &Value::Object(body.clone()));
    }

    /// The same at any place.
    pub(super) fn missing_at(&mut self, loc: Value, input: &Value) {
        self.wrong_at("missing", loc, "Field required", input);
    }

    /// A field that is of the wrong kind.
    pub(super) fn wrong(&mut self, kind: &str, path: &[&str], message: &str, input: &Value) {
        self.wrong_at(kind, location(path), message, input);
    }

    /// The same at any place.
    pub(super) fn wrong_at(&mut self, kind: &str, loc: Value, message: &str, input: &Value) {
        self.details.push(json!({"type": kind, "loc": loc, "msg": message, "input": input}));
    }

    /// A boolean field; null is like absent.
    pub(super) fn boolean(&mut self, body: &Map<String, Value>, name: &str) -> Option<bool> {
        match body.get(name)? {
            Value::Null => None,
            Value::Bool(value) => Some(*value),
            other @ (Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_)) => {
                self.wrong("bool_type", &[name], "Input should be a valid boolean", other);
                None
            }
        }
    }

    /// A whole number under the first of its names that is there, within bounds.
    pub(super) fn integer(
        &mut self,
        body: &Map<String, Value>,
        names: &[&str],
        bounds: &[Bound],
    ) -> Option<i64> {
        let (name, value) = present(body, names)?;
        // As pydantic: 5, 5.0 and "5" are five.
        let number = match value {
            Value::String(text) => text.trim().parse().ok(),
            #[expect(clippy::cast_possible_truncation, reason = "whole, and checked to be small")]
            Value::Number(number) => number.as_i64().or_else(|| {
                let float = number.as_f64()?;
                (float.fract() == 0.0 && float.abs() < 1e15).then_some(float as i64)
            }),
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
        };
        let Some(number) = number else {
            self.wrong("int_type", &[name], "Input should be a valid integer", value);
            return None;
        };
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "bounds are small whole numbers"
        )]
        let kept = self.bounded((name, value), number as f64, bounds, |limit| json!(limit as i64));
        kept.then_some(number)
    }

    /// A number under the first of its names that is there, within bounds.
    pub(super) fn number(
        &mut self,
        body: &Map<String, Value>,
        names: &[&str],
        bounds: &[Bound],
    ) -> Option<f64> {
        let (name, value) = present(body, names)?;
        let number = match value.as_str() {
            Some(text) => text.trim().parse().ok(),
            None => value.as_f64(),
        };
        let Some(number) = number else {
            self.wrong("float_type", &[name], "Input should be a valid number", value);
            return None;
        };
        self.bounded((name, value), number, bounds, |limit| json!(limit)).then_some(number)
    }

    /// Whether the number keeps its bounds; `shown` writes a bound as the field's kind.
    fn bounded(
        &mut self,
        (name, input): (&str, &Value),
        number: f64,
        bounds: &[Bound],
        shown: fn(f64) -> Value,
    ) -> bool {
        let broken = |bound: &&Bound| match **bound {
            Bound::AtLeast(limit) => number < limit,
            Bound::Above(limit) => number <= limit,
            Bound::AtMost(limit) => number > limit,
        };
        let Some(bound) = bounds.iter().find(broken) else { return true };
        let (kind, key, words, limit) = match *bound {
            Bound::AtLeast(limit) => {
                ("greater_than_equal", "ge", "greater than or equal to", limit)
            }
            Bound::Above(limit) => ("greater_than", "gt", "greater than", limit),
            Bound::AtMost(limit) => ("less_than_equal", "le", "less than or equal to", limit),
        };
        self.details.push(json!({"type": kind, "loc": ["body", name],
            "msg": format!("Input should be {words} {limit}"), "input": input,
            "ctx": {key: shown(limit)}}));
        false
    }
}

/// The first of the names that is there and not null.
fn present<'a>(body: &'a Map<String, Value>, names: &[&'a str]) -> Option<(&'a str, &'a Value)> {
    let (name, value) = names.iter().find_map(|name| Some((*name, body.get(*name)?)))?;
    (!value.is_null()).then_some((name, value))
}

/// An optional boolean with its default.
pub(super) fn flag(value: Option<bool>, default: bool) -> bool {
    value.unwrap_or(default)
}

fn location(path: &[&str]) -> Value {
    std::iter::once("body").chain(path.iter().copied()).collect()
}
