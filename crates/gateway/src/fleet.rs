//! Which upstream is asked, and how long a request waits for one.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::select_all;

use crate::{
    error::GatewayError,
    upstream::{Fence, FencePhase, InFlight, Proved, Upstream},
};

/// All upstreams.
#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) upstreams: Vec<Arc<Upstream>>,
    /// How long a request is held at closed fences, and how many are.
    hold: (Duration, usize),
    held: AtomicUsize,
}

/// An upstream that may be asked.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) proved: Arc<Proved>,
    pub(crate) model: String,
    /// How long the request was held.
    pub(crate) held: Duration,
    _in_flight: InFlight,
}

/// A place among the requests that are held.
struct Held<'a>(&'a AtomicUsize);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Fleet {
    pub(crate) fn new(upstreams: Vec<Arc<Upstream>>, hold: (Duration, usize)) -> Self {
        Self { upstreams, hold, held: AtomicUsize::new(0) }
    }

    /// Requests that are held now.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Every model that somebody serves now, once.
    pub(crate) fn models(&self) -> Vec<String> {
        let mut models: Vec<String> = Vec::new();
        for proved in self.upstreams.iter().filter_map(|upstream| upstream.proved()) {
            models.extend(proved.detected.models.iter().cloned());
        }
        models.sort();
        models.dedup();
        models
    }

    /// An upstream for this model, but none of those that were tried. While every fence is closed the request is held.
    pub(crate) async fn choose(
        &self,
        model: Option<&str>,
        session: Option<&str>,
        tried: &[Arc<Upstream>],
    ) -> Result<Chosen, GatewayError> {
        let began = Instant::now();
        if let Some(chosen) = self.pick(model, session, tried, began)? {
            return Ok(chosen);
        }
        let (limit, places) = self.hold;
        let before = self.held.fetch_add(1, Ordering::Relaxed);
        let _place = Held(&self.held);
        if before >= places {
            return Err(self.not_ready());
        }
        let chosen = tokio::time::timeout(limit, async {
            loop {
                let mut changes: Vec<_> = self.upstreams.iter().map(|it| it.changes()).collect();
                // What opened since the last look is seen now.
                if let Some(chosen) = self.pick(model, session, tried, began)? {
                    return Ok(chosen);
                }
                let changed = changes.iter_mut().map(|change| Box::pin(change.changed()));
                select_all(changed).await.0.ok();
            }
        })
        .await;
        chosen.unwrap_or_else(|_| Err(self.not_ready()))
    }

    /// Whether another upstream than those that were tried may be asked at once.
    pub(crate) fn has_other(
        &self,
        model: Option<&str>,
        session: Option<&str>,
        tried: &[Arc<Upstream>],
    ) -> bool {
        matches!(self.pick(model, session, tried, Instant::now()), Ok(Some(_)))
    }

    /// An open one; none while all that are left are closed.
    fn pick(
        &self,
        model: Option<&str>,
        session: Option<&str>,
        tried: &[Arc<Upstream>],
        began: Instant,
    ) -> Result<Option<Chosen>, GatewayError> {
        let untried = |upstream: &&Arc<Upstream>| !tried.iter().any(|it| Arc::ptr_eq(it, upstream));
        let open: Vec<(&Arc<Upstream>, Arc<Proved>)> = self
            .upstreams
            .iter()
            .filter(untried)
            .filter_map(|upstream| Some((upstream, upstream.proved()?)))
            .collect();
        if open.is_empty() {
            return Ok(None);
        }
        let serves = |(_, proved): &&(&Arc<Upstream>, Arc<Proved>)| {
            model.is_none_or(|model| proved.detected.models.iter().any(|it| it == model))
        };
        let serving: Vec<_> = open.iter().filter(serves).collect();
        if serving.is_empty() {
            // One that is closed now may be the one that serves it.
            let all_open = self.upstreams.iter().all(|upstream| upstream.proved().is_some());
            if !all_open {
                return Ok(None);
            }
            let (found, known) = (model.unwrap_or_default().to_owned(), self.models());
            return Err(GatewayError::UnknownModel { found, known });
        }
        let awake: Vec<_> =
            serving.iter().filter(|(upstream, _)| upstream.rests().is_none()).collect();
        let Some(first) = awake.iter().map(|(upstream, _)| upstream.options.priority).min() else {
            let rest = serving.iter().filter_map(|(upstream, _)| upstream.rests()).min();
            let retry_after_s = rest.unwrap_or_default().as_secs() + 1;
            let name = serving[0].0.name().to_owned();
            return Err(GatewayError::Resting { upstream: name, retry_after_s });
        };
        let candidates = awake.into_iter().filter(|(it, _)| it.options.priority == first);
        let chosen = match session {
            Some(session) => candidates.max_by_key(|(it, _)| affinity(session, it.name())),
            None => candidates.min_by(|(a, _), (b, _)| load(a).total_cmp(&load(b))),
        };
        Ok(chosen.map(|(upstream, proved)| Chosen {
            upstream: Arc::clone(upstream),
            proved: Arc::clone(proved),
            model: model.map_or_else(|| asked_by_default(upstream, proved), str::to_owned),
            held: began.elapsed(),
            _in_flight: upstream.take(),
        }))
    }

    /// How far the one is that is furthest.
    fn not_ready(&self) -> GatewayError {
        let closed = |upstream: &Arc<Upstream>| match upstream.fence() {
            Fence::Closed { phase, reason } => Some((upstream.name().to_owned(), phase, reason)),
            Fence::Open(_) => None,
        };
        let all: Vec<_> = self.upstreams.iter().filter_map(closed).collect();
        let furthest =
            all.iter().find(|(_, phase, _)| *phase == FencePhase::WarmUp).or(all.first());
        let (upstream, phase, reason) = furthest.cloned().unwrap_or_else(|| {
            ("all".to_owned(), FencePhase::Detect, "no upstream serves this model".to_owned())
        });
        GatewayError::NotReady { upstream, phase, reason }
    }
}

fn asked_by_default(upstream: &Upstream, proved: &Proved) -> String {
    let expected = upstream.options.expected_model.clone();
    expected.or_else(|| proved.detected.models.first().cloned()).unwrap_or_default()
}

/// Requests for each part of an upstream's share.
fn load(upstream: &Upstream) -> f64 {
    (upstream.in_flight() + 1) as f64 / f64::from(upstream.options.weight.max(1))
}

/// Rendezvous hashing: a session stays where it is while its upstream is there.
fn affinity(session: &str, upstream: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (session, upstream).hash(&mut hasher);
    hasher.finish()
}
