//! `exrail diagnose --compare`.

use std::path::Path;

use anyhow::{Context, Result};
use exrail_verify::{Change, Comparison, GateChange, compare};
use serde_json::{Value, json};

use crate::{Ended, output::Output};

/// Parts of a field's path that name a thing of which there are many: told as a number.
const MANY: [&str; 8] =
    ["items", "runs", "unanswerable", "by_position", "bins", "checkpoints", "texts", "reported"];
/// Width of the field names.
const FIELD: usize = 44;

pub(super) fn run(a: &Path, b: &Path, under_test: &str, output: Output) -> Result<Ended> {
    let found = compare(&read(a)?, &read(b)?, under_test)?;
    output.value(&json!({ "comparison": found }));
    tell(&found, output);
    Ok(if found.worse.is_empty() { Ended::Done } else { Ended::NotPassed })
}

fn read(file: &Path) -> Result<Value> {
    let shown = || format!("report {}", file.display());
    let text = std::fs::read_to_string(file).with_context(shown)?;
    serde_json::from_str(&text)
        .with_context(|| format!("{}: expected what `exrail diagnose --json` prints", shown()))
}

fn tell(found: &Comparison, output: Output) {
    let same = if found.pin_differs { "differs" } else { "is the same in both" };
    output
        .line(format!("under test: {}, which {same}; every other pin is equal", found.under_test));
    output.line(format!("\n{:FIELD$} {:>14} {:>14}  {:>14}", "gate", "A", "B", "value"));
    for gate in &found.gates {
        output.line(gate_line(gate));
    }
    let (many, few): (Vec<&Change>, Vec<&Change>) =
        found.changes.iter().partition(|change| is_many(change));
    if !few.is_empty() {
        output.line(format!("\n{:FIELD$} {:>14} {:>14}  {:>14}", "field", "A", "B", "B less A"));
    }
    for change in few {
        let difference = change.difference.map_or(String::new(), |by| format!("{by:+.4}"));
        let (a, b) = (short(&change.a), short(&change.b));
        output.line(format!("{:FIELD$} {a:>14} {b:>14}  {difference:>14}", change.field));
    }
    if !many.is_empty() {
        output.line(format!(
            "and {} fields of items, runs and positions: --json tells them",
            many.len()
        ));
    }
    output.line(match found.worse.as_slice() {
        [] => "\nno gate got worse".to_owned(),
        worse => format!("\nworse: {}", worse.join(", ")),
    });
}

fn gate_line(gate: &GateChange) -> String {
    let status =
        |status: &Option<String>| status.clone().unwrap_or("absent".to_owned()).replace('_', " ");
    let value = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.4}"));
    let worse = if gate.is_worse { "  worse" } else { "" };
    format!(
        "{:FIELD$} {:>14} {:>14}  {} to {}{worse}",
        gate.name,
        status(&gate.a),
        status(&gate.b),
        value(gate.value_a),
        value(gate.value_b)
    )
}

fn is_many(change: &Change) -> bool {
    change.field.split('/').any(|part| MANY.contains(&part))
}

/// At most 14 characters of a value.
fn short(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.as_f64().map_or(number.to_string(), |x| {
            if x.fract() == 0.0 { format!("{x}") } else { format!("{x:.4}") }
        }),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    };
    text.chars().take(14).collect()
}
