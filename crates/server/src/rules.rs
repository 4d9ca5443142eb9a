//! The constraint lock of a request (G-31): its hard rules into the prompt, out of the prompt's tokens again, and
//! over what the model answers.
//!
//! The rules are never taken from the model's word: what is compared with them are the ids that the engine gets
//! ([`echo`]), and, when part of the context is dropped, the ranges that stay ([`HeldRules::stay`]).

use std::{ops::Range, sync::Arc};

use exrail_engine::{EngineHandle, Rotated};
use exrail_text::{ChatMessage, SlotTokens, Specials, Tokenizer};
use exrail_verify::{
    Contradiction, HardRule, NLI, RuleSet, RuleWatch, compare_echo, read_rules, write_rules,
};
use exrail_wire::{ConstraintField, ConstraintRecord, TraceBody};
use tokio::sync::Semaphore;

use crate::{
    error::ApiError,
    generation::Choice,
    structured::{Lock, Part},
    translate::Fields,
};

/// The rules of a request, compiled beside the async threads.
pub(crate) async fn compile(
    fields: &Fields,
    compiling: &Semaphore,
) -> Result<Option<Arc<RuleSet>>, ApiError> {
    let Some(wire) = fields.constraints() else { return Ok(None) };
    let rule = |field: &ConstraintField| HardRule {
        text: field.text.clone(),
        forbid: field.forbid.clone(),
    };
    let rules: Vec<HardRule> = wire.iter().map(rule).collect();
    let turn = compiling.acquire().await;
    let _turn = turn.map_err(|_| ApiError::Internal("the turns of compilations"))?;
    let task = tokio::task::spawn_blocking(move || RuleSet::new(rules));
    let compiled = task.await.map_err(|_| ApiError::Internal("compilation task"))?;
    match compiled {
        Ok(rules) => Ok(Some(Arc::new(rules))),
        Err(bad) => Err(ApiError::BadField { field: bad.place, problem: bad.problem }),
    }
}

/// Rules that were written into the messages of a chat.
pub(crate) struct Written {
    pub(crate) set: Arc<RuleSet>,
    /// Messages that were added in front.
    pub(crate) n_added: usize,
}

/// Writes the rules behind the system message, or as one, or in front of what the user says first where the template
/// has no system.
pub(crate) fn write(set: Arc<RuleSet>, said: &mut Vec<ChatMessage>, takes_system: bool) -> Written {
    let text = write_rules(&set.texts());
    let joined = |before: &str, after: &str| match before.trim().is_empty() {
        true => after.to_owned(),
        false => format!("{before}\n\n{after}"),
    };
    if let Some(first) = said.first_mut().filter(|first| first.role == "system") {
        first.content = Some(joined(first.content.as_deref().unwrap_or_default(), &text));
        return Written { set, n_added: 0 };
    }
    match said.iter_mut().find(|message| !takes_system && message.role == "user") {
        Some(user) => {
            user.content = Some(joined(&text, user.content.as_deref().unwrap_or_default()));
            Written { set, n_added: 0 }
        }
        None => {
            said.insert(0, ChatMessage::new("system", text));
            Written { set, n_added: 1 }
        }
    }
}

/// Where they stand in the messages that the template gets: the first message that holds them, and its bytes.
pub(crate) fn find(rules: &RuleSet, messages: &[ChatMessage]) -> Option<(usize, Range<usize>)> {
    let text = write_rules(&rules.texts());
    messages.iter().enumerate().find_map(|(at, message)| {
        let start = message.content.as_deref()?.find(&text)?;
        Some((at, start..start + text.len()))
    })
}

