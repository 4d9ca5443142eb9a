//! The router and the listener.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};

use exrail_wire::{Pins, TraceBody};

use crate::{
    AppState, KeyError, Keys, TraceIdentity, auth,
    auth::Caller,
    error::{ApiError, Failure},
    extract::Answerer,
    ids,
    otlp::RequestSpans,
    state::Services,
    table::{Access, ROUTES},
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
}

/// Binds the address, which needs a key when others can reach it.
///
/// # Errors
/// A public address without a key, or one that cannot be bound.
pub async fn bind(state: &AppState, address: SocketAddr) -> Result<TcpListener, ServeError> {
    bind_with(&state.keys.current(), address).await
}

/// As [`bind`], for another server with these keys.
///
/// # Errors
/// As [`bind`].
pub async fn bind_with(keys: &Keys, address: SocketAddr) -> Result<TcpListener, ServeError> {
    keys.allow_bind(address.ip())?;
    TcpListener::bind(address).await.map_err(|source| {
        if source.kind() == io::ErrorKind::AddrInUse {
            ServeError::InUse { address }
        } else {
            ServeError::Bind { address, source }
        }
    })
}

/// Most header fields of a request.
const MAX_HEADERS: usize = 64;
/// Most bytes of a request's line and header fields together.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// How long the listener rests when the system has no place for another connection.
const REST: Duration = Duration::from_secs(1);

/// Serves until `stop` resolves; requests in flight are finished.
///
/// A connection has [`Limits::head_timeout`](crate::Limits) for each request's line and header fields, and as long
/// without one, before it is closed. More header fields or bytes than a client needs are answered 431.
pub async fn serve(
    state: Arc<AppState>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let head_timeout = state.limits.head_timeout;
    serve_router(router(state), head_timeout, listener, stop).await;
}

/// As [`serve`], of routes that know their state.
pub async fn serve_router(
    router: Router,
    head_timeout: Duration,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let mut connection = http1::Builder::new();
    connection
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    let open = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let stream = tokio::select! {
            stream = accept(&listener) => stream,
            () = &mut stop => break,
        };
        let service = TowerToHyperService::new(router.clone());
        let served = open.watch(connection.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection broke");
            }
        });
    }
    drop(listener);
    open.shutdown().await;
}

/// The next connection. One that was given up before it was taken says nothing about the others.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Each token is a small write of its own; without this it waits for the client to acknowledge the last one.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection that delays small writes");
                }
                return stream;
            }
            Err(error) if is_of_one_connection(error.kind()) => {}
            Err(error) => {
                tracing::error!(%error, "no connection could be taken");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

fn is_of_one_connection(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&kind)
}

/// The routes of the table, and nothing else. What is not for anyone, unknown paths included, needs a key.
pub fn router(state: Arc<AppState>) -> Router {
    let guarded = guarded()
        .layer(middleware::from_fn_with_state(Arc::clone(&state), trace_failure))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), auth::guard));
    let open = routes(|access| access == Access::Anyone)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), auth::guard_host));
    guarded
        .merge(open)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), count))
        .with_state(state)
}

/// The routes that need a key, without the layer that asks for it.
fn guarded() -> Router<Arc<AppState>> {
    routes(|access| access != Access::Anyone)
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
}

