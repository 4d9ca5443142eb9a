//! What a schema asks, before anything is compiled: what the mask will enforce, what only the validator can, and
//! what neither could, which is refused with the JSON pointer of the keyword.
//!
//! The walk writes the copy of the schema that is compiled. Where the mask cannot enforce a keyword, the copy lets
//! more through, never less, and the whole answer is validated against the schema as it was written.

mod keywords;
pub(crate) mod pattern;
mod references;

use jsonschema::Draft;
use serde_json::{Map, Value, json};

use crate::written::SEPARATORS;
use crate::{GrammarError, measure};
use keywords::{By, Role};
use pattern::{Reach, rewrite};
use references::References;

/// How much of a schema the mask keeps. Each lets through what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Keep {
    /// Every keyword that the automaton knows.
    Known,
    /// Without numbers of properties and properties by pattern, which it knows in part.
    NamedProperties,
    /// Also without what must hold at once: `allOf`, and what stands beside a `$ref`.
    Alternatives,
}

impl Keep {
    /// From the tightest on.
    pub(crate) const ALL: [Keep; 3] = [Keep::Known, Keep::NamedProperties, Keep::Alternatives];
}

/// A schema that can be honoured.
#[derive(Debug)]
pub(crate) struct Screened {
    /// For the automaton, with its options.
    pub(crate) masked: Value,
    /// As it was written, `true` and `false` too.
    pub(crate) draft: Draft,
    /// Keywords that the validator alone honours, as pointers; empty if the mask suffices.
    pub(crate) checked: Vec<String>,
}

/// Screens a schema that [`measure::check`] let through, since it goes as deep as the schema does, and writes the copy
/// that is compiled.
///
/// # Errors
/// [`GrammarError::Unsupported`] with the pointer of the first keyword that cannot be honoured.
pub(crate) fn screen(schema: &Value, keep: Keep) -> Result<Screened, GrammarError> {
    if *schema == Value::Bool(false) {
        return Err(unsupported("", "`false` has no value"));
    }
    let draft = draft_of(schema)?;
    let mut walk = Walk { draft, keep, checked: Vec::new(), references: References::default() };
    let masked = walk.schema(schema, &Place { pointer: String::new(), root: String::new() })?;
    walk.references.check()?;
    let mut masked = match masked {
        Value::Object(masked) => masked,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Map::new()
        }
    };
    if !walk.references.leave_a_document() {
        masked.shift_remove("$id");
        masked.shift_remove("id");
    }
    masked.insert("$schema".into(), keywords::name_of(draft).1.into());
    masked.insert("x-guidance".into(), options());
    Ok(Screened { masked: Value::Object(masked), draft, checked: walk.checked })
}

/// Options of the automaton for a value of JSON.
fn options() -> Value {
    let [between_items, behind_key] = SEPARATORS;
    json!({"whitespace_flexible": false, "item_separator": between_items,
        "key_separator": behind_key, "coerce_one_of": true})
}

pub(crate) fn unsupported(pointer: &str, reason: impl Into<String>) -> GrammarError {
    GrammarError::Unsupported { pointer: pointer.to_owned(), reason: reason.into() }
}

/// The draft that a schema names; without a name the newest that has all of its forms.
fn draft_of(schema: &Value) -> Result<Draft, GrammarError> {
    match schema.get("$schema") {
        Some(Value::String(uri)) => keywords::draft_of(uri).ok_or_else(|| {
            unsupported(
                "/$schema",
                format!("expected the draft 4, 6, 7, 2019-09 or 2020-12, found `{uri}`"),
            )
        }),
        Some(other) => Err(unsupported("/$schema", format!("expected a text, found {other}"))),
        None if measure::any(schema, &|it| {
            ["exclusiveMinimum", "exclusiveMaximum"]
                .iter()
                .any(|key| it.get(key).is_some_and(Value::is_boolean))
        }) =>
        {
            Ok(Draft::Draft4)
        }
        None if measure::any(schema, &|it| it.get("items").is_some_and(Value::is_array)) => {
            Ok(Draft::Draft201909)
        }
        None => Ok(Draft::Draft202012),
    }
}

/// Where a schema stands.
struct Place {
    /// JSON pointer.
    pointer: String,
    /// Pointer of the schema that fragments begin at.
    root: String,
}

impl Place {
    fn below(&self, segment: &str) -> Place {
        let segment = segment.replace('~', "~0").replace('/', "~1");
        Place { pointer: format!("{}/{segment}", self.pointer), root: self.root.clone() }
    }
}

struct Walk {
    draft: Draft,
    keep: Keep,
    checked: Vec<String>,
    references: References,
}

