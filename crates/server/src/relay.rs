//! From running sequences to a response, for every route that generates: one way for a whole answer,
//! one for a stream. Both write the trace before they end (G-14).

use std::{convert::Infallible, sync::Arc, time::Instant};

use exrail_engine::{Event, GenerateRequest, Generation};
use exrail_text::OddCharacters;
use exrail_verify::LeakGuard;
use exrail_wire::TraceBody;
use futures_util::StreamExt;
use serde::Serialize;

use crate::{
    AppState,
    error::ApiError,
    generation::{self, Choice, LogprobAt, RotatedAt},
    leak::{self, LEAK},
    odd,
    otlp::{Asked, RequestSpans, Stage},
    rotation, rules,
    rules::HeldRules,
    sessions::Turn,
    sse::{self, EventSink, Gone},
    state::Services,
    structured::{self, Broken, Gate, Hold, Lock, Part, Reply, settle},
    swap::Pass,
    trace::{TraceError, TraceIdentity},
};

/// A request that was accepted.
pub(crate) struct Job {
    pub(crate) route: &'static str,
    pub(crate) generations: Vec<Generation>,
    /// What all choices are held to.
    pub(crate) lock: Option<Arc<Lock>>,
    /// The request of each choice, for a further attempt; empty where nothing can be wrong.
    pub(crate) requests: Vec<GenerateRequest>,
    pub(crate) seed: u64,
    pub(crate) identity: TraceIdentity,
    pub(crate) received: Instant,
    /// Keeps the answer from repeating the system messages.
    pub(crate) leak: Option<Arc<LeakGuard>>,
    /// The hard rules of the request, which are in its prompt.
    pub(crate) rules: Option<Arc<HeldRules>>,
    /// What the messages have of characters that hide something.
    pub(crate) odd: OddCharacters,
    /// The turn of the session that it began from.
    pub(crate) turn: Option<Turn>,
}

impl Job {
    /// The same for a request with these spans.
    pub(crate) fn spanned(&mut self, spans: RequestSpans, model: &str, is_stream: bool) {
        spans.asked(|| Asked::of(&self.requests, model, is_stream));
        self.identity.spans = spans;
    }

    /// Tells the spans of a job whose records are written what was released. Of one that failed it is not known what
    /// its client has.
    fn released(&self, choices: &[Choice]) {
        let spans = &self.identity.spans;
        spans.finished(choices.iter().filter_map(|choice| choice.told().finish_reason));
        spans.told(|| choices.iter().map(Choice::released).collect());
    }

    /// Choices that have not begun.
    fn choices(&self, n: usize) -> Vec<Choice> {
        vec![Choice::held_to(self.lock.as_ref(), self.rules.as_ref()); n]
    }
}

/// What is new in one choice.
pub(crate) struct News<'a> {
    pub(crate) index: usize,
    pub(crate) parts: &'a [Part],
    pub(crate) logprobs: &'a [LogprobAt],
    pub(crate) rotations: &'a [RotatedAt],
}

/// How a route words its events.
pub(crate) trait Wording: Send + Sync + 'static {
    type Event: Serialize + Send;

    /// Before the first token.
    fn opening(&self, n_choices: usize) -> Vec<Self::Event>;
    /// New parts, log-probabilities or rotations.
    fn news(&self, news: &News<'_>) -> Vec<Self::Event>;
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
    let mut choices = job.choices(generations.len());
    let turn = job.turn.take();
    let to_the_end = async {
        conforming(&state, &pass, &job, generations, &mut choices).await?;
        match turn {
            Some(turn) => turn.end().await,
            None => Ok(()),
        }
    };
    let begun = Instant::now();
    let gathered = tokio::select! {
        gathered = to_the_end => gathered.map_err(|error| pass.explain(error)),
        _ = hung_up.recv_async() => Err(ApiError::HungUp),
    };
    job.identity.spans.spent(Stage::Generate, (begun, Instant::now()));
    let mut record = generation::trace_body(job.route, job.seed, &choices);
    match (&gathered, &mut record) {
        (Err(error @ ApiError::HungUp), TraceBody::Infer { finish_reason, .. }) => {
            job.identity.spans.failed(error.code());
            *finish_reason = CANCELLED.into();
        }
        // The layer around the routes records a failure.
        (Err(_), _) => return gathered.map(|()| choices),
        (Ok(()), _) => {}
    }
    let before = noted(&state, &job, &choices);
    append(&state, &pass, &job.identity, before, record).await?;
    gathered?;
    job.released(&choices);
    Ok(choices)
}

