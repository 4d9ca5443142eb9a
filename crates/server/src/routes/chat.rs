//! `/v1/chat/completions`.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use exrail_engine::{GenerateRequest, ModelFingerprint, Sampling, SessionState};
use exrail_text::{ChatMessage, OddCharacters, PlacedPrompt};
use exrail_verify::{LeakGuard, RuleSet};
use exrail_wire::{
    AssistantMessage, CalledFunction, ChatChoice, ChatChunk, ChatChunkChoice, ChatLogprobs,
    ChatRequest, ChatResponse, Delta, FunctionDelta, RequestMessage, StreamOptions, TokenLogprob,
    ToolCallDelta, ToolCallMessage, ToolKind, TopLogprob,
};

use super::ask;
use crate::{
    AppState,
    auth::{Caller, KeyFolder},
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
    generation::{self, Choice, LogprobAt},
    ids, leak,
    messages::{self, Conversation},
    odd,
    relay::{self, Job, News, Wording},
    rotation, rules,
    sessions::{self, LeakWatch, Origin, Turn},
    sse,
    state::{Services, system_fingerprint},
    structured::{Call, Demand, Lock, Part, Reply, Structured},
    tool_circuit::ModelCircuit,
    trace::TraceIdentity,
    translate::{self, Arrival, Fields},
};

/// What all responses of one request share.
#[derive(Clone)]
pub(crate) struct Header {
    pub(crate) id: String,
    pub(crate) created: i64,
    pub(crate) model: String,
    /// Of the session that the turn began from.
    pub(crate) context_id: Option<String>,
    /// Of the model, by the time of each event.
    pub(crate) fingerprint: ModelFingerprint,
}

/// A chat's events.
struct ChatWording {
    header: Header,
    include_usage: bool,
}

