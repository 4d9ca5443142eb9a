//! Requests at times that are fixed in advance, whatever becomes of those before them.
//!
//! Latency counts from the time that was planned. Who waits for an answer before asking again asks a slow server less
//! often, and never sees how long a client would have stood in its queue.

use std::{
    collections::BTreeMap,
    error::Error,
    num::NonZeroU64,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::{runtime::Runtime, sync::Semaphore};

/// How long an answer may take before it counts as none.
const LIMIT: Duration = Duration::from_secs(10);
/// Requests at once above which no further one is sent: a server that is this far behind never catches up.
const MOST_AT_ONCE: usize = 4096;
/// Before the first request, so that the first one is not late already.
const START: Duration = Duration::from_millis(50);

/// What the gateway says of itself.
const OVERHEAD: &str = "x-exrail-overhead-ms";

pub(super) type Client = legacy::Client<HttpConnector, Full<Bytes>>;

/// Whether an answer comes as a whole or as events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Streamed,
}

/// What is asked of whom, and how often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    /// `http://HOST:PORT`.
    pub(super) url: &'a str,
    pub(super) form: Form,
    /// Requests a second.
    pub(super) rate: u32,
    /// Requests before those that count: they open the connections.
    pub(super) n_warm: usize,
    /// Requests that count.
    pub(super) n: usize,
}

/// A good answer; all times from the one that was planned for its request, in ms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    /// Until its request was begun: how far this program was behind.
    pub(super) late: f64,
    /// Until its first bytes behind the head.
    pub(super) first: f64,
    /// Until its last byte.
    pub(super) whole: f64,
    /// What the gateway says was its own share.
    pub(super) told: Option<f64>,
}

/// What came of a plan.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) replies: Vec<Reply>,
    /// How often each reason was one for no good answer.
    pub(super) errors: BTreeMap<String, usize>,
    /// From the first planned time that counts to the last answer.
    pub(super) seconds: f64,
}

impl Load {
    pub(super) fn n_errors(&self) -> usize {
        self.errors.values().sum()
    }

    /// Good answers a second.
    pub(super) fn rate(&self) -> f64 {
        self.replies.len() as f64 / self.seconds
    }
}

/// A client with connections of its own, which are kept.
pub(super) fn client() -> Client {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    legacy::Client::builder(TokioExecutor::new()).build(connector)
}

/// A chat that the scripted upstream answers.
pub(super) fn request(url: &str, form: Form) -> Result<Request<Full<Bytes>>> {
    let body = json!({
        "model": super::MODEL,
        "messages": [{ "role": "user", "content": "Name a place where the tide comes in twice a day." }],
        "stream": form == Form::Streamed,
    });
    Request::post(format!("{url}/v1/chat/completions"))
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .with_context(|| format!("a request to {url}"))
}

/// Carries out a plan. This thread does nothing but begin requests in time.
pub(super) fn run(runtime: &Runtime, plan: Plan<'_>) -> Result<Load> {
    // Linux lets a sleep end 50 µs late otherwise.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).context("timer slack")?;
    let client = client();
    let request = request(plan.url, plan.form)?;
    let places = Arc::new(Semaphore::new(MOST_AT_ONCE));
    let (tell, told) = mpsc::channel();
    let begun = Instant::now() + START;
    for k in 0..plan.n_warm + plan.n {
        let planned = begun + arrival(k, plan.rate);
        thread::sleep(planned.saturating_duration_since(Instant::now()));
        let counts = k >= plan.n_warm;
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            if counts {
                tell.send(Err(format!("not sent: {MOST_AT_ONCE} requests wait")))?;
            }
            continue;
        };
        let (client, request, tell) = (client.clone(), request.clone(), tell.clone());
        runtime.spawn(async move {
            let asked = tokio::time::timeout(LIMIT, ask(&client, request, plan.form, planned));
            let late = |_| Err(format!("no answer within {} s", LIMIT.as_secs()));
            let reply = asked.await.unwrap_or_else(late);
            if counts {
                // Who asked may have ended with an error of its own.
                drop(tell.send(reply));
            }
            drop(place);
        });
    }
    drop(tell);
    let mut load = Load::default();
    for reply in told {
        match reply {
            Ok(reply) => load.replies.push(reply),
            Err(reason) => *load.errors.entry(reason).or_default() += 1,
        }
    }
    load.seconds = (begun + arrival(plan.n_warm, plan.rate)).elapsed().as_secs_f64();
    Ok(load)
}

