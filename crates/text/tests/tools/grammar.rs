//! What the grammars of calls let through: compiled by llguidance over small vocabularies, walked token by token,
//! and read again by the parser.

use std::sync::Arc;

use crate::formats::{CONTROL, NORMAL, USER_DEFINED, family, read, template, tokenizer, tools};
use exrail_grammar::{Compiler, Grammar, Limits, Source, Validator, Vocabulary};
use exrail_text::tools::{
    CallChoice, CallLimits, Composed, Piece, ThoughtLead, ToolError, ToolFormat, ToolSpec,
};
use exrail_text::{ChatTemplate, Specials, Tokenizer};
use serde_json::json;

const FAMILIES: [&str; 6] = ["hermes", "llama3", "mistral", "mistral-args", "gemma", "generic"];

struct Lock {
    grammar: Grammar,
    tokenizer: Arc<Tokenizer>,
}

/// How far a text gets.
#[derive(Debug, PartialEq)]
enum Reach {
    Whole,
    /// All of it, and more has to follow.
    Unfinished,
    /// This many tokens.
    Stopped(usize),
}

impl Lock {
    fn new(tokenizer: Tokenizer, composed: Composed) -> Lock {
        let tokenizer = Arc::new(tokenizer);
        let vocabulary = Vocabulary::new(&tokenizer).unwrap();
        let compiler = Compiler::new(vocabulary, Limits::default()).unwrap();
        let Composed { lark, schemas } = composed;
        let source = Source::Composed { lark: lark.clone(), schemas };
        let grammar = compiler.compile(&source).unwrap_or_else(|error| panic!("{error}\n{lark}"));
        Lock { grammar, tokenizer }
    }

    fn of(name: &str, choice: CallChoice, limits: CallLimits) -> Lock {
        let (format, tokenizer) = family(name);
        Lock::new(tokenizer, format.grammar(&tools(), choice, ThoughtLead::Absent, limits).unwrap())
    }

    fn reach_ids(&self, ids: &[u32]) -> Reach {
        let mut matcher = self.grammar.matcher();
        for (at, &id) in ids.iter().enumerate() {
            if !matcher.mask().unwrap().allows(id) {
                return Reach::Stopped(at);
            }
            matcher.advance(id).unwrap();
        }
        if matcher.is_complete() { Reach::Whole } else { Reach::Unfinished }
    }

    fn reach(&self, text: &str) -> Reach {
        self.reach_ids(&self.tokenizer.encode(text, Specials::Parse).unwrap())
    }
}

fn weather(name: &str) -> String {
    let object =
        |key: &str| format!("{{\"name\": \"get_weather\", \"{key}\": {{\"city\": \"Paris\"}}}}");
    match name {
        "hermes" | "generic" => format!("<tool_call>\n{}\n</tool_call>", object("arguments")),
        "llama3" => object("parameters"),
        "mistral" => format!("[TOOL_CALLS] [{}]", object("arguments")),
        "mistral-args" => "[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\"}".to_owned(),
        "gemma" => format!("```tool_call\n{}\n```", object("arguments")),
        other => panic!("{other}"),
    }
}

#[test]
fn calls_of_every_family_are_let_through_and_nothing_near_them() {
    for name in FAMILIES {
        let one = weather(name);
        let auto = Lock::of(name, CallChoice::Auto, CallLimits::default());
        assert_eq!(auto.reach(&one), Reach::Whole, "{name}");
        for prose in ["", "Some functional text <tool {\"a\": 1} [TOOL] ``` é", "\n x"] {
            assert_eq!(auto.reach(prose), Reach::Whole, "{name}: {prose}");
        }
        if name != "llama3" {
            assert_eq!(auto.reach(&format!("I look.\n{one}")), Reach::Whole, "{name}");
        }
        for (from, to) in
            [("get_weather", "rm"), ("{\"city\"", "{\"town\""), ("Paris\"", "Paris\",")]
        {
            let broken = one.replacen(from, to, 1);
            let reach = auto.reach(&broken);
            assert!(matches!(reach, Reach::Stopped(_)), "{name}: {broken}: {reach:?}");
        }
        // It must not go on behind the last call.
        let reach = auto.reach(&format!("{one} and more"));
        assert!(matches!(reach, Reach::Stopped(_)), "{name}: {reach:?}");
    }
}

#[test]
fn a_demanded_call_comes_at_once_and_is_of_the_named_tool() {
    for name in FAMILIES {
        let one = weather(name);
        for choice in [CallChoice::Required, CallChoice::Named("get_weather")] {
            let lock = Lock::of(name, choice, CallLimits::default());
            assert_eq!(lock.reach(&one), Reach::Whole, "{name}");
            assert_eq!(lock.reach(""), Reach::Unfinished, "{name}");
            assert_eq!(lock.reach("Well, "), Reach::Stopped(0), "{name}");
        }
        let lock = Lock::of(name, CallChoice::Named("ping"), CallLimits::default());
        assert!(matches!(lock.reach(&one), Reach::Stopped(_)), "{name}");
    }
}

