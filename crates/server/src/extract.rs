//! Request bodies: parsed with the path of the field at fault, refused when a field is unknown.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    body::{Bytes, HttpBody, to_bytes},
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use exrail_engine::Memory;
use exrail_wire::Unknown;
use serde::de::DeserializeOwned;

use crate::{
    AppState,
    auth::{Caller, KeyFolder},
    boot::BootState,
    error::ApiError,
    otlp::RequestSpans,
    sessions::{Origin, Turn},
    state::Services,
    swap::{Asking, Models, Pass},
};

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<AppState>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        parse(&bytes_of(request, state).await?).map(Body)
    }
}

/// A JSON body that may be left out, or `null`.
pub(crate) struct MaybeBody<T>(pub(crate) T);

impl<T: DeserializeOwned + Default> FromRequest<Arc<AppState>> for MaybeBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        let bytes = bytes_of(request, state).await?;
        let body = if bytes.is_empty() { None } else { parse(&bytes)? };
        Ok(MaybeBody(body.unwrap_or_default()))
    }
}

async fn bytes_of(request: Request, state: &AppState) -> Result<Bytes, ApiError> {
    read_body(request, state.limits.body_bytes, state.limits.body_timeout).await
}

/// The body of a request, uncompressed and within limits.
///
/// # Errors
/// One that is compressed, too large or too late.
pub async fn read_body(
    request: Request,
    limit_bytes: usize,
    limit: Duration,
) -> Result<Bytes, ApiError> {
    refuse_encoded(request.headers())?;
    let body = request.into_body();
    // A body that says how long it is need not be read to be refused.
    if body.size_hint().lower() > limit_bytes as u64 {
        return Err(ApiError::BodyTooLarge { limit_bytes });
    }
    let bytes = tokio::time::timeout(limit, to_bytes(body, limit_bytes)).await;
    let bytes = bytes.map_err(|_| ApiError::BodyLate { limit_s: limit.as_secs_f64() })?;
    bytes.map_err(|_| ApiError::BodyTooLarge { limit_bytes })
}

/// A compressed body could be a thousand times as long as it says.
fn refuse_encoded(headers: &HeaderMap) -> Result<(), ApiError> {
    for encoding in headers.get_all(header::CONTENT_ENCODING) {
        if !encoding.as_bytes().eq_ignore_ascii_case(b"identity") {
            let found = String::from_utf8_lossy(encoding.as_bytes()).into_owned();
            return Err(ApiError::Encoded { found });
        }
    }
    Ok(())
}

/// The name in a path.
pub(crate) struct Name(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name = Path::<String>::from_request_parts(parts, state).await;
        name.map(|Path(name)| Self(name)).map_err(|_| ApiError::BadField {
            field: "path".into(),
            problem: "expected a name in percent-encoded UTF-8".into(),
        })
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner();
        if problem.is_data() && path != "." {
            ApiError::BadField { field: path, problem: problem.to_string() }
        } else {
            ApiError::BadJson { problem: problem.to_string() }
        }
    })?;
    json.end().map_err(|error| ApiError::BadJson { problem: error.to_string() })?;
    Ok(value)
}

/// Fields of the OpenAI API that this version does not serve, and what other servers call ours, with the
/// reason.
const NOT_SERVED: [(&str, &str); 23] = [
    ("functions", "the older form of `tools`"),
    ("function_call", "the older form of `tool_choice`"),
    ("guided_json", "this server calls it `json_schema`"),
    ("guided_regex", "this server calls it `regex`"),
    ("guided_grammar", "this server calls it `grammar`"),
    ("guided_choice", "this server takes it as `json_schema` with an enum, or as `regex`"),
    ("guided_decoding_backend", "this server has one backend"),
    ("guided_whitespace_pattern", "this server bounds whitespace by itself"),
    ("structured_outputs", "this server calls its kinds `json_schema`, `regex` and `grammar`"),
    ("response_schema", "this server calls it `json_schema`"),
    ("json_object", "this server takes it as `response_format`"),
    ("ebnf", "this server calls it `grammar`"),
    ("gbnf", "this server takes it as `grammar` of type gbnf"),
    ("grammar_string", "this server calls it `grammar`"),
    ("format", "this server calls it `response_format`"),
    ("filters", "this server calls them `json_schema`, `regex` and `grammar`"),
    ("prediction", "a text to draft from is not supported"),
    ("draft_model", "no model drafts for another"),
    ("speculative_ngram", "the prompt drafts for no answer"),
    ("best_of", "ranking of hidden choices is not supported"),
    ("suffix", "insertion is not supported"),
    ("modalities", "only text is supported"),
    ("audio", "only text is supported"),
];

/// Refuses whatever is left in `unknown`; `null` asks for nothing and passes.
pub(crate) fn refuse_unknown(prefix: &str, unknown: &Unknown) -> Result<(), ApiError> {
    let Some((name, _)) = unknown.iter().find(|(_, value)| !value.is_null()) else {
        return Ok(());
    };
    let why =
        NOT_SERVED.iter().find(|(field, _)| field == name).map_or("unknown field", |(_, why)| why);
    Err(ApiError::UnsupportedField { field: format!("{prefix}{name}"), why })
}

