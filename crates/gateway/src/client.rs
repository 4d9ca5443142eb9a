//! Requests to one upstream. Dropping what is returned ends the request at the upstream: its connection is closed.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header},
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde_json::Value;
use thiserror::Error;

use crate::fault::{UpstreamFault, brief};

/// Most bytes of a whole reply.
const MAX_REPLY_BYTES: usize = 32 << 20;
/// Idle connections that are kept for the next request.
const IDLE: usize = 256;

/// An address that is none.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("upstream `{found}`: expected http://HOST:PORT or https://HOST[:PORT], without a path")]
pub struct AddressError {
    /// What was given.
    pub found: String,
}

/// A client of one upstream.
#[derive(Clone, Debug)]
pub struct Client {
    http: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: Arc<str>,
    /// Header of the key, and the key; never shown.
    key: Option<HeaderValue>,
}

impl Client {
    /// For the server at `address`, with its key when it needs one.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(address: &str, key: Option<&str>) -> Result<Self, AddressError> {
        let refused = || AddressError { found: brief(address) };
        let uri: Uri = address.trim_end_matches('/').parse().map_err(|_| refused())?;
        let is_whole = matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some()
            // A password in an address would be shown wherever the address is.
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none();
        if !is_whole {
            return Err(refused());
        }
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE)
            // Shorter than that of the servers: one that closes first looks like one that is gone.
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(3))
            .build(https);
        let key = key.map(|key| HeaderValue::from_str(&format!("Bearer {key}")));
        let mut key = key.transpose().map_err(|_| refused())?;
        if let Some(key) = &mut key {
            key.set_sensitive(true);
        }
        Ok(Self { http, base: address.trim_end_matches('/').into(), key })
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.base
    }

    /// Sends a request and waits for the head of its reply.
    ///
    /// # Errors
    /// No reply in time.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        (what, limit): (&'static str, Duration),
    ) -> Result<Response<Incoming>, UpstreamFault> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, key);
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(body.unwrap_or_default()))
            .map_err(|error| UpstreamFault::Unreachable(error.to_string()))?;
        let reply = tokio::time::timeout(limit, self.http.request(request)).await;
        let reply = reply.map_err(|_| UpstreamFault::Late { what, limit_s: limit.as_secs() })?;
        reply.map_err(|error| UpstreamFault::Unreachable(causes(&error)))
    }

    /// A whole reply in time.
    ///
    /// # Errors
    /// None, or one that is too long.
    pub(crate) async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        limit: Duration,
    ) -> Result<Whole, UpstreamFault> {
        let work = async {
            let reply = self.send(method, path, body, ("an answer", limit)).await?;
            collect(reply).await
        };
        let late = UpstreamFault::Late { what: "an answer", limit_s: limit.as_secs() };
        tokio::time::timeout(limit, work).await.unwrap_or(Err(late))
    }

    /// The JSON of a GET.
    ///
    /// # Errors
    /// Another status than 200, or something else than JSON.
    pub(crate) async fn get(&self, path: &str, limit: Duration) -> Result<Value, UpstreamFault> {
        self.whole(Method::GET, path, None, limit).await?.json()
    }

    /// The JSON of a POST of JSON.
    ///
    /// # Errors
    /// Another status than 200, or something else than JSON.
    pub(crate) async fn post(
        &self,
        path: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<Value, UpstreamFault> {
        let body = Bytes::from(body.to_string());
        self.whole(Method::POST, path, Some(body), limit).await?.json()
    }
}

/// A reply with its body.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) status: StatusCode,
    headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Whole {
    /// The JSON of a good reply, or the fault that it is.
    pub(crate) fn json(&self) -> Result<Value, UpstreamFault> {
        if self.status != StatusCode::OK {
            return Err(refused(self.status, &self.headers, &self.body));
        }
        if self.body.is_empty() {
            return Err(UpstreamFault::EmptyBody);
        }
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body)
            .map_err(|_| UpstreamFault::NotJson { found: brief(&text) })
    }
}

/// The body of a reply whose head is there.
pub(crate) async fn collect(reply: Response<Incoming>) -> Result<Whole, UpstreamFault> {
    let (head, body) = reply.into_parts();
    let body = Limited::new(body, MAX_REPLY_BYTES).collect().await;
    let body = body.map_err(|error| UpstreamFault::Cut { found: brief(&error.to_string()) })?;
    Ok(Whole { status: head.status, headers: head.headers, body: body.to_bytes() })
}

/// The fault that a status other than 200 is, in the upstream's words.
pub(crate) fn refused(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> UpstreamFault {
    let retry_after = || {
        let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
        value.trim().parse::<u64>().ok().filter(|seconds| *seconds > 0)
    };
    match status.as_u16() {
        status @ (401 | 403) => UpstreamFault::Unauthorized { status },
        429 => UpstreamFault::Busy { retry_after_s: retry_after().unwrap_or(1).min(3600) },
        code => {
            let (message, name) = words(body);
            match status.is_client_error() {
                true => UpstreamFault::Refused { status: code, message, code: name },
                false => UpstreamFault::Failed { status: code, message },
            }
        }
    }
}

/// What an error body says, in each of the shapes that servers use, and the name that it gives.
fn words(body: &[u8]) -> (String, Option<String>) {
    let text = String::from_utf8_lossy(body);
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return (brief(&text), None) };
    let error = &value["error"];
    let found = [&error["message"], error, &value["detail"], &value["message"]];
    let told = found.into_iter().find_map(Value::as_str).map_or_else(|| brief(&text), brief);
    let name = error["code"].as_str().or_else(|| error["type"].as_str());
    (told, name.map(brief))
}

/// An error and what is behind it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut told = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        told = format!("{told}: {cause}");
        next = cause.source();
    }
    brief(&told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_is_an_address() {
        for good in ["http://localhost:5000", "https://example.org", "http://[::1]:8080/"] {
            assert!(Client::new(good, None).is_ok(), "{good}");
        }
        for bad in [
            "localhost:5000",
            "http://",
            "ftp://a",
            "http://a/v1",
            "http://a?x=1",
            "http://u:p@a",
            "",
        ] {
            assert!(Client::new(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_are_read_in_the_shapes_that_servers_use() {
        for (body, told, name) in [
            (
                r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#,
                "too long",
                Some("context_length_exceeded"),
            ),
            (
                r#"{"detail":"No models are currently loaded."}"#,
                "No models are currently loaded.",
                None,
            ),
            (r#"{"error":"model not found"}"#, "model not found", None),
            ("Internal Server Error", "Internal Server Error", None),
        ] {
            assert_eq!(words(body.as_bytes()), (told.to_owned(), name.map(str::to_owned)));
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        let client = Client::new("http://a", Some("very-secret-key")).unwrap();
        assert!(!format!("{client:?}").contains("very-secret"), "{client:?}");
    }
}
