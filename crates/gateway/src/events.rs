//! The events of an upstream's stream, and the end of it that is one.

use std::{collections::BTreeSet, time::Duration};

use axum::{
    body::Bytes,
    http::{Method, StatusCode},
};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::Instant;

use crate::{
    client::{self, Client},
    fault::{UpstreamFault, brief},
    reply::FINISHED,
};

/// Most bytes of one event, and of a whole stream.
const MAX_EVENT_BYTES: usize = 8 << 20;
const MAX_STREAM_BYTES: usize = 32 << 20;

/// One thing of a stream.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// `data:` with JSON.
    Data(Value),
    /// `data: [DONE]` behind the finish reasons of all choices: the end.
    Done,
}

/// A stream that is being read.
pub(crate) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
    /// Bytes of it in which no event ends.
    scanned: usize,
    n_bytes: usize,
    /// Between two events with data.
    stall: Duration,
    /// When the next one is late.
    late_at: Instant,
    /// Choices that have begun, and those that have told why they ended.
    begun: BTreeSet<u64>,
    finished: BTreeSet<u64>,
}

impl Events {
    /// Sends a request for a stream and waits for its head.
    pub(crate) async fn open(
        client: &Client,
        path: &str,
        body: &Value,
        (first, stall): (Duration, Duration),
    ) -> Result<Self, UpstreamFault> {
        let body = Bytes::from(body.to_string());
        // Some send the head at once, and comments until the first token.
        let late_at = Instant::now() + first;
        let reply = client.send(Method::POST, path, Some(body), ("a first event", first)).await?;
        if reply.status() != StatusCode::OK {
            let (status, headers) = (reply.status(), reply.headers().clone());
            let told = tokio::time::timeout(stall, client::collect(reply)).await;
            let body = told.ok().and_then(Result::ok).map(|whole| whole.body).unwrap_or_default();
            return Err(client::refused(status, &headers, &body));
        }
        let (begun, finished) = <_>::default();
        let (buffer, scanned, n_bytes) = <_>::default();
        let body = reply.into_body();
        Ok(Self { body, buffer, scanned, n_bytes, stall, late_at, begun, finished })
    }

    /// The next thing, in time. Comments do not count: a stream of nothing else stalls.
    ///
    /// # Errors
    /// The stream is cut, stalls, tells of an error or holds something else than JSON.
    pub(crate) async fn next(&mut self) -> Result<Event, UpstreamFault> {
        let stalled = UpstreamFault::Stalled { limit_s: self.stall.as_secs() };
        // Whoever waits may stop and begin again; that makes nothing later.
        let event = tokio::time::timeout_at(self.late_at, self.next_at_last()).await;
        let event = event.unwrap_or(Err(stalled));
        self.restart();
        event
    }

    /// Counts from now on: until now somebody else was waited for.
    pub(crate) fn restart(&mut self) {
        self.late_at = Instant::now() + self.stall;
    }

    async fn next_at_last(&mut self) -> Result<Event, UpstreamFault> {
        loop {
            while let Some(block) = self.block() {
                if let Some(event) = self.read(&block)? {
                    return Ok(event);
                }
            }
            if self.buffer.len() > MAX_EVENT_BYTES {
                return Err(UpstreamFault::Cut { found: "an event without an end".to_owned() });
            }
            let Some(frame) = self.body.frame().await else { return Err(self.cut("its end")) };
            let frame = frame.map_err(|error| self.cut(&error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            self.n_bytes += data.len();
            if self.n_bytes > MAX_STREAM_BYTES {
                return Err(UpstreamFault::Cut {
                    found: format!("more than {MAX_STREAM_BYTES} bytes"),
                });
            }
            self.buffer.extend_from_slice(&data);
        }
    }

    /// Whether every choice that began has told why it ended.
    pub(crate) fn is_finished(&self) -> bool {
        !self.finished.is_empty() && self.begun.is_subset(&self.finished)
    }

    fn cut(&self, found: &str) -> UpstreamFault {
        let finished = if self.is_finished() { "a finish reason and then " } else { "" };
        UpstreamFault::Cut { found: brief(&format!("{finished}{found}")) }
    }

    /// The bytes up to the next empty line.
    fn block(&mut self) -> Option<Vec<u8>> {
        let ends = [&b"\n\n"[..], b"\r\n\r\n"];
        // An end may have begun in what was looked at.
        let from = self.scanned.saturating_sub(3);
        let find = |end: &&[u8]| {
            let at = self.buffer[from..].windows(end.len()).position(|window| window == *end)?;
            Some((from + at, end.len()))
        };
        let Some((at, len)) = ends.iter().filter_map(find).min() else {
            self.scanned = self.buffer.len();
            return None;
        };
        self.scanned = 0;
        let rest = self.buffer.split_off(at + len);
        let mut block = std::mem::replace(&mut self.buffer, rest);
        block.truncate(at);
        Some(block)
    }

    fn read(&mut self, block: &[u8]) -> Result<Option<Event>, UpstreamFault> {
        let text = String::from_utf8_lossy(block);
        let data: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data:"))
            .map(|data| data.strip_prefix(' ').unwrap_or(data))
            .collect();
        if data.is_empty() {
            // A comment, or the name of an event.
            return Ok(None);
        }
        let data = data.join("\n");
        if data.trim() == "[DONE]" {
            if self.is_finished() {
                return Ok(Some(Event::Done));
            }
            return Err(UpstreamFault::Cut { found: "[DONE] without a finish reason".to_owned() });
        }
        let value: Value = serde_json::from_str(&data).map_err(|_| UpstreamFault::Cut {
            found: format!("an event that is no JSON: {}", brief(&data)),
        })?;
        if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
            let told = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            return Err(UpstreamFault::InStream { message: brief(&told) });
        }
        for choice in value["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(0);
            self.begun.insert(index);
            let Some(finish) = choice["finish_reason"].as_str() else { continue };
            if !FINISHED.contains(&finish) {
                return Err(UpstreamFault::Cut {
                    found: brief(&format!("finish reason `{finish}`")),
                });
            }
            self.finished.insert(index);
        }
        Ok(Some(Event::Data(value)))
    }
}
