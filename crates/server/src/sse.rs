//! A streamed response: a task writes events, the client reads them, and whoever leaves first ends
//! the other.

use std::{future::Future, time::Duration};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use exrail_wire::{ErrorBody, sse};
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
pub struct Gone;

/// The writing end.
#[derive(Clone, Debug)]
pub struct EventSink {
    blocks: mpsc::Sender<String>,
}

/// When a stream that holds text back shows that it lives.
#[must_use]
pub fn heartbeats() -> Interval {
    tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT)
}

/// A response and the sink that feeds it.
#[must_use]
pub fn channel() -> (EventSink, Response) {
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
    ///
    /// # Errors
    /// The client has gone.
    pub async fn send(&self, value: &impl Serialize) -> Result<(), Gone> {
        self.block(sse::event(value)).await
    }

    /// Keeps an idle connection open.
    ///
    /// # Errors
    /// The client has gone.
    pub async fn heartbeat(&self) -> Result<(), Gone> {
        self.block(sse::heartbeat().into()).await
    }

    /// What `work` gives. Meanwhile comments keep the connection open; a client that goes does not end
    /// the work.
    pub async fn alive_while<T>(&self, work: impl Future<Output = T>) -> T {
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
    ///
    /// # Errors
    /// The client has gone.
    pub async fn done(&self) -> Result<(), Gone> {
        self.block(sse::DONE.into()).await
    }

    /// Ends a failed stream: an error event and no `[DONE]`, so that no client takes a cut answer for
    /// a whole one.
    pub(crate) async fn fail(&self, error: &ApiError) {
        self.fail_with(&error.body()).await;
    }

    /// As `fail`, of a failure of another server.
    pub async fn fail_with(&self, error: &ErrorBody) {
        // A client that has gone needs no news.
        drop(self.send(error).await);
    }

    /// Resolves when the client has gone.
    pub async fn closed(&self) {
        self.blocks.closed().await;
    }

    /// Sends a block that is framed already.
    ///
    /// # Errors
    /// The client has gone.
    pub async fn block(&self, block: String) -> Result<(), Gone> {
        self.blocks.send(block).await.map_err(|_| Gone)
    }
}
