//! All routes, in one table: what the router is built from, and what tests enumerate. A handler that is not in it
//! cannot be reached, and what is in it says who may call it.

use std::sync::Arc;

use axum::{
    extract::Request,
    middleware::{self, Next},
    routing::{MethodRouter, delete, get, post, put},
};

use crate::{
    AppState,
    auth::{self, Role},
    routes::{ask, chat, completions, diagnostics, embeddings, health, models, sessions, tokenize},
};

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody who reaches the server, without a key.
    Anyone,
    /// Whoever has a key with this role, or one that may more.
    Holder(Role),
}

/// A method of a path.
#[derive(Clone, Copy)]
pub struct Route {
    /// Of the request.
    pub method: &'static str,
    /// Path, with names in braces.
    pub path: &'static str,
    /// Who may call it.
    pub access: Access,
    handler: fn() -> MethodRouter<Arc<AppState>>,
}

const ANYONE: Access = Access::Anyone;
const USER: Access = Access::Holder(Role::User);
const ADMIN: Access = Access::Holder(Role::Admin);

/// Every route of the server.
pub const ROUTES: &[Route] = &[
    route("GET", "/livez", ANYONE, || get(health::livez)),
    route("GET", "/readyz", ANYONE, || get(health::readyz)),
    route("GET", "/metrics", USER, || get(health::metrics)),
    route("GET", "/v1/models", USER, || get(models::list)),
    route("GET", "/v1/models/{model}", USER, || get(models::one)),
    route("POST", "/v1/chat/completions", USER, || post(chat::complete)),
    route("POST", "/v1/completions", USER, || post(completions::complete)),
    route("POST", "/v1/embeddings", USER, || post(embeddings::embed)),
    route("POST", "/v1/tokenize", USER, || post(tokenize::tokenize)),
    route("POST", "/v1/detokenize", USER, || post(tokenize::detokenize)),
    route("POST", "/v1/ask", USER, || post(ask::ask)),
    // It takes minutes of the engine, and its report shows documents.
    route("POST", "/v1/diagnostics", ADMIN, || post(diagnostics::diagnose)),
    route("GET", "/v1/exrail/config", ADMIN, || get(models::config)),
    // A key sees its own sessions and nobody else's; an administrator's is no exception.
    route("GET", "/v1/exrail/sessions", USER, || get(sessions::list)),
    route("PUT", "/v1/exrail/sessions/{name}", USER, || put(sessions::save)),
    route("DELETE", "/v1/exrail/sessions/{name}", USER, || delete(sessions::remove)),
    route("POST", "/v1/exrail/sessions/{name}/restore", USER, || post(sessions::restore)),
];

const fn route(
    method: &'static str,
    path: &'static str,
    access: Access,
    handler: fn() -> MethodRouter<Arc<AppState>>,
) -> Route {
    Route { method, path, access, handler }
}

impl Route {
    /// Its handler behind the role that it needs.
    pub(crate) fn service(&self) -> MethodRouter<Arc<AppState>> {
        match self.access {
            Access::Anyone => (self.handler)(),
            Access::Holder(needed) => (self.handler)().route_layer(middleware::from_fn(
                move |request: Request, next: Next| auth::require(needed, request, next),
            )),
        }
    }
}
