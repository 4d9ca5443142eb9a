//! The original chat templates of the model families against Python's Jinja2. They are not part of
//! this repository: `golden/templates/make_families.py` takes them out of packages, and
//! `EXRAIL_TEST_TEMPLATES` names the folder that it wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use exrail_text::tools::ToolFormat;
use exrail_text::{
    ChatMessage, ChatTemplate, RenderOptions, TemplateError, Tokenizer, ToolCall, Vocabulary,
};
use serde_json::Value;

/// 2025-07-04 12:30 UTC, as in make_families.py.
const NOW_S: u64 = 1_751_632_200;

/// Template, family, whether it describes the tools, whether it thinks.
const FORMATS: [(&str, &str, bool, bool); 24] = [
    ("cohere2", "generic", false, false),
    ("cohere2-tools", "generic", false, false),
    ("gemma2", "gemma", false, false),
    ("gemma3", "gemma", false, false),
    ("granite3.3", "generic", false, true),
    ("granite4.0", "hermes", true, false),
    ("granite4.1", "hermes", true, false),
    ("llama2", "generic", false, false),
    ("llama3", "generic", false, false),
    ("llama3.1", "llama3", true, false),
    ("llama3.2", "llama3", true, false),
    ("mistral-small3.2", "mistral", true, false),
    ("mistral-tekken", "mistral", true, false),
    ("mistral-v0.1", "generic", false, false),
    ("mistral-v0.3", "mistral", true, false),
    ("mixtral", "generic", false, false),
    ("mixtral-8x22b", "mistral", true, false),
    ("phi3", "generic", false, false),
    ("phi3.5", "generic", false, false),
    ("qwen2", "hermes", true, false),
    ("qwen2.5", "hermes", true, false),
    ("qwen3", "hermes", true, true),
    ("qwen3-2507", "hermes", true, false),
    ("smollm3", "generic", false, true),
];

fn folder() -> PathBuf {
    let folder = std::env::var("EXRAIL_TEST_TEMPLATES");
    folder.expect("EXRAIL_TEST_TEMPLATES is the folder that make_families.py wrote").into()
}

fn text_of(json: &Value, key: &str) -> Option<String> {
    json[key].as_str().map(str::to_owned)
}

fn message(json: &Value) -> ChatMessage {
    let call = |call: &Value| ToolCall {
        id: text_of(call, "id"),
        name: text_of(&call["function"], "name").expect("a call has a name"),
        arguments: call["function"]["arguments"].as_object().expect("an object").clone(),
    };
    ChatMessage {
        role: text_of(json, "role").expect("a message has a role"),
        content: text_of(json, "content"),
        reasoning_content: text_of(json, "reasoning_content"),
        tool_calls: json["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
        tool_call_id: text_of(json, "tool_call_id"),
        name: text_of(json, "name"),
    }
}

fn options(history: &Value) -> RenderOptions {
    RenderOptions {
        add_generation_prompt: history["add_generation_prompt"].as_bool().unwrap_or(true),
        now: Some(UNIX_EPOCH + Duration::from_secs(NOW_S)),
        tools: history["tools"].as_array().cloned(),
        documents: None,
        extras: history["extras"].as_object().cloned().unwrap_or_default(),
    }
}

/// What is wrong with one render, if anything.
fn fault(template: &ChatTemplate, history: &Value, row: &Value) -> Option<String> {
    let messages = history["messages"].as_array().expect("a list").iter().map(message);
    let found = template.render(&messages.collect::<Vec<_>>(), &options(history));
    let equal = match (&found, row["text"].as_str(), row["raised"].as_str()) {
        (Ok(prompt), Some(text), _) => prompt.text() == text,
        (Err(TemplateError::Raised { message }), None, Some(raised)) => message == raised,
        // Python's own error, such as adding `None` to a string: ours needs other words.
        (Err(TemplateError::Render { .. }), None, None) => row["failed"].is_string(),
        (Ok(_) | Err(_), _, _) => false,
    };
    let found = found.map(|prompt| prompt.text()).map_err(|error| error.to_string());
    (!equal).then(|| format!("{row}\n   found {found:?}"))
}

#[test]
fn e6_every_family_renders_every_history_as_jinja2_does() {
    let folder = folder();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/templates/families.json");
    let golden = std::fs::read_to_string(golden).expect("the golden file is readable");
    let golden: Value = serde_json::from_str(&golden).expect("the golden file is JSON");
    let rows = golden["rows"].as_array().expect("a list");
    let mut table: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (family, known) in golden["templates"].as_object().expect("an object") {
        let source = std::fs::read_to_string(folder.join(format!("{family}.jinja")));
        let source = source.unwrap_or_else(|error| panic!("template of {family}: {error}"));
        let template = ChatTemplate::compile(&source, "<s>", "</s>")
            .unwrap_or_else(|error| panic!("{family}: {error}"));
        assert_eq!(known["sha256"], template.sha256(), "{family} is not the template rendered");
        for row in rows.iter().filter(|row| row["family"] == family.as_str()) {
            let history = row["history"].as_str().expect("a name");
            let fault = fault(&template, &golden["histories"][history], row);
            let (equal, all) = table.entry(family.as_str()).or_default();
            *equal += usize::from(fault.is_none());
            *all += 1;
            wrong.extend(fault);
        }
    }
    for (family, (equal, all)) in &table {
        eprintln!("{family:<16} {equal:>2} of {all} histories equal");
    }
    assert!(table.values().all(|&(_, all)| all >= 8), "at least 8 histories a family");
    assert!(wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), rows.len(), wrong.join("\n"));
}

/// Nobody has to say which format a model writes (field-faults B20).
#[test]
fn b20_the_format_of_every_original_template_is_found() {
    let [tokens, [model, pre]] = [["</s>", "a"], ["gpt2", "gpt-2"]].map(|it| it.map(str::to_owned));
    let (tokens, kinds, eos) = (tokens.to_vec(), vec![3, 1], Some(0));
    let vocabulary = Vocabulary { model, pre, tokens, kinds, eos, ..Vocabulary::default() };
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).expect("a small vocabulary");
    let found = FORMATS.map(|(name, ..)| {
        let source = std::fs::read_to_string(folder().join(format!("{name}.jinja")));
        let source = source.unwrap_or_else(|error| panic!("template of {name}: {error}"));
        let template = ChatTemplate::compile(&source, "<s>", "</s>")
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let format = ToolFormat::detect(Some(&template), &tokenizer);
        (name, format.family().name(), format.describes_tools(), format.thoughts().is_some())
    });
    assert_eq!(found, FORMATS);
}
