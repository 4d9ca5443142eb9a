//! What a whole reply says, and whether that can be true.

use serde_json::Value;

use crate::fault::{UpstreamFault, brief};

/// Shortest text that is judged for what its characters are.
const MIN_JUDGED_CHARS: usize = 16;
/// Share of control and replacement characters from which a text is none, in percent.
const GARBLED_PERCENT: u64 = 20;

/// The first choice of a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Text {
    pub(crate) text: String,
    pub(crate) finish: String,
    pub(crate) has_logprobs: bool,
    /// Tokens of the prompt and of the answer.
    pub(crate) tokens: Option<[u64; 2]>,
}

/// Ways in which an answer ends; another word is no end that a client knows.
pub(crate) const FINISHED: [&str; 5] =
    ["stop", "length", "tool_calls", "function_call", "content_filter"];

/// Reads a chat or a completion; what is told is of its first choice.
///
/// # Errors
/// There is none, or a choice that did not end, or one that says that it is finished and has nothing in it.
pub(crate) fn text(reply: &Value) -> Result<Text, UpstreamFault> {
    let choices = reply["choices"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut texts = choices.iter().map(choice).collect::<Result<Vec<_>, _>>()?.into_iter();
    let first = texts.next().ok_or(UpstreamFault::NoAnswer { expected: "`choices`" })?;
    Ok(Text { tokens: usage(reply), ..first })
}

fn choice(choice: &Value) -> Result<Text, UpstreamFault> {
    let message = &choice["message"];
    let text = message["content"].as_str().or_else(|| choice["text"].as_str());
    let Some(finish) = choice["finish_reason"].as_str() else {
        return Err(UpstreamFault::NoAnswer { expected: "`finish_reason`" });
    };
    if !FINISHED.contains(&finish) {
        return Err(UpstreamFault::Cut { found: brief(&format!("finish reason `{finish}`")) });
    }
    let has = |name: &str| {
        let value = &message[name];
        value.as_str().is_some_and(|text| !text.is_empty())
            || value.as_array().is_some_and(|all| !all.is_empty())
            || value.is_object()
    };
    let others = ["tool_calls", "reasoning_content", "reasoning", "refusal", "function_call"];
    // Measured on a server whose model had gone: content null, finish_reason stop. One that was cut may have come to nothing.
    if text.is_none() && finish == "stop" && !others.into_iter().any(has) {
        return Err(UpstreamFault::NoAnswer { expected: "text or tool calls" });
    }
    Ok(Text {
        text: text.unwrap_or_default().to_owned(),
        finish: finish.to_owned(),
        has_logprobs: choice["logprobs"]["content"].as_array().is_some_and(|it| !it.is_empty()),
        tokens: None,
    })
}

/// Tokens of the prompt and of the answer, where they are told.
pub(crate) fn usage(reply: &Value) -> Option<[u64; 2]> {
    let usage = &reply["usage"];
    Some([usage["prompt_tokens"].as_u64()?, usage["completion_tokens"].as_u64()?])
}

/// Whether a text is made of characters.
///
/// # Errors
/// A fifth of it is control or replacement characters.
pub(crate) fn legible(text: &str) -> Result<(), UpstreamFault> {
    let is_broken = |char: &char| {
        *char == '\u{FFFD}' || (char.is_control() && !matches!(char, '\n' | '\r' | '\t'))
    };
    let n_chars = text.chars().count();
    let n_broken = text.chars().filter(is_broken).count();
    let share_percent = (n_broken * 100 / n_chars.max(1)) as u64;
    if n_chars >= MIN_JUDGED_CHARS && share_percent >= GARBLED_PERCENT {
        return Err(UpstreamFault::Garbled { share_percent });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reply(message: Value, finish: Value) -> Value {
        json!({ "choices": [{ "message": message, "finish_reason": finish }] })
    }

    #[test]
    fn an_answer_that_is_none_is_none() {
        let nothing = reply(json!({ "content": null }), json!("stop"));
        assert!(matches!(text(&nothing), Err(UpstreamFault::NoAnswer { .. })));
        let endless = reply(json!({ "content": "a" }), Value::Null);
        assert!(matches!(text(&endless), Err(UpstreamFault::NoAnswer { .. })));
        assert!(matches!(text(&json!({})), Err(UpstreamFault::NoAnswer { .. })));
        let aborted = reply(json!({ "content": "half a" }), json!("abort"));
        assert!(matches!(text(&aborted), Err(UpstreamFault::Cut { .. })));
        let mut two = reply(json!({ "content": "a" }), json!("stop"));
        let second = json!({ "message": { "content": null }, "finish_reason": null });
        two["choices"].as_array_mut().unwrap().push(second);
        assert!(matches!(text(&two), Err(UpstreamFault::NoAnswer { .. })), "the second one counts");
        for whole in [
            reply(json!({ "content": null, "reasoning": "hm" }), json!("stop")),
            reply(json!({ "content": null, "refusal": "no" }), json!("stop")),
            reply(json!({ "content": null }), json!("length")),
        ] {
            assert!(text(&whole).is_ok(), "{whole}");
        }
        let empty = reply(json!({ "content": "" }), json!("stop"));
        assert_eq!(text(&empty).unwrap().text, "", "a model may say nothing");
    }

    #[test]
    fn garbage_is_told_from_text() {
        assert!(legible(&"\u{FFFD}\u{1}".repeat(20)).is_err());
        for good in ["\u{FFFD}", "日本語のテキスト、絵文字👩‍👩‍👧も", "a\tb\nc", ""]
        {
            assert!(legible(good).is_ok(), "{good}");
        }
    }
}
