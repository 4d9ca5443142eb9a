//! `/v1/embeddings`.

use std::{sync::Arc, time::Instant};

use axum::{Json, extract::State};
use exrail_wire::{Embedding, EmbeddingInput, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage};
use serde_json::Value;

use crate::{
    AppState,
    error::ApiError,
    extract::{Body, Ready, refuse_unknown},
    otlp::{Asked, Said, Stage},
};

pub(crate) async fn embed(
    State(state): State<Arc<AppState>>,
    ready: Ready,
    Body(request): Body<EmbeddingRequest>,
) -> Result<Json<EmbeddingResponse>, ApiError> {
    refuse_unknown("", &request.unknown)?;
    let Some(served) = ready.models.shelf().encoder().cloned() else {
        return Err(ApiError::NotAvailable {
            what: "embeddings",
            why: "it was started without an encoder; start it with --encoder",
        });
    };
    if request.model != served.name {
        let known = format!("`{}`", served.name);
        return Err(ApiError::UnknownModel { found: request.model, known });
    }
    let format = Format::parse(request.encoding_format.as_deref())?;
    let facts = served.encoder.facts();
    if let Some(found) = request.dimensions.filter(|&found| found != facts.dim) {
        let problem = format!("expected {}, found {found}", facts.dim);
        return Err(ApiError::BadField { field: "dimensions".into(), problem });
    }
    let texts = match request.input {
        EmbeddingInput::One(text) => vec![text],
        EmbeddingInput::Many(texts) => texts,
    };
    let limit = state.limits.embedding_inputs;
    if texts.is_empty() || texts.len() > limit {
        let problem = format!("expected 1 to {limit} texts, found {}", texts.len());
        return Err(ApiError::BadField { field: "input".into(), problem });
    }
    let spans = ready.spans();
    spans.asked(|| Asked { model: served.name.clone(), n_choices: 1, ..Asked::default() });
    spans.said(|| {
        texts.iter().map(|text| Said { role: "user".into(), text: text.clone() }).collect()
    });
    let (begun, dimensions) = (Instant::now(), facts.dim);
    // Encoding occupies a core for milliseconds; the async threads must not wait for it.
    let encoded = tokio::task::spawn_blocking(move || {
        let views: Vec<&str> = texts.iter().map(String::as_str).collect();
        let tokens = views.iter().map(|text| served.encoder.tokenize(text).len()).sum();
        let vectors = served.encoder.encode(&views).map_err(|e| ApiError::Encode(e.to_string()))?;
        Ok::<_, ApiError>((vectors, tokens))
    });
    let encoded = encoded.await.map_err(|_| ApiError::Internal("encoder task"));
    spans.spent(Stage::Embed, (begun, Instant::now()));
    let (vectors, tokens) = encoded??;
    spans.embedded(tokens, dimensions);
    let data = vectors.into_iter().enumerate();
    let data = data.map(|(index, vector)| Embedding {
        object: "embedding",
        index,
        embedding: format.render(&vector),
    });
    Ok(Json(EmbeddingResponse {
        object: "list",
        data: data.collect(),
        model: request.model,
        usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
    }))
}

#[derive(Clone, Copy)]
enum Format {
    Float,
    Base64,
}

impl Format {
    fn parse(name: Option<&str>) -> Result<Self, ApiError> {
        match name {
            None | Some("float") => Ok(Self::Float),
            Some("base64") => Ok(Self::Base64),
            Some(found) => Err(ApiError::BadField {
                field: "encoding_format".into(),
                problem: format!("expected float or base64, found `{found}`"),
            }),
        }
    }

    fn render(self, vector: &[f32]) -> Value {
        match self {
            Self::Float => vector.iter().copied().map(Value::from).collect(),
            Self::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                Value::from(base64(&bytes))
            }
        }
    }
}

/// RFC 4648 section 4, with padding. Thirty lines of our own against one more crate.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let mut word = [0; 3];
        word[..group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes([0, word[0], word[1], word[2]]);
        for digit in 0..4 {
            let index = (bits >> (18 - 6 * digit) & 63) as usize;
            text.push(if digit <= group.len() { char::from(DIGITS[index]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_like_rfc_4648() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
