//! What comes out of the engine, and what of it may go on to the client.

use std::sync::Arc;

use exrail_engine::Finish;
use exrail_grammar::{Grammar, Invalid, Validator};
use exrail_text::tools::{
    CallFault, CallLimits, CallParser, ParsedCall, Piece, ThoughtLead, ToolSpec,
};
use exrail_verify::{TaintPolicy, ToolFence, ToolVerdict, dedupe_key};
use exrail_wire::ContractRecord;
use serde_json::Value;

use super::demand::Opening;
use crate::{error::ApiError, ids, tool_circuit::ModelCircuit};

/// What the answers of one request are held to.
#[derive(Debug)]
pub(crate) struct Lock {
    form: Form,
    opening: Opening,
    /// Of the grammar; none where only thoughts are told apart.
    schema_hash: Option<String>,
    fence: Option<Fence>,
    /// Where it is noted whether calls could be read.
    circuit: Option<Arc<ModelCircuit>>,
    /// Revision of the session that calls are made from; 0 outside of one.
    mem_rev: u64,
    /// True, but for the tests that show what it is for.
    validates: bool,
}

/// Looks where the arguments of calls come from (G-21).
#[derive(Debug)]
struct Fence {
    fence: ToolFence,
    /// What tools have returned so far.
    untrusted: Vec<String>,
}

/// What an answer is.
#[derive(Debug)]
pub(crate) enum Form {
    /// Text, of which the grammar says all there is to say.
    Text,
    /// Any JSON object.
    Object,
    /// A value of the grammar's schema.
    Value(Grammar),
    /// Text, or calls of these.
    Calls {
        /// What may be called.
        tools: Vec<Tool>,
        /// Whether there is at least one call.
        is_demanded: bool,
        /// How many there may be.
        limits: CallLimits,
    },
}

/// A function that may be called.
#[derive(Debug)]
pub(crate) struct Tool {
    pub(crate) spec: ToolSpec,
    /// A value of its parameters.
    pub(crate) value: Grammar,
    pub(crate) contract_hash: String,
}

/// An answer that is not what was asked for: where, what was expected and found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) String);

/// What may go on to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Text of the answer.
    Content(String),
    /// What the model thought before it.
    Reasoning(String),
    /// A whole call.
    Call(Call),
}

/// A call that is whole, and valid against the parameters of its function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// From 0, by order in the answer.
    pub(crate) index: usize,
    pub(crate) id: String,
    pub(crate) name: String,
    /// A JSON object, as the model wrote it.
    pub(crate) arguments: String,
    /// JSON pointers of the arguments that a stranger has written.
    pub(crate) tainted: Vec<String>,
    /// The same for the same call (G-29).
    pub(crate) dedupe_key: String,
}

/// A whole answer, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) content: String,
    pub(crate) reasoning: Option<String>,
    pub(crate) calls: Vec<Call>,
}

impl Reply {
    pub(crate) fn add(&mut self, part: Part) {
        match part {
            Part::Content(text) => self.content.push_str(&text),
            Part::Reasoning(text) => {
                self.reasoning.get_or_insert_default().push_str(&text);
            }
            Part::Call(call) => self.calls.push(call),
        }
    }

    /// Its parts, in the order in which a stream tells them.
    pub(crate) fn into_parts(self) -> Vec<Part> {
        let content = Some(self.content).filter(|text| !text.is_empty());
        let texts = [self.reasoning.map(Part::Reasoning), content.map(Part::Content)];
        let calls = self.calls.into_iter().map(Part::Call);
        texts.into_iter().flatten().chain(calls).collect()
    }
}

impl Lock {
    pub(crate) fn new(form: Form, opening: Opening) -> Lock {
        Lock {
            form,
            opening,
            schema_hash: None,
            fence: None,
            circuit: None,
            mem_rev: 0,
            validates: true,
        }
    }

    /// The same for a conversation in which tools have returned this.
    pub(crate) fn fenced(self, untrusted: Vec<String>, policy: TaintPolicy) -> Lock {
        let names = self.tools().iter().map(|tool| tool.spec.name());
        let fence = ToolFence::new(names, policy);
        Lock { fence: Some(Fence { fence, untrusted }), ..self }
    }

    /// The same of a model with this circuit.
    pub(crate) fn watched(self, circuit: Option<Arc<ModelCircuit>>) -> Lock {
        Lock { circuit, ..self }
    }

    /// The same in a session of this revision: a call that is made again behind a write is another one.
    pub(crate) fn remembering(self, mem_rev: u64) -> Lock {
        Lock { mem_rev, ..self }
    }

    pub(crate) fn with_hash(self, schema_hash: String) -> Lock {
        Lock { schema_hash: Some(schema_hash), ..self }
    }

    /// The guard switched off, to show what it is for.
    #[cfg(test)]
    pub(crate) fn unchecked(self) -> Lock {
        Lock { validates: false, ..self }
    }

