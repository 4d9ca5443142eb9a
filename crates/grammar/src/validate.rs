//! The check of a whole answer against its schema, by another implementation than the one that constrained it.

use jsonschema::{Draft, PatternOptions, ReferencingError};
use serde_json::Value;

use crate::screen::{Keep, screen};
use crate::{GrammarError, Limits, measure, strict_json};

/// Bytes that a pattern may take compiled, in the program and in its cache.
const PATTERN_BYTES: usize = 4 << 20;

/// A schema ready to check values.
pub struct Validator {
    inner: jsonschema::Validator,
}

/// Why a value does not conform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{instance}: {reason}")]
pub struct Invalid {
    /// JSON pointer into the value; empty for the whole.
    pub instance: String,
    /// What was expected and found.
    pub reason: String,
}

impl Validator {
    /// Checks values of `schema`, by the draft that it names, else 2020-12. Formats are asserted. Nothing is fetched.
    ///
    /// # Errors
    /// [`GrammarError::Unsupported`] with the pointer of what is no schema of its draft.
    pub fn new(schema: &Value) -> Result<Validator, GrammarError> {
        measure::check(schema, &Limits::default())?;
        let screened = screen(schema, Keep::Known)?;
        Validator::of_draft(schema, screened.draft)
    }

    /// As [`Validator::new`], of a schema that has been screened.
    pub(crate) fn of_draft(schema: &Value, draft: Draft) -> Result<Validator, GrammarError> {
        let patterns =
            PatternOptions::regex().size_limit(PATTERN_BYTES).dfa_size_limit(PATTERN_BYTES);
        let mut options = jsonschema::options()
            .with_draft(draft)
            .offline()
            .should_validate_formats(true)
            .with_pattern_options(patterns);
        if draft < Draft::Draft201909 {
            options = options.with_format("uuid", is_uuid);
        }
        let inner = options.build(schema).map_err(|error| {
            let reason = if let jsonschema::error::ValidationErrorKind::Referencing(
                ReferencingError::Unretrievable { uri, .. },
            ) = error.kind()
            {
                format!("`{uri}` is another document, and nothing is fetched")
            } else {
                shortened(&error.to_string())
            };
            GrammarError::Unsupported { pointer: error.instance_path().to_string(), reason }
        })?;
        Ok(Validator { inner })
    }

    /// The first thing about a value that does not conform.
    ///
    /// # Errors
    /// [`Invalid`].
    pub fn check(&self, value: &Value) -> Result<(), Invalid> {
        self.inner.validate(value).map_err(|error| Invalid {
            instance: error.instance_path().to_string(),
            reason: shortened(&error.to_string()),
        })
    }

    /// Reads a text and checks its value. A text with a key twice in one object, with a number beyond ±1.8e308 or
    /// with anything behind the value is not JSON that two readers would read alike, and is invalid.
    ///
    /// # Errors
    /// [`Invalid`].
    pub fn check_text(&self, text: &str) -> Result<Value, Invalid> {
        let value = strict_json::parse(text)?;
        self.check(&value)?;
        Ok(value)
    }
}

impl std::fmt::Debug for Validator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Validator")
    }
}

/// Drafts before 2019-09 do not have the format; schemas of them do.
fn is_uuid(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    groups.iter().map(|it| it.len()).eq([8, 4, 4, 4, 12])
        && groups.concat().bytes().all(|it| it.is_ascii_hexdigit())
}

/// A message of the validator repeats values; a client does not need all of a large one.
fn shortened(message: &str) -> String {
    const MOST: usize = 400;
    match message.char_indices().nth(MOST) {
        None => message.to_owned(),
        Some((at, _)) => format!("{}…", &message[..at]),
    }
}
