//! JSON schemas: whether one compiles, and a small instance of it.

use regex_syntax::hir::{Hir, HirKind};
use serde_json::{Map, Value, json};

use super::writing;
use crate::Random;

/// How deep schemas and references are followed.
const DEPTH: usize = 32;

const TYPES: [&str; 7] = ["object", "array", "string", "integer", "number", "boolean", "null"];

/// Why a schema does not compile: an unknown type or a pattern that is no regex.
pub(super) fn check(schema: &Value) -> Result<(), String> {
    let Some(schema) = schema.as_object() else {
        return if schema.is_boolean() { Ok(()) } else { Err("a schema is an object".into()) };
    };
    if let Some(kind) = kinds(schema).find(|kind| !TYPES.contains(kind)) {
        return Err(format!("unknown type {kind}"));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
        check_pattern(pattern)?;
    }
    for key in ["items", "additionalProperties", "not"] {
        schema.get(key).map_or(Ok(()), check)?;
    }
    for key in ["anyOf", "oneOf", "allOf", "prefixItems"] {
        schema.get(key).and_then(Value::as_array).into_iter().flatten().try_for_each(check)?;
    }
    for key in ["properties", "$defs", "definitions", "patternProperties"] {
        let under = schema.get(key).and_then(Value::as_object);
        under.into_iter().flat_map(Map::values).try_for_each(check)?;
    }
    let patterns = schema.get("patternProperties").and_then(Value::as_object);
    patterns.into_iter().flat_map(Map::keys).try_for_each(|pattern| check_pattern(pattern))
}

/// Why a regex does not compile.
pub(super) fn check_pattern(pattern: &str) -> Result<(), String> {
    regex_syntax::parse(pattern).map(drop).map_err(|error| error.to_string())
}

/// A small instance of a schema that compiles. Strings that are free are pseudo words.
pub(super) fn instance(schema: &Value, random: &mut Random) -> Value {
    Writer { root: schema, random }.value(schema, DEPTH)
}

/// A short text that a pattern matches.
pub(super) fn matching(pattern: &str) -> String {
    let mut text = String::new();
    if let Ok(hir) = regex_syntax::parse(pattern) {
        push_match(&hir, &mut text);
    }
    text
}

/// What is first in an object that obeys the schema.
pub(super) fn first_property(schema: &Value) -> &str {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.and_then(|properties| properties.keys().next()).map_or("a", String::as_str)
}

fn kinds(schema: &Map<String, Value>) -> impl Iterator<Item = &str> {
    let kind = schema.get("type");
    let listed = kind.and_then(Value::as_array).into_iter().flatten();
    kind.into_iter().chain(listed).filter_map(Value::as_str)
}

struct Writer<'a> {
    root: &'a Value,
    random: &'a mut Random,
}

