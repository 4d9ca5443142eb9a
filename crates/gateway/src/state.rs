//! What a gateway consists of.

use std::{sync::Arc, time::Duration};

use exrail_server::{KeyRing, Keys, TraceIdentity, TraceLog, random_name};
use exrail_wire::{Pins, TraceBody};

use crate::{
    fleet::Fleet,
    metrics::Metrics,
    upstream::{Proved, Upstream},
    warm_up::{self, FenceOptions},
};

/// What one request may take, and how upstreams are proved.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// How upstreams are proved and watched.
    pub fence: FenceOptions,
    /// How long a request is held while no upstream may be asked.
    pub hold: Duration,
    /// How many requests are held at once.
    pub hold_places: usize,
    /// Largest body, bytes.
    pub body_bytes: usize,
    /// How long a body may take.
    pub body_timeout: Duration,
    /// How long the line and header fields of a request may take.
    pub head_timeout: Duration,
    /// Until the first byte of an answer.
    pub first_byte: Duration,
    /// Between two events of a stream.
    pub stall: Duration,
    /// Further attempts when an answer does not conform.
    pub repairs: usize,
    /// Whether fields that an upstream ignores are passed on to it, rather than refused.
    pub passes_unhonoured: bool,
}

impl Default for GatewayOptions {
    fn default() -> Self {
        Self {
            fence: FenceOptions::default(),
            hold: Duration::from_secs(30),
            hold_places: 64,
            body_bytes: 4 << 20,
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(30),
            first_byte: Duration::from_secs(120),
            stall: Duration::from_secs(30),
            repairs: 1,
            passes_unhonoured: false,
        }
    }
}

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    pub(crate) keys: KeyRing,
    pub(crate) traces: TraceLog,
    pub(crate) fleet: Fleet,
    pub(crate) options: GatewayOptions,
    pub(crate) metrics: Metrics,
}

impl Gateway {
    /// In front of these upstreams, all of them behind closed fences.
    #[must_use]
    pub fn new(
        keys: Keys,
        traces: TraceLog,
        upstreams: Vec<Upstream>,
        options: GatewayOptions,
    ) -> Arc<Self> {
        let upstreams = upstreams.into_iter().map(Arc::new).collect();
        let fleet = Fleet::new(upstreams, (options.hold, options.hold_places));
        let keys = KeyRing::new(keys);
        Arc::new(Self { keys, traces, fleet, options, metrics: Metrics::default() })
    }

    /// Its upstreams.
    #[must_use]
    pub fn upstreams(&self) -> &[Arc<Upstream>] {
        &self.fleet.upstreams
    }

    /// Its keys, which may be replaced.
    #[must_use]
    pub fn keys(&self) -> &KeyRing {
        &self.keys
    }

    /// Begins to prove the upstreams; ends with the runtime.
    pub fn prove(self: &Arc<Self>) {
        for upstream in &self.fleet.upstreams {
            let gateway = Arc::downgrade(self);
            let told = move |upstream: &Upstream, proved: Option<&Proved>, why: &str| {
                let Some(gateway) = gateway.upgrade() else { return };
                gateway.fence_told(upstream, proved, why);
            };
            let options = self.options.fence.clone();
            tokio::spawn(warm_up::keep(Arc::clone(upstream), options, Arc::new(told)));
        }
    }

    /// Records that a fence was closed, or that what is behind it is another one now.
    fn fence_told(self: &Arc<Self>, upstream: &Upstream, proved: Option<&Proved>, why: &str) {
        let guard = if proved.is_some() { "upstream_changed" } else { "upstream_fence" };
        self.metrics.count_fault(upstream.name(), guard);
        let detail = format!("upstream `{}`: {why}", upstream.name());
        tracing::warn!(guard, "{detail}");
        let pins = proved.map_or_else(Pins::default, |proved| proved.pins.clone());
        let body = TraceBody::Guard { guard: guard.to_owned(), detail };
        let Ok(trace_id) = random_name("trace") else { return };
        let gateway = Arc::clone(self);
        tokio::spawn(async move {
            let identity = TraceIdentity { trace_id, ..TraceIdentity::default() };
            if let Err(error) = gateway.traces.append(&identity, &pins, body).await {
                tracing::error!(%error, "a fence could not be traced");
            }
        });
    }
}