impl Walk {
    fn schema(&mut self, schema: &Value, place: &Place) -> Result<Value, GrammarError> {
        self.references.stands_at(&place.pointer);
        let Value::Object(written) = schema else { return Ok(schema.clone()) };
        let mut place = Place { pointer: place.pointer.clone(), root: place.root.clone() };
        if let Some(id) = self.id_of(written) {
            self.references.named(id);
            place.root.clone_from(&place.pointer);
        }
        let mut masked = Map::new();
        for (keyword, value) in written {
            let Some(role) = keywords::role(self.draft, keyword) else {
                let (draft, _) = keywords::name_of(self.draft);
                let reason =
                    format!("`{keyword}` is no keyword of {draft}; {}", keywords::hint(keyword));
                return Err(unsupported(&place.below(keyword).pointer, reason));
            };
            let below = place.below(keyword);
            if let Some(value) = self.keyword(written, (keyword, role), value, &below)? {
                masked.insert(keyword.clone(), value);
            }
        }
        self.finish(written, &mut masked);
        Ok(Value::Object(masked))
    }

    /// The `$id` of a schema, where it begins a document of its own.
    fn id_of<'a>(&self, written: &'a Map<String, Value>) -> Option<&'a str> {
        let key = if self.draft == Draft::Draft4 { "id" } else { "$id" };
        let id = written.get(key)?.as_str()?;
        (!id.starts_with('#') && !id.is_empty()).then_some(id)
    }

    /// What the mask's copy has of a keyword.
    fn keyword(
        &mut self,
        written: &Map<String, Value>,
        (keyword, role): (&str, Role),
        value: &Value,
        place: &Place,
    ) -> Result<Option<Value>, GrammarError> {
        match role {
            Role::Annotation => Ok(None),
            Role::Identity => self.identity(keyword, value, place),
            Role::Value(by) => Ok(self.by(by, keyword, value, place).then(|| value.clone())),
            Role::Schema(by) => {
                self.within(by, keyword, value, place, |walk| walk.schema(value, place))
            }
            Role::List(by) => {
                if keyword == "oneOf" {
                    self.checked.push(place.pointer.clone());
                }
                self.within(by, keyword, value, place, |walk| walk.list(value, place))
            }
            Role::Map(by) => self.within(by, keyword, value, place, |walk| walk.map(value, place)),
            Role::Items => self.within(By::Mask, keyword, value, place, |walk| {
                if value.is_array() { walk.list(value, place) } else { walk.schema(value, place) }
            }),
            Role::PatternMap => self.patterns(value, place),
            Role::Pattern => {
                let Value::String(pattern) = value else { return Ok(Some(value.clone())) };
                Ok(Some(rewritten(pattern, place)?.into()))
            }
            Role::Format => self.format(written, value, place),
            Role::Reference => self.reference(value, place),
            Role::Dependencies => self
                .within(By::Check, keyword, value, place, |walk| walk.dependencies(value, place)),
        }
    }

    /// Whether the mask keeps a keyword; what it does not is noted.
    fn by(&mut self, by: By, keyword: &str, value: &Value, place: &Place) -> bool {
        let counts = ["minProperties", "maxProperties"].contains(&keyword);
        let at_once = keyword == "allOf" && self.keep >= Keep::Alternatives;
        let is_kept = by == By::Mask && !at_once && !(counts && self.keep >= Keep::NamedProperties);
        // `false` asks for nothing; decimal fractions are not what binary ones are.
        let asks = *value != Value::Bool(false) || keyword != "uniqueItems";
        if (!is_kept && asks) || keyword == "multipleOf" {
            self.checked.push(place.pointer.clone());
        }
        is_kept
    }

    fn within(
        &mut self,
        by: By,
        keyword: &str,
        value: &Value,
        place: &Place,
        walk: impl FnOnce(&mut Walk) -> Result<Value, GrammarError>,
    ) -> Result<Option<Value>, GrammarError> {
        let is_kept = self.by(by, keyword, value, place);
        walk(self).map(|masked| is_kept.then_some(masked))
    }

    fn list(&mut self, value: &Value, place: &Place) -> Result<Value, GrammarError> {
        let Value::Array(schemas) = value else { return Ok(value.clone()) };
        let schemas = schemas.iter().enumerate();
        let schemas =
            schemas.map(|(at, schema)| self.schema(schema, &place.below(&at.to_string())));
        schemas.collect::<Result<Vec<Value>, GrammarError>>().map(Value::Array)
    }

    fn map(&mut self, value: &Value, place: &Place) -> Result<Value, GrammarError> {
        let Value::Object(schemas) = value else { return Ok(value.clone()) };
        let mut masked = Map::new();
        for (name, schema) in schemas {
            masked.insert(name.clone(), self.schema(schema, &place.below(name))?);
        }
        Ok(Value::Object(masked))
    }

    fn dependencies(&mut self, value: &Value, place: &Place) -> Result<Value, GrammarError> {
        let Value::Object(entries) = value else { return Ok(value.clone()) };
        for (name, entry) in entries.iter().filter(|(_, entry)| !entry.is_array()) {
            self.schema(entry, &place.below(name))?;
        }
        Ok(value.clone())
    }

    fn patterns(&mut self, value: &Value, place: &Place) -> Result<Option<Value>, GrammarError> {
        let Value::Object(schemas) = value else { return Ok(Some(value.clone())) };
        let mut masked = Map::new();
        for (pattern, schema) in schemas {
            let place = place.below(pattern);
            let pattern = rewritten(pattern, &place)?;
            let schema = self.schema(schema, &place)?;
            let schema = match masked.shift_remove(&pattern) {
                None => schema,
                Some(other) => json!({"allOf": [other, schema]}),
            };
            masked.insert(pattern, schema);
        }
        if self.keep >= Keep::NamedProperties {
            self.checked.push(place.pointer.clone());
            return Ok(None);
        }
        Ok(Some(Value::Object(masked)))
    }

    fn format(
        &mut self,
        written: &Map<String, Value>,
        value: &Value,
        place: &Place,
    ) -> Result<Option<Value>, GrammarError> {
        let Value::String(name) = value else { return Ok(Some(value.clone())) };
        let may_be_text = match written.get("type") {
            None => true,
            Some(Value::Array(types)) => types.contains(&Value::from("string")),
            Some(kind) => kind == "string",
        };
        if !may_be_text {
            // The formats of JSON Schema are of texts; there is nothing to check in other values.
            return Ok(None);
        }
        self.checked.push(place.pointer.clone());
        match keywords::format(self.draft, name) {
            Some(By::Mask) => Ok(Some(value.clone())),
            Some(By::Check) => Ok(None),
            None => {
                let (draft, _) = keywords::name_of(self.draft);
                Err(unsupported(
                    &place.pointer,
                    format!("nothing checks the format `{name}` in {draft}"),
                ))
            }
        }
    }

    fn identity(
        &mut self,
        keyword: &str,
        value: &Value,
        place: &Place,
    ) -> Result<Option<Value>, GrammarError> {
        match keyword {
            "$schema" => {
                let found = value.as_str().and_then(keywords::draft_of);
                if found != Some(self.draft) {
                    let (draft, _) = keywords::name_of(self.draft);
                    let reason = format!("expected {draft}, as the whole schema, found {value}");
                    return Err(unsupported(&place.pointer, reason));
                }
                Ok(None)
            }
            "id" if self.draft != Draft::Draft4 => Ok(None),
            _ => Ok(Some(value.clone())),
        }
    }

    fn reference(&mut self, value: &Value, place: &Place) -> Result<Option<Value>, GrammarError> {
        let Value::String(reference) = value else { return Ok(Some(value.clone())) };
        self.references.add(reference, &place.pointer, &place.root)?;
        let is_own = reference.starts_with('#');
        if !is_own && self.keep >= Keep::Alternatives {
            self.checked.push(place.pointer.clone());
            return Ok(None);
        }
        Ok(Some(value.clone()))
    }

    /// What depends on several keywords of one schema.
    fn finish(&mut self, written: &Map<String, Value>, masked: &mut Map<String, Value>) {
        if masked.contains_key("$ref") {
            let stays =
                |key: &str| ["$ref", "$id", "id", "$anchor", "$defs", "definitions"].contains(&key);
            // Up to draft 7 nothing beside a reference counts.
            if self.draft <= Draft::Draft7 || self.keep >= Keep::Alternatives {
                masked.retain(|key, _| stays(key));
            }
        }
        if let Some(Value::String(name)) = masked.shift_remove("$dynamicAnchor") {
            masked.entry("$anchor").or_insert(Value::String(name));
        }
        // Names that a pattern would have allowed are not additional.
        if written.contains_key("patternProperties") && !masked.contains_key("patternProperties") {
            masked.shift_remove("additionalProperties");
        }
        // Without other places that could evaluate a property, unevaluated means additional.
        let applicators = [
            "$ref",
            "$dynamicRef",
            "$recursiveRef",
            "allOf",
            "anyOf",
            "oneOf",
            "not",
            "if",
            "dependentSchemas",
            "dependencies",
            "additionalProperties",
        ];
        if written.get("unevaluatedProperties") == Some(&Value::Bool(false))
            && !applicators.iter().any(|key| written.contains_key(*key))
            && masked.contains_key("patternProperties") == written.contains_key("patternProperties")
        {
            masked.insert("additionalProperties".into(), Value::Bool(false));
        }
    }
}

fn rewritten(pattern: &str, place: &Place) -> Result<String, GrammarError> {
    rewrite(pattern, Reach::Anywhere).map_err(|error| {
        let reason = format!("the pattern `{pattern}`, column {}: {}", error.column, error.reason);
        unsupported(&place.pointer, reason)
    })
}