/// Compares the rules that a slot must have with what its tokens say, in the ids that the engine gets.
///
/// # Errors
/// The template has changed or dropped the slot, or its tokens say other rules.
pub(crate) fn echo(
    tokenizer: &Tokenizer,
    ids: &[u32],
    slot: Option<&SlotTokens>,
    rules: &[impl AsRef<str>],
) -> Result<(), ApiError> {
    let differs = |problem: String| ApiError::ConstraintEcho { problem };
    let Some(slot) = slot else {
        let problem = "expected the rules in the prompt as they were given, found that the chat template \
                       has changed or dropped them; use another template";
        return Err(differs(problem.into()));
    };
    let said = tokenizer.decode(ids.get(slot.tokens.clone()).unwrap_or_default());
    let said = said.trim_start();
    let said = said.strip_prefix(slot.before.trim_start()).unwrap_or(said);
    let said = said.strip_suffix(slot.after.as_str()).unwrap_or(said);
    // What a tokenizer composes or folds, it does to a rule alone, too.
    let encoded = |rule: &str| match tokenizer.encode(rule, Specials::AsText) {
        Ok(ids) => Ok(tokenizer.decode(&ids)),
        Err(error) => Err(differs(error.to_string())),
    };
    let expected: Vec<String> =
        rules.iter().map(|rule| encoded(rule.as_ref())).collect::<Result<_, _>>()?;
    compare_echo(&expected, &read_rules(said)).map_err(|error| differs(error.to_string()))
}

/// Rules that are in the prompt of a chat, and where.
#[derive(Debug)]
pub(crate) struct HeldRules {
    set: Arc<RuleSet>,
    tokens: Range<usize>,
}

impl HeldRules {
    /// Those of a prompt whose tokens say them.
    ///
    /// # Errors
    /// As [`echo`].
    pub(crate) fn of(
        set: &Arc<RuleSet>,
        engine: &EngineHandle,
        ids: &[u32],
        slot: Option<&SlotTokens>,
    ) -> Result<HeldRules, ApiError> {
        echo(engine.tokenizer(), ids, slot, &set.texts())?;
        let tokens = slot.map(|slot| slot.tokens.clone()).unwrap_or_default();
        Ok(HeldRules { set: Arc::clone(set), tokens })
    }

    /// Whether the rules are part of the context that goes on.
    ///
    /// # Errors
    /// A token of them was dropped.
    pub(crate) fn stay(&self, rotated: &Rotated) -> Result<(), ApiError> {
        let mut at = self.tokens.start;
        for kept in &rotated.kept {
            if kept.contains(&at) {
                at = kept.end;
            }
        }
        if at >= self.tokens.end {
            return Ok(());
        }
        let Range { start, end } = self.tokens;
        let problem = format!(
            "expected tokens {start} to {end}, the rules, in the context behind a rotation, found that {at} is \
             not in it"
        );
        Err(ApiError::ConstraintEcho { problem })
    }

    /// What a trace keeps of them; they were compared before anything was generated.
    pub(crate) fn record(&self) -> ConstraintRecord {
        record(&self.set, true)
    }

    /// Looks at a whole answer: at what is told of it as text, and at the arguments of calls. Thoughts speak of the
    /// rules and are no claim.
    ///
    /// # Errors
    /// It contradicts a rule.
    pub(crate) fn check(&self, choice: &Choice) -> Result<(), ApiError> {
        let Some(reply) = &choice.reply else {
            return refuse(self.set.contradiction(&choice.text));
        };
        refuse(self.set.contradiction(&reply.content))?;
        if choice.lock.as_ref().is_some_and(|lock| lock.is_value()) {
            self.check_value(&reply.content)?;
        }
        reply.calls.iter().try_for_each(|call| self.check_value(&call.arguments))
    }

    /// The texts of a JSON value, escapes resolved.
    fn check_value(&self, json: &str) -> Result<(), ApiError> {
        match serde_json::from_str(json) {
            Ok(value) => refuse(self.set.contradiction_in(&value)),
            // A value that the answer's end has cut.
            Err(_) => refuse(self.set.contradiction(json)),
        }
    }

    /// The watch over one choice that is streamed.
    pub(crate) fn watch(self: &Arc<Self>, lock: Option<&Arc<Lock>>) -> Watch {
        let is_value = lock.is_some_and(|lock| lock.is_value());
        let watch = RuleWatch::new(Arc::clone(&self.set), is_value);
        Watch { rules: Arc::clone(self), watch, is_value }
    }
}

/// Of the rules of a request.
pub(crate) fn record(rules: &RuleSet, has_prompt: bool) -> ConstraintRecord {
    ConstraintRecord {
        sha256: rules.sha256().to_owned(),
        n_rules: rules.texts().len(),
        n_patterns: rules.n_patterns(),
        echo: if has_prompt { "equal" } else { "not_built" },
        nli: NLI,
    }
}