    /// For a free answer: its thoughts are told apart, where the model has any.
    pub(crate) fn of_thoughts(opening: Opening) -> Option<Lock> {
        (opening.lead != ThoughtLead::Absent).then(|| Lock::new(Form::Text, opening))
    }

    /// SHA-256 of the constraint, if there is one.
    pub(crate) fn schema_hash(&self) -> Option<&str> {
        self.schema_hash.as_deref()
    }

    /// What the functions were called by.
    pub(crate) fn contracts(&self) -> Vec<ContractRecord> {
        let record = |tool: &Tool| ContractRecord {
            name: tool.spec.name().into(),
            contract_hash: tool.contract_hash.clone(),
        };
        self.tools().iter().map(record).collect()
    }

    /// Whether every byte of the content is content of the answer as it was generated: then log-probabilities
    /// can go with it.
    pub(crate) fn is_plain(&self) -> bool {
        let is_free = match &self.form {
            Form::Text | Form::Object => true,
            Form::Value(grammar) => grammar.is_exact(),
            Form::Calls { .. } => false,
        };
        is_free && self.opening.lead == ThoughtLead::Absent
    }

    /// Whether an answer is a JSON value.
    pub(crate) fn is_value(&self) -> bool {
        match &self.form {
            Form::Object | Form::Value(_) => true,
            Form::Text | Form::Calls { .. } => false,
        }
    }

    /// Whether an answer may hold calls.
    pub(crate) fn has_calls(&self) -> bool {
        !self.tools().is_empty()
    }

    /// Control tokens that are no text for a reader, and have to reach the gate.
    pub(crate) fn marker(&self, id: u32) -> Option<&str> {
        self.opening.format.marker_text(id)
    }

    /// The way of one answer.
    pub(crate) fn gate(self: &Arc<Self>) -> Gate {
        let Opening { format, lead } = &self.opening;
        let parser = match &self.form {
            Form::Calls { tools, limits, .. } => {
                let specs: Vec<ToolSpec> = tools.iter().map(|tool| tool.spec.clone()).collect();
                Some(format.parser(&specs, *lead, *limits))
            }
            Form::Text | Form::Object | Form::Value(_) if *lead != ThoughtLead::Absent => {
                Some(format.parser(&[], *lead, CallLimits::default()))
            }
            Form::Text | Form::Object | Form::Value(_) => None,
        };
        Gate {
            lock: Arc::clone(self),
            parser,
            content: String::new(),
            n_told: 0,
            n_calls: 0,
            has_thought: false,
        }
    }

    /// A whole answer, taken apart.
    pub(crate) fn reply(self: &Arc<Self>, text: &str, finish: Finish) -> Result<Reply, Broken> {
        let mut gate = self.gate();
        let mut parts = gate.push(text)?;
        parts.extend(gate.finish(finish)?);
        let mut reply = Reply::default();
        parts.into_iter().for_each(|part| reply.add(part));
        Ok(reply)
    }

    fn tools(&self) -> &[Tool] {
        match &self.form {
            Form::Text | Form::Object | Form::Value(_) => &[],
            Form::Calls { tools, .. } => tools,
        }
    }

    /// The arguments of a call that were copied from what tools returned.
    fn tainted(&self, name: &str, arguments: &Value) -> Result<Vec<String>, Broken> {
        let Some(Fence { fence, untrusted }) = &self.fence else { return Ok(Vec::new()) };
        let untrusted: Vec<&str> = untrusted.iter().map(String::as_str).collect();
        match fence.check(name, arguments, &untrusted) {
            ToolVerdict::Clean => Ok(Vec::new()),
            ToolVerdict::Tainted { pointers } => Ok(pointers),
            ToolVerdict::Refused(refusal) => Err(Broken(refusal.to_string())),
        }
    }

    /// Whether content waits until all of it was checked.
    fn holds(&self) -> bool {
        match &self.form {
            Form::Text | Form::Object | Form::Calls { .. } => false,
            Form::Value(grammar) => !grammar.is_exact(),
        }
    }

    /// Checks a whole content.
    fn check(&self, content: &str) -> Result<(), Broken> {
        match &self.form {
            Form::Text | Form::Calls { .. } => Ok(()),
            Form::Object => match serde_json::from_str(content) {
                Ok(Value::Object(_)) => Ok(()),
                Ok(_) => Err(Broken("expected a JSON object, found another value".into())),
                Err(error) => Err(Broken(format!("expected a JSON object, found {error}"))),
            },
            Form::Value(grammar) => {
                validator(grammar)?.check_text(content).map(drop).map_err(broken)
            }
        }
    }
}

fn validator(grammar: &Grammar) -> Result<&Validator, Broken> {
    let none = || Broken("expected a schema to check it by, found none".into());
    grammar.validator().ok_or_else(none)
}

fn broken(invalid: Invalid) -> Broken {
    Broken(invalid.to_string())
}

