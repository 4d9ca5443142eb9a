//! G-22: who goes on from a session says what it takes it for, one writes, and nobody gets the newer one in silence.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_engine::{EngineHandle, SessionStore};
use exrail_server::{Limits, SessionKeeper};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::{
    faulty::Faulty,
    support::{Answer, KEY, MODEL, Server, cpu, endless, events, four, request, start, warm_on},
};

const OTHER_KEY: &str = "another-key-of-16";
const CHAT: &str = "/v1/chat/completions";
const TALK: &str = "/v1/exrail/sessions/talk";

fn on(engine: EngineHandle, place: &Path) -> Server {
    let server = warm_on(engine, &[KEY, OTHER_KEY], Limits::default());
    // The thread of a server before this one gives the folder back a moment after its last handle is gone.
    let store = loop {
        match SessionStore::open(place, 1 << 30) {
            Ok(store) => break store,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    server.state.keep_sessions(SessionKeeper::start(store).unwrap());
    server
}

fn keeping(place: &Path) -> Server {
    on(start(cpu(), four(), |_| {}), place)
}

/// A step takes 2 ms and more, so that a turn is on its way for a while.
fn slow(place: &Path) -> Server {
    let backend = Faulty { delay: Duration::from_millis(2), ..Faulty::new(cpu()) };
    on(start(backend, four(), |_| {}), place)
}

async fn send(server: &Server, method: Method, path: &str, key: &str, body: &Value) -> Answer {
    let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
    server.send(request(method, path, Some(key), body)).await
}

fn messages() -> Value {
    json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": format!("Say it:{}", " the".repeat(600))},
    ])
}

fn with(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn chat(more: &Value) -> Value {
    let body = json!({"model": MODEL, "messages": messages(), "max_tokens": 4, "temperature": 0});
    with(body, more)
}

/// A turn of the session that is what `told` says of it.
fn turn(told: &Answer, more: &Value) -> Value {
    let session = json!({"name": "talk", "context_id": told.json()["context_id"]});
    with(chat(&json!({ "session": session })), more)
}

async fn ask(server: &Server, key: &str, body: &Value) -> Answer {
    send(server, Method::POST, CHAT, key, body).await
}

async fn save(server: &Server, key: &str, more: &Value) -> Answer {
    send(server, Method::PUT, TALK, key, &with(json!({"messages": messages()}), more)).await
}

/// Options of an answer that takes so many steps.
fn lasting(server: &Server, n_tokens: usize) -> Value {
    json!({"max_tokens": n_tokens, "logit_bias": endless(server), "loop_guard": false})
}

/// Saves over what `told` says of the session.
async fn save_over(server: &Server, told: &Answer) -> Answer {
    save(server, KEY, &json!({"context_id": told.json()["context_id"]})).await
}

/// A conversation that was asked and saved, at revision 1.
async fn begun(server: &Server) -> Answer {
    let asked = ask(server, KEY, &chat(&json!({}))).await;
    assert_eq!(asked.status, StatusCode::OK, "{}", asked.text);
    let saved = save(server, KEY, &json!({})).await;
    assert_eq!(saved.status, StatusCode::OK, "{}", saved.text);
    assert_eq!((&saved.json()["tokens"], &saved.json()["mem_rev"]), (&json!(512), &json!(1)));
    saved
}

fn refused(answer: &Answer, code: &str) {
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.text);
    assert_eq!(answer.code(), code, "{}", answer.text);
}

/// The fields of a conflict, with what was expected and found.
fn diff(answer: &Answer) -> Vec<(String, Value, Value)> {
    refused(answer, "session_conflict");
    let diff = answer.json()["error"]["diff"].as_array().unwrap().clone();
    let one = |entry: Value| {
        let field = entry["field"].as_str().unwrap().to_owned();
        (field, entry["expected"].clone(), entry["found"].clone())
    };
    diff.into_iter().map(one).collect()
}

fn fields(answer: &Answer) -> Vec<String> {
    diff(answer).into_iter().map(|(field, ..)| field).collect()
}

