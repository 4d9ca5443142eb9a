//! `/v1/completions`: the raw route. The caller owns the format, so control-token literals in the
//! prompt are control tokens.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use exrail_engine::{GenerateRequest, Sampling};
use exrail_text::{OddCharacters, Specials, tools::ThoughtLead};
use exrail_wire::{
    CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse, Prompt, Usage,
};
use serde_json::Value;

use super::chat::{self, Header};
use crate::{
    AppState,
    auth::{Caller, KeyFolder},
    error::ApiError,
    extract::{Body, Ready},
    generation::{self, Choice, LogprobAt},
    otlp::Said,
    relay::{self, Job, News, Wording},
    rotation,
    sessions::{self, Claim, Origin, Turn},
    sse,
    state::Services,
    structured::{Demand, Opening, Part, Structured},
    translate::{self, Arrival, Fields},
};

const ROUTE: &str = "/v1/completions";
/// Tokens generated when the request names no limit: the original API's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The events of text completions. Choice i belongs to prompt `i / per_prompt`.
struct TextWording {
    header: Header,
    per_prompt: usize,
    echo: Option<Vec<String>>,
    /// Ids of each prompt, when they are to be told.
    told_prompts: Option<Vec<Vec<u32>>>,
    include_usage: bool,
}

pub(crate) async fn complete(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    ready: Ready,
    Body(mut request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let fields = Fields::take(&mut request.unknown)?;
    fields.refuse_leak_guard(true, "a text completion has no system message to guard")?;
    fields.tool_taint(false)?;
    let arrival = fields.arrival(received, &caller, &state.limits)?;
    let pass = ready.generator(Some(&request.model), &arrival.asking).await?;
    let stream = request.stream.unwrap_or(false);
    let origin = ready.origin(&caller, folder);
    let accepted = accept(&state, &pass, request, &fields, (arrival, &origin)).await;
    let (mut job, wording) = accepted.map_err(|error| pass.explain(error))?;
    let spans = ready.spans();
    spans.said(|| said(&pass, &job));
    job.spanned(spans, &wording.header.model, stream);
    if stream {
        let (sink, response) = sse::channel();
        tokio::spawn(relay::stream(state, pass, job, wording, sink));
        return Ok(response);
    }
    let choices = relay::whole(state, pass, job).await?;
    Ok(Json(wording.whole(&choices)).into_response())
}

async fn accept(
    state: &AppState,
    services: &Services,
    request: CompletionRequest,
    fields: &Fields,
    (arrival, origin): (Arrival, &Origin),
) -> Result<(Job, TextWording), ApiError> {
    let Arrival { received, asking } = arrival;
    refuse_pairs(&request)?;
    fields
        .refuse_constraints("a text completion has no place for rules; use /v1/chat/completions")?;
    let include_usage = chat::include_usage(request.stream, request.stream_options)?;
    let engine = &services.engine;
    let prompts = prompts(services, request.prompt)?;
    let limit = state.limits.choices;
    if prompts.len() > limit {
        return Err(bad_prompt(format!("expected at most {limit}, found {}", prompts.len())));
    }
    let per_prompt = translate::choices(request.n, limit / prompts.len())?;
    let sampling = translate::sampling(&fields.sampling, Sampling::default())?;
    let seed = sampling.seed;
    let texts = || prompts.iter().map(|ids| engine.tokenizer().decode(ids)).collect();
    let echo = request.echo.unwrap_or(false).then(texts);
    let told_prompts = request.return_token_ids.unwrap_or(false).then(|| prompts.clone());
    let stop = translate::stops(request.stop);
    let rotation = rotation::of_text(engine, request.rotation.as_ref())?;
    let loop_guard = fields.loop_guard(&state.limits, request.stream)?;
    let demand = Demand::of_text(&fields.structured)?;
    let turn = turn(state, services, origin, fields.claim()?, (&prompts, &demand)).await?;
    // Thoughts have no place of their own here: they are text.
    let format = services.tool_format().clone();
    let opening = Opening { format, lead: ThoughtLead::Absent };
    let Structured { grammar, lock } = demand.compile(engine, &state.compiling, opening).await?;
    let lock = lock.map(Arc::new);
    let mut requests = Vec::new();
    for prompt in prompts {
        let max_tokens =
            translate::max_tokens(engine, request.max_tokens, DEFAULT_MAX_TOKENS, prompt.len());
        let generate = GenerateRequest {
            prompt,
            max_tokens,
            sampling: sampling.clone(),
            stop: stop.clone(),
            logprobs: request.logprobs,
            entropy: false,
            stop_at_eos: true,
            tenant: asking.tenant.clone(),
            prefix_cache: fields.prefix_cache(),
            priority: fields.priority(),
            deadline: asking.deadline,
            loop_guard,
            rotation: rotation.clone(),
            grammar: grammar.clone(),
        };
        requests.extend(generation::requests(&generate, per_prompt));
    }
    let generations = generation::submit(engine, &requests)?;
    let header = chat::header(services, "cmpl")?.of(turn.as_ref());
    let identity = chat::identity(&header, asking.tenant, request.user)?;
    let identity = Turn::identity(turn.as_ref(), identity);
    let odd = OddCharacters::default(); // A raw prompt may be ids, and is its caller's own.
    let job = Job {
        route: ROUTE,
        generations,
        lock,
        requests,
        seed,
        identity,
        received,
        leak: None,
        rules: None,
        odd,
        turn,
    };
    Ok((job, TextWording { header, per_prompt, echo, told_prompts, include_usage }))
}

/// The prompts as the model reads them, each once for each of its choices.
fn said(services: &Services, job: &Job) -> Vec<Said> {
    let text = |request: &GenerateRequest| services.engine.tokenizer().decode(&request.prompt);
    let said = job.requests.iter().map(text);
    said.map(|text| Said { role: "user".into(), text }).collect()
}

/// Options that are not served together.
fn refuse_pairs(request: &CompletionRequest) -> Result<(), ApiError> {
    let refuse = |field: &str, why| Err(ApiError::UnsupportedField { field: field.into(), why });
    if request.echo == Some(true) && request.logprobs.is_some() {
        return refuse("logprobs", "log-probabilities of an echoed prompt are not supported");
    }
    if request.return_token_ids == Some(true) && request.stream == Some(true) {
        return refuse("return_token_ids", "the ids of a stream's tokens are not told");
    }
    Ok(())
}

/// The turn of a session, which goes on with one prompt.
async fn turn(
    state: &AppState,
    services: &Services,
    origin: &Origin,
    claim: Option<Claim>,
    (prompts, demand): (&[Vec<u32>], &Demand),
) -> Result<Option<Turn>, ApiError> {
    let shape = sessions::of_text(demand);
    match prompts {
        [prompt] => sessions::begin(state, services, origin, claim, (prompt, shape)).await,
        _ if claim.is_none() => Ok(None),
        _ => Err(bad_prompt("expected one, which goes on from `session`, found several".into())),
    }
}

pub(crate) fn prompts(services: &Services, prompt: Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
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

impl TextWording {
    fn echo_of(&self, choice: usize) -> &str {
        self.echo.as_ref().map_or("", |prompts| prompts[choice / self.per_prompt].as_str())
    }

    /// The ids of a choice's prompt, when they are to be told.
    fn prompt_of(&self, choice: usize) -> Option<&[u32]> {
        Some(&self.told_prompts.as_ref()?[choice / self.per_prompt])
    }

    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
        CompletionResponse {
            id: self.header.id.clone(),
            object: "text_completion",
            created: self.header.created,
            model: self.header.model.clone(),
            system_fingerprint: self.header.system_fingerprint(),
            context_id: self.header.context_id.clone(),
            choices,
            usage,
        }
    }

    fn whole(&self, choices: &[Choice]) -> CompletionResponse {
        let wire = choices.iter().enumerate().map(|(index, choice)| {
            let told = choice.told();
            CompletionChoice {
                index,
                text: format!("{}{}", self.echo_of(index), choice.text),
                finish_reason: told.finish_reason,
                exrail_finish_reason: told.exrail_finish_reason,
                logprobs: text_logprobs(&choice.logprobs),
                prompt_token_ids: self.prompt_of(index).map(<[u32]>::to_vec),
                token_ids: self.told_prompts.is_some().then(|| choice.ids.clone()),
                rotations: rotation::records(&choice.rotations),
                rolled_back_tokens: choice.rolled_back,
            }
        });
        self.response(wire.collect(), Some(self.usage(choices)))
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

impl Wording for TextWording {
    type Event = CompletionResponse;

    fn opening(&self, n_choices: usize) -> Vec<CompletionResponse> {
        let echoed = (0..n_choices).filter(|&index| !self.echo_of(index).is_empty());
        echoed
            .map(|index| self.response(vec![piece(index, self.echo_of(index), &[])], None))
            .collect()
    }

    fn news(&self, news: &News<'_>) -> Vec<CompletionResponse> {
        // Nothing is told apart here, so that there is no other part than text.
        let text = news.parts.iter().map(|part| match part {
            Part::Content(text) | Part::Reasoning(text) => text.as_str(),
            Part::Call(call) => call.arguments.as_str(),
        });
        let mut piece = piece(news.index, &text.collect::<String>(), news.logprobs);
        piece.rotations = rotation::records(news.rotations);
        vec![self.response(vec![piece], None)]
    }

    fn closing(&self, choices: &[Choice]) -> Vec<CompletionResponse> {
        let last = |(index, choice): (usize, &Choice)| {
            let mut last = piece(index, "", &[]);
            let told = choice.told();
            last.finish_reason = told.finish_reason;
            last.exrail_finish_reason = told.exrail_finish_reason;
            self.response(vec![last], None)
        };
        let mut events: Vec<_> = choices.iter().enumerate().map(last).collect();
        if self.include_usage {
            events.push(self.response(Vec::new(), Some(self.usage(choices))));
        }
        events
    }
}

fn piece(index: usize, text: &str, logprobs: &[LogprobAt]) -> CompletionChoice {
    let logprobs = text_logprobs(logprobs);
    CompletionChoice {
        index,
        text: text.into(),
        finish_reason: None,
        exrail_finish_reason: None,
        logprobs,
        prompt_token_ids: None,
        token_ids: None,
        rotations: Vec::new(),
        rolled_back_tokens: None,
    }
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
        // The format names alternatives by their text; of those with the same one the likeliest counts.
        let mut named = serde_json::Map::new();
        for other in &at.logprob.top {
            named.entry(text(&other.bytes)).or_insert_with(|| Value::from(other.logprob));
        }
        columns.top_logprobs.push(named);
    }
    Some(columns)
}
