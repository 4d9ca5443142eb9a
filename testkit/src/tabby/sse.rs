//! Server-sent events: a task writes them, pings come between, and a body that is dropped ends
//! its task.

use std::{convert::Infallible, future::Future, time::Duration};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, Interval},
};

/// Where a task writes its events.
#[derive(Debug)]
pub(super) struct Sink {
    blocks: mpsc::Sender<String>,
}

impl Sink {
    /// One event of JSON. That nobody listens is not told: the task of a stream is ended with its
    /// body, and a load goes on.
    pub(super) async fn send(&self, event: &Value) {
        self.line(&event.to_string()).await;
    }

    /// The end of a whole stream.
    pub(super) async fn done(&self) {
        self.line("[DONE]").await;
    }

    /// An error after the headers.
    pub(super) async fn error(&self, message: &str) {
        self.send(&json!({"error": {"message": message, "trace": null}})).await;
    }

    async fn line(&self, data: &str) {
        // The real server's library ends lines so.
        drop(self.blocks.send(format!("data: {data}\r\n\r\n")).await);
    }
}

/// What happens to the task when its reader goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reader {
    /// The task ends with it.
    Needed,
    /// The task goes on.
    Optional,
}

struct Events {
    queue: mpsc::Receiver<String>,
    pings: Option<Interval>,
    task: JoinHandle<()>,
    reader: Reader,
}

impl Drop for Events {
    fn drop(&mut self) {
        match self.reader {
            Reader::Needed => self.task.abort(),
            Reader::Optional => {}
        }
    }
}

impl Events {
    async fn next(&mut self) -> Option<String> {
        let Some(pings) = &mut self.pings else { return self.queue.recv().await };
        tokio::select! {
            biased;
            block = self.queue.recv() => block,
            _ = pings.tick() => {
                let now = jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M:%S.%6f+00:00");
                Some(format!(": ping - {now}\r\n\r\n"))
            }
        }
    }
}

/// A response of the events that a task writes.
pub(super) fn respond<F>(ping: Duration, reader: Reader, write: impl FnOnce(Sink) -> F) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let (blocks, queue) = mpsc::channel(1);
    let task = tokio::spawn(write(Sink { blocks }));
    let pings = (!ping.is_zero()).then(|| tokio::time::interval_at(Instant::now() + ping, ping));
    let events = Events { queue, pings, task, reader };
    let body = Body::from_stream(stream::unfold(events, |mut events| async move {
        events.next().await.map(|block| (Ok::<_, Infallible>(block), events))
    }));
    let headers = [
        (header::CONTENT_TYPE.as_str(), "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL.as_str(), "no-store"),
        ("x-accel-buffering", "no"),
    ];
    (headers, body).into_response()
}
