//! Two reports field by field. A comparison says something only if one thing changed: it is refused when any pin but
//! the one under test differs.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

/// What a report is bound to, and what may therefore be under test. `gold_sha256` never is: another gold set asks
/// other questions.
pub const PINS: [&str; 6] =
    ["model_fp", "tok_fp", "encoder_fp", "index_hash", "template_hash", "engine_build"];
const GOLD: &str = "gold_sha256";
/// Differs between any two runs and says nothing.
const OF_THE_RUN: [&str; 4] = ["trace_id", "cost", "pins", "question_sha256"];

/// Why two reports are not compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// Not what `exrail diagnose --json` prints.
    #[error("report {which}: expected what `exrail diagnose --json` prints, found no `{field}`")]
    NoReport {
        /// A or B.
        which: &'static str,
        /// What it lacks.
        field: &'static str,
    },
    /// No pin.
    #[error("--under-test {found}: expected one of {}", PINS.join(", "))]
    NoPin {
        /// What was given.
        found: String,
    },
    /// Another shape.
    #[error("report_version: expected {expected} in both, found {found}")]
    Version {
        /// Of A.
        expected: String,
        /// Of B.
        found: String,
    },
    /// Something else changed, too.
    #[error(
        "expected reports that differ in {under_test} alone, found others that differ: {differ}; measure B again with \
         the rest as in A, or name what is under test with --under-test"
    )]
    Pins {
        /// What may differ.
        under_test: String,
        /// What does, with both values.
        differ: String,
    },
}

/// A field that is not the same in both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// JSON pointer.
    pub field: String,
    /// In A; null where it is absent.
    pub a: Value,
    /// In B; null where it is absent.
    pub b: Value,
    /// B less A, of numbers.
    pub difference: Option<f64>,
}

/// A gate in both reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GateChange {
    /// The gate.
    pub name: String,
    /// Its status in A; null where it has no such gate.
    pub a: Option<String>,
    /// Its status in B.
    pub b: Option<String>,
    /// Its value in A.
    pub value_a: Option<f64>,
    /// Its value in B.
    pub value_b: Option<f64>,
    /// Whether it opens less than before.
    pub is_worse: bool,
}

/// Two reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The pin that may differ.
    pub under_test: String,
    /// Whether it does.
    pub pin_differs: bool,
    /// Every gate of either.
    pub gates: Vec<GateChange>,
    /// Names of the gates that got worse.
    pub worse: Vec<String>,
    /// Every field that is not the same, gates apart.
    pub changes: Vec<Change>,
}

