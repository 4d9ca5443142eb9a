//! From what is known of a request to its spans, in the words of OpenTelemetry's conventions for generative AI (0.1.0)
//! and of OpenInference. What either of them has no word for is called `exrail.…`.
//!
//! The root is the request; what it did is below it. Names of attributes are in `docs/traces.md`, which a test
//! compares with what a collector gets.

use std::{borrow::Cow, time::Instant};

use exrail_wire::{
    AnswerRecord, Latency, Pins, QueryRecord, RetrievedItem, TokenCounts, TraceBody, TraceEnvelope,
};
use opentelemetry::{
    Array, InstrumentationScope, Key, KeyValue, StringValue, Value,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags},
};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SpanData};
use serde_json::json;

use super::{
    SpanContent,
    request::{Asked, Known, Open, Said, Stage},
};
use crate::ENGINE_BUILD;

/// `gen_ai.provider.name`: of the convention's values none is this program, and then it is the system's own name.
const PROVIDER: &str = "exrail";
/// Longest text of one attribute; what is cut ends with an ellipsis.
const MAX_TEXT_BYTES: usize = 16 << 10;

/// All spans of a request, the root first.
pub(super) fn of(open: &Open, known: Known) -> Vec<SpanData> {
    let ids = RandomIdGenerator::default();
    let trace_id = if open.parent.is_valid() { open.parent.trace_id() } else { ids.new_trace_id() };
    let state = open.parent.trace_state().clone();
    let context = SpanContext::new(trace_id, ids.new_span_id(), TraceFlags::SAMPLED, false, state);
    let scope = InstrumentationScope::builder("exrail").with_version(ENGINE_BUILD).build();
    let request = Request { open, known: &known, ids, context, scope };
    let mut spans = vec![request.root()];
    spans.extend(request.retrieval());
    spans.extend(request.generation());
    spans.extend(request.embedding());
    spans.extend(request.decision());
    spans.extend(request.guards());
    spans
}

struct Request<'a> {
    open: &'a Open,
    known: &'a Known,
    ids: RandomIdGenerator,
    context: SpanContext,
    scope: InstrumentationScope,
}

/// What a record says of a generation, whichever kind of record it is.
struct Generated<'a> {
    envelope: &'a TraceEnvelope,
    seed: u64,
    finish_reason: Option<&'a str>,
    tokens: TokenCounts,
    latency: Latency,
}