#[test]
fn there_are_no_more_calls_than_allowed() {
    let (two, three) = (CallLimits { calls: 2, ..CallLimits::default() }, CallLimits::default());
    for name in ["hermes", "mistral", "mistral-args", "gemma"] {
        let one = weather(name);
        let inner = one.trim_start_matches("[TOOL_CALLS] [").trim_end_matches(']');
        let several = |n: usize| match name {
            "mistral" => format!("[TOOL_CALLS] [{}]", vec![inner; n].join(", ")),
            "mistral-args" => one.repeat(n),
            _ => vec![one.as_str(); n].join("\n"),
        };
        for (limits, most) in [(two, 2), (three, 3)] {
            let lock = Lock::of(name, CallChoice::Auto, limits);
            assert_eq!(lock.reach(&several(most)), Reach::Whole, "{name}");
            assert!(matches!(lock.reach(&several(most + 1)), Reach::Stopped(_)), "{name}");
        }
    }
}

/// Tokens that complete the marker and carry more, or only look like it.
fn crossing() -> (ToolFormat, Tokenizer) {
    let tokens = [
        ("<tool", NORMAL),
        ("_call>=list", NORMAL),
        ("_call>\n{", NORMAL),
        (" functional", NORMAL),
        ("<tool_call>", USER_DEFINED),
        ("</tool_call>", USER_DEFINED),
    ];
    let tokenizer = tokenizer(&tokens);
    (ToolFormat::detect(Some(&template("qwen2_5")), &tokenizer), tokenizer)
}

#[test]
fn b5_a_token_that_completes_the_marker_and_carries_more_is_held_against_the_call() {
    let (format, tokenizer) = crossing();
    let choice = CallChoice::Auto;
    let composed =
        format.grammar(&tools(), choice, ThoughtLead::Absent, CallLimits::default()).unwrap();
    let first = u32::try_from(tokenizer.vocab_len()).unwrap() - 6;
    let lock = Lock::new(tokenizer, composed);
    let ids = |text: &str| lock.tokenizer.encode(text, Specials::AsText).unwrap();
    assert_eq!(lock.reach_ids(&[first, first + 1]), Reach::Stopped(1), "`<tool` `_call>=list`");
    assert_eq!(lock.reach_ids(&[first, first + 3]), Reach::Whole, "prose");
    let mut call = vec![first, first + 2];
    call.extend(ids("\"name\": \"ping\", \"arguments\": {}}\n</tool_call>"));
    assert_eq!(lock.reach_ids(&call), Reach::Whole);
    // Whatever a description says.
    let loud = ToolSpec::new("ping", Some("functional =list <tool_call>".into()), json!(null));
    let composed = format
        .grammar(&[loud.unwrap()], choice, ThoughtLead::Absent, CallLimits::default())
        .unwrap();
    let lock = Lock::new(crossing().1, composed);
    assert_eq!(lock.reach_ids(&[first, first + 1]), Reach::Stopped(1));
    assert_eq!(lock.reach_ids(&call), Reach::Whole);
}

/// The mutation: with free text that may hold the marker, what follows it is anything at all.
#[test]
fn mutation_without_the_exclusion_b5_a_broken_call_is_let_through() {
    let (format, tokenizer) = crossing();
    let mut composed = format
        .grammar(&tools(), CallChoice::Auto, ThoughtLead::Absent, CallLimits::default())
        .unwrap();
    let guard = " & ~(/(?s:.*)/ \"<tool_call>\" /(?s:.*)/)";
    assert!(composed.lark.contains(guard), "{}", composed.lark);
    composed.lark = composed.lark.replace(guard, "").replace("| lead calls", "");
    let lock = Lock::new(tokenizer, composed);
    let broken = "<tool_call>=list";
    assert_eq!(lock.reach(broken), Reach::Whole);
    let parser = format.parser(&tools(), ThoughtLead::Absent, CallLimits::default());
    assert!(matches!(&read(&parser, [broken])[..], [Piece::Malformed(_)]));
}