/// When request `k` is due.
fn arrival(k: usize, rate: u32) -> Duration {
    Duration::from_secs_f64(k as f64 / f64::from(rate))
}

async fn ask(
    client: &Client,
    request: Request<Full<Bytes>>,
    form: Form,
    planned: Instant,
) -> Result<Reply, String> {
    let since = || planned.elapsed().as_secs_f64() * 1e3;
    let late = since();
    let response = client.request(request).await.map_err(|error| causes(&error))?;
    let status = response.status();
    let told = response.headers().get(OVERHEAD);
    let told = told.and_then(|value| value.to_str().ok()?.parse().ok());
    let mut body: Incoming = response.into_body();
    let (mut bytes, mut first) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| causes(&error))?;
        if let Some(data) = frame.data_ref() {
            first.get_or_insert_with(since);
            bytes.extend_from_slice(data);
        }
    }
    let whole = since();
    check(status, form, &bytes)?;
    Ok(Reply { late, first: first.unwrap_or(whole), whole, told })
}

/// Whether an answer is good: ended as its form demands, and no error.
fn check(status: StatusCode, form: Form, body: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(body);
    let is_whole = match form {
        Form::Plain => serde_json::from_slice::<IgnoredAny>(body).is_ok(),
        Form::Streamed => text.trim_end().ends_with("data: [DONE]"),
    };
    let is_good = is_whole && text.contains(r#""finish_reason":"stop""#);
    if status == StatusCode::OK && is_good {
        return Ok(());
    }
    // Its code is enough to tell kinds of failures; a whole body would make a kind of each.
    let code = text.split(r#""code":""#).nth(1).and_then(|rest| rest.split('"').next());
    Err(format!("status {}, {}", status.as_u16(), code.unwrap_or("not a whole answer")))
}

/// An error and what is behind it.
pub(super) fn causes(error: &dyn Error) -> String {
    let mut told = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        told = format!("{told}: {cause}");
        next = cause.source();
    }
    told
}

#[cfg(test)]
mod tests {
    use exrail_testkit::ScriptedUpstream;

    use super::*;

    #[test]
    fn requests_are_due_at_even_times() {
        assert_eq!(arrival(0, 1000), Duration::ZERO);
        assert_eq!(arrival(1500, 1000), Duration::from_millis(1500));
        assert_eq!(arrival(1, 4), Duration::from_millis(250));
    }

    #[test]
    fn half_an_answer_and_an_error_are_none() {
        let good = br#"{"choices":[{"finish_reason":"stop"}]}"#;
        assert_eq!(check(StatusCode::OK, Form::Plain, good), Ok(()));
        assert!(check(StatusCode::OK, Form::Plain, &good[..good.len() - 2]).is_err());
        assert!(check(StatusCode::OK, Form::Streamed, good).is_err());
        let bad = br#"{"error":{"code":"upstream_busy"}}"#;
        let told = check(StatusCode::SERVICE_UNAVAILABLE, Form::Plain, bad);
        assert_eq!(told, Err("status 503, upstream_busy".to_owned()));
    }

    #[test]
    fn every_request_that_counts_is_told() {
        let upstream = ScriptedUpstream::start(crate::gateway::scripted()).unwrap();
        let runtime = crate::gateway::runtime().unwrap();
        for form in [Form::Plain, Form::Streamed] {
            let url = upstream.url();
            let plan = Plan { url: &url, form, rate: 1000, n_warm: 5, n: 20 };
            let load = run(&runtime, plan).unwrap();
            assert_eq!((load.replies.len(), load.n_errors()), (20, 0), "{:?}", load.errors);
            let in_order = |it: &Reply| it.late <= it.first && it.first <= it.whole;
            assert!(load.replies.iter().all(in_order), "{:?}", load.replies);
        }
        assert_eq!(upstream.generations(), 50);
    }
}
