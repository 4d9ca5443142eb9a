//! The original chat templates of the model families against Python's Jinja2. They are not part of
//! this repository: `golden/templates/make_families.py` takes them out of packages, and
//! `EXRAIL_TEST_TEMPLATES` names the folder that it wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use exrail_text::{ChatMessage, ChatTemplate, RenderOptions, TemplateError, ToolCall};
use serde_json::Value;

/// 2025-07-04 12:30 UTC, as in make_families.py.
const NOW_S: u64 = 1_751_632_200;

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
fn every_family_renders_every_history_as_jinja2_does() {
    let folder = PathBuf::from(
        std::env::var("EXRAIL_TEST_TEMPLATES")
            .expect("EXRAIL_TEST_TEMPLATES is the folder that make_families.py wrote"),
    );
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