/// The mutation of the border: a grammar that begins with the first token behind the one that completed the marker.
/// What that one carries beside is held against nothing, and the reader gets a call that is none.
#[test]
fn mutation_b5_a_lock_that_begins_behind_the_token_lets_its_rest_through() {
    let (format, tokenizer) = crossing();
    let mut composed = format
        .grammar(&tools(), CallChoice::Auto, ThoughtLead::Absent, CallLimits::default())
        .unwrap();
    let begins = "| lead calls";
    assert!(composed.lark.contains(begins), "{}", composed.lark);
    composed.lark = composed.lark.replace(begins, "| lead REST calls");
    composed.lark.push_str("REST: /=[a-z]*/\n");
    let first = u32::try_from(tokenizer.vocab_len()).unwrap() - 6;
    let lock = Lock::new(tokenizer, composed);
    assert_eq!(lock.reach_ids(&[first, first + 1]), Reach::Unfinished, "`<tool` `_call>=list`");
    let call = "<tool_call>=list\n{\"name\": \"ping\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(lock.reach(call), Reach::Whole);
    let parser = format.parser(&tools(), ThoughtLead::Absent, CallLimits::default());
    assert!(matches!(&read(&parser, [call])[..], [Piece::Malformed(_)]));
}

/// The literal of a control token, spelled in ordinary tokens, does not open a call either.
#[test]
fn e2_a_marker_spelled_out_is_no_marker() {
    for name in ["mistral", "mistral-args"] {
        let lock = Lock::of(name, CallChoice::Auto, CallLimits::default());
        let spelled = lock.tokenizer.encode("[TOOL_CALLS]", Specials::AsText).unwrap();
        assert_eq!(lock.reach_ids(&spelled), Reach::Stopped(spelled.len() - 1), "{name}");
    }
}

#[test]
fn b15_a_thought_is_free_and_the_answer_behind_it_is_locked() {
    let locked = r#"{"a": 1}"#;
    let schema = json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"], "additionalProperties": false });
    for kind in [USER_DEFINED, CONTROL] {
        let tokens = [("<think>", kind), ("</think>", kind)];
        let lock = |lead, calls: bool| {
            let tokenizer = tokenizer(&tokens);
            let format = ToolFormat::detect(Some(&template("qwen2_5")), &tokenizer);
            assert_eq!(format.markers().len(), if kind == CONTROL { 2 } else { 0 });
            let limits = CallLimits::default();
            let composed = if calls {
                format.grammar(&tools(), CallChoice::Auto, lead, limits).unwrap()
            } else {
                format.schema_grammar(schema.clone(), lead)
            };
            Lock::new(tokenizer, composed)
        };
        let open = lock(ThoughtLead::IsOpen, false);
        assert_eq!(open.reach(&format!("hm {{ <tool_call> é</think>\n\n{locked}")), Reach::Whole);
        assert_eq!(open.reach(locked), Reach::Unfinished, "that is a thought");
        assert!(matches!(open.reach("hm</think>\nWell"), Reach::Stopped(_)));
        assert!(matches!(open.reach("hm</think>\n\n\n\n\n"), Reach::Stopped(_)), "no stall");
        let may = lock(ThoughtLead::MayOpen, false);
        assert_eq!(may.reach(locked), Reach::Whole);
        assert_eq!(may.reach(&format!("<think>hm</think>{locked}")), Reach::Whole);
        assert_eq!(may.reach("Text before <think>"), Reach::Stopped(0), "nothing before the tag");
        let absent = lock(ThoughtLead::Absent, false);
        assert_eq!(absent.reach("<think>"), Reach::Stopped(0));
        let calls = lock(ThoughtLead::MayOpen, true);
        let one = weather("hermes");
        assert_eq!(calls.reach(&format!("<think>a {one} b")), Reach::Unfinished);
        assert_eq!(
            calls.reach(&format!("<think>a <tool_call>=list</think>\n\nI look. {one}")),
            Reach::Whole
        );
        assert!(matches!(calls.reach("<think>a</think>\n<tool_call>=list"), Reach::Stopped(_)));
    }
}

