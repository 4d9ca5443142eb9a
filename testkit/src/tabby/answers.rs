//! JSON of answers and chunks, in the real server's fields; nulls are sent.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{
    generation::{Run, Times},
    now,
    request::Kind,
    tokens::Tokens,
    writing::{Call, End, Written},
};

/// An answer that is not streamed.
pub(super) fn whole(run: &Run, times: Times, ids: &mut Tokens) -> Value {
    let choices: Vec<Value> = run
        .choices
        .iter()
        .enumerate()
        .map(|(index, written)| match run.kind {
            Kind::Chat => chat_choice(run, index, written, ids),
            Kind::Completion => completion_choice(run, index, written, ids),
        })
        .collect();
    let object = match run.kind {
        Kind::Chat => "chat.completion",
        Kind::Completion => "text_completion",
    };
    json!({"id": format!("cmpl-{}", run.id), "choices": choices, "created": now(),
        "model": run.job.model.name, "object": object,
        "usage": run.include_usage.then(|| usage(run, times))})
}

fn chat_choice(run: &Run, index: usize, written: &Written, ids: &mut Tokens) -> Value {
    let text = written.text();
    let content = (!text.is_empty()).then_some(text);
    let calls = written.call.as_ref().map(|call| tool_calls(&run.id, call));
    let logprobs = run.logprobs.map(|n| chat_logprobs(&written.tokens, n, ids));
    json!({"index": index, "finish_reason": finish_reason(written),
        "eos_reason": eos_reason(&written.end), "stop_str": stop_str(&written.end),
        "message": {"role": "assistant", "content": content, "reasoning_content": null,
            "tool_calls": calls, "tool_call_id": null},
        "logprobs": logprobs})
}

fn completion_choice(run: &Run, index: usize, written: &Written, ids: &mut Tokens) -> Value {
    let logprobs = run.logprobs.map(|n| legacy_logprobs(&written.tokens, 0, n, ids));
    json!({"index": index, "finish_reason": finish_reason(written),
        "eos_reason": eos_reason(&written.end), "logprobs": logprobs, "text": written.text()})
}

/// A part of a stream: some tokens of a choice.
pub(super) fn chunk(run: &Run, index: usize, tokens: &[String], ids: &mut Tokens) -> Value {
    let text = tokens.concat();
    let mut choice = match run.kind {
        Kind::Chat => json!({"index": index, "delta": {"content": text}, "finish_reason": null}),
        Kind::Completion => json!({"index": index, "text": text, "finish_reason": null}),
    };
    if let Some(n) = run.logprobs {
        choice["logprobs"] = match run.kind {
            Kind::Chat => chat_logprobs(tokens, n, ids),
            Kind::Completion => legacy_logprobs(tokens, 0, n, ids),
        };
    }
    event(run, &choice)
}

/// A tool call, whole.
pub(super) fn call_chunk(run: &Run, index: usize, call: &Call) -> Value {
    let delta = json!({"tool_calls": tool_calls(&run.id, call)});
    event(run, &json!({"index": index, "delta": delta, "finish_reason": null}))
}

/// The end of a choice.
pub(super) fn last_chunk(run: &Run, index: usize) -> Value {
    let written = &run.choices[index];
    let finish_reason = finish_reason(written);
    let choice = match run.kind {
        Kind::Chat => json!({"index": index, "delta": {}, "finish_reason": finish_reason,
            "eos_reason": eos_reason(&written.end)}),
        Kind::Completion => json!({"index": index, "text": "", "finish_reason": finish_reason}),
    };
    event(run, &choice)
}

/// The end of the last choice, where usage is asked for: without `eos_reason`.
pub(super) fn usage_chunk(run: &Run, index: usize, times: Times) -> Value {
    let finish_reason = finish_reason(&run.choices[index]);
    let choice = match run.kind {
        Kind::Chat => json!({"index": index, "delta": {}, "finish_reason": finish_reason}),
        Kind::Completion => json!({"index": index, "text": "", "finish_reason": finish_reason}),
    };
    let mut event = event(run, &choice);
    event["usage"] = usage(run, times);
    event
}

