//! Server-sent events as bytes: where one ends, what it carries.

use std::io;

use axum::body::Body;
use http_body_util::BodyExt;
use serde_json::Value;

/// What an event is to a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A comment, or fields without data.
    Other,
    /// Data in the midst of an answer.
    Part,
    /// Data with a finish reason.
    Finish,
    /// `[DONE]`, or `message_stop` of `/v1/messages`: nothing follows.
    End,
}

/// An event as it came, with the empty line after it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) text: Vec<u8>,
}

impl Event {
    pub(super) fn role(&self) -> Role {
        let Some(data) = self.data() else {
            return Role::Other;
        };
        if data == b"[DONE]" {
            return Role::End;
        }
        let value = serde_json::from_slice::<Value>(data).unwrap_or_default();
        if value["type"] == "message_stop" {
            return Role::End;
        }
        let finish = [&value["choices"][0]["finish_reason"], &value["delta"]["stop_reason"]];
        if finish.iter().any(|reason| !reason.is_null()) { Role::Finish } else { Role::Part }
    }

    /// The data; of several lines of it, which no OpenAI-compatible server writes, the first.
    pub(super) fn data(&self) -> Option<&[u8]> {
        self.text.split(|byte| *byte == b'\n').find_map(|line| {
            let data = line.strip_prefix(b"data:")?;
            Some(data.trim_ascii())
        })
    }

    /// The event with other data.
    pub(super) fn with_data(&self, data: &[u8]) -> Event {
        let mut text = Vec::with_capacity(self.text.len());
        for line in self.text.split_inclusive(|byte| *byte == b'\n') {
            if line.starts_with(b"data:") {
                text.extend_from_slice(b"data: ");
                text.extend_from_slice(data);
                text.push(b'\n');
            } else {
                text.extend_from_slice(line);
            }
        }
        Event { text }
    }
}

/// The events of a body.
pub(super) struct Events {
    body: Body,
    unread: Vec<u8>,
}

impl Events {
    pub(super) fn new(body: Body) -> Events {
        Events { body, unread: Vec::new() }
    }

    /// The next event; at the end of the body what is left of one.
    pub(super) async fn next(&mut self) -> io::Result<Option<Event>> {
        loop {
            if let Some(len) = first_event(&self.unread) {
                return Ok(Some(Event { text: self.unread.drain(..len).collect() }));
            }
            let Some(frame) = self.body.frame().await else {
                let text = std::mem::take(&mut self.unread);
                return Ok((!text.is_empty()).then_some(Event { text }));
            };
            if let Ok(bytes) = frame.map_err(io::Error::other)?.into_data() {
                self.unread.extend_from_slice(&bytes);
            }
        }
    }
}

/// The length of the first whole event, its empty line included.
fn first_event(text: &[u8]) -> Option<usize> {
    let mut len = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        len += line.len();
        if line == b"\n" || line == b"\r\n" {
            return Some(len);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use futures_util::stream;

    use super::*;

    fn read(parts: &[&'static str]) -> Vec<String> {
        let parts: Vec<io::Result<Bytes>> =
            parts.iter().map(|part| Ok(Bytes::from_static(part.as_bytes()))).collect();
        let mut events = Events::new(Body::from_stream(stream::iter(parts)));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut texts = Vec::new();
            while let Some(event) = events.next().await.unwrap() {
                texts.push(String::from_utf8(event.text).unwrap());
            }
            texts
        })
    }

    #[test]
    fn events_are_whole_however_they_arrive() {
        let parts = ["data: a\n", "\n: pi", "ng\n\ndata: b\r\n\r", "\ndata: c\n\nda", "ta: d"];
        let events = ["data: a\n\n", ": ping\n\n", "data: b\r\n\r\n", "data: c\n\n", "data: d"];
        assert_eq!(read(&parts), events);
    }

    #[test]
    fn a_role_follows_from_the_data() {
        let role = |text: &str| Event { text: text.as_bytes().to_vec() }.role();
        assert_eq!(role(": ping\n\n"), Role::Other);
        assert_eq!(role("data: {\"choices\":[{\"finish_reason\":null}]}\n\n"), Role::Part);
        assert_eq!(role("data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n"), Role::Finish);
        assert_eq!(role("event: x\ndata: {\"delta\":{\"stop_reason\":\"end\"}}\n\n"), Role::Finish);
        assert_eq!(role("event: x\ndata: {\"type\":\"message_stop\"}\n\n"), Role::End);
        assert_eq!(role("data: [DONE]\n\n"), Role::End);
    }

    #[test]
    fn other_lines_of_an_event_stay() {
        let event = Event { text: b"event: x\ndata: {}\nid: 1\n\n".to_vec() };
        assert_eq!(event.with_data(b"[1]").text, b"event: x\ndata: [1]\nid: 1\n\n");
    }
}
