//! A collector: it takes spans over HTTP or gRPC, as real ones do, and keeps them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use exrail_server::{OtlpOptions, OtlpProtocol, SpanContent, SpanExport};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value as Any},
    trace::v1::Span,
};
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    transport::{Server as Grpc, server::TcpIncoming},
};

use crate::support::Server;

/// What came, in order.
type Got = Arc<Mutex<Vec<ExportTraceServiceRequest>>>;

pub(super) struct Collector {
    url: String,
    protocol: OtlpProtocol,
    got: Got,
}

struct Taker(Got);

#[tonic::async_trait]
impl TraceService for Taker {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn take(State(got): State<Got>, headers: HeaderMap, body: Bytes) {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    got.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
}

impl Collector {
    pub(super) async fn start(protocol: OtlpProtocol) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let got = Got::default();
        match protocol {
            OtlpProtocol::Http => {
                let router = Router::new().route("/v1/traces", post(take));
                let router = router.with_state(Arc::clone(&got));
                tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
            }
            OtlpProtocol::Grpc => {
                let service = TraceServiceServer::new(Taker(Arc::clone(&got)));
                let server = Grpc::builder().add_service(service);
                tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
            }
        }
        Self { url, protocol, got }
    }

    /// A server sends to it from now on.
    pub(super) fn serves(&self, server: &Server, content: SpanContent) -> SpanExport {
        let path = if self.protocol == OtlpProtocol::Http { "/v1/traces" } else { "" };
        export(server, &format!("{}{path}", self.url), self.protocol, content)
    }

    /// All spans, once those that wait have come.
    pub(super) async fn spans(&self, export: &SpanExport) -> Vec<Came> {
        let export = export.clone();
        let flushed = tokio::task::spawn_blocking(move || export.flush(Duration::from_secs(10)));
        assert!(flushed.await.unwrap(), "the collector takes everything");
        let got = self.got.lock().unwrap();
        let of_resources = got.iter().flat_map(|request| &request.resource_spans);
        let spans = of_resources.flat_map(|resource| {
            let about = resource.resource.as_ref().map(|it| attributes(&it.attributes));
            let scopes = resource.scope_spans.iter().flat_map(|scope| &scope.spans);
            scopes.map(move |span| Came::of(span, about.clone().unwrap_or_default()))
        });
        spans.collect()
    }

    /// Every byte that came.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.got.lock().unwrap().iter().flat_map(Message::encode_to_vec).collect()
    }
}

pub(super) fn export(
    server: &Server,
    endpoint: &str,
    protocol: OtlpProtocol,
    content: SpanContent,
) -> SpanExport {
    let export = SpanExport::start(OtlpOptions {
        endpoint: endpoint.to_owned(),
        protocol,
        timeout: Duration::from_secs(10),
        content,
        service_name: "exrail".into(),
    });
    let export = export.unwrap();
    server.state.export_spans(export.clone());
    export
}

/// A span as it came.
#[derive(Clone, Debug)]
pub(super) struct Came {
    pub(super) name: String,
    /// 1: internal, 2: server.
    pub(super) kind: i32,
    pub(super) trace: String,
    pub(super) id: String,
    /// Empty without one.
    pub(super) parent: String,
    pub(super) state: String,
    pub(super) from_ns: u64,
    pub(super) to_ns: u64,
    /// Whether its status is an error.
    pub(super) is_error: bool,
    pub(super) attributes: BTreeMap<String, Value>,
    pub(super) resource: BTreeMap<String, Value>,
}

impl Came {
    fn of(span: &Span, resource: BTreeMap<String, Value>) -> Self {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            name: span.name.clone(),
            kind: span.kind,
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            state: span.trace_state.clone(),
            from_ns: span.start_time_unix_nano,
            to_ns: span.end_time_unix_nano,
            is_error: span.status.as_ref().is_some_and(|status| status.code == 2),
            attributes: attributes(&span.attributes),
            resource,
        }
    }

    pub(super) fn says(&self, key: &str) -> Value {
        self.attributes.get(key).cloned().unwrap_or_default()
    }

    /// Its kind by OpenInference.
    pub(super) fn sort(&self) -> String {
        self.says("openinference.span.kind").as_str().unwrap().to_owned()
    }
}

fn attributes(list: &[KeyValue]) -> BTreeMap<String, Value> {
    list.iter().map(|it| (it.key.clone(), value(it.value.as_ref()))).collect()
}

fn value(any: Option<&AnyValue>) -> Value {
    match any.and_then(|any| any.value.as_ref()) {
        Some(Any::StringValue(text)) => json!(text),
        Some(Any::BoolValue(it)) => json!(it),
        Some(Any::IntValue(number)) => json!(number),
        Some(Any::DoubleValue(number)) => json!(number),
        Some(Any::ArrayValue(list)) => list.values.iter().map(|it| value(Some(it))).collect(),
        other => panic!("{other:?}"),
    }
}