async fn until_running(server: &Server) {
    let engine = server.state.services().unwrap().engine.clone();
    let limit = Instant::now() + Duration::from_secs(20);
    while engine.counters().sequences_running == 0 {
        assert!(Instant::now() < limit);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn g22_a_stale_write_and_a_stale_turn_are_told_what_differs() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let first = begun(&server).await;
    let answered = ask(&server, KEY, &turn(&first, &json!({}))).await;
    assert_eq!(answered.status, StatusCode::OK, "{}", answered.text);
    assert_eq!(answered.json()["context_id"], first.json()["context_id"]);
    let second = save_over(&server, &first).await;
    assert_eq!(second.json()["mem_rev"], 2, "{}", second.text);

    let stale = save_over(&server, &first).await;
    let short = first.json()["mem_hash"].as_str().unwrap()[..16].to_owned();
    let told = [
        ("mem_rev".to_owned(), json!(1), json!(2)),
        ("mem_hash".to_owned(), json!(short), second.json()["mem_hash"].clone()),
    ];
    assert_eq!(diff(&stale), told);
    assert_eq!(diff(&ask(&server, KEY, &turn(&first, &json!({}))).await), told);
    let unseen = save(&server, KEY, &json!({})).await;
    assert_eq!(diff(&unseen)[0], ("mem_rev".to_owned(), json!(0), json!(2)));
    let path = format!("{TALK}/restore");
    let belief = json!({"context_id": first.json()["context_id"]});
    assert_eq!(diff(&send(&server, Method::POST, &path, KEY, &belief).await), told);
    assert_eq!(diff(&send(&server, Method::DELETE, TALK, KEY, &belief).await), told);

    let list = send(&server, Method::GET, "/v1/exrail/sessions", KEY, &Value::Null).await;
    let card = list.json()["data"][0].clone();
    assert_eq!(card["context_id"], second.json()["context_id"], "the refused changed nothing");
    let whole = json!({"name": "talk", "mem_rev": card["mem_rev"], "mem_hash": card["mem_hash"]});
    let informed = ask(&server, KEY, &chat(&json!({ "session": whole }))).await;
    assert_eq!(informed.status, StatusCode::OK, "{}", informed.text);
}

#[tokio::test]
async fn g22_of_writers_at_the_same_time_one_writes() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let first = begun(&server).await;
    let answers = join_all((0..8).map(|_| save_over(&server, &first))).await;
    let (saved, others): (Vec<_>, Vec<_>) =
        answers.iter().partition(|answer| answer.status == StatusCode::OK);
    assert_eq!((saved.len(), &saved[0].json()["mem_rev"]), (1, &json!(2)));
    others.into_iter().for_each(|other| assert_eq!(fields(other), ["mem_rev", "mem_hash"]));
}

/// What was deleted and saved anew is another session, also with the same tokens and the same revision.
#[tokio::test]
async fn g22_a_name_that_began_anew_is_another_session() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let first = begun(&server).await;
    let removed = send(&server, Method::DELETE, TALK, KEY, &Value::Null).await;
    assert_eq!(removed.status, StatusCode::OK, "{}", removed.text);
    let gone = ask(&server, KEY, &turn(&first, &json!({}))).await;
    assert_eq!((gone.status, gone.code()), (StatusCode::NOT_FOUND, "session_not_found".into()));
    let again = save_over(&server, &first).await;
    assert_eq!(diff(&again)[0], ("mem_rev".to_owned(), json!(1), json!(0)));
    assert_eq!(save(&server, KEY, &json!({})).await.json()["mem_rev"], 1);
    assert_eq!(fields(&ask(&server, KEY, &turn(&first, &json!({}))).await), ["mem_hash"]);
}

/// While a turn that may write is on its way nobody else has one, or writes; when it ends, somebody may.
#[tokio::test]
async fn g22_a_second_writing_turn_is_refused_until_the_first_has_ended() {
    let place = tempfile::tempdir().unwrap();
    let server = slow(place.path());
    let first = begun(&server).await;
    let long = lasting(&server, 300);
    let long = turn(&first, &long);
    let meanwhile = async {
        until_running(&server).await;
        refused(&ask(&server, KEY, &turn(&first, &json!({}))).await, "session_busy");
        refused(&save_over(&server, &first).await, "session_busy");
        refused(&send(&server, Method::DELETE, TALK, KEY, &Value::Null).await, "session_busy");
        let reading = json!({"name": "talk", "context_id": first.json()["context_id"],
            "read_only": true});
        ask(&server, KEY, &chat(&json!({ "session": reading }))).await
    };
    let (answered, read) = tokio::join!(ask(&server, KEY, &long), meanwhile);
    assert_eq!(answered.status, StatusCode::OK, "{}", answered.text);
    assert_eq!(answered.json()["usage"]["completion_tokens"], 300);
    assert_eq!(read.status, StatusCode::OK, "{}", read.text);
    assert_eq!(save_over(&server, &first).await.json()["mem_rev"], 2);
}

