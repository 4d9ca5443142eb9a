//! The spans of one request, while it runs: its records and times, until nobody works on it any more.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};

use axum::http::{HeaderMap, HeaderName};
use exrail_engine::{GenerateRequest, Sampling};
use exrail_wire::TraceEnvelope;
use opentelemetry::{
    Context,
    propagation::TextMapPropagator,
    trace::{SpanContext, TraceContextExt, TraceState},
};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;

use super::{SpanContent, SpanExport, spans};

/// Routes whose requests have spans, each with the operation of its generation.
pub(super) const ROUTES: [(&str, &str); 4] = [
    ("/v1/chat/completions", "chat"),
    ("/v1/completions", "text_completion"),
    ("/v1/ask", "chat"),
    ("/v1/embeddings", "embeddings"),
];

/// The handle that goes with a request; nothing where its spans are not wanted. What is known when the last clone is
/// dropped becomes spans.
#[derive(Clone, Debug, Default)]
pub struct RequestSpans(Option<Arc<Open>>);

/// A part of a request that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The search for evidence.
    Retrieve,
    /// All generations, from the first submission to the last token.
    Generate,
    /// From what was found to what is answered: gate, generation and checks.
    Decide,
    /// Encoding for `/v1/embeddings`.
    Embed,
}

/// What was asked for, as the engine gets it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) model: String,
    /// None for embeddings.
    pub(crate) sampling: Option<Sampling>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) n_choices: usize,
    pub(crate) is_stream: bool,
    /// Snippets that were wanted.
    pub(crate) k: Option<usize>,
}

impl Asked {
    /// Of a generation with so many choices.
    pub(crate) fn of(requests: &[GenerateRequest], model: &str, is_stream: bool) -> Self {
        let first = requests.first();
        Self {
            model: model.to_owned(),
            sampling: first.map(|request| request.sampling.clone()),
            max_tokens: first.map(|request| request.max_tokens),
            n_choices: requests.len(),
            is_stream,
            k: None,
        }
    }
}

/// One message, where content is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) role: String,
    pub(crate) text: String,
}

/// What is known of a request so far.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Records that were written, and when.
    pub(super) records: Vec<(TraceEnvelope, Instant)>,
    pub(super) stages: Vec<(Stage, Instant, Instant)>,
    pub(super) asked: Option<Asked>,
    /// Of each choice, as the client was told.
    pub(super) finish_reasons: Vec<&'static str>,
    /// Texts that were encoded have so many tokens, and their vectors so many numbers.
    pub(super) embedded: Option<[usize; 2]>,
    /// Status of the response, and when it began.
    pub(super) answered: Option<(u16, Instant)>,
    pub(super) error: Option<&'static str>,
    pub(super) said: Vec<Said>,
    pub(super) told: Vec<String>,
    /// Texts of what was retrieved, in its order.
    pub(super) documents: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Open {
    export: SpanExport,
    pub(super) method: String,
    pub(super) route: &'static str,
    pub(super) operation: &'static str,
    /// Of whoever asked; invalid without one.
    pub(super) parent: SpanContext,
    /// The same moment on both clocks.
    begun: (SystemTime, Instant),
    known: Mutex<Known>,
}

impl RequestSpans {
    /// Of a request to this route; none where nobody wants them, or the asker said that this one is not sampled.
    pub(crate) fn open(
        export: Option<&SpanExport>,
        (method, route): (&str, Option<&str>),
        headers: &HeaderMap,
    ) -> Self {
        let Some(export) = export else { return Self(None) };
        let Some((route, operation)) = ROUTES.into_iter().find(|(path, _)| route == Some(*path))
        else {
            return Self(None);
        };
        let parent = parent(headers);
        if parent.is_valid() && !parent.is_sampled() {
            return Self(None);
        }
        let begun = (SystemTime::now(), Instant::now());
        let (export, method, known) = (export.clone(), method.to_owned(), Mutex::default());
        Self(Some(Arc::new(Open { export, method, route, operation, parent, begun, known })))
    }

    /// Whether content is to be handed over.
    pub(crate) fn want_content(&self) -> bool {
        self.0.as_ref().is_some_and(|open| open.export.content() == SpanContent::Send)
    }

    fn with(&self, note: impl FnOnce(&mut Known)) {
        if let Some(open) = &self.0 {
            note(&mut open.known());
        }
    }

    /// A record was written.
    pub(crate) fn record(&self, envelope: TraceEnvelope) {
        self.with(|known| known.records.push((envelope, Instant::now())));
    }

