//! The injection suite (G-21) against every vendored template, with a vocabulary that has all control tokens of its
//! family: no text becomes a control token, and none changes what the template writes around it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use exrail_text::{
    ChatMessage, ChatTemplate, Prompt, PromptError, RenderOptions, Specials, TemplateError,
    Tokenizer, Vocabulary, encode_prompt,
};
use serde_json::{Value, json};

/// A template of this crate, and the control tokens of the models that it is for.
const FAMILIES: [(&str, &[&str]); 5] = [
    ("smollm2", &["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]),
    (
        "qwen2_5",
        &[
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
        ],
    ),
    (
        "llama3",
        &[
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|python_tag|>",
        ],
    ),
    (
        "mistral",
        &[
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
        ],
    ),
    ("gemma", &["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"]),
];

/// The texts of the suite, in its order.
fn attacks() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/data/injection.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["text"].as_str().unwrap().to_owned()
    });
    text.collect()
}

/// Every byte and the control tokens, which each text is cut into.
fn tokenizer(controls: &[&str]) -> Tokenizer {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let codes = (0..256).map(|byte| if printable(&byte) { byte } else { others.next().unwrap() });
    let mut tokens: Vec<String> =
        codes.map(|code| char::from_u32(code).unwrap().to_string()).collect();
    let mut kinds = vec![1; tokens.len()];
    for control in controls {
        tokens.push((*control).to_owned());
        kinds.push(3);
    }
    let model = "gpt2".to_owned();
    let pre = "gpt-2".to_owned();
    Tokenizer::from_vocabulary(Vocabulary { model, pre, tokens, kinds, ..Vocabulary::default() })
        .unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/templates/{name}.jinja"));
    ChatTemplate::compile(&std::fs::read_to_string(path).unwrap(), "<s>", "</s>").unwrap()
}

/// Where a stranger's text may stand.
#[derive(Clone, Copy, Debug)]
enum Place {
    User,
    LaterUser,
    Assistant,
    Tool,
}

const PLACES: [Place; 4] = [Place::User, Place::LaterUser, Place::Assistant, Place::Tool];

fn chat(place: Place, text: &str) -> Vec<ChatMessage> {
    let message = ChatMessage::new;
    match place {
        Place::User => vec![message("user", text)],
        Place::LaterUser => {
            vec![message("user", "a"), message("assistant", "b"), message("user", text)]
        }
        Place::Assistant => {
            vec![message("user", "a"), message("assistant", text), message("user", "c")]
        }
        Place::Tool => {
            let mut result = message("tool", text);
            result.tool_call_id = Some("call00000".into());
            vec![message("user", "a"), result]
        }
    }
}

fn render(template: &ChatTemplate, place: Place, text: &str) -> Option<Prompt> {
    let tool = json!({ "type": "function", "function": { "name": "search", "description": "d",
        "parameters": { "type": "object", "properties": { "q": { "type": "string" } } } } });
    let options = RenderOptions {
        add_generation_prompt: true,
        now: Some(std::time::SystemTime::UNIX_EPOCH),
        tools: Some(vec![tool]),
        ..RenderOptions::default()
    };
    // A template need not take every order of roles.
    template.render(&chat(place, text), &options).ok()
}

fn controls(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    ids.iter().copied().filter(|&id| tokenizer.is_control(id)).collect()
}

fn of_template(prompt: &Prompt) -> Vec<&str> {
    let trusted = prompt.segments.iter().filter(|segment| segment.trusted);
    trusted.map(|segment| segment.text.as_str()).collect()
}

/// The same white space, and nothing that anybody could obey.
fn harmless(text: &str) -> String {
    text.chars().map(|char| if char.is_whitespace() { char } else { 'x' }).collect()
}

/// Field fault E2: literals of a message became control tokens, and with them turns of other roles.
#[test]
fn g21_e2_no_text_of_the_suite_becomes_a_control_token_or_changes_the_frame() {
    let attacks = attacks();
    assert_eq!(attacks.len(), 180);
    for (name, literals) in FAMILIES {
        let (template, tokenizer) = (template(name), tokenizer(literals));
        let (mut tried, mut refused) = (0, 0);
        for (text, place) in attacks.iter().flat_map(|it| PLACES.map(|place| (it, place))) {
            let Some(expected) = render(&template, place, &harmless(text)) else { continue };
            let found = render(&template, place, text)
                .unwrap_or_else(|| panic!("{name} {place:?}: refuses {text:?}"));
            tried += 1;
            let ids = match encode_prompt(&tokenizer, &found) {
                Ok(ids) => ids,
                Err(PromptError::UnprovenContent { .. }) => {
                    refused += 1;
                    continue;
                }
                Err(other) => panic!("{name} {place:?}: {other}"),
            };
            let plain = encode_prompt(&tokenizer, &expected).unwrap();
            assert_eq!(
                controls(&tokenizer, &ids),
                controls(&tokenizer, &plain),
                "{name} {place:?}: {text:?}"
            );
            assert_eq!(of_template(&found), of_template(&expected), "{name} {place:?}: {text:?}");
        }
        eprintln!("{name:<9} {tried} tried, {refused} refused, 0 got through");
        assert!(tried >= 2 * attacks.len(), "{name}: {tried}");
        assert!(refused <= tried / 10, "{name}: {refused} of {tried} are refused");
    }
}

/// The mutation: a prompt that is read with control tokens wherever they come from.
#[test]
fn mutation_g21_e2_read_as_a_whole_the_suite_writes_control_tokens() {
    for (name, literals) in FAMILIES {
        let (template, tokenizer) = (template(name), tokenizer(literals));
        let gets_through = |text: &&String| {
            let Some(found) = render(&template, Place::User, text) else { return false };
            let ids = tokenizer.encode(&found.text(), Specials::Parse).unwrap();
            let plain = render(&template, Place::User, &harmless(text)).unwrap();
            let plain = encode_prompt(&tokenizer, &plain).unwrap();
            controls(&tokenizer, &ids) != controls(&tokenizer, &plain)
        };
        let through = attacks().iter().filter(gets_through).count();
        assert!(through >= 2, "{name}: {through}");
    }
}

/// Field fault L7: a template ran code, or took the processor and the memory of the server.
#[test]
fn l7_a_template_of_the_field_runs_no_code_and_ends() {
    let sources = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__['os'].system('id') }}",
        "{{ self.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**7) %}{% for j in range(10**7) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getenv('HOME') }}",
    ];
    for source in sources {
        let started = std::time::Instant::now();
        let outcome = ChatTemplate::compile(source, "", "")
            .and_then(|it| it.render(&[ChatMessage::new("user", "x")], &RenderOptions::default()));
        let took = started.elapsed();
        let error = outcome.map(|prompt| prompt.text()).unwrap_err();
        // Work that is counted ends it, see `TemplateLimits`; the clock would be too late.
        assert!(!matches!(error, TemplateError::OutOfTime { .. }), "{source}: {took:?}");
        assert!(error.to_string().len() < 300, "{source}: {error}");
        assert!(took < std::time::Duration::from_secs(2), "{source}: {took:?}");
    }
    // Templates after it are as ever.
    assert!(render(&template("smollm2"), Place::User, "x").is_some());
}