/// Whatever the mask lets through, the parser takes apart without a fault, and arguments conform.
#[test]
fn b5_random_walks_under_the_lock_give_only_text_and_calls_that_conform() {
    let words = [
        "<tool",
        "_call>",
        "I ",
        "{\"name\": \"",
        "get_weather",
        "ping",
        "\"city\": \"",
        "Rome",
        "days",
        "}}",
        "[TOOL",
        "_CALLS]",
        "```",
        "tool_call",
        "\", ",
        "_call>\n{",
        "\"}",
    ];
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut draw = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
    };
    let (mut n_calls, mut n_texts) = (0, 0);
    for name in FAMILIES {
        let markers = [
            ("[TOOL_CALLS]", CONTROL),
            ("[ARGS]", CONTROL),
            ("[CALL_ID]", CONTROL),
            ("<|python_tag|>", CONTROL),
        ];
        let tokens: Vec<(&str, i32)> =
            words.iter().map(|&it| (it, NORMAL)).chain(markers).collect();
        let source = match name {
            "hermes" => "qwen2_5",
            "llama3" => "llama3_1",
            "mistral" => "mistral_tools",
            "mistral-args" => "mistral_arguments",
            "gemma" => "gemma",
            _ => "smollm2",
        };
        let tokenizer = tokenizer(&tokens);
        let format = ToolFormat::detect(Some(&template(source)), &tokenizer);
        let limits = CallLimits::default();
        for choice in [CallChoice::Auto, CallChoice::Required] {
            let composed = format.grammar(&tools(), choice, ThoughtLead::Absent, limits).unwrap();
            let lock = Lock::new(crate::formats::tokenizer(&tokens), composed);
            for _ in 0..40 {
                let answer = walk(&lock, &mut draw);
                let parser = format.parser(&tools(), ThoughtLead::Absent, limits);
                let Some(answer) = answer else { continue };
                for piece in read(&parser, [answer.as_str()]) {
                    match piece {
                        Piece::Text(_) => n_texts += 1,
                        Piece::Call(call) => {
                            n_calls += 1;
                            let tool =
                                tools().into_iter().find(|it| it.name() == call.name).unwrap();
                            let validator = Validator::new(&tool.arguments_schema()).unwrap();
                            validator.check(&call.arguments.into()).unwrap();
                        }
                        other => panic!("{name}: {other:?} in {answer:?}"),
                    }
                }
            }
        }
    }
    assert!(n_calls > 50 && n_texts > 20, "{n_calls} calls, {n_texts} texts");
}

/// A random answer that ended, or nothing where it did not in 300 tokens.
fn walk(lock: &Lock, draw: &mut impl FnMut(usize) -> usize) -> Option<String> {
    let mut matcher = lock.grammar.matcher();
    let mut detokenizer = lock.tokenizer.detokenizer();
    let mut answer = String::new();
    for _ in 0..300 {
        let ids: Vec<u32> = matcher.mask().unwrap().ids().collect();
        let words: Vec<u32> = ids.iter().copied().filter(|&id| id > 255).collect();
        // Words and markers lead into calls; bytes are mostly dead ends of their own.
        let from = if words.is_empty() || draw(4) == 0 { &ids } else { &words };
        let id = from[draw(from.len())];
        matcher.advance(id).unwrap();
        if lock.tokenizer.eos_ids().contains(&id) {
            return Some(answer + &detokenizer.finish());
        }
        answer.push_str(&detokenizer.push(lock.tokenizer.token_bytes(id).unwrap()));
    }
    None
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let (format, _) = family("hermes");
    let grammar = |tools: &[ToolSpec], choice| {
        format.grammar(tools, choice, ThoughtLead::Absent, CallLimits::default()).unwrap_err()
    };
    assert_eq!(grammar(&[], CallChoice::Auto), ToolError::NoTools);
    let unknown = ToolError::UnknownChoice { name: "rm".into() };
    assert_eq!(grammar(&tools(), CallChoice::Named("rm")), unknown);
    let twice = [tools(), tools()].concat();
    assert!(matches!(grammar(&twice, CallChoice::Auto), ToolError::DuplicateName { .. }));
    let limits = CallLimits { calls: 0, ..CallLimits::default() };
    let none = format.grammar(&tools(), CallChoice::Auto, ThoughtLead::Absent, limits);
    assert_eq!(none.unwrap_err(), ToolError::NoCalls);
    for name in ["", "a b", "é", "a\"", &"x".repeat(65)] {
        let error = ToolSpec::new(name, None, json!(null)).unwrap_err();
        assert!(matches!(error, ToolError::BadName { .. }), "{name}");
    }
    for parameters in
        [json!([]), json!({ "type": "string" }), json!({ "type": ["object"] }), json!(true)]
    {
        let error = ToolSpec::new("f", None, parameters).unwrap_err();
        assert!(matches!(error, ToolError::NotAnObject { .. }), "{error}");
    }
}

#[test]
fn a_schema_that_does_not_speak_of_further_fields_allows_none() {
    let closed = |parameters| ToolSpec::new("f", None, parameters).unwrap().arguments_schema();
    let properties = json!({ "a": { "type": "integer" } });
    assert_eq!(closed(json!({ "properties": properties }))["additionalProperties"], false);
    assert_eq!(closed(json!(null))["additionalProperties"], false);
    for speaks in [
        json!({ "properties": properties, "additionalProperties": true }),
        json!({ "properties": properties, "allOf": [] }),
        json!({ "type": "object" }),
    ] {
        assert_eq!(
            closed(speaks.clone()).get("additionalProperties"),
            speaks.get("additionalProperties")
        );
    }
}

#[test]
fn a_template_in_an_unknown_syntax_is_generic() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}{{ tools | tojson }}";
    let template = ChatTemplate::compile(source, "", "").unwrap();
    let format = ToolFormat::detect(Some(&template), &tokenizer(&[]));
    assert_eq!((format.family().name(), format.describes_tools()), ("generic", false));
}