pub(crate) async fn complete(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    ready: Ready,
    Body(mut request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let fields = Fields::take(&mut request.unknown)?;
    let arrival = fields.arrival(received, &caller, &state.limits)?;
    let pass = ready.generator(Some(&request.model), &arrival.asking).await?;
    if request.exrail.is_some() {
        return ask::grounded_chat((state, ready.spans()), pass, request, &fields, arrival).await;
    }
    let stream = request.stream.unwrap_or(false);
    let origin = ready.origin(&caller, folder);
    let spans = ready.spans();
    spans.said(|| messages::said(&request.messages));
    let accepted = accept(&state, &pass, request, &fields, (arrival, &origin)).await;
    let (mut job, wording) = accepted.map_err(|error| pass.explain(error))?;
    job.spanned(spans, &wording.header.model, stream);
    if stream {
        let (sink, response) = sse::channel();
        tokio::spawn(relay::stream(state, pass, job, wording, sink));
        return Ok(response);
    }
    let choices = relay::whole(state, pass, job).await?;
    Ok(Json(whole_answer(wording.header, choices)).into_response())
}

async fn accept(
    state: &AppState,
    services: &Services,
    request: ChatRequest,
    fields: &Fields,
    (arrival, origin): (Arrival, &Origin),
) -> Result<(Job, ChatWording), ApiError> {
    let Arrival { received, asking } = arrival;
    let include_usage = include_usage(request.stream, request.stream_options)?;
    let choices = translate::choices(request.n, state.limits.choices)?;
    let logprobs = logprobs(request.logprobs, request.top_logprobs)?;
    let demand = Demand::of_chat(&fields.structured, &state.limits.structured)?;
    let circuit = circuit(state, services, &demand)?;
    let taint = fields.tool_taint(!demand.tools().is_empty())?;
    let claim = fields.claim()?;
    if claim.is_some() {
        fields.refuse_constraints("the messages of a session were written without them")?;
    }
    let rules = rules::compile(fields, &state.compiling).await?;
    let is_forbidding = rules.as_ref().is_some_and(|rules| rules.n_patterns() > 0);
    let watch = LeakWatch::of(fields.leak_guard(&state.limits));
    let who = (watch, asking.tenant.as_deref());
    let framed = framed(state, services, who, request.messages, (&demand, rules))?;
    let Framed { conversation, odd, returned, leak, shape } = framed;
    refuse_logprobs(logprobs.is_some(), leak.is_some(), is_forbidding)?;
    let sampling = translate::sampling(&fields.sampling, Sampling::default())?;
    let rotation = conversation.rotation(&services.engine, request.rotation)?;
    let Conversation { placed: PlacedPrompt { ids: prompt, .. }, opening, rules, .. } =
        conversation;
    let asked = one_limit(request.max_tokens, request.max_completion_tokens)?;
    translate::reserve_output(&services.engine, asked, prompt.len())?;
    let default = state.limits.default_max_tokens;
    let max_tokens = translate::max_tokens(&services.engine, asked, default, prompt.len());
    let loop_guard = fields.loop_guard(&state.limits, request.stream)?;
    let turn = sessions::begin(state, services, origin, claim, (&prompt, shape)).await?;
    // The last thing before the queue: it takes a core.
    let Structured { grammar, lock } =
        demand.compile(&services.engine, &state.compiling, opening).await?;
    let mem_rev = turn.as_ref().map_or(0, |turn| turn.memory().rev);
    let hold = |lock: Lock| lock.fenced(returned, taint).watched(circuit).remembering(mem_rev);
    let lock = lock.map(|lock| Arc::new(hold(lock)));
    if logprobs.is_some() && lock.as_ref().is_some_and(|lock| lock.has_calls()) {
        let why = "log-probabilities of tool calls are not told";
        return Err(ApiError::UnsupportedField { field: "logprobs".into(), why });
    }
    let seed = sampling.seed;
    let generate = GenerateRequest {
        prompt,
        max_tokens,
        sampling,
        stop: translate::stops(request.stop),
        logprobs,
        entropy: false,
        stop_at_eos: true,
        tenant: asking.tenant.clone(),
        priority: fields.priority(),
        deadline: asking.deadline,
        loop_guard,
        prefix_cache: fields.prefix_cache(),
        rotation,
        grammar,
    };
    let requests = generation::requests(&generate, choices);
    let generations = generation::submit(&services.engine, &requests)?;
    let header = header(services, "chatcmpl")?.of(turn.as_ref());
    let identity = identity(&header, asking.tenant, request.user)?;
    let identity = Turn::identity(turn.as_ref(), identity);
    let route = "/v1/chat/completions";
    let job = Job {
        route,
        generations,
        lock,
        requests,
        seed,
        identity,
        received,
        leak,
        rules,
        odd,
        turn,
    };
    Ok((job, ChatWording { header, include_usage }))
}

/// Messages as the model reads them, and what is known of them.
pub(crate) struct Framed {
    pub(crate) conversation: Conversation,
    odd: OddCharacters,
    /// What tools have returned.
    returned: Vec<String>,
    leak: Option<Arc<LeakGuard>>,
    /// What shapes the answers that go on from it.
    pub(crate) shape: SessionState,
}

/// Frames messages: with the rules of the request, with a canary where they are watched, and with the tools.
pub(crate) fn framed(
    state: &AppState,
    services: &Services,
    (watch, tenant): (LeakWatch, Option<&str>),
    messages: Vec<RequestMessage>,
    (demand, rules): (&Demand, Option<Arc<RuleSet>>),
) -> Result<Framed, ApiError> {
    let mut said = messages::of_wire(messages)?;
    let (odd, returned) = (odd::of_chat(&said), returned(&said));
    let takes_system = services.tool_format().takes_system();
    let written = rules.map(|rules| rules::write(rules, &mut said, takes_system));
    let shape = sessions::of_chat(services, &said, demand, watch);
    let leak = match watch {
        LeakWatch::On => {
            leak::guard(&services.engine, &mut said, (state.canary_secret()?, tenant))?
        }
        LeakWatch::Off => None,
    };
    let conversation = Conversation::new(services, said, demand.tools(), written.as_ref())?;
    Ok(Framed { conversation, odd, returned, leak, shape })
}

/// Where it is noted whether calls of the model can be read; a request that lets it call what it likes is refused
/// while they cannot (G-29).
fn circuit(
    state: &AppState,
    services: &Services,
    demand: &Demand,
) -> Result<Option<Arc<ModelCircuit>>, ApiError> {
    if demand.tools().is_empty() {
        return Ok(None);
    }
    let circuit = state.tool_circuits.of(&services.model_name);
    if demand.is_free_to_call() && state.limits.structured.tool_circuit {
        circuit.admit(&services.model_name)?;
    }
    Ok(Some(circuit))
}

/// Log-probabilities go with their tokens, and some of those are held back.
fn refuse_logprobs(are_wanted: bool, leak: bool, forbids: bool) -> Result<(), ApiError> {
    let why = match (are_wanted, leak, forbids) {
        (false, _, _) | (true, false, false) => return Ok(()),
        (true, true, _) => "they would tell the tokens that `leak_guard` holds back",
        (true, false, true) => "they would tell the tokens that `constraints` hold back",
    };
    Err(ApiError::UnsupportedField { field: "logprobs".into(), why })
}

/// What tools have returned in a conversation, which nobody vouches for.
fn returned(said: &[ChatMessage]) -> Vec<String> {
    let results = said.iter().filter(|message| message.role == "tool");
    results.filter_map(|message| message.content.clone()).collect()
}

/// Names and times of a response.
pub(crate) fn header(services: &Services, prefix: &str) -> Result<Header, ApiError> {
    Ok(Header {
        id: ids::name(prefix)?,
        created: jiff::Timestamp::now().as_second(),
        model: services.model_name.clone(),
        context_id: None,
        fingerprint: services.engine.facts().model_sha256.clone(),
    })
}

/// Who a response's trace belongs to.
pub(crate) fn identity(
    header: &Header,
    agent: Option<String>,
    user: Option<String>,
) -> Result<TraceIdentity, ApiError> {
    Ok(TraceIdentity {
        trace_id: ids::name("trace")?,
        request_id: header.id.clone(),
        session_id: user,
        agent_id: agent,
        ..TraceIdentity::default()
    })
}

/// Checks `stream_options`, which mean nothing without `stream`.
pub(crate) fn include_usage(
    stream: Option<bool>,
    options: Option<StreamOptions>,
) -> Result<bool, ApiError> {
    let Some(options) = options else { return Ok(false) };
    refuse_unknown("stream_options.", &options.unknown)?;
    if !stream.unwrap_or(false) {
        return Err(ApiError::BadField {
            field: "stream_options".into(),
            problem: "expected only together with `stream: true`".into(),
        });
    }
    Ok(options.include_usage.unwrap_or(false))
}

/// `max_tokens` and its newer name; both may be given only when equal.
pub(crate) fn one_limit(old: Option<usize>, new: Option<usize>) -> Result<Option<usize>, ApiError> {
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::BadField {
            field: "max_tokens".into(),
            problem: format!("expected to equal max_completion_tokens ({new}), found {old}"),
        }),
        (old, new) => Ok(new.or(old)),
    }
}

