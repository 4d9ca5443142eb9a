//! The thread that sends spans, and the client of the HTTP transport.
//!
//! It has a runtime of its own: neither the server's threads nor a request ever wait for a collector.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use async_trait::async_trait;
use opentelemetry::KeyValue;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    SpanExporter as Exporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
    tonic_types::transport::ClientTlsConfig,
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter},
};
use tokio::runtime::{self, Runtime};

use super::{Counts, OtlpError, OtlpOptions, OtlpProtocol, Parcel};
use crate::ENGINE_BUILD;

/// Most spans of one batch, unless a single request has more.
const BATCH_SPANS: usize = 512;
/// How long the first span of a batch waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// Most bytes of an answer of the collector that are read.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Starts the sender; returns when it can send.
pub(super) fn start(
    options: Arc<OtlpOptions>,
    queue: flume::Receiver<Parcel>,
    counts: Arc<Counts>,
) -> Result<(), OtlpError> {
    let (ready, begun) = flume::bounded(1);
    thread::Builder::new().name("exrail-spans".into()).spawn(move || {
        match exporter(&options) {
            Ok((runtime, exporter)) => {
                // Whoever started it has gone when this fails, and so has the queue.
                drop(ready.send(Ok(())));
                let endpoint = options.endpoint.clone();
                let sender = Sender { exporter, counts, endpoint, has_warned: false };
                runtime.block_on(sender.run(&queue));
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    })?;
    begun.recv().map_err(|_| OtlpError::Stopped)?
}

/// The exporter, and the runtime that its connections live in.
fn exporter(options: &OtlpOptions) -> Result<(Runtime, Exporter), OtlpError> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let OtlpOptions { endpoint, timeout, .. } = options;
    let mut exporter = match options.protocol {
        OtlpProtocol::Http => Exporter::builder()
            .with_http()
            .with_http_client(Client::new(*timeout))
            .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
            .with_endpoint(endpoint)
            .with_timeout(*timeout)
            .build()?,
        OtlpProtocol::Grpc => {
            let _inside = runtime.enter();
            let builder = Exporter::builder().with_tonic();
            let builder = builder.with_endpoint(endpoint).with_timeout(*timeout);
            match endpoint.starts_with("https:") {
                // The same roots as those of the HTTP transport.
                true => {
                    builder.with_tls_config(ClientTlsConfig::new().with_webpki_roots()).build()?
                }
                false => builder.build()?,
            }
        }
    };
    exporter.set_resource(&resource(&options.service_name));
    Ok((runtime, exporter))
}

/// Who sends; the environment's names win, as OpenTelemetry has it.
fn resource(service_name: &str) -> Resource {
    let built = Resource::builder().with_attribute(KeyValue::new("service.version", ENGINE_BUILD));
    let resource = built.build();
    let name = resource.get_ref(&"service.name".into()).map(|name| name.as_str().into_owned());
    match name {
        Some(name) if !name.starts_with("unknown_service") => resource,
        Some(_) | None => Resource::builder()
            .with_attribute(KeyValue::new("service.version", ENGINE_BUILD))
            .with_service_name(service_name.to_owned())
            .build(),
    }
}

struct Sender {
    exporter: Exporter,
    counts: Arc<Counts>,
    endpoint: String,
    has_warned: bool,
}

impl Sender {
    /// Sends until nobody can hand over anything any more.
    async fn run(mut self, queue: &flume::Receiver<Parcel>) {
        while let Ok(parcel) = queue.recv_async().await {
            let (mut batch, mut waiting) = (Vec::new(), Vec::new());
            take(parcel, &mut batch, &mut waiting);
            let filling = async {
                while batch.len() < BATCH_SPANS && waiting.is_empty() {
                    let Ok(parcel) = queue.recv_async().await else { return };
                    take(parcel, &mut batch, &mut waiting);
                }
            };
            // What has come by then is a batch as well.
            drop(tokio::time::timeout(LINGER, filling).await);
            self.send(batch).await;
            for done in waiting {
                // Who waited too long has gone.
                done.send(()).ok();
            }
        }
    }

    async fn send(&mut self, batch: Vec<SpanData>) {
        if batch.is_empty() {
            return;
        }
        let n_spans = batch.len() as u64;
        let add = |count: &AtomicU64| count.fetch_add(n_spans, Ordering::Relaxed);
        let Err(error) = self.exporter.export(batch).await else {
            add(&self.counts.sent);
            return;
        };
        add(&self.counts.not_taken);
        if !self.has_warned {
            self.has_warned = true;
            let endpoint = &self.endpoint;
            tracing::warn!(
                %error, endpoint,
                "spans were not taken and are dropped; this is told once, exrail_otlp_spans_dropped_total counts on"
            );
        }
    }
}

fn take(parcel: Parcel, batch: &mut Vec<SpanData>, waiting: &mut Vec<flume::Sender<()>>) {
    match parcel {
        Parcel::Spans(spans) => batch.extend(spans),
        Parcel::Flush(done) => waiting.push(done),
    }
}

/// The client that downloads models, which speaks TLS. It blocks, and nothing but the sender waits for it.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new(timeout: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(timeout))
            // Headers may be secret: they go to the collector that was named, directly.
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .build();
        Self(config.new_agent())
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let response = self.0.run(Request::from_parts(parts, &body[..]))?;
        let (parts, mut body) = response.into_parts();
        let body = body.with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }
}
