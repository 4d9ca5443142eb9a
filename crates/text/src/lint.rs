//! What a rendered prompt must not hold (G-12): pieces of the template that were left over, and a BOS that
//! was written twice.
//!
//! Only what the template wrote is looked at. A message may speak of `{{ jinja }}`: where the split of a
//! prompt is not proven, a marker that also stands in a message is passed over.

use std::fmt;

use crate::{Prompt, Tokenizer};

/// Longest piece that is shown of a marker.
const SHOWN: usize = 40;

/// What is wrong with a prompt, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LintFinding {
    /// The rule.
    pub rule: LintRule,
    /// Byte of the rendered prompt, from 0.
    pub at: usize,
    /// Line of the rendered prompt, from 1.
    pub line: usize,
    /// What stands there, cut after 40 characters.
    pub found: String,
}

/// What a prompt is looked through for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LintRule {
    /// `{{ x }}`, `{% x %}`, `${x}` or `{x}`: a variable that the template did not fill in.
    LeftoverMarker,
    /// The first two tokens are both the BOS.
    DuplicateBos,
}

impl LintRule {
    /// The name in errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LeftoverMarker => "leftover_marker",
            Self::DuplicateBos => "duplicate_bos",
        }
    }
}

impl fmt::Display for LintFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expected = match self.rule {
            LintRule::LeftoverMarker => "every variable of the template filled in",
            LintRule::DuplicateBos => "one BOS",
        };
        let Self { at, line, found, .. } = self;
        write!(f, "line {line} (byte {at}) of the prompt: expected {expected}, found `{found}`")
    }
}

/// Looks through a prompt and the ids that it became; the first finding.
#[must_use]
pub fn lint_prompt(tokenizer: &Tokenizer, prompt: &Prompt, ids: &[u32]) -> Option<LintFinding> {
    leftover(prompt).or_else(|| duplicate_bos(tokenizer, ids))
}

fn duplicate_bos(tokenizer: &Tokenizer, ids: &[u32]) -> Option<LintFinding> {
    let bos = tokenizer.bos()?;
    // Further in it may well be the beginning of a turn: SmolLM2's is `<|im_start|>`.
    if !ids.starts_with(&[bos, bos]) {
        return None;
    }
    let found = tokenizer.decode(&[bos, bos]);
    Some(LintFinding { rule: LintRule::DuplicateBos, at: 0, line: 1, found })
}

fn leftover(prompt: &Prompt) -> Option<LintFinding> {
    let mut at = 0;
    let text = prompt.text();
    for segment in &prompt.segments {
        let markers = markers(&segment.text).filter(|_| segment.trusted);
        // Keys of tools stand in what the template wrote, and so does everything when nothing is proven.
        let mut own = markers.filter(|(_, marker)| !prompt.says(marker));
        if let Some((offset, marker)) = own.next() {
            let at = at + offset;
            let line = 1 + text[..at].matches('\n').count();
            let found = marker.chars().take(SHOWN).collect();
            return Some(LintFinding { rule: LintRule::LeftoverMarker, at, line, found });
        }
        at += segment.text.len();
    }
    None
}

/// Markers of a text and their offsets.
fn markers(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices(['{', '$']).filter_map(|(at, _)| Some((at, marker(&text[at..])?)))
}

