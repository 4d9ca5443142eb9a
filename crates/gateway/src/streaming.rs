//! A stream on its way through: told as it comes where nothing is demanded of it, held back until it conforms where
//! something is, and never ended as if it were whole when it is not.

use std::time::Instant;

use exrail_server::sse::{EventSink, heartbeats};
use serde_json::Value;

use crate::{
    error::GatewayError,
    events::{Event, Events},
    fault::UpstreamFault,
    fleet::Chosen,
    relay::{GONE, Relay},
    reply,
    settle::{self, Choice},
};

/// Bytes of an answer up to which every event is judged for what its characters are.
const JUDGED_BYTES: usize = 1024;
/// Most choices of one answer that are put together.
const MAX_CHOICES: usize = 128;

/// A stream and what came of it.
pub(crate) struct Streaming {
    relay: Relay,
    chosen: Chosen,
    events: Events,
    sink: EventSink,
    choices: Vec<Choice>,
    tokens: Option<[u64; 2]>,
    /// Events that wait for the end.
    held: Vec<Value>,
    is_holding: bool,
    n_told: usize,
}

/// What came of asking once more.
enum Again {
    /// Another stream.
    Open,
    /// The client went meanwhile.
    Gone,
}

/// How a stream ended.
enum Ended {
    /// Whole.
    Done,
    /// The client went; dropping the stream ends it at the upstream.
    Gone,
    /// With a fault.
    Failed(UpstreamFault),
}

impl Streaming {
    pub(crate) fn new(relay: Relay, chosen: Chosen, events: Events, sink: EventSink) -> Self {
        let is_holding = relay.demand.form.holds_from_the_start();
        let (choices, held) = <_>::default();
        Self { relay, chosen, events, sink, choices, tokens: None, held, is_holding, n_told: 0 }
    }

    /// Tells the stream to its end.
    pub(crate) async fn run(mut self) {
        loop {
            let began = Instant::now();
            let ended = self.forward().await;
            self.relay.upstream += began.elapsed();
            match ended {
                Ended::Gone => return self.gone().await,
                Ended::Failed(fault) => {
                    let error = self.relay.upstream_failed(&self.chosen, fault);
                    return self.fail(error).await;
                }
                Ended::Done => {}
            }
            self.chosen.upstream.succeeded(&self.chosen.proved);
            let Err(violation) = settle::check(&self.relay.demand.form, &self.choices) else {
                return self.finish().await;
            };
            match self.again(&violation).await {
                Some(Ok(Again::Open)) => {}
                Some(Ok(Again::Gone)) => return self.gone().await,
                Some(Err(fault)) => {
                    let error = self.relay.upstream_failed(&self.chosen, fault);
                    return self.fail(error).await;
                }
                None => {
                    let repairs = self.relay.repairs;
                    return self.fail(GatewayError::NotConforming { violation, repairs }).await;
                }
            }
        }
    }

    /// Takes events until the stream ends in one way or another.
    async fn forward(&mut self) -> Ended {
        let mut beat = heartbeats();
        loop {
            tokio::select! {
                () = self.sink.closed() => return Ended::Gone,
                event = self.events.next() => match event {
                    Ok(Event::Data(event)) => match self.take(event).await {
                        Ok(true) => {}
                        Ok(false) => return Ended::Gone,
                        Err(fault) => return Ended::Failed(fault),
                    },
                    Ok(Event::Done) => return Ended::Done,
                    Err(fault) => return Ended::Failed(fault),
                },
                _ = beat.tick(), if self.is_holding => drop(self.sink.heartbeat().await),
            }
        }
    }

    /// Judges an event, and tells it unless it has to wait. False when the client has gone.
    async fn take(&mut self, event: Value) -> Result<bool, UpstreamFault> {
        self.relay.same_model(&self.chosen, &event)?;
        self.tokens = reply::usage(&event).or(self.tokens);
        let mut has_calls = false;
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().and_then(|at| usize::try_from(at).ok());
            let index = index.unwrap_or(0).min(MAX_CHOICES - 1);
            if self.choices.len() <= index {
                self.choices.resize_with(index + 1, Choice::default);
            }
            self.choices[index].add(choice);
            has_calls |= choice["delta"]["tool_calls"].is_array();
            if self.choices[index].text.len() <= JUDGED_BYTES {
                reply::legible(&self.choices[index].text)?;
            }
        }
        // Half a call is none, and the end is told when the record is written.
        self.is_holding |= has_calls || self.events.is_finished();
        if self.is_holding {
            self.held.push(event);
            return Ok(true);
        }
        self.n_told += 1;
        let is_told = self.tell(&event).await;
        // The client was waited for, not the upstream.
        self.events.restart();
        Ok(is_told)
    }

    /// Tells an event to a client that takes it in time; one that does not read holds the upstream up.
    async fn tell(&self, event: &Value) -> bool {
        let limit = self.relay.gateway.options.stall;
        matches!(tokio::time::timeout(limit, self.sink.send(event)).await, Ok(Ok(())))
    }

    /// Asks once more, where nothing was told yet and an attempt is left.
    async fn again(
        &mut self,
        violation: &settle::Violation,
    ) -> Option<Result<Again, UpstreamFault>> {
        if self.n_told > 0 || !self.relay.may_repair() {
            return None;
        }
        let api = self.chosen.proved.detected.kind.api();
        let request = self.relay.demand.for_upstream(api, &self.chosen.model);
        let repaired = settle::repair(&self.relay.demand, &request, &self.choices, violation);
        let request = repaired.unwrap_or(request);
        self.choices.clear();
        self.held.clear();
        tokio::select! {
            () = self.sink.closed() => Some(Ok(Again::Gone)),
            opened = self.sink.alive_while(self.relay.open(&self.chosen, &request)) => {
                Some(opened.map(|events| {
                    self.events = events;
                    Again::Open
                }))
            }
        }
    }

    /// Records the answer, and tells its end.
    async fn finish(mut self) {
        for choice in &self.choices {
            if let Err(fault) = reply::legible(&choice.text) {
                let error = self.relay.upstream_failed(&self.chosen, fault);
                return self.fail(error).await;
            }
        }
        let recorded = self.relay.record(&self.chosen, &self.choices, self.tokens, None).await;
        if let Err(error) = recorded {
            return self.sink.fail_with(&GatewayError::from(error).body()).await;
        }
        for event in &self.held {
            if !self.tell(event).await {
                return;
            }
        }
        drop(self.sink.done().await);
    }

    /// Dropping the stream ends it at the upstream.
    async fn gone(mut self) {
        let recorded = self.relay.record(&self.chosen, &[], None, Some(GONE)).await;
        recorded.unwrap_or_else(|error| tracing::error!(%error, "not traced"));
    }

    async fn fail(self, error: GatewayError) {
        let body = error.body();
        self.relay.fail(&self.chosen, error).await;
        self.sink.fail_with(&body).await;
    }
}
