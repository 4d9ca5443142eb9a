//! Rows of the field faults that a grammar must catch, each with what happens when its guard is off.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use common::{accepts, compiler, schema, walks};
use exrail_grammar::{Compiler, GrammarError, Limits, MatcherError, Source, Validator, Vocabulary};
use serde_json::{Value, json};

fn refused(written: &Value) -> (String, String) {
    match schema(written) {
        Err(GrammarError::Unsupported { pointer, reason }) => (pointer, reason),
        other => panic!("{written}: {other:?}"),
    }
}

/// Follows the masks with whatever token `prefer` ranks highest, up to `most` tokens.
fn follow(written: &Value, most: usize, prefer: impl Fn(&[u8]) -> u32) -> (String, bool) {
    let grammar = schema(written).unwrap();
    let mut matcher = grammar.matcher();
    let tokenizer = common::tokenizer();
    let mut bytes = Vec::new();
    for _ in 0..most {
        if matcher.is_over() {
            break;
        }
        let mask = matcher.mask().unwrap();
        let text = |id: u32| tokenizer.token_bytes(id).unwrap();
        let id = mask.ids().max_by_key(|&id| (prefer(text(id)), u32::MAX - id)).unwrap();
        matcher.advance(id).unwrap();
        if tokenizer.eos_ids().contains(&id) {
            break;
        }
        bytes.extend_from_slice(text(id));
    }
    (String::from_utf8_lossy(&bytes).into_owned(), matcher.is_complete())
}

#[test]
fn b1_a_pattern_that_is_none_is_refused_with_its_pointer() {
    let written = json!({"type": "object", "properties": {"a/b": {"type": "string", "pattern": "^hello there indeed\\!$"}}});
    let (pointer, reason) = refused(&written);
    assert_eq!(pointer, "/properties/a~1b/pattern");
    assert!(reason.contains("`\\!`"), "{reason}");
}

#[test]
fn b1_without_the_screen_the_pattern_would_be_taken() {
    // The regular expressions of the automaton read `\!` as `!`: nothing but the screen says no.
    let env = toktrie::ApproximateTokEnv::single_byte_env();
    let factory = llguidance::ParserFactory::new_simple(&env).unwrap();
    let written = json!({"type": "string", "pattern": "^hello there indeed\\!$"});
    let grammar = llguidance::api::TopLevelGrammar::from_json_schema(written);
    assert!(factory.create_parser(grammar).is_ok());
}

/// Sources that cannot be honoured, `[kind, source]`. The tests of the server include them, too.
fn broken() -> Vec<Source> {
    let rows: Vec<(String, Value)> =
        serde_json::from_str(include_str!("corpus/broken.json")).unwrap();
    let of = |(kind, source): (String, Value)| match (kind.as_str(), source) {
        ("schema", schema) => Source::JsonSchema(schema),
        ("regex", Value::String(text)) => Source::Regex(text),
        ("gbnf", Value::String(text)) => Source::Gbnf(text),
        ("lark", Value::String(text)) => Source::Lark(text),
        (kind, source) => panic!("{kind}: {source}"),
    };
    rows.into_iter().map(of).collect()
}

#[test]
fn b2_two_hundred_broken_schemas_and_grammars_are_errors_that_name_their_place() {
    let sources = broken();
    let distinct: BTreeSet<String> = sources.iter().map(|it| format!("{it:?}")).collect();
    assert_eq!(distinct.len(), sources.len());
    assert!(sources.len() >= 200, "{}", sources.len());
    for source in &sources {
        let error = match compiler().compile(source) {
            Ok(_) => panic!("it was taken: {source:?}"),
            Err(error) => error,
        };
        match (source, &error) {
            (Source::JsonSchema(schema), GrammarError::Unsupported { pointer, reason }) => {
                let is_there = schema.pointer(pointer).is_some();
                assert!(is_there && !reason.is_empty(), "{source:?}: {error}");
            }
            (_, GrammarError::Unsupported { pointer, .. }) => {
                let is_place = pointer.starts_with("line ") || pointer.starts_with("column ");
                assert!(is_place, "{source:?}: {error}");
            }
            // What only the automaton's parser knows: its words begin with line and column.
            (Source::Lark(_), GrammarError::Malformed(message)) => {
                assert!(!message.is_empty(), "{source:?}");
            }
            (_, error) => panic!("{source:?}: {error}"),
        }
    }
    // A healthy one behind them is not disturbed.
    assert!(schema(&json!({"type": "object"})).is_ok());
}