/// A turn that fails, or that nobody waits for any more, keeps no one from writing.
#[tokio::test]
async fn g22_a_turn_that_is_given_up_lets_the_next_one_write() {
    let place = tempfile::tempdir().unwrap();
    let server = slow(place.path());
    let first = begun(&server).await;
    let late = with(lasting(&server, 300), &json!({"deadline_ms": 60}));
    let late = ask(&server, KEY, &turn(&first, &late)).await;
    assert_eq!(late.status, StatusCode::GATEWAY_TIMEOUT, "{}", late.text);
    let second = save_over(&server, &first).await;
    assert_eq!(second.json()["mem_rev"], 2, "{}", second.text);

    let long = lasting(&server, 300);
    let long = turn(&second, &long);
    tokio::select! {
        answered = ask(&server, KEY, &long) => panic!("{}", answered.text),
        () = until_running(&server) => {}
    }
    let limit = Instant::now() + Duration::from_secs(20);
    let third = loop {
        let answer = save_over(&server, &second).await;
        if answer.status == StatusCode::OK {
            break answer;
        }
        refused(&answer, "session_busy");
        assert!(Instant::now() < limit);
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    assert_eq!(third.json()["mem_rev"], 3);
}

/// A turn that only reads sees what it began from; when somebody has written meanwhile, it fails at its end.
#[tokio::test]
async fn g22_a_write_in_the_middle_is_not_seen_and_is_told_at_the_end() {
    let place = tempfile::tempdir().unwrap();
    let server = slow(place.path());
    let first = begun(&server).await;
    let session = |told: &Answer| {
        json!({"name": "talk", "context_id": told.json()["context_id"],
        "read_only": true})
    };
    let long = lasting(&server, 200);
    let alone = ask(&server, KEY, &chat(&long)).await.json()["choices"][0]["message"].clone();

    let reading = chat(&with(json!({"session": session(&first)}), &long));
    let meanwhile = async {
        until_running(&server).await;
        save_over(&server, &first).await
    };
    let (read, second) = tokio::join!(ask(&server, KEY, &reading), meanwhile);
    assert_eq!(second.status, StatusCode::OK, "{}", second.text);
    assert_eq!(diff(&read)[0], ("mem_rev".to_owned(), json!(1), json!(2)));
    assert!(!read.text.contains("choices"), "{}", read.text);

    let streaming = json!({"session": session(&second), "stream": true});
    let streaming = chat(&with(streaming, &long));
    let meanwhile = async {
        until_running(&server).await;
        save_over(&server, &second).await
    };
    let (streamed, third) = tokio::join!(ask(&server, KEY, &streaming), meanwhile);
    assert_eq!(third.json()["mem_rev"], 3, "{}", third.text);
    let mut text = String::new();
    let all = events(&streamed.text);
    for event in &all[..all.len() - 1] {
        let event: Value = serde_json::from_str(event).unwrap();
        assert_eq!(event["context_id"], second.json()["context_id"]);
        text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(json!(text), alone["content"], "of what it began from, and nothing else");
    let last: Value = serde_json::from_str(all.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "session_conflict", "{last}");
    assert_eq!(last["error"]["diff"][0], json!({"field": "mem_rev", "expected": 2, "found": 3}));
    assert!(!streamed.text.contains("[DONE]") && !streamed.text.contains("\"finish_reason\":\"l"));
    let traced = server.trace_lines();
    let record = traced.iter().rfind(|line| line["event"] == "infer.run").unwrap();
    assert_eq!(record["finish_reason"], "session_conflict");
    assert_eq!((&record["mem_rev"], &record["session_id"]), (&json!(2), &json!("talk")));
}

/// A turn whose session goes away below it, by hand here, does not end as if it were there.
#[tokio::test]
async fn g22_a_session_that_vanishes_in_the_middle_is_told() {
    let place = tempfile::tempdir().unwrap();
    let server = slow(place.path());
    let first = begun(&server).await;
    let long = turn(&first, &lasting(&server, 200));
    let meanwhile = async {
        until_running(&server).await;
        for owner in std::fs::read_dir(place.path()).unwrap() {
            std::fs::remove_file(owner.unwrap().path().join("talk.session")).ok();
        }
    };
    let (answered, ()) = tokio::join!(ask(&server, KEY, &long), meanwhile);
    assert_eq!(diff(&answered)[0], ("mem_rev".to_owned(), json!(1), json!(0)));
}

fn tools(description: &str) -> Value {
    let function = json!({"name": "open_box", "description": description});
    json!({"tools": [{"type": "function", "function": function}]})
}

/// A turn under other tools, another system message, another form or behind another conversation is no turn of
/// this session.
#[tokio::test]
async fn g22_a_turn_in_another_state_is_told_which() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let plain = begun(&server).await;
    let mut said = messages();
    said[0]["content"] = json!("Be long.");
    let system = ask(&server, KEY, &turn(&plain, &json!({ "messages": said }))).await;
    assert_eq!(fields(&system), ["system_rev", "tokens"]);
    let mut said = messages();
    said[1]["content"] = json!(format!("Say it:{} else", " the".repeat(300)));
    let other = ask(&server, KEY, &turn(&plain, &json!({ "messages": said }))).await;
    assert_eq!(fields(&other), ["tokens"]);
    assert_eq!(diff(&other)[0].2, 512);
    let expected = diff(&other)[0].1.as_u64().unwrap();
    assert!((300..512).contains(&expected), "tokens in common: {expected}");
    let form = json!({"response_format": {"type": "json_object"}});
    let form = ask(&server, KEY, &turn(&plain, &form)).await;
    assert_eq!(fields(&form), ["constraint"]);
    assert_eq!(diff(&form)[0].2, Value::Null);
    let leak = ask(&server, KEY, &turn(&plain, &json!({"leak_guard": true}))).await;
    assert_eq!(fields(&leak)[0], "leak_guard");
    let told = ask(&server, KEY, &turn(&plain, &tools("Opens a box."))).await;
    assert_eq!(fields(&told), ["tools", "tokens"]);

    // A session under tools, and turns under them and under others.
    let asked = ask(&server, KEY, &chat(&tools("Opens a box."))).await;
    assert_eq!(asked.status, StatusCode::OK, "{}", asked.text);
    let context = json!({"context_id": plain.json()["context_id"]});
    let saved = save(&server, KEY, &with(context, &tools("Opens a box."))).await;
    assert_eq!(saved.json()["mem_rev"], 2, "{}", saved.text);
    let same = ask(&server, KEY, &turn(&saved, &tools("Opens a box."))).await;
    assert_eq!(same.status, StatusCode::OK, "{}", same.text);
    let other = diff(&ask(&server, KEY, &turn(&saved, &tools("Shuts a box."))).await);
    assert_eq!(other[0].0, "tools");
    assert!(other[0].1.is_string() && other[0].2.is_string() && other[0].1 != other[0].2);
    let none = diff(&ask(&server, KEY, &turn(&saved, &json!({}))).await);
    assert_eq!((&none[0].0[..], &none[0].1), ("tools", &Value::Null));
}

/// A session that was kept from repeating its system message is saved with its mark, and goes on with it.
#[tokio::test]
async fn g22_a_watched_chat_is_saved_as_it_was_asked() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let watched = json!({"leak_guard": true});
    ask(&server, KEY, &chat(&watched)).await;
    let saved = save(&server, KEY, &watched).await;
    assert_eq!(saved.json()["tokens"], 512, "{}", saved.text);
    let answered = ask(&server, KEY, &turn(&saved, &watched)).await;
    assert_eq!(answered.status, StatusCode::OK, "{}", answered.text);
    let cached = &answered.json()["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(*cached, 512, "{}", answered.text);
}

/// Another key gets neither the session nor what is cached of it.
#[tokio::test]
async fn g22_a_session_of_another_key_is_not_there() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let first = begun(&server).await;
    let answered = ask(&server, KEY, &turn(&first, &json!({}))).await;
    let cached = |answer: &Answer| {
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].clone()
    };
    assert_eq!(cached(&answered), 512);
    let stranger = ask(&server, OTHER_KEY, &turn(&first, &json!({}))).await;
    assert_eq!(
        (stranger.status, stranger.code()),
        (StatusCode::NOT_FOUND, "session_not_found".into())
    );
    let belief = json!({"context_id": first.json()["context_id"]});
    let over = save(&server, OTHER_KEY, &belief).await;
    assert_eq!(diff(&over)[0], ("mem_rev".to_owned(), json!(1), json!(0)));
    assert!(!over.text.contains(first.json()["mem_hash"].as_str().unwrap()), "{}", over.text);
    assert_eq!(cached(&ask(&server, OTHER_KEY, &chat(&json!({}))).await), 0);
    // A name is free for each key, and neither sees the other's.
    assert_eq!(save(&server, OTHER_KEY, &json!({})).await.json()["mem_rev"], 1);
    assert_eq!(save_over(&server, &first).await.json()["mem_rev"], 2);
}