fn logprobs(wanted: Option<bool>, top: Option<usize>) -> Result<Option<usize>, ApiError> {
    match (wanted.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None) => Ok(None),
        (false, Some(_)) => Err(ApiError::BadField {
            field: "top_logprobs".into(),
            problem: "expected only together with `logprobs: true`".into(),
        }),
    }
}

fn whole_answer(header: Header, choices: Vec<Choice>) -> ChatResponse {
    let system_fingerprint = header.system_fingerprint();
    let usage = generation::usage(&choices);
    let choices = choices.into_iter().enumerate().map(|(index, choice)| {
        let told = choice.told();
        let logprobs = Some(choice.told_logprobs()).filter(|list| !list.is_empty());
        ChatChoice {
            index,
            finish_reason: told.finish_reason.unwrap_or("stop"),
            exrail_finish_reason: told.exrail_finish_reason,
            logprobs: logprobs.map(chat_logprobs),
            rotations: rotation::records(&choice.rotations),
            rolled_back_tokens: choice.rolled_back,
            message: message(choice),
        }
    });
    ChatResponse {
        id: header.id,
        object: "chat.completion",
        created: header.created,
        model: header.model,
        choices: choices.collect(),
        usage,
        system_fingerprint,
        context_id: header.context_id,
        exrail: None,
    }
}

fn message(choice: Choice) -> AssistantMessage {
    let Reply { content, reasoning, calls } = match choice.reply {
        Some(reply) => reply,
        None => Reply { content: choice.text, ..Reply::default() },
    };
    let call = |call: Call| ToolCallMessage {
        id: call.id,
        kind: ToolKind::Function,
        function: CalledFunction { name: call.name, arguments: call.arguments },
        exrail_tainted: call.tainted,
        exrail_dedupe_key: call.dedupe_key,
    };
    AssistantMessage {
        role: "assistant",
        content: Some(content).filter(|text| !text.is_empty() || calls.is_empty()),
        refusal: None,
        reasoning_content: reasoning,
        tool_calls: calls.into_iter().map(call).collect(),
    }
}

