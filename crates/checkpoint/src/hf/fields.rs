//! [`Fields`]: typed access to the fields of a JSON object. `null` is the same as absent.

use serde_json::{Map, Value};

use crate::LoadError;

/// An object of a configuration file.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Where the object is in the file: empty, or `text_config.`.
    path: &'a str,
}

impl<'a> Fields<'a> {
    /// `value`, which must be an object.
    pub(super) fn new(value: &'a Value, path: &'a str) -> Result<Fields<'a>, LoadError> {
        match value {
            Value::Object(map) => Ok(Fields { map, path }),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => {
                let name = if path.is_empty() { "the file" } else { path.trim_end_matches('.') };
                Err(LoadError::bad_value(name, "an object", short(value)))
            }
        }
    }

    /// The whole name of a field.
    pub(super) fn name(self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    pub(super) fn keys(self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the field is there, if only as `null`.
    pub(super) fn has(self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn bad(
        self,
        key: &str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> LoadError {
        LoadError::bad_value(&self.name(key), expected, found)
    }

    fn typed<T>(
        self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.bad(key, expected, short(value)))
    }

    /// An integer from 1 to `limit`.
    pub(super) fn positive(self, key: &str, limit: u32) -> Result<Option<usize>, LoadError> {
        let expected = format!("an integer from 1 to {limit}");
        self.typed(key, &expected, |value| {
            let number = value.as_u64().filter(|n| (1..=u64::from(limit)).contains(n))?;
            usize::try_from(number).ok()
        })
    }

    /// An integer from 1 to `limit`, which must be there.
    pub(super) fn require_positive(self, key: &str, limit: u32) -> Result<usize, LoadError> {
        match self.positive(key, limit)? {
            Some(number) => Ok(number),
            None => Err(self.bad(key, format!("an integer from 1 to {limit}"), "nothing")),
        }
    }

    /// A number of 32 bits; text and out of range are errors.
    pub(super) fn u32(self, key: &str) -> Result<Option<u32>, LoadError> {
        self.typed(key, "an integer of 32 bits", |value| u32::try_from(value.as_u64()?).ok())
    }

    /// A finite number above zero.
    pub(super) fn positive_f64(self, key: &str) -> Result<Option<f64>, LoadError> {
        self.typed(key, "a positive number", |value| value.as_f64().filter(|&x| usable(x)))
    }

    /// As [`Fields::positive_f64`], rounded.
    pub(super) fn positive_f32(self, key: &str) -> Result<Option<f32>, LoadError> {
        Ok(self.positive_f64(key)?.map(|x| x as f32))
    }

    /// A finite number.
    pub(super) fn f32(self, key: &str) -> Result<Option<f32>, LoadError> {
        self.typed(key, "a number", |value| {
            value.as_f64().map(|x| x as f32).filter(|x| x.is_finite())
        })
    }

    pub(super) fn bool(self, key: &str) -> Result<Option<bool>, LoadError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn str(self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.typed(key, "text", Value::as_str)
    }

    pub(super) fn object(self, key: &str, path: &'a str) -> Result<Option<Fields<'a>>, LoadError> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields { map, path }))
    }

    pub(super) fn list(self, key: &str) -> Result<Option<&'a Vec<Value>>, LoadError> {
        self.typed(key, "a list", Value::as_array)
    }

    /// `len` finite positive numbers.
    pub(super) fn divisors(self, key: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let expected = format!("a list of {len} positive numbers");
        let read = |value: &Value| -> Option<Vec<f32>> {
            let list = value.as_array().filter(|list| list.len() == len)?;
            let number = |value: &Value| value.as_f64().filter(|&x| usable(x)).map(|x| x as f32);
            list.iter().map(number).collect()
        };
        match self.typed(key, &expected, read)? {
            Some(list) => Ok(list),
            None => Err(self.bad(key, expected, "nothing")),
        }
    }
}

/// Whether `x` is a positive number also in 32 bits.
fn usable(x: f64) -> bool {
    let x = x as f32;
    x.is_finite() && x > 0.0
}

/// A value for a message.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
