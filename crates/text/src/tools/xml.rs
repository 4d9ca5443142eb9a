//! Qwen-Coder's calls (field-faults B20):
//!
//! ```text
//! <function=get_weather>
//! <parameter=city>
//! Paris
//! </parameter>
//! </function>
//! ```
//!
//! A value is text; the schema of the tool says whether it stands for a string or for JSON.

use serde_json::{Map, Value};

use super::json;
use super::{CallFault, ToolSpec};

const SHAPE: CallFault = CallFault::NotACall {
    expected: "`<function=…>`, `<parameter=…>` elements and `</function>`",
};
const PARAMETER_END: &str = "</parameter>";

/// Name and arguments of one element; the name is not looked up.
///
/// # Errors
/// [`CallFault`].
pub(crate) fn read(
    text: &str,
    tools: &[ToolSpec],
) -> Result<(String, Map<String, Value>), CallFault> {
    let text = text.trim();
    let inner = text.strip_prefix("<function=").and_then(|it| it.strip_suffix("</function>"));
    let (name, mut rest) = inner.and_then(|it| it.split_once('>')).ok_or(SHAPE)?;
    let name = name.trim();
    let tool = tools.iter().find(|tool| tool.name() == name);
    let mut arguments = Map::new();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Ok((name.to_owned(), arguments));
        }
        let (key, after) =
            rest.strip_prefix("<parameter=").and_then(|it| it.split_once('>')).ok_or(SHAPE)?;
        let (text, after) = split_value(after)?;
        let key = key.trim();
        let schema = tool.and_then(|tool| tool.parameters().get("properties")?.get(key));
        if arguments.insert(key.to_owned(), value(text, schema)).is_some() {
            return Err(CallFault::NotJson { what: "a key that comes twice", at: 0 });
        }
        rest = after;
    }
}

/// A value may speak of `</parameter>`: the one that counts is followed by the next element or the end.
fn split_value(text: &str) -> Result<(&str, &str), CallFault> {
    for (at, _) in text.match_indices(PARAMETER_END) {
        let after = &text[at + PARAMETER_END.len()..];
        let next = after.trim_start();
        if next.is_empty() || next.starts_with("<parameter=") {
            let value = &text[..at];
            let value = value.strip_prefix('\n').unwrap_or(value);
            return Ok((value.strip_suffix('\n').unwrap_or(value), after));
        }
    }
    Err(SHAPE)
}

/// Strings are taken as they are. What should be something else and is no JSON stays a string, which the
/// validator then refuses by its place.
fn value(text: &str, schema: Option<&Value>) -> Value {
    let is_string = schema.is_none_or(|schema| match schema.get("type") {
        Some(Value::String(kind)) => kind == "string",
        None => schema.get("enum").is_some_and(is_all_strings),
        Some(_) => false,
    });
    let parsed = || {
        // The reader of lists refuses keys that come twice, at every level.
        let listed = format!("[{text}]");
        let one = json::items(&listed).ok().filter(|items| items.len() == 1)?;
        json::value(&listed[one[0].clone()]).ok()
    };
    let parsed = if is_string { None } else { parsed() };
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

fn is_all_strings(values: &Value) -> bool {
    values.as_array().is_some_and(|values| values.iter().all(Value::is_string))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tools() -> Vec<ToolSpec> {
        let parameters = json!({ "type": "object", "properties": {
            "text": { "type": "string" }, "n": { "type": "integer" }, "list": { "type": ["array", "null"] } } });
        vec![ToolSpec::new("f", None, parameters).unwrap()]
    }

    #[test]
    fn b20_values_are_what_the_schema_says() {
        let text = "<function=f>\n<parameter=text>\n12\n</parameter>\n<parameter=n>\n12\n</parameter>\
                    <parameter=list>[1, \"a\"]</parameter>\n<parameter=other>\nx</parameter>y\n</parameter>\n</function>";
        let (name, arguments) = read(text, &tools()).unwrap();
        let expected =
            json!({ "text": "12", "n": 12, "list": [1, "a"], "other": "x</parameter>y" });
        assert_eq!((name.as_str(), Value::Object(arguments)), ("f", expected));
    }

    #[test]
    fn b20_what_is_no_json_stays_text_for_the_validator() {
        let text = "<function=f><parameter=n>twelve</parameter><parameter=list>[{\"a\":1,\"a\":2}]</parameter></function>";
        let (_, arguments) = read(text, &tools()).unwrap();
        assert_eq!(
            Value::Object(arguments),
            json!({ "n": "twelve", "list": "[{\"a\":1,\"a\":2}]" })
        );
    }

    #[test]
    fn b20_damaged_elements_are_no_call() {
        for text in [
            "<function=f>",
            "<function=f</function>",
            "<function=f>text</function>",
            "<function=f><parameter=n>1</function>",
            "<function=f><parameter=n>1</parameter><parameter=n>2</parameter></function>",
        ] {
            assert!(read(text, &tools()).is_err(), "{text}");
        }
    }
}