/// The way to what answers, which exists only behind the warm-up fence.
pub(crate) struct Ready {
    pub(crate) models: Models,
    answerer: Answerer,
}

/// Who answers a request, and from which session, for the record of its failure; empty as long as nobody does.
#[derive(Clone, Default)]
pub(crate) struct Answerer(Arc<Answering>);

#[derive(Default)]
struct Answering {
    services: OnceLock<Arc<Services>>,
    /// Name and memory of the session that the turn began from.
    session: OnceLock<(String, Memory)>,
    spans: RequestSpans,
}

impl Answerer {
    /// Of a request with these spans.
    pub(crate) fn of(spans: RequestSpans) -> Self {
        Self(Arc::new(Answering { spans, ..Answering::default() }))
    }

    pub(crate) fn spans(&self) -> &RequestSpans {
        &self.0.spans
    }

    pub(crate) fn services(&self) -> Option<Arc<Services>> {
        self.0.services.get().cloned()
    }

    /// A turn of this request has begun. The first one stays.
    pub(crate) fn turned(&self, turn: &Turn) {
        self.0.session.get_or_init(|| (turn.name().to_owned(), turn.memory().clone()));
    }

    /// Name and memory of the session that its turn began from.
    pub(crate) fn session(&self) -> Option<(String, Memory)> {
        self.0.session.get().cloned()
    }
}

impl Ready {
    /// A pass to the generator of that name, the first one when absent; waits until it is loaded.
    pub(crate) async fn generator(
        &self,
        model: Option<&str>,
        asking: &Asking,
    ) -> Result<Pass, ApiError> {
        let pass = self.models.pass(model, asking).await?;
        self.answerer.0.services.get_or_init(|| Arc::clone(pass.services()));
        Ok(pass)
    }

    /// The spans of this request.
    pub(crate) fn spans(&self) -> RequestSpans {
        self.answerer.spans().clone()
    }

    /// Whose sessions this request may begin from.
    pub(crate) fn origin(&self, caller: &Caller, folder: KeyFolder) -> Origin {
        Origin::new(caller, folder, self.answerer.clone())
    }

    /// The same for a caller who waits as long as it takes.
    pub(crate) async fn generator_for(
        &self,
        Caller(tenant): &Caller,
        model: Option<&str>,
    ) -> Result<Pass, ApiError> {
        self.generator(model, &Asking { tenant: tenant.clone(), deadline: None }).await
    }
}

impl FromRequestParts<Arc<AppState>> for Ready {
    type Rejection = ApiError;

    async fn from_request_parts(
        parts: &mut Parts,
        state: &Arc<AppState>,
    ) -> Result<Self, ApiError> {
        let status = state.board.status();
        match (&status.state, state.models()) {
            (BootState::Ready { .. }, Some(models)) => {
                let answerer = parts.extensions.get::<Answerer>().cloned().unwrap_or_default();
                Ok(Self { models: models.clone(), answerer })
            }
            (BootState::Failed { phase, reason }, _) => {
                Err(ApiError::BootFailed { phase: phase.name(), reason: reason.clone() })
            }
            (
                BootState::Ready { .. } | BootState::Starting { .. } | BootState::Retrying { .. },
                _,
            ) => Err(ApiError::NotReady {
                phase: status.phase().name(),
                retry_after_s: status.retry_after_s().unwrap_or(1),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use exrail_wire::ChatRequest;
    use serde_json::json;

    use super::*;

    fn chat(body: &serde_json::Value) -> Result<ChatRequest, ApiError> {
        parse(body.to_string().as_bytes())
    }

    #[test]
    fn integers_out_of_range_name_their_field() {
        for value in [json!(-1), json!(1.5), json!("5"), json!(1e30), json!([1])] {
            let body = json!({"model": "m", "messages": [], "max_tokens": value});
            let error = chat(&body).unwrap_err();
            assert!(
                matches!(&error, ApiError::BadField { field, .. } if field == "max_tokens"),
                "{value}: {error}"
            );
        }
    }

    #[test]
    fn a_nested_field_is_named_by_its_path() {
        let body = json!({"model": "m", "messages": [{"role": 1, "content": "x"}]});
        let error = chat(&body).unwrap_err();
        assert!(
            matches!(&error, ApiError::BadField { field, .. } if field == "messages[0].role"),
            "{error}"
        );
    }

    #[test]
    fn unknown_fields_are_refused_by_name_and_null_passes() {
        let mut unknown = Unknown::from([("suffix".into(), json!(null))]);
        refuse_unknown("", &unknown).unwrap();
        unknown.insert("thoughts".into(), json!({}));
        let error = refuse_unknown("", &unknown).unwrap_err();
        assert_eq!(error.to_string(), "`thoughts`: unknown field; remove it");
    }

    #[test]
    fn text_after_the_json_is_refused() {
        assert!(parse::<serde_json::Value>(b"{} {}").is_err());
        assert!(parse::<serde_json::Value>(b"\xff").is_err());
    }
}
