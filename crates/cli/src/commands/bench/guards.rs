//! What the inline guards cost, with them and without them in turns in one process.
//!
//! Two engines of one model, and one of them works at a time. The guarded one does what `exrail serve` does for a
//! chat: the prompt lint, pages checked before every step and audited, the fence's counters, the loop guard, a
//! rotation that may come with its watch over open JSON, and a deadline. The other has none of them. The check that
//! logits are numbers is part of choosing a token and is in both.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use exrail_engine::{
    Admission, Engine, EngineHandle, EngineOptions, GenerateRequest, LoadOptions, LoopGuard,
    MAX_HELD_TOKENS, Need, RotatePolicy, Rotation, RotationOptions, Sampling, WarmUpPlan,
    load_admitted, warm_up_told,
};
use exrail_kernels::PAGE_TOKENS;
use exrail_metrics::median;
use exrail_text::{ChatMessage, Prompt, RenderOptions, Specials, encode_prompt, lint_prompt};
use serde::{Deserialize, Serialize};

use super::{first_token::wait_for_token, plan::Plan, record::Spread};
use crate::{
    device::{Device, Job, Measured},
    memory,
    progress::Bars,
};

/// Share of decode speed, and time to the first token in milliseconds, that all guards together may take.
pub(super) const DECODE_LIMIT: f64 = 0.02;
pub(super) const FIRST_TOKEN_LIMIT_MS: f64 = 5.0;

/// Tokens of the prompt in front of a decode test.
const SHORT_PROMPT: usize = 16;

/// A deadline that nobody reaches.
const LATE: Duration = Duration::from_secs(3600);

/// Samples of one process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Guards {
    /// Device and kernels.
    pub(super) kernels: String,
    /// Milliseconds to the first token, by the length of the prompt.
    pub(super) first_token_ms: Vec<FirstTokenTurns>,
    /// Tokens of all sequences a second.
    pub(super) decode: Vec<DecodeTurns>,
}

/// One length of prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FirstTokenTurns {
    pub(super) prompt: usize,
    pub(super) turns: Turns,
}

/// One number of sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DecodeTurns {
    pub(super) batch: usize,
    /// Whether tokens are drawn, at temperature 0.8 and top-p 0.95, or the most likely ones.
    pub(super) sampled: bool,
    pub(super) turns: Turns,
}

/// What was measured with and without the guards, a pair a repetition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Turns {
    pub(super) guarded: Vec<f64>,
    pub(super) unguarded: Vec<f64>,
}

impl Turns {
    fn push(&mut self, [guarded, unguarded]: [f64; 2]) {
        self.guarded.push(guarded);
        self.unguarded.push(unguarded);
    }

    fn pairs(&self) -> impl Iterator<Item = (f64, f64)> {
        self.guarded.iter().copied().zip(self.unguarded.iter().copied())
    }

    /// What guards add, pair by pair.
    pub(super) fn added(&self) -> Result<Spread> {
        Spread::of(self.pairs().map(|(with, without)| with - without).collect())
    }

    /// Which share of a rate guards take, pair by pair.
    pub(super) fn share_taken(&self) -> Result<Spread> {
        Spread::of(self.pairs().map(|(with, without)| 1.0 - with / without).collect())
    }

    /// Median without guards.
    pub(super) fn without(&self) -> Result<f64> {
        Ok(median(&self.unguarded)?)
    }
}

/// Loads the model twice and measures.
///
/// # Errors
/// The model cannot be loaded, or its context is too short.
pub(super) fn run(plan: &Plan, path: &Path, bars: &mut Bars) -> Result<Guards> {
    let (device, _) = Device::open(plan.device, plan.cpu(), plan.batch_invariant)?;
    device.run(Both { plan, path, bars })
}

struct Both<'a> {
    plan: &'a Plan,
    path: &'a Path,
    bars: &'a mut Bars,
}

