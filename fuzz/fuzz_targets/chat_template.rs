//! A chat template of any bytes, compiled and rendered. It ends within its limits, and the
//! segments of a prompt are never empty.

#![no_main]

use std::time::Duration;

use exrail_text::{ChatMessage, ChatTemplate, RenderOptions, TemplateLimits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let limits = TemplateLimits {
        fuel: 20_000,
        output_bytes: 1 << 16,
        wall_clock: Duration::from_millis(500),
    };
    let Ok(template) = ChatTemplate::compile_with_limits(source, "<s>", "</s>", limits) else {
        return;
    };
    let message = |role: &str, content: &str| ChatMessage::new(role, content);
    let messages = [message("user", " a<|x|> "), message("assistant", ""), message("user", "{{ é }}")];
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    if let Ok(prompt) = template.render(&messages, &options) {
        assert!(prompt.text().len() <= limits.output_bytes);
        assert!(prompt.segments.iter().all(|segment| !segment.text.is_empty()));
    }
});