impl Request<'_> {
    fn root(&self) -> SpanData {
        let (open, known) = (self.open, self.known);
        let mut it = Attributes::of("CHAIN");
        it.put("http.request.method", open.method.clone());
        it.put("http.route", open.route);
        it.maybe("http.response.status_code", known.answered.map(|(status, _)| i64::from(status)));
        it.maybe("error.type", known.error);
        if let Some((envelope, _)) = known.records.last() {
            it.session(envelope);
            it.maybe("exrail.agent_id", envelope.agent_id.clone());
            it.put("exrail.request_id", envelope.request_id.clone());
            it.pins(&envelope.pins);
        }
        if self.has_content() {
            let input = self.query().map(|query| query.text.as_str());
            let input = input.or_else(|| Some(known.said.last()?.text.as_str()));
            it.maybe("input.value", input.map(text));
            it.maybe("output.value", self.answers().first().map(|answer| text(answer)));
        }
        // A client's own mistake is no fault of a server, as the conventions for HTTP have it.
        let is_fault = !known.answered.is_some_and(|(status, _)| (400..500).contains(&status));
        let last = known.stages.iter().map(|(_, _, to)| *to);
        let ends = last.chain(known.answered.map(|(_, at)| at)).max();
        let during = (open.since(), ends.unwrap_or_else(Instant::now));
        let name = format!("{} {}", open.method, open.route);
        SpanData {
            span_context: self.context.clone(),
            parent_span_id: match open.parent.is_valid() {
                true => open.parent.span_id(),
                false => SpanId::INVALID,
            },
            parent_span_is_remote: open.parent.is_valid(),
            span_kind: SpanKind::Server,
            status: status(known.error.filter(|_| is_fault)),
            ..self.span(name, during, it)
        }
    }

    /// The search, as `retrieve.run` recorded it.
    fn retrieval(&self) -> Option<SpanData> {
        let during = self.during(Stage::Retrieve)?;
        let mut it = Attributes::of("RETRIEVER");
        it.operation("retrieval");
        it.maybe("gen_ai.retrieval.top_k", self.known.asked.as_ref()?.k.map(number));
        if let Some((envelope, query, collection, retrieved)) = self.search() {
            it.put("gen_ai.data_source.id", collection.to_owned());
            it.session(envelope);
            it.maybe("exrail.index_hash", envelope.pins.index_hash.clone());
            it.maybe("exrail.encoder_fp", envelope.pins.encoder_fp.clone());
            self.documents(&mut it, retrieved);
            if self.has_content() {
                it.put("input.value", text(&query.text));
                it.put("gen_ai.retrieval.query.text", text(&query.text));
            }
        }
        Some(self.span("retrieval".into(), during, it))
    }

    /// A snippet's id is a hash. The names of its document and its section are words of the collection, and content.
    fn documents(&self, it: &mut Attributes, retrieved: &[RetrievedItem]) {
        for (at, item) in retrieved.iter().enumerate() {
            let mut about = json!({
                "rank": item.k_pos, "selected": item.selected,
                "cosine": item.cosine, "source": item.source,
            });
            let prefix = format!("retrieval.documents.{at}.document");
            it.put(format!("{prefix}.id"), item.snippet_id.clone());
            it.put(format!("{prefix}.score"), item.score_norm);
            if self.has_content() {
                about["doc_id"] = json!(item.doc_id);
                about["section_id"] = json!(item.section_id);
                let content = self.known.documents.get(at).map(|content| text(content));
                it.maybe(format!("{prefix}.content"), content);
            }
            it.put(format!("{prefix}.metadata"), about.to_string());
        }
        if self.has_content() {
            let list =
                retrieved.iter().map(|it| json!({"id": it.snippet_id, "score": it.score_norm}));
            it.put("gen_ai.retrieval.documents", json!(list.collect::<Vec<_>>()).to_string());
        }
    }

    /// The generation, as `infer.run` or `answer.decide` recorded it.
    fn generation(&self) -> Option<SpanData> {
        let during = self.during(Stage::Generate)?;
        let (operation, generated) = (self.open.operation, self.generated());
        let mut it = Attributes::of("LLM");
        it.operation(operation);
        it.put("llm.provider", PROVIDER);
        let seed = generated.as_ref().map(|generated| generated.seed);
        let model = self.known.asked.as_ref().map(|asked| {
            it.asked(asked, seed);
            asked.model.as_str()
        });
        let reasons = self.finish_reasons();
        it.maybe("llm.finish_reason", reasons.first().copied());
        it.put("gen_ai.response.finish_reasons", list(reasons));
        if let Some(generated) = &generated {
            it.generated(generated);
        }
        it.maybe("error.type", self.known.error);
        if self.has_content() {
            self.messages(&mut it);
        }
        let name = model.map_or_else(|| operation.to_owned(), |it| format!("{operation} {it}"));
        let status = status(self.known.error);
        Some(SpanData { status, ..self.span(name, during, it) })
    }

    /// One for each choice: what the client was told, or `error` where it was told nothing.
    fn finish_reasons(&self) -> Vec<&'static str> {
        let told = &self.known.finish_reasons;
        if !told.is_empty() {
            return told.clone();
        }
        let n_choices = self.known.asked.as_ref().map_or(1, |asked| asked.n_choices.max(1));
        vec!["error"; n_choices]
    }

    /// What was said and told, in both conventions.
    fn messages(&self, it: &mut Attributes) {
        let question = self.query().map(|it| Said { role: "user".into(), text: it.text.clone() });
        let said = question.as_slice().iter().chain(&self.known.said);
        let said: Vec<(&str, &str)> = said.map(|it| (it.role.as_str(), it.text.as_str())).collect();
        let told: Vec<(&str, &str)> =
            self.answers().into_iter().map(|text| ("assistant", text)).collect();
        for (ours, theirs, messages) in [
            ("llm.input_messages", "gen_ai.input.messages", said),
            ("llm.output_messages", "gen_ai.output.messages", told),
        ] {
            for (at, (role, content)) in messages.iter().enumerate() {
                it.put(format!("{ours}.{at}.message.role"), (*role).to_owned());
                it.put(format!("{ours}.{at}.message.content"), text(content));
            }
            let one = |(role, content): &(&str, &str)| json!({"role": role, "parts": [{"type": "text", "content": text(content)}]});
            if !messages.is_empty() {
                let all: Vec<_> = messages.iter().map(one).collect();
                it.put(theirs, json!(all).to_string());
            }
        }
    }

    fn embedding(&self) -> Option<SpanData> {
        let during = self.during(Stage::Embed)?;
        let mut it = Attributes::of("EMBEDDING");
        it.operation("embeddings");
        let asked = self.known.asked.as_ref()?;
        it.put("gen_ai.request.model", asked.model.clone());
        it.put("embedding.model_name", asked.model.clone());
        if let Some([n_tokens, dimensions]) = self.known.embedded {
            it.put("gen_ai.usage.input_tokens", number(n_tokens));
            it.put("gen_ai.embeddings.dimension.count", number(dimensions));
            it.put("llm.token_count.prompt", number(n_tokens));
            it.put("llm.token_count.total", number(n_tokens));
        }
        if self.has_content() {
            for (at, said) in self.known.said.iter().enumerate() {
                it.put(format!("embedding.embeddings.{at}.embedding.text"), text(&said.text));
            }
        }
        it.maybe("error.type", self.known.error);
        let name = format!("embeddings {}", asked.model);
        let status = status(self.known.error);
        Some(SpanData { status, ..self.span(name, during, it) })
    }

    /// What the guards of a grounded answer decided, from the end of its generation on.
    fn decision(&self) -> Option<SpanData> {
        let (envelope, record) = self.answer()?;
        let (from, to) = self.during(Stage::Decide)?;
        let from = self.during(Stage::Generate).map_or(from, |(_, generated)| generated.min(to));
        let mut it = Attributes::of("GUARDRAIL");
        it.session(envelope);
        it.put("exrail.guard.verdict", if record.refusal { "refused" } else { "answered" });
        it.put("exrail.guards_fired", list(record.guards_fired.clone()));
        it.put("exrail.ds_status", record.metrics.ds_status.clone());
        it.maybe("exrail.ds_min", record.metrics.ds_min);
        it.maybe("exrail.cited_share", record.metrics.cited_share);
        if self.has_content() {
            it.maybe("exrail.refusal_reason", record.refusal_reason.as_deref().map(text));
        }
        Some(self.span("guard answer".into(), (from, to), it))
    }

    /// One for each guard that fired, as `guard.fire` recorded it. Its detail may quote the request, and is content.
    fn guards(&self) -> Vec<SpanData> {
        let span = |(envelope, at): &(TraceEnvelope, Instant)| {
            let TraceBody::Guard { guard, detail } = &envelope.body else { return None };
            let mut it = Attributes::of("GUARDRAIL");
            it.session(envelope);
            it.put("exrail.guard.name", guard.clone());
            it.put("exrail.guard.verdict", "fired");
            if self.has_content() {
                it.put("exrail.guard.detail", text(detail));
            }
            Some(self.span(format!("guard {guard}"), (*at, *at), it))
        };
        self.known.records.iter().filter_map(span).collect()
    }

    fn has_content(&self) -> bool {
        self.open.content() == SpanContent::Send
    }

    /// The question, where it was recorded.
    fn query(&self) -> Option<&QueryRecord> {
        let searched = self.search().map(|(_, query, ..)| query);
        searched.or_else(|| Some(&self.answer()?.1.query))
    }

    fn search(&self) -> Option<(&TraceEnvelope, &QueryRecord, &str, &[RetrievedItem])> {
        self.known.records.iter().find_map(|(envelope, _)| {
            let TraceBody::Retrieve { query, collection, retrieved } = &envelope.body else {
                return None;
            };
            Some((envelope, query, collection.as_str(), retrieved.as_slice()))
        })
    }

    fn answer(&self) -> Option<(&TraceEnvelope, &AnswerRecord)> {
        self.known.records.iter().find_map(|(envelope, _)| {
            let TraceBody::Answer(record) = &envelope.body else { return None };
            Some((envelope, &**record))
        })
    }

    /// What was released.
    fn answers(&self) -> Vec<&str> {
        match self.answer() {
            Some((_, record)) => vec![&record.answer_text],
            None => self.known.told.iter().map(String::as_str).collect(),
        }
    }

    fn generated(&self) -> Option<Generated<'_>> {
        if let Some((envelope, record)) = self.answer() {
            return Some(Generated {
                envelope,
                seed: record.seed,
                finish_reason: record.finish_reason.as_deref(),
                tokens: record.metrics.tokens,
                latency: record.metrics.latency_ms,
            });
        }
        self.known.records.iter().find_map(|(envelope, _)| {
            let TraceBody::Infer { seed, finish_reason, tokens, latency_ms, .. } = &envelope.body
            else {
                return None;
            };
            Some(Generated {
                envelope,
                seed: *seed,
                finish_reason: Some(finish_reason),
                tokens: *tokens,
                latency: *latency_ms,
            })
        })
    }

    fn during(&self, stage: Stage) -> Option<(Instant, Instant)> {
        let (_, from, to) = self.known.stages.iter().find(|(found, ..)| *found == stage)?;
        Some((*from, *to))
    }

    /// A part of the request.
    fn span(&self, name: String, (from, to): (Instant, Instant), it: Attributes) -> SpanData {
        let (trace_id, state) = (self.context.trace_id(), self.context.trace_state().clone());
        let id = self.ids.new_span_id();
        SpanData {
            span_context: SpanContext::new(trace_id, id, TraceFlags::SAMPLED, false, state),
            parent_span_id: self.context.span_id(),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: Cow::Owned(name),
            start_time: self.open.wall(from),
            end_time: self.open.wall(to),
            attributes: it.0,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn of(kind: &'static str) -> Self {
        Self(vec![KeyValue::new("openinference.span.kind", kind)])
    }

    fn put(&mut self, key: impl Into<Key>, value: impl Into<Value>) {
        self.0.push(KeyValue::new(key, value));
    }

    fn maybe(&mut self, key: impl Into<Key>, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(key, value);
        }
    }

    fn operation(&mut self, name: &'static str) {
        self.put("gen_ai.operation.name", name);
        self.put("gen_ai.provider.name", PROVIDER);
    }

    /// The session or user, and the record in the trace log.
    fn session(&mut self, envelope: &TraceEnvelope) {
        self.maybe("session.id", envelope.session_id.clone());
        self.put("exrail.trace_id", envelope.trace_id.clone());
    }

    fn pins(&mut self, pins: &Pins) {
        self.put("exrail.model_fp", pins.model_fp.clone());
        self.put("exrail.quant", pins.quant.clone());
        self.put("exrail.kv_dtype", pins.kv_dtype.clone());
    }

    /// What was asked for; the seed is that of the record, which has it also where the server drew it.
    fn asked(&mut self, asked: &Asked, seed: Option<u64>) {
        for key in ["gen_ai.request.model", "gen_ai.response.model", "llm.model_name"] {
            self.put(key, asked.model.clone());
        }
        let seed = seed.map(u64::cast_signed);
        let max_tokens = asked.max_tokens.map(number);
        let mut parameters = json!({"max_tokens": max_tokens, "seed": seed});
        if let Some(sampling) = &asked.sampling {
            let (temperature, top_p) = (decimal(sampling.temperature), decimal(sampling.top_p));
            self.put("gen_ai.request.temperature", temperature);
            self.put("gen_ai.request.top_p", top_p);
            self.maybe("gen_ai.request.top_k", sampling.top_k.map(number));
            for (key, penalty) in [
                ("gen_ai.request.frequency_penalty", sampling.frequency_penalty),
                ("gen_ai.request.presence_penalty", sampling.presence_penalty),
            ] {
                self.put(key, decimal(penalty));
            }
            parameters["temperature"] = json!(temperature);
            parameters["top_p"] = json!(top_p);
        }
        self.maybe("gen_ai.request.max_tokens", max_tokens);
        self.maybe("gen_ai.request.seed", seed);
        self.put("llm.invocation_parameters", parameters.to_string());
        if asked.n_choices != 1 {
            self.put("gen_ai.request.choice.count", number(asked.n_choices));
        }
        if asked.is_stream {
            self.put("gen_ai.request.stream", true);
        }
    }

    fn generated(&mut self, generated: &Generated<'_>) {
        let Generated { envelope, finish_reason, tokens, latency, .. } = generated;
        self.session(envelope);
        self.put("gen_ai.response.id", envelope.request_id.clone());
        let session = envelope.session_id.clone().filter(|_| envelope.mem_rev > 0);
        self.maybe("gen_ai.conversation.id", session);
        self.maybe("exrail.finish_reason", finish_reason.map(str::to_owned));
        for (ours, theirs, n) in [
            ("llm.token_count.prompt", Some("gen_ai.usage.input_tokens"), tokens.r#in),
            ("llm.token_count.completion", Some("gen_ai.usage.output_tokens"), tokens.out),
            ("llm.token_count.total", None, tokens.r#in + tokens.out),
            (
                "llm.token_count.prompt_details.cache_read",
                Some("gen_ai.usage.cache_read.input_tokens"),
                tokens.cached,
            ),
        ] {
            self.put(ours, number(n));
            if let Some(theirs) = theirs {
                self.put(theirs, number(n));
            }
        }
        for (key, ms) in [
            ("exrail.queue_ms", latency.queue),
            ("exrail.prefill_ms", latency.prefill),
            ("exrail.decode_ms", latency.decode),
        ] {
            self.put(key, ms);
        }
    }
}

fn status(error: Option<&'static str>) -> Status {
    error.map_or(Status::Unset, Status::error)
}

fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The double that reads like the float: 0.2 and not 0.200000003.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

fn list<T: Into<StringValue>>(values: Vec<T>) -> Value {
    Value::Array(Array::String(values.into_iter().map(Into::into).collect()))
}

/// A text, cut where it is too long for an attribute.
fn text(whole: &str) -> String {
    match whole.len() {
        0..=MAX_TEXT_BYTES => whole.to_owned(),
        _ => format!("{}…", &whole[..whole.floor_char_boundary(MAX_TEXT_BYTES)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let long = "é".repeat(MAX_TEXT_BYTES);
        let cut = text(&long);
        assert!(cut.len() <= MAX_TEXT_BYTES + '…'.len_utf8() && cut.ends_with("é…"));
        assert_eq!(text("short"), "short");
    }

    #[test]
    fn a_float_is_told_as_it_was_written() {
        assert_eq!([decimal(0.2), decimal(0.9), decimal(1.0)], [0.2, 0.9, 1.0]);
    }
}
