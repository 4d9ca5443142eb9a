//! What a schema is held to here: objects are closed unless they say otherwise, and a contract has a hash.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::generation::hex;

/// Part of every contract's hash: another way of reading schemas would be another contract.
pub(crate) const CONTRACT_VERSION: &str = "1";

/// Whether objects that do not say so may have fields beside those that are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Openness {
    /// They may not (G-13): what is checked for closed objects fits the schema as it was written, too.
    Closed,
    /// As JSON Schema has it.
    AsWritten,
}

impl Openness {
    /// Of the field `strict`, which is true when absent.
    pub(crate) fn of(strict: Option<bool>) -> Openness {
        if strict == Some(false) { Openness::AsWritten } else { Openness::Closed }
    }
}

/// SHA-256 over the contract as JSON, keys sorted, without blanks: `{"parameters":…,"version":"1"}`.
pub(crate) fn hash(parameters: &Value) -> String {
    let mut text = String::from(r#"{"parameters":"#);
    write_sorted(parameters, &mut text);
    text.push_str(r#","version":"#);
    text.push_str(&Value::from(CONTRACT_VERSION).to_string());
    text.push('}');
    hex(&Sha256::digest(text.as_bytes()))
}

fn write_sorted(value: &Value, text: &mut String) {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            text.push_str(&value.to_string());
        }
        Value::Array(items) => {
            text.push('[');
            for (at, item) in items.iter().enumerate() {
                text.push_str(if at == 0 { "" } else { "," });
                write_sorted(item, text);
            }
            text.push(']');
        }
        Value::Object(map) => {
            let mut pairs: Vec<_> = map.iter().collect();
            pairs.sort_by_key(|(key, _)| *key);
            text.push('{');
            for (at, (key, item)) in pairs.into_iter().enumerate() {
                text.push_str(if at == 0 { "" } else { "," });
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push(':');
                write_sorted(item, text);
            }
            text.push('}');
        }
    }
}

/// The schema with its objects closed, so that its values are values of the schema as it was written, too.
///
/// Where keywords look at one object from two sides (`allOf`, conditions, `properties` beside `$ref`), closing one
/// side would make the other unsatisfiable; where they count who agrees (`oneOf`, `not`), closing would let more
/// in. Such a schema stays as it is.
pub(crate) fn closed(mut schema: Value, openness: Openness) -> Value {
    if openness == Openness::Closed && !looks_twice(&schema) {
        close(&mut schema);
    }
    schema
}

/// Keywords by which an object is looked at from several sides, or from the other one.
const TWICE: [&str; 13] = [
    "allOf",
    "oneOf",
    "if",
    "then",
    "else",
    "not",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
    "$recursiveRef",
    "extends",
];
/// Keywords whose value is a schema.
const ONE: [&str; 2] = ["items", "additionalProperties"];
/// Keywords whose value is a list of schemas.
const LISTS: [&str; 2] = ["anyOf", "prefixItems"];
/// Keywords whose value names schemas.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords that say of an object's fields what these are.
const FIELDS: [&str; 4] = ["properties", "required", "additionalProperties", "patternProperties"];
/// Keywords that may say it, too.
const ELSEWHERE: [&str; 2] = ["anyOf", "$ref"];
/// Keywords beside which an object is not closed: they say themselves what else it has.
const BESIDE: [&str; 4] =
    ["additionalProperties", "patternProperties", "propertyNames", "minProperties"];

fn looks_twice(schema: &Value) -> bool {
    let Some(map) = schema.as_object() else { return false };
    let has = |keyword: &&str| map.contains_key(*keyword);
    let is_twice =
        TWICE.iter().any(&has) || (FIELDS.iter().any(&has) && ELSEWHERE.iter().any(&has));
    is_twice || parts(map).any(looks_twice)
}

/// The schemas inside one.
fn parts(map: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    let one = ONE.iter().filter_map(|keyword| map.get(*keyword));
    let lists = LISTS.iter().filter_map(|keyword| map.get(*keyword)?.as_array()).flatten();
    let named = NAMED.iter().filter_map(|keyword| map.get(*keyword)?.as_object());
    one.chain(lists).chain(named.flat_map(Map::values))
}

fn close(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    for keyword in ONE {
        if let Some(part) = map.get_mut(keyword) {
            close(part);
        }
    }
    for keyword in LISTS {
        map.get_mut(keyword).and_then(Value::as_array_mut).into_iter().flatten().for_each(close);
    }
    for keyword in NAMED {
        let named = map.get_mut(keyword).and_then(Value::as_object_mut);
        named.into_iter().flat_map(Map::values_mut).for_each(close);
    }
    if is_closable(map) {
        map.insert("additionalProperties".into(), Value::Bool(false));
    }
}

fn is_closable(map: &Map<String, Value>) -> bool {
    let Some(properties) = map.get("properties").and_then(Value::as_object) else { return false };
    let required = map.get("required").and_then(Value::as_array).into_iter().flatten();
    let mut named = required.filter_map(Value::as_str);
    named.all(|name| properties.contains_key(name))
        && !BESIDE.iter().any(|keyword| map.contains_key(*keyword))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn close(schema: Value) -> Value {
        closed(schema, Openness::Closed)
    }

    #[test]
    fn objects_that_do_not_say_so_are_closed_at_every_depth() {
        let schema = json!({"type": "object", "properties": {
            "properties": {"type": "array", "items": {"properties": {"a": {}}}},
            "open": {"properties": {"b": {}}, "additionalProperties": true},
        }});
        let closed = close(schema.clone());
        assert_eq!(closed["additionalProperties"], false);
        let inner = &closed["properties"]["properties"]["items"];
        assert_eq!(inner["additionalProperties"], false);
        assert_eq!(closed["properties"]["open"]["additionalProperties"], true);
        assert_eq!(super::closed(schema.clone(), Openness::of(Some(false))), schema);
    }

    /// A closed side would refuse what the other side asks for.
    #[test]
    fn what_is_looked_at_from_two_sides_stays_as_it_is() {
        let schemas = [
            json!({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}),
            json!({"properties": {"x": {"if": {"properties": {"a": {}}}, "then": {}}}}),
            json!({"properties": {"a": {}}, "required": ["b"]}),
            json!({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}),
            json!({"$defs": {"d": {"properties": {"a": {}}}}, "$ref": "#/$defs/d", "required": ["b"]}),
            json!({"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}),
            json!({"enum": [{"properties": {"a": 1}}]}),
            json!(true),
        ];
        for schema in schemas {
            assert_eq!(close(schema.clone()), schema);
        }
    }

    /// As in Python: `sha256(json.dumps({"parameters": …, "version": "1"}, sort_keys=True, separators=(",", ":"),
    /// ensure_ascii=False))`.
    #[test]
    fn a_contract_has_the_hash_that_a_client_can_compute() {
        let parameters =
            json!({"type": "object", "properties": {"é": {"type": "string"}, "a": {}}});
        let text = r#"{"parameters":{"properties":{"a":{},"é":{"type":"string"}},"type":"object"},"version":"1"}"#;
        assert_eq!(hash(&parameters), hex(&Sha256::digest(text.as_bytes())));
        let turned = json!({"properties": {"a": {}, "é": {"type": "string"}}, "type": "object"});
        assert_eq!(hash(&turned), hash(&parameters));
        assert_ne!(hash(&json!({"type": "object"})), hash(&parameters));
    }
}