impl Job for Both<'_> {
    type Out = Guards;

    fn run<B: Measured>(self, backend: B) -> Result<Guards> {
        let Both { plan, path, bars } = self;
        // In this order: the fence of the guarded engine counts what the device builds, for whomever.
        let unguarded = start(backend.clone(), plan, path, false)?;
        let guarded = start(backend, plan, path, true)?;
        let pair = Pair { guarded, unguarded };
        let guards = pair.measure(plan, bars);
        bars.clear();
        pair.guarded.engine.shutdown();
        pair.unguarded.engine.shutdown();
        guards
    }
}

fn start<B: Measured>(backend: B, plan: &Plan, path: &Path, guards: bool) -> Result<Subject> {
    let longest = plan.prompt.iter().copied().max().unwrap_or(0).max(SHORT_PROMPT);
    // What is read, what an answer may grow by until it rotates, and by how much open JSON may put that off.
    let each = (longest + plan.generated + 2 + MAX_HELD_TOKENS).div_ceil(PAGE_TOKENS);
    let options = EngineOptions {
        max_sequences: plan.most_sequences(),
        kv_pages: Some(each * plan.most_sequences()),
        prefill_chunk: plan.chunk,
        kv_dtype: plan.kv_dtype(),
        guards,
        ..EngineOptions::default()
    };
    let (device, free) = backend.memory(None);
    let admission = Admission { device, free, need: Need::Engine(options) };
    let load = LoadOptions::default();
    let loaded = load_admitted(backend, path, load, &admission, &mut |_| {})
        .map_err(memory::refused_without_options)?;
    // A hash beside the tests would take their time.
    loaded.model_sha256.wait()?;
    let engine = Engine::start(loaded, options)?;
    warm_up_told(&engine, &WarmUpPlan::of(&engine), &mut |_, _| {})?;
    Ok(Subject { engine, guards })
}

/// The same model twice.
struct Pair {
    guarded: Subject,
    unguarded: Subject,
}

impl Pair {
    fn measure(&self, plan: &Plan, bars: &mut Bars) -> Result<Guards> {
        let prompts = plan.prompt.iter().copied();
        let decode =
            plan.batch.iter().flat_map(|&batch| [false, true].map(|sampled| (batch, sampled)));
        let mut guards = Guards {
            kernels: self.guarded.engine.facts().backend.clone(),
            first_token_ms: prompts
                .map(|prompt| FirstTokenTurns { prompt, turns: Turns::default() })
                .collect(),
            decode: decode
                .map(|(batch, sampled)| DecodeTurns { batch, sampled, turns: Turns::default() })
                .collect(),
        };
        // The first repetition warms up and is not counted.
        for repetition in 0..=plan.repeat {
            bars.bench("with and without guards", repetition, plan.repeat + 1);
            for test in &mut guards.first_token_ms {
                let pair = self.in_turns(repetition, |subject| {
                    subject.first_token_ms(test.prompt, repetition)
                })?;
                (repetition > 0).then(|| test.turns.push(pair));
            }
            for test in &mut guards.decode {
                let &mut DecodeTurns { batch, sampled, .. } = test;
                let pair = self.in_turns(repetition, |subject| {
                    subject.decode(batch, sampled, plan.generated)
                })?;
                (repetition > 0).then(|| test.turns.push(pair));
            }
        }
        Ok(guards)
    }

    /// A pair of samples, guarded first. Which is measured first changes from one repetition to the next.
    fn in_turns(
        &self,
        repetition: usize,
        test: impl Fn(&Subject) -> Result<f64>,
    ) -> Result<[f64; 2]> {
        if repetition.is_multiple_of(2) {
            let guarded = test(&self.guarded)?;
            return Ok([guarded, test(&self.unguarded)?]);
        }
        let unguarded = test(&self.unguarded)?;
        Ok([test(&self.guarded)?, unguarded])
    }
}

/// An engine with or without guards.
struct Subject {
    engine: EngineHandle,
    guards: bool,
}

