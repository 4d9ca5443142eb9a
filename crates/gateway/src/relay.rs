//! A generation through an upstream: chosen, asked, judged, recorded, told.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::Bytes,
    http::{HeaderName, HeaderValue, Method},
    response::{IntoResponse, Response},
};
use exrail_server::{TraceError, TraceIdentity, random_name, sse};
use exrail_wire::{RelayLatency, RelayRecord, TraceBody};
use serde_json::Value;

use crate::{
    demand::Demand,
    detect::sha256,
    error::GatewayError,
    events::Events,
    fault::UpstreamFault,
    fleet::Chosen,
    reply,
    settle::{self, Choice},
    state::Gateway,
    streaming::Streaming,
};

/// How often another upstream is asked, before anything was told to the client.
const MAX_ATTEMPTS: usize = 3;

/// Milliseconds of a response that were not the upstream's.
pub(crate) const OVERHEAD: HeaderName = HeaderName::from_static("x-exrail-overhead-ms");

/// One request on its way.
pub(crate) struct Relay {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) demand: Demand,
    route: &'static str,
    identity: TraceIdentity,
    started: Instant,
    attempts: usize,
    pub(crate) repairs: usize,
    held: Duration,
    /// Time that was the upstream's.
    pub(crate) upstream: Duration,
}

/// Answers a request for a generation.
pub(crate) async fn relay(
    gateway: Arc<Gateway>,
    route: &'static str,
    agent_id: Option<String>,
    body: Bytes,
) -> Result<Response, GatewayError> {
    let started = Instant::now();
    let demand = Demand::read(&body)?;
    let identity = TraceIdentity {
        trace_id: random_name("trace")?,
        request_id: random_name("request")?,
        session_id: demand.session.clone(),
        agent_id,
        ..TraceIdentity::default()
    };
    let (held, upstream) = <_>::default();
    let relay = Relay {
        gateway,
        demand,
        route,
        identity,
        started,
        attempts: 0,
        repairs: 0,
        held,
        upstream,
    };
    if relay.demand.streams { relay.stream().await } else { relay.whole().await }
}

impl Relay {
    /// An upstream that may be asked and honours what the request says.
    async fn choose(&mut self, tried: &[Arc<crate::Upstream>]) -> Result<Chosen, GatewayError> {
        let (model, session) = (self.demand.model.as_deref(), self.demand.session.as_deref());
        let chosen = self.gateway.fleet.choose(model, session, tried).await?;
        self.held += chosen.held;
        let api = chosen.proved.detected.kind.api();
        if self.demand.seed.is_some() && !api.has_seed && !self.gateway.options.passes_unhonoured {
            return Err(GatewayError::NotHonoured { field: "seed", kind: api.name });
        }
        Ok(chosen)
    }

    /// A whole answer.
    async fn whole(mut self) -> Result<Response, GatewayError> {
        let mut tried = Vec::new();
        loop {
            let chosen = self.choose(&tried).await?;
            match self.answer(&chosen).await {
                Ok(reply) => return self.tell(&chosen, reply).await,
                Err(GatewayError::Upstream { fault, .. })
                    if self.may_go_on(&fault, &mut tried, &chosen) => {}
                Err(error) => return Err(self.fail(&chosen, error).await),
            }
        }
    }

    /// Whether another upstream may be asked instead.
    fn may_go_on(
        &self,
        fault: &UpstreamFault,
        tried: &mut Vec<Arc<crate::Upstream>>,
        chosen: &Chosen,
    ) -> bool {
        tried.push(Arc::clone(&chosen.upstream));
        let (model, session) = (self.demand.model.as_deref(), self.demand.session.as_deref());
        fault.may_pass()
            && self.attempts < MAX_ATTEMPTS
            && self.gateway.fleet.has_other(model, session, tried)
    }

    /// One upstream's answer, asked for again when it does not conform.
    async fn answer(&mut self, chosen: &Chosen) -> Result<Value, GatewayError> {
        let api = chosen.proved.detected.kind.api();
        let mut request = self.demand.for_upstream(api, &chosen.model);
        loop {
            let reply = self.ask(chosen, &request).await;
            let reply = reply.map_err(|fault| self.upstream_failed(chosen, fault))?;
            let choices = Choice::all(&reply);
            let Err(violation) = settle::check(&self.demand.form, &choices) else {
                return Ok(reply);
            };
            if !self.may_repair() {
                return Err(GatewayError::NotConforming { violation, repairs: self.repairs });
            }
            // A completion has no place to say what was wrong, and is drawn again.
            if let Some(repaired) = settle::repair(&self.demand, &request, &choices, &violation) {
                request = repaired;
            }
        }
    }

    /// One reply that can be true.
    async fn ask(&mut self, chosen: &Chosen, request: &Value) -> Result<Value, UpstreamFault> {
        self.attempts += 1;
        let began = Instant::now();
        let (client, limit) = (&chosen.upstream.client, self.gateway.options.first_byte);
        let body = Bytes::from(request.to_string());
        let reply = client.whole(Method::POST, self.route, Some(body), limit).await;
        self.upstream += began.elapsed();
        let reply = reply?.json()?;
        self.same_model(chosen, &reply)?;
        reply::legible(&reply::text(&reply)?.text)?;
        chosen.upstream.succeeded();
        Ok(reply)
    }