/// Compares report B with report A.
///
/// # Errors
/// One of them is no report, or other pins than `under_test` differ.
pub fn compare(a: &Value, b: &Value, under_test: &str) -> Result<Comparison, CompareError> {
    if !PINS.contains(&under_test) {
        return Err(CompareError::NoPin { found: under_test.to_owned() });
    }
    for (which, report) in [("A", a), ("B", b)] {
        for field in ["report_version", "pins", "gates", "verdict"] {
            if report.get(field).is_none() {
                return Err(CompareError::NoReport { which, field });
            }
        }
    }
    let version = |report: &Value| text(&report["report_version"]);
    if version(a) != version(b) {
        return Err(CompareError::Version { expected: version(a), found: version(b) });
    }
    let differ: Vec<String> = PINS
        .iter()
        .chain([&GOLD])
        .filter(|&&pin| pin != under_test && a["pins"][pin] != b["pins"][pin])
        .map(|pin| format!("{pin} {} and {}", text(&a["pins"][pin]), text(&b["pins"][pin])))
        .collect();
    if !differ.is_empty() {
        let (under_test, differ) = (under_test.to_owned(), differ.join(", "));
        return Err(CompareError::Pins { under_test, differ });
    }
    let gates = gates(a, b);
    let worse = gates.iter().filter(|gate| gate.is_worse).map(|gate| gate.name.clone()).collect();
    Ok(Comparison {
        under_test: under_test.to_owned(),
        pin_differs: a["pins"][under_test] != b["pins"][under_test],
        worse,
        gates,
        changes: changes(a, b),
    })
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// How far a gate is from opening. What was not measured opens nothing, and hides what it would have said.
fn closed(status: Option<&str>) -> u8 {
    match status {
        Some("pass") => 0,
        Some("review") => 1,
        Some("fail") => 3,
        // Inconclusive, not calibrated, not available, or no such gate.
        Some(_) | None => 2,
    }
}

fn gates(a: &Value, b: &Value) -> Vec<GateChange> {
    let by_name = |report: &Value| -> BTreeMap<String, Value> {
        let gates = report["gates"].as_array().cloned().unwrap_or_default();
        gates.into_iter().map(|gate| (text(&gate["name"]), gate)).collect()
    };
    let (in_a, in_b) = (by_name(a), by_name(b));
    let mut names: Vec<&String> = in_a.keys().chain(in_b.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let change = |name: &String| {
        let status = |gates: &BTreeMap<String, Value>| {
            gates.get(name).and_then(|gate| gate["status"].as_str().map(str::to_owned))
        };
        let value = |gates: &BTreeMap<String, Value>| {
            gates.get(name).and_then(|gate| gate["value"].as_f64())
        };
        let (a, b) = (status(&in_a), status(&in_b));
        GateChange {
            name: name.clone(),
            is_worse: closed(b.as_deref()) > closed(a.as_deref()),
            a,
            b,
            value_a: value(&in_a),
            value_b: value(&in_b),
        }
    };
    names.into_iter().map(change).collect()
}

fn changes(a: &Value, b: &Value) -> Vec<Change> {
    let (mut in_a, mut in_b) = (BTreeMap::new(), BTreeMap::new());
    for (report, fields) in [(a, &mut in_a), (b, &mut in_b)] {
        let sections = report.as_object().into_iter().flatten();
        for (name, section) in
            sections.filter(|(name, _)| *name != "gates" && !OF_THE_RUN.contains(&name.as_str()))
        {
            flatten(section, format!("/{name}"), fields);
        }
    }
    let mut names: Vec<&String> = in_a.keys().chain(in_b.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let get = |fields: &BTreeMap<String, Value>, name: &String| {
        fields.get(name).cloned().unwrap_or(Value::Null)
    };
    let change = |name: &String| {
        let (a, b) = (get(&in_a, name), get(&in_b, name));
        (a != b).then(|| Change {
            field: name.clone(),
            difference: a.as_f64().zip(b.as_f64()).map(|(a, b)| b - a),
            a,
            b,
        })
    };
    names.into_iter().filter_map(change).collect()
}

/// The leaves of a value by their JSON pointers.
fn flatten(value: &Value, path: String, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                // RFC 6901.
                let name = name.replace('~', "~0").replace('/', "~1");
                flatten(value, format!("{path}/{name}"), leaves);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                flatten(value, format!("{path}/{index}"), leaves);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            leaves.insert(path, value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report(model: &str, status: &str, value: f64) -> Value {
        json!({
            "report_version": "1.0", "trace_id": model, "verdict": status,
            "pins": { "model_fp": model, "tok_fp": "t", "encoder_fp": "e", "index_hash": "i",
                      "template_hash": "p", "engine_build": "b", "gold_sha256": "g" },
            "gates": [{ "name": "coverage", "status": status, "value": value }],
            "coverage": { "value": value, "method": "offsets" },
        })
    }

    #[test]
    fn a_gate_that_opens_less_is_worse_and_every_changed_field_is_told() {
        let (a, b) = (report("m1", "pass", 0.9), report("m2", "review", 0.8));
        let found = compare(&a, &b, "model_fp").unwrap();
        assert_eq!(
            (found.worse.as_slice(), found.pin_differs),
            (&["coverage".to_owned()][..], true)
        );
        let fields: Vec<&str> = found.changes.iter().map(|change| change.field.as_str()).collect();
        assert_eq!(fields, ["/coverage/value", "/verdict"]);
        assert!((found.changes[0].difference.unwrap() + 0.1).abs() < 1e-12);
        assert!(compare(&b, &a, "model_fp").unwrap().worse.is_empty(), "better is not worse");
        assert!(compare(&a, &a, "model_fp").unwrap().changes.is_empty());
    }

    #[test]
    fn a_gate_that_is_not_measured_any_more_is_worse_than_one_that_passed() {
        let (a, mut b) = (report("m1", "pass", 0.9), report("m1", "pass", 0.9));
        b["gates"] = json!([]);
        assert_eq!(compare(&a, &b, "model_fp").unwrap().worse, ["coverage"]);
    }

    #[test]
    fn another_changed_pin_refuses_the_comparison_and_is_named() {
        let (a, mut b) = (report("m1", "pass", 0.9), report("m2", "pass", 0.9));
        b["pins"]["index_hash"] = json!("j");
        let error = compare(&a, &b, "model_fp").unwrap_err().to_string();
        assert!(error.contains("index_hash i and j") && !error.contains("model_fp m1"), "{error}");
        let error = compare(&a, &b, "index_hash").unwrap_err().to_string();
        assert!(error.contains("model_fp m1 and m2"), "{error}");
        b["pins"] = a["pins"].clone();
        b["pins"]["gold_sha256"] = json!("h");
        assert!(compare(&a, &b, "model_fp").is_err(), "other questions are no comparison");
        assert!(matches!(compare(&a, &b, "gold_sha256"), Err(CompareError::NoPin { .. })));
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let a = report("m1", "pass", 0.9);
        let error = compare(&a, &json!({ "verdict": "pass" }), "model_fp").unwrap_err();
        assert!(error.to_string().contains("report B"), "{error}");
        for value in [json!(null), json!([]), json!(3)] {
            assert!(compare(&value, &a, "model_fp").is_err());
        }
    }
}