impl Writer<'_> {
    fn value(&mut self, schema: &Value, depth: usize) -> Value {
        let Some(fields) = schema.as_object() else { return Value::Null };
        // A schema that contains itself has no end that is smaller.
        let Some(depth) = depth.checked_sub(1) else { return Value::Null };
        if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
            let root = self.root;
            let target = reference.strip_prefix('#').and_then(|path| root.pointer(path));
            return target.map_or(Value::Null, |target| self.value(target, depth));
        }
        if let Some(value) = fields.get("const") {
            return value.clone();
        }
        if let Some(value) = first(fields, "enum") {
            return value.clone();
        }
        if let Some(one) = first(fields, "anyOf").or_else(|| first(fields, "oneOf")) {
            return self.value(one, depth);
        }
        if let Some(all) = fields.get("allOf").and_then(Value::as_array) {
            return self.value(&merged(fields, all), depth);
        }
        let guess = if fields.contains_key("properties") { "object" } else { "null" };
        match kinds(fields).next().unwrap_or(guess) {
            "object" => self.object(fields, depth),
            "array" => self.array(fields, depth),
            "string" => Value::String(self.string(fields)),
            "integer" => whole(fields).into(),
            "number" => number(fields),
            "boolean" => false.into(),
            _ => Value::Null,
        }
    }

    fn object(&mut self, fields: &Map<String, Value>, depth: usize) -> Value {
        let empty = Map::new();
        let properties = fields.get("properties").and_then(Value::as_object).unwrap_or(&empty);
        let required = fields.get("required").and_then(Value::as_array);
        let required: Vec<&str> =
            required.into_iter().flatten().filter_map(Value::as_str).collect();
        // Declared properties come in their declared order, as the grammar has it.
        let declared = properties.keys().map(String::as_str).filter(|key| required.contains(key));
        let others = required.iter().copied().filter(|key| !properties.contains_key(*key));
        let keys: Vec<&str> = declared.chain(others).collect();
        let mut object = Map::new();
        for key in keys {
            let value = properties.get(key).map_or(Value::Null, |under| self.value(under, depth));
            object.insert(key.into(), value);
        }
        Value::Object(object)
    }

    fn array(&mut self, fields: &Map<String, Value>, depth: usize) -> Value {
        let n_items = length(fields, "minItems").unwrap_or(0);
        let prefix = fields.get("prefixItems").and_then(Value::as_array);
        let item = |index: usize| {
            prefix.and_then(|prefix| prefix.get(index)).or_else(|| fields.get("items"))
        };
        (0..n_items)
            .map(|index| item(index).map_or(Value::Null, |under| self.value(under, depth)))
            .collect()
    }

    fn string(&mut self, fields: &Map<String, Value>) -> String {
        if let Some(pattern) = fields.get("pattern").and_then(Value::as_str) {
            return matching(pattern);
        }
        let format = match fields.get("format").and_then(Value::as_str) {
            Some("date-time") => Some("2026-01-01T00:00:00Z"),
            Some("date") => Some("2026-01-01"),
            Some("time") => Some("00:00:00Z"),
            Some("uuid") => Some("00000000-0000-4000-8000-000000000000"),
            Some("email") => Some("a@example.org"),
            Some("uri") => Some("https://example.org/"),
            _ => None,
        };
        if let Some(format) = format {
            return format.into();
        }
        let mut text = writing::word(self.random);
        while text.len() < length(fields, "minLength").unwrap_or(0) {
            text.push_str(&writing::word(self.random));
        }
        text.truncate(length(fields, "maxLength").unwrap_or(usize::MAX));
        text
    }
}

fn first<'a>(fields: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    fields.get(key)?.as_array()?.first()
}

/// The fields of a schema with those of all in its `allOf`; required names are joined, and so are
/// properties.
fn merged(fields: &Map<String, Value>, all: &[Value]) -> Value {
    let mut sum = fields.clone();
    sum.remove("allOf");
    for (key, value) in all.iter().filter_map(Value::as_object).flatten() {
        match (sum.get_mut(key), value) {
            (Some(Value::Array(old)), Value::Array(new)) => old.extend(new.iter().cloned()),
            (Some(Value::Object(old)), Value::Object(new)) => old.extend(new.clone()),
            _ => {
                sum.insert(key.clone(), value.clone());
            }
        }
    }
    Value::Object(sum)
}

fn length(fields: &Map<String, Value>, key: &str) -> Option<usize> {
    usize::try_from(fields.get(key)?.as_u64()?).ok()
}

