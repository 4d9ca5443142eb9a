//! `/v1/ask`, and chat completions that answer from a collection. Both decide whole answers: what is
//! not yet checked is not released, so a stream waits with comments.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use exrail_retrieval::Hit;
use exrail_text::OddCharacters;
use exrail_verify::{LOGIC_COLLAPSE, NLI, RefusalReason, Segment};
use exrail_wire::{
    AskMetrics, AskRequest, AskResponse, AssistantMessage, ChatChoice, ChatGrounded, ChatRequest,
    ChatResponse, Citation, Delta, SamplingFields, TraceBody, Usage,
};

use super::chat::{self, Header, piece};
use crate::{
    AppState,
    answer_record::{Recorded, checks, finish_reason, source_name, status},
    auth::Caller,
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
    generation::Told,
    messages, odd,
    otlp::{self, RequestSpans, Stage},
    pipeline::{ASK_K, ASK_MAX_TOKENS, AskCall, Asked, Asker, ask_sampling},
    rules,
    sse::{self, EventSink, Gone},
    state::Services,
    swap::{Asking, Pass},
    trace::TraceIdentity,
    translate::{self, Arrival, Fields},
};

/// Longest question in bytes.
const MAX_QUESTION_BYTES: usize = 8 << 10;

/// Why a grounded answer cannot do without it.
const ALWAYS_GUARDED: &str = "a grounded answer is always guarded";

/// Why it begins from no session.
const NO_HISTORY: &str = "a grounded answer reads no history";

/// A question that was accepted.
struct Question {
    asker: Arc<Asker>,
    pass: Pass,
    collection: String,
    text: String,
    call: AskCall,
    identity: TraceIdentity,
}

pub(crate) async fn ask(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    ready: Ready,
    Body(mut request): Body<AskRequest>,
) -> Result<Json<AskResponse>, ApiError> {
    let (received, fields) = (Instant::now(), Fields::take(&mut request.unknown)?);
    fields.refuse_structured()?;
    fields.refuse_leak_guard(false, ALWAYS_GUARDED)?;
    fields.tool_taint(false)?;
    fields.refuse_session(NO_HISTORY)?;
    let Arrival { asking, .. } = fields.arrival(received, &caller, &state.limits)?;
    let pass = ready.generator(request.model.as_deref(), &asking).await?;
    let header = chat::header(&pass, "ask")?;
    let spans = ready.spans();
    let question = Question {
        collection: collection_name(&pass, request.collection.clone()),
        asker: Arc::clone(pass.collection(request.collection.as_deref())?),
        text: question_text("question", request.question)?,
        call: AskCall {
            steps: request.steps,
            ..call(&state, &asking, &fields, request.k, request.max_tokens).await?
        },
        identity: spanned(spans, chat::identity(&header, asking.tenant, None)?),
        pass,
    };
    question.asked(false);
    Ok(Json(decide(state, question).await?))
}

impl Question {
    fn recorded(&self) -> Recorded<'_> {
        let (grounds, collection) = (&**self.asker.grounds(), &*self.collection);
        Recorded { grounds, collection, question: &self.text, call: &self.call }
    }

    fn asked(&self, is_stream: bool) {
        self.identity.spans.asked(|| otlp::Asked {
            model: self.pass.model_name.clone(),
            sampling: Some(self.call.sampling.clone()),
            max_tokens: Some(self.call.max_tokens),
            n_choices: 1,
            is_stream,
            k: Some(self.call.k),
        });
    }
}

/// The identity of a request with these spans.
fn spanned(spans: RequestSpans, identity: TraceIdentity) -> TraceIdentity {
    TraceIdentity { spans, ..identity }
}

fn collection_name(services: &Services, asked: Option<String>) -> String {
    asked.or_else(|| services.collections.keys().next().cloned()).unwrap_or_default()
}

fn question_text(field: &str, text: String) -> Result<String, ApiError> {
    let problem = match text.len() {
        _ if text.trim().is_empty() => "expected a question, found none".into(),
        len if len > MAX_QUESTION_BYTES => {
            format!("expected at most {MAX_QUESTION_BYTES} bytes, found {len}")
        }
        _ => return Ok(text),
    };
    Err(ApiError::BadField { field: field.into(), problem })
}

