//! `/v1/chat/completions`.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use exrail_engine::{Event, GenerateRequest, Generation, Sampling};
use exrail_wire::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatLogprobs, ChatRequest,
    ChatResponse, Delta, SamplingFields, StreamOptions, TokenLogprob, TopLogprob,
};
use futures_util::StreamExt;

use super::ask;
use crate::{
    AppState,
    auth::Caller,
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
    generation::{self, Choice, LogprobAt},
    ids,
    sse::{self, EventSink, Gone},
    state::Services,
    trace::TraceIdentity,
    translate,
};

/// What all responses of one request share.
#[derive(Clone)]
pub(crate) struct Header {
    pub(crate) id: String,
    pub(crate) created: i64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
}

/// A chat request that was accepted.
struct Accepted {
    generations: Vec<Generation>,
    seed: u64,
    include_usage: bool,
    header: Header,
    identity: TraceIdentity,
    received: Instant,
}

pub(crate) async fn complete(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Ready(services): Ready,
    Body(mut request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let sampling = SamplingFields::take(&mut request.unknown)?;
    refuse_unknown("", &request.unknown)?;
    services.expect_generator(&request.model)?;
    if request.exrail.is_some() {
        return ask::grounded_chat(state, caller, services, request, sampling).await;
    }
    let stream = request.stream.unwrap_or(false);
    let accepted = accept(&state, &caller, &services, request, &sampling, received)?;
    if stream {
        let (sink, response) = sse::channel();
        tokio::spawn(stream_answer(state, services, accepted, sink));
        return Ok(response);
    }
    whole_answer(&state, &services, accepted).await
}

fn accept(
    state: &AppState,
    caller: &Caller,
    services: &Services,
    request: ChatRequest,
    sampling: &SamplingFields,
    received: Instant,
) -> Result<Accepted, ApiError> {
    let include_usage = include_usage(request.stream, request.stream_options)?;
    let choices = translate::choices(request.n, state.limits.choices)?;
    let messages = translate::messages(request.messages)?;
    let sampling = translate::sampling(sampling, Sampling::default())?;
    let prompt = translate::chat_prompt(&services.engine, &messages)?;
    let asked = one_limit(request.max_tokens, request.max_completion_tokens)?;
    let default = state.limits.default_max_tokens;
    let max_tokens = translate::max_tokens(&services.engine, asked, default, prompt.len());
    let seed = sampling.seed;
    let generate = GenerateRequest {
        prompt,
        max_tokens,
        sampling,
        stop: translate::stops(request.stop),
        logprobs: logprobs(request.logprobs, request.top_logprobs)?,
        stop_at_eos: true,
    };
    let generations = generation::submit(&services.engine, &generate, choices)?;
    let header = header(services, "chatcmpl")?;
    let identity = identity(&header, caller, request.user)?;
    Ok(Accepted { generations, seed, include_usage, header, identity, received })
}

/// Names and times of a response.
pub(crate) fn header(services: &Services, prefix: &str) -> Result<Header, ApiError> {
    Ok(Header {
        id: ids::name(prefix)?,
        created: jiff::Timestamp::now().as_second(),
        model: services.model_name.clone(),
        system_fingerprint: services.system_fingerprint(),
    })
}

/// Who a response's trace belongs to.
pub(crate) fn identity(
    header: &Header,
    caller: &Caller,
    user: Option<String>,
) -> Result<TraceIdentity, ApiError> {
    Ok(TraceIdentity {
        trace_id: ids::name("trace")?,
        request_id: header.id.clone(),
        session_id: user,
        agent_id: caller.0.clone(),
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

async fn whole_answer(
    state: &AppState,
    services: &Services,
    accepted: Accepted,
) -> Result<Response, ApiError> {
    let Accepted { generations, seed, header, identity, received, .. } = accepted;
    let first_token = || state.metrics.first_token.observe(received.elapsed());
    let choices = generation::collect(generations, first_token).await?;
    let record = generation::trace_body("/v1/chat/completions", seed, &choices);
    state.traces.append(&identity, &services.pins(), record).await?;
    let usage = generation::usage(&choices);
    let choices = choices.into_iter().enumerate().map(|(index, choice)| {
        let finish = choice.finished.map_or("stop", |f| generation::finish_reason(f.finish));
        let logprobs = Some(&choice.logprobs).filter(|list| !list.is_empty());
        ChatChoice {
            index,
            finish_reason: finish,
            logprobs: logprobs.map(|list| chat_logprobs(list)),
            message: AssistantMessage { role: "assistant", content: choice.text, refusal: None },
        }
    });
    let response = ChatResponse {
        id: header.id,
        object: "chat.completion",
        created: header.created,
        model: header.model,
        choices: choices.collect(),
        usage,
        system_fingerprint: header.system_fingerprint,
        exrail: None,
    };
    Ok(Json(response).into_response())
}

impl Header {
    /// One event of a stream.
    pub(crate) fn chunk(&self, choices: Vec<ChatChunkChoice>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.system_fingerprint.clone(),
            choices,
            usage: None,
            exrail: None,
        }
    }
}

/// One choice's part of an event.
pub(crate) fn piece(index: usize, delta: Delta) -> ChatChunkChoice {
    ChatChunkChoice { index, delta, finish_reason: None, logprobs: None }
}

/// Why a stream ended early.
enum Cut {
    Gone,
    Failed(ApiError),
}

impl From<Gone> for Cut {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

async fn stream_answer(
    state: Arc<AppState>,
    services: Arc<Services>,
    mut accepted: Accepted,
    sink: EventSink,
) {
    let generations = std::mem::take(&mut accepted.generations);
    let mut choices = vec![Choice::default(); generations.len()];
    let streamed = stream_events(&state, &accepted, generations, &mut choices, &sink).await;
    let mut record = generation::trace_body("/v1/chat/completions", accepted.seed, &choices);
    if let exrail_wire::TraceBody::Infer { finish_reason, .. } = &mut record {
        match &streamed {
            Ok(()) => {}
            Err(Cut::Gone) => *finish_reason = "cancelled".into(),
            Err(Cut::Failed(error)) => *finish_reason = error.to_string(),
        }
    }
    let traced = state.traces.append(&accepted.identity, &services.pins(), record).await;
    match (streamed, traced) {
        (Ok(()), Ok(())) => drop(finish_stream(&accepted, &choices, &sink).await),
        (Ok(()), Err(error)) => sink.fail(&error.into()).await,
        (Err(Cut::Failed(error)), _) => sink.fail(&error).await,
        (Err(Cut::Gone), _) => {}
    }
}

async fn stream_events(
    state: &AppState,
    accepted: &Accepted,
    generations: Vec<Generation>,
    choices: &mut [Choice],
    sink: &EventSink,
) -> Result<(), Cut> {
    let role = |index| {
        let content = Some(String::new());
        piece(index, Delta { role: Some("assistant"), content })
    };
    sink.send(&accepted.header.chunk((0..choices.len()).map(role).collect())).await?;
    let mut events = std::pin::pin!(generation::events(generations));
    let mut saw_token = false;
    loop {
        let next = tokio::select! {
            next = events.next() => next,
            () = sink.closed() => return Err(Cut::Gone),
        };
        let Some((index, event)) = next else { break };
        if matches!(event, Event::Token(_)) && !saw_token {
            saw_token = true;
            state.metrics.first_token.observe(accepted.received.elapsed());
        }
        let (text_from, logprobs_from) = (choices[index].text.len(), choices[index].logprobs.len());
        choices[index].take(event).map_err(Cut::Failed)?;
        let text = &choices[index].text[text_from..];
        let logprobs = &choices[index].logprobs[logprobs_from..];
        if text.is_empty() && logprobs.is_empty() {
            continue;
        }
        let mut news = piece(index, Delta { role: None, content: Some(text.into()) });
        news.logprobs = (!logprobs.is_empty()).then(|| chat_logprobs(logprobs));
        sink.send(&accepted.header.chunk(vec![news])).await?;
    }
    if choices.iter().any(|choice| choice.finished.is_none()) {
        return Err(Cut::Failed(ApiError::Lost));
    }
    Ok(())
}

async fn finish_stream(
    accepted: &Accepted,
    choices: &[Choice],
    sink: &EventSink,
) -> Result<(), Gone> {
    for (index, choice) in choices.iter().enumerate() {
        let mut last = piece(index, Delta::default());
        last.finish_reason =
            choice.finished.as_ref().map(|finished| generation::finish_reason(finished.finish));
        sink.send(&accepted.header.chunk(vec![last])).await?;
    }
    if accepted.include_usage {
        let mut chunk = accepted.header.chunk(Vec::new());
        chunk.usage = Some(generation::usage(choices));
        sink.send(&chunk).await?;
    }
    sink.done().await
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
