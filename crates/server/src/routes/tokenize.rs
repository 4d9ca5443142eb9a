//! `/v1/tokenize` and `/v1/detokenize`.

use axum::Json;
use exrail_text::Specials;
use exrail_wire::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};

use crate::{
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
    state::Services,
};

fn expect_model(services: &Services, model: Option<&str>) -> Result<(), ApiError> {
    model.map_or(Ok(()), |model| services.expect_generator(model))
}

pub(crate) async fn tokenize(
    Ready(services): Ready,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    refuse_unknown("", &request.unknown)?;
    expect_model(&services, request.model.as_deref())?;
    let specials =
        if request.parse_special.unwrap_or(false) { Specials::Parse } else { Specials::AsText };
    let tokens =
        services.engine.tokenizer().encode(&request.text, specials).map_err(|error| {
            ApiError::BadField { field: "text".into(), problem: error.to_string() }
        })?;
    let count = tokens.len();
    Ok(Json(TokenizeResponse { tokens, count }))
}

pub(crate) async fn detokenize(
    Ready(services): Ready,
    Body(request): Body<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    refuse_unknown("", &request.unknown)?;
    expect_model(&services, request.model.as_deref())?;
    let tokenizer = services.engine.tokenizer();
    let limit = tokenizer.vocab_len();
    if let Some(found) = request.tokens.iter().find(|&&id| id as usize >= limit) {
        return Err(ApiError::BadField {
            field: "tokens".into(),
            problem: format!("expected ids below {limit}, found {found}"),
        });
    }
    Ok(Json(DetokenizeResponse { text: tokenizer.decode(&request.tokens) }))
}