impl Header {
    /// The same of a turn of a session.
    pub(crate) fn of(self, turn: Option<&Turn>) -> Header {
        Header { context_id: turn.map(|turn| turn.memory().context_id()), ..self }
    }

    /// None while the hash runs; a whole answer, and the end of a stream, come after it.
    pub(crate) fn system_fingerprint(&self) -> Option<String> {
        system_fingerprint(&self.fingerprint)
    }

    /// One event of a stream.
    pub(crate) fn chunk(&self, choices: Vec<ChatChunkChoice>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.system_fingerprint(),
            choices,
            usage: None,
            context_id: self.context_id.clone(),
            exrail: None,
        }
    }
}

/// One choice's part of an event.
pub(crate) fn piece(index: usize, delta: Delta) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta,
        finish_reason: None,
        exrail_finish_reason: None,
        logprobs: None,
        rotations: Vec::new(),
    }
}

impl Wording for ChatWording {
    type Event = ChatChunk;

    fn opening(&self, n_choices: usize) -> Vec<ChatChunk> {
        let role = |index| {
            let content = Some(String::new());
            piece(index, Delta { role: Some("assistant"), content, ..Delta::default() })
        };
        vec![self.header.chunk((0..n_choices).map(role).collect())]
    }

    fn news(&self, news: &News<'_>) -> Vec<ChatChunk> {
        let mut deltas: Vec<Delta> = news.parts.iter().flat_map(deltas).collect();
        if deltas.is_empty() {
            deltas.push(Delta { content: Some(String::new()), ..Delta::default() });
        }
        let mut pieces: Vec<_> = deltas.into_iter().map(|delta| piece(news.index, delta)).collect();
        // What was dropped is told before the text that does not see it, and numbers with the first of it.
        let first = &mut pieces[0];
        first.rotations = rotation::records(news.rotations);
        first.logprobs = (!news.logprobs.is_empty()).then(|| chat_logprobs(news.logprobs));
        pieces.into_iter().map(|piece| self.header.chunk(vec![piece])).collect()
    }

    fn closing(&self, choices: &[Choice]) -> Vec<ChatChunk> {
        let last = |(index, choice): (usize, &Choice)| {
            let mut last = piece(index, Delta::default());
            let told = choice.told();
            last.finish_reason = told.finish_reason;
            last.exrail_finish_reason = told.exrail_finish_reason;
            self.header.chunk(vec![last])
        };
        let mut events: Vec<ChatChunk> = choices.iter().enumerate().map(last).collect();
        if self.include_usage {
            let mut chunk = self.header.chunk(Vec::new());
            chunk.usage = Some(generation::usage(choices));
            events.push(chunk);
        }
        events
    }
}

/// The events of a part: a call is named in the first one, and its arguments follow.
fn deltas(part: &Part) -> Vec<Delta> {
    let call = match part {
        Part::Content(text) => {
            return vec![Delta { content: Some(text.clone()), ..Delta::default() }];
        }
        Part::Reasoning(text) => {
            return vec![Delta { reasoning_content: Some(text.clone()), ..Delta::default() }];
        }
        Part::Call(call) => call,
    };
    let Call { index, id, name, arguments, tainted, dedupe_key } = call.clone();
    let named = FunctionDelta { name: Some(name), arguments: String::new() };
    let kind = Some(ToolKind::Function);
    let called = ToolCallDelta {
        index,
        id: Some(id),
        kind,
        function: named,
        exrail_tainted: tainted,
        exrail_dedupe_key: Some(dedupe_key),
    };
    let filled = ToolCallDelta {
        index,
        id: None,
        kind: None,
        function: FunctionDelta { name: None, arguments },
        exrail_tainted: Vec::new(),
        exrail_dedupe_key: None,
    };
    let delta = |call| Delta { tool_calls: vec![call], ..Delta::default() };
    vec![delta(called), delta(filled)]
}

fn chat_logprobs(logprobs: &[LogprobAt]) -> ChatLogprobs {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let entry = |at: &LogprobAt| TokenLogprob {
        token: text(&at.logprob.bytes),
        logprob: at.logprob.logprob,
        bytes: at.logprob.bytes.clone(),
        top_logprobs: at
            .logprob
            .top
            .iter()
            .map(|other| TopLogprob {
                token: text(&other.bytes),
                logprob: other.logprob,
                bytes: other.bytes.clone(),
            })
            .collect(),
    };
    ChatLogprobs { content: logprobs.iter().map(entry).collect() }
}
