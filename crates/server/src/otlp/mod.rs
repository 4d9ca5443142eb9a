//! Spans over OTLP: what the trace log says of a request, for a collector.
//!
//! A span is made of records that were written and of the times beside them, when the request is over: nothing is
//! measured or counted here. Content leaves the process only where [`SpanContent::Send`] says so.
//!
//! A collector is never waited for. What it does not take in time is dropped and counted.

mod request;
mod send;
mod spans;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use opentelemetry_sdk::trace::SpanData;
use serde_json::{Value, json};
use thiserror::Error;

pub use request::RequestSpans;
pub(crate) use request::{Asked, Said, Stage};

/// Requests whose spans wait for the collector; those of further ones are dropped.
pub const QUEUE_REQUESTS: usize = 512;

/// How spans reach the collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// Protocol buffers over HTTP/1.1.
    Http,
    /// gRPC.
    Grpc,
}

impl OtlpProtocol {
    /// Its name in the variables of OpenTelemetry.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            OtlpProtocol::Http => "http/protobuf",
            OtlpProtocol::Grpc => "grpc",
        }
    }
}

/// Whether questions, messages, answers and texts of documents leave with the spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanContent {
    /// They stay here.
    Keep,
    /// They are sent, as far as they were released.
    Send,
}

/// Where spans go, and what is in them.
#[derive(Clone, Debug)]
pub struct OtlpOptions {
    /// The whole URL that requests go to.
    pub endpoint: String,
    /// How.
    pub protocol: OtlpProtocol,
    /// For one batch, with its repetitions.
    pub timeout: Duration,
    /// Whether content is sent.
    pub content: SpanContent,
    /// `service.name`, where the environment names none.
    pub service_name: String,
}

/// Why spans cannot be sent at all.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OtlpError {
    /// The exporter refused its options.
    #[error("spans: {0}")]
    Build(#[from] opentelemetry_otlp::ExporterBuildError),
    /// The system gave no thread, or no runtime.
    #[error("spans: the sender could not be started: {0}")]
    Start(#[from] std::io::Error),
    /// The sender ended before it began.
    #[error("spans: the sender has stopped")]
    Stopped,
}

/// Spans since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpanCounts {
    /// The collector has them.
    pub sent: u64,
    /// Dropped because the queue was full.
    pub queue_full: u64,
    /// Dropped because the collector did not take them.
    pub not_taken: u64,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    queue_full: AtomicU64,
    not_taken: AtomicU64,
}

/// What the sender gets.
enum Parcel {
    /// Of one request.
    Spans(Vec<SpanData>),
    /// Told when everything before it was sent or given up.
    Flush(flume::Sender<()>),
}

/// The way to the collector. Clones share it.
#[derive(Clone, Debug)]
pub struct SpanExport {
    parcels: flume::Sender<Parcel>,
    counts: Arc<Counts>,
    options: Arc<OtlpOptions>,
}

impl SpanExport {
    /// Starts the sender. The collector need not be there.
    ///
    /// # Errors
    /// The options cannot be honoured, or there is no thread for the sender.
    pub fn start(options: OtlpOptions) -> Result<Self, OtlpError> {
        let (parcels, queue) = flume::bounded(QUEUE_REQUESTS);
        let (counts, options) = (Arc::new(Counts::default()), Arc::new(options));
        send::start(Arc::clone(&options), queue, Arc::clone(&counts))?;
        Ok(Self { parcels, counts, options })
    }

    /// Whether content may leave.
    pub(crate) fn content(&self) -> SpanContent {
        self.options.content
    }

    /// Hands over the spans of a request; never waits.
    fn offer(&self, spans: Vec<SpanData>) {
        let n_spans = spans.len() as u64;
        if self.parcels.try_send(Parcel::Spans(spans)).is_err() {
            self.counts.queue_full.fetch_add(n_spans, Ordering::Relaxed);
        }
    }

    /// Sends what waits, for at most so long; whether all of it was sent or given up.
    #[must_use]
    pub fn flush(&self, bound: Duration) -> bool {
        let until = std::time::Instant::now() + bound;
        let (done, told) = flume::bounded(1);
        self.parcels.send_deadline(Parcel::Flush(done), until).is_ok()
            && told.recv_deadline(until).is_ok()
    }

    /// What became of the spans so far.
    #[must_use]
    pub fn counts(&self) -> SpanCounts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        SpanCounts {
            sent: of(&self.counts.sent),
            queue_full: of(&self.counts.queue_full),
            not_taken: of(&self.counts.not_taken),
        }
    }

    /// For the effective configuration.
    pub(crate) fn describe(&self) -> Value {
        json!({
            "endpoint": self.options.endpoint,
            "protocol": self.options.protocol.name(),
            "timeout_ms": self.options.timeout.as_millis(),
            "content": self.options.content == SpanContent::Send,
            "queue_requests": QUEUE_REQUESTS,
        })
    }
}
