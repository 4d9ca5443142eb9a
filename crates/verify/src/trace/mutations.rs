//! The schemas are the types, good records pass, and what a change of one field does to each of them.

use std::collections::{BTreeMap, BTreeSet};

use exrail_wire::{Pins, TraceBody, TraceEnvelope, schemas};
use serde_json::{Value, json};

use super::log::read_log;
use super::samples::{answer, collapse, envelope, every_event, line, refusal, sealed};
use super::{Contract, LogReport, Rule, verify_log};
use crate::prompt::sha256_hex;

fn schema(name: &str) -> Value {
    serde_json::from_str(schemas::find(name).unwrap().json).unwrap()
}

fn records() -> Vec<Value> {
    let answer = |name, record| envelope(name, TraceBody::Answer(Box::new(record)));
    let more = [answer("trace-refused", refusal()), answer("trace-collapsed", collapse())];
    every_event().iter().chain(&more).map(sealed).collect()
}

fn log_of(lines: &[String]) -> LogReport {
    let log: String = lines.iter().map(|line| format!("{line}\n")).collect();
    verify_log(log.as_bytes(), None).unwrap()
}

#[test]
fn the_hash_of_the_schemas_is_theirs() {
    let all: String = schemas::TRACE.iter().map(|it| format!("{}\0", it.json)).collect();
    let expected = sha256_hex(all.as_bytes());
    assert_eq!(schemas::SHA256, expected, "after a change of a schema, and of its version");
    for published in schemas::TRACE.iter().chain(schemas::STORED) {
        let schema = schema(published.name);
        assert_eq!(schema["title"], published.name);
        assert!(jsonschema::draft202012::meta::is_valid(&schema), "{}", published.name);
    }
    let _compiles = Contract::new();
}

#[test]
fn good_records_of_every_event_have_no_breach() {
    let contract = Contract::new();
    for record in records() {
        assert_eq!(contract.check(&record, None).breaches(), [], "{record}");
    }
    let report = log_of(&records().iter().map(line).collect::<Vec<_>>());
    assert_eq!((report.n_breaches, report.n_lines), (0, 13), "{:?}", report.breaches);
    assert_eq!(report.n_by_event["answer.decide"], 3);
}

#[test]
fn what_is_not_known_yet_is_null_and_passes() {
    let body = TraceBody::Guard { guard: "not_ready".into(), detail: String::new() };
    let early = TraceEnvelope {
        session_id: None,
        agent_id: None,
        mem_rev: 0,
        mem_hash: None,
        forced: None,
        pins: Pins::default(),
        request_id: String::new(),
        ..envelope("boot-1", body)
    };
    assert_eq!(Contract::new().check(&sealed(&early), None).breaches(), []);
    // What a client may leave empty is no reason to withhold its answer.
    let empty = TraceEnvelope { session_id: Some(String::new()), ..early };
    assert_eq!(Contract::new().check(&sealed(&empty), None).breaches(), []);
}