fn event(run: &Run, choice: &Value) -> Value {
    let (object, model) = match run.kind {
        Kind::Chat => ("chat.completion.chunk", "model"),
        Kind::Completion => ("text_completion", "model_name"),
    };
    json!({"id": format!("chatcmpl-{}", run.id), "object": object, "created": now(),
        "choices": [choice], model: run.job.model.name})
}

fn finish_reason(written: &Written) -> &'static str {
    match written.end {
        End::Length => "length",
        _ if written.call.is_some() => "tool_calls",
        End::StopToken(_) | End::StopString(_) | End::Filter | End::Aborted => "stop",
    }
}

fn eos_reason(end: &End) -> Option<&'static str> {
    match end {
        End::Length => Some("max_new_tokens"),
        End::StopToken(_) => Some("stop_token"),
        End::StopString(_) => Some("stop_string"),
        End::Filter => Some("end_filter"),
        End::Aborted => None,
    }
}

fn stop_str(end: &End) -> Option<&str> {
    match end {
        End::StopToken(text) | End::StopString(text) => Some(text),
        End::Length | End::Filter | End::Aborted => None,
    }
}

fn tool_calls(id: &str, call: &Call) -> Value {
    json!([{"id": format!("call_{}", &id[..24]), "type": "function", "index": 0,
        "function": {"name": call.name, "arguments": call.arguments.to_string()}}])
}

fn usage(run: &Run, times: Times) -> Value {
    let n_prompt = run.n_prompt_tokens;
    let n_completion: usize = run.choices.iter().map(|choice| choice.tokens.len()).sum();
    json!({"prompt_tokens": n_prompt, "prompt_time": times.prompt.as_secs_f64(),
        "prompt_tokens_per_sec": rate(n_prompt, times.prompt),
        "completion_tokens": n_completion, "completion_time": times.completion.as_secs_f64(),
        "completion_tokens_per_sec": rate(n_completion, times.completion),
        "total_tokens": n_prompt + n_completion,
        "total_time": (times.prompt + times.completion).as_secs_f64()})
}

/// Tokens in a second; where the time is too short to tell, the real server's word for it.
fn rate(n_tokens: usize, time: Duration) -> Value {
    if time < Duration::from_millis(1) {
        return "Indeterminate".into();
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate to look at")]
    let rate = n_tokens as f64 / time.as_secs_f64();
    json!((rate * 100.0).round() / 100.0)
}

/// The logarithm that every token is said to have; those of alternatives fall by one each.
const LOGPROB: f64 = -0.25;

/// The likeliest tokens at a place, the written one first: text, number and logarithm.
fn likeliest(token: &str, n: usize, ids: &mut Tokens) -> Vec<(String, usize, f64)> {
    let mut alternatives = vec![(token.to_owned(), ids.id(token), LOGPROB)];
    for rank in 1..n.max(1) {
        let text = " ".repeat(rank);
        let id = ids.id(&text);
        #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
        alternatives.push((text, id, LOGPROB - rank as f64));
    }
    alternatives
}

fn logprob_entry((token, id, logprob): &(String, usize, f64)) -> Value {
    json!({"token": token, "token_id": id, "logprob": logprob})
}

fn chat_logprobs(tokens: &[String], n: usize, ids: &mut Tokens) -> Value {
    let mut content = Vec::with_capacity(tokens.len());
    for token in tokens {
        let likeliest = likeliest(token, n, ids);
        let mut own = logprob_entry(&likeliest[0]);
        own["top_logprobs"] = likeliest.iter().take(n).map(logprob_entry).collect();
        content.push(own);
    }
    json!({"content": content})
}

fn legacy_logprobs(tokens: &[String], offset: usize, n: usize, ids: &mut Tokens) -> Value {
    let mut top = Vec::with_capacity(tokens.len());
    let mut offsets = Vec::with_capacity(tokens.len());
    let mut at = offset;
    for token in tokens {
        let likeliest = likeliest(token, n, ids);
        let named =
            likeliest.iter().take(n).map(|(text, _, logprob)| (text.clone(), json!(logprob)));
        top.push(Value::Object(named.collect::<Map<_, _>>()));
        offsets.push(at);
        at += token.chars().count();
    }
    json!({"tokens": tokens, "token_logprobs": vec![LOGPROB; tokens.len()],
        "top_logprobs": top, "text_offset": offsets})
}
