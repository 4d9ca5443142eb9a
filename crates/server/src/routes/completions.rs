//! `/v1/completions`: the raw route. The caller owns the format, so control-token literals in the
//! prompt are control tokens.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use exrail_engine::{Event, GenerateRequest, Generation, Sampling};
use exrail_text::Specials;
use exrail_wire::{
    CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse, Prompt,
    SamplingFields, TraceBody, Usage,
};
use futures_util::StreamExt;
use serde_json::Value;

use super::chat::{self, Header};
use crate::{
    AppState,
    auth::Caller,
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
    generation::{self, Choice, LogprobAt},
    sse::{self, EventSink, Gone},
    state::Services,
    trace::TraceIdentity,
    translate,
};

const ROUTE: &str = "/v1/completions";
/// Tokens generated when the request names no limit: the original API's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A request that was accepted. Choice i belongs to prompt `i / per_prompt`.
struct Accepted {
    generations: Vec<Generation>,
    per_prompt: usize,
    echo: Option<Vec<String>>,
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
    Body(mut request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let sampling = SamplingFields::take(&mut request.unknown)?;
    refuse_unknown("", &request.unknown)?;
    services.expect_generator(&request.model)?;
    let stream = request.stream.unwrap_or(false);
    let accepted = accept(&state, &caller, &services, request, &sampling, received)?;
    if stream {
        let (sink, response) = sse::channel();
        tokio::spawn(stream_text(state, services, accepted, sink));
        return Ok(response);
    }
    whole_text(&state, &services, accepted).await
}

fn accept(
    state: &AppState,
    caller: &Caller,
    services: &Services,
    request: CompletionRequest,
    sampling: &SamplingFields,
    received: Instant,
) -> Result<Accepted, ApiError> {
    let include_usage = chat::include_usage(request.stream, request.stream_options)?;
    let engine = &services.engine;
    let prompts = prompts(services, request.prompt)?;
    let per_prompt = translate::choices(request.n, state.limits.choices / prompts.len().max(1))?;
    let sampling = translate::sampling(sampling, Sampling::default())?;
    let seed = sampling.seed;
    let echo = request.echo.unwrap_or(false);
    if echo && request.logprobs.is_some() {
        return Err(ApiError::UnsupportedField {
            field: "logprobs".into(),
            why: "log-probabilities of an echoed prompt are not supported",
        });
    }
    let echo = echo.then(|| prompts.iter().map(|ids| engine.tokenizer().decode(ids)).collect());
    let stop = translate::stops(request.stop);
    let mut generations = Vec::new();
    for prompt in prompts {
        let max_tokens =
            translate::max_tokens(engine, request.max_tokens, DEFAULT_MAX_TOKENS, prompt.len());
        let generate = GenerateRequest {
            prompt,
            max_tokens,
            sampling: sampling.clone(),
            stop: stop.clone(),
            logprobs: request.logprobs,
            stop_at_eos: true,
        };
        generations.extend(generation::submit(engine, &generate, per_prompt)?);
    }
    let header = chat::header(services, "cmpl")?;
    let identity = chat::identity(&header, caller, request.user)?;
    Ok(Accepted { generations, per_prompt, echo, seed, include_usage, header, identity, received })
}

fn prompts(services: &Services, prompt: Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let tokenizer = services.engine.tokenizer();
    let encode = |text: String| {
        let ids = tokenizer.encode(&text, Specials::Parse);
        ids.map_err(|error| bad_prompt(error.to_string()))
    };
    let prompts: Vec<Vec<u32>> = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Ids(ids) => vec![ids],
        Prompt::Texts(texts) => texts.into_iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::ManyIds(many) => many,
    };
    if prompts.is_empty() {
        return Err(bad_prompt("expected at least one, found none".into()));
    }
    Ok(prompts)
}

fn bad_prompt(problem: String) -> ApiError {
    ApiError::BadField { field: "prompt".into(), problem }
}

