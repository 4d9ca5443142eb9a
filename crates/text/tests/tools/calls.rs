//! Calls in generated text: the same however the text is cut, whole or not at all, never out of prose.

use crate::formats::{family, parser, read, tools};
use exrail_text::tools::{
    CallFault, CallLimits, CallParser, Malformed, ParsedCall, Piece, ThoughtLead, ToolFamily,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn text(text: &str) -> Piece {
    Piece::Text(text.into())
}

fn thought(text: &str) -> Piece {
    Piece::Thought(text.into())
}

fn call(index: usize, name: &str, arguments: &str) -> Piece {
    let parsed = serde_json::from_str::<Value>(arguments).unwrap();
    let arguments_json = arguments.to_owned();
    let arguments = parsed.as_object().unwrap().clone();
    Piece::Call(ParsedCall { index, name: name.into(), arguments, arguments_json })
}

fn malformed(text: &str, fault: CallFault) -> Piece {
    Piece::Malformed(Malformed { text: text.into(), fault })
}

/// The format of a family, an answer, and what it is.
type Transcript = (&'static str, &'static str, Vec<Piece>);

/// One answer of each format with two calls, with what it is.
fn transcripts() -> Vec<Transcript> {
    let both = || {
        vec![
            call(0, "get_weather", r#"{"city": "Zürich 🦀 }\"{", "days": 2}"#),
            call(1, "ping", "{}"),
        ]
    };
    let behind = |words: &str| [vec![text(words)], both()].concat();
    vec![
        (
            "hermes",
            "I look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}}\n</tool_call>\n<tool_call>\n{\"name\": \"ping\", \"arguments\": {}}\n</tool_call>",
            behind("I look.\n"),
        ),
        (
            "hermes",
            "<tool_call>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}}, {\"name\": \"ping\", \"arguments\": {}}]</tool_call>",
            both(),
        ),
        (
            "llama3",
            "\n{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}}; {\"type\": \"function\", \"name\": \"ping\", \"parameters\": {}}",
            both(),
        ),
        (
            "llama3",
            "<|python_tag|>{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}}<|python_tag|>{\"name\": \"ping\", \"parameters\": {}}",
            both(),
        ),
        (
            "mistral",
            "Ja.[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}, \"id\": \"abcdef012\"}, {\"name\": \"ping\", \"arguments\": {}}]",
            behind("Ja."),
        ),
        (
            "mistral-args",
            "Ja.[TOOL_CALLS]get_weather[CALL_ID]abcdef012[ARGS]{\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}[TOOL_CALLS]ping[ARGS]{}",
            behind("Ja."),
        ),
        (
            "gemma",
            "Ja.\n```tool_call\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}}\n```\n```tool_call\n{\"name\": \"ping\", \"parameters\": {}}\n```\n",
            behind("Ja.\n"),
        ),
        (
            "generic",
            "<tool_call>{\"name\":\"get_weather\",\"arguments\":{\"city\": \"Zürich 🦀 }\\\"{\", \"days\": 2}}</tool_call><tool_call>{\"name\":\"ping\",\"arguments\":{}}</tool_call>",
            both(),
        ),
    ]
}

#[test]
fn b21_two_calls_are_the_same_two_for_every_split() {
    for (name, answer, expected) in transcripts() {
        let parser = parser(name, ThoughtLead::Absent);
        assert_eq!(read(&parser, [answer]), expected, "{name}: {answer}");
        let letters: Vec<String> = answer.chars().map(String::from).collect();
        assert_eq!(read(&parser, letters.iter().map(String::as_str)), expected, "{name}");
        for at in (0..answer.len()).filter(|&at| answer.is_char_boundary(at)) {
            let parts = [&answer[..at], &answer[at..]];
            assert_eq!(read(&parser, parts), expected, "{name}: split at {at}");
        }
    }
}

/// A call that the answer ended in is told and never made.
#[test]
fn b21_an_answer_that_is_cut_anywhere_gives_no_call_that_was_not_whole() {
    for (name, answer, whole) in transcripts() {
        let parser = parser(name, ThoughtLead::Absent);
        for at in (0..answer.len()).filter(|&at| answer.is_char_boundary(at)) {
            for piece in read(&parser, [&answer[..at]]) {
                match piece {
                    Piece::Call(_) => assert!(whole.contains(&piece), "{name} at {at}: {piece:?}"),
                    Piece::Malformed(it) => {
                        // A list without its last bracket, or an object that has ended early.
                        assert_eq!(it.fault, CallFault::Cut, "{name} at {at}: {it:?}");
                    }
                    Piece::Text(it) => assert!(!it.contains("get_weather\""), "{name}: {it}"),
                    other => panic!("{name}: {other:?}"),
                }
            }
        }
    }
}

/// The mutation: a reader that decides on each piece of text alone misses calls and shows markers.
#[test]
fn mutation_without_holding_back_b21_reaches_the_reader() {
    let (name, answer, expected) = transcripts().swap_remove(0);
    let parser = parser(name, ThoughtLead::Absent);
    let at = answer.find("_call>").unwrap();
    let alone: Vec<Piece> =
        [&answer[..at], &answer[at..]].iter().flat_map(|part| read(&parser, [*part])).collect();
    assert_ne!(alone, expected);
    assert!(alone.iter().any(|it| matches!(it, Piece::Text(text) if text.contains("<tool"))));
}

#[test]
fn b5_prose_that_contains_parts_of_markers_is_plain_text() {
    for (name, prose) in [
        ("hermes", "functional code, <tool, <tool_call and </tool_call> too, a < b"),
        ("llama3", "A functional {\"name\": 1} <|python_tag"),
        ("llama3", "{\"title\": \"functional\", \"name\": \"ping\"}"),
        ("llama3", "{\"name\": \"Ada\", \"parameters\": 3}"),
        ("llama3", "{\"name\": \"Ada\""),
        ("llama3", "{"),
        ("mistral", "[TOOL_CALLS and [TOOL] functional"),
        ("gemma", "```tool_code\nprint(1)\n```\n```json\n{\"name\": \"ping\"}\n```"),
        ("generic", "functional"),
    ] {
        assert_eq!(read(&parser(name, ThoughtLead::Absent), [prose]), [text(prose)], "{name}");
    }
}

#[test]
fn b20_the_elements_of_qwen_coder_are_read_without_configuration() {
    let answer = "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis </tool_call>\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call><function=ping></function></tool_call>";
    let expected = [
        text("Sure.\n"),
        call(0, "get_weather", r#"{"city":"Paris </tool_call>","days":3}"#),
        call(1, "ping", "{}"),
    ];
    let parser = parser("hermes", ThoughtLead::Absent);
    for at in (0..answer.len()).filter(|&at| answer.is_char_boundary(at)) {
        assert_eq!(read(&parser, [&answer[..at], &answer[at..]]), expected, "split at {at}");
    }
}

#[test]
fn what_looks_almost_like_a_call_is_told_and_kept() {
    let no_call = |expected| CallFault::NotACall { expected };
    let shape = no_call("an object with a name and arguments");
    let json = |what, at| CallFault::NotJson { what, at };
    let unknown = |name: &str| CallFault::UnknownTool { name: name.into() };
    for (name, answer, fault) in [
        (
            "hermes",
            "<tool_call>{\"name\": \"ping\", \"arguments\": {},}</tool_call>",
            json("no string", 33),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"ping\", \"arguments\": {}</tool_call>",
            json("a character outside of strings", 32),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"ping\", \"name\": \"get_weather\", \"arguments\": {}}</tool_call>",
            json("a key that comes twice", 23),
        ),
        ("hermes", "<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>", unknown("rm")),
        (
            "hermes",
            "<tool_call>{\"name\": \"ping\", \"arguments\": {}} and more</tool_call>",
            CallFault::ExtraText,
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"ping\", \"arguments\": \"{}\"}</tool_call>",
            no_call("an object of arguments"),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"ping\", \"arguments\": {}, \"sudo\": true}</tool_call>",
            shape.clone(),
        ),
        ("hermes", "<tool_call>{\"arguments\": {}}</tool_call>", shape.clone()),
        ("hermes", "<tool_call>ping()</tool_call>", shape.clone()),
        ("hermes", "<tool_call></tool_call>", shape.clone()),
        ("hermes", "<tool_call>[]</tool_call>", shape.clone()),
        ("hermes", "<tool_call><function=rm></function></tool_call>", unknown("rm")),
        ("hermes", "<tool_call>=list", CallFault::Cut),
        ("hermes", "<tool_call>{\"name\": \"ping\", \"arguments\": {}}", CallFault::Cut),
        ("llama3", "{\"name\": \"rm\", \"parameters\": {}}", unknown("rm")),
        ("llama3", "{\"name\": \"ping\", \"parameters\": {}, \"a\": 1}", shape.clone()),
        ("llama3", "{\"name\": \"ping\", \"parameters\": {", CallFault::Cut),
        ("llama3", "{\"name\": \"pi", CallFault::Cut),
        (
            "mistral",
            "[TOOL_CALLS] [{\"name\": \"ping\", \"arguments\": {}}, {\"name\": \"rm\", \"arguments\": {}}]",
            unknown("rm"),
        ),
        ("mistral-args", "[TOOL_CALLS]rm[ARGS]{}", unknown("rm")),
        (
            "mistral-args",
            "[TOOL_CALLS]ping[ARGS]{\"a\": 1, \"a\": 2}",
            json("a key that comes twice", 12),
        ),
        ("gemma", "```tool_call\nping()\n```", shape),
    ] {
        let found = read(&parser(name, ThoughtLead::Absent), [answer]);
        assert_eq!(found, [malformed(answer, fault)], "{name}");
    }
}

/// The mutation: what `serde_json` alone takes for one call, a reader without our check would make.
#[test]
fn mutation_without_the_strict_reading_the_last_of_two_names_would_be_called() {
    let text = r#"{"name": "ping", "name": "get_weather", "arguments": {}}"#;
    let lenient: Value = serde_json::from_str(text).unwrap();
    assert_eq!(lenient["name"], "get_weather");
    let answer = format!("<tool_call>{text}</tool_call>");
    let found = read(&parser("hermes", ThoughtLead::Absent), [answer.as_str()]);
    assert!(matches!(&found[..], [Piece::Malformed(_)]), "{found:?}");
}

#[test]
fn calls_beyond_the_limits_are_told() {
    let one = "<tool_call>{\"name\": \"ping\", \"arguments\": {}}</tool_call>";
    let (format, _) = family("hermes");
    let limits = CallLimits { calls: 2, bytes: 64 };
    let parser = format.parser(&tools(), ThoughtLead::Absent, limits);
    let found = read(&parser, [one, one, one]);
    let expected = [
        call(0, "ping", "{}"),
        call(1, "ping", "{}"),
        malformed(one, CallFault::TooMany { limit: 2 }),
    ];
    assert_eq!(found, expected);

    let long = format!("<tool_call>{{\"name\": \"{}", "é".repeat(100));
    for cut in [13, 63, 65, 67, 101] {
        let found = read(&parser, [&long[..cut], &long[cut..]]);
        let Piece::Malformed(it) = &found[0] else { panic!("{found:?}") };
        assert_eq!(it.fault, CallFault::TooLong { limit: 64 });
        assert_eq!(found[1..], [text(&long[it.text.len()..])]);
        assert!(it.text.len() <= 64 && long.starts_with(&it.text));
    }
}

/// The mutation: without the limit of bytes a call that does not end is held for as long as the model writes.
#[test]
fn mutation_without_the_limit_of_bytes_a_call_without_an_end_is_held_for_ever() {
    let (format, _) = family("hermes");
    let told_at = |bytes: usize| {
        let limits = CallLimits { bytes, ..CallLimits::default() };
        let mut parser = format.parser(&tools(), ThoughtLead::Absent, limits);
        let opened = parser.push("<tool_call>{\"name\": \"ping\", \"arguments\": {\"a\": \"");
        assert_eq!(opened, []);
        (1..=1_000).find(|_| !parser.push(&"x".repeat(1_000)).is_empty())
    };
    assert_eq!(told_at(64_000), Some(64));
    assert_eq!(told_at(usize::MAX), None, "a megabyte, and more if more comes");
}

#[test]
fn b15_a_thought_is_taken_off_and_holds_no_call() {
    let one = "<tool_call>\n{\"name\": \"ping\", \"arguments\": {}}\n</tool_call>";
    let inside = format!("Let me {one} see.</think>\n\n{one}");
    let expected = [thought(&format!("Let me {one} see.")), call(0, "ping", "{}")];
    let open = parser("thinking", ThoughtLead::IsOpen);
    let may = parser("thinking", ThoughtLead::MayOpen);
    let whole = format!("\n<think>{inside}");
    for at in (0..inside.len()).filter(|&at| inside.is_char_boundary(at)) {
        assert_eq!(read(&open, [&inside[..at], &inside[at..]]), expected, "split at {at}");
    }
    for at in (0..whole.len()).filter(|&at| whole.is_char_boundary(at)) {
        assert_eq!(read(&may, [&whole[..at], &whole[at..]]), expected, "split at {at}");
    }
    // A thought without an end is one; nothing of it is shown as an answer.
    assert_eq!(read(&open, ["{\"a\": 1}"]), [thought("{\"a\": 1}")]);
    assert_eq!(read(&may, ["<thi", "s> is text"]), [text("<this> is text")]);
    assert_eq!(read(&open, ["a</think>\n\nb"]), [thought("a"), text("b")]);
}

#[test]
fn i3_what_was_held_is_released_when_it_is_no_marker() {
    for name in ["hermes", "llama3", "mistral", "gemma", "generic", "thinking"] {
        let mut parser = parser(name, ThoughtLead::MayOpen);
        let marker = if name == "mistral" { "[TOOL_CALL" } else { "<tool_cal" };
        let mut shown = String::new();
        for piece in
            parser.push("x").into_iter().chain(parser.push(marker)).chain(parser.push("é "))
        {
            let Piece::Text(text) = piece else { panic!("{piece:?}") };
            shown.push_str(&text);
        }
        // Nothing waits for the end that cannot become a marker.
        assert_eq!(shown, format!("x{marker}é "), "{name}");
        assert_eq!(parser.finish(), [], "{name}");
    }
}

#[test]
fn without_tools_markers_are_text() {
    let (format, _) = family("hermes");
    let parser = format.parser(&[], ThoughtLead::Absent, CallLimits::default());
    let answer = "<tool_call>{\"name\": \"ping\", \"arguments\": {}}</tool_call>";
    assert_eq!(read(&parser, [answer]), [text(answer)]);
}

#[test]
fn numbers_of_arguments_keep_their_digits() {
    let answer = "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"days\": 12345678901234567890123}}</tool_call>";
    let found = read(&parser("hermes", ThoughtLead::Absent), [answer]);
    let [Piece::Call(call)] = &found[..] else { panic!("{found:?}") };
    assert_eq!(call.arguments_json, "{\"days\": 12345678901234567890123}");
}

#[test]
fn identifiers_have_the_shape_that_templates_accept() {
    let shape = |name| family(name).0.id_shape();
    assert_eq!((shape("mistral").prefix, shape("mistral").n_alphanumerics), ("", 9));
    assert_eq!((shape("hermes").prefix, shape("hermes").n_alphanumerics), ("call_", 24));
}

#[test]
fn families_are_found_by_what_templates_write() {
    for (name, expected, describes) in [
        ("hermes", ToolFamily::Hermes, true),
        ("thinking", ToolFamily::Hermes, true),
        ("llama3", ToolFamily::Llama3, true),
        ("mistral", ToolFamily::Mistral, true),
        ("mistral-args", ToolFamily::Mistral, true),
        ("gemma", ToolFamily::Gemma, false),
        ("generic", ToolFamily::Generic, false),
    ] {
        let (format, tokenizer) = family(name);
        assert_eq!((format.family(), format.describes_tools()), (expected, describes), "{name}");
        assert_eq!(format.thoughts().is_some(), name == "thinking");
        for id in format.markers() {
            assert!(tokenizer.is_control(id));
            assert_eq!(format.marker_text(id), Some(tokenizer.decode(&[id]).as_str()));
        }
    }
    assert_eq!(family("mistral-args").0.markers().len(), 3);
    assert_eq!(family("hermes").0.markers(), [] as [u32; 0], "user-defined tokens are text");
}

/// Texts that are made of what parsers trip over.
fn soup() -> impl Strategy<Value = String> {
    let parts = prop::sample::select(vec![
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "```tool_call",
        "```",
        "<|python_tag|>",
        "<think>",
        "</think>",
        "{\"name\": \"ping\", ",
        "\"arguments\": {}}",
        "\"parameters\": {}}",
        "{\"name\": \"ping\", \"arguments\": {}}",
        "<function=ping>",
        "</function>",
        "<parameter=a>1</parameter>",
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        "\"",
        "\\",
        "\n",
        " ",
        "ping",
        "é",
        "🦀",
        "x",
    ]);
    prop::collection::vec(parts, 0..14).prop_map(|parts| parts.concat())
}

fn shown(pieces: &[Piece]) -> String {
    let texts = pieces.iter().map(|piece| match piece {
        Piece::Text(text) => text.as_str(),
        Piece::Malformed(it) => it.text.as_str(),
        other => panic!("{other:?}"),
    });
    texts.collect()
}

fn all_parsers() -> Vec<CallParser> {
    let names = ["hermes", "thinking", "llama3", "mistral", "mistral-args", "gemma", "generic"];
    let leads = [ThoughtLead::Absent, ThoughtLead::MayOpen, ThoughtLead::IsOpen];
    let limits = CallLimits { calls: 2, bytes: 48 };
    names
        .iter()
        .flat_map(|name| leads.map(|lead| (name, lead)))
        .filter(|(name, lead)| **name == "thinking" || *lead == ThoughtLead::Absent)
        .map(|(name, lead)| family(name).0.parser(&tools(), lead, limits))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn b21_any_text_in_any_pieces_is_read_as_it_is_whole(
        answer in soup(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        static PARSERS: std::sync::LazyLock<Vec<CallParser>> = std::sync::LazyLock::new(all_parsers);
        let places: Vec<usize> =
            answer.char_indices().map(|(at, _)| at).chain([answer.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|it| places[it.index(places.len())]).collect();
        cuts.extend([0, answer.len()]);
        cuts.sort_unstable();
        let parts: Vec<&str> = cuts.windows(2).map(|it| &answer[it[0]..it[1]]).collect();
        let letters: Vec<String> = answer.chars().map(String::from).collect();
        for parser in PARSERS.iter() {
            let whole = read(parser, [answer.as_str()]);
            prop_assert_eq!(&read(parser, parts.iter().copied()), &whole);
            prop_assert_eq!(&read(parser, letters.iter().map(String::as_str)), &whole);
            let is_shown = |it: &Piece| matches!(it, Piece::Text(_) | Piece::Malformed(_));
            if whole.iter().all(is_shown) && !answer.contains("think>") {
                prop_assert_eq!(shown(&whole), answer.as_str(), "nothing is lost");
            }
        }
    }
}

/// I1: half a character never reaches a parser, because it takes text; an end within one is the detokenizer's.
#[test]
fn i1_a_character_that_was_cut_off_does_not_break_a_call() {
    let answer = "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"\u{FFFD}";
    let found = read(&parser("hermes", ThoughtLead::Absent), [answer]);
    assert_eq!(found, [malformed(answer, CallFault::Cut)]);
    let whole = format!("{answer}\"}}}}</tool_call>");
    let expected = json!({ "city": "\u{FFFD}" }).to_string();
    let found = read(&parser("hermes", ThoughtLead::Absent), [whole.as_str()]);
    assert!(
        matches!(&found[..], [Piece::Call(it)] if serde_json::to_string(&it.arguments).unwrap() == expected)
    );
}
