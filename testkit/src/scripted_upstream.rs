//! [`ScriptedUpstream`]: an OpenAI-compatible server that writes made-up text at a chosen pace.
//!
//! It serves as the upstream in tests of faults and of a gateway's overhead. There is no model, no
//! tokenizer and no sampling: a token is a word, its text follows from the prompt and the seed.

mod script;

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep_until};

use crate::serving::Serving;
use script::{Kind, Script};

/// What a [`ScriptedUpstream`] is called and how it writes.
#[derive(Clone, Debug)]
pub struct ScriptedOptions {
    /// The name of its only model. A request may name any.
    pub model: String,
    /// How many tokens an answer has when the request asks for no fewer.
    pub tokens: usize,
    /// The time to the first token.
    pub first_token: Duration,
    /// The time between two tokens; below the millisecond of the timer it holds on average.
    pub token: Duration,
}

/// A running server of scripted answers; it stops when this is dropped.
#[derive(Debug)]
pub struct ScriptedUpstream {
    serving: Serving,
    upstream: Arc<Upstream>,
}

impl ScriptedUpstream {
    /// Starts on a free port of the loopback.
    ///
    /// # Errors
    /// When no port, thread or runtime is to be had.
    pub fn start(options: ScriptedOptions) -> io::Result<ScriptedUpstream> {
        let token = Mutex::new(options.token);
        let upstream = Arc::new(Upstream { options, token, generations: AtomicUsize::new(0) });
        let served = Arc::clone(&upstream);
        let serving = Serving::start("exrail-scripted", move |listener| serve(listener, served))?;
        Ok(ScriptedUpstream { serving, upstream })
    }

    /// The base of its routes, `http://host:port`.
    #[must_use]
    pub fn url(&self) -> String {
        self.serving.url()
    }

    /// How many answers it has begun; refused requests do not count.
    #[must_use]
    pub fn generations(&self) -> usize {
        self.upstream.generations.load(Ordering::SeqCst)
    }

    /// Changes the time between two tokens for answers that begin from now on.
    pub fn set_token(&self, token: Duration) {
        *self.upstream.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }
}

#[derive(Debug)]
struct Upstream {
    options: ScriptedOptions,
    /// Instead of the one of the options, as it may change.
    token: Mutex<Duration>,
    generations: AtomicUsize,
}

async fn serve(listener: TcpListener, upstream: Arc<Upstream>) {
    let router = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .with_state(upstream);
    let listener = listener.tap_io(|connection| {
        // A socket that refuses the option is slower, not wrong.
        drop(connection.set_nodelay(true));
    });
    // It ends with an error only where the listener breaks, and then requests fail by themselves.
    drop(axum::serve(listener, router).await);
}

async fn models(State(upstream): State<Arc<Upstream>>) -> Response {
    let model = json!({
        "id": upstream.options.model,
        "object": "model",
        "created": script::CREATED,
        "owned_by": "scripted",
    });
    json_response(StatusCode::OK, &json!({ "object": "list", "data": [model] }))
}

async fn chat(State(upstream): State<Arc<Upstream>>, body: Bytes) -> Response {
    answer(&upstream, Kind::Chat, &body).await
}

async fn complete(State(upstream): State<Arc<Upstream>>, body: Bytes) -> Response {
    answer(&upstream, Kind::Completion, &body).await
}

async fn answer(upstream: &Upstream, kind: Kind, body: &[u8]) -> Response {
    let arrived = Instant::now();
    let Ok(request) = serde_json::from_slice::<Value>(body) else {
        return refusal("the body is not JSON", None);
    };
    let Some(prompt) = script::prompt(kind, &request) else {
        let field = kind.prompt_field();
        return refusal(&format!("the field `{field}` is missing"), Some(field));
    };
    let number = upstream.generations.fetch_add(1, Ordering::SeqCst);
    let script = Script::new(kind, &request, &prompt, &upstream.options, number);
    let token = *upstream.token.lock().unwrap_or_else(PoisonError::into_inner);
    let pace = Pace { arrived, first_token: upstream.options.first_token, token };
    if request["stream"] == true {
        let with_usage = request["stream_options"]["include_usage"] == true;
        return stream_response(pace, script.events(with_usage));
    }
    pace.wait_for(script.tokens().saturating_sub(1)).await;
    json_response(StatusCode::OK, &script.reply())
}

/// When the tokens of an answer come, counted from the arrival of its request, so that the timer's
/// coarseness does not add up.
struct Pace {
    arrived: Instant,
    first_token: Duration,
    token: Duration,
}

impl Pace {
    async fn wait_for(&self, token: usize) {
        let steps = u32::try_from(token).unwrap_or(u32::MAX);
        let after = self.first_token.saturating_add(self.token.saturating_mul(steps));
        // Without a pace there is nothing to wait for, and the timer would still take its turn.
        if after > self.arrived.elapsed() {
            sleep_until(self.arrived + after).await;
        }
    }
}

fn stream_response(pace: Pace, events: Vec<script::Event>) -> Response {
    let paced = stream::unfold((pace, events.into_iter()), |(pace, mut events)| async {
        let event = events.next()?;
        pace.wait_for(event.with_token).await;
        Some((Ok::<_, Infallible>(Bytes::from(event.bytes)), (pace, events)))
    });
    let headers =
        [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(paced)).into_response()
}

fn refusal(message: &str, param: Option<&str>) -> Response {
    let error = json!({
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": null,
    });
    json_response(StatusCode::BAD_REQUEST, &json!({ "error": error }))
}

fn json_response(status: StatusCode, body: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
