//! Fields of chat, completion and ask requests that OpenAI's API has not.

use serde::Deserialize;
use serde_json::Value;

use crate::{ConstraintField, FieldError, SessionField, Unknown, constraints, sampling::field};

/// Before which of the same key's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PriorityName {
    /// Somebody waits for it.
    High,
    /// The default.
    Normal,
    /// Whenever there is room.
    Low,
}

/// How a request is scheduled and watched; absent fields take the server's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExtraFields {
    /// Before which of the same key's requests.
    pub priority: Option<PriorityName>,
    /// Milliseconds after its arrival in which the whole answer must be there.
    pub deadline_ms: Option<u64>,
    /// Whether and how the answer is watched for going round in a circle.
    pub loop_guard: Option<LoopGuardField>,
    /// Whether cached prefixes are read, and this request's left for others.
    pub prefix_cache: Option<bool>,
    /// Whether the answer is kept from repeating the system messages.
    pub leak_guard: Option<bool>,
    /// What becomes of a tool call whose arguments were copied from the results of tools.
    pub tool_taint: Option<ToolTaintName>,
    /// The session that the turn begins from.
    pub session: Option<SessionField>,
    /// Hard rules that the answer must keep.
    pub constraints: Option<Vec<ConstraintField>>,
}

/// What becomes of a tool call whose arguments were copied from the results of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolTaintName {
    /// It is marked.
    Annotate,
    /// It does not leave.
    Refuse,
}

/// A switch, or options, which switch it on.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub enum LoopGuardField {
    /// On or off, with the default options.
    Switch(bool),
    /// On, with these.
    Options(LoopGuardFields),
}

/// How an answer is watched for going round in a circle.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopGuardFields {
    /// What happens to one that does; the default is to end it.
    pub on_loop: Option<OnLoopName>,
    /// Mean entropy in nats of such answers when all is well: with it a collapse of the entropy is a loop, too.
    pub entropy_baseline: Option<f32>,
    /// Spans that may repeat themselves.
    #[serde(default)]
    pub exempt: Vec<ExemptName>,
}

/// What happens to an answer that goes round in a circle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoopName {
    /// It ends.
    Stop,
    /// Once it goes back to before the loop, with a raised repetition penalty.
    RollBack,
}

/// Spans that may repeat themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExemptName {
    /// Blocks of code.
    Code,
    /// Lines of tables.
    Tables,
}

impl TryFrom<Value> for LoopGuardField {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        if let Value::Bool(is_on) = value {
            return Ok(LoopGuardField::Switch(is_on));
        }
        if !value.is_object() {
            return Err(format!("expected true, false or an object, found {value}"));
        }
        let options = serde_json::from_value(value).map_err(|error| error.to_string())?;
        Ok(LoopGuardField::Options(options))
    }
}

impl ExtraFields {
    /// Takes these fields out of a request's undeclared ones.
    ///
    /// # Errors
    /// The first field of the wrong type.
    pub fn take(unknown: &mut Unknown) -> Result<Self, FieldError> {
        Ok(Self {
            priority: field(unknown, "priority")?,
            deadline_ms: field(unknown, "deadline_ms")?,
            loop_guard: field(unknown, "loop_guard")?,
            prefix_cache: field(unknown, "prefix_cache")?,
            leak_guard: field(unknown, "leak_guard")?,
            tool_taint: field(unknown, "tool_taint")?,
            session: field(unknown, "session")?,
            constraints: match unknown.remove(constraints::FIELD) {
                Some(value) => ConstraintField::list(value)?,
                None => None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_unknown_priority_is_told_the_known_ones() {
        let mut unknown = Unknown::from([("priority".into(), json!("urgent"))]);
        let error = ExtraFields::take(&mut unknown).unwrap_err();
        assert_eq!(error.field, "priority");
        assert!(error.problem.contains("`high`, `normal`, `low`"), "{}", error.problem);
    }

    #[test]
    fn null_asks_for_the_default() {
        let mut unknown =
            Unknown::from([("priority".into(), json!(null)), ("deadline_ms".into(), json!(250))]);
        let fields = ExtraFields::take(&mut unknown).unwrap();
        assert_eq!((fields.priority, fields.deadline_ms), (None, Some(250)));
    }
}