#[test]
fn b3_a_broken_regex_is_refused_before_there_is_a_matcher() {
    let Err(GrammarError::Unsupported { pointer, reason }) =
        compiler().compile(&Source::Regex("[a-z".into()))
    else {
        panic!("it was taken")
    };
    assert!(pointer.starts_with("column"), "{pointer}");
    assert!(reason.contains("not closed"), "{reason}");
}

#[test]
fn b5_the_text_of_a_description_changes_no_mask() {
    let with = |description: &str| {
        json!({"type": "object", "properties": {"glob": {"type": "string", "description": description}},
            "required": ["glob"], "additionalProperties": false})
    };
    let mut masks = Vec::new();
    for description in ["a", "function inside functional =list <function", "\"}\n<|tool|>"] {
        let mut matcher = schema(&with(description)).unwrap().matcher();
        masks.push(matcher.mask().unwrap().ids().collect::<Vec<u32>>());
    }
    assert!(masks.iter().all(|it| *it == masks[0]));
}

#[test]
fn b6_ends_controls_and_reserved_tokens_are_masked_up_to_the_end() {
    let written = json!({"oneOf": [{"const": "yes"}, {"const": "no"}]});
    let grammar = schema(&written).unwrap();
    let mut matcher = grammar.matcher();
    let tokenizer = common::tokenizer();
    let n_tokens = u32::try_from(tokenizer.vocab_len()).unwrap();
    for id in compiler().vocabulary().spell("\"yes\"") {
        let mask = matcher.mask().unwrap();
        for never in [0, 1, 2, 3, 4, n_tokens, n_tokens + 63, u32::MAX] {
            assert!(!mask.allows(never), "{never}");
            assert_eq!(matcher.advance(never), Err(MatcherError::NotAllowed { id: never }));
        }
        matcher.advance(id).unwrap();
    }
    let ends: Vec<u32> = matcher.mask().unwrap().ids().collect();
    assert_eq!(ends, tokenizer.eos_ids());
    // Inside a free string, too.
    let mut free = schema(&json!({"type": "string"})).unwrap().matcher();
    free.advance(compiler().vocabulary().spell("\"")[0]).unwrap();
    let mask = free.mask().unwrap();
    assert!([0, 1, 2, 3, 4].iter().all(|&id| !mask.allows(id)));
    assert!(mask.n_allowed() > 90);
}

#[test]
fn b7_blanks_do_not_stall() {
    let written = json!({"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"],
        "additionalProperties": false});
    let blanks =
        |text: &[u8]| u32::from(!text.is_empty() && text.iter().all(u8::is_ascii_whitespace));
    let (text, is_complete) = follow(&written, 400, blanks);
    assert!(is_complete, "{text:?}");
    let longest = text.split(|it: char| !it.is_whitespace()).map(str::len).max().unwrap();
    assert_eq!(longest, 1, "{text:?}");
    // Behind the end nothing is left but ends.
    let mut matcher = schema(&written).unwrap().matcher();
    for id in compiler().vocabulary().spell("{\"a\": 1}") {
        matcher.advance(id).unwrap();
    }
    assert!(matcher.is_over());
    assert_eq!(matcher.mask().unwrap().ids().collect::<Vec<_>>(), common::tokenizer().eos_ids());
}