async fn call(
    state: &AppState,
    asking: &Asking,
    fields: &Fields,
    k: Option<usize>,
    max_tokens: Option<usize>,
) -> Result<AskCall, ApiError> {
    let defaults = ask_sampling();
    // Unlike chat, a grounded question has a fixed default seed: asking twice is a repeat.
    let seeded = SamplingFields {
        seed: fields.sampling.seed.or(Some(defaults.seed.cast_signed())),
        ..fields.sampling.clone()
    };
    Ok(AskCall {
        k: k.unwrap_or(ASK_K),
        max_tokens: max_tokens.unwrap_or(ASK_MAX_TOKENS),
        sampling: translate::sampling(&seeded, defaults)?,
        tenant: asking.tenant.clone(),
        priority: fields.priority(),
        deadline: asking.deadline,
        hung_up: None,
        loop_guard: fields.grounded_loop_guard(&state.limits)?,
        prefix_cache: fields.prefix_cache(),
        // The last thing: it takes a core.
        rules: rules::compile(fields, &state.compiling).await?,
        steps: None,
    })
}

/// Asks, writes the trace, and only then hands the answer out.
async fn decide(state: Arc<AppState>, mut question: Question) -> Result<AskResponse, ApiError> {
    // Dropped with this future, as soon as the client has gone.
    let (_waits, hung_up) = flume::bounded(0);
    question.call.hung_up = Some(hung_up);
    let blocking = tokio::task::spawn_blocking(move || {
        let asked = ask_and_trace(&state, &question)?;
        if let Some(ms) = asked.measured.and_then(|measured| measured.first_token_ms) {
            let first = Duration::from_secs_f64((asked.retrieve_ms + ms).max(0.0) / 1e3);
            state.metrics.first_token.observe(first);
        }
        let record = question.recorded().answer(&asked);
        state.metrics.count_checks(&asked.checks);
        for guard in &record.guards_fired {
            state.metrics.count_guard(guard);
        }
        let pins = question.asker.pins()?;
        let collection = question.asker.index().collection();
        let search = TraceBody::Retrieve {
            query: record.query.clone(),
            collection: record.collection.clone(),
            retrieved: record.retrieved.clone(),
        };
        state.traces.append_grounded(&question.identity, &pins, search, collection)?;
        if let Some(body) = odd::traced(odd_characters(&question, &asked)) {
            state.metrics.count_guard(odd::GUARD);
            state.traces.append_blocking(&question.identity, &pins, body)?;
        }
        for body in [contradicted(&asked), collapsed(&asked)].into_iter().flatten() {
            state.traces.append_blocking(&question.identity, &pins, body)?;
        }
        let body = TraceBody::Answer(Box::new(record));
        state.traces.append_grounded(&question.identity, &pins, body, collection)?;
        let reason = asked.outcome.reply.as_ref().map(|reply| finish_reason(reply.end));
        let told = reason.and_then(|reason| Told::named(reason).finish_reason);
        question.identity.spans.finished(told.into_iter());
        Ok(response(question.identity.trace_id, asked))
    });
    blocking.await.map_err(|_| ApiError::Internal("ask task"))?
}

/// Asks. Where nobody waits for the answer any more, the search and the end of it are recorded here: the records of
/// an answer are written when it is decided, as they wait for the model's hash.
fn ask_and_trace(state: &AppState, question: &Question) -> Result<Asked, ApiError> {
    let Question { asker, call, identity, text, .. } = question;
    let explain = |error| question.pass.explain(error);
    let (spans, begun) = (&identity.spans, Instant::now());
    let found = asker.find(text, call).map_err(explain)?;
    let found_at = Instant::now();
    spans.spent(Stage::Retrieve, (begun, found_at));
    spans.documents(|| found.hits.iter().map(|hit| hit.chunk.text.clone()).collect());
    let asked = asker.answer(text, found.clone(), call).map_err(explain);
    spans.spent(Stage::Decide, (found_at, Instant::now()));
    let measured = asked.as_ref().ok().and_then(|asked| asked.measured);
    if let Some(during) = measured.and_then(|measured| measured.during) {
        spans.spent(Stage::Generate, during);
    }
    if let Err(error @ ApiError::HungUp) = &asked {
        spans.failed(error.code());
        let pins = asker.pins()?;
        let search = TraceBody::Retrieve {
            query: question.recorded().query(),
            collection: question.collection.clone(),
            retrieved: question.recorded().retrieved(&found.hits, 0),
        };
        state.traces.append_grounded(identity, &pins, search, asker.index().collection())?;
        let body = TraceBody::Guard { guard: error.code().into(), detail: error.to_string() };
        state.traces.append_blocking(identity, &pins, body)?;
    }
    asked
}

/// The record of a rule that an answer was withheld for (G-31).
fn contradicted(asked: &Asked) -> Option<TraceBody> {
    let reason = asked.outcome.refusal.as_ref()?;
    let is_it = matches!(reason, RefusalReason::ConstraintContradiction { .. });
    let detail = format!("{}; nli {NLI}", reason.in_words());
    is_it.then(|| TraceBody::Guard { guard: reason.guard().into(), detail })
}

