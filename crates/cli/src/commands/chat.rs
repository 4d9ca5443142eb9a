//! `exrail chat`.

use std::{
    io::{BufRead, IsTerminal},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use exrail_engine::{EngineHandle, Event, Finish, Finished, GenerateRequest, LoopGuard, Sampling};
use exrail_server::{BootBoard, chat_prompt};
use exrail_text::ChatMessage;
use serde_json::json;

use crate::{
    Ended,
    load::{AsItIs, Boot},
    options::{EngineArgs, Sources},
    output::Output,
};

/// Talk to a model on the terminal, or say one thing and print the answer.
///
/// In a conversation, /reset forgets it and /quit leaves.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    /// One message; a conversation from standard input when absent.
    message: Option<String>,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Limit on generated tokens of one answer.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// 0 is greedy.
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// Nucleus mass.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Divides logits of recent tokens; 1 is off.
    #[arg(long, value_name = "R", default_value_t = 1.1)]
    repetition_penalty: f32,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sources: Sources,
}

impl Chat {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let services = Boot {
            board: &Arc::new(BootBoard::new()),
            keys: None,
            retries: 0,
            declared: None,
            traces: None,
            output: *output,
            sources: &self.sources,
            engine: &self.engine,
            encoder: None,
            collections: Vec::new(),
            prepare: &AsItIs,
            in_place_of: None,
        }
        .run()?;
        let mut messages: Vec<ChatMessage> = self.opening();
        if let Some(message) = &self.message {
            self.turn(&services.engine, &mut messages, message.clone(), *output)?;
            return Ok(Ended::Done);
        }
        self.converse(&services.engine, &mut messages, *output)?;
        Ok(Ended::Done)
    }

    fn opening(&self) -> Vec<ChatMessage> {
        let system = self.system.iter();
        system.map(|text| ChatMessage::new("system", text.clone())).collect()
    }

    fn converse(
        &self,
        engine: &EngineHandle,
        messages: &mut Vec<ChatMessage>,
        output: Output,
    ) -> Result<()> {
        let asks = output.is_terminal() && std::io::stdin().is_terminal();
        if asks {
            output.line(format!("{} — /reset forgets, /quit leaves", engine.facts().model_name));
        }
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if asks {
                output.piece("\n> ");
            }
            let Some(line) = lines.next() else { return Ok(()) };
            let line = line.context("standard input")?;
            match line.trim() {
                "" => {}
                "/quit" => return Ok(()),
                "/reset" => *messages = self.opening(),
                text => {
                    // A refused turn, such as one over the context, must not end the talk.
                    if let Err(error) = self.turn(engine, messages, text.into(), output) {
                        output.note(format!("error: {error:#}"));
                        messages.pop();
                    }
                }
            }
        }
    }

    /// One question and its answer, streamed.
    fn turn(
        &self,
        engine: &EngineHandle,
        messages: &mut Vec<ChatMessage>,
        text: String,
        output: Output,
    ) -> Result<()> {
        messages.push(ChatMessage::new("user", text));
        let prompt = chat_prompt(engine, messages)?;
        let room = engine.max_new_tokens(prompt.len());
        if room == 0 {
            bail!(
                "the conversation has {} tokens, the context {}; /reset forgets it",
                prompt.len(),
                engine.facts().context
            );
        }
        let request = GenerateRequest {
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
                // A fresh sequence a turn: the same question twice is not the same draw.
                sequence: messages.len() as u64,
                ..Sampling::default()
            },
            loop_guard: Some(LoopGuard::default()),
            ..GenerateRequest::new(prompt, self.max_tokens.min(room))
        };
        let (answer, finished) = stream(engine, request, output)?;
        if finished.finish == Finish::Degenerate {
            output.note("the answer went round in a circle and was cut");
        }
        output.value(&json!({
            "answer": answer,
            "prompt_tokens": finished.usage.prompt_tokens,
            "completion_tokens": finished.usage.completion_tokens,
            "prefill_ms": finished.timings.prefill_ms,
            "decode_ms": finished.timings.decode_ms,
        }));
        messages.push(ChatMessage::new("assistant", answer));
        Ok(())
    }
}

fn stream(
    engine: &EngineHandle,
    request: GenerateRequest,
    output: Output,
) -> Result<(String, Finished)> {
    let generation = engine.submit(request)?;
    let mut answer = String::new();
    for event in &generation.events {
        let text = match event {
            Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. } => continue,
            Event::Token(token) => token.text,
            Event::Tail(text) => text,
            Event::Finished(finished) => {
                output.line("");
                return Ok((answer, finished));
            }
            Event::Failed(fault) => return Err(fault.into()),
        };
        output.piece(&text);
        answer.push_str(&text);
    }
    bail!("the engine stopped in the middle of the answer")
}
