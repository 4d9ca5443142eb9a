//! The way to the upstream and back.

use std::io;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, Version};
use axum::http::{header, response};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::rewrite;

/// Headers of a connection, not of what goes through it (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// The server that the proxy stands before.
pub(super) struct Upstream {
    base: String,
    client: Client<HttpConnector, Body>,
}

impl Upstream {
    pub(super) fn new(url: &str) -> io::Result<Upstream> {
        let base = url.trim_end_matches('/').to_owned();
        let uri = base.parse::<Uri>();
        if !uri.is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some()) {
            let message = format!("upstream `{url}`: expected `http://host:port`");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // A kept connection that the upstream closes meanwhile would be a fault that nobody set.
        let client =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Upstream { base, client })
    }

    /// Sends a request on; its reply has the headers that go on to the client. Dropped before, or
    /// with the reply's body, it closes the connection to the upstream.
    pub(super) async fn ask(&self, mut request: Request<Body>) -> io::Result<Response<Body>> {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let uri = format!("{}{path}", self.base).parse::<Uri>();
        *request.uri_mut() = uri.map_err(io::Error::other)?;
        *request.version_mut() = Version::HTTP_11;
        strip_hop_by_hop(request.headers_mut());
        // The client writes both, for the upstream's name and the body that there is now.
        request.headers_mut().remove(header::HOST);
        request.headers_mut().remove(header::CONTENT_LENGTH);
        let mut response = self.client.request(request).await.map_err(io::Error::other)?;
        *response.version_mut() = Version::HTTP_11;
        strip_hop_by_hop(response.headers_mut());
        Ok(response.map(Body::new))
    }

    /// Passes a request and its reply.
    pub(super) async fn pass(&self, request: Request<Body>) -> Response<Body> {
        self.ask(request).await.unwrap_or_else(|error| unreachable_upstream(&error))
    }

    /// Passes a request, and its reply with another model's name in it.
    pub(super) async fn pass_renamed(
        &self,
        mut request: Request<Body>,
        model: &str,
    ) -> io::Result<Response<Body>> {
        let path = request.uri().path();
        let lists_models = path.starts_with("/v1/models") || path.starts_with("/v1/model/");
        let lists_models = lists_models || path == "/v1/model";
        want_plain_text(request.headers_mut());
        let (head, body) = self.pass(request).await.into_parts();
        if !is_json(&head) {
            return Ok(Response::from_parts(head, body));
        }
        let body = edit(collect(body).await?, |value| {
            if lists_models {
                rewrite::rename_listed(value, model);
            } else {
                rewrite::rename(value, model);
            }
        });
        Ok(whole(head, body))
    }
}

/// Asks for a reply that can be read: the proxy knows no compression.
pub(super) fn want_plain_text(headers: &mut HeaderMap) {
    headers.remove(header::ACCEPT_ENCODING);
}

pub(super) fn is_json(head: &response::Parts) -> bool {
    has_type(head, "application/json")
}

pub(super) fn is_stream(head: &response::Parts) -> bool {
    has_type(head, "text/event-stream")
}

fn has_type(head: &response::Parts, name: &str) -> bool {
    let value = head.headers.get(header::CONTENT_TYPE);
    value.and_then(|value| value.to_str().ok()).is_some_and(|value| value.starts_with(name))
}

/// Reads a body to its end.
pub(super) async fn collect(body: Body) -> io::Result<Bytes> {
    Ok(body.collect().await.map_err(io::Error::other)?.to_bytes())
}

/// A JSON text after `change`; one that is none stays as it is.
pub(super) fn edit(text: Bytes, change: impl FnOnce(&mut Value)) -> Bytes {
    let Ok(mut value) = serde_json::from_slice::<Value>(&text) else {
        return text;
    };
    change(&mut value);
    Bytes::from(value.to_string())
}

/// A reply with a body that is not the one its headers were written for.
pub(super) fn whole(mut head: response::Parts, body: Bytes) -> Response<Body> {
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, Body::from(body))
}

/// A reply of the proxy's own.
pub(super) fn json_response(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// The reply where the upstream gives none.
pub(super) fn unreachable_upstream(error: &io::Error) -> Response<Body> {
    let error = serde_json::json!({ "message": format!("no reply from the upstream: {error}") });
    json_response(StatusCode::BAD_GATEWAY, &serde_json::json!({ "error": error }))
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let listed = headers.get_all(header::CONNECTION).iter();
    let listed = listed.filter_map(|value| value.to_str().ok()).flat_map(|list| list.split(','));
    let named: Vec<HeaderName> = listed.filter_map(|name| name.trim().parse().ok()).collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}
