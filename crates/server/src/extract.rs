//! Request bodies: parsed with the path of the field at fault, refused when a field is unknown.

use std::sync::{Arc, OnceLock};

use axum::{
    body::{Bytes, to_bytes},
    extract::{FromRequest, FromRequestParts, Request},
    http::request::Parts,
};
use exrail_wire::Unknown;
use serde::de::DeserializeOwned;

use crate::{
    AppState,
    auth::Caller,
    boot::BootState,
    error::ApiError,
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
    let limit_bytes = state.limits.body_bytes;
    let bytes = to_bytes(request.into_body(), limit_bytes).await;
    bytes.map_err(|_| ApiError::BodyTooLarge { limit_bytes })
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

/// Fields of the OpenAI API that this version does not serve, with the reason.
const NOT_SERVED: [(&str, &str); 9] = [
    ("tools", "tool calling is not supported by this version"),
    ("tool_choice", "tool calling is not supported by this version"),
    ("functions", "tool calling is not supported by this version"),
    ("function_call", "tool calling is not supported by this version"),
    ("response_format", "constrained output is not supported by this version"),
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

/// Who answers a request, for the record of its failure; empty as long as nobody does.
#[derive(Clone, Default)]
pub(crate) struct Answerer(Arc<OnceLock<Arc<Services>>>);

impl Answerer {
    pub(crate) fn services(&self) -> Option<Arc<Services>> {
        self.0.get().cloned()
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
        self.answerer.0.get_or_init(|| Arc::clone(pass.services()));
        Ok(pass)
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
        let mut unknown = Unknown::from([("tools".into(), json!(null))]);
        refuse_unknown("", &unknown).unwrap();
        unknown.insert("guided_json".into(), json!({}));
        let error = refuse_unknown("", &unknown).unwrap_err();
        assert_eq!(error.to_string(), "`guided_json`: unknown field; remove it");
    }

    #[test]
    fn text_after_the_json_is_refused() {
        assert!(parse::<serde_json::Value>(b"{} {}").is_err());
        assert!(parse::<serde_json::Value>(b"\xff").is_err());
    }
}
