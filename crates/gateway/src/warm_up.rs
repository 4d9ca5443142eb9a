//! The warm-up fence (G-05) of a server that we did not start: no user's request before it has generated, and again
//! after it changed.
//!
//! A health route proves nothing: one was measured to say healthy while the first answer took 370 times as long as the
//! next.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use exrail_wire::{Pins, schemas};
use futures_util::future::join_all;
use serde_json::Value;

use crate::{
    detect::{Detected, detect, sha256},
    events::{Event, Events},
    fault::UpstreamFault,
    kind::Api,
    probe::{self, chat_body, tokenizer_fingerprint},
    settle::Choice,
    upstream::{Fence, FencePhase, Proved, Upstream, WarmUp},
};

/// Tokens of a generation.
const TOKENS: usize = 10;
/// Generations of a bucket.
const RUNS: usize = 4;
/// A prompt whose greedy answer is kept, to tell another model under the same name.
const SENTINEL: &str = "Name the capital of France and one thing it is known for.";

/// How an upstream is proved and watched.
#[derive(Clone, Debug)]
pub struct FenceOptions {
    /// Requests at once that are tried.
    pub buckets: Vec<usize>,
    /// Until the first event of a generation; the first one may load a model.
    pub first_event: Duration,
    /// Between two events.
    pub stall: Duration,
    /// Between two looks at an upstream that is open.
    pub look_every: Duration,
    /// Between two attempts to prove one that did not prove itself; doubled each time, up to 4 times it.
    pub retry: Duration,
}

impl Default for FenceOptions {
    fn default() -> Self {
        Self {
            buckets: vec![1, 2, 4],
            first_event: Duration::from_secs(120),
            stall: Duration::from_secs(30),
            look_every: Duration::from_secs(2),
            retry: Duration::from_secs(1),
        }
    }
}

/// Tells what happened to a fence.
pub(crate) type Told<'a> = dyn Fn(&Upstream, Option<&Proved>, &str) + Send + Sync + 'a;

/// Proves an upstream, watches it, and proves it again whenever its fence was closed. Never ends.
pub(crate) async fn keep(upstream: Arc<Upstream>, options: FenceOptions, told: Arc<Told<'static>>) {
    let mut former: Option<Proved> = None;
    let mut wait = options.retry;
    loop {
        match prove(&upstream, &options).await {
            Ok(proved) => {
                wait = options.retry;
                if let Some(change) = former.as_ref().and_then(|former| changed(former, &proved)) {
                    told(&upstream, Some(&proved), &change);
                }
                former = Some(proved.clone());
                upstream.open(proved);
                watch(&upstream, &options, &*told).await;
            }
            Err(fault) => {
                let reason = format!("{}: {fault}", fault.code());
                tracing::warn!(
                    upstream = upstream.name(),
                    reason,
                    "the warm-up fence stays closed"
                );
                upstream.close(FencePhase::Failed, reason);
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(options.retry * 4);
            }
        }
    }
}

/// What differs between two proofs, if anything does.
fn changed(former: &Proved, now: &Proved) -> Option<String> {
    let (was, is) = (&former.detected, &now.detected);
    if was.models != is.models {
        return Some(format!("the model was {:?} and is {:?}", was.models, is.models));
    }
    if was.fingerprint != is.fingerprint {
        return Some(format!("the fingerprint was {} and is {}", was.fingerprint, is.fingerprint));
    }
    let repeats = former.warm_up.repeats_itself && now.warm_up.repeats_itself;
    let (was, is) = (&former.warm_up.sentinel_sha256, &now.warm_up.sentinel_sha256);
    (repeats && was != is)
        .then(|| "the same names answer the sentinel with another text".to_owned())
}

/// Looks at an open upstream until its fence is closed, by a look or by a request.
async fn watch(upstream: &Upstream, options: &FenceOptions, told: &Told<'_>) {
    let mut changes = upstream.changes();
    loop {
        let closed = async {
            // What is waited for is looked at again; its sender lives as long as the upstream.
            changes.wait_for(|fence| matches!(fence, Fence::Closed { .. })).await.is_ok()
        };
        let reason = tokio::select! {
            _ = closed => {
                if let Fence::Closed { reason, .. } = upstream.fence() {
                    told(upstream, None, &reason);
                }
                return;
            }
            () = upstream.suspicion.notified() => doubt(upstream, options).await,
            () = tokio::time::sleep(options.look_every) => look(upstream).await,
        };
        if let (Some(reason), Some(_)) = (reason, upstream.proved()) {
            upstream.close(FencePhase::Detect, reason);
        }
    }
}

/// Why an upstream is not what was proved, by what it says of itself.
async fn look(upstream: &Upstream) -> Option<String> {
    let proved = upstream.proved()?;
    match detect(&upstream.client).await {
        Ok(now) if now.fingerprint == proved.detected.fingerprint => None,
        Ok(now) => Some(format!("it serves {:?} now, or serves it otherwise", now.models)),
        // Busy is no change.
        Err(UpstreamFault::Late { .. } | UpstreamFault::Busy { .. }) => None,
        Err(fault) => Some(format!("{}: {fault}", fault.code())),
    }
}

