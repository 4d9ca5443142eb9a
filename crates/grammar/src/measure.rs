//! How large a schema is, counted before anything recursive looks at it.

use serde_json::Value;

use crate::{GrammarError, Limits};

fn too_large(what: &'static str, limit: usize, found: usize) -> GrammarError {
    GrammarError::TooLarge { what, limit: limit as u64, found: found as u64 }
}

/// These bytes, if they are within the limit.
pub(crate) fn bytes(n_bytes: usize, limits: &Limits) -> Result<usize, GrammarError> {
    if n_bytes > limits.source_bytes {
        return Err(too_large("bytes", limits.source_bytes, n_bytes));
    }
    Ok(n_bytes)
}

/// Refuses a schema that is too deep, has too many values or too long an `enum`. About its bytes as JSON.
pub(crate) fn check(schema: &Value, limits: &Limits) -> Result<usize, GrammarError> {
    let mut n_values = 0_usize;
    let mut n_bytes = 0_usize;
    let mut rest = vec![(schema, 1_usize)];
    while let Some((value, depth)) = rest.pop() {
        n_values += 1;
        if depth > limits.depth {
            return Err(too_large("levels of a schema", limits.depth, depth));
        }
        match value {
            Value::Object(entries) => {
                n_bytes += entries.keys().map(|key| key.len() + 4).sum::<usize>();
                if let Some(Value::Array(values)) = entries.get("enum")
                    && values.len() > limits.enum_values
                {
                    return Err(too_large("values of an enum", limits.enum_values, values.len()));
                }
                rest.extend(entries.values().map(|it| (it, depth + 1)));
            }
            Value::Array(values) => rest.extend(values.iter().map(|it| (it, depth + 1))),
            Value::String(text) => n_bytes += text.len() + 2,
            Value::Null | Value::Bool(_) | Value::Number(_) => n_bytes += 4,
        }
        if n_values > limits.values {
            return Err(too_large("values in a schema", limits.values, n_values));
        }
        bytes(n_bytes, limits)?;
    }
    Ok(n_bytes)
}

/// Keywords whose values are no schemas.
const PLAIN: [&str; 5] = ["const", "default", "enum", "example", "examples"];

/// Whether any object of a schema is so.
pub(crate) fn any(schema: &Value, is_so: &dyn Fn(&Value) -> bool) -> bool {
    let mut rest = vec![schema];
    while let Some(value) = rest.pop() {
        match value {
            Value::Object(entries) => {
                if is_so(value) {
                    return true;
                }
                rest.extend(
                    entries.iter().filter(|it| !PLAIN.contains(&it.0.as_str())).map(|it| it.1),
                );
            }
            Value::Array(values) => rest.extend(values),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    false
}