#[test]
fn b7_blanks_are_bounded_in_composed_grammars_and_free_objects_too() {
    let composed = Source::Composed {
        lark: "start: \"<call>\" json_0 \"</call>\"".into(),
        schemas: vec![
            json!({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}),
        ],
    };
    let grammar = compiler().compile(&composed).unwrap();
    assert!(walks(&grammar, "<call>{\"a\": 1}</call>"));
    for blanks in ["", "  ", "\n", "\t", " \n"] {
        assert!(!walks(&grammar, &format!("<call>{{\"a\":{blanks}1}}</call>")), "{blanks:?}");
        let is_blank = !blanks.is_empty();
        assert!(!is_blank || !walks(&grammar, &format!("<call>{{{blanks}\"a\": 1}}</call>")));
    }
    let object = compiler().compile(&Source::JsonObject).unwrap();
    assert!(accepts(&object, "{\"a\": [1, 2]}"));
    assert!(!walks(&object, &format!("{{{}}}", "\n".repeat(3))));
}

#[test]
fn b7_with_the_bound_off_blanks_stall() {
    let env = toktrie::ApproximateTokEnv::single_byte_env();
    let factory = llguidance::ParserFactory::new_simple(&env).unwrap();
    let grammar = llguidance::api::TopLevelGrammar::from_json_schema(json!({"type": "object"}));
    let mut matcher = llguidance::Matcher::new(factory.create_parser(grammar));
    let blanks: Vec<u32> =
        std::iter::once(u32::from(b'{')).chain([u32::from(b'\n'); 500]).collect();
    assert_eq!(matcher.try_consume_tokens(&blanks).unwrap(), blanks.len());
}

#[test]
fn b11_an_answer_that_is_cut_is_not_complete_and_can_be_closed() {
    let written = json!({"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2}},
        "required": ["name", "tags"], "additionalProperties": false});
    let grammar = schema(&written).unwrap();
    let mut matcher = grammar.matcher();
    for id in compiler().vocabulary().spell("{\"name\": \"a") {
        matcher.advance(id).unwrap();
    }
    assert!(!matcher.is_complete());
    assert_eq!(matcher.closing(3), None);
    let closing = matcher.closing(64).unwrap();
    let before = matcher.mask().unwrap().ids().collect::<Vec<_>>();
    for &id in &closing {
        matcher.advance(id).unwrap();
    }
    assert!(matcher.is_complete());
    matcher.roll_back(closing.len()).unwrap();
    assert_eq!(matcher.mask().unwrap().ids().collect::<Vec<_>>(), before);
}

#[test]
fn b14_large_schemas_compile_in_time_or_are_refused() {
    let names: Vec<String> = (0..5000).map(|at| format!("value number {at}")).collect();
    let since = Instant::now();
    let grammar = schema(&json!({"enum": names})).unwrap();
    assert!(walks(&grammar, "\"value number 4999\""));
    assert!(!walks(&grammar, "\"value number 5000\""));
    let long = schema(&json!({"type": "string", "maxLength": 4000})).unwrap();
    assert!(walks(&long, &format!("\"{}\"", "a".repeat(4000))));
    assert!(!walks(&long, &format!("\"{}\"", "a".repeat(4001))));
    assert!(since.elapsed().as_secs() < 60);
    let over: Vec<u32> = (0..10_001).collect();
    let Err(GrammarError::TooLarge { what, limit, found }) = schema(&json!({"enum": over})) else {
        panic!("it was taken")
    };
    assert_eq!((what, limit, found), ("values of an enum", 10_000, 10_001));
    let mut deep = json!({"type": "null"});
    for _ in 0..200 {
        deep = json!({"items": deep});
    }
    assert!(matches!(schema(&deep), Err(GrammarError::TooLarge { .. })));
}

