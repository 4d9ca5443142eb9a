//! Fields of chat, completion and ask requests that OpenAI's API has not.

use serde::Deserialize;

use crate::{FieldError, Unknown, sampling::field};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtraFields {
    /// Before which of the same key's requests.
    pub priority: Option<PriorityName>,
    /// Milliseconds after its arrival in which the whole answer must be there.
    pub deadline_ms: Option<u64>,
    /// Whether the answer ends when it goes round in a circle.
    pub loop_guard: Option<bool>,
    /// Whether cached prefixes are read, and this request's left for others.
    pub prefix_cache: Option<bool>,
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