/// The whole number nearest to 0 within the bounds.
fn whole(fields: &Map<String, Value>) -> i64 {
    let bound = |key: &str| {
        #[expect(clippy::cast_possible_truncation, reason = "bounds of tests are small")]
        fields
            .get(key)
            .and_then(Value::as_f64)
            .map(|bound| (bound.floor() as i64, bound.ceil() as i64))
    };
    let least = bound("minimum").map(|(_, up)| up).into_iter();
    let least = least.chain(bound("exclusiveMinimum").map(|(down, _)| down + 1)).max();
    let most = bound("maximum").map(|(down, _)| down).into_iter();
    let most = most.chain(bound("exclusiveMaximum").map(|(_, up)| up - 1)).min();
    let step = fields.get("multipleOf").and_then(Value::as_i64).unwrap_or(1).max(1);
    match (least, most) {
        (Some(least), _) if least > 0 => (least + step - 1) / step * step,
        (_, Some(most)) if most < 0 => most.div_euclid(step) * step,
        _ => 0,
    }
}

/// A number near 0 within the bounds.
fn number(fields: &Map<String, Value>) -> Value {
    let bound = |key: &str| fields.get(key).and_then(Value::as_f64);
    let least = bound("minimum").or_else(|| bound("exclusiveMinimum"));
    let most = bound("maximum").or_else(|| bound("exclusiveMaximum"));
    match (least, most) {
        (Some(least), Some(most)) if least > 0.0 || most < 0.0 => json!(f64::midpoint(least, most)),
        (Some(least), None) if least >= 0.0 => json!(least + 0.5),
        (None, Some(most)) if most <= 0.0 => json!(most - 0.5),
        (Some(least), Some(most)) => json!(f64::midpoint(least, most)),
        _ => json!(0.5),
    }
}

fn push_match(hir: &Hir, text: &mut String) {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => {}
        HirKind::Literal(literal) => text.push_str(&String::from_utf8_lossy(&literal.0)),
        HirKind::Class(class) => match class {
            regex_syntax::hir::Class::Unicode(class) => {
                text.extend(
                    class.ranges().first().map(regex_syntax::hir::ClassUnicodeRange::start),
                );
            }
            regex_syntax::hir::Class::Bytes(class) => {
                text.extend(class.ranges().first().map(|range| char::from(range.start())));
            }
        },
        HirKind::Repetition(repetition) => {
            for _ in 0..repetition.min {
                push_match(&repetition.sub, text);
            }
        }
        HirKind::Capture(capture) => push_match(&capture.sub, text),
        HirKind::Concat(parts) => parts.iter().for_each(|part| push_match(part, text)),
        HirKind::Alternation(parts) => {
            if let Some(part) = parts.first() {
                push_match(part, text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_obey_their_schemas() {
        let schema = json!({"type": "object", "required": ["n", "s", "list", "e", "c", "r", "u"],
            "properties": {
                "n": {"type": "integer", "exclusiveMinimum": 3, "multipleOf": 5},
                "s": {"type": "string", "pattern": "^[a-f]{3}-(x|y)$"},
                "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
                "e": {"enum": ["red", "blue"]}, "c": {"const": 7},
                "r": {"$ref": "#/$defs/short"},
                "u": {"anyOf": [{"type": "null"}, {"type": "string"}]},
                "not required": {"type": "number"}},
            "$defs": {"short": {"type": "string", "minLength": 30, "maxLength": 31}}});
        check(&schema).unwrap();
        let value = instance(&schema, &mut Random::new(1));
        assert_eq!(value["n"], 5);
        assert_eq!(value["s"], "aaa-x");
        assert_eq!(value["list"], json!([false, false]));
        assert_eq!((&value["e"], &value["c"]), (&json!("red"), &json!(7)));
        assert_eq!(value.as_object().unwrap()["u"], Value::Null);
        assert!((30..=31).contains(&value["r"].as_str().unwrap().len()));
        assert!(value.get("not required").is_none());
    }

    #[test]
    fn broken_patterns_and_unknown_types_do_not_compile() {
        check(&json!({"properties": {"a": {"type": "string", "pattern": "(["}}})).unwrap_err();
        check(&json!({"items": {"type": "strnig"}})).unwrap_err();
        // A property may be called so.
        check(&json!({"properties": {"pattern": {"type": "string"}}})).unwrap();
    }
}