fn routes(is_in: impl Fn(Access) -> bool) -> Router<Arc<AppState>> {
    let routes = ROUTES.iter().filter(|route| is_in(route.access));
    routes.fold(Router::new(), |router, route| router.route(route.path, route.service()))
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
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let asked = (request.method().as_str(), route.as_deref());
    let spans = RequestSpans::open(state.spans.get(), asked, request.headers());
    let answerer = Answerer::of(spans.clone());
    request.extensions_mut().insert(answerer.clone());
    let caller = request.extensions().get::<Caller>().cloned();
    let response = next.run(request).await;
    spans.answered(response.status().as_u16());
    let Some(failure) = response.extensions().get::<Failure>().cloned() else { return response };
    spans.failed(failure.code);
    let named = ids::name("request").and_then(|id| Ok((id, ids::name("trace")?)));
    let Ok((request_id, trace_id)) = named else { return response };
    let agent_id = caller.and_then(|caller| caller.0);
    let identity =
        TraceIdentity { trace_id, request_id, agent_id, spans, ..TraceIdentity::default() };
    let turned = answerer.session().map(|(name, memory)| (name, Some(memory)));
    let identity = match turned.or(failure.session) {
        None => identity,
        Some((name, memory)) => identity.of_session(&name, memory.as_ref()),
    };
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
    use std::path::{Path, PathBuf};

    use axum::{body::Body, http::StatusCode};
    use exrail_checkpoint::{Checkpoint, Gguf};
    use exrail_engine::{
        Engine, EngineHandle, EngineOptions, Identity, LoadOptions, prepare_generator,
    };
    use exrail_kernels_cpu::{CpuBackend, CpuOptions};
    use exrail_testkit::{TinyLlama, tiny_llama};
    use tower::ServiceExt;

    use super::*;
    use crate::{
        BootFault, BootPlan, Limits, Node, Pace, Phase, Shelf, TraceLog,
        auth::{KeyFolder, Role},
    };

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

    /// The mutation: the same routes behind a layer that asks nobody for anything.
    fn unguarded(state: Arc<AppState>) -> Router {
        let let_in = |mut request: Request, next: Next| async {
            request.extensions_mut().insert(Role::Admin);
            request.extensions_mut().insert(Caller(None));
            request.extensions_mut().insert(KeyFolder("default".to_owned()));
            next.run(request).await
        };
        guarded().layer(middleware::from_fn(let_in)).with_state(state)
    }

    #[tokio::test]
    async fn mutation_l4_without_the_guard_a_stranger_without_a_key_is_answered() {
        let (state, _folder) = state(&["0123456789abcdef"]);
        let answer = told(router(Arc::clone(&state)), "localhost").await;
        assert_eq!(answer, StatusCode::UNAUTHORIZED);
        assert_eq!(told(unguarded(state), "localhost").await, StatusCode::OK);
    }

    #[tokio::test]
    async fn mutation_l3_without_the_guard_a_page_under_another_name_reads_a_local_server() {
        let (state, _folder) = state(&[]);
        let answer = told(router(Arc::clone(&state)), "evil.example").await;
        assert_eq!(answer, StatusCode::FORBIDDEN);
        assert_eq!(told(unguarded(state), "evil.example").await, StatusCode::OK);
    }

    /// Opens a server over a tiny model.
    fn open(state: &Arc<AppState>) -> EngineHandle {
        let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let gguf = Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap();
        let who = Identity { name: "tiny".into(), sha256: "0".repeat(64) };
        let (backend, checkpoint) = (CpuBackend::new(options).unwrap(), Checkpoint::Gguf(gguf));
        let load = LoadOptions::default();
        let loaded = prepare_generator(backend, &checkpoint, who, load, &mut |_| {}).unwrap();
        let options = EngineOptions { kv_pages: Some(4), ..EngineOptions::default() };
        let engine = Engine::start(loaded, options).unwrap();
        let nodes = vec![
            Node::new(Phase::WarmUp, &[], "tokens"),
            Node::new(Phase::Sentinel, &[Phase::WarmUp], "answered"),
            Node::new(Phase::Ready, &[Phase::Sentinel], "all of it"),
        ];
        let plan = BootPlan::new(nodes).unwrap();
        let owner = state.board().own(plan, Pace::default(), |_| {}).unwrap();
        for phase in [Phase::WarmUp, Phase::Sentinel] {
            let passed: Result<(), BootFault> = owner.run(phase, || Ok(()), |()| Ok(String::new()));
            passed.unwrap();
        }
        state.open(Shelf::default().services("tiny".into(), engine.clone(), None)).unwrap();
        engine
    }

    /// The mutation: a page of a stranger has the server at its reader's machine generate for it.
    #[tokio::test]
    async fn mutation_l3_without_the_guard_a_page_of_another_origin_drives_the_model() {
        let (state, _folder) = state(&[]);
        let engine = open(&state);
        let post = async |router: Router| {
            let request = Request::builder().method("POST").uri("/v1/completions");
            let request = request
                .header("host", "localhost")
                .header("origin", "https://evil.example")
                .body(Body::from(r#"{"model": "tiny", "prompt": "ab", "max_tokens": 2}"#))
                .unwrap();
            let status = router.oneshot(request).await.unwrap().status();
            (status, engine.counters().submitted)
        };
        assert_eq!(post(router(Arc::clone(&state))).await, (StatusCode::FORBIDDEN, 0));
        assert_eq!(post(unguarded(state)).await, (StatusCode::OK, 1));
    }

    /// Field fault L4: a route that was merged without its guard would answer strangers; here nobody.
    #[tokio::test]
    async fn l4_a_route_without_its_guard_answers_nobody() {
        let (state, _folder) = state(&[]);
        let answer = told(guarded().with_state(state), "localhost").await;
        assert_eq!(answer, StatusCode::INTERNAL_SERVER_ERROR);
    }

    /// Field fault L4: whatever is served comes from the table, so that a test can name all of it.
    #[test]
    fn l4_nothing_but_the_table_makes_routes() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut makers = Vec::new();
        look_for_routes(&source, &mut makers);
        assert_eq!(makers, [source.join("serve.rs")], "`.route(` in other files");
    }

    fn look_for_routes(folder: &Path, makers: &mut Vec<PathBuf>) {
        let calls = [".route", ".nest", ".route_service", ".nest_service", ".fallback_service"];
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look_for_routes(&path, makers);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            if calls.iter().any(|call| text.contains(&format!("{call}("))) {
                makers.push(path);
            }
        }
    }
}