impl Subject {
    /// Milliseconds from a rendered prompt to its first token.
    fn first_token_ms(&self, n_tokens: usize, repetition: usize) -> Result<f64> {
        let (rendered, ids) = self.prompt(n_tokens, repetition)?;
        let since = Instant::now();
        if let Some(prompt) = rendered.as_ref().filter(|_| self.guards)
            && let Some(found) = lint_prompt(self.engine.tokenizer(), prompt, &ids)
        {
            bail!("prompt lint: expected nothing in a prompt of words, found {found}");
        }
        let generation = self.engine.submit(self.request(ids, 1, false))?;
        wait_for_token(&generation)?;
        Ok(since.elapsed().as_secs_f64() * 1e3)
    }

    /// A prompt of so many tokens that shares no page with that of another repetition.
    fn prompt(&self, n_tokens: usize, repetition: usize) -> Result<(Option<Prompt>, Vec<u32>)> {
        let words = (0..n_tokens).map(|i| format!("{repetition} {i} ")).collect::<String>();
        let tokenizer = self.engine.tokenizer();
        let (rendered, mut ids) = match self.engine.template() {
            Some(template) => {
                let message = ChatMessage::new("user", words);
                let prompt = template.render(&[message], &RenderOptions::default())?;
                let ids = encode_prompt(tokenizer, &prompt)?;
                (Some(prompt), ids)
            }
            None => (None, tokenizer.encode(&words, Specials::AsText)?),
        };
        ids.truncate(n_tokens);
        Ok((rendered, ids))
    }

    /// Tokens a second of answers that begin together.
    fn decode(&self, batch: usize, sampled: bool, n_tokens: usize) -> Result<f64> {
        let requests = (0..batch).map(|i| Ok(self.prompt(SHORT_PROMPT, i)?.1));
        let requests: Vec<Vec<u32>> = requests.collect::<Result<_>>()?;
        let since = Instant::now();
        let submit = |ids| Ok(self.engine.submit(self.request(ids, n_tokens, sampled))?);
        let generations = requests.into_iter().map(submit).collect::<Result<Vec<_>>>()?;
        for generation in &generations {
            for _ in 0..n_tokens {
                wait_for_token(generation)?;
            }
        }
        Ok((batch * n_tokens) as f64 / since.elapsed().as_secs_f64())
    }

    /// A request of which `n_tokens` are read, and then it is dropped. Guarded, its answer could grow until it
    /// rotates.
    fn request(&self, ids: Vec<u32>, n_tokens: usize, sampled: bool) -> GenerateRequest {
        let rotate_at = ids.len() + n_tokens + 1;
        let request = GenerateRequest {
            sampling: if sampled {
                Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::default() }
            } else {
                Sampling::greedy()
            },
            stop_at_eos: false,
            ..GenerateRequest::new(ids, n_tokens + 2)
        };
        if !self.guards {
            return request;
        }
        let options = RotationOptions {
            policy: RotatePolicy::Reprefill,
            rotate_at: Some(rotate_at),
            ..RotationOptions::default()
        };
        GenerateRequest {
            rotation: Rotation { options, waits_for_json: true, ..Rotation::default() },
            loop_guard: Some(LoopGuard::default()),
            deadline: Some(Instant::now() + LATE),
            ..request
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guards_take_is_told_pair_by_pair() {
        let mut turns = Turns::default();
        for pair in [[9.9, 10.0], [19.0, 20.0], [5.0, 5.0]] {
            turns.push(pair);
        }
        let added = turns.added().unwrap();
        assert_eq!((added.min, added.max), (-1.0, 0.0));
        let share = turns.share_taken().unwrap();
        assert!((share.median - 0.01).abs() < 1e-9 && (share.max - 0.05).abs() < 1e-9);
        assert_eq!(turns.without().unwrap(), 10.0);
        assert!(Turns::default().added().is_err());
    }
}
