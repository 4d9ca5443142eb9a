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
use exrail_wire::{Pins, RelayLatency, RelayRecord, TraceBody};
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
    upstream::{Proved, Upstream},
};

/// How often another upstream is asked, before anything was told to the client.
const MAX_ATTEMPTS: usize = 3;

/// The fault of a request whose client left.
pub(crate) const GONE: &str = "client_gone";

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
    /// Who was asked, as long as no record says what came of it.
    under_way: Option<(Arc<Upstream>, Arc<Proved>, String)>,
}

/// Whoever leaves while an upstream computes leaves a record behind.
impl Drop for Relay {
    fn drop(&mut self) {
        let Some((upstream, proved, model)) = self.under_way.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let body = self.told(
            &upstream,
            &proved,
            &model,
            Ending { fault: Some(GONE), ..Ending::default() },
        );
        let (traces, identity) = (self.gateway.traces.clone(), self.identity.clone());
        runtime.spawn(async move {
            if let Err(error) = traces.append(&identity, &proved.pins, body).await {
                tracing::error!(%error, "a request whose client left could not be traced");
            }
        });
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default)]
struct Ending<'a> {
    choices: &'a [Choice],
    tokens: Option<[u64; 2]>,
    fault: Option<&'static str>,
}

/// Answers a request for a generation.
pub(crate) async fn relay(
    gateway: Arc<Gateway>,
    route: &'static str,
    agent_id: Option<String>,
    body: Bytes,
) -> Result<Response, GatewayError> {
    let started = Instant::now();
    let mut identity = TraceIdentity {
        trace_id: random_name("trace")?,
        request_id: random_name("request")?,
        agent_id,
        ..TraceIdentity::default()
    };
    let demand = match Demand::read(&body) {
        Ok(demand) => demand,
        Err(error) => return Err(refuse(&gateway, &identity, error.into()).await),
    };
    identity.session_id.clone_from(&demand.session);
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
        under_way: None,
    };
    if relay.demand.streams { relay.stream().await } else { relay.whole().await }
}

/// Records a request that no upstream was asked for.
async fn refuse(gateway: &Gateway, identity: &TraceIdentity, error: GatewayError) -> GatewayError {
    let body = TraceBody::Guard { guard: error.code().to_owned(), detail: error.to_string() };
    // Nothing is released by it, so that it may be told without a record.
    if let Err(problem) = gateway.traces.append(identity, &Pins::default(), body).await {
        tracing::error!(%problem, "a refused request could not be traced");
    }
    error
}

impl Relay {
    /// An upstream that may be asked; a request without one leaves a record of that.
    async fn choose(&mut self, tried: &[Arc<Upstream>]) -> Result<Chosen, GatewayError> {
        match self.find(tried).await {
            Ok(chosen) => Ok(chosen),
            Err(error) => Err(refuse(&self.gateway, &self.identity, error).await),
        }
    }

    /// An upstream that may be asked and honours what the request says.
    async fn find(&mut self, tried: &[Arc<Upstream>]) -> Result<Chosen, GatewayError> {
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
        tried: &mut Vec<Arc<Upstream>>,
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
        self.begin(chosen);
        let began = Instant::now();
        let (client, limit) = (&chosen.upstream.client, self.gateway.options.first_byte);
        let body = Bytes::from(request.to_string());
        let reply = client.whole(Method::POST, self.route, Some(body), limit).await;
        self.upstream += began.elapsed();
        let reply = reply?.json()?;
        self.same_model(chosen, &reply)?;
        reply::text(&reply)?;
        let choices = Choice::all(&reply);
        choices.iter().try_for_each(|choice| reply::legible(&choice.text))?;
        // Of several prompts there are as many times so many.
        if !(choices.len() as u64).is_multiple_of(self.demand.n) {
            return Err(UpstreamFault::NoAnswer { expected: "as many `choices` as `n`" });
        }
        chosen.upstream.succeeded(&chosen.proved);
        Ok(reply)
    }

    /// Whether the model that was asked is the one that answered.
    pub(crate) fn same_model(&self, chosen: &Chosen, reply: &Value) -> Result<(), UpstreamFault> {
        let Some(found) = reply["model"].as_str() else { return Ok(()) };
        if found == chosen.model {
            return Ok(());
        }
        Err(UpstreamFault::WrongModel { expected: chosen.model.clone(), found: found.to_owned() })
    }

    /// Takes note of a fault and gives it its upstream's name.
    pub(crate) fn upstream_failed(&self, chosen: &Chosen, fault: UpstreamFault) -> GatewayError {
        chosen.upstream.failed(&chosen.proved, &fault);
        self.gateway.metrics.count_fault(chosen.upstream.name(), fault.code());
        GatewayError::Upstream { upstream: chosen.upstream.name().to_owned(), fault }
    }

    /// Records a whole answer and lets it go.
    async fn tell(mut self, chosen: &Chosen, reply: Value) -> Result<Response, GatewayError> {
        let choices = Choice::all(&reply);
        self.record(chosen, &choices, reply::usage(&reply), None).await?;
        let overhead = self.overhead();
        self.gateway.metrics.observe_overhead(overhead);
        let mut response = Json(reply).into_response();
        response.headers_mut().insert(OVERHEAD, milliseconds(overhead));
        Ok(response)
    }

    /// Records a failure; one that cannot be recorded is told all the same, as nothing is released by it.
    pub(crate) async fn fail(mut self, chosen: &Chosen, error: GatewayError) -> GatewayError {
        if let Err(problem) = self.record(chosen, &[], None, Some(error.code())).await {
            tracing::error!(%problem, "a failed request could not be traced");
        }
        error
    }

    /// Time of this request that was neither the upstream's nor the fence's.
    fn overhead(&self) -> Duration {
        self.started.elapsed().saturating_sub(self.upstream).saturating_sub(self.held)
    }

    /// Counts an attempt in.
    fn begin(&mut self, Chosen { upstream, proved, model, .. }: &Chosen) {
        self.attempts += 1;
        self.under_way = Some((Arc::clone(upstream), Arc::clone(proved), model.clone()));
    }

    /// Writes the record of a request.
    ///
    /// # Errors
    /// It could not be written: nothing may be released.
    pub(crate) async fn record(
        &mut self,
        chosen: &Chosen,
        choices: &[Choice],
        tokens: Option<[u64; 2]>,
        fault: Option<&'static str>,
    ) -> Result<(), TraceError> {
        self.under_way = None;
        let ending = Ending { choices, tokens, fault };
        let body = self.told(&chosen.upstream, &chosen.proved, &chosen.model, ending);
        self.gateway.traces.append(&self.identity, &chosen.proved.pins, body).await
    }

    /// The record of a request that ended.
    fn told(
        &self,
        upstream: &Upstream,
        proved: &Proved,
        model: &str,
        Ending { choices, tokens, fault }: Ending<'_>,
    ) -> TraceBody {
        let api = proved.detected.kind.api();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let said: String = choices.iter().map(|choice| choice.text.as_str()).collect();
        let seed = self.demand.seed.as_ref().filter(|_| api.has_seed);
        TraceBody::Relay(Box::new(RelayRecord {
            route: self.route,
            upstream: upstream.name().to_owned(),
            kind: api.name,
            model: model.to_owned(),
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
        }))
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
        self.begin(chosen);
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