/// The failure that a contradiction is.
fn refuse(found: Option<Contradiction>) -> Result<(), ApiError> {
    match found {
        None => Ok(()),
        Some(Contradiction { rule, pattern }) => Err(ApiError::Contradiction { rule, pattern }),
    }
}

/// The record of a lock that fired in a stream; a whole answer is refused, and recorded with its failure.
pub(crate) fn traced(error: &ApiError) -> Option<TraceBody> {
    let is_ours = matches!(error, ApiError::Contradiction { .. } | ApiError::ConstraintEcho { .. });
    is_ours.then(|| TraceBody::Guard { guard: error.code().into(), detail: error.to_string() })
}

/// The watch over one choice that is streamed.
pub(crate) struct Watch {
    rules: Arc<HeldRules>,
    watch: RuleWatch,
    is_value: bool,
}

impl Watch {
    /// What may be told of these parts, and of those before.
    ///
    /// # Errors
    /// The answer contradicts a rule; none of the parts may be told.
    pub(crate) fn tell(
        &mut self,
        parts: Vec<Part>,
        has_ended: bool,
    ) -> Result<Vec<Part>, ApiError> {
        let mut told = Vec::with_capacity(parts.len());
        for part in parts {
            match part {
                Part::Content(text) => {
                    let text = self.watch.push(&text).or_else(contradicts)?;
                    told.extend(content(text));
                }
                Part::Reasoning(_) => told.push(part),
                Part::Call(call) => {
                    // What was said before a call is said.
                    told.extend(self.rest()?);
                    self.rules.check_value(&call.arguments)?;
                    told.push(Part::Call(call));
                }
            }
        }
        if has_ended {
            told.extend(self.rest()?);
        }
        Ok(told)
    }

    fn rest(&mut self) -> Result<Option<Part>, ApiError> {
        let rest = self.watch.finish().or_else(contradicts)?;
        if self.is_value && !self.watch.answer().is_empty() {
            self.rules.check_value(self.watch.answer())?;
        }
        Ok(content(rest))
    }
}

fn content(text: String) -> Option<Part> {
    (!text.is_empty()).then_some(Part::Content(text))
}

fn contradicts(found: Contradiction) -> Result<String, ApiError> {
    refuse(Some(found)).map(|()| String::new())
}

#[cfg(test)]
mod tests {
    use exrail_checkpoint::{Checkpoint, Gguf};
    use exrail_engine::{Identity, LoadOptions, RotatePolicy, prepare_generator};
    use exrail_kernels_cpu::{CpuBackend, CpuOptions};
    use exrail_testkit::{CHAT_TEMPLATE, TinyLlama, tiny_llama};
    use exrail_text::{ChatTemplate, RenderOptions, encode_slots};

    use super::*;

    const RULES: [&str; 2] = ["Be kind.", "Name no price of the key."];

    fn set() -> Arc<RuleSet> {
        let rule = |text: &str| HardRule { text: text.to_owned(), forbid: Vec::new() };
        Arc::new(RuleSet::new(RULES.map(rule).to_vec()).unwrap())
    }

