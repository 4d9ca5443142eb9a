//! What templates may call beyond the language itself: the names that Hugging Face's renderer
//! defines, and `fromjson`, which some templates of tool-calling models use (field-faults B19).

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};

/// Nesting of JSON that is read or written; Rust recursion, so it must end well below the stack.
const MAX_JSON_DEPTH: usize = 64;

/// A template's own refusal, as `raise_exception` reports it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// Adds all functions and filters to `environment`.
pub(crate) fn register(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment.add_filter("fromjson", from_json);
    environment.add_filter("from_json", from_json);
    environment.add_test("iterable", is_iterable);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(python_formatter);
}

/// As `iter(value)` decides in Python: unlike minijinja's test, `None` is not iterable.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template")
        .with_source(Raised(message)))
}

/// `datetime.now().strftime(format)` at the time of the render options, in UTC.
fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    let seconds = state.lookup("__now").and_then(|now| now.as_i64()).unwrap_or_default();
    let bad = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
    let now = jiff::Timestamp::from_second(seconds).map_err(bad)?;
    jiff::fmt::strtime::format(format, jiff::tz::Offset::UTC.to_datetime(now)).map_err(bad)
}

/// Prints `True`, `False` and `None` as Python does; everything else as minijinja.
fn python_formatter(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let name = match (value.kind(), value.is_true()) {
        (ValueKind::Bool, true) => "True",
        (ValueKind::Bool, false) => "False",
        (ValueKind::None, _) => "None",
        (_, _) => return escape_formatter(out, state, value),
    };
    out.write_str(name).map_err(|_| Error::from(ErrorKind::WriteFailure))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`. Unlike minijinja's own filter it does
/// not escape for HTML: transformers overrides Jinja's for the same reason.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        let reason = "tojson: expected `ensure_ascii` false, found true";
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let (item, colon) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, colon]) => (item.clone(), colon.clone()),
        Some(other) => {
            let reason = format!("tojson: expected 2 separators, found {}", other.len());
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
    };
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = JsonWriter { text: String::new(), indent, item, colon, sort_keys };
    writer.value(value, 0)?;
    Ok(Value::from(writer.text))
}

struct JsonWriter {
    text: String,
    indent: Option<usize>,
    /// Between two items.
    item: String,
    /// Between key and value.
    colon: String,
    sort_keys: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "value nested too deeply for JSON",
            ));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                write!(self.text, "{value}").map_err(|_| Error::from(ErrorKind::WriteFailure))?;
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list('{', '}', keys, depth, |writer, key| {
                    writer.string(&key.to_string());
                    writer.text.push_str(&writer.colon);
                    writer.value(&value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect();
                self.list('[', ']', items, depth, |writer, item| writer.value(&item, depth + 1))?;
            }
            // `ValueKind` is not exhaustive; what JSON has is listed above.
            ValueKind::Undefined | ValueKind::Bytes | ValueKind::Plain | ValueKind::Invalid | _ => {
                return Err(not_json(value.kind()));
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        items: Vec<Value>,
        depth: usize,
        mut write: impl FnMut(&mut JsonWriter, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        let empty = items.is_empty();
        for (at, item) in items.into_iter().enumerate() {
            if at > 0 {
                self.text.push_str(&self.item);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent.min(16) * depth));
        }
    }

    fn string(&mut self, text: &str) {
        // `serde_json` escapes what `json.dumps` escapes, except that it leaves DEL alone too.
        self.text.push_str(&serde_json::Value::from(text).to_string());
    }
}

fn not_json(kind: ValueKind) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("{kind} cannot be written as JSON"))
}

/// `json.loads(text)`.
fn from_json(text: &str) -> Result<Value, Error> {
    let parsed: serde_json::Value = serde_json::from_str(text)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("fromjson: {error}")))?;
    Ok(to_template_value(&parsed))
}

/// Depth is bounded by the 128 levels that `serde_json` reads.
fn to_template_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(value) => number(value),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => {
            Value::from(items.iter().map(to_template_value).collect::<Vec<_>>())
        }
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), to_template_value(item))))
        }
    }
}

/// A JSON number as templates calculate with it.
pub(crate) fn number(number: &serde_json::Number) -> Value {
    match (number.as_i64(), number.as_u64()) {
        (Some(value), _) => Value::from(value),
        (None, Some(value)) => Value::from(value),
        (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
    }
}