    /// Whether the model that was asked is the one that answered.
    pub(crate) fn same_model(&self, chosen: &Chosen, reply: &Value) -> Result<(), UpstreamFault> {
        let Some(found) = reply["model"].as_str() else { return Ok(()) };
        if found == chosen.model || chosen.proved.detected.models.iter().any(|it| it == found) {
            return Ok(());
        }
        Err(UpstreamFault::WrongModel { expected: chosen.model.clone(), found: found.to_owned() })
    }

    /// Takes note of a fault and gives it its upstream's name.
    pub(crate) fn upstream_failed(&self, chosen: &Chosen, fault: UpstreamFault) -> GatewayError {
        chosen.upstream.failed(&fault);
        self.gateway.metrics.count_fault(chosen.upstream.name(), fault.code());
        GatewayError::Upstream { upstream: chosen.upstream.name().to_owned(), fault }
    }

    /// Records a whole answer and lets it go.
    async fn tell(self, chosen: &Chosen, reply: Value) -> Result<Response, GatewayError> {
        let choices = Choice::all(&reply);
        self.record(chosen, &choices, reply::usage(&reply), None).await?;
        let overhead = self.overhead();
        self.gateway.metrics.observe_overhead(overhead);
        let mut response = Json(reply).into_response();
        response.headers_mut().insert(OVERHEAD, milliseconds(overhead));
        Ok(response)
    }

    /// Records a failure; one that cannot be recorded is told all the same, as nothing is released by it.
    pub(crate) async fn fail(self, chosen: &Chosen, error: GatewayError) -> GatewayError {
        if let Err(problem) = self.record(chosen, &[], None, Some(error.code())).await {
            tracing::error!(%problem, "a failed request could not be traced");
        }
        error
    }

    /// Time of this request that was neither the upstream's nor the fence's.
    fn overhead(&self) -> Duration {
        self.started.elapsed().saturating_sub(self.upstream).saturating_sub(self.held)
    }

    pub(crate) async fn record(
        &self,
        chosen: &Chosen,
        choices: &[Choice],
        tokens: Option<[u64; 2]>,
        fault: Option<&'static str>,
    ) -> Result<(), TraceError> {
        let api = chosen.proved.detected.kind.api();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let said: String = choices.iter().map(|choice| choice.text.as_str()).collect();
        let seed = self.demand.seed.as_ref().filter(|_| api.has_seed);
        let record = RelayRecord {
            route: self.route,
            upstream: chosen.upstream.name().to_owned(),
            kind: api.name,
            model: chosen.model.clone(),
            seed: seed.and_then(Value::as_i64),
            attempts: self.attempts,
            held_to: self.demand.form.name(),
            repairs: self.repairs,
            finish_reason: choices.first().map(|choice| choice.finish.clone()),
            answer_sha256: (!choices.is_empty()).then(|| sha256(&said)),
            fault,
            tokens,
            latency_ms: RelayLatency {
                held: ms(self.held),
                upstream: ms(self.upstream),
                overhead: ms(self.overhead()),
            },
        };
        let body = TraceBody::Relay(Box::new(record));
        self.gateway.traces.append(&self.identity, &chosen.proved.pins, body).await
    }

    /// A streamed answer: nothing is told before the upstream's stream is there.
    async fn stream(mut self) -> Result<Response, GatewayError> {
        let mut tried = Vec::new();
        let (chosen, events) = loop {
            let chosen = self.choose(&tried).await?;
            let api = chosen.proved.detected.kind.api();
            let request = self.demand.for_upstream(api, &chosen.model);
            match self.open(&chosen, &request).await {
                Ok(events) => break (chosen, events),
                Err(fault) => {
                    let error = self.upstream_failed(&chosen, fault.clone());
                    if !self.may_go_on(&fault, &mut tried, &chosen) {
                        return Err(self.fail(&chosen, error).await);
                    }
                }
            }
        };
        let overhead = self.overhead();
        self.gateway.metrics.observe_overhead(overhead);
        let (sink, mut response) = sse::channel();
        response.headers_mut().insert(OVERHEAD, milliseconds(overhead));
        tokio::spawn(Streaming::new(self, chosen, events, sink).run());
        Ok(response)
    }

    /// A stream of an upstream.
    pub(crate) async fn open(
        &mut self,
        chosen: &Chosen,
        request: &Value,
    ) -> Result<Events, UpstreamFault> {
        self.attempts += 1;
        let limits = (self.gateway.options.first_byte, self.gateway.options.stall);
        let began = Instant::now();
        let opened = Events::open(&chosen.upstream.client, self.route, request, limits).await;
        self.upstream += began.elapsed();
        opened
    }

    /// Counts a further attempt in, if one is left.
    pub(crate) fn may_repair(&mut self) -> bool {
        let is_left = self.repairs < self.gateway.options.repairs;
        if is_left {
            self.repairs += 1;
            self.gateway.metrics.count_repair();
        }
        is_left
    }
}

fn milliseconds(time: Duration) -> HeaderValue {
    let told = format!("{:.3}", time.as_secs_f64() * 1e3);
    HeaderValue::from_str(&told).unwrap_or(HeaderValue::from_static("0"))
}