impl Accepted {
    fn echo_of(&self, choice: usize) -> &str {
        self.echo.as_ref().map_or("", |prompts| prompts[choice / self.per_prompt].as_str())
    }

    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
        CompletionResponse {
            id: self.header.id.clone(),
            object: "text_completion",
            created: self.header.created,
            model: self.header.model.clone(),
            system_fingerprint: self.header.system_fingerprint.clone(),
            choices,
            usage,
        }
    }

    fn usage(&self, choices: &[Choice]) -> Usage {
        let per_prompt = choices.chunks(self.per_prompt).map(generation::usage);
        per_prompt.fold(Usage::default(), |sum, one| {
            Usage::new(
                sum.prompt_tokens + one.prompt_tokens,
                sum.completion_tokens + one.completion_tokens,
                sum.prompt_tokens_details.cached_tokens + one.prompt_tokens_details.cached_tokens,
            )
        })
    }
}

async fn whole_text(
    state: &AppState,
    services: &Services,
    mut accepted: Accepted,
) -> Result<Response, ApiError> {
    let generations = std::mem::take(&mut accepted.generations);
    let first_token = || state.metrics.first_token.observe(accepted.received.elapsed());
    let choices = generation::collect(generations, first_token).await?;
    let record = generation::trace_body(ROUTE, accepted.seed, &choices);
    state.traces.append(&accepted.identity, &services.pins(), record).await?;
    let usage = accepted.usage(&choices);
    let wire = choices.iter().enumerate().map(|(index, choice)| CompletionChoice {
        index,
        text: format!("{}{}", accepted.echo_of(index), choice.text),
        finish_reason: finish_reason(choice),
        logprobs: text_logprobs(&choice.logprobs),
    });
    Ok(Json(accepted.response(wire.collect(), Some(usage))).into_response())
}

fn finish_reason(choice: &Choice) -> Option<&'static str> {
    choice.finished.as_ref().map(|finished| generation::finish_reason(finished.finish))
}

enum Cut {
    Gone,
    Failed(ApiError),
}

impl From<Gone> for Cut {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

async fn stream_text(
    state: Arc<AppState>,
    services: Arc<Services>,
    mut accepted: Accepted,
    sink: EventSink,
) {
    let generations = std::mem::take(&mut accepted.generations);
    let mut choices = vec![Choice::default(); generations.len()];
    let streamed = stream_events(&state, &accepted, generations, &mut choices, &sink).await;
    let mut record = generation::trace_body(ROUTE, accepted.seed, &choices);
    if let TraceBody::Infer { finish_reason, .. } = &mut record {
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
    for index in 0..choices.len() {
        let echo = accepted.echo_of(index);
        if !echo.is_empty() {
            sink.send(&accepted.response(vec![news(index, echo, &[])], None)).await?;
        }
    }
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
        if !text.is_empty() || !logprobs.is_empty() {
            sink.send(&accepted.response(vec![news(index, text, logprobs)], None)).await?;
        }
    }
    if choices.iter().any(|choice| choice.finished.is_none()) {
        return Err(Cut::Failed(ApiError::Lost));
    }
    Ok(())
}

fn news(index: usize, text: &str, logprobs: &[LogprobAt]) -> CompletionChoice {
    let logprobs = text_logprobs(logprobs);
    CompletionChoice { index, text: text.into(), finish_reason: None, logprobs }
}

async fn finish_stream(
    accepted: &Accepted,
    choices: &[Choice],
    sink: &EventSink,
) -> Result<(), Gone> {
    for (index, choice) in choices.iter().enumerate() {
        let mut last = news(index, "", &[]);
        last.finish_reason = finish_reason(choice);
        sink.send(&accepted.response(vec![last], None)).await?;
    }
    if accepted.include_usage {
        sink.send(&accepted.response(Vec::new(), Some(accepted.usage(choices)))).await?;
    }
    sink.done().await
}

fn text_logprobs(logprobs: &[LogprobAt]) -> Option<CompletionLogprobs> {
    if logprobs.is_empty() {
        return None;
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut columns = CompletionLogprobs::default();
    for at in logprobs {
        columns.tokens.push(text(&at.logprob.bytes));
        columns.token_logprobs.push(at.logprob.logprob);
        columns.text_offset.push(at.text_offset);
        let top = at.logprob.top.iter();
        columns
            .top_logprobs
            .push(top.map(|other| (text(&other.bytes), Value::from(other.logprob))).collect());
    }
    Some(columns)
}
