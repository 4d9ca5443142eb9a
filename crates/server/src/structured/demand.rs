//! What a request demands of its answer: its fields into one constraint, and the constraint into a grammar.
//!
//! Reading the fields compiles nothing; compiling runs beside the async threads and before anything is queued,
//! so that a constraint that cannot be honoured costs no step of the engine (B3).

use exrail_engine::EngineHandle;
use exrail_grammar::{Compiler, Grammar, GrammarError, Source};
use exrail_text::tools::{
    CallChoice, CallLimits, Composed, ThoughtLead, ToolError, ToolFormat, ToolSpec,
};
use exrail_wire::{
    FunctionField, GrammarKind, NamedSchema, ResponseFormat, StructuredFields, ToolChoiceField,
    ToolField,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::{
    contract::{self, Openness},
    lock::{Form, Lock, Tool},
};
use crate::{StructuredLimits, error::ApiError, generation::hex};

/// What an answer has to be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Demand {
    /// Any text.
    Free,
    /// What this constraint, which came in this field, allows.
    Answer {
        /// Path of the field.
        field: &'static str,
        /// The constraint.
        source: Source,
    },
    /// Text or calls.
    Calls(Calls),
}

/// Which calls an answer may hold.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Calls {
    tools: Vec<ToolSpec>,
    /// Hashes of their contracts, of the parameters as they were written.
    contracts: Vec<String>,
    choice: Choice,
    limits: CallLimits,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Auto,
    Required,
    Named(String),
}

impl Choice {
    fn of_format(&self) -> CallChoice<'_> {
        match self {
            Choice::Auto => CallChoice::Auto,
            Choice::Required => CallChoice::Required,
            Choice::Named(name) => CallChoice::Named(name),
        }
    }
}

/// Where the answer of a chat begins.
#[derive(Clone, Debug)]
pub(crate) struct Opening {
    pub(crate) format: ToolFormat,
    pub(crate) lead: ThoughtLead,
}

/// A demand that can be held.
#[derive(Debug)]
pub(crate) struct Structured {
    /// For the engine; none holds where any text will do.
    pub(crate) grammar: Option<Grammar>,
    /// For what comes out; none where all of it is the answer.
    pub(crate) lock: Option<Lock>,
}

impl Demand {
    /// Of a chat.
    pub(crate) fn of_chat(
        fields: &StructuredFields,
        limits: &StructuredLimits,
    ) -> Result<Demand, ApiError> {
        let calls = calls(fields, limits)?;
        match (calls, answer(fields)?) {
            (None, None) => Ok(Demand::Free),
            (None, Some(answer)) => Ok(answer),
            (Some(calls), None) => Ok(Demand::Calls(calls)),
            (Some(_), Some(Demand::Answer { field, .. })) => Err(one_only("tools", field)),
            (Some(_), Some(Demand::Free | Demand::Calls(_))) => {
                Err(ApiError::Internal("an answer without a constraint"))
            }
        }
    }

    /// Of a text completion, which calls nothing.
    pub(crate) fn of_text(fields: &StructuredFields) -> Result<Demand, ApiError> {
        let of_chat = [
            ("tools", fields.tools.is_some()),
            ("tool_choice", fields.tool_choice.is_some()),
            ("parallel_tool_calls", fields.parallel_tool_calls.is_some()),
        ];
        if let Some((field, _)) = of_chat.into_iter().find(|(_, is_there)| *is_there) {
            let why = "functions are called in /v1/chat/completions";
            return Err(ApiError::UnsupportedField { field: field.into(), why });
        }
        Ok(answer(fields)?.unwrap_or(Demand::Free))
    }

    /// The functions that the model is told of.
    pub(crate) fn tools(&self) -> &[ToolSpec] {
        match self {
            Demand::Free | Demand::Answer { .. } => &[],
            Demand::Calls(calls) => &calls.tools,
        }
    }