    /// A stage is over.
    pub(crate) fn spent(&self, stage: Stage, (from, to): (Instant, Instant)) {
        self.with(|known| known.stages.push((stage, from, to)));
    }

    pub(crate) fn asked(&self, asked: impl FnOnce() -> Asked) {
        self.with(|known| known.asked = Some(asked()));
    }

    pub(crate) fn finished(&self, reasons: impl Iterator<Item = &'static str>) {
        self.with(|known| known.finish_reasons = reasons.collect());
    }

    /// Texts were encoded: their tokens, and the length of a vector.
    pub(crate) fn embedded(&self, n_tokens: usize, dimensions: usize) {
        self.with(|known| known.embedded = Some([n_tokens, dimensions]));
    }

    /// A response begins with this status.
    pub(crate) fn answered(&self, status: u16) {
        self.with(|known| known.answered = Some((status, Instant::now())));
    }

    /// It failed. The first reason stays.
    pub(crate) fn failed(&self, code: &'static str) {
        self.with(|known| _ = known.error.get_or_insert(code));
    }

    /// What was asked, in words; only where content is sent.
    pub(crate) fn said(&self, said: impl FnOnce() -> Vec<Said>) {
        if self.want_content() {
            self.with(|known| known.said = said());
        }
    }

    /// What was released, in words; only where content is sent.
    pub(crate) fn told(&self, told: impl FnOnce() -> Vec<String>) {
        if self.want_content() {
            self.with(|known| known.told = told());
        }
    }

    /// Texts of what was retrieved; only where content is sent.
    pub(crate) fn documents(&self, documents: impl FnOnce() -> Vec<String>) {
        if self.want_content() {
            self.with(|known| known.documents = documents());
        }
    }
}

impl Open {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn content(&self) -> SpanContent {
        self.export.content()
    }

    pub(super) fn since(&self) -> Instant {
        self.begun.1
    }

    /// A moment on the clock that others read.
    pub(super) fn wall(&self, at: Instant) -> SystemTime {
        self.begun.0 + at.saturating_duration_since(self.begun.1)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let known = std::mem::take(&mut *self.known());
        self.export.offer(spans::of(self, known));
    }
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What systems have to pass on at least; a longer state is left out.
const MAX_STATE_BYTES: usize = 512;

/// The span that the asker is in, as W3C has it; an invalid one without it, or where it is not well formed.
fn parent(headers: &HeaderMap) -> SpanContext {
    let mut given = headers.get_all(TRACEPARENT).iter();
    let (Some(one), None) = (given.next(), given.next()) else { return SpanContext::NONE };
    if !is_well_formed(one.as_bytes()) {
        return SpanContext::NONE;
    }
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let found = context.span().span_context().clone();
    if found.trace_state().header().len() <= MAX_STATE_BYTES {
        return found;
    }
    let (trace, span, flags) = (found.trace_id(), found.span_id(), found.trace_flags());
    SpanContext::new(trace, span, flags, true, TraceState::NONE)
}

/// `00-` 32 digits `-` 16 digits `-` 2 digits; later versions may go on behind another dash. The propagator takes
/// shorter numbers and signs as well.
fn is_well_formed(value: &[u8]) -> bool {
    let digits = |bytes: &[u8]| bytes.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let Some((head, rest)) = value.split_at_checked(55) else { return false };
    let is_whole = rest.is_empty() || (rest[0] == b'-' && &head[..2] != b"00");
    is_whole
        && [2, 35, 52].into_iter().all(|dash| head[dash] == b'-')
        && [0..2, 3..35, 36..52, 53..55].into_iter().all(|range| digits(&head[range]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> SpanContext {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, value.parse().unwrap());
        }
        parent(&headers)
    }

    #[test]
    fn a_traceparent_is_taken_as_w3c_writes_it_and_not_otherwise() {
        let sampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let found = of(&[sampled]);
        assert_eq!(found.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(found.span_id().to_string(), "b7ad6b7169203331");
        assert!(found.is_sampled() && found.is_remote());
        assert!(!of(&["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"]).is_sampled());
        assert!(of(&["01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more"]).is_valid());
        for wrong in [
            "",
            "00-1-1-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(!of(&[wrong]).is_valid(), "{wrong}");
        }
        assert!(!of(&[sampled, sampled]).is_valid(), "which of the two?");
    }

    #[test]
    fn every_route_with_spans_is_in_the_table() {
        for (path, _) in ROUTES {
            assert!(crate::ROUTES.iter().any(|route| route.path == path), "{path}");
        }
    }
}