/// All choices, each whole and held to its lock.
async fn conforming(
    state: &AppState,
    services: &Services,
    job: &Job,
    generations: Vec<Generation>,
    choices: &mut [Choice],
) -> Result<(), ApiError> {
    let first_token = || state.metrics.first_token.observe(job.received.elapsed());
    generation::collect(generations, choices, first_token).await?;
    let leak = job.leak.as_ref();
    for (index, choice) in choices.iter_mut().enumerate() {
        match &job.lock {
            None => leak::screen(leak, choice),
            Some(lock) => {
                let (hold, request) = (Hold { lock, leak }, job.requests.get(index));
                settle(state, &services.engine, hold, request, choice, None).await?;
            }
        }
        if let Some(rules) = &job.rules {
            rules.check(choice)?;
        }
    }
    Ok(())
}

/// The reason in the record of an answer whose client has gone.
const CANCELLED: &str = "cancelled";

/// The records of a job before that of its end; guards that fired are counted.
fn noted(state: &AppState, job: &Job, choices: &[Choice]) -> Vec<TraceBody> {
    let leaks = leak::traced(choices);
    leaks.iter().for_each(|_| state.metrics.count_guard(LEAK));
    let odd = odd::traced(job.odd);
    odd.iter().for_each(|_| state.metrics.count_guard(odd::GUARD));
    odd.into_iter().chain(rotation::traced(job.route, choices)).chain(leaks).collect()
}

/// Writes the records of a job, that of its end last, as soon as its pins are known.
async fn append(
    state: &AppState,
    services: &Services,
    identity: &TraceIdentity,
    before: Vec<TraceBody>,
    record: TraceBody,
) -> Result<(), TraceError> {
    let pins = services.pins().await?;
    for body in before.into_iter().chain([record]) {
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
    let mut choices = job.choices(generations.len());
    let turn = job.turn.take();
    let sending =
        Sending { state: &state, services: &pass, job: &job, wording: &wording, sink: &sink };
    let begun = Instant::now();
    let streamed = sending.pass_on(generations, &mut choices).await;
    let spans = job.identity.spans.clone();
    spans.spent(Stage::Generate, (begun, Instant::now()));
    let streamed = sending.turned(streamed, turn).await.map_err(|cut| cut.explained(&pass));
    let mut record = generation::trace_body(job.route, job.seed, &choices);
    if let TraceBody::Infer { finish_reason, .. } = &mut record {
        match &streamed {
            Ok(()) => {}
            Err(Cut::Gone) => {
                spans.failed(ApiError::HungUp.code());
                *finish_reason = CANCELLED.into();
            }
            Err(Cut::Failed(error)) => {
                spans.failed(error.code());
                *finish_reason = error.code().into();
            }
        }
    }
    let mut before = noted(&state, &job, &choices);
    if let Err(Cut::Failed(error)) = &streamed
        && let Some(fired) = rules::traced(error)
    {
        state.metrics.count_guard(error.code());
        before.push(fired);
    }
    let traced = append(&state, &pass, &job.identity, before, record);
    let traced = sink.alive_while(traced).await;
    match (streamed, traced) {
        (Ok(()), Ok(())) => {
            job.released(&choices);
            // Its spans are on their way before the client knows of its end.
            drop((job, spans));
            drop(close(&choices, &wording, &sink).await);
        }
        (Ok(()), Err(error)) => {
            let error = ApiError::from(error);
            spans.failed(error.code());
            sink.fail(&error).await;
        }
        (Err(Cut::Failed(error)), _) => sink.fail(&error).await,
        (Err(Cut::Gone), _) => {}
    }
}

/// A stream on its way.
struct Sending<'a, W> {
    state: &'a AppState,
    services: &'a Services,
    job: &'a Job,
    wording: &'a W,
    sink: &'a EventSink,
}

