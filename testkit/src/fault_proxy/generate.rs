//! A generation, from its arrival to the fault that it meets.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::ProxyFault;
use super::forward::{
    Upstream, collect, edit, json_response, unreachable_upstream, want_plain_text,
};
use super::rewrite;
use super::shape::{Edit, Reply, Shape, shape};
use super::state::{Open, State, Ticket};

/// Answers a generation. An error closes its connection.
pub(super) async fn generate(
    state: &Arc<State>,
    upstream: &Upstream,
    request: Request<Body>,
) -> io::Result<Response<Body>> {
    let mut ticket = Ticket::new(state);
    let (mut head, body) = request.into_parts();
    // Read before anything waits: as long as a request has unread bytes, the server looks no
    // further, and does not see that its client leaves.
    let mut text = collect(body).await?;
    let mut wanted = Shape::Whole;
    match &*state.fault_once_free().await {
        ProxyFault::None | ProxyFault::HangAfterCancel => {}
        ProxyFault::SlowFirst(wait) => {
            if state.is_first() {
                sleep(*wait).await;
            }
        }
        ProxyFault::EmptyBody => return answered(ticket, empty(&text)),
        ProxyFault::Unauthorized => return answered(ticket, unauthorized()),
        ProxyFault::TooMany { retry_after_s } => {
            return answered(ticket, too_many(*retry_after_s));
        }
        ProxyFault::Down => {
            ticket.end();
            return Err(closed());
        }
        ProxyFault::NoSeed => text = without(text, rewrite::SEED),
        ProxyFault::IgnoresSchema => text = without(text, rewrite::SCHEMA),
        ProxyFault::CutStream { events } => wanted = Shape::Cut { events: *events },
        ProxyFault::EndedEarly { events } => wanted = Shape::EndedEarly { events: *events },
        ProxyFault::HalfJson => wanted = Shape::Half,
        ProxyFault::WrongModel(model) => wanted = Shape::Edited(Edit::Renamed(model.clone())),
        ProxyFault::Garbage => wanted = Shape::Edited(Edit::Garbled),
        ProxyFault::SlowLoris { byte_every } => wanted = Shape::Dripping(*byte_every),
        ProxyFault::PingsForEver { events } => wanted = Shape::Pinging { events: *events },
    }
    if wanted != Shape::Whole {
        want_plain_text(&mut head.headers);
    }
    let open = Open::new(state);
    let asked = upstream.ask(Request::from_parts(head, Body::from(text))).await;
    let (head, body) = match asked {
        Ok(response) => response.into_parts(),
        Err(error) => return answered(ticket, unreachable_upstream(&error)),
    };
    if !head.status.is_success() {
        wanted = Shape::Whole;
    }
    shape(ticket, wanted, Reply { head, body, open }).await
}

/// The error that closes a connection.
pub(super) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "closed by the fault proxy")
}

/// The reply to who has no key.
pub(super) fn unauthorized() -> Response<Body> {
    json_response(StatusCode::UNAUTHORIZED, &json!({ "detail": "Invalid API key" }))
}

fn too_many(retry_after_s: Option<u64>) -> Response<Body> {
    let error = json!({ "message": "too many requests", "type": "rate_limit_error" });
    let mut response = json_response(StatusCode::TOO_MANY_REQUESTS, &json!({ "error": error }));
    if let Some(seconds) = retry_after_s {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// What would be the answer is not there, its type is.
fn empty(request: &[u8]) -> Response<Body> {
    let request = serde_json::from_slice::<Value>(request).unwrap_or_default();
    let name = if request["stream"] == true { "text/event-stream" } else { "application/json" };
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(name));
    response
}

fn without(request: Bytes, fields: &[&str]) -> Bytes {
    edit(request, |request| rewrite::remove(request, fields))
}

fn answered(mut ticket: Ticket, response: Response<Body>) -> io::Result<Response<Body>> {
    ticket.end();
    Ok(response)
}
