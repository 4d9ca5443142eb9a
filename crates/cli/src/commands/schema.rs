//! `exrail schema`.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use exrail_wire::schemas::{self, Published};
use serde_json::{Map, Value, json};

use crate::{Ended, output::Output};

/// The published JSON Schemas of what exrail writes.
#[derive(Debug, Args)]
pub(crate) struct Schema {
    #[command(subcommand)]
    command: SchemaCommand,
}

#[derive(Debug, Subcommand)]
enum SchemaCommand {
    /// Print a schema (draft 2020-12): of the trace records of an event, or of a stored snippet.
    Print(Print),
}

/// Print a schema.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail schema print --list          the names
  exrail schema print answer.decide   one schema
  exrail schema print                 one schema for every line of a trace log")]
struct Print {
    /// Event of a trace record, or `chunk`; absent: one schema that any trace record fits.
    #[arg(value_name = "NAME", conflicts_with = "list")]
    name: Option<String>,
    /// Print the names instead.
    #[arg(long)]
    list: bool,
}

impl Schema {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let SchemaCommand::Print(print) = &self.command;
        let names: Vec<&str> =
            schemas::TRACE.iter().chain(schemas::STORED).map(|it| it.name).collect();
        if print.list {
            names.iter().for_each(|name| output.line(name));
            output.value(&json!({ "schemas": names, "sha256": schemas::SHA256 }));
            return Ok(Ended::Done);
        }
        let schema = match print.name.as_deref() {
            None => any_record()?,
            Some(name) => match schemas::find(name) {
                Some(published) => parse(published)?,
                None => bail!("schema `{name}`: expected one of {}, found none", names.join(", ")),
            },
        };
        output.line(serde_json::to_string_pretty(&schema)?);
        output.value(&schema);
        Ok(Ended::Done)
    }
}

fn parse(published: &Published) -> Result<Value> {
    Ok(serde_json::from_str(published.json)?)
}

/// The schemas of all events, each under its own `$id`, behind one that chooses by event.
fn any_record() -> Result<Value> {
    let (mut choices, mut parts) = (Vec::new(), Map::new());
    for published in schemas::TRACE {
        let schema = parse(published)?;
        choices.push(json!({ "$ref": schema["$id"] }));
        parts.insert(published.name.to_owned(), schema);
    }
    Ok(json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": format!("urn:exrail:trace:{}", exrail_wire::TRACE_SCHEMA_VERSION),
        "title": "A line of a trace log",
        "oneOf": choices,
        "$defs": parts,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_of_any_record_refers_to_every_event() {
        let schema = any_record().unwrap();
        assert_eq!(schema["oneOf"].as_array().unwrap().len(), schemas::TRACE.len());
        for choice in schema["oneOf"].as_array().unwrap() {
            let defined = schema["$defs"].as_object().unwrap().values();
            assert!(defined.into_iter().any(|part| part["$id"] == choice["$ref"]), "{choice}");
        }
    }
}
