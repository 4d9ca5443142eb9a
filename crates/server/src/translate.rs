//! Wire requests into engine requests. A field is honoured here or refused here.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use exrail_engine::{EngineHandle, Exempt, GenerateRequest, LoopGuard, OnLoop, Priority, Sampling};
use exrail_text::{
    ChatMessage, PlacedPrompt, Prompt, PromptError, RenderOptions, SlotTokens, Tokenizer,
    encode_prompt, encode_slots, lint_prompt,
};
use exrail_verify::TaintPolicy;
use exrail_wire::{
    ConstraintField, ExemptName, ExtraFields, LoopGuardField, OnLoopName, PriorityName,
    SamplingFields, Stop, StructuredFields, ToolTaintName, Unknown,
};
use serde_json::Value;

use crate::{
    Limits, auth::Caller, error::ApiError, extract::refuse_unknown, ids, sessions::Claim,
    swap::Asking,
};

/// The fields that every route which generates has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fields {
    pub(crate) sampling: SamplingFields,
    pub(crate) structured: StructuredFields,
    extra: ExtraFields,
}

impl Fields {
    /// Takes them out of a request's undeclared ones, and refuses the rest.
    pub(crate) fn take(unknown: &mut Unknown) -> Result<Self, ApiError> {
        let (sampling, extra) = (SamplingFields::take(unknown)?, ExtraFields::take(unknown)?);
        let structured = StructuredFields::take(unknown)?;
        refuse_unknown("", unknown)?;
        Ok(Self { sampling, structured, extra })
    }

    /// For routes whose answers have a form of their own.
    pub(crate) fn refuse_structured(&self) -> Result<(), ApiError> {
        let Some(field) = self.structured.first() else { return Ok(()) };
        let why = "a grounded answer has a form of its own: citations, or the refusal";
        Err(ApiError::UnsupportedField { field: field.into(), why })
    }

    /// Before which of the same tenant's requests.
    pub(crate) fn priority(&self) -> Priority {
        match self.extra.priority {
            Some(PriorityName::High) => Priority::High,
            Some(PriorityName::Normal) | None => Priority::Normal,
            Some(PriorityName::Low) => Priority::Low,
        }
    }

    /// How the answer is watched for going round in a circle; `streams` says whether it is sent as it grows.
    pub(crate) fn loop_guard(
        &self,
        limits: &Limits,
        streams: Option<bool>,
    ) -> Result<Option<LoopGuard>, ApiError> {
        let fields = match &self.extra.loop_guard {
            None => return Ok(limits.loop_guard.then(LoopGuard::default)),
            Some(LoopGuardField::Switch(is_on)) => return Ok(is_on.then(LoopGuard::default)),
            Some(LoopGuardField::Options(fields)) => fields,
        };
        let on_loop = match fields.on_loop {
            Some(OnLoopName::RollBack) if streams == Some(true) => {
                return Err(bad_loop_guard("a stream takes nothing back; expected on_loop stop"));
            }
            Some(OnLoopName::RollBack) => OnLoop::RollBack,
            Some(OnLoopName::Stop) | None => OnLoop::End,
        };
        let exempt = Exempt {
            code: fields.exempt.contains(&ExemptName::Code),
            tables: fields.exempt.contains(&ExemptName::Tables),
        };
        Ok(Some(LoopGuard { entropy_baseline: fields.entropy_baseline, on_loop, exempt }))
    }

    /// Whether a grounded answer is watched. Its route has a baseline of its own, and its text is held to its
    /// citations, so that nothing of it is exempt or said twice.
    pub(crate) fn grounded_loop_guard(&self, limits: &Limits) -> Result<bool, ApiError> {
        match &self.extra.loop_guard {
            None => Ok(limits.loop_guard),
            Some(LoopGuardField::Switch(is_on)) => Ok(*is_on),
            Some(LoopGuardField::Options(_)) => {
                Err(bad_loop_guard("of a grounded answer: expected true or false, found options"))
            }
        }
    }

    /// Whether the answer is kept from repeating the system messages (G-21).
    pub(crate) fn leak_guard(&self, limits: &Limits) -> bool {
        self.extra.leak_guard.unwrap_or(limits.leak_guard)
    }

    /// Refuses to switch that to `state` where it has no meaning.
    pub(crate) fn refuse_leak_guard(&self, state: bool, why: &'static str) -> Result<(), ApiError> {
        if self.extra.leak_guard == Some(state) {
            return Err(ApiError::UnsupportedField { field: "leak_guard".into(), why });
        }
        Ok(())
    }

    /// The session that the turn begins from (G-22). It begins in the cache.
    pub(crate) fn claim(&self) -> Result<Option<Claim>, ApiError> {
        let Some(session) = &self.extra.session else { return Ok(None) };
        if !self.prefix_cache() {
            return Err(ApiError::UnsupportedField {
                field: "session".into(),
                why: "a turn without `prefix_cache` reads nothing of it",
            });
        }
        Claim::of(session).map(Some)
    }