/// The marker at the beginning of `text`, if there is one. JSON is none: a key is in quotes.
fn marker(text: &str) -> Option<&str> {
    for (open, close) in [("{{", "}}"), ("{%", "%}")] {
        if let Some(rest) = text.strip_prefix(open) {
            let inner = rest.strip_prefix(['-', '+']).unwrap_or(rest).trim_start();
            let is_code = inner.starts_with(|it: char| it.is_ascii_alphabetic() || it == '_');
            let end = rest.find(close).filter(|_| is_code)?;
            return Some(&text[..open.len() + end + close.len()]);
        }
    }
    let inner = text.strip_prefix("${").or_else(|| text.strip_prefix('{'))?;
    let end = inner.find('}')?;
    let is_name = |name: &str| {
        let mut chars = name.chars();
        chars.next().is_some_and(|it| it.is_ascii_alphabetic() || it == '_')
            && chars.all(|it| it.is_ascii_alphanumeric() || it == '_' || it == '.')
    };
    let len = text.len() - inner.len() + end + 1;
    is_name(&inner[..end]).then(|| &text[..len])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChatMessage, ChatTemplate, RenderOptions};

    fn found(source: &str, content: &str) -> Option<(usize, String)> {
        let template = ChatTemplate::compile(source, "<s>", "</s>").unwrap();
        let messages = [ChatMessage::new("user", content)];
        let prompt = template.render(&messages, &RenderOptions::default()).unwrap();
        leftover(&prompt).map(|finding| (finding.line, finding.found))
    }

    /// A template that shows everything, and writes `more` after it.
    fn showing(more: &str) -> String {
        format!(
            "{{% for m in messages %}}[{{{{ m.role }}}}]\n{{{{ m.content }}}}\n{{% endfor %}}{more}"
        )
    }

    #[test]
    fn what_a_template_did_not_fill_in_is_found_with_its_line() {
        for (more, marker) in [
            ("{{ '{{ name }}' }}", "{{ name }}"),
            ("{{ '{{-user.name}}' }}", "{{-user.name}}"),
            ("{{ '{% if x %}' }}", "{% if x %}"),
            ("Dear ${user}", "${user}"),
            ("Dear {user_name},", "{user_name}"),
        ] {
            assert_eq!(found(&showing(more), "hi"), Some((3, marker.to_owned())), "{more}");
        }
    }

    #[test]
    fn a_message_may_speak_of_markers() {
        for content in
            ["Explain {{ x }} and {% if y %}.", "echo ${HOME}", "f\"{name}\"", "{{", "${"]
        {
            assert_eq!(found(&showing(""), content), None, "{content}");
            // Nothing is proven of a template that cuts what is said.
            let cut = showing("").replace("m.content", "m.content.split('@')[-1]");
            assert_eq!(found(&cut, &format!("a@{content}")), None, "{content}");
        }
    }

    #[test]
    fn json_prose_and_code_are_no_markers() {
        for more in [
            r#"{"name": "f", "arguments": {"a": {}}}"#,
            "{'name': function name, 'parameters': dictionary}",
            "a set {1, 2}, a map {}, a price of $5 and $ {x y}",
            "{{ '{{\"name\": <function-name>}}' }}",
        ] {
            assert_eq!(found(&showing(more), "hi"), None, "{more}");
        }
    }

    /// Nothing that a published template writes by itself is a finding, with tools or without.
    #[test]
    fn published_templates_write_no_markers() {
        let options = |tools: Option<Vec<serde_json::Value>>| RenderOptions {
            add_generation_prompt: true,
            tools,
            ..RenderOptions::default()
        };
        let tool = serde_json::json!({ "type": "function", "function": {
            "name": "f", "description": "Fills {name} in.", "parameters": { "type": "object" } } });
        let messages = ["user", "assistant", "user"]
            .map(|role| ChatMessage::new(role, " Explain {{ x }}, ${HOME} and {name}. "));
        let mut n_rendered = 0;
        for name in ["smollm2", "llama3", "qwen2_5", "mistral", "gemma"] {
            let path = format!("{}/tests/templates/{name}.jinja", env!("CARGO_MANIFEST_DIR"));
            let source = std::fs::read_to_string(path).unwrap();
            let template = ChatTemplate::compile(&source, "<s>", "</s>").unwrap();
            for tools in [None, Some(vec![tool.clone()])] {
                let Ok(prompt) = template.render(&messages, &options(tools)) else { continue };
                assert_eq!(leftover(&prompt), None, "{name}");
                n_rendered += 1;
            }
        }
        assert!(n_rendered >= 5, "{n_rendered}");
    }

    /// The mutation: without the lint the model is asked about `{user_name}`.
    #[test]
    fn mutation_without_the_lint_a_leftover_is_what_the_model_reads() {
        let source = showing("Dear {user_name},");
        let template = ChatTemplate::compile(&source, "<s>", "</s>").unwrap();
        let messages = [ChatMessage::new("user", "hi")];
        let prompt = template.render(&messages, &RenderOptions::default()).unwrap();
        assert!(prompt.text().contains("{user_name}"));
    }
}
