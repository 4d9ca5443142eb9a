//! A whole answer and its lock: taken apart when it conforms, generated once more when it does not (G-13).

use std::sync::Arc;

use exrail_engine::{EngineHandle, GenerateRequest};
use exrail_verify::LeakGuard;

use super::lock::{Broken, Lock};
use crate::{
    AppState,
    error::ApiError,
    generation::{self, Choice},
    leak,
};

/// The guard's name where guards are counted.
pub(crate) const GUARD: &str = "schema_lock";

/// Temperature of a further attempt at a greedy answer, which another seed would not change.
const REPAIR_TEMPERATURE: f32 = 0.7;

/// What a choice is held to.
#[derive(Clone, Copy)]
pub(crate) struct Hold<'a> {
    pub(crate) lock: &'a Arc<Lock>,
    /// The guard of the system messages, where there is one.
    pub(crate) leak: Option<&'a Arc<LeakGuard>>,
}

/// Takes a choice apart. One that does not conform is asked for again, as often as the limits allow; `known` is why
/// it does not, where a stream has found that out.
pub(crate) async fn settle(
    state: &AppState,
    engine: &EngineHandle,
    hold: Hold<'_>,
    request: Option<&GenerateRequest>,
    choice: &mut Choice,
    mut known: Option<Broken>,
) -> Result<(), ApiError> {
    let lock = hold.lock;
    loop {
        let Broken(problem) = match known.take() {
            Some(broken) => broken,
            None => {
                leak::screen(hold.leak, choice);
                match lock.reply(&choice.text, choice.finish()) {
                    Ok(mut reply) => {
                        // No call goes out of an answer that a guard has cut.
                        reply.calls.retain(|_| choice.leak.is_none());
                        choice.reply = Some(reply);
                        return Ok(());
                    }
                    Err(broken) => broken,
                }
            }
        };
        state.metrics.count_guard(GUARD);
        let may_repair = choice.n_repairs < state.limits.structured.repairs;
        let Some(request) = request.filter(|_| may_repair) else {
            return Err(ApiError::NotConforming { problem, attempts: choice.n_repairs + 1 });
        };
        *choice = attempt(engine, lock, request, choice).await?;
    }
}

/// The same question with another seed.
async fn attempt(
    engine: &EngineHandle,
    lock: &Arc<Lock>,
    request: &GenerateRequest,
    before: &Choice,
) -> Result<Choice, ApiError> {
    let n_repairs = before.n_repairs + 1;
    let spent = before.finished.as_ref().map_or(0, |finished| finished.usage.completion_tokens);
    let mut choices = [Choice {
        n_repairs,
        n_withheld_tokens: before.n_withheld_tokens + spent,
        ..Choice::held_to(Some(lock), before.rules.as_ref())
    }];
    let generation = engine.submit(again(request.clone(), n_repairs))?;
    generation::collect(vec![generation], &mut choices, || {}).await?;
    let [choice] = choices;
    Ok(choice)
}

fn again(mut request: GenerateRequest, n_repairs: usize) -> GenerateRequest {
    // 2^64 over the golden ratio: seeds that are far from each other and from those that clients count up.
    let step = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(n_repairs as u64);
    request.sampling.seed = request.sampling.seed.wrapping_add(step);
    if request.sampling.temperature <= 0.0 {
        request.sampling.temperature = REPAIR_TEMPERATURE;
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_further_attempt_draws_otherwise() {
        let request = GenerateRequest::new(vec![1], 4);
        let mut greedy = request.clone();
        greedy.sampling.temperature = 0.0;
        let (first, second) = (again(greedy.clone(), 1), again(greedy, 2));
        assert!(first.sampling.temperature > 0.0);
        assert_ne!(first.sampling.seed, second.sampling.seed);
        assert_ne!(first.sampling.seed, request.sampling.seed);
        assert_eq!(first.prompt, request.prompt);
    }
}