    fn tokenizer() -> Arc<Tokenizer> {
        let backend = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() });
        let checkpoint =
            Checkpoint::Gguf(Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap());
        let who = Identity { name: "tiny".into(), sha256: "0".repeat(64) };
        let load = LoadOptions::default();
        let loaded =
            prepare_generator(backend.unwrap(), &checkpoint, who, load, &mut |_| {}).unwrap();
        loaded.tokenizer
    }

    fn said(roles: &[&str]) -> Vec<ChatMessage> {
        roles.iter().map(|role| ChatMessage::new(*role, format!("I am the {role}."))).collect()
    }

    /// The ids of a chat with the rules in it, and where its tokens say them.
    fn placed(tokenizer: &Tokenizer) -> (Vec<u32>, Option<SlotTokens>) {
        let mut messages = said(&["system", "user"]);
        write(set(), &mut messages, true);
        let (at, bytes) = find(&set(), &messages).unwrap();
        let template = ChatTemplate::compile(CHAT_TEMPLATE, "", "").unwrap();
        let prompt = template.render(&messages, &RenderOptions::default()).unwrap();
        let contents: Vec<&str> =
            messages.iter().map(|message| message.content.as_deref().unwrap()).collect();
        let (placed, slots) = encode_slots(tokenizer, &prompt, &contents, &[(at, bytes)]).unwrap();
        (placed.ids, slots[0].clone())
    }

    #[test]
    fn g31_the_tokens_that_the_engine_gets_say_the_rules() {
        let tokenizer = tokenizer();
        let (ids, slot) = placed(&tokenizer);
        echo(&tokenizer, &ids, slot.as_ref(), &RULES).unwrap();
        let turned = [RULES[1], RULES[0]];
        echo(&tokenizer, &ids, slot.as_ref(), &turned).unwrap();
        // One more, one less, another one, and none.
        for rules in [&[RULES[0], RULES[1], "Be brief."][..], &RULES[..1], &["Be kind.", "Be."]] {
            let error = echo(&tokenizer, &ids, slot.as_ref(), rules).unwrap_err();
            assert_eq!((error.code(), error.status().as_u16()), ("constraint_echo", 500));
        }
        assert_eq!(echo(&tokenizer, &ids, None, &RULES).unwrap_err().code(), "constraint_echo");
    }

    /// The mutation: a prompt that lost a token of its rules is one like any other to the engine, and only the echo
    /// knows.
    #[test]
    fn mutation_g31_a_lost_token_is_seen_in_the_ids_alone() {
        let tokenizer = tokenizer();
        let (ids, slot) = placed(&tokenizer);
        let slot = slot.unwrap();
        // The head and the first bullet are no rule; each token behind them is one's.
        for at in slot.tokens.clone().skip(8) {
            let mut changed = ids.clone();
            changed[at] = ids[slot.tokens.start];
            assert_ne!(changed, ids);
            assert!(echo(&tokenizer, &changed, Some(&slot), &RULES).is_err(), "token {at}");
        }
    }

    #[test]
    fn g31_the_rules_are_written_where_the_template_says_them() {
        let rules = write_rules(&RULES);
        for (roles, takes_system, at, n_added) in [
            (&["system", "user"][..], true, 0, 0),
            (&["system", "user"], false, 0, 0),
            (&["user", "assistant", "user"], true, 0, 1),
            (&["user", "assistant", "user"], false, 0, 0),
            (&["assistant", "user"], false, 1, 0),
            (&["assistant"], false, 0, 1),
        ] {
            let mut messages = said(roles);
            assert_eq!(write(set(), &mut messages, takes_system).n_added, n_added, "{roles:?}");
            let (found, bytes) = find(&set(), &messages).unwrap();
            assert_eq!(found, at, "{roles:?}");
            assert_eq!(&messages[found].content.as_deref().unwrap()[bytes], rules);
            assert_eq!(messages.len(), roles.len() + n_added);
        }
    }

    #[test]
    fn g31_a_rotation_that_drops_a_token_of_the_rules_is_refused() {
        let rules = HeldRules { set: set(), tokens: 5..20 };
        let rotated = |kept: &[Range<usize>]| Rotated {
            policy: RotatePolicy::Reprefill,
            dropped: Vec::new(),
            kept: kept.to_vec(),
            rotate_at: 90,
            tokens_before: 90,
            tokens_after: 40,
        };
        for kept in [&[0..20, 60..90][..], &[0..7, 7..30, 60..90], &[5..20, 30..31]] {
            rules.stay(&rotated(kept)).unwrap();
        }
        for kept in [&[0..1, 60..90][..], &[0..19, 60..90], &[0..7, 8..30], &[6..90, 95..96], &[]] {
            let error = rules.stay(&rotated(kept)).unwrap_err();
            assert_eq!(error.code(), "constraint_echo", "{kept:?}: {error}");
            let mut choice = Choice {
                rules: Some(Arc::new(HeldRules { set: set(), tokens: 5..20 })),
                ..Choice::default()
            };
            let event = exrail_engine::Event::Rotated(rotated(kept));
            assert!(choice.take(event.clone()).is_err(), "{kept:?}");
            // The mutation: without the rules the same context goes on.
            Choice::default().take(event).unwrap();
        }
    }
}
