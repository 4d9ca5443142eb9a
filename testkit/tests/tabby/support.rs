//! Clients of the double: plain requests, whole streams, and streams that are read while they run.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use exrail_testkit::{Tabby, TabbyFaults, TabbyOptions};
use serde_json::{Value, json};

pub(crate) const API: (&str, &str) = ("authorization", "Bearer api-key-of-tabby");
pub(crate) const ADMIN: (&str, &str) = ("x-admin-key", "admin-key-of-tabby");

pub(crate) fn start(faults: TabbyFaults) -> Tabby {
    Tabby::start(TabbyOptions { faults, ..TabbyOptions::default() }).unwrap()
}

/// A tabby whose answers of 24 tokens take half a second.
pub(crate) fn slow(faults: TabbyFaults) -> Tabby {
    let token_time = Duration::from_millis(20);
    let ping = Duration::from_millis(50);
    Tabby::start(TabbyOptions { faults, token_time, ping, ..TabbyOptions::default() }).unwrap()
}

/// Sends anything and returns status and body.
pub(crate) fn send(
    tabby: &Tabby,
    (method, path): (&str, &str),
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, String) {
    let mut request = ureq::http::Request::builder().method(method).uri(tabby.url() + path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true);
    let agent: ureq::Agent = config.build().into();
    let mut response = agent.run(request.body(body.to_owned()).unwrap()).unwrap();
    (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
}

pub(crate) fn get(tabby: &Tabby, path: &str, key: (&str, &str)) -> (u16, Value) {
    let (status, body) = send(tabby, ("GET", path), &[key], "");
    (status, serde_json::from_str(&body).unwrap())
}

pub(crate) fn post_text(
    tabby: &Tabby,
    path: &str,
    key: (&str, &str),
    body: &Value,
) -> (u16, String) {
    let headers = [key, ("content-type", "application/json")];
    send(tabby, ("POST", path), &headers, &body.to_string())
}

pub(crate) fn post(tabby: &Tabby, path: &str, key: (&str, &str), body: &Value) -> (u16, Value) {
    let (status, body) = post_text(tabby, path, key, body);
    (status, serde_json::from_str(&body).unwrap())
}

pub(crate) fn messages(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// A greedy chat with more fields.
pub(crate) fn chat_body(more: Value) -> Value {
    let mut body = json!({"messages": messages("How do pumps leak?"), "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

pub(crate) fn chat(tabby: &Tabby, more: Value) -> (u16, Value) {
    post(tabby, "/v1/chat/completions", API, &chat_body(more))
}

pub(crate) fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// The data of each event.
pub(crate) fn events(stream: &str) -> Vec<String> {
    stream.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}

pub(crate) fn stream_of(tabby: &Tabby, path: &str, body: &Value) -> Vec<Value> {
    let (status, text) = post_text(tabby, path, API, body);
    assert_eq!(status, 200, "{text}");
    let mut events = events(&text);
    assert_eq!(events.pop().unwrap(), "[DONE]", "{text}");
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// A stream that is read while it runs.
pub(crate) struct Open {
    reader: BufReader<TcpStream>,
}

impl Open {
    pub(crate) fn begin(tabby: &Tabby, chat: &Value) -> Open {
        Open::post(tabby, "/v1/chat/completions", chat)
    }

    /// Any post, with the admin key, which opens all routes by this header.
    pub(crate) fn post(tabby: &Tabby, path: &str, body: &Value) -> Open {
        let address = tabby.url().trim_start_matches("http://").to_owned();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: tabby\r\n\
             authorization: Bearer admin-key-of-tabby\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        Open { reader: BufReader::new(stream) }
    }

    /// Reads what is left, up to the end of the stream's last chunk.
    pub(crate) fn rest(&mut self) -> String {
        let mut rest = String::new();
        while !rest.ends_with("\r\n0\r\n") {
            assert_ne!(self.reader.read_line(&mut rest).unwrap(), 0, "cut: {rest}");
        }
        rest
    }

    /// Reads up to the first line that begins so.
    pub(crate) fn until(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.reader.read_line(&mut line).unwrap(), 0, "no line began with {start}");
            if line.starts_with(start) {
                return line;
            }
        }
    }
}

/// Loads, and gives the events.
pub(crate) fn load(tabby: &Tabby, body: &Value) -> Vec<Value> {
    let (status, text) = post_text(tabby, "/v1/model/load", ADMIN, body);
    assert_eq!(status, 200, "{text}");
    events(&text).iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

pub(crate) fn eventually(what: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < limit);
        std::thread::sleep(Duration::from_millis(5));
    }
}