    /// Refuses one where it has no meaning.
    pub(crate) fn refuse_session(&self, why: &'static str) -> Result<(), ApiError> {
        match self.extra.session {
            None => Ok(()),
            Some(_) => Err(ApiError::UnsupportedField { field: "session".into(), why }),
        }
    }

    /// The hard rules of the answer (G-31).
    pub(crate) fn constraints(&self) -> Option<&[ConstraintField]> {
        self.extra.constraints.as_deref()
    }

    /// Refuses them where no prompt frame has a place for them.
    pub(crate) fn refuse_constraints(&self, why: &'static str) -> Result<(), ApiError> {
        match self.extra.constraints {
            None => Ok(()),
            Some(_) => Err(ApiError::UnsupportedField { field: "constraints".into(), why }),
        }
    }

    /// What becomes of tainted calls; it means nothing where no tool can be called.
    pub(crate) fn tool_taint(&self, has_tools: bool) -> Result<TaintPolicy, ApiError> {
        match self.extra.tool_taint {
            Some(_) if !has_tools => Err(ApiError::UnsupportedField {
                field: "tool_taint".into(),
                why: "nothing is called without `tools`",
            }),
            Some(ToolTaintName::Refuse) => Ok(TaintPolicy::Refuse),
            Some(ToolTaintName::Annotate) | None => Ok(TaintPolicy::Annotate),
        }
    }

    /// Whether cached prefixes are read and left.
    pub(crate) fn prefix_cache(&self) -> bool {
        self.extra.prefix_cache.unwrap_or(true)
    }

    /// A request of that caller that came then.
    pub(crate) fn arrival(
        &self,
        received: Instant,
        caller: &Caller,
        limits: &Limits,
    ) -> Result<Arrival, ApiError> {
        let deadline = self.deadline(received, limits)?;
        Ok(Arrival { received, asking: Asking { tenant: caller.0.clone(), deadline } })
    }

    /// When the answer to a request received then must be there.
    fn deadline(&self, received: Instant, limits: &Limits) -> Result<Option<Instant>, ApiError> {
        let Some(ms) = self.extra.deadline_ms else {
            return Ok(limits.default_deadline.map(|deadline| received + deadline));
        };
        if !(1..=MAX_DEADLINE_MS).contains(&ms) {
            let problem = format!("expected 1 to {MAX_DEADLINE_MS}, found {ms}");
            return Err(ApiError::BadField { field: "deadline_ms".into(), problem });
        }
        Ok(Some(received + Duration::from_millis(ms)))
    }
}

/// When a request came, from whom, and until when it may take.
pub(crate) struct Arrival {
    pub(crate) received: Instant,
    pub(crate) asking: Asking,
}

fn bad_loop_guard(problem: &str) -> ApiError {
    ApiError::BadField { field: "loop_guard".into(), problem: problem.into() }
}

/// A day: longer than any answer, and far from where clocks overflow.
const MAX_DEADLINE_MS: u64 = 24 * 60 * 60 * 1000;

/// Sampling for a request; the seed that will be used is in it.
pub(crate) fn sampling(fields: &SamplingFields, defaults: Sampling) -> Result<Sampling, ApiError> {
    let seed = match fields.seed {
        // Any 64-bit pattern is a seed; a negative one is as good as its unsigned twin.
        Some(seed) => seed.cast_unsigned(),
        None => ids::seed()?,
    };
    Ok(Sampling {
        temperature: fields.temperature.unwrap_or(defaults.temperature),
        top_p: fields.top_p.unwrap_or(defaults.top_p),
        top_k: match fields.top_k {
            Some(0) => None,
            Some(k) => Some(k as usize),
            None => defaults.top_k,
        },
        min_p: fields.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: fields.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: fields.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: fields.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias: logit_bias(fields)?,
        seed,
        ..defaults
    })
}

fn logit_bias(fields: &SamplingFields) -> Result<Vec<(u32, f32)>, ApiError> {
    let pairs = fields.logit_bias.iter().flatten();
    pairs
        .map(|(id, bias)| {
            let id = id.parse().map_err(|_| ApiError::BadField {
                field: "logit_bias".into(),
                problem: format!("expected a token id as key, found `{id}`"),
            })?;
            Ok((id, *bias))
        })
        .collect()
}

/// The stop strings of a request.
pub(crate) fn stops(stop: Option<Stop>) -> Vec<String> {
    match stop {
        None => Vec::new(),
        Some(Stop::One(one)) => vec![one],
        Some(Stop::Many(many)) => many,
    }
}

/// The number of choices.
pub(crate) fn choices(n: Option<usize>, limit: usize) -> Result<usize, ApiError> {
    match n.unwrap_or(1) {
        n if (1..=limit).contains(&n) => Ok(n),
        n => Err(ApiError::BadField {
            field: "n".into(),
            problem: format!("expected 1 to {limit}, found {n}"),
        }),
    }
}

/// The limit on generated tokens: what was asked for, else a default that fits the context.
pub(crate) fn max_tokens(
    engine: &EngineHandle,
    asked: Option<usize>,
    default: usize,
    prompt_tokens: usize,
) -> usize {
    asked.unwrap_or_else(|| default.min(engine.max_new_tokens(prompt_tokens)).max(1))
}

