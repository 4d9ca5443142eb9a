//! How many tool calls of each model could be read, and which models call none for now (G-29).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use exrail_verify::ToolCircuit;

use crate::error::ApiError;

/// A circuit for each model that was asked with tools. It outlives the model's place in memory.
#[derive(Debug, Default)]
pub(crate) struct ToolCircuits(Mutex<BTreeMap<String, Arc<ModelCircuit>>>);

/// The circuit of one model.
#[derive(Debug, Default)]
pub(crate) struct ModelCircuit(Mutex<ToolCircuit>);

impl ToolCircuits {
    /// That of a model which is served; names that clients invent never get here.
    pub(crate) fn of(&self, model: &str) -> Arc<ModelCircuit> {
        let mut circuits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(circuits.entry(model.to_owned()).or_default())
    }

    /// Every model that was asked with tools, and whether its circuit is open.
    pub(crate) fn states(&self) -> Vec<(String, bool)> {
        let circuits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        circuits.iter().map(|(model, it)| (model.clone(), it.closes_in().is_some())).collect()
    }
}

impl ModelCircuit {
    /// Notes a call of an answer, and whether it could be read.
    pub(crate) fn note(&self, is_parsed: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).note(Instant::now(), is_parsed);
    }

    /// Time after which it is closed if nobody calls; none when it is closed.
    pub(crate) fn closes_in(&self) -> Option<Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).closes_in(Instant::now())
    }

    /// Refuses a request in which the model may call what it likes, while its calls cannot be read.
    pub(crate) fn admit(&self, model: &str) -> Result<(), ApiError> {
        match self.closes_in() {
            None => Ok(()),
            Some(wait) => Err(ApiError::ToolCircuitOpen {
                model: model.into(),
                retry_after_s: wait.as_secs() + 1,
            }),
        }
    }
}
