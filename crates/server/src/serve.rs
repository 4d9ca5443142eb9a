//! The router and the listener.

use std::{future::Future, io, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use thiserror::Error;
use tokio::net::TcpListener;

use exrail_wire::{Pins, TraceBody};

use crate::{
    AppState, KeyError, TraceIdentity, auth,
    auth::Caller,
    error::{ApiError, Failure},
    extract::Answerer,
    ids, routes,
    state::Services,
    trace::TraceError,
};

/// Why the server could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address needs a key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The address is taken.
    #[error("address {address}: already in use; stop the other server or pass --port")]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be used.
    #[error("address {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The listener broke.
    #[error("listener: {0}")]
    Listen(io::Error),
}

/// Binds the address, which needs a key when others can reach it.
///
/// # Errors
/// A public address without a key, or one that cannot be bound.
pub async fn bind(state: &AppState, address: SocketAddr) -> Result<TcpListener, ServeError> {
    state.keys.allow_bind(address.ip())?;
    TcpListener::bind(address).await.map_err(|source| {
        if source.kind() == io::ErrorKind::AddrInUse {
            ServeError::InUse { address }
        } else {
            ServeError::Bind { address, source }
        }
    })
}

/// Serves until `stop` resolves; requests in flight are finished.
///
/// # Errors
/// The listener broke.
pub async fn serve(
    state: Arc<AppState>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    axum::serve(listener, router(state))
        .with_graceful_shutdown(stop)
        .await
        .map_err(ServeError::Listen)
}

/// All routes. Everything added to `guarded` needs a key.
pub fn router(state: Arc<AppState>) -> Router {
    let guarded = guarded()
        .layer(middleware::from_fn_with_state(Arc::clone(&state), trace_failure))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), auth::guard));
    let open = Router::new()
        .route("/livez", get(routes::health::livez))
        .route("/readyz", get(routes::health::readyz));
    guarded
        .merge(open)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), count))
        .with_state(state)
}

/// The routes that need a key, without the layer that asks for it.
fn guarded() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/models", get(routes::models::list))
        .route("/v1/models/{model}", get(routes::models::one))
        .route("/v1/chat/completions", post(routes::chat::complete))
        .route("/v1/completions", post(routes::completions::complete))
        .route("/v1/embeddings", post(routes::embeddings::embed))
        .route("/v1/tokenize", post(routes::tokenize::tokenize))
        .route("/v1/detokenize", post(routes::tokenize::detokenize))
        .route("/v1/ask", post(routes::ask::ask))
        .route("/v1/exrail/config", get(routes::models::config))
        .route("/v1/exrail/sessions", get(routes::sessions::list))
        .route(
            "/v1/exrail/sessions/{name}",
            put(routes::sessions::save).delete(routes::sessions::remove),
        )
        .route("/v1/exrail/sessions/{name}/restore", post(routes::sessions::restore))
        .route("/metrics", get(routes::health::metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
}

async fn no_route(request: Request) -> ApiError {
    ApiError::NoRoute {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
    }
}

/// A request that got no answer leaves a record too (G-14). Only those with a key get this far, so
/// that strangers cannot fill the log.
async fn trace_failure(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let answerer = Answerer::default();
    request.extensions_mut().insert(answerer.clone());
    let caller = request.extensions().get::<Caller>().cloned();
    let response = next.run(request).await;
    let Some(failure) = response.extensions().get::<Failure>().cloned() else { return response };
    let named = ids::name("request").and_then(|id| Ok((id, ids::name("trace")?)));
    let Ok((request_id, trace_id)) = named else { return response };
    let agent_id = caller.and_then(|caller| caller.0);
    let identity = TraceIdentity { trace_id, request_id, session_id: None, agent_id };
    state.metrics.count_guard(failure.code);
    let body = TraceBody::Guard { guard: failure.code.into(), detail: failure.message };
    // Who was to answer, or else who could have.
    let services = answerer.services().or_else(|| state.services());
    let is_hashed = services
        .as_ref()
        .is_none_or(|services| services.engine.facts().model_sha256.ended().is_disconnected());
    let written = async move {
        if let Err(error) = append_failure(&state, services, &identity, body).await {
            // Nothing is released by this response, so the failure may still be told.
            tracing::error!(%error, "a failed request could not be traced");
        }
    };
    if is_hashed {
        written.await;
    } else {
        // The record waits for the model's hash; a client that is turned away does not.
        tokio::spawn(written);
    }
    response
}

async fn append_failure(
    state: &AppState,
    services: Option<Arc<Services>>,
    identity: &TraceIdentity,
    body: TraceBody,
) -> Result<(), TraceError> {
    let pins = match services {
        Some(services) => services.pins().await?,
        None => Pins::default(),
    };
    state.traces.append(identity, &pins, body).await
}

async fn count(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let response = next.run(request).await.into_response();
    state.metrics.count_request(route.as_deref().unwrap_or("none"), response.status().as_u16());
    response
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::StatusCode};
    use tower::ServiceExt;

    use super::*;
    use crate::{Keys, Limits, TraceLog};

    /// The state of a server with these keys, and the folder that it writes to.
    fn state(keys: &[&str]) -> (Arc<AppState>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::new(keys.iter().copied()).unwrap();
        let traces = TraceLog::open(&folder.path().join("trace.jsonl")).unwrap();
        (AppState::new(keys, traces, Limits::default()), folder)
    }

    /// What a router says to somebody without a key who calls the server `host`.
    async fn told(router: Router, host: &str) -> StatusCode {
        let request = Request::builder().uri("/metrics").header("host", host);
        let request = request.body(Body::empty()).unwrap();
        router.oneshot(request).await.unwrap().status()
    }

    #[tokio::test]
    async fn mutation_without_the_guard_a_stranger_without_a_key_is_answered() {
        let (state, _folder) = state(&["0123456789abcdef"]);
        let answer = told(router(Arc::clone(&state)), "localhost").await;
        assert_eq!(answer, StatusCode::UNAUTHORIZED);
        // The mutation: the same routes without the layer.
        assert_eq!(told(guarded().with_state(state), "localhost").await, StatusCode::OK);
    }

    #[tokio::test]
    async fn mutation_without_the_guard_a_page_under_another_name_reads_a_local_server() {
        let (state, _folder) = state(&[]);
        let answer = told(router(Arc::clone(&state)), "evil.example").await;
        assert_eq!(answer, StatusCode::FORBIDDEN);
        assert_eq!(told(guarded().with_state(state), "evil.example").await, StatusCode::OK);
    }
}
