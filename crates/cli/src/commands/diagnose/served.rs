//! A diagnosis of what a server serves, on its own engine and beside its users.

use std::{sync::Arc, time::Instant};

use anyhow::Result;
use exrail_server::{BootBoard, Diagnostics, DiagnosticsError, Services};
use exrail_verify::{GoldError, GoldSet, MIN_PROBE_TOKENS, VerifyError};
use exrail_wire::DiagnosticsRequest;
use serde_json::Value;

use super::{
    Diagnose, DiagnosedSample,
    measure::{Over, Run},
};
use crate::{
    load::CollectionSpec,
    options::{EncoderArgs, EngineArgs, Sources},
    output::Output,
    preflight::Declared,
};

/// What a diagnosis needs to know of the server that it runs in.
pub(crate) struct Served {
    pub(crate) board: Arc<BootBoard>,
    /// By their names in requests, and as they were given; the first one is that of `--model`.
    pub(crate) generators: Vec<(String, String)>,
    /// Of the first one.
    pub(crate) declared: Declared,
    pub(crate) engine: EngineArgs,
    pub(crate) encoder: EncoderArgs,
    pub(crate) sources: Sources,
    pub(crate) collections: Vec<CollectionSpec>,
}

impl Diagnostics for Served {
    fn report(
        &self,
        services: &Services,
        collection: &str,
        asked: &DiagnosticsRequest,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(String, Value), DiagnosticsError> {
        let gold = GoldSet::parse(&asked.gold).map_err(|error| refused("gold", &error))?;
        let options = self.options(&services.model_name, asked)?;
        let spec = self.collections.iter().find(|spec| spec.name == collection);
        let Some(spec) = spec else {
            return Err(refused("collection", &format!("expected one of a folder: {collection}")));
        };
        let index = services.collections[collection].index().remembering();
        let phases = self.board.status().phases;
        let run = Run {
            options: &options,
            services,
            index: &index,
            gold: &gold,
            spec,
            output: Output::silent(),
            started: Instant::now(),
            ready_s: phases.iter().map(|phase| phase.took.as_secs_f64()).sum(),
            is_over,
        };
        let measured = run.measure().and_then(|(diagnosis, _)| {
            let json = diagnosis.to_json()?;
            Ok((diagnosis.trace_id, json))
        });
        measured.map_err(|error| explained(&error))
    }
}

impl Served {
    fn options(
        &self,
        model: &str,
        asked: &DiagnosticsRequest,
    ) -> Result<Diagnose, DiagnosticsError> {
        let least = |field, found: Option<usize>, least: usize| match found {
            Some(found) if found < least => {
                Err(refused(field, &format!("expected at least {least}, found {found}")))
            }
            _ => Ok(found.map(|found| found as u64)),
        };
        if asked.question.as_ref().is_some_and(|question| question.trim().is_empty()) {
            return Err(refused("question", &"expected text, found none"));
        }
        let found = self.generators.iter().find(|(known, _)| known == model);
        let given = found.map_or(model, |(_, given)| given);
        // A manifest is of one model.
        let is_declared = given == self.engine.model;
        Ok(Diagnose {
            diagnosed: Some(given.to_owned()),
            gold: None,
            collection: None,
            question: asked.question.clone(),
            made_of: None,
            deep: asked.deep.unwrap_or(false),
            // A server holds one set of weights, and has no room for others.
            modes: Vec::new(),
            html: None,
            junit: None,
            observations: None,
            compare: None,
            under_test: String::new(),
            declared: if is_declared { self.declared.clone() } else { Declared::default() },
            sample: DiagnosedSample {
                answered: asked.answered,
                unanswerable: asked.unanswerable,
                lambda: asked.lambda,
                cache_tokens: least("cache_tokens", asked.cache_tokens, MIN_PROBE_TOKENS)?,
                quant_tokens: None,
                sample_seed: asked.sample_seed.unwrap_or(1),
            },
            engine: self.engine.clone(),
            encoder: self.encoder.clone(),
            sources: self.sources.clone(),
        })
    }
}

fn refused(field: &'static str, problem: &dyn std::fmt::Display) -> DiagnosticsError {
    DiagnosticsError::Refused { field, problem: problem.to_string() }
}

/// A gold set of other documents is a matter of the request; everything else is ours.
fn explained(error: &anyhow::Error) -> DiagnosticsError {
    if error.is::<Over>() {
        return DiagnosticsError::Over;
    }
    let of_gold = error.chain().find_map(|cause| match cause.downcast_ref::<VerifyError>() {
        Some(VerifyError::Gold(gold)) => Some(gold),
        _ => cause.downcast_ref::<GoldError>(),
    });
    match of_gold {
        Some(gold) => refused("gold", gold),
        None => DiagnosticsError::Failed(format!("{error:#}")),
    }
}
