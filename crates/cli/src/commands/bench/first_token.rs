//! From nothing to the first token, once, in a process of its own: the way of every command that
//! generates, to the engine's thread, without the warm-up fence that a server puts behind it. The hash of
//! the file, for which no token waits, ends unfinished with the process; the record has that of [`super::speed`].

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, bail};
use exrail_engine::{
    Admission, Engine, EngineOptions, Event, GenerateRequest, Generation, LoadOptions, Need,
    Sampling, load_admitted,
};
use exrail_text::Specials;
use serde::{Deserialize, Serialize};

use super::{
    plan::Plan,
    process::{self, Resident},
};
use crate::{
    device::{Device, Job, Measured},
    memory,
};

/// Positions of the KV cache at most: one page, so that its size says nothing about the engine's.
const CONTEXT: usize = 256;

/// The prompt.
const PROMPT: &str = "Hello";

/// What one process measured of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FirstToken {
    /// Seconds until the weights and the tokenizer were loaded.
    pub(super) load_s: f64,
    /// Seconds until the first token.
    pub(super) first_token_s: f64,
    /// Memory after the first token.
    pub(super) resident: Option<Resident>,
    /// Bytes of the KV pool.
    pub(super) kv_bytes: u64,
    /// Format of the largest part of the weights.
    pub(super) quant: String,
    /// Architecture in the file.
    pub(super) architecture: String,
    /// Device and kernels.
    pub(super) kernels: String,
}

/// Measures; `since` is the start of the process, or near it.
///
/// # Errors
/// The model cannot be loaded, or gives no token.
pub(super) fn run(plan: &Plan, path: &Path, since: Instant) -> Result<FirstToken> {
    let (device, _) = Device::open(plan.device, plan.cpu(), plan.batch_invariant)?;
    device.run(Start { plan, path, since })
}

/// The way from an open device.
struct Start<'a> {
    plan: &'a Plan,
    path: &'a Path,
    since: Instant,
}

impl Job for Start<'_> {
    type Out = FirstToken;

    fn run<B: Measured>(self, backend: B) -> Result<FirstToken> {
        let Start { plan, path, since } = self;
        measure(backend, plan, path, since)
    }
}

fn measure<B: Measured>(
    backend: B,
    plan: &Plan,
    path: &Path,
    since: Instant,
) -> Result<FirstToken> {
    let options = EngineOptions {
        max_sequences: 1,
        kv_pages: Some(1),
        kv_dtype: plan.kv_dtype(),
        ..EngineOptions::default()
    };
    let (device, free) = backend.memory(None);
    let admission = Admission { device, free, need: Need::Engine(options) };
    let load = LoadOptions::default();
    let loaded = load_admitted(backend, path, load, &admission, &mut |_| {})
        .map_err(memory::refused_without_options)?;
    let load_s = since.elapsed().as_secs_f64();
    let architecture = loaded.config.architecture.clone();
    let max_context = Some(CONTEXT.min(loaded.config.context_len));
    let options = EngineOptions { max_context, ..options };
    let engine = Engine::start(loaded, options)?;
    let tokenizer = engine.tokenizer();
    let start = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let text = tokenizer.encode(PROMPT, Specials::AsText)?;
    let prompt = start.into_iter().chain(text).collect();
    let mut request = GenerateRequest::new(prompt, 1);
    request.sampling = Sampling::greedy();
    request.stop_at_eos = false;
    wait_for_token(&engine.submit(request)?)?;
    let first_token_s = since.elapsed().as_secs_f64();
    let resident = process::resident();
    let facts = engine.facts().clone();
    engine.shutdown();
    Ok(FirstToken {
        load_s,
        first_token_s,
        resident,
        kv_bytes: facts.kv_bytes as u64,
        quant: facts.quant,
        architecture,
        kernels: facts.backend,
    })
}

/// Waits for the next token.
///
/// # Errors
/// The answer ended instead, and why.
pub(super) fn wait_for_token(generation: &Generation) -> Result<()> {
    loop {
        match generation.events.recv().context("the engine ended before the next token")? {
            Event::Token(_) => return Ok(()),
            Event::Started { .. }
            | Event::Rotated(_)
            | Event::RolledBack { .. }
            | Event::Tail(_) => {}
            Event::Finished(_) => bail!("expected another token, found the end"),
            Event::Failed(fault) => return Err(fault.into()),
        }
    }
}