/// Revision and hash outlive the server, whose next one begins the turn from the disk.
#[tokio::test]
async fn g22_the_memory_of_a_session_survives_a_restart() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let first = begun(&server).await;
    let second = save_over(&server, &first).await;
    let text = |answer: &Answer| answer.json()["choices"][0]["message"]["content"].clone();
    let before = ask(&server, KEY, &turn(&second, &json!({}))).await;
    drop(server);
    let server = keeping(place.path());
    assert_eq!(
        fields(&ask(&server, KEY, &turn(&first, &json!({}))).await),
        ["mem_rev", "mem_hash"]
    );
    let after = ask(&server, KEY, &turn(&second, &json!({}))).await;
    assert_eq!(after.status, StatusCode::OK, "{}", after.text);
    assert_eq!(after.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 512);
    assert_eq!(text(&after), text(&before));
    assert_eq!(save_over(&server, &second).await.json()["mem_rev"], 3);
}

/// G-14: what is recorded of a turn says from which state of which session, also when it was refused.
#[tokio::test]
async fn g22_records_carry_the_memory_of_the_session() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let first = begun(&server).await;
    ask(&server, KEY, &turn(&first, &json!({"user": "me"}))).await;
    let second = save_over(&server, &first).await;
    save_over(&server, &first).await;
    ask(&server, KEY, &turn(&second, &json!({"prefix_cache": false}))).await;
    let lines = server.trace_lines();
    let of = |line: &Value| {
        ["event", "session_id", "mem_rev", "mem_hash"].map(|field| line[field].clone())
    };
    let memory = |event: &str, told: &Answer| {
        let told = told.json();
        [json!(event), json!("talk"), told["mem_rev"].clone(), told["mem_hash"].clone()]
    };
    let none = |event: &str| [json!(event), json!(null), json!(0), json!(null)];
    let found: Vec<_> = lines.iter().map(of).collect();
    let expected = [
        none("infer.run"),
        memory("infer.run", &first),
        memory("guard.fire", &second),
        none("guard.fire"),
    ];
    assert_eq!(found, expected);
    assert_eq!(lines[2]["guard"], "session_conflict");
}