    /// What is held, by name and as the sha256 of what was asked for as it was written: the order of fields is one
    /// of the answer, too. Which of the tools is called, and how many, is the turn's own.
    pub(crate) fn policy(&self) -> Option<(&'static str, String)> {
        let hash = |kind: &str, text: &str| {
            hex(&Sha256::new().chain_update(kind).chain_update("\n").chain_update(text).finalize())
        };
        let source = match self {
            Demand::Free => return None,
            Demand::Calls(calls) => {
                let told = calls.tools.iter().map(ToolSpec::definition).collect::<Vec<_>>();
                return Some(("tools", hash("tools", &Value::from(told).to_string())));
            }
            Demand::Answer { source, .. } => source,
        };
        let hash = match source {
            Source::JsonObject => hash("json_object", ""),
            Source::JsonSchema(schema) => hash("json_schema", &schema.to_string()),
            Source::Regex(text) => hash("regex", text),
            Source::Lark(text) => hash("lark", text),
            Source::Gbnf(text) => hash("gbnf", text),
            Source::Composed { lark, schemas } => {
                hash("composed", &json!([lark, schemas]).to_string())
            }
        };
        Some(("constraint", hash))
    }

    /// Whether the model decides what is called.
    pub(crate) fn is_free_to_call(&self) -> bool {
        match self {
            Demand::Free | Demand::Answer { .. } => false,
            Demand::Calls(calls) => calls.choice == Choice::Auto,
        }
    }

    /// Compiles it, beside the async threads.
    pub(crate) async fn compile(
        self,
        engine: &EngineHandle,
        compiling: &Semaphore,
        opening: Opening,
    ) -> Result<Structured, ApiError> {
        if self == Demand::Free {
            let lock = Lock::of_thoughts(opening);
            return Ok(Structured { grammar: None, lock });
        }
        let turn = compiling.acquire().await;
        let _turn = turn.map_err(|_| ApiError::Internal("the turns of compilations"))?;
        let engine = engine.clone();
        let task = tokio::task::spawn_blocking(move || self.compiled(&engine, opening));
        task.await.map_err(|_| ApiError::Internal("compilation task"))?
    }

    /// The same in this thread, which may take as long as the limits of grammars allow.
    pub(super) fn compiled(
        self,
        engine: &EngineHandle,
        opening: Opening,
    ) -> Result<Structured, ApiError> {
        let field = match &self {
            Demand::Free => "",
            Demand::Answer { field, .. } => field,
            Demand::Calls(_) => "tools",
        };
        let compiler = engine.grammars().map_err(|error| constraint(field, error))?;
        let (grammar, lock) = match self {
            Demand::Free => return Err(ApiError::Internal("a free answer has no grammar")),
            Demand::Answer { field, source } => answered(compiler, field, source, opening)?,
            Demand::Calls(calls) => called(compiler, calls, opening)?,
        };
        Ok(Structured { grammar: Some(grammar), lock: Some(lock) })
    }
}

/// The constraint of the answer itself; two would have to be one.
fn answer(fields: &StructuredFields) -> Result<Option<Demand>, ApiError> {
    let mut found = None;
    let mut add = |field: &'static str, source: Option<Source>| match (source, &found) {
        (None, _) => Ok(()),
        (Some(_), Some(Demand::Answer { field: other, .. })) => Err(one_only(other, field)),
        (Some(source), _) => {
            found = Some(Demand::Answer { field, source });
            Ok(())
        }
    };
    match &fields.response_format {
        None | Some(ResponseFormat::Text {}) => {}
        Some(ResponseFormat::JsonObject {}) => add("response_format", Some(Source::JsonObject))?,
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            add("response_format.json_schema.schema", Some(named(json_schema)?))?;
        }
    }
    let native = fields
        .json_schema
        .clone()
        .map(|schema| Source::JsonSchema(contract::closed(schema, Openness::Closed)));
    add("json_schema", native)?;
    add("regex", fields.regex.clone().map(Source::Regex))?;
    let grammar = fields.grammar.as_ref().map(|grammar| match grammar.kind {
        GrammarKind::Lark => Source::Lark(grammar.text.clone()),
        GrammarKind::Gbnf => Source::Gbnf(grammar.text.clone()),
    });
    add("grammar.text", grammar)?;
    Ok(found)
}

fn named(wire: &NamedSchema) -> Result<Source, ApiError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !(1..=64).contains(&wire.name.len()) || !wire.name.bytes().all(plain) {
        let found: String = wire.name.chars().take(80).collect();
        let problem = format!("expected 1 to 64 letters, digits, `_` or `-`, found {found:?}");
        return Err(bad("response_format.json_schema.name", problem));
    }
    Ok(match &wire.schema {
        None => Source::JsonObject,
        Some(schema) => {
            Source::JsonSchema(contract::closed(schema.clone(), Openness::of(wire.strict)))
        }
    })
}

