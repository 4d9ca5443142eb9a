//! Whether an answer is what was demanded (G-13): nothing that was cut, and no call that does not conform.

use exrail_wire::ToolChoiceField;
use serde_json::{Value, json};
use thiserror::Error;

use crate::demand::{Demand, Form};

/// Why an answer is withheld.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("choice {choice}: {at}: {problem}")]
pub(crate) struct Violation {
    choice: usize,
    /// Where: `content` or a call, and a JSON pointer into it.
    at: String,
    problem: String,
}

/// One choice, put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    /// Name and arguments.
    pub(crate) calls: Vec<(String, String)>,
    pub(crate) finish: String,
}

impl Choice {
    /// The choices of a whole reply.
    pub(crate) fn all(reply: &Value) -> Vec<Self> {
        reply["choices"].as_array().into_iter().flatten().map(Self::of).collect()
    }

    fn of(choice: &Value) -> Self {
        let message = &choice["message"];
        let text = message["content"].as_str().or_else(|| choice["text"].as_str());
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let call = |call: &Value| {
            let function = &call["function"];
            // Some servers write the arguments as a value.
            let arguments = &function["arguments"];
            let arguments = arguments.as_str().map_or_else(|| arguments.to_string(), str::to_owned);
            (word(&function["name"]), arguments)
        };
        Self {
            text: text.unwrap_or_default().to_owned(),
            calls: message["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
            finish: word(&choice["finish_reason"]),
        }
    }

    /// Takes what an event of a stream adds.
    pub(crate) fn add(&mut self, choice: &Value) {
        let delta = &choice["delta"];
        let text = delta["content"].as_str().or_else(|| choice["text"].as_str());
        self.text.push_str(text.unwrap_or_default());
        for (place, call) in delta["tool_calls"].as_array().into_iter().flatten().enumerate() {
            let index = call["index"].as_u64().and_then(|at| usize::try_from(at).ok());
            let index = index.unwrap_or(place).min(MAX_CALLS);
            if self.calls.len() <= index {
                self.calls.resize_with(index + 1, Default::default);
            }
            let (name, arguments) = &mut self.calls[index];
            name.push_str(call["function"]["name"].as_str().unwrap_or_default());
            arguments.push_str(call["function"]["arguments"].as_str().unwrap_or_default());
        }
        if let Some(finish) = choice["finish_reason"].as_str() {
            finish.clone_into(&mut self.finish);
        }
    }
}

/// Calls beyond these are written over one another, and do not conform.
const MAX_CALLS: usize = 255;

/// Checks all choices.
///
/// # Errors
/// The first that does not conform.
pub(crate) fn check(form: &Form, choices: &[Choice]) -> Result<(), Violation> {
    for (at, choice) in choices.iter().enumerate() {
        check_one(form, choice).map_err(|(place, problem)| Violation {
            choice: at,
            at: place,
            problem,
        })?;
    }
    Ok(())
}

fn check_one(form: &Form, choice: &Choice) -> Result<(), (String, String)> {
    for (at, (name, arguments)) in choice.calls.iter().enumerate() {
        let place = format!("tool_calls[{at}]");
        if choice.finish == "length" {
            return Err((place, "the answer was cut, and a call of it may be half a call".into()));
        }
        check_call(form, name, arguments).map_err(|(path, problem)| (place + &path, problem))?;
    }
    match &form.choice {
        Some(ToolChoiceField::None) if !choice.calls.is_empty() => {
            return Err(("tool_calls".into(), "expected none, as tool_choice says".into()));
        }
        Some(ToolChoiceField::Required) if choice.calls.is_empty() => {
            return Err(("tool_calls".into(), "expected at least one call, found none".into()));
        }
        Some(ToolChoiceField::Named(name))
            if choice.calls.is_empty() || choice.calls.iter().any(|(found, _)| found != name) =>
        {
            return Err(("tool_calls".into(), format!("expected calls of `{name}` alone")));
        }
        Some(
            ToolChoiceField::Auto
            | ToolChoiceField::None
            | ToolChoiceField::Required
            | ToolChoiceField::Named(_),
        )
        | None => {}
    }
    let Some((_, validator)) = &form.schema else { return Ok(()) };
    if !choice.calls.is_empty() {
        return Ok(());
    }
    let cut = if choice.finish == "length" { " (the answer was cut by its limit)" } else { "" };
    validator.check_text(&choice.text).map(drop).map_err(|invalid| {
        (format!("content{}", invalid.instance), format!("{}{cut}", invalid.reason))
    })
}

fn check_call(form: &Form, name: &str, arguments: &str) -> Result<(), (String, String)> {
    let Some(validator) = form.tools.get(name) else {
        let known: Vec<&str> = form.tools.keys().map(String::as_str).collect();
        return Err((
            ".function.name".into(),
            format!("expected one of {known:?}, found {name:?}"),
        ));
    };
    validator
        .check_text(arguments)
        .map(drop)
        .map_err(|invalid| (format!(".function.arguments{}", invalid.instance), invalid.reason))
}

/// The request once more, with what was wrong; none where there is no conversation to say it in.
pub(crate) fn repair(
    demand: &Demand,
    request: &Value,
    choices: &[Choice],
    why: &Violation,
) -> Option<Value> {
    let mut request = request.clone();
    let messages = request["messages"].as_array_mut()?;
    let mut said = choices.first().map(|choice| choice.text.clone()).unwrap_or_default();
    for (name, arguments) in choices.iter().flat_map(|choice| &choice.calls) {
        said.push_str(&format!("\n{name}({arguments})"));
    }
    let wanted = if demand.form.is_of_text() {
        "with the corrected JSON alone"
    } else {
        "with a correct call"
    };
    messages.push(json!({ "role": "assistant", "content": said }));
    messages.push(json!({
        "role": "user",
        "content": format!("That is not valid: {why}. Answer again, {wanted}."),
    }));
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(body: Value) -> Form {
        Demand::read(body.to_string().as_bytes()).unwrap().form
    }

    fn tools() -> Value {
        json!([{ "type": "function", "function": { "name": "move", "parameters": {
            "type": "object", "properties": { "x": { "type": "integer" } }, "required": ["x"],
            "additionalProperties": false,
        } } }])
    }

    fn call(name: &str, arguments: &str, finish: &str) -> [Choice; 1] {
        [Choice {
            calls: vec![(name.into(), arguments.into())],
            finish: finish.into(),
            ..Choice::default()
        }]
    }

    #[test]
    fn a_call_passes_only_whole_known_and_valid() {
        let form = form(json!({ "tools": tools() }));
        assert_eq!(check(&form, &call("move", r#"{"x":1}"#, "tool_calls")), Ok(()));
        for (name, arguments, finish) in [
            ("move", r#"{"x":1}"#, "length"),
            ("move", r#"{"x":"#, "tool_calls"),
            ("move", r#"{"x":"1"}"#, "tool_calls"),
            ("move", r#"{"x":1,"y":2}"#, "tool_calls"),
            ("other", r#"{"x":1}"#, "tool_calls"),
        ] {
            assert!(
                check(&form, &call(name, arguments, finish)).is_err(),
                "{name} {arguments} {finish}"
            );
        }
    }

    #[test]
    fn a_required_call_is_required() {
        let said = [Choice { text: "no".into(), finish: "stop".into(), ..Choice::default() }];
        for choice in
            [json!("required"), json!({ "type": "function", "function": { "name": "move" } })]
        {
            let form = form(json!({ "tools": tools(), "tool_choice": choice }));
            assert!(check(&form, &said).is_err());
            assert!(check(&form, &call("move", r#"{"x":1}"#, "tool_calls")).is_ok());
        }
        let form = form(json!({ "tools": tools(), "tool_choice": "none" }));
        assert!(check(&form, &call("move", r#"{"x":1}"#, "tool_calls")).is_err());
    }

    #[test]
    fn a_text_is_a_value_of_its_schema_with_its_path() {
        let form = form(json!({ "response_format": { "type": "json_schema", "json_schema": {
            "name": "a", "schema": { "type": "object", "properties": { "n": { "type": "integer" } } } } } }));
        let said =
            |text: &str| [Choice { text: text.into(), finish: "stop".into(), ..Choice::default() }];
        assert_eq!(check(&form, &said(r#"{"n":1}"#)), Ok(()));
        let told = check(&form, &said(r#"{"n":"1"}"#)).unwrap_err().to_string();
        assert!(told.starts_with("choice 0: content/n: "), "{told}");
        // Measured on a server that ended it as `stop`.
        assert!(check(&form, &said(r#"{"a":        "#)).is_err());
    }
}