/// Texts have sessions as chats do; what cannot go on from one says so.
#[tokio::test]
async fn g22_texts_go_on_from_their_sessions_and_nothing_else_does() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path());
    let prompt: Vec<u32> = (0..600).map(|i| 3 + i * 7 % 200).collect();
    let text = json!({"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0});
    let path = "/v1/completions";
    send(&server, Method::POST, path, KEY, &text).await;
    let saved = send(&server, Method::PUT, TALK, KEY, &json!({ "prompt": prompt })).await;
    let session = json!({"name": "talk", "context_id": saved.json()["context_id"]});
    let turn = with(text.clone(), &json!({ "session": session }));
    let answered = send(&server, Method::POST, path, KEY, &turn).await;
    assert_eq!(answered.status, StatusCode::OK, "{}", answered.text);
    assert_eq!(answered.json()["context_id"], saved.json()["context_id"]);
    let regex = with(turn.clone(), &json!({"regex": "a+"}));
    assert_eq!(fields(&send(&server, Method::POST, path, KEY, &regex).await), ["constraint"]);

    let as_chat = ask(&server, KEY, &chat(&json!({ "session": session }))).await;
    assert_eq!(fields(&as_chat), ["system_rev", "template_hash", "tokens"]);
    let several = with(turn.clone(), &json!({"prompt": [prompt, prompt]}));
    let uncached = with(turn.clone(), &json!({"prefix_cache": false}));
    let unsaid = with(text, &json!({"session": {"name": "talk"}}));
    let named = with(turn.clone(), &json!({"session": {"name": "../x", "context_id": "1:0"}}));
    let more = with(turn, &json!({"session": {"name": "talk", "rev": 1}}));
    let asked = json!({"question": "Where is the key?", "session": session});
    let grounded = json!({"model": MODEL, "messages": [{"role": "user", "content": "Where?"}],
        "exrail": {"collection": "cabinets"}, "session": session});
    for (path, body, param) in [
        (path, several, "prompt"),
        (path, uncached, "session"),
        (path, unsaid, "session"),
        (path, named, "name"),
        (path, more, "session"),
        ("/v1/ask", asked, "session"),
        (CHAT, grounded, "session"),
    ] {
        let answer = send(&server, Method::POST, path, KEY, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], param, "{path}: {}", answer.text);
    }
}

#[tokio::test]
async fn a_turn_of_a_server_without_a_folder_says_how_to_get_one() {
    let server = warm_on(start(cpu(), four(), |_| {}), &[KEY], Limits::default());
    let session = json!({"name": "talk", "context_id": "1:0123456789abcdef"});
    let answer = ask(&server, KEY, &chat(&json!({ "session": session }))).await;
    assert_eq!(answer.status, StatusCode::NOT_IMPLEMENTED, "{}", answer.text);
    assert!(answer.text.contains("--session-dir"), "{}", answer.text);
}