/// The calls that may be made, where any may.
fn calls(fields: &StructuredFields, limits: &StructuredLimits) -> Result<Option<Calls>, ApiError> {
    let Some(wire) = &fields.tools else {
        if fields.parallel_tool_calls.is_some() {
            let problem = "expected only together with `tools`".into();
            return Err(bad("parallel_tool_calls", problem));
        }
        return match &fields.tool_choice {
            None | Some(ToolChoiceField::Auto | ToolChoiceField::None) => Ok(None),
            Some(ToolChoiceField::Required | ToolChoiceField::Named(_)) => {
                Err(bad("tool_choice", "expected `tools` to choose from, found none".into()))
            }
        };
    };
    if !(1..=limits.tools).contains(&wire.len()) {
        let problem = format!("expected 1 to {}, found {}", limits.tools, wire.len());
        return Err(bad("tools", problem));
    }
    let tools = wire.iter().enumerate().map(|(at, field)| tool(at, field));
    let (tools, contracts) = tools.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    let choice = match &fields.tool_choice {
        None | Some(ToolChoiceField::Auto) => Choice::Auto,
        Some(ToolChoiceField::Required) => Choice::Required,
        Some(ToolChoiceField::Named(name)) => Choice::Named(name.clone()),
        // The model is not told of what it may not call.
        Some(ToolChoiceField::None) => return Ok(None),
    };
    let is_parallel = fields.parallel_tool_calls.unwrap_or(true);
    let calls = if is_parallel { limits.tool_calls } else { 1 };
    let limits = CallLimits { calls, bytes: limits.tool_call_bytes };
    Ok(Some(Calls { tools, contracts, choice, limits }))
}

/// A tool, and the hash of its contract.
fn tool(at: usize, wire: &ToolField) -> Result<(ToolSpec, String), ApiError> {
    let FunctionField { name, description, parameters, strict, contract_hash } = &wire.function;
    let written = parameters.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}));
    let expected = contract::hash(&written);
    if let Some(found) = contract_hash.as_ref().filter(|found| **found != expected) {
        let field = format!("tools[{at}].function.contract_hash");
        return Err(ApiError::ContractMismatch { field, expected, found: found.clone() });
    }
    let parameters = contract::closed(written, Openness::of(*strict));
    let spec = ToolSpec::new(name, description.clone(), parameters).map_err(|error| {
        let part = match error {
            ToolError::NotAnObject { .. } => "parameters",
            ToolError::BadName { .. }
            | ToolError::DuplicateName { .. }
            | ToolError::NoTools
            | ToolError::UnknownChoice { .. }
            | ToolError::NoCalls
            | _ => "name",
        };
        bad(&format!("tools[{at}].function.{part}"), error.to_string())
    })?;
    Ok((spec, expected))
}

fn answered(
    compiler: &Compiler,
    field: &'static str,
    source: Source,
    opening: Opening,
) -> Result<(Grammar, Lock), ApiError> {
    let compile =
        |source: &Source| compiler.compile(source).map_err(|error| constraint(field, error));
    let own = compile(&source)?;
    let hash = own.sha256().to_owned();
    let (form, schema) = match source {
        Source::JsonSchema(schema) => (Form::Value(own.clone()), schema),
        Source::JsonObject => (Form::Object, json!({"type": "object"})),
        Source::Regex(_) | Source::Lark(_) | Source::Gbnf(_) | Source::Composed { .. } => {
            // An opening marker is outside of the grammar: a model that may think does not.
            if opening.lead == ThoughtLead::IsOpen {
                let why = "the chat template of this model opens a thought, behind which a JSON Schema can be \
                           held and nothing else";
                return Err(ApiError::UnsupportedField { field: field.into(), why });
            }
            let opening = Opening { lead: ThoughtLead::Absent, ..opening };
            return Ok((own, Lock::new(Form::Text, opening).with_hash(hash)));
        }
    };
    let grammar = match opening.lead {
        ThoughtLead::Absent => own,
        ThoughtLead::MayOpen | ThoughtLead::IsOpen => {
            let Composed { lark, schemas } = opening.format.schema_grammar(schema, opening.lead);
            compile(&Source::Composed { lark, schemas })?
        }
    };
    Ok((grammar, Lock::new(form, opening).with_hash(hash)))
}

