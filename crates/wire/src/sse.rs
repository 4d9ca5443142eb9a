//! Server-sent events: `data: …` blocks, ended by `data: [DONE]`.

use serde::Serialize;

/// The last block of a complete stream.
pub const DONE: &str = "data: [DONE]\n\n";

/// Frames one JSON event.
///
/// # Panics
/// Never for the types of this crate, whose maps have string keys.
#[must_use]
pub fn event(value: &impl Serialize) -> String {
    // JSON escapes line breaks, so the text stays one `data:` line.
    let json = serde_json::to_string(value).expect("wire types serialise");
    format!("data: {json}\n\n")
}

/// Frames a comment that keeps an idle connection open.
#[must_use]
pub fn heartbeat() -> &'static str {
    ": waiting\n\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_with_line_breaks_stays_one_line() {
        let framed = event(&serde_json::json!({"content": "a\nb\r\nc"}));
        assert_eq!(framed, "data: {\"content\":\"a\\nb\\r\\nc\"}\n\n");
    }
}
