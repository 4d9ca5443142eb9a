//! A client of the fewest parts, which sees what is on the wire: how a body is framed, and whether
//! it ends or is broken off.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How the bytes of a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Proper,
    Broken,
}

/// A reply.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) head: String,
    pub(crate) body: String,
    pub(crate) end: End,
}

impl Reply {
    pub(crate) fn status(&self) -> u16 {
        self.head[9..12].parse().unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The data of all events.
    pub(crate) fn data(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// The text of a plain or streamed chat.
    pub(crate) fn text(&self) -> String {
        if self.header("content-type") == Some("application/json") {
            return self.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        }
        let chunks = self.data().into_iter().filter(|data| *data != "[DONE]");
        let chunks = chunks.map(|data| serde_json::from_str::<Value>(data).unwrap());
        let text = |chunk: Value| {
            chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
        };
        chunks.map(text).collect()
    }
}

/// Sends a request on a connection of its own, which stays open.
pub(crate) fn send(url: &str, method: &str, path: &str, body: &str) -> TcpStream {
    let host = url.strip_prefix("http://").unwrap();
    let mut connection = TcpStream::connect(host).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    send_on(&mut connection, method, path, body).unwrap();
    connection
}

/// Sends a request on a connection.
pub(crate) fn send_on(
    connection: &mut TcpStream,
    method: &str,
    path: &str,
    body: &str,
) -> io::Result<()> {
    let len = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
         content-length: {len}\r\n\r\n"
    );
    connection.write_all((head + body).as_bytes())
}

/// Reads a reply; none where the connection closes, or is reset, before its head has come.
pub(crate) fn read(connection: &mut TcpStream) -> Option<Reply> {
    let mut seen = Vec::new();
    let (head, mut rest) = loop {
        if let Some(len) = seen.windows(4).position(|window| window == b"\r\n\r\n") {
            break (seen[..len].to_vec(), seen[len + 4..].to_vec());
        }
        if !more(connection, &mut seen) {
            assert!(seen.is_empty(), "a part of a head");
            return None;
        }
    };
    let mut reply =
        Reply { head: String::from_utf8(head).unwrap(), body: String::new(), end: End::Proper };
    let len = reply.header("content-length").map(|len| len.parse::<usize>().unwrap());
    let (body, end) = match len {
        Some(len) => {
            while rest.len() < len && more(connection, &mut rest) {}
            let end = if rest.len() == len { End::Proper } else { End::Broken };
            (rest, end)
        }
        None => {
            assert_eq!(reply.header("transfer-encoding"), Some("chunked"));
            read_chunks(connection, rest)
        }
    };
    reply.body = String::from_utf8(body).unwrap();
    reply.end = end;
    Some(reply)
}

fn read_chunks(connection: &mut TcpStream, mut rest: Vec<u8>) -> (Vec<u8>, End) {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|window| window == b"\r\n");
        let size = line.map(|line| {
            let digits = std::str::from_utf8(&rest[..line]).unwrap();
            (line + 2, usize::from_str_radix(digits, 16).unwrap())
        });
        match size {
            Some((_, 0)) => return (body, End::Proper),
            Some((start, len)) if rest.len() >= start + len + 2 => {
                body.extend_from_slice(&rest[start..start + len]);
                rest.drain(..start + len + 2);
            }
            Some(_) | None => {
                if !more(connection, &mut rest) {
                    return (body, End::Broken);
                }
            }
        }
    }
}

/// Reads some bytes; false where the connection has ended, however.
fn more(connection: &mut TcpStream, seen: &mut Vec<u8>) -> bool {
    let mut bytes = [0; 4096];
    match connection.read(&mut bytes) {
        Ok(0) => false,
        Ok(len) => {
            seen.extend_from_slice(&bytes[..len]);
            true
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => false,
        Err(error) => panic!("{error}"),
    }
}

/// Reads until some text has come, and returns all that has.
pub(crate) fn read_until(connection: &mut TcpStream, text: &str) -> String {
    let mut seen = Vec::new();
    loop {
        let now = String::from_utf8_lossy(&seen).into_owned();
        if now.contains(text) {
            return now;
        }
        assert!(more(connection, &mut seen), "{text:?} is not in {now:?}");
    }
}

/// Asks and reads the whole reply.
pub(crate) fn ask(url: &str, method: &str, path: &str, body: &str) -> Reply {
    read(&mut send(url, method, path, body)).expect("a reply")
}

/// Asks for a chat with these fields beside its messages.
pub(crate) fn chat(url: &str, fields: &Value) -> Reply {
    ask(url, "POST", "/v1/chat/completions", &chat_body(fields))
}

/// The body of a request for a chat.
pub(crate) fn chat_body(fields: &Value) -> String {
    let mut body = fields.clone();
    body["model"] = Value::from("scripted");
    if body["messages"].is_null() {
        body["messages"] = serde_json::json!([{ "role": "user", "content": "tell me" }]);
    }
    body.to_string()
}

/// Waits until something holds; it should soon.
pub(crate) fn soon(mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(5), "it does not come to pass");
        std::thread::sleep(Duration::from_millis(2));
    }
}
