//! The engine behind replies at length.

use exrail_engine::{EngineHandle, Event, GenerateRequest, Generation, Sampling};
use exrail_verify::{FrameMessage, GenerateError, Said, WriteOn};

use crate::{error::ApiError, oracle::failed, translate};

/// The least bias of a token: its probability is below e^−100 of what it was.
const NEVER: f32 = -100.0;

/// An engine that is not let end a reply: tokens that end one are never drawn.
#[derive(Debug)]
pub struct EngineWriter<'a> {
    engine: &'a EngineHandle,
}

impl<'a> EngineWriter<'a> {
    /// Of this engine.
    #[must_use]
    pub fn new(engine: &'a EngineHandle) -> Self {
        Self { engine }
    }

    fn submit(
        &self,
        message: &FrameMessage,
        (n_tokens, seed): (usize, u64),
    ) -> Result<Generation, GenerateError> {
        let messages = [exrail_text::ChatMessage::new(message.role, message.content.clone())];
        let prompt = translate::chat_prompt(self.engine, &messages).map_err(failed)?;
        let ends = self.engine.tokenizer().eos_ids().iter().map(|&id| (id, NEVER));
        let request = GenerateRequest {
            sampling: Sampling { seed, logit_bias: ends.collect(), ..Sampling::default() },
            entropy: true,
            prefix_cache: false,
            loop_guard: None,
            ..GenerateRequest::new(prompt, n_tokens)
        };
        self.engine.submit(request).map_err(failed)
    }
}

impl WriteOn for EngineWriter<'_> {
    fn write_on(
        &self,
        asked: &[(&FrameMessage, u64)],
        n_tokens: usize,
    ) -> Result<Vec<Vec<Said>>, GenerateError> {
        let submitted: Result<Vec<Generation>, _> =
            asked.iter().map(|(message, seed)| self.submit(message, (n_tokens, *seed))).collect();
        submitted?.iter().map(written).collect()
    }
}

/// All tokens of a generation.
fn written(generation: &Generation) -> Result<Vec<Said>, GenerateError> {
    let mut said: Vec<Said> = Vec::new();
    loop {
        match generation.events.recv() {
            Ok(Event::Token(token)) => {
                let entropy = f64::from(token.entropy.unwrap_or_default());
                said.push(Said { text: token.text, entropy });
            }
            Ok(Event::Tail(text)) => {
                if let Some(last) = said.last_mut() {
                    last.text.push_str(&text);
                }
            }
            Ok(Event::Finished(_)) => return Ok(said),
            Ok(Event::Failed(fault)) => return Err(failed(fault)),
            Ok(Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. }) => {}
            Err(_) => return Err(failed(ApiError::Lost)),
        }
    }
}
