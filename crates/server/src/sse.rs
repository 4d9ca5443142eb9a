//! A streamed response: a task writes events, the client reads them, and whoever leaves first ends
//! the other.

use std::{future::Future, time::Duration};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use exrail_wire::sse;
use futures_util::stream;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Instant, Interval},
};

use crate::error::ApiError;

/// Events that may wait for a slow client; after that the writing task waits.
const BACKLOG: usize = 64;

/// How often a waiting stream shows that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The client has gone.
#[derive(Debug)]
pub(crate) struct Gone;

/// The writing end.
#[derive(Clone)]
pub(crate) struct EventSink {
    blocks: mpsc::Sender<String>,
}

/// When a stream that holds text back shows that it lives.
pub(crate) fn heartbeats() -> Interval {
    tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT)
}

/// A response and the sink that feeds it.
pub(crate) fn channel() -> (EventSink, Response) {
    let (blocks, queue) = mpsc::channel::<String>(BACKLOG);
    let body = Body::from_stream(stream::unfold(queue, |mut queue| async move {
        queue.recv().await.map(|block| (Ok::<_, std::convert::Infallible>(block), queue))
    }));
    let headers =
        [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    (EventSink { blocks }, (headers, body).into_response())
}

impl EventSink {
    /// Sends one JSON event.
    pub(crate) async fn send(&self, value: &impl Serialize) -> Result<(), Gone> {
        self.block(sse::event(value)).await
    }

    /// Keeps an idle connection open.
    pub(crate) async fn heartbeat(&self) -> Result<(), Gone> {
        self.block(sse::heartbeat().into()).await
    }

    /// What `work` gives. Meanwhile comments keep the connection open; a client that goes does not end
    /// the work.
    pub(crate) async fn alive_while<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        // The first tick comes at once.
        heartbeat.tick().await;
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = heartbeat.tick() => drop(self.heartbeat().await),
            }
        }
    }

    /// Ends a complete stream.
    pub(crate) async fn done(&self) -> Result<(), Gone> {
        self.block(sse::DONE.into()).await
    }

    /// Ends a failed stream: an error event and no `[DONE]`, so that no client takes a cut answer for
    /// a whole one.
    pub(crate) async fn fail(&self, error: &ApiError) {
        // A client that has gone needs no news.
        drop(self.send(&error.body()).await);
    }

    /// Resolves when the client has gone.
    pub(crate) async fn closed(&self) {
        self.blocks.closed().await;
    }

    async fn block(&self, block: String) -> Result<(), Gone> {
        self.blocks.send(block).await.map_err(|_| Gone)
    }
}