/// The way of one answer from the engine to the client.
pub(crate) struct Gate {
    lock: Arc<Lock>,
    /// Where there are thoughts or calls.
    parser: Option<CallParser>,
    /// All of it so far.
    content: String,
    /// Bytes of it that went on.
    n_told: usize,
    n_calls: usize,
    has_thought: bool,
}

impl Gate {
    /// Whether something went on that cannot be taken back.
    pub(crate) fn has_told(&self) -> bool {
        self.n_told > 0 || self.n_calls > 0 || self.has_thought
    }

    /// Takes the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Result<Vec<Part>, Broken> {
        let pieces = match &mut self.parser {
            Some(parser) => parser.push(text),
            None => vec![Piece::Text(text.into())],
        };
        self.parts(pieces, None)
    }

    /// The answer has ended. An incomplete one is let go as what it is: its reason says so.
    pub(crate) fn finish(&mut self, finish: Finish) -> Result<Vec<Part>, Broken> {
        let pieces = self.parser.as_mut().map(CallParser::finish).unwrap_or_default();
        let mut parts = self.parts(pieces, Some(finish))?;
        if is_whole(finish) {
            if self.lock.validates {
                self.lock.check(&self.content)?;
            }
            if self.is_demanded() && self.n_calls == 0 {
                return Err(Broken("expected a call, found none".into()));
            }
        }
        if let Some(rest) = self.rest() {
            parts.push(Part::Content(rest));
        }
        Ok(parts)
    }

    /// What may go on of these pieces; `end` is known of the last ones.
    fn parts(&mut self, pieces: Vec<Piece>, end: Option<Finish>) -> Result<Vec<Part>, Broken> {
        let mut parts = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Thought(text) => {
                    self.has_thought = true;
                    parts.push(Part::Reasoning(text));
                }
                // What is left of a demanded call is the beginning of its marker, and no text.
                Piece::Text(_) if self.is_demanded() && end.is_some_and(|it| !is_whole(it)) => {}
                Piece::Text(text) => {
                    self.content.push_str(&text);
                    if !self.lock.holds() {
                        parts.extend(self.rest().map(Part::Content));
                    }
                }
                Piece::Call(call) => parts.push(Part::Call(self.call(call)?)),
                Piece::Malformed(malformed) => match (malformed.fault, end) {
                    // What the answer's end cuts is no call, and no text either: nothing of it goes on.
                    (CallFault::Cut, Some(finish)) if !is_whole(finish) => {}
                    (fault, _) => {
                        self.note_call(false);
                        return Err(Broken(fault.to_string()));
                    }
                },
                other => return Err(Broken(format!("expected text or a call, found {other:?}"))),
            }
        }
        Ok(parts)
    }

    fn is_demanded(&self) -> bool {
        matches!(&self.lock.form, Form::Calls { is_demanded: true, .. })
    }

    /// Content that has not gone on yet.
    fn rest(&mut self) -> Option<String> {
        let rest = self.content[self.n_told..].to_owned();
        self.n_told = self.content.len();
        (!rest.is_empty()).then_some(rest)
    }

    /// Whether a call of this answer could be read as one of the tools' (G-29).
    fn note_call(&self, is_parsed: bool) {
        if let Some(circuit) = &self.lock.circuit {
            circuit.note(is_parsed);
        }
    }

    /// Whether it is a call of a tool, with arguments that the tool takes.
    fn conforms(&self, name: &str, arguments: &Value) -> Result<(), Broken> {
        let tools = self.lock.tools();
        let Some(tool) = tools.iter().find(|tool| tool.spec.name() == name) else {
            return Err(Broken(format!("expected a call of a tool, found one of `{name}`")));
        };
        if self.lock.validates {
            let checked = validator(&tool.value)?.check(arguments);
            checked.map_err(|invalid| Broken(format!("call of `{name}`: {invalid}")))?;
        }
        Ok(())
    }

    fn call(&mut self, call: ParsedCall) -> Result<Call, Broken> {
        let arguments = Value::Object(call.arguments);
        let conforms = self.conforms(&call.name, &arguments);
        self.note_call(conforms.is_ok());
        conforms?;
        let tainted = self.lock.tainted(&call.name, &arguments)?;
        let shape = self.lock.opening.format.id_shape();
        let id = ids::call(shape).map_err(|error: ApiError| Broken(error.to_string()))?;
        let index = self.n_calls;
        self.n_calls += 1;
        let dedupe_key = dedupe_key(&call.name, &arguments, self.lock.mem_rev);
        let (name, arguments) = (call.name, call.arguments_json);
        Ok(Call { index, id, name, arguments, tainted, dedupe_key })
    }
}

/// Whether an answer that ended so says of itself that it is whole.
fn is_whole(finish: Finish) -> bool {
    match finish {
        Finish::Stop => true,
        Finish::Length
        | Finish::Degenerate
        | Finish::RotationRequired
        | Finish::SchemaIncomplete
        | Finish::Cancelled => false,
    }
}
