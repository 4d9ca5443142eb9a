//! From running sequences to a response, for every route that generates: one way for a whole answer,
//! one for a stream. Both write the trace before they end (G-14).

use std::{convert::Infallible, sync::Arc, time::Instant};

use exrail_engine::{Event, Generation};
use exrail_wire::TraceBody;
use futures_util::StreamExt;
use serde::Serialize;

use crate::{
    AppState,
    error::ApiError,
    generation::{self, Choice, LogprobAt, RotatedAt},
    rotation,
    sse::{EventSink, Gone},
    state::Services,
    swap::Pass,
    trace::{TraceError, TraceIdentity},
};

/// A request that was accepted.
pub(crate) struct Job {
    pub(crate) route: &'static str,
    pub(crate) generations: Vec<Generation>,
    pub(crate) seed: u64,
    pub(crate) identity: TraceIdentity,
    pub(crate) received: Instant,
}

/// What is new in one choice.
pub(crate) struct News<'a> {
    pub(crate) index: usize,
    pub(crate) text: &'a str,
    pub(crate) logprobs: &'a [LogprobAt],
    pub(crate) rotations: &'a [RotatedAt],
}

/// How a route words its events.
pub(crate) trait Wording: Send + Sync + 'static {
    type Event: Serialize + Send;

    /// Before the first token.
    fn opening(&self, n_choices: usize) -> Vec<Self::Event>;
    /// New text, log-probabilities or rotations.
    fn news(&self, news: &News<'_>) -> Self::Event;
    /// Finish reasons and, if asked for, the usage.
    fn closing(&self, choices: &[Choice]) -> Vec<Self::Event>;
}

/// Waits for all choices and writes the trace, also when nobody waits for them any more.
pub(crate) async fn whole(
    state: Arc<AppState>,
    pass: Pass,
    job: Job,
) -> Result<Vec<Choice>, ApiError> {
    // Dropped with this future, as soon as the client has gone.
    let (_waits, hung_up) = flume::bounded(0);
    let task = tokio::spawn(gather(state, pass, job, hung_up));
    task.await.map_err(|_| ApiError::Internal("answer task"))?
}

async fn gather(
    state: Arc<AppState>,
    pass: Pass,
    mut job: Job,
    hung_up: flume::Receiver<Infallible>,
) -> Result<Vec<Choice>, ApiError> {
    let generations = std::mem::take(&mut job.generations);
    let mut choices = vec![Choice::default(); generations.len()];
    let first_token = || state.metrics.first_token.observe(job.received.elapsed());
    let gathered = tokio::select! {
        gathered = generation::collect(generations, &mut choices, first_token) => {
            gathered.map_err(|error| pass.explain(error))
        }
        _ = hung_up.recv_async() => Err(ApiError::HungUp),
    };
    let mut record = generation::trace_body(job.route, job.seed, &choices);
    match (&gathered, &mut record) {
        (Err(ApiError::HungUp), TraceBody::Infer { finish_reason, .. }) => {
            *finish_reason = CANCELLED.into();
        }
        // The layer around the routes records a failure.
        (Err(_), _) => return gathered.map(|()| choices),
        (Ok(()), _) => {}
    }
    let rotated = rotation::traced(job.route, &choices);
    append(&state, &pass, &job.identity, rotated, record).await?;
    gathered.map(|()| choices)
}

/// The reason in the record of an answer whose client has gone.
const CANCELLED: &str = "cancelled";

/// Writes the records of a job, that of its end last, as soon as its pins are known.
async fn append(
    state: &AppState,
    services: &Services,
    identity: &TraceIdentity,
    rotated: Vec<TraceBody>,
    record: TraceBody,
) -> Result<(), TraceError> {
    let pins = services.pins().await?;
    for body in rotated.into_iter().chain([record]) {
        state.traces.append(identity, &pins, body).await?;
    }
    Ok(())
}

/// Why a stream ended early.
enum Cut {
    Gone,
    Failed(ApiError),
}

impl Cut {
    fn explained(self, pass: &Pass) -> Self {
        match self {
            Self::Gone => Self::Gone,
            Self::Failed(error) => Self::Failed(pass.explain(error)),
        }
    }
}

impl From<Gone> for Cut {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// Sends tokens as they come. The end is told only after the trace is written.
pub(crate) async fn stream(
    state: Arc<AppState>,
    pass: Pass,
    mut job: Job,
    wording: impl Wording,
    sink: EventSink,
) {
    let generations = std::mem::take(&mut job.generations);
    let mut choices = vec![Choice::default(); generations.len()];
    let streamed = pass_on(&state, &job, generations, &mut choices, &wording, &sink).await;
    let streamed = streamed.map_err(|cut| cut.explained(&pass));
    let mut record = generation::trace_body(job.route, job.seed, &choices);
    if let TraceBody::Infer { finish_reason, .. } = &mut record {
        match &streamed {
            Ok(()) => {}
            Err(Cut::Gone) => *finish_reason = CANCELLED.into(),
            Err(Cut::Failed(error)) => *finish_reason = error.to_string(),
        }
    }
    let rotated = rotation::traced(job.route, &choices);
    let traced = append(&state, &pass, &job.identity, rotated, record);
    let traced = sink.alive_while(traced).await;
    match (streamed, traced) {
        (Ok(()), Ok(())) => drop(close(&choices, &wording, &sink).await),
        (Ok(()), Err(error)) => sink.fail(&error.into()).await,
        (Err(Cut::Failed(error)), _) => sink.fail(&error).await,
        (Err(Cut::Gone), _) => {}
    }
}

async fn pass_on(
    state: &AppState,
    job: &Job,
    generations: Vec<Generation>,
    choices: &mut [Choice],
    wording: &impl Wording,
    sink: &EventSink,
) -> Result<(), Cut> {
    for event in wording.opening(choices.len()) {
        sink.send(&event).await?;
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
            state.metrics.first_token.observe(job.received.elapsed());
        }
        let choice = &mut choices[index];
        let (text_from, logprobs_from) = (choice.text.len(), choice.logprobs.len());
        let rotations_from = choice.rotations.len();
        choice.take(event).map_err(Cut::Failed)?;
        let text = &choice.text[text_from..];
        let logprobs = &choice.logprobs[logprobs_from..];
        let rotations = &choice.rotations[rotations_from..];
        if !text.is_empty() || !logprobs.is_empty() || !rotations.is_empty() {
            sink.send(&wording.news(&News { index, text, logprobs, rotations })).await?;
        }
    }
    if choices.iter().any(|choice| choice.finished.is_none()) {
        return Err(Cut::Failed(ApiError::Lost));
    }
    Ok(())
}

async fn close(choices: &[Choice], wording: &impl Wording, sink: &EventSink) -> Result<(), Gone> {
    for event in wording.closing(choices) {
        sink.send(&event).await?;
    }
    sink.done().await
}