/// How much of a choice was told before an event.
#[derive(Clone, Copy)]
struct Before {
    text: usize,
    logprobs: usize,
    rotations: usize,
}

impl Before {
    fn of(choice: &Choice) -> Before {
        let (text, logprobs) = (choice.text.len(), choice.logprobs.len());
        Before { text, logprobs, rotations: choice.rotations.len() }
    }
}

impl<W: Wording> Sending<'_, W> {
    async fn pass_on(
        &self,
        generations: Vec<Generation>,
        choices: &mut [Choice],
    ) -> Result<(), Cut> {
        for event in self.wording.opening(choices.len()) {
            self.sink.send(&event).await?;
        }
        let mut gates: Vec<Option<Gate>> =
            choices.iter().map(|_| self.job.lock.as_ref().map(Lock::gate)).collect();
        let mut watches: Vec<Option<leak::Watch>> =
            choices.iter().map(|_| self.job.leak.as_ref().map(leak::Watch::new)).collect();
        let of_rules = |rules: &Arc<HeldRules>| HeldRules::watch(rules, self.job.lock.as_ref());
        let mut ruled: Vec<Option<rules::Watch>> =
            choices.iter().map(|_| self.job.rules.as_ref().map(of_rules)).collect();
        let is_held_back = self.job.lock.is_some() || self.job.rules.is_some();
        let generations: Vec<_> = generations.into_iter().map(Arc::new).collect();
        let mut events = std::pin::pin!(generation::events(generations.clone()));
        let mut heartbeats = sse::heartbeats();
        let mut saw_token = false;
        loop {
            let next = tokio::select! {
                next = events.next() => next,
                () = self.sink.closed() => return Err(Cut::Gone),
                // What is held back is no sign of life.
                _ = heartbeats.tick(), if is_held_back => {
                    self.sink.heartbeat().await?;
                    continue;
                }
            };
            let Some((index, event)) = next else { break };
            if matches!(event, Event::Token(_)) && !saw_token {
                saw_token = true;
                self.state.metrics.first_token.observe(self.job.received.elapsed());
            }
            let choice = &mut choices[index];
            let before = Before::of(choice);
            choice.take(event).map_err(Cut::Failed)?;
            let text = match &mut watches[index] {
                None => choice.text[before.text..].to_owned(),
                Some(watch) => watch.tell(choice, before.text),
            };
            if choice.leak.is_some() && choice.finished.is_none() {
                // Nobody gets what follows.
                generations[index].cancel();
            }
            let way = (index, ruled[index].as_mut());
            match &mut gates[index] {
                None => self.free(way, text, before, choice).await?,
                Some(gate) => self.locked(way, &text, (before, gate), choice).await?,
            }
        }
        if choices.iter().any(|choice| choice.finished.is_none()) {
            return Err(Cut::Failed(ApiError::Lost));
        }
        Ok(())
    }

    /// The end of the stream, which ends its turn: before anybody is told of it, so that the next one may begin.
    async fn turned(&self, streamed: Result<(), Cut>, turn: Option<Turn>) -> Result<(), Cut> {
        let (Ok(()), Some(turn)) = (&streamed, turn) else { return streamed };
        let ended = self.sink.alive_while(turn.end()).await;
        ended.map_err(|error| {
            self.state.metrics.count_guard(error.code());
            Cut::Failed(error)
        })
    }

    /// What is new goes on as it is.
    async fn free(
        &self,
        (index, ruled): (usize, Option<&mut rules::Watch>),
        text: String,
        before: Before,
        choice: &Choice,
    ) -> Result<(), Cut> {
        let part = (!text.is_empty()).then_some(Part::Content(text));
        let parts = allowed(ruled, part.into_iter().collect(), choice)?;
        let logprobs = &choice.logprobs[before.logprobs..];
        let rotations = &choice.rotations[before.rotations..];
        self.tell(&News { index, parts: &parts, logprobs, rotations }).await
    }

    /// What is new goes through the lock.
    async fn locked(
        &self,
        (index, ruled): (usize, Option<&mut rules::Watch>),
        text: &str,
        (before, gate): (Before, &mut Gate),
        choice: &mut Choice,
    ) -> Result<(), Cut> {
        let passed = gate.push(text).and_then(|mut parts| {
            if choice.finished.is_some() {
                parts.extend(gate.finish(choice.finish())?);
            }
            Ok(parts)
        });
        let parts = match passed {
            Ok(parts) => {
                let reply = choice.reply.get_or_insert_default();
                parts.iter().for_each(|part| reply.add(part.clone()));
                parts
            }
            Err(broken) => self.repaired(index, gate, broken, choice).await?,
        };
        let parts = allowed(ruled, parts, choice)?;
        let is_plain = choice.lock.as_ref().is_some_and(|lock| lock.is_plain());
        let logprobs = match (is_plain, &choice.finished) {
            // A further attempt may have fewer of both than were there before.
            (true, _) => choice.logprobs.get(before.logprobs..).unwrap_or_default(),
            (false, Some(_)) => choice.told_logprobs(),
            (false, None) => &[],
        };
        let rotations = choice.rotations.get(before.rotations..).unwrap_or_default();
        self.tell(&News { index, parts: &parts, logprobs, rotations }).await
    }

    /// An answer of which nothing went on yet can be asked for again; another one is cut here.
    async fn repaired(
        &self,
        index: usize,
        gate: &Gate,
        broken: Broken,
        choice: &mut Choice,
    ) -> Result<Vec<Part>, Cut> {
        let is_over = choice.finished.is_some();
        let Some(lock) = choice.lock.clone().filter(|_| is_over && !gate.has_told()) else {
            self.state.metrics.count_guard(structured::GUARD);
            let Broken(problem) = broken;
            return Err(Cut::Failed(ApiError::NotConforming { problem, attempts: 1 }));
        };
        let request = self.job.requests.get(index);
        let hold = Hold { lock: &lock, leak: self.job.leak.as_ref() };
        let engine = &self.services.engine;
        let settled = settle(self.state, engine, hold, request, choice, Some(broken));
        let settled = tokio::select! {
            settled = self.sink.alive_while(settled) => settled,
            () = self.sink.closed() => return Err(Cut::Gone),
        };
        settled.map_err(Cut::Failed)?;
        Ok(choice.reply.clone().map(Reply::into_parts).unwrap_or_default())
    }

    async fn tell(&self, news: &News<'_>) -> Result<(), Cut> {
        if news.parts.is_empty() && news.logprobs.is_empty() && news.rotations.is_empty() {
            return Ok(());
        }
        for event in self.wording.news(news) {
            self.sink.send(&event).await?;
        }
        Ok(())
    }
}

/// What of these parts keeps the hard rules of the request, as far as that is known.
fn allowed(
    ruled: Option<&mut rules::Watch>,
    parts: Vec<Part>,
    choice: &Choice,
) -> Result<Vec<Part>, Cut> {
    match ruled {
        None => Ok(parts),
        Some(watch) => watch.tell(parts, choice.finished.is_some()).map_err(Cut::Failed),
    }
}

async fn close(choices: &[Choice], wording: &impl Wording, sink: &EventSink) -> Result<(), Gone> {
    for event in wording.closing(choices) {
        sink.send(&event).await?;
    }
    sink.done().await
}