/// The record of the steps that were taken back (G-20). An answer with others in their place may leave.
fn collapsed(asked: &Asked) -> Option<TraceBody> {
    let detail = format!("{}; nli {NLI}", asked.outcome.rollbacks()?);
    Some(TraceBody::Guard { guard: LOGIC_COLLAPSE.into(), detail })
}

/// Those of the question and of the evidence.
fn odd_characters(question: &Question, asked: &Asked) -> OddCharacters {
    let evidence = asked.outcome.evidence.iter().map(|hit| OddCharacters::of(&hit.chunk.text));
    evidence.fold(OddCharacters::of(&question.text), OddCharacters::and)
}

fn response(trace_id: String, asked: Asked) -> AskResponse {
    let (metrics, checks, steps) = (metrics(&asked), checks(&asked.checks), asked.steps());
    let citations = citations(&asked.outcome.segments, &asked.outcome.evidence);
    let outcome = asked.outcome;
    let usage = outcome.reply.as_ref().map_or_else(Usage::default, |reply| {
        let cached = asked.measured.map_or(0, |measured| measured.cached_tokens);
        Usage::new(reply.n_prompt_tokens, reply.n_output_tokens, cached)
    });
    AskResponse {
        trace_id,
        refusal: outcome.refusal.is_some(),
        reason: outcome.refusal.as_ref().map(|reason| reason.in_words()),
        citations,
        metrics,
        checks,
        usage,
        finish_reason: outcome.reply.as_ref().map(|reply| finish_reason(reply.end)),
        answer: outcome.text,
        steps,
    }
}

fn metrics(asked: &Asked) -> AskMetrics {
    let gate = &asked.outcome.gate;
    AskMetrics {
        ds_raw_min: gate.raw_min(),
        ds_min: gate.cal_min(),
        ds_status: status(gate).into(),
        retrieve_ms: asked.retrieve_ms,
        first_token_ms: asked.measured.and_then(|measured| measured.first_token_ms),
        total_ms: asked.total_ms,
    }
}

/// Each cited snippet once, in order of first citation.
fn citations(segments: &[Segment], evidence: &[Hit]) -> Vec<Citation> {
    let mut citations: Vec<Citation> = Vec::new();
    for segment in segments {
        for id in &segment.snippet_ids {
            if citations.iter().any(|citation| citation.snippet_id == *id) {
                continue;
            }
            let Some(hit) = evidence.iter().find(|hit| hit.chunk.snippet_id == *id) else {
                continue;
            };
            let chunk = &hit.chunk;
            citations.push(Citation {
                snippet_id: chunk.snippet_id.clone(),
                section_id: chunk.section_id.clone(),
                doc_id: chunk.doc_id.clone(),
                source_url: chunk.source_url.clone(),
                lines: [chunk.span.line_start, chunk.span.line_end],
                tokens: chunk.tokens,
                source: source_name(segment.citation_source),
                text: chunk.text.clone(),
            });
        }
    }
    citations
}

/// A chat request with `"exrail": {"collection": …}`.
pub(crate) async fn grounded_chat(
    (state, spans): (Arc<AppState>, RequestSpans),
    pass: Pass,
    mut request: ChatRequest,
    fields: &Fields,
    arrival: Arrival,
) -> Result<Response, ApiError> {
    let Arrival { asking, .. } = arrival;
    let Some(grounding) = request.exrail.take() else {
        return Err(ApiError::Internal("a grounded request without grounding"));
    };
    refuse_unknown("exrail.", &grounding.unknown)?;
    fields.refuse_structured()?;
    fields.refuse_leak_guard(false, ALWAYS_GUARDED)?;
    fields.tool_taint(false)?;
    fields.refuse_session(NO_HISTORY)?;
    refuse_with_grounding(&request)?;
    let include_usage = chat::include_usage(request.stream, request.stream_options)?;
    let limit = chat::one_limit(request.max_tokens, request.max_completion_tokens)?;
    let header = chat::header(&pass, "chatcmpl")?;
    let question = Question {
        asker: Arc::clone(pass.collection(Some(&grounding.collection))?),
        collection: grounding.collection,
        text: question_text("messages[0].content", single_question(request.messages)?)?,
        call: AskCall {
            steps: grounding.steps,
            ..call(&state, &asking, fields, grounding.k, limit).await?
        },
        identity: spanned(spans, chat::identity(&header, asking.tenant, request.user)?),
        pass,
    };
    let is_stream = request.stream.unwrap_or(false);
    question.asked(is_stream);
    if is_stream {
        let (sink, response) = sse::channel();
        tokio::spawn(stream(state, question, header, include_usage, sink));
        return Ok(response);
    }
    let answer = decide(state, question).await?;
    Ok(Json(whole(header, answer)).into_response())
}