fn called(
    compiler: &Compiler,
    calls: Calls,
    opening: Opening,
) -> Result<(Grammar, Lock), ApiError> {
    let Calls { tools: specs, contracts, choice, limits } = calls;
    let composed =
        opening.format.grammar(&specs, choice.of_format(), opening.lead, limits).map_err(tools)?;
    // Each alone first: an error then names its tool, and each has its validator.
    let tool = |(at, (spec, contract_hash)): (usize, (ToolSpec, String))| {
        let parameters = Value::Object(spec.parameters().clone());
        let value = compiler
            .compile(&Source::JsonSchema(parameters))
            .map_err(|error| constraint(&format!("tools[{at}].function.parameters"), error))?;
        Ok(Tool { spec, value, contract_hash })
    };
    let tools: Vec<Tool> =
        specs.into_iter().zip(contracts).enumerate().map(tool).collect::<Result<_, ApiError>>()?;
    let source = Source::Composed { lark: composed.lark, schemas: composed.schemas };
    let grammar = compiler.compile(&source).map_err(|error| constraint("tools", error))?;
    let is_demanded = choice != Choice::Auto;
    let hash = grammar.sha256().to_owned();
    let lock = Lock::new(Form::Calls { tools, is_demanded, limits }, opening).with_hash(hash);
    Ok((grammar, lock))
}

fn tools(error: ToolError) -> ApiError {
    let field = match error {
        ToolError::UnknownChoice { .. } => "tool_choice",
        ToolError::BadName { .. }
        | ToolError::NotAnObject { .. }
        | ToolError::DuplicateName { .. }
        | ToolError::NoTools
        | ToolError::NoCalls
        | _ => "tools",
    };
    bad(field, error.to_string())
}

fn constraint(field: &str, error: GrammarError) -> ApiError {
    ApiError::Constraint { field: field.into(), error }
}

fn one_only(first: &str, second: &str) -> ApiError {
    bad(second, format!("expected one constraint, found `{first}` as well"))
}

fn bad(field: &str, problem: String) -> ApiError {
    ApiError::BadField { field: field.into(), problem }
}

#[cfg(test)]
mod tests {
    use exrail_wire::Unknown;

    use super::*;

    fn demand(fields: Value) -> Result<Demand, ApiError> {
        let mut unknown: Unknown = serde_json::from_value(fields).unwrap();
        let fields = StructuredFields::take(&mut unknown)?;
        Demand::of_chat(&fields, &StructuredLimits::default())
    }

    fn schema() -> Value {
        json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    }

    fn format(strict: Value) -> Value {
        let named = json!({"name": "n", "schema": schema(), "strict": strict});
        json!({"response_format": {"type": "json_schema", "json_schema": named}})
    }

    fn look_up() -> Value {
        json!([{"type": "function", "function": {"name": "f", "parameters": schema()}}])
    }

    /// B9: whichever field a schema comes in, it is the same constraint.
    #[test]
    fn b9_a_schema_is_the_same_constraint_in_every_field() {
        let of = |fields| match demand(fields).unwrap() {
            Demand::Answer { source: Source::JsonSchema(schema), .. } => schema,
            Demand::Calls(calls) => Value::Object(calls.tools[0].parameters().clone()),
            other @ (Demand::Free | Demand::Answer { .. }) => panic!("{other:?}"),
        };
        let native = of(json!({"json_schema": schema()}));
        assert_eq!(of(format(json!(true))), native);
        assert_eq!(of(json!({"tools": look_up()})), native);
        assert_eq!(native["additionalProperties"], false);
        assert_eq!(of(format(json!(false))), schema(), "as it was written");
    }

    /// B8: two constraints are not one of them.
    #[test]
    fn b8_two_constraints_are_refused() {
        let two = [
            (json!({"regex": "a", "json_schema": {}}), "regex"),
            (json!({"regex": "a", "grammar": {"type": "gbnf", "text": ""}}), "grammar.text"),
            (json!({"response_format": {"type": "json_object"}, "json_schema": {}}), "json_schema"),
            (json!({"tools": look_up(), "regex": "a"}), "regex"),
        ];
        for (fields, expected) in two {
            let error = demand(fields.clone()).unwrap_err();
            let ApiError::BadField { field, .. } = &error else { panic!("{fields}: {error}") };
            assert_eq!(field, expected, "{fields}");
        }
        let none = json!({"tools": look_up(), "tool_choice": "none", "regex": "a"});
        assert!(matches!(demand(none).unwrap(), Demand::Answer { field: "regex", .. }));
        let text = json!({"response_format": {"type": "text"}});
        assert_eq!(demand(text).unwrap(), Demand::Free);
    }

