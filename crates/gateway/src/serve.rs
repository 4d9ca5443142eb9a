//! Routes of a gateway.

use std::{future::Future, sync::Arc};

use axum::{
    Extension, Json, Router,
    extract::{Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use exrail_server::{ApiError, Caller, Role, identify, read_body};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{
    error::GatewayError,
    relay::relay,
    state::Gateway,
    upstream::{Fence, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Serves until `stop` resolves; requests in flight are finished.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let head_timeout = gateway.options.head_timeout;
    exrail_server::serve_router(router(gateway), head_timeout, listener, stop).await;
}

/// The routes. Those that generate or tell of others' requests need a key, where the gateway has keys; a path that is
/// none of them needs one too.
pub fn router(gateway: Arc<Gateway>) -> Router {
    let guarded = Router::new()
        .route(CHAT, post(chat))
        .route(COMPLETIONS, post(completions))
        .route("/v1/models", get(models))
        .route("/v1/exrail/upstreams", get(upstreams))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
        .layer(middleware::from_fn_with_state(Arc::clone(&gateway), guard));
    Router::new()
        .route("/livez", get(async || "ok"))
        .route("/readyz", get(ready))
        .merge(guarded)
        .with_state(gateway)
}

async fn guard(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (caller, role) = identify(&gateway.keys.current(), &request)?;
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(role);
    Ok(next.run(request).await)
}

async fn no_route(request: Request) -> ApiError {
    ApiError::NoRoute {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
    }
}

async fn chat(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    generate(gateway, CHAT, caller, request).await
}

async fn completions(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    generate(gateway, COMPLETIONS, caller, request).await
}

async fn generate(
    gateway: Arc<Gateway>,
    route: &'static str,
    Caller(agent_id): Caller,
    request: Request,
) -> Response {
    let (limit, time) = (gateway.options.body_bytes, gateway.options.body_timeout);
    let answered = match read_body(request, limit, time).await {
        Ok(body) => relay(Arc::clone(&gateway), route, agent_id, body).await,
        Err(error) => Err(GatewayError::Api(error)),
    };
    let response = answered.unwrap_or_else(IntoResponse::into_response);
    gateway.metrics.count_request(route, response.status().as_u16());
    response
}

/// What some upstream serves now.
async fn models(State(gateway): State<Arc<Gateway>>) -> Json<Value> {
    let card = |id: String| json!({ "id": id, "object": "model", "created": 0, "owned_by": "exrail-gateway" });
    let cards: Vec<Value> = gateway.fleet.models().into_iter().map(card).collect();
    Json(json!({ "object": "list", "data": cards }))
}

/// 200 once at least one upstream has proved itself.
async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    let upstreams: Vec<Value> = gateway.upstreams().iter().map(|it| brief(it)).collect();
    let is_ready = gateway.upstreams().iter().any(|upstream| upstream.proved().is_some());
    let (status, told) = match is_ready {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
    };
    (status, Json(json!({ "status": told, "upstreams": upstreams }))).into_response()
}

/// Name and fence alone: this route asks nobody for a key.
fn brief(upstream: &Upstream) -> Value {
    let phase = match upstream.fence() {
        Fence::Open(_) => json!("open"),
        Fence::Closed { phase, .. } => json!(phase),
    };
    json!({ "name": upstream.name(), "fence": phase })
}

/// What is known of every upstream.
async fn upstreams(
    State(gateway): State<Arc<Gateway>>,
    Extension(role): Extension<Role>,
) -> Result<Json<Value>, ApiError> {
    if role != Role::Admin {
        return Err(ApiError::Forbidden { needed: Role::Admin.name() });
    }
    let all: Vec<Value> = gateway.upstreams().iter().map(|upstream| whole(upstream)).collect();
    Ok(Json(json!({ "upstreams": all })))
}

fn whole(upstream: &Upstream) -> Value {
    let mut told = brief(upstream);
    told["address"] = upstream.options.address.clone().into();
    told["priority"] = upstream.options.priority.into();
    told["weight"] = upstream.options.weight.into();
    told["in_flight"] = upstream.in_flight().into();
    told["rests_s"] = upstream.rests().map(|time| time.as_secs_f64()).into();
    match upstream.fence() {
        Fence::Closed { reason, .. } => told["reason"] = reason.into(),
        Fence::Open(proved) => {
            told["kind"] = proved.detected.kind.api().name.into();
            told["version"] = proved.detected.version.clone().into();
            told["models"] = proved.detected.models.clone().into();
            told["fingerprint"] = proved.detected.fingerprint.clone().into();
            told["json_schema"] = json!(proved.json_schema);
            told["warm_up"] = json!(proved.warm_up);
            told["pins"] = json!(proved.pins);
        }
    }
    told
}

async fn metrics(State(gateway): State<Arc<Gateway>>) -> String {
    gateway.metrics.render(&gateway.fleet)
}
