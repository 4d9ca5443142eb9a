//! What becomes of a reply's body under a fault that changes one.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Response, header, response};
use serde_json::Value;

use super::forward::{collect, edit, is_json, is_stream, whole};
use super::rewrite;
use super::state::{Open, Ticket};
use super::writer::{Plan, Source, write};

/// What becomes of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Whole,
    Cut { events: usize },
    EndedEarly { events: usize },
    Half,
    Edited(Edit),
    Dripping(Duration),
    Pinging { events: usize },
}

/// What becomes of a JSON text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Edit {
    Renamed(String),
    Garbled,
}

impl Edit {
    pub(super) fn apply(&self, text: Bytes) -> Bytes {
        edit(text, |value: &mut Value| match self {
            Edit::Renamed(model) => rewrite::rename(value, model),
            Edit::Garbled => rewrite::garble(value),
        })
    }
}

/// A reply of the upstream's, under way.
pub(super) struct Reply {
    pub(super) head: response::Parts,
    pub(super) body: Body,
    pub(super) open: Open,
}

/// Shapes a reply. The ticket ends with the last byte that the client should get.
pub(super) async fn shape(
    ticket: Ticket,
    shape: Shape,
    reply: Reply,
) -> io::Result<Response<Body>> {
    if is_stream(&reply.head) {
        return Ok(shape_stream(ticket, shape, reply));
    }
    let Reply { mut head, body, open } = reply;
    let is_text = is_json(&head);
    let plan = match shape {
        Shape::Whole | Shape::EndedEarly { .. } | Shape::Pinging { .. } => {
            Plan::Pass(Source::new(body, open))
        }
        Shape::Dripping(every) => Plan::Drip(Source::new(body, open), every),
        Shape::Cut { .. } => {
            // Without a length the body is chunked, and its end is missing rather than short.
            head.headers.remove(header::CONTENT_LENGTH);
            Plan::Sever(half(&collect_text(body, open).await?))
        }
        Shape::Half => return Ok(replied(ticket, head, half(&collect_text(body, open).await?))),
        Shape::Edited(edit) => {
            let text = collect_text(body, open).await?;
            let text = if is_text { edit.apply(text) } else { text };
            return Ok(replied(ticket, head, text));
        }
    };
    Ok(Response::from_parts(head, write(ticket, plan)))
}

fn shape_stream(ticket: Ticket, shape: Shape, reply: Reply) -> Response<Body> {
    let Reply { mut head, body, open } = reply;
    let source = Source::new(body, open);
    if !matches!(shape, Shape::Whole | Shape::Dripping(_)) {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    let plan = match shape {
        Shape::Whole => Plan::Pass(source),
        Shape::Cut { events } => Plan::Cut(source, events),
        Shape::EndedEarly { events } => Plan::EndEarly(source, events),
        Shape::Half => Plan::Halve(source),
        Shape::Edited(edit) => Plan::Edit(source, edit),
        Shape::Dripping(every) => Plan::Drip(source, every),
        Shape::Pinging { events } => Plan::Ping(source, events),
    };
    Response::from_parts(head, write(ticket, plan))
}

/// The first half of a text, without the part of a character: what is wrong with it should be found
/// by who reads JSON, not by who reads UTF-8.
pub(super) fn half(text: &[u8]) -> Bytes {
    let mut len = text.len() / 2;
    while len > 0 && text.get(len).is_some_and(|byte| byte & 0xc0 == 0x80) {
        len -= 1;
    }
    Bytes::copy_from_slice(&text[..len])
}

async fn collect_text(body: Body, open: Open) -> io::Result<Bytes> {
    let text = collect(body).await;
    drop(open);
    text
}

fn replied(mut ticket: Ticket, head: response::Parts, text: Bytes) -> Response<Body> {
    ticket.end();
    whole(head, text)
}