/// Names of the fields below an object, with their places; `[]` for every item of a list.
fn fields(value: &Value, at: &str, opaque: &[&str], found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let place = format!("{at}/{name}");
                if !opaque.contains(&name.as_str()) {
                    fields(value, &place, opaque, found);
                }
                found.insert(place);
            }
        }
        Value::Array(items) => {
            items.iter().for_each(|item| fields(item, &format!("{at}/[]"), opaque, found));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The same of a schema.
fn declared(part: &Value, whole: &Value, at: &str, found: &mut BTreeSet<String>) {
    if let Some(reference) = part["$ref"].as_str() {
        let target = whole.pointer(reference.trim_start_matches('#')).unwrap();
        declared(target, whole, at, found);
    }
    for choice in part["anyOf"].as_array().into_iter().flatten() {
        declared(choice, whole, at, found);
    }
    if part.get("items").is_some() {
        declared(&part["items"], whole, &format!("{at}/[]"), found);
    }
    let Some(properties) = part["properties"].as_object() else { return };
    assert_eq!(part["additionalProperties"], false, "{at}");
    for (name, property) in properties {
        found.insert(format!("{at}/{name}"));
        declared(property, whole, &format!("{at}/{name}"), found);
    }
}

#[test]
fn the_fields_of_the_schemas_are_those_of_the_types() {
    let mut seen = BTreeSet::new();
    for record in every_event() {
        let (mut written, mut published) = (BTreeSet::new(), BTreeSet::new());
        let record = sealed(&record);
        let name = record["event"].as_str().unwrap().to_owned();
        fields(&record, "", &["lambda", "report"], &mut written);
        declared(&schema(&name), &schema(&name), "", &mut published);
        assert_eq!(written, published, "{name}");
        let schema = schema(&name);
        let required: Vec<&str> =
            schema["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let names = record.as_object().unwrap().keys();
        let optional: Vec<_> = names.filter(|name| !required.contains(&name.as_str())).collect();
        // What an answer was held to is told of those that were held to something.
        let expected: &[&str] = match name.as_str() {
            "infer.run" => &["forced", "structured", "constraints"],
            "answer.decide" => &["forced", "constraints", "steps"],
            _ => &["forced"],
        };
        assert_eq!(optional, expected, "{name}");
        seen.insert(name);
    }
    let all: BTreeSet<_> = schemas::TRACE.iter().map(|it| it.name.to_owned()).collect();
    assert_eq!(seen, all);
}

#[test]
fn the_fields_of_a_stored_snippet_are_published() {
    let chunk = serde_json::to_value(crate::fakes::chunk("a.md", 0, "text")).unwrap();
    let (mut written, mut published) = (BTreeSet::new(), BTreeSet::new());
    fields(&chunk, "", &[], &mut written);
    declared(&schema("chunk"), &schema("chunk"), "", &mut published);
    assert_eq!(written, published);
}

/// Other values of the same kind, which no type and no pattern tells from the right one.
fn others(value: &Value) -> Vec<Value> {
    match value {
        Value::Null => vec![json!("x")],
        Value::Bool(is_so) => vec![json!(!is_so)],
        Value::Number(number) if number.is_u64() => {
            vec![json!(number.as_u64().unwrap() + 1), json!(-1)]
        }
        Value::Number(number) => vec![json!(number.as_f64().unwrap() + 0.015_625)],
        Value::String(text) => {
            let last = text.chars().last().unwrap_or('0');
            let other = if last == '1' { '2' } else { '1' };
            let mut same_length: String =
                text.chars().take(text.chars().count().saturating_sub(1)).collect();
            same_length.push(other);
            vec![json!(same_length)]
        }
        Value::Array(items) if items.is_empty() => vec![json!(["x"])],
        Value::Array(items) => vec![json!(items[..items.len() - 1])],
        Value::Object(_) => vec![json!({}), json!({"unknown": 1})],
    }
}

/// JSON pointers of everything below a record.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let place = format!("{at}/{name}");
                pointers(value, &place, found);
                found.push(place);
            }
        }
        Value::Array(items) => {
            for (nth, item) in items.iter().enumerate() {
                let place = format!("{at}/{nth}");
                pointers(item, &place, found);
                found.push(place);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Calls back with each record in which one field has another value.
fn change_each(record: &Value, mut with: impl FnMut(&str, Value)) {
    let mut places = Vec::new();
    pointers(record, "", &mut places);
    for place in places.iter().filter(|place| *place != "/record_sha256") {
        for other in others(record.pointer(place).unwrap()) {
            let mut changed = record.clone();
            *changed.pointer_mut(place).unwrap() = other;
            with(place, changed);
        }
    }
}

#[test]
fn every_change_of_one_field_breaks_the_seal() {
    let contract = Contract::new();
    for record in records() {
        let mut n_changed = 0;
        change_each(&record, |place, changed| {
            n_changed += 1;
            let report = read_log(&contract, format!("{changed}\n").as_bytes(), None).unwrap();
            assert!(report.n_breaches > 0, "{place} of {record}");
        });
        assert!(n_changed > 20);
    }
}

/// Fields of which another value is as good as theirs to the contract alone, and why. The seal shows their change.
const FREE: [(&str, &[&str]); 10] = [
    (
        "who asked, and what it was computed with: nothing else in a record repeats it",
        &[
            "/agent_id",
            "/session_id",
            "/request_id",
            "/trace_id",
            "/forced",
            "/mem_hash",
            "/mem_rev",
            "/pins/encoder_fp",
            "/pins/engine_build",
            "/pins/index_hash",
            "/pins/kv_dtype",
            "/pins/model_fp",
            "/pins/quant",
            "/pins/template_hash",
            "/pins/tok_fp",
            "/pins/tp",
            "/collection",
            "/route",
            "/choice",
            "/seed",
            "/upstream",
            "/model",
            "/phase",
            "/guard",
        ],
    ),
    (
        "hashes and sizes of what the log does not hold: texts, prompts, an index",
        &[
            "/answer_sha256",
            "/withheld_sha256",
            "/index_hash",
            "/prompt/shape_sha256",
            "/prompt/system_sha256",
            "/prompt/task",
            "/prompt/slots/[]/span/end",
            "/steps/[]/claim_sha256",
            "/documents",
            "/chunks",
        ],
    ),
    (
        "what an answer was held to: the schemas and the answers are not in the log",
        &[
            "/structured/contracts",
            "/structured/contracts/[]/contract_hash",
            "/structured/contracts/[]/name",
            "/structured/is_complete",
            "/structured/n_repairs",
            "/structured/n_tool_calls",
            "/structured/schema_hash",
            "/structured/tool_calls",
            "/structured/tool_calls/[]/dedupe_key",
            "/structured/tool_calls/[]/name",
        ],
    ),
    (
        "of a prompt that is not in the log: an answer over evidence has its rules beside it",
        &["/constraints/n_patterns", "/constraints/n_rules", "/constraints/sha256"],
    ),
    (
        "of snippets that are not cited, or that only the collection knows: `--collection` checks them",
        &[
            "/retrieved",
            "/retrieved/[]/section_id",
            "/retrieved/[]/text_sha256",
            "/retrieved/[]/tokens",
            "/retrieved/[]/selected",
        ],
    ),
    (
        "what another server did and said, which is not in the log",
        &["/attempts", "/fault", "/repairs", "/tokens/[]"],
    ),
    (
        "measured: any value of the kind is possible",
        &[
            "/latency_ms/held",
            "/latency_ms/overhead",
            "/latency_ms/upstream",
            "/checks/answer_containment",
            "/checks/citation_precision",
            "/checks/ds_ac",
            "/checks/embedding_ms",
            "/checks/ms",
            "/checks/span_containment",
            "/latency_ms/decode",
            "/latency_ms/prefill",
            "/latency_ms/queue",
            "/latency_ms/retrieve",
            "/metrics/latency_ms/decode",
            "/metrics/latency_ms/prefill",
            "/metrics/latency_ms/queue",
            "/metrics/latency_ms/retrieve",
            "/metrics/ds_mean",
            "/metrics/h_mean",
            "/metrics/tokens/cached",
            "/metrics/tokens/in",
            "/metrics/tokens/out",
            "/ms",
            "/ok",
            "/oracle_kl",
            "/query/lang",
            "/query/tokens",
            "/retrieved/[]/ds_cal",
            "/retrieved/[]/score_norm",
            "/retrieved/[]/score_raw",
            "/steps/[]/tokens/cached",
            "/steps/[]/tokens/in",
            "/steps/[]/tokens/out",
            "/tokens/cached",
            "/tokens/in",
            "/tokens/out",
        ],
    ),
    (
        "a rotated context may be of any ranges that do not overlap",
        &[
            "/kept_ranges",
            "/kept_ranges/[]/[]",
            "/dropped_ranges",
            "/dropped_ranges/[]/[]",
            "/limit",
            "/tokens_used",
        ],
    ),
    (
        "words for people, and names that other versions may add",
        &["/detail", "/problem", "/refusal_reason", "/finish_reason", "/guards_fired/[]"],
    ),
    (
        "of a probe, which has a layout of its own",
        &["/lambda", "/lambda/state", "/report", "/report/probe"],
    ),
];

/// The mutation: whoever changes a record seals it again. What the contract alone catches is everything but
/// the fields that nothing else in the record depends on.
#[test]
fn without_the_seal_the_contract_catches_all_but_the_free_fields() {
    let contract = Contract::new();
    let mut free: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for record in records() {
        let event = record["event"].as_str().unwrap().to_owned();
        change_each(&record, |place, changed| {
            if contract.check(&changed, None).breaches().is_empty() {
                let any =
                    |part: &str| part.parse::<usize>().map_or(part.to_owned(), |_| "[]".into());
                let place: Vec<String> = place.split('/').map(any).collect();
                free.entry(place.join("/")).or_default().insert(event.clone());
            }
        });
    }
    let found: Vec<&str> = free.keys().map(String::as_str).collect();
    let mut expected: Vec<&str> = FREE.iter().flat_map(|(_, places)| *places).copied().collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

/// A record in which one field differs, with the rule that catches it.
fn broken(place: &str, with: Value) -> Vec<Rule> {
    let mut record = sealed(&envelope("trace-1", TraceBody::Answer(Box::new(answer()))));
    *record.pointer_mut(place).unwrap_or_else(|| panic!("{place}")) = with;
    Contract::new().check(&record, None).breaches().iter().map(|breach| breach.rule).collect()
}

/// G-14: each thing that it refuses by name, with the rule that stands for it.
#[test]
fn what_the_trace_contract_refuses_is_refused_by_its_rule() {
    let cases = [
        ("/retrieved/0/tokens", json!(0), Rule::Schema),
        ("/retrieved/0/section_id", json!(""), Rule::Schema),
        ("/retrieved/0/snippet_id", json!("0123456789abcdef"), Rule::SnippetId),
        ("/segments/0/snippet_ids/0", json!("0123456789abcdef"), Rule::Citations),
        ("/segments/0/snippet_ids", json!([]), Rule::Sections),
        ("/segments/0/text_span/unit", json!("char"), Rule::Schema),
        ("/segments/0/text_span/end", json!(0), Rule::Schema),
        ("/segments/1/text_span/start", json!(42), Rule::Spans),
        ("/segments/1/text_span/end", json!(4000), Rule::Spans),
        ("/retrieved/1/span/end", json!(100), Rule::Spans),
        ("/segments/0/section_id", json!("pages.md#1"), Rule::Sections),
        ("/answer_text", json!("Something else."), Rule::AnswerHash),
        ("/query/text", json!("Another question?"), Rule::QuestionId),
        ("/prompt/constraints/0", json!("Anything goes."), Rule::ConstraintsHash),
        ("/constraints/sha256", json!(sha256_hex(b"other")), Rule::ConstraintsHash),
        ("/constraints/n_rules", json!(2), Rule::ConstraintsHash),
        ("/constraints/echo", json!("not_built"), Rule::ConstraintsHash),
        ("/prompt/citations/0", json!("0123456789abcdef"), Rule::Prompt),
        ("/pins/index_hash", json!(null), Rule::IndexHash),
        ("/mem_hash", json!(null), Rule::Memory),
        ("/schema_version", json!("1.0"), Rule::Schema),
        ("/refusal", json!(true), Rule::Refusal),
        ("/metrics/ds_status", json!("not_calibrated"), Rule::Metrics),
        ("/checks/citation_recall", json!(null), Rule::Metrics),
        ("/checks/citation_precision", json!(null), Rule::Metrics),
        ("/checks/ds_ac_status", json!("not_calibrated"), Rule::Metrics),
        ("/checks/coverage_cited", json!(0.9), Rule::Schema),
    ];
    for (place, with, rule) in cases {
        let found = broken(place, with.clone());
        assert!(found.contains(&rule), "{place} = {with}: {found:?}");
    }
}

/// G-20: what the steps of an answer must agree with.
#[test]
fn steps_that_are_not_those_of_the_answer_are_breaches() {
    let retrieved = answer().retrieved;
    let id = |at: usize| json!([retrieved[at].snippet_id]);
    let cases = [
        // Another answer than the good steps are.
        ("/steps/0/claim", json!("A page has 512 tokens."), Rule::Steps),
        ("/steps/0/claim", json!(null), Rule::Steps),
        ("/steps/0/claim_sha256", json!(sha256_hex(b"other")), Rule::AnswerHash),
        ("/steps/2/citations", id(1), Rule::Steps),
        ("/steps/2/citations", json!([]), Rule::Citations),
        ("/steps/1/citations", id(0), Rule::Citations),
        ("/segments/1/snippet_ids", id(1), Rule::Steps),
        // What was retrieved and was not in the prompt.
        ("/steps/0/citations", id(2), Rule::Citations),
        // A step that does not stand is told, or counted as one that does.
        ("/steps/1/claim", json!("Eviction is by size."), Rule::Steps),
        ("/steps/1/state", json!("good"), Rule::Steps),
        ("/steps/1/state", json!("stalled"), Rule::Steps),
        ("/steps/1/reason", json!(null), Rule::Steps),
        ("/steps/2/step", json!(3), Rule::Steps),
        // The same seed once more.
        ("/steps/2/seed", answer_of("/steps/1/seed"), Rule::Steps),
        ("/guards_fired", json!([]), Rule::Steps),
        ("/steps/0/tokens/out", json!(10), Rule::Tokens),
        ("/steps/0/tokens/cached", json!(21), Rule::Tokens),
    ];
    for (place, with, rule) in cases {
        let found = broken(place, with.clone());
        assert!(found.contains(&rule), "{place} = {with}: {found:?}");
    }
}

fn answer_of(place: &str) -> Value {
    sealed(&envelope("trace-1", TraceBody::Answer(Box::new(answer()))))
        .pointer(place)
        .unwrap()
        .clone()
}

/// A snippet that was retrieved and not put into the prompt cannot be cited (G-15).
#[test]
fn a_citation_of_what_was_not_in_the_prompt_is_a_breach() {
    let id = answer().retrieved[2].snippet_id.clone();
    assert!(broken("/segments/0/snippet_ids/0", json!(id)).contains(&Rule::Citations));
}

/// One section a segment (G-15).
#[test]
fn a_segment_over_two_sections_is_a_breach() {
    let mut answer = answer();
    let cited: Vec<String> = answer.retrieved[..2].iter().map(|it| it.snippet_id.clone()).collect();
    answer.retrieved[1].section_id = "pages.md#9".into();
    answer.segments[1].snippet_ids = cited;
    let record = sealed(&envelope("trace-1", TraceBody::Answer(Box::new(answer))));
    let findings = Contract::new().check(&record, None);
    let rules: Vec<Rule> = findings.breaches().iter().map(|breach| breach.rule).collect();
    assert!(rules.contains(&Rule::Sections), "{rules:?}");
}

#[test]
fn a_breach_names_pointer_expected_and_found_and_quotes_no_value() {
    let mut record = sealed(&envelope("trace-1", TraceBody::Answer(Box::new(answer()))));
    record["retrieved"][0]["tokens"] = json!("a secret of the user");
    let breach = Contract::new().check(&record, None).first().unwrap_err();
    let told = breach.to_string();
    assert!(told.starts_with("/retrieved/0/tokens: expected"), "{told}");
    assert!(!told.contains("secret"), "{told}");
}

#[test]
fn a_log_is_read_to_its_end_whatever_stands_in_it() {
    let good = line(&sealed(&every_event()[2]));
    let text = format!("{good}\nnot json\n[1]\n\n\u{feff}{good}\n{{\"event\":\"x\"}}\n{{\"half");
    let mut bytes = text.into_bytes();
    bytes.splice(good.len() + 1..good.len() + 1, [0xff, 0xfe, b'\n']);
    let report = verify_log(&bytes[..], None).unwrap();
    assert_eq!((report.n_lines, report.torn_bytes), (7, 6));
    let broken: Vec<_> =
        report.rules.iter().filter(|it| it.n_broken > 0).map(|it| (it.rule, it.n_broken)).collect();
    assert_eq!(broken, [(Rule::Json, 5), (Rule::Seal, 1), (Rule::Schema, 1)]);
    assert_eq!(report.breaches[0].line, 2);
}

#[test]
fn records_of_a_trace_out_of_order_are_a_breach() {
    let of = |at: usize, request: &str| {
        let mut record = sealed(&every_event()[at]);
        record["trace_id"] = json!("one");
        record["request_id"] = json!(request);
        line(&record)
    };
    let (infer, rotate) = (2, 3);
    assert_eq!(log_of(&[of(rotate, "a"), of(infer, "a")]).n_breaches, 0);
    for lines in [
        [of(infer, "a"), of(rotate, "a")],
        [of(infer, "a"), of(infer, "a")],
        [of(rotate, "b"), of(infer, "a")],
    ] {
        let report = log_of(&lines);
        assert_eq!(
            report.breaches.iter().map(|it| it.breach.rule).collect::<Vec<_>>(),
            [Rule::Order]
        );
    }
}

/// A search and the answer that was drawn from it, in one trace; `change` is of the search, which is sealed again.
fn searched(change: impl FnOnce(&mut Value)) -> [String; 2] {
    let retrieved = answer().retrieved;
    let (query, collection) = (answer().query, answer().collection);
    let search = TraceBody::Retrieve { query, collection, retrieved };
    let mut search = sealed(&envelope("trace-1", search));
    change(&mut search);
    let answer = sealed(&envelope("trace-1", TraceBody::Answer(Box::new(answer()))));
    [line(&search), line(&answer)]
}

#[test]
fn an_answer_agrees_with_the_search_in_front_of_it() {
    let report = log_of(&searched(|_| {}));
    assert_eq!(report.n_breaches, 0, "{:?}", report.breaches);
    let row = report.rules.iter().find(|row| row.rule == Rule::Search).unwrap();
    // Pins, query, collection, the number of results, and each of them.
    assert_eq!(row.n_checked, 4 + 3);
}

/// Whoever changes a search seals it again, and it agrees with itself.
#[test]
fn a_search_that_was_tampered_with_differs_from_its_answer_and_is_found() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 6] = [
        ("/pins", |it| it["pins"]["encoder_fp"] = json!("another")),
        ("/query", |it| it["query"]["tokens"] = json!(6)),
        ("/collection", |it| it["collection"] = json!("another")),
        ("/retrieved", |it| drop(it["retrieved"].as_array_mut().unwrap().pop())),
        ("/retrieved/1", |it| it["retrieved"][1]["ds_cal"] = json!(0.5)),
        ("/retrieved/2", |it| it["retrieved"][2]["text_sha256"] = json!(sha256_hex(b"other"))),
    ];
    for (pointer, change) in cases {
        let lines = searched(change);
        let report = log_of(&lines);
        let found: Vec<(Rule, &str)> =
            report.breaches.iter().map(|it| (it.breach.rule, &*it.breach.pointer)).collect();
        assert_eq!(found, [(Rule::Search, pointer)]);
        // The mutation: without the answer beside it, nothing of it is wrong.
        let alone = log_of(&lines[..1]);
        assert_eq!(alone.n_breaches, 0, "{:?}", alone.breaches);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn bytes_changed_anywhere_are_found_and_never_panic(
        changes in proptest::collection::vec((0usize..40_000, 0u8..=255), 1..4)
    ) {
        let whole: String = records().iter().map(|record| line(record) + "\n").collect();
        let mut bytes = whole.clone().into_bytes();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        let report = read_log(&Contract::new(), &bytes[..], None).unwrap();
        if bytes != whole.as_bytes() {
            proptest::prop_assert!(report.n_breaches > 0 || report.torn_bytes > 0);
        }
    }
}