/// The same, by a generation: a request was late, stalled or came to nothing.
async fn doubt(upstream: &Upstream, options: &FenceOptions) -> Option<String> {
    let proved = upstream.proved()?;
    let model = model_of(upstream, &proved.detected).ok()?;
    let mut body = chat_body(proved.detected.kind.api(), &model, SENTINEL, TOKENS);
    body["stream"] = Value::Bool(true);
    let tried = generate(upstream, &body, (options.first_event, options.stall)).await;
    tried.err().map(|fault| format!("{}: {fault}", fault.code()))
}

/// Has an upstream generate, and keeps what that showed.
async fn prove(upstream: &Upstream, options: &FenceOptions) -> Result<Proved, UpstreamFault> {
    upstream.close(FencePhase::Detect, "it is looked for");
    let client = &upstream.client;
    let detected = detect(client).await?;
    let model = model_of(upstream, &detected)?;
    upstream.close(FencePhase::WarmUp, "it generates, before anybody else is let in");
    let api = detected.kind.api();
    let warm_up = warm_up(upstream, api, &model, options).await?;
    let json_schema = probe::json_schema(client, api, &model).await;
    let tok_fp = tokenizer_fingerprint(client, api, &model).await;
    let pins = pins(&detected, &warm_up, tok_fp.ok());
    Ok(Proved { detected, warm_up, json_schema, pins })
}

/// The model that stands for an upstream.
fn model_of(upstream: &Upstream, detected: &Detected) -> Result<String, UpstreamFault> {
    match &upstream.options.expected_model {
        Some(expected) if !detected.models.contains(expected) => {
            let found = detected.models.join(", ");
            Err(UpstreamFault::WrongModel { expected: expected.clone(), found })
        }
        Some(expected) => Ok(expected.clone()),
        None => {
            let first = detected.models.first().cloned();
            first.ok_or(UpstreamFault::NoAnswer { expected: "a loaded model" })
        }
    }
}

async fn warm_up(
    upstream: &Upstream,
    api: &Api,
    model: &str,
    options: &FenceOptions,
) -> Result<WarmUp, UpstreamFault> {
    let mut body = chat_body(api, model, SENTINEL, TOKENS);
    body["stream"] = Value::Bool(true);
    let limits = (options.first_event, options.stall);
    let (mut texts, mut first_ms, mut warm) = (Vec::new(), None, Vec::new());
    let mut cold_ratio: f64 = 1.0;
    for &bucket in &options.buckets {
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let runs = (0..bucket).map(|_| generate(upstream, &body, limits));
            let runs: Vec<_> = join_all(runs).await.into_iter().collect::<Result<_, _>>()?;
            times.push(runs.iter().map(|(ms, _)| *ms).fold(0.0, f64::max));
            texts.extend(runs.into_iter().next().map(|(_, text)| text));
        }
        let (first, later) = (times[0], median(&times[1..]));
        first_ms.get_or_insert(first);
        warm.push(later);
        cold_ratio = cold_ratio.max(first / later.max(0.001));
    }
    // The first one may have been cold in more than its time; those of the first bucket are of one batch size.
    let texts = &texts[1..RUNS];
    let last = texts[RUNS - 2].clone();
    let repeats_itself = !last.is_empty() && texts.iter().all(|text| *text == last);
    Ok(WarmUp {
        generations: options.buckets.iter().sum::<usize>() * RUNS,
        tokens: TOKENS,
        buckets: options.buckets.clone(),
        first_ms: first_ms.unwrap_or_default(),
        warm_ms: median(&warm),
        cold_ratio,
        repeats_itself,
        sentinel_sha256: sha256(&last),
    })
}

/// Milliseconds to the first event with something in it, and the text of a whole stream.
async fn generate(
    upstream: &Upstream,
    body: &Value,
    limits: (Duration, Duration),
) -> Result<(f64, String), UpstreamFault> {
    let started = Instant::now();
    let mut first = None;
    let (mut choice, mut thoughts) = (Choice::default(), String::new());
    let mut events = Events::open(&upstream.client, "/v1/chat/completions", body, limits).await?;
    while let Event::Data(event) = events.next().await? {
        choice.add(&event["choices"][0]);
        let delta = &event["choices"][0]["delta"];
        let thought = delta["reasoning_content"].as_str().or_else(|| delta["reasoning"].as_str());
        thoughts.push_str(thought.unwrap_or_default());
        if !choice.text.is_empty() || !thoughts.is_empty() {
            first.get_or_insert_with(|| started.elapsed());
        }
    }
    let text = thoughts + &choice.text;
    crate::reply::legible(&text)?;
    // The fence is opened by tokens, not by the end of a stream without any.
    let first = first.ok_or(UpstreamFault::NoAnswer { expected: "a token" })?;
    Ok((first.as_secs_f64() * 1e3, text))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// What an answer of it depends on. Nobody can see the weights of another server: what stands for them is what it says
/// of itself and how it answers the sentinel.
fn pins(detected: &Detected, warm_up: &WarmUp, tok_fp: Option<String>) -> Pins {
    let unseen = || "not_available".to_owned();
    let sentinel = if warm_up.repeats_itself { warm_up.sentinel_sha256.as_str() } else { "" };
    Pins {
        model_fp: sha256(&format!("{}\n{sentinel}", detected.fingerprint)),
        tok_fp: tok_fp.unwrap_or_else(unseen),
        schema_hash: schemas::SHA256.to_owned(),
        quant: unseen(),
        kv_dtype: unseen(),
        engine_build: format!(
            "{} {}",
            detected.kind.api().name,
            detected.version.as_deref().unwrap_or("not_available")
        ),
        ..Pins::default()
    }
}