#[test]
fn b14_sixty_four_schemas_at_once_all_compile_and_the_cache_stays_within_its_bytes() {
    let vocabulary = Vocabulary::new(&common::tokenizer()).unwrap();
    let limits = Limits { cache_bytes: 1 << 20, compile_ms: 60_000, ..Limits::default() };
    let compiler = Arc::new(Compiler::new(vocabulary, limits).unwrap());
    std::thread::scope(|scope| {
        for at in 0..64 {
            let compiler = Arc::clone(&compiler);
            scope.spawn(move || {
                let written = json!({"type": "object", "properties": {format!("key{at}"): {"type": "string"}}});
                compiler.compile(&Source::JsonSchema(written)).unwrap();
            });
        }
    });
    let (n_kept, bytes) = compiler.kept();
    assert!(n_kept > 4 && n_kept < 64, "{n_kept}");
    assert!(bytes <= 1 << 20, "{bytes}");
}

/// The mutation: without the limits what was refused is taken, and all of it is kept.
#[test]
fn mutation_b14_without_the_limits_anything_is_compiled_and_kept() {
    let compiler =
        |limits| Compiler::new(Vocabulary::new(&common::tokenizer()).unwrap(), limits).unwrap();
    let names: Vec<String> = (0..10_001).map(|at| format!("value number {at}")).collect();
    let mut deep = json!({"type": "null"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    let slow = Limits { compile_ms: 1, enum_values: usize::MAX, ..Limits::default() };
    let hostile = [json!({"enum": names}), deep].map(Source::JsonSchema);
    for source in &hostile {
        let refused = compiler(Limits::default()).compile(source);
        assert!(matches!(refused, Err(GrammarError::TooLarge { .. })), "{refused:?}");
    }
    let refused = compiler(slow).compile(&hostile[0]);
    assert!(matches!(refused, Err(GrammarError::TooLarge { limit: 1, .. })), "{refused:?}");
    let unlimited = compiler(Limits {
        depth: usize::MAX,
        values: usize::MAX,
        enum_values: usize::MAX,
        compile_ms: 600_000,
        cache_bytes: usize::MAX,
        ..Limits::default()
    });
    for source in &hostile {
        unlimited.compile(source).unwrap();
    }
    for at in 0..64 {
        let written = json!({"type": "object", "properties": {format!("key{at}"): {}}});
        unlimited.compile(&Source::JsonSchema(written)).unwrap();
    }
    let (n_kept, bytes) = unlimited.kept();
    assert_eq!(n_kept, 66);
    assert!(bytes > 1 << 20, "{bytes}");
}

#[test]
fn b17_digits_are_ascii_and_without_the_rewriting_they_would_not_be() {
    let grammar = schema(&json!({"type": "string", "pattern": "^\\d+$"})).unwrap();
    assert!(accepts(&grammar, "\"123\""));
    assert!(!walks(&grammar, "\"１２３\""));
    let regex = compiler().compile(&Source::Regex("\\d+".into())).unwrap();
    assert!(walks(&regex, "123"));
    assert!(!walks(&regex, "１２３"));
    // What checks the whole answer reads the pattern alike, so that nobody's `\d` is another's.
    let validator = grammar.validator().unwrap();
    assert!(validator.check_text("\"123\"").is_ok());
    assert!(validator.check_text("\"１２３\"").is_err());
    for (text, yes, no) in [
        (r"start: /\d+/", "123", "１２３"),
        (r"start: NUMBER\nNUMBER: /[-\d]+/", "-7", "-７"),
        (r"start: /\w+/", "az_9", "é"),
        (r"start: /\W/", "é", "z"),
        (r"start: /\D+/i", "１", "1"),
        (r"start: /a\sb/", "a\u{feff}b", "a\u{85}b"),
    ] {
        let text = text.replace(r"\n", "\n");
        let lark = compiler().compile(&Source::Lark(text.clone())).unwrap();
        assert!(walks(&lark, yes), "{text}: {yes}");
        assert!(!walks(&lark, no), "{text}: {no}");
    }
    // The mutation: what the automaton makes of it by itself.
    let mut builder = llguidance::derivre::RegexBuilder::new();
    let expression = builder.mk_regex("\\d+").unwrap();
    assert!(builder.to_regex(expression).is_match("１２３"));
}

#[test]
fn what_only_the_validator_can_check_is_let_through_by_the_mask_and_then_refused() {
    for (written, invalid) in [
        (json!({"type": "array", "uniqueItems": true}), "[1, 1]"),
        (json!({"not": {"type": "string"}}), "\"a\""),
        (json!({"if": {"type": "string"}, "then": {"minLength": 2}}), "\"a\""),
        (json!({"type": "array", "contains": {"type": "null"}}), "[1]"),
        (json!({"type": "object", "propertyNames": {"maxLength": 1}}), "{\"ab\": 1}"),
        (json!({"type": "object", "dependentRequired": {"a": ["b"]}}), "{\"a\": 1}"),
        (json!({"oneOf": [{"type": "integer"}, {"minimum": 3}]}), "4"),
        (json!({"type": "string", "format": "date"}), "\"2026-02-29\""),
        (json!({"type": "object", "minProperties": 2, "properties": {"a": {}}}), "{\"a\": 1}"),
    ] {
        let grammar = schema(&written).unwrap();
        assert!(!grammar.is_exact() && !grammar.checked().is_empty(), "{written}");
        assert!(walks(&grammar, invalid), "{written}");
        assert!(grammar.validator().unwrap().check_text(invalid).is_err(), "{written}");
    }
    assert!(schema(&json!({"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "additionalProperties": false})).unwrap().is_exact());
}

#[test]
fn what_neither_can_honour_is_refused_with_its_pointer() {
    for (written, pointer, says) in [
        (json!({"properties": {"a": {"maxlength": 3}}}), "/properties/a/maxlength", "`maxLength`"),
        (json!({"items": {"format": "zip"}}), "/items/format", "`zip`"),
        (json!({"$ref": "http://example.com/a"}), "/$ref", "nothing is fetched"),
        (json!({"allOf": [{"$ref": "#/$defs/b"}]}), "/allOf/0/$ref", "no schema stands there"),
        (json!({"$schema": "http://json-schema.org/draft-03/schema#"}), "/$schema", "draft-03"),
        (json!({"x-guidance": {"lenient": true}}), "/x-guidance", "not the client's"),
        (json!({"properties": {"a": {"type": "strin"}}}), "/properties/a/type", "strin"),
    ] {
        let (found, reason) = refused(&written);
        assert_eq!(found, pointer, "{written}: {reason}");
        assert!(reason.contains(says), "{written}: {reason}");
    }
}

#[test]
fn a_validator_alone_reads_strictly_and_fetches_nothing() {
    let validator =
        Validator::new(&json!({"type": "object", "properties": {"a": {"type": "integer"}}}))
            .unwrap();
    assert_eq!(validator.check_text("{\"a\":1}").unwrap(), json!({"a": 1}));
    assert_eq!(validator.check_text("{\"a\":\"x\"}").unwrap_err().instance, "/a");
    assert!(validator.check_text("{\"a\":1,\"a\":2}").is_err());
    assert!(Validator::new(&json!({"$ref": "https://example.com/s"})).is_err());
}

#[test]
fn a_matcher_keeps_its_state_over_illegal_tokens_and_comes_back_over_forced_ones() {
    let written = json!({"type": "object", "properties": {"name": {"const": "true name"}}, "required": ["name"], "additionalProperties": false});
    let mut matcher = schema(&written).unwrap().matcher();
    for id in compiler().vocabulary().spell("{\"") {
        matcher.advance(id).unwrap();
    }
    let first: Vec<u32> = matcher.mask().unwrap().ids().collect();
    let n_before = compiler().vocabulary().spell("{\"").len();
    let forced = matcher.forced();
    assert!(!forced.is_empty());
    for &id in &forced {
        matcher.advance(id).unwrap();
        let letter = compiler().vocabulary().spell("z")[0];
        assert_eq!(matcher.advance(letter), Err(MatcherError::NotAllowed { id: letter }));
    }
    assert!(matches!(matcher.roll_back(forced.len() + n_before + 1), Err(MatcherError::Failed(_))));
    matcher.roll_back(forced.len()).unwrap();
    assert_eq!(matcher.mask().unwrap().ids().collect::<Vec<_>>(), first);
    matcher.roll_back(n_before).unwrap();
    for id in compiler().vocabulary().spell("{\"name\": \"true name\"}") {
        matcher.advance(id).unwrap();
    }
    let end = common::tokenizer().eos_ids()[0];
    assert!(matcher.is_over());
    matcher.advance(end).unwrap();
    matcher.roll_back(2).unwrap();
    assert!(!matcher.is_over() && !matcher.is_complete());
}

#[test]
fn a_grammar_is_kept_by_its_source_and_found_again() {
    let written = json!({"type": "object", "properties": {"kept": {"type": "null"}}});
    let (first, second) = (schema(&written).unwrap(), schema(&written).unwrap());
    assert_eq!(first, second);
    assert_ne!(
        first,
        schema(&json!({"type": "object", "properties": {"other": {"type": "null"}}})).unwrap()
    );
    compiler().prepare().unwrap();
}

#[test]
fn a_clients_lark_cannot_reach_a_control_token_over_the_end_of_a_line() {
    for text in ["start: /a\n/ <|tool|>", "start: \"a\"%json {}"] {
        let refused = compiler().compile(&Source::Lark(text.into()));
        assert!(matches!(refused, Err(GrammarError::Unsupported { .. })), "{text}: {refused:?}");
    }
    // The mutation: unscreened, the automaton takes what the first one says.
    let vocabulary = Vocabulary::new(&common::tokenizer()).unwrap();
    let unscreened = Compiler::new(vocabulary, Limits::default()).unwrap();
    let lark = "start: /a\n/ <[2]>".to_owned();
    let grammar = unscreened.compile(&Source::Composed { lark, schemas: vec![] }).unwrap();
    let mut matcher = grammar.matcher();
    for id in compiler().vocabulary().spell("a\n") {
        matcher.advance(id).unwrap();
    }
    assert!(matcher.mask().unwrap().allows(2), "the control token <|tool|>");
}

#[test]
fn gbnf_means_what_llama_cpp_means() {
    for (text, yes, no) in [
        ("root ::= \"yes\" | \"no\"", vec!["yes", "no"], vec!["y", "maybe"]),
        ("root ::= [a-z]+ \"b\" # greedy would starve b", vec!["ab", "bb", "aabb"], vec!["b", "a"]),
        ("root ::= item{2,3}\nitem ::= [0-9] \",\"?", vec!["12", "1,2,3"], vec!["1", "1234"]),
        ("root ::= \"(\" root \")\" | \"x\"", vec!["x", "((x))"], vec!["(x", "()"]),
        (
            "root ::= expr\nexpr ::= term (\"+\" term)*\nterm ::= [a-z]+ | \"(\" expr \")\"",
            vec!["a+(b+c)", "abc"],
            vec!["a+", "(a"],
        ),
        ("root ::= [^\\n\"]* \"\\n\"", vec!["\n", "abc\n"], vec!["a", "\"\n"]),
        ("root ::= .{2} [\\x41-\\x43] \"\\u00e9\"", vec!["xyAé", "\n C\u{e9}"], vec!["xyDé"]),
        ("root ::= (\n  \"a\" |\n  \"b\"\n)\n\n# end\n", vec!["a", "b"], vec!["c"]),
        ("root ::= [a\\]\\-]+", vec!["a]-"], vec!["b"]),
    ] {
        let grammar = compiler()
            .compile(&Source::Gbnf(text.into()))
            .unwrap_or_else(|error| panic!("{text}: {error}"));
        for it in yes {
            assert!(walks(&grammar, it), "{text}: {it:?}");
        }
        for it in no {
            assert!(!walks(&grammar, it), "{text}: {it:?}");
        }
    }
}

#[test]
fn gbnf_faults_have_a_line_and_a_column() {
    for (text, at) in [
        ("root ::= a\nb ::= \"x\"", "line 1, column 10"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2, column 1"),
        ("root ::= \"a\" |\n  root \"b\"", "line 1, column 1"),
        ("x ::= \"a\"", "line 1, column 10"),
    ] {
        let Err(GrammarError::Unsupported { pointer, .. }) =
            compiler().compile(&Source::Gbnf(text.into()))
        else {
            panic!("{text}")
        };
        assert_eq!(pointer, at, "{text}");
    }
}

/// Leaf schemas of many kinds, alone and inside others.
fn many_schemas() -> Vec<Value> {
    let leaves = [
        json!({"type": "string"}),
        json!({"type": "string", "minLength": 12}),
        json!({"type": "string", "pattern": "^(ab)*c$"}),
        json!({"type": "string", "pattern": "^[0-9]{4}-[a-f]{2}$"}),
        json!({"type": "integer", "minimum": 100, "maximum": 250}),
        json!({"type": "number"}),
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"enum": ["a long choice of words", "b", 17]}),
        json!({"const": {"k": [1, "two"]}}),
        json!({}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "array", "items": {"type": "integer"}, "minItems": 5}),
        json!({"type": "string", "format": "uuid"}),
    ];
    let mut found: Vec<Value> = leaves.to_vec();
    for leaf in &leaves {
        found.push(json!({"type": "object", "properties": {"a": leaf}, "required": ["a"], "additionalProperties": false}));
        found.push(
            json!({"type": "object", "properties": {"a": leaf, "b": leaf}, "required": ["b"]}),
        );
        found.push(json!({"type": "array", "items": leaf, "minItems": 2}));
        found
            .push(json!({"type": "array", "prefixItems": [leaf, {"type": "null"}], "minItems": 2}));
        found.push(json!({"anyOf": [{"type": "object", "properties": {"n": leaf}, "required": ["n"]}, leaf]}));
        found.push(json!({"type": "object", "properties": {"o": {"type": "object", "properties": {"i": leaf}, "required": ["i"]}}, "required": ["o"]}));
        found.push(json!({"$defs": {"t": {"type": "object", "properties": {"v": leaf, "c": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "required": ["v", "c"]}}, "$ref": "#/$defs/t"}));
    }
    found
}

#[test]
fn an_end_is_found_from_anywhere_in_a_hundred_schemas() {
    let schemas = many_schemas();
    assert!(schemas.len() >= 100);
    let mut n_searches = 0;
    for (seed, written) in schemas.iter().enumerate() {
        let grammar = schema(written).unwrap();
        let mut matcher = grammar.matcher();
        let mut state = seed as u64 + 1;
        for _ in 0..6 {
            let closing = matcher.closing(200).unwrap_or_else(|| panic!("no end: {written}"));
            n_searches += 1;
            for &id in &closing {
                matcher.advance(id).unwrap();
            }
            assert!(matcher.is_complete(), "{written}");
            matcher.roll_back(closing.len()).unwrap();
            // Some steps of a model that chooses anything.
            for _ in 0..4 {
                if matcher.is_over() {
                    break;
                }
                let ids: Vec<u32> = matcher
                    .mask()
                    .unwrap()
                    .ids()
                    .filter(|id| !common::tokenizer().eos_ids().contains(id))
                    .collect();
                let Some(&id) = (!ids.is_empty()).then(|| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    &ids[usize::try_from(state >> 33).unwrap() % ids.len()]
                }) else {
                    break;
                };
                matcher.advance(id).unwrap();
            }
        }
    }
    assert!(n_searches >= 600);
}

/// A thought that is open until `close`, with an integer behind it.
fn thought_until(close: &str) -> exrail_grammar::Matcher {
    let composed = Source::Composed {
        lark: format!(
            "start: inside answer\ninside[suffix=\"{close}\"]: /(?s:.*)/\nanswer: json_0\n"
        ),
        schemas: vec![
            json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}),
        ],
    };
    let mut matcher = compiler().compile(&composed).unwrap().matcher();
    for id in compiler().vocabulary().spell("so {\"n\": 9}?\nwell") {
        matcher.advance(id).unwrap();
    }
    matcher
}

/// An open thought is closed by what closes one, be that words or a control token, and the value follows it.
#[test]
fn an_open_thought_can_be_closed_within_the_budget() {
    let mut matcher = thought_until("</think>");
    let closing = matcher.closing(40).unwrap();
    let text: Vec<u8> = closing
        .iter()
        .flat_map(|&id| common::tokenizer().token_bytes(id).unwrap().to_vec())
        .collect();
    let text = String::from_utf8(text).unwrap();
    let value = text.strip_prefix("</think>").unwrap_or_else(|| panic!("{text}"));
    assert!(serde_json::from_str::<Value>(value).unwrap()["n"].is_i64(), "{value}");
    let end = closing.len();
    assert_eq!(matcher.closing(end - 1), None);
    for id in closing {
        matcher.advance(id).unwrap();
    }
    assert!(matcher.is_complete());
}

/// The mutation of the same: where nobody knows what closes the thought, no budget suffices, and the client would get a
/// thought without an answer.
#[test]
fn mutation_without_what_closes_a_thought_there_is_no_way_to_the_answer() {
    let mut matcher = thought_until("</musing>");
    assert_eq!(matcher.closing(40), None);
    assert_eq!(matcher.closing(400), None);
    // There is one.
    for id in compiler().vocabulary().spell("</musing>{\"n\": 1}") {
        matcher.advance(id).unwrap();
    }
    assert!(matcher.is_complete());
}

/// B13: tokens of a draft that the model then rejects, allowed ones and others, leave nothing in the grammar.
#[test]
fn b13_a_rejected_draft_leaves_no_trace() {
    let grammar = schema(&json!({"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["name", "n"], "additionalProperties": false}))
    .unwrap();
    let spell = |text: &str| compiler().vocabulary().spell(text);
    let (mut plain, mut drafted) = (grammar.matcher(), grammar.matcher());
    let drafts = ["Zoe\", \"n\": 77}", "\", \"m\": 1", "}}}}", "{\"name\": \"", "0123456789", ""];
    for (at, id) in (0..).zip(spell("{\"name\": \"Ada\", \"n\": 12}")) {
        let draft = spell(drafts[at % drafts.len()]);
        let n_allowed = draft.iter().take_while(|&&id| drafted.advance(id).is_ok()).count();
        drafted.roll_back(n_allowed).unwrap();
        let ids = |matcher: &mut exrail_grammar::Matcher| {
            matcher.mask().unwrap().ids().collect::<BTreeSet<_>>()
        };
        assert_eq!(ids(&mut drafted), ids(&mut plain), "behind {at} tokens");
        assert_eq!(drafted.forced(), plain.forced());
        plain.advance(id).unwrap();
        drafted.advance(id).unwrap();
    }
    assert!(drafted.is_complete());
}

/// The mutation of B13: a grammar that keeps what a draft proposed refuses the answer that the model gives.
#[test]
fn mutation_b13_without_going_back_the_answer_itself_is_refused() {
    let grammar = schema(&json!({"type": "object", "properties": {"n": {"type": "integer"}},
        "required": ["n"], "additionalProperties": false}))
    .unwrap();
    let mut matcher = grammar.matcher();
    for id in compiler().vocabulary().spell("{\"n\": 7}") {
        matcher.advance(id).unwrap();
    }
    let answer = compiler().vocabulary().spell("{\"n\": 12}");
    assert!(matcher.advance(answer[0]).is_err());
}
