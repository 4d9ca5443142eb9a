//! Rotation (G-16): a request's fields into the engine's terms, and what was dropped into the answer's and
//! the trace's.

use std::ops::Range;

use exrail_engine::{EngineHandle, RotatePolicy, Rotated, Rotation, RotationOptions};
use exrail_text::ChatMessage;
use exrail_wire::{RotationFields, RotationRecord, TraceBody};

use crate::{
    error::ApiError,
    extract::refuse_unknown,
    generation::{Choice, RotatedAt},
};

/// A chat's rotation. `places` are the tokens of each message, where they are known: those of the system
/// messages are pinned, that which holds the hard `rules`, and those of the messages that the request names.
pub(crate) fn of_chat(
    engine: &EngineHandle,
    fields: Option<RotationFields>,
    (messages, places): (&[ChatMessage], &[Option<Range<usize>>]),
    rules: Option<usize>,
) -> Result<Rotation, ApiError> {
    let is_asked = fields.is_some();
    let fields = fields.unwrap_or_default();
    if fields.pin_tokens.is_some() {
        return Err(bad("pin_tokens", "a chat pins messages: pin_messages".into()));
    }
    let options = options(engine, &fields)?;
    let mut pins = fields.pin_messages.unwrap_or_default();
    if let Some(at) = pins.iter().find(|&&at| at >= messages.len()) {
        let problem = format!("expected below {}, found {at}", messages.len());
        return Err(bad("pin_messages", problem));
    }
    pins.extend((0..messages.len()).filter(|&at| messages[at].role == "system"));
    pins.extend(rules);
    let text = |at: usize| messages[at].content.as_deref().unwrap_or_default();
    pins.retain(|&at| !text(at).trim().is_empty());
    let found: Result<Vec<_>, usize> =
        pins.iter().map(|&at| places[at].clone().ok_or(at)).collect();
    match found {
        Ok(pinned) => Ok(Rotation { options, pinned, waits_for_json: true }),
        // Rather an answer that must fit than one that may lose what is pinned.
        Err(_) if !is_asked => Ok(Rotation::default()),
        Err(at) if keeps_pins(options.policy) => {
            let problem = format!(
                "the chat template changes message {at}, which is pinned, so that its place is not known; \
                 expected policy stop or off"
            );
            Err(bad("policy", problem))
        }
        Err(_) => Ok(Rotation { options, ..Rotation::default() }),
    }
}

/// A text completion's rotation: what is pinned is what the request names.
pub(crate) fn of_text(
    engine: &EngineHandle,
    fields: Option<&RotationFields>,
) -> Result<Rotation, ApiError> {
    let none = RotationFields::default();
    let fields = fields.unwrap_or(&none);
    if fields.pin_messages.is_some() {
        return Err(bad("pin_messages", "a text completion pins tokens: pin_tokens".into()));
    }
    let options = options(engine, fields)?;
    let pinned = fields.pin_tokens.iter().flatten().map(|&[from, to]| from..to).collect();
    Ok(Rotation { options, pinned, waits_for_json: true })
}

/// What the request says; its policy is the server's when it names none.
fn options(engine: &EngineHandle, fields: &RotationFields) -> Result<RotationOptions, ApiError> {
    refuse_unknown("rotation.", &fields.unknown)?;
    let policy = match fields.policy.as_deref() {
        None => engine.facts().options.rotation.policy,
        Some("off") => RotatePolicy::Off,
        Some("reprefill") => RotatePolicy::Reprefill,
        Some("sink_window") => RotatePolicy::SinkWindow,
        Some("stop") => RotatePolicy::Stop,
        Some(found) => {
            let expected = "off, reprefill, sink_window or stop";
            return Err(bad("policy", format!("expected {expected}, found `{found}`")));
        }
    };
    let RotationFields { rotate_at, window, sink, .. } = *fields;
    // A field that the policy does not read would be passed over in silence.
    let is_off = policy == RotatePolicy::Off;
    let idle = [
        (rotate_at.is_some() && is_off, "rotate_at", "reprefill, sink_window or stop"),
        (window.is_some() && !keeps_pins(policy), "window", "reprefill or sink_window"),
        (sink.is_some() && policy != RotatePolicy::SinkWindow, "sink", "sink_window"),
    ];
    if let Some((_, field, expected)) = idle.into_iter().find(|(is_idle, _, _)| *is_idle) {
        let problem = format!("expected policy {expected} beside it, found {}", policy.name());
        return Err(bad(field, problem));
    }
    Ok(RotationOptions { policy, rotate_at, window, sink })
}

/// Whether it goes on with what is pinned.
fn keeps_pins(policy: RotatePolicy) -> bool {
    match policy {
        RotatePolicy::Reprefill | RotatePolicy::SinkWindow => true,
        RotatePolicy::Off | RotatePolicy::Stop => false,
    }
}

fn bad(field: &str, problem: String) -> ApiError {
    ApiError::BadField { field: format!("rotation.{field}"), problem }
}

/// What a client is told.
pub(crate) fn records(rotations: &[RotatedAt]) -> Vec<RotationRecord> {
    let record = |RotatedAt { at, rotated }: &RotatedAt| RotationRecord {
        policy: rotated.policy.name(),
        at: *at,
        dropped: pairs(&rotated.dropped),
        kept: pairs(&rotated.kept),
        tokens_before: rotated.tokens_before,
        tokens_after: rotated.tokens_after,
    };
    rotations.iter().map(record).collect()
}

/// What is traced, of all choices.
pub(crate) fn traced(route: &'static str, choices: &[Choice]) -> Vec<TraceBody> {
    let body = |choice: usize, rotated: &Rotated| TraceBody::Rotate {
        route,
        choice,
        policy: rotated.policy.name(),
        tokens_used: rotated.tokens_before,
        limit: rotated.rotate_at,
        kept_ranges: pairs(&rotated.kept),
        dropped_ranges: pairs(&rotated.dropped),
        oracle_kl: None,
        oracle: match rotated.policy {
            RotatePolicy::SinkWindow => "not_applicable",
            RotatePolicy::Reprefill | RotatePolicy::Stop | RotatePolicy::Off => "not_available",
        },
    };
    let of_choice = |(index, choice): (usize, &Choice)| {
        choice.rotations.iter().map(|at| body(index, &at.rotated)).collect::<Vec<_>>()
    };
    choices.iter().enumerate().flat_map(of_choice).collect()
}

fn pairs(ranges: &[Range<usize>]) -> Vec<[usize; 2]> {
    ranges.iter().map(|range| [range.start, range.end]).collect()
}
