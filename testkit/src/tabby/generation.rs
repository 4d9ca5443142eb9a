//! A generation from its body to its answer.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};

use super::{
    Shared, TabbyFaults, answers, catalog,
    loading::{Ended, Job},
    lock,
    refusal::Refusal,
    request::{Ask, Constraint, Kind, Prompt},
    schema, streams,
    tokens::{self, Tokens},
    writing::{self, Call, Shape, Written},
};
use crate::Random;

/// A generation that has passed every check, with what it is going to say.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) choices: Vec<Written>,
    pub(super) n_prompt_tokens: usize,
    pub(super) include_usage: bool,
    pub(super) logprobs: Option<usize>,
    /// The real server's streams fail for want of a `max_tokens`.
    pub(super) lacks_limit: bool,
    pub(super) job: Job,
}

/// What a run took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) prompt: Duration,
    pub(super) completion: Duration,
}

/// `POST /v1/chat/completions` and `/v1/completions`.
pub(super) async fn generate(
    shared: Arc<Shared>,
    kind: Kind,
    mut body: Map<String, Value>,
) -> Result<Response, Refusal> {
    shared.remember_body(&body);
    catalog::apply_overrides(&lock(&shared.overrides), &mut body);
    let ask = Ask::read(kind, &body)?;
    let job = shared.place.begin()?;
    let run = Run::plan(&shared, kind, &ask, job)?;
    shared.generations.fetch_add(1, Ordering::SeqCst);
    if ask.streams {
        Ok(streams::answer(shared, run))
    } else {
        plain(&shared, run).await.map(IntoResponse::into_response)
    }
}

impl Run {
    fn plan(shared: &Shared, kind: Kind, ask: &Ask, job: Job) -> Result<Run, Refusal> {
        let faults = shared.faults();
        let (prompts, call) = prompts(ask, &job)?;
        let shape = shape(ask, call, &faults)?;
        let context = job.model.context;
        let mut n_prompt_tokens = 0;
        let mut choices = Vec::new();
        for prompt in &prompts {
            let n_tokens = tokens::split(prompt).len();
            if n_tokens > context {
                let text =
                    format!("Prompt length {n_tokens} is greater than max_seq_len {context}");
                return Err(Refusal::TooLong(text));
            }
            n_prompt_tokens += n_tokens;
            for _ in 0..ask.n_choices {
                // A quirk of the real server: later choices of a streamed completion get longer.
                let extra =
                    if ask.streams && kind == Kind::Completion { 5 * choices.len() } else { 0 };
                let room = (context - n_tokens).max(1);
                let limit = match ask.max_tokens.unwrap_or(0) + extra {
                    0 => room,
                    limit => limit.min(room),
                };
                let mut random = random(shared, ask, prompt);
                let ids: &mut Tokens = &mut lock(&shared.tokens);
                choices.push(writing::write(ask, &shape, &mut random, limit, ids));
            }
        }
        Ok(Run {
            kind,
            id: id(shared),
            choices,
            n_prompt_tokens,
            include_usage: ask.include_usage,
            logprobs: ask.logprobs,
            lacks_limit: ask.streams && kind == Kind::Completion && ask.max_tokens.is_none(),
            job,
        })
    }

    /// How many tokens the longest choice has.
    pub(super) fn n_steps(&self) -> usize {
        self.choices.iter().map(|choice| choice.tokens.len()).max().unwrap_or(0)
    }

    /// What an abort says.
    pub(super) fn abort_text(&self) -> String {
        let what = match self.kind {
            Kind::Chat => "Chat completion",
            Kind::Completion => "Completion",
        };
        let id = &self.id;
        format!(
            "{what} {id} aborted. Maybe the model was unloaded? Please check the server console."
        )
    }
}

async fn plain(shared: &Shared, mut run: Run) -> Result<Json<Value>, Refusal> {
    let token_time = shared.options.token_time;
    let n_steps = u32::try_from(run.n_steps()).unwrap_or(u32::MAX);
    let begin = Instant::now();
    let ran = async {
        run.job.warm_up(shared.faults().slow_first).await?;
        let first = Instant::now();
        run.job.pause(token_time.saturating_mul(n_steps)).await?;
        Ok(Times { prompt: first - begin, completion: first.elapsed() })
    };
    let times = match ran.await {
        Ok(times) => times,
        Err(Ended) if shared.faults().aborts_as_clean => {
            run.choices.iter_mut().for_each(|choice| *choice = Written::aborted());
            Times { prompt: begin.elapsed(), completion: Duration::ZERO }
        }
        Err(Ended) => {
            let text = run.abort_text();
            shared.fell_ill(&text);
            return Err(Refusal::unavailable(text));
        }
    };
    Ok(Json(answers::whole(&run, times, &mut lock(&shared.tokens))))
}

/// The texts to be continued, and the call that a chat asks for.
fn prompts(ask: &Ask, job: &Job) -> Result<(Vec<String>, Option<Call>), Refusal> {
    match &ask.prompt {
        Prompt::Texts(texts) => Ok((texts.clone(), None)),
        Prompt::Chat(_) if !job.model.has_template.load(Ordering::SeqCst) => {
            let text = "Chat completions are disabled because a prompt template is not set.";
            Err(Refusal::unprocessable(text))
        }
        Prompt::Chat(chat) => Ok((vec![chat.render()?], writing::call(chat))),
    }
}

/// What the text is going to be, with this moment's faults.
fn shape(ask: &Ask, call: Option<Call>, faults: &TabbyFaults) -> Result<Shape, Refusal> {
    let checked = match &ask.constraint {
        None => Ok(()),
        Some(Constraint::Schema(schema)) => schema::check(schema),
        Some(Constraint::Pattern(pattern)) => schema::check_pattern(pattern),
        Some(Constraint::TooMuch) => {
            let text =
                "the double obeys one json_schema or one regex_pattern, and no grammar_string";
            return Err(Refusal::Detail(StatusCode::NOT_IMPLEMENTED, text.into()));
        }
    };
    if let Err(wrong) = checked {
        return if faults.drops_bad_schema {
            Ok(writing::shape(None, call))
        } else {
            Err(Refusal::bad(format!("the constraint does not compile: {wrong}")))
        };
    }
    match &ask.constraint {
        Some(Constraint::Schema(_)) if faults.ignores_schema => Ok(writing::shape(None, call)),
        Some(Constraint::Schema(schema)) if faults.invalid_as_stop => {
            Ok(Shape::Opened(schema::first_property(schema).into()))
        }
        constraint => Ok(writing::shape(constraint.as_ref(), call)),
    }
}

/// Greedy texts follow from the prompt alone; of sampled ones each is another.
fn random(shared: &Shared, ask: &Ask, prompt: &str) -> Random {
    let n_sampled = if ask.greedy { 0 } else { 1 + shared.sampled.fetch_add(1, Ordering::SeqCst) };
    Random::named(n_sampled, prompt)
}

/// 32 hexadecimal digits, as the real server's.
fn id(shared: &Shared) -> String {
    let n_generations = shared.generations.load(Ordering::SeqCst) as u64;
    let mut random = Random::named(n_generations, &jiff::Timestamp::now().to_string());
    format!("{:016x}{:016x}", random.u64(), random.u64())
}