/// Refuses a chat that leaves less room for an answer than is reserved (G-12), where the request does not
/// say how much it needs. What does not fit into the context at all is the engine's to refuse.
pub(crate) fn reserve_output(
    engine: &EngineHandle,
    asked: Option<usize>,
    prompt_tokens: usize,
) -> Result<(), ApiError> {
    let context = engine.facts().context;
    let reserved = RESERVE_OUTPUT.min(context / 4);
    let room = engine.max_new_tokens(prompt_tokens);
    if asked.is_some() || room == 0 || room >= reserved {
        return Ok(());
    }
    let problem = format!(
        "expected at most {} prompt tokens, which leaves {reserved} of {context} for the answer, found \
         {prompt_tokens}; shorten the messages, or pass max_tokens up to {room}",
        context - reserved
    );
    Err(ApiError::PromptLint { rule: "no_room", problem })
}

/// Tokens that are kept for the answer of a request without `max_tokens`, or a quarter of a short context
/// (G-12 P).
const RESERVE_OUTPUT: usize = 512;

/// Renders a conversation with the model's chat template and encodes it; message contents never
/// become control tokens.
///
/// # Errors
/// The model has no template, the template refuses the messages, or what it made of them does not pass the
/// prompt lint (G-12).
pub fn chat_prompt(engine: &EngineHandle, messages: &[ChatMessage]) -> Result<Vec<u32>, ApiError> {
    let (tokenizer, prompt) = (engine.tokenizer(), rendered(engine, messages, None)?);
    let ids = encode_prompt(tokenizer, &prompt).map_err(not_encoded)?;
    lint(tokenizer, &prompt, &ids)?;
    Ok(ids)
}

fn rendered(
    engine: &EngineHandle,
    messages: &[ChatMessage],
    tools: Option<&[Value]>,
) -> Result<Prompt, ApiError> {
    let Some(template) = engine.template() else {
        return Err(ApiError::NotAvailable {
            what: "chat",
            why: "the model file carries no chat template; use /v1/completions",
        });
    };
    let tools = tools.map(<[Value]>::to_vec);
    let options = RenderOptions { add_generation_prompt: true, tools, ..RenderOptions::default() };
    template.render(messages, &options).map_err(|error| ApiError::Template(error.to_string()))
}

/// A prompt with the tokens of each message and of each slot, where the template left them as they are.
pub(crate) struct Slotted {
    pub(crate) placed: PlacedPrompt,
    pub(crate) slots: Vec<Option<SlotTokens>>,
    pub(crate) text: String,
}

/// [`chat_prompt`] with the tokens of its parts; a slot is the index of a message and bytes of its content, and `tools` are what the template tells the model that it may call.
pub(crate) fn slotted_prompt(
    engine: &EngineHandle,
    messages: &[ChatMessage],
    tools: Option<&[Value]>,
    slots: &[(usize, Range<usize>)],
) -> Result<Slotted, ApiError> {
    let contents = messages.iter().map(|message| message.content.as_deref().unwrap_or_default());
    let contents: Vec<&str> = contents.collect();
    let (tokenizer, prompt) = (engine.tokenizer(), rendered(engine, messages, tools)?);
    let (placed, slots) =
        encode_slots(tokenizer, &prompt, &contents, slots).map_err(not_encoded)?;
    lint(tokenizer, &prompt, &placed.ids)?;
    Ok(Slotted { placed, slots, text: prompt.text() })
}

/// The first two slots in a row that stand in another order than they were given in, by their places in it. Two slots of
/// one message may share the token between them; one whose place is not known tells nothing.
pub(crate) fn out_of_order(slots: &[Option<SlotTokens>]) -> Option<(usize, usize)> {
    let known: Vec<(usize, &Range<usize>)> = slots
        .iter()
        .enumerate()
        .filter_map(|(at, slot)| Some((at, &slot.as_ref()?.tokens)))
        .collect();
    let stands_behind = |a: &Range<usize>, b: &Range<usize>| a.start <= b.start && a.end <= b.end;
    let wrong = known.windows(2).find(|pair| !stands_behind(pair[0].1, pair[1].1))?;
    Some((wrong[0].0, wrong[1].0))
}

fn not_encoded(error: PromptError) -> ApiError {
    let problem = error.to_string();
    match error {
        PromptError::UnprovenContent { .. } | PromptError::ControlInKey { .. } => {
            ApiError::PromptLint { rule: "control_literal", problem }
        }
        PromptError::Tokenizer(_) | _ => ApiError::Template(problem),
    }
}

fn lint(tokenizer: &Tokenizer, prompt: &Prompt, ids: &[u32]) -> Result<(), ApiError> {
    match lint_prompt(tokenizer, prompt, ids) {
        Some(found) => {
            Err(ApiError::PromptLint { rule: found.rule.name(), problem: found.to_string() })
        }
        None => Ok(()),
    }
}

/// One engine request per choice; they differ in their random sequence only.
pub(crate) fn per_choice(base: GenerateRequest, choice: usize) -> GenerateRequest {
    let mut request = base;
    request.sampling.sequence = choice as u64;
    request
}
