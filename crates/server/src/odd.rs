//! A note of characters that hide something, where untrusted text has them (G-21, signal 2). They are passed on.

use exrail_text::{ChatMessage, OddCharacters};
use exrail_wire::TraceBody;

/// Name in records and counters.
pub(crate) const GUARD: &str = "odd_characters";

/// Those of the messages that a stranger may have written.
pub(crate) fn of_chat(messages: &[ChatMessage]) -> OddCharacters {
    let untrusted = messages.iter().filter(|message| message.role != "system");
    let counts = untrusted.map(|it| OddCharacters::of(it.content.as_deref().unwrap_or_default()));
    counts.fold(OddCharacters::default(), OddCharacters::and)
}

/// A record of them, if there are any.
pub(crate) fn traced(odd: OddCharacters) -> Option<TraceBody> {
    let OddCharacters { zero_width, bidi, mixed_words } = odd;
    let detail = format!(
        "{zero_width} without width, {bidi} that turn text around, {mixed_words} words of mixed alphabets"
    );
    (!odd.is_none()).then(|| TraceBody::Guard { guard: GUARD.into(), detail })
}