/// Options that mean something else, or nothing, for a checked answer.
fn refuse_with_grounding(request: &ChatRequest) -> Result<(), ApiError> {
    let refuse = |field: &str, why| Err(ApiError::UnsupportedField { field: field.into(), why });
    if request.n.is_some_and(|n| n != 1) {
        return refuse("n", "a grounded answer has one choice");
    }
    if request.stop.is_some() {
        return refuse("stop", "a grounded answer ends where its last checked sentence ends");
    }
    if request.rotation.is_some() {
        return refuse("rotation", "the evidence of a grounded answer is never dropped");
    }
    if request.logprobs.unwrap_or(false) || request.top_logprobs.is_some() {
        return refuse("logprobs", "a grounded answer carries no log-probabilities");
    }
    Ok(())
}

/// The guards own system prompt and evidence, so that a conversation has no place in this prompt.
fn single_question(messages: Vec<exrail_wire::RequestMessage>) -> Result<String, ApiError> {
    let mut messages = messages::of_wire(messages)?;
    match (messages.pop(), messages.is_empty()) {
        (Some(last), true) if last.role == "user" => Ok(last.content.unwrap_or_default()),
        _ => Err(ApiError::BadField {
            field: "messages".into(),
            problem:
                "expected exactly one user message with `exrail.collection`: grounded answers \
                      read no history and bring their own system message"
                    .into(),
        }),
    }
}

fn grounded(answer: &AskResponse) -> ChatGrounded {
    ChatGrounded {
        trace_id: answer.trace_id.clone(),
        refusal: answer.refusal,
        reason: answer.reason.clone(),
        citations: answer.citations.clone(),
        metrics: answer.metrics.clone(),
        checks: answer.checks.clone(),
        steps: answer.steps.clone(),
    }
}

fn whole(header: Header, answer: AskResponse) -> ChatResponse {
    let system_fingerprint = header.system_fingerprint();
    let exrail = Some(grounded(&answer));
    let told = Told::named(answer.finish_reason.unwrap_or("stop"));
    let message = AssistantMessage {
        role: "assistant",
        content: Some(answer.answer),
        refusal: None,
        reasoning_content: None,
        tool_calls: Vec::new(),
    };
    ChatResponse {
        id: header.id,
        object: "chat.completion",
        created: header.created,
        model: header.model,
        choices: vec![ChatChoice {
            index: 0,
            message,
            finish_reason: told.finish_reason.unwrap_or("stop"),
            exrail_finish_reason: told.exrail_finish_reason,
            logprobs: None,
            rotations: Vec::new(),
            rolled_back_tokens: None,
        }],
        usage: answer.usage,
        system_fingerprint,
        context_id: None,
        exrail,
    }
}

async fn stream(
    state: Arc<AppState>,
    question: Question,
    header: Header,
    include_usage: bool,
    sink: EventSink,
) {
    let spans = question.identity.spans.clone();
    // A first sign of life at once: the answer comes whole.
    if sink.heartbeat().await.is_err() {
        return;
    }
    let answer = tokio::select! {
        answer = sink.alive_while(decide(state, question)) => answer,
        () = sink.closed() => return,
    };
    match answer {
        Ok(answer) => {
            drop(spans);
            drop(send(&header, &answer, include_usage, &sink).await);
        }
        Err(error) => {
            spans.failed(error.code());
            sink.fail(&error).await;
        }
    }
}

async fn send(
    header: &Header,
    answer: &AskResponse,
    include_usage: bool,
    sink: &EventSink,
) -> Result<(), Gone> {
    let content = Some(answer.answer.clone());
    let delta = Delta { role: Some("assistant"), content, ..Delta::default() };
    sink.send(&header.chunk(vec![piece(0, delta)])).await?;
    let mut last = piece(0, Delta::default());
    let told = Told::named(answer.finish_reason.unwrap_or("stop"));
    last.finish_reason = told.finish_reason;
    last.exrail_finish_reason = told.exrail_finish_reason;
    let mut chunk = header.chunk(vec![last]);
    chunk.exrail = Some(grounded(answer));
    sink.send(&chunk).await?;
    if include_usage {
        let mut chunk = header.chunk(Vec::new());
        chunk.usage = Some(answer.usage);
        sink.send(&chunk).await?;
    }
    sink.done().await
}