    #[test]
    fn calls_are_bounded_and_choices_name_a_tool() {
        let calls = |fields: Value| match demand(fields).unwrap() {
            Demand::Calls(calls) => (calls.choice, calls.limits.calls),
            other @ (Demand::Free | Demand::Answer { .. }) => panic!("{other:?}"),
        };
        assert_eq!(calls(json!({"tools": look_up()})), (Choice::Auto, 3));
        let one =
            json!({"tools": look_up(), "parallel_tool_calls": false, "tool_choice": "required"});
        assert_eq!(calls(one), (Choice::Required, 1));
        let cases = [
            (json!({"tools": []}), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"parallel_tool_calls": true}), "parallel_tool_calls"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
                "tools[0].function.name",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": ""}}}),
                "response_format.json_schema.name",
            ),
        ];
        for (fields, expected) in cases {
            let error = demand(fields.clone()).unwrap_err();
            let ApiError::BadField { field, .. } = &error else { panic!("{fields}: {error}") };
            assert_eq!(field, expected, "{fields}");
        }
    }

    /// B14: every tool is a grammar to compile and a text to read. Without the limit, which is the mutation, as many
    /// are taken as a body has room for.
    #[test]
    fn b14_more_tools_than_allowed_are_refused_and_without_the_limit_taken() {
        let tool = |at: usize| json!({"type": "function", "function": {"name": format!("f{at}")}});
        let demand = |n_tools: usize, limits: StructuredLimits| {
            let tools: Vec<Value> = (0..n_tools).map(tool).collect();
            let mut unknown: Unknown = serde_json::from_value(json!({"tools": tools})).unwrap();
            let fields = StructuredFields::take(&mut unknown)?;
            Demand::of_chat(&fields, &limits).map(|demand| demand.tools().len())
        };
        let limits = StructuredLimits::default();
        assert_eq!(demand(limits.tools, limits).unwrap(), limits.tools);
        let error = demand(limits.tools + 1, limits).unwrap_err();
        assert_eq!(error.to_string(), "`tools`: expected 1 to 128, found 129");
        let unlimited = StructuredLimits { tools: usize::MAX, ..limits };
        assert_eq!(demand(5_000, unlimited).unwrap(), 5_000);
    }

    /// G-22: what a session remembers of it is the same for the same demand and another one for each other.
    #[test]
    fn every_demand_has_a_policy_of_its_own() {
        let tool = |description: &str, strict: bool| {
            let function = json!({"name": "f", "description": description, "parameters": schema(),
                "strict": strict});
            json!({"tools": [{"type": "function", "function": function}]})
        };
        let demands = [
            json!({}),
            tool("a", true),
            tool("b", true),
            tool("a", false),
            json!({"json_schema": schema()}),
            json!({"json_schema": {"type": "object"}}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"regex": "a"}),
            json!({"grammar": {"type": "lark", "text": "a"}}),
            json!({"grammar": {"type": "gbnf", "text": "a"}}),
        ];
        let policies = demands.map(|fields| demand(fields).unwrap().policy());
        assert_eq!(policies[0], None);
        for (at, policy) in policies.iter().enumerate() {
            assert!(!policies[..at].contains(policy), "{at}: {policy:?}");
        }
        let again = demand(tool("a", true)).unwrap().policy();
        assert_eq!((again.clone(), again.unwrap().0), (policies[1].clone(), "tools"));
        let mut calling = tool("a", true);
        calling["tool_choice"] = json!("required");
        assert_eq!(demand(calling).unwrap().policy(), policies[1], "the turn's own");
    }

    /// G-13: another contract than the client's is refused before anything is called by it.
    #[test]
    fn a_contract_with_another_hash_is_refused() {
        let tools = |hash: &str| {
            let function = json!({"name": "f", "parameters": schema(), "contract_hash": hash});
            json!({"tools": [{"type": "function", "function": function}]})
        };
        demand(tools(&contract::hash(&schema()))).unwrap();
        let error = demand(tools(&contract::hash(&json!({"type": "object"})))).unwrap_err();
        assert_eq!(error.code(), "contract_mismatch");
    }
}
