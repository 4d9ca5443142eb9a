//! Whether replies that are to be of a schema are of it (G-13): a few questions of the gold set, each to be answered as
//! an object.
//!
//! The prompt says what is wanted, as a client's would; a schema that stands there alone is a wish. What comes back is
//! validated by another implementation than the lock on the tokens, and nothing else of it is read.

use serde::Serialize;
use serde_json::{Value, json};

use crate::diagnose::parts::SchemaSection;
use crate::error::VerifyError;
use crate::evaluate::sample;
use crate::gold::{GoldItem, GoldKind, GoldSet};
use crate::prompt::FrameMessage;
use crate::system::Generate;

/// Questions that are asked.
const ASKED: usize = 4;

/// What a reply has to be.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "answer": { "type": "string", "maxLength": 60 },
            "kind": { "enum": ["number", "name", "text"] },
            "certain": { "type": "boolean" },
        },
        "required": ["answer", "kind", "certain"],
        "additionalProperties": false,
    })
}

/// One reply.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SchemaObservation {
    /// The item.
    pub id: String,
    /// The last reply; empty where none came.
    pub text: String,
    /// Whether it is of the schema.
    pub valid: bool,
    /// Whether it had to be asked for once more.
    pub repaired: bool,
    /// Least share of the probability that lay on what was allowed; none without a lock.
    pub allowed_mass_min: Option<f64>,
}

/// Asks a few answerable questions for an object, once more where the first reply is none.
///
/// # Errors
/// The generator failed otherwise than by time or numbers.
pub fn schema_probe(
    generator: &dyn Generate,
    gold: &GoldSet,
    seed: u64,
) -> Result<SchemaSection, VerifyError> {
    let schema = schema();
    let validator = jsonschema::draft202012::new(&schema).expect("a constant schema is a schema");
    let items: Vec<&GoldItem> = gold.of_kind(GoldKind::Answerable).collect();
    let mut observed = Vec::with_capacity(ASKED);
    for item in sample(&items, Some(ASKED), seed, |item| &item.id) {
        let messages = messages(&item.question, &schema);
        let is_valid = |text: &str| {
            serde_json::from_str(text).is_ok_and(|value: Value| validator.is_valid(&value))
        };
        let mut of = SchemaObservation {
            id: item.id.clone(),
            text: String::new(),
            valid: false,
            repaired: false,
            allowed_mass_min: None,
        };
        for attempt in 0..2 {
            of.repaired = attempt > 0;
            match generator.generate_of_schema(&messages, &schema, seed + attempt) {
                Ok(reply) => {
                    of.valid = is_valid(&reply.text);
                    of.text = reply.text;
                    of.allowed_mass_min = lesser(of.allowed_mass_min, reply.allowed_mass_min);
                }
                Err(error) if error.is_outcome() => {}
                Err(error) => return Err(error.into()),
            }
            if of.valid {
                break;
            }
        }
        observed.push(of);
    }
    Ok(SchemaSection::of(observed))
}

fn lesser(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn messages(question: &str, schema: &Value) -> [FrameMessage; 2] {
    let message = |role, content| FrameMessage { role, content };
    [
        message("system", "You answer with one JSON object and nothing else.".to_owned()),
        message("user", format!("{question}\n\nThe object is of this JSON schema: {schema}")),
    ]
}

impl SchemaSection {
    fn of(observed: Vec<SchemaObservation>) -> SchemaSection {
        let count =
            |of: fn(&SchemaObservation) -> bool| observed.iter().filter(|it| of(it)).count();
        let masses = observed.iter().map(|it| it.allowed_mass_min);
        SchemaSection {
            replies: observed.len(),
            invalid: count(|it| !it.valid),
            valid: observed.iter().all(|it| it.valid),
            repairs: count(|it| it.repaired),
            min_allowed_mass: masses.fold(None, lesser),
            observed,
        }
    }
}
