//! The trace contract (G-14): what a record must be before it is written, and what a log shows to whoever reads it
//! later without the program that wrote it.
//!
//! A record has the shape of its published schema ([`exrail_wire::schemas`]), and beyond what a schema can say, it
//! agrees with itself: hashes, spans, citations, sections, counts. [`Contract::check`] looks at one record,
//! [`verify_log`] at a whole file. Both name what is broken by a [`Rule`] and a JSON pointer.

mod answer;
mod findings;
mod log;
mod record;
mod seal;
mod steps;
mod stored;

#[cfg(test)]
mod mutations;
#[cfg(test)]
pub(crate) mod samples;

use std::collections::HashMap;

use exrail_retrieval::Collection;
use exrail_wire::schemas;
use serde::Deserialize;
use serde_json::Value;

pub use self::findings::{Breach, Findings, Rule};
pub use self::log::{LogBreach, LogReport, RuleCount, verify_log};
use self::record::{Answer, Envelope, Retrieve, Rotate};
pub use self::seal::{Seal, seal, unseal};

/// The contract of every record. Compiled once: keep it.
pub struct Contract {
    validators: HashMap<&'static str, jsonschema::Validator>,
}

impl Default for Contract {
    fn default() -> Contract {
        Contract::new()
    }
}

impl std::fmt::Debug for Contract {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Contract")
    }
}

impl Contract {
    /// Compiles the published schemas.
    ///
    /// # Panics
    /// Never: a test compiles every one of them.
    #[must_use]
    pub fn new() -> Contract {
        let compiled = |published: &schemas::Published| {
            let schema = serde_json::from_str(published.json).expect("a test parses each schema");
            let validator = jsonschema::draft202012::new(&schema);
            (published.name, validator.expect("a test compiles each schema"))
        };
        Contract { validators: schemas::TRACE.iter().map(compiled).collect() }
    }

    /// Checks a record by itself, and an answer against the collection that it was drawn from, where that is at
    /// hand. What a schema refuses is not looked at any further.
    #[must_use]
    pub fn check(&self, record: &Value, stored: Option<&Collection>) -> Findings {
        let mut findings = Findings::default();
        if !self.shape(record, &mut findings) {
            return findings;
        }
        match parsed::<Envelope>(record, &mut findings) {
            Some(envelope) => envelope.check(&mut findings),
            None => return findings,
        }
        let pins = record["pins"]["index_hash"].as_str();
        match record["event"].as_str() {
            Some("answer.decide") => {
                if let Some(answer) = parsed::<Answer>(record, &mut findings) {
                    answer.check(pins, &mut findings);
                    if let Some(collection) = stored {
                        stored::check(&answer.retrieved, pins, collection, &mut findings);
                    }
                }
            }
            Some("retrieve.run") => {
                if let Some(run) = parsed::<Retrieve>(record, &mut findings) {
                    run.check(&mut findings);
                    if let Some(collection) = stored {
                        stored::check(&run.retrieved, pins, collection, &mut findings);
                    }
                }
            }
            Some("cache.rotate") => {
                if let Some(rotate) = parsed::<Rotate>(record, &mut findings) {
                    rotate.check(&mut findings);
                }
            }
            Some(_) | None => {}
        }
        findings
    }

    fn shape(&self, record: &Value, findings: &mut Findings) -> bool {
        let event = record.get("event").and_then(Value::as_str).unwrap_or_default();
        let Some(validator) = self.validators.get(event) else {
            let found = format!("`{}`", event.chars().take(40).collect::<String>());
            findings.note(Rule::Schema, "/event", "a published event", found);
            return false;
        };
        match validator.validate(record) {
            Ok(()) => {
                findings.passed(Rule::Schema);
                true
            }
            Err(error) => {
                let pointer = error.instance_path().to_string();
                // Masked: a record holds what users wrote, and this goes into answers and logs.
                let found = error.masked().to_string();
                findings.note(Rule::Schema, pointer, "the published schema", found);
                false
            }
        }
    }
}

/// The fields that the checks read. A schema that lets through what does not parse is a fault of the schema.
fn parsed<'a, T: Deserialize<'a>>(record: &'a Value, findings: &mut Findings) -> Option<T> {
    match T::deserialize(record) {
        Ok(parsed) => Some(parsed),
        Err(error) => {
            findings.note(Rule::Schema, "", "fields that fit the schema", error.to_string());
            None
        }
    }
}

/// Event and trace of a record that has the published shape.
fn parsed_event(record: &Value) -> (&str, &str) {
    let text = |field: &str| record[field].as_str().unwrap_or_default();
    (text("event"), text("trace_id"))
}
