//! `/v1/tokenize` and `/v1/detokenize`.

use axum::{Extension, Json};
use exrail_text::Specials;
use exrail_wire::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};

use crate::{
    auth::Caller,
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
};

pub(crate) async fn tokenize(
    Extension(caller): Extension<Caller>,
    ready: Ready,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    refuse_unknown("", &request.unknown)?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    let specials =
        if request.parse_special.unwrap_or(false) { Specials::Parse } else { Specials::AsText };
    let tokens =
        pass.engine.tokenizer().encode(&request.text, specials).map_err(|error| {
            ApiError::BadField { field: "text".into(), problem: error.to_string() }
        })?;
    let count = tokens.len();
    Ok(Json(TokenizeResponse { tokens, count }))
}

pub(crate) async fn detokenize(
    Extension(caller): Extension<Caller>,
    ready: Ready,
    Body(request): Body<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    refuse_unknown("", &request.unknown)?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    let tokenizer = pass.engine.tokenizer();
    let limit = tokenizer.vocab_len();
    if let Some(found) = request.tokens.iter().find(|&&id| id as usize >= limit) {
        return Err(ApiError::BadField {
            field: "tokens".into(),
            problem: format!("expected ids below {limit}, found {found}"),
        });
    }
    Ok(Json(DetokenizeResponse { text: tokenizer.decode(&request.tokens) }))
}
