//! The table of routes, and the order of checks: path, method, JSON, key, model, body.

use std::sync::Arc;

use axum::{
    Json,
    body::{Bytes, to_bytes},
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    Shared,
    auth::{self, Access, Permission},
    body::{self, Sent},
    catalog, generation, loading,
    refusal::Refusal,
    request::Kind,
    tokens,
};

/// More than any test sends.
const BODY_LIMIT: usize = 64 << 20;

#[derive(Clone, Copy, Debug)]
enum Action {
    Health,
    Service,
    Generate(Kind),
    Models,
    Model,
    Props,
    Load,
    Unload,
    Drafts,
    EmbeddingList,
    /// Any other route of embeddings: none is loaded.
    Embeddings,
    EmbeddingLoad,
    Encode,
    Decode,
    Permission,
    Templates,
    TemplateSwitch,
    TemplateUnload,
    Overrides,
    OverrideSwitch,
    OverrideUnload,
    Loras,
    LoraLoad,
    LoraUnload,
    Download,
}

/// What a request must bring beside its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// A loaded model, looked for before the body.
    Model,
    Body,
    ModelAndBody,
}

#[derive(Debug)]
struct Route {
    method: Method,
    paths: &'static [&'static str],
    access: Access,
    needs: Needs,
    action: Action,
}

const fn get(
    paths: &'static [&'static str],
    access: Access,
    needs: Needs,
    action: Action,
) -> Route {
    Route { method: Method::GET, paths, access, needs, action }
}

const fn post(
    paths: &'static [&'static str],
    access: Access,
    needs: Needs,
    action: Action,
) -> Route {
    Route { method: Method::POST, paths, access, needs, action }
}

use Access::{Admin, Api, Open};
use Needs::{Body, ModelAndBody, Nothing};

static ROUTES: &[Route] = &[
    get(&["/health"], Open, Nothing, Action::Health),
    get(&["/.well-known/serviceinfo"], Open, Nothing, Action::Service),
    post(&["/v1/chat/completions"], Api, Body, Action::Generate(Kind::Chat)),
    post(&["/v1/completions"], Api, Body, Action::Generate(Kind::Completion)),
    post(&["/v1/embeddings"], Api, Nothing, Action::Embeddings),
    get(&["/v1/models", "/v1/model/list"], Api, Nothing, Action::Models),
    get(&["/v1/model"], Api, Needs::Model, Action::Model),
    get(&["/props"], Api, Needs::Model, Action::Props),
    post(&["/v1/model/load"], Admin, Body, Action::Load),
    post(&["/v1/model/unload"], Admin, Nothing, Action::Unload),
    get(&["/v1/model/draft/list"], Api, Nothing, Action::Drafts),
    get(&["/v1/model/embedding/list"], Api, Nothing, Action::EmbeddingList),
    get(&["/v1/model/embedding"], Api, Nothing, Action::Embeddings),
    post(&["/v1/model/embedding/load"], Admin, Body, Action::EmbeddingLoad),
    post(&["/v1/model/embedding/unload"], Admin, Nothing, Action::Embeddings),
    post(&["/v1/token/encode"], Api, ModelAndBody, Action::Encode),
    post(&["/v1/token/decode"], Api, ModelAndBody, Action::Decode),
    get(&["/v1/auth/permission"], Api, Nothing, Action::Permission),
    get(&["/v1/templates", "/v1/template/list"], Api, Nothing, Action::Templates),
    post(&["/v1/template/switch"], Admin, ModelAndBody, Action::TemplateSwitch),
    post(&["/v1/template/unload"], Admin, Needs::Model, Action::TemplateUnload),
    get(&["/v1/sampling/overrides", "/v1/sampling/override/list"], Api, Nothing, Action::Overrides),
    post(&["/v1/sampling/override/switch"], Admin, Body, Action::OverrideSwitch),
    post(&["/v1/sampling/override/unload"], Admin, Nothing, Action::OverrideUnload),
    get(&["/v1/loras", "/v1/lora/list"], Api, Nothing, Action::Loras),
    get(&["/v1/lora"], Api, Needs::Model, Action::Loras),
    post(&["/v1/lora/load"], Admin, ModelAndBody, Action::LoraLoad),
    post(&["/v1/lora/unload"], Admin, Needs::Model, Action::LoraUnload),
    post(&["/v1/download"], Admin, Body, Action::Download),
];

/// Answers any request.
pub(super) async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    checked(shared, request).await.unwrap_or_else(IntoResponse::into_response)
}

async fn checked(shared: Arc<Shared>, request: Request) -> Result<Response, Refusal> {
    let route = find(request.method(), request.uri().path())?;
    let (head, sent) = request.into_parts();
    let sent = match route.needs {
        Needs::Nothing | Needs::Model => Sent::Nothing,
        Needs::Body | Needs::ModelAndBody => {
            // What breaks off is never answered to anyone.
            let bytes = to_bytes(sent, BODY_LIMIT).await.unwrap_or_else(|_| Bytes::new());
            body::read(&head.headers, &bytes)?
        }
    };
    let permission = auth::check(route.access, &head.headers, &shared.options)?;
    let fields = match route.needs {
        Needs::Nothing => Map::new(),
        Needs::Model => {
            shared.place.model()?;
            Map::new()
        }
        Needs::Body => body::fields(sent)?,
        Needs::ModelAndBody => {
            shared.place.model()?;
            body::fields(sent)?
        }
    };
    act(shared, route.action, permission, fields).await
}

fn find(method: &Method, path: &str) -> Result<&'static Route, Refusal> {
    let mut allowed = None;
    for route in ROUTES.iter().filter(|route| route.paths.contains(&path)) {
        if route.method == *method {
            return Ok(route);
        }
        allowed = Some(if route.method == Method::GET { "GET" } else { "POST" });
    }
    Err(match allowed {
        Some(allowed) => Refusal::Method(allowed),
        None => Refusal::Detail(StatusCode::NOT_FOUND, "Not Found".into()),
    })
}

async fn act(
    shared: Arc<Shared>,
    action: Action,
    permission: Permission,
    fields: Map<String, Value>,
) -> Result<Response, Refusal> {
    let value = match action {
        Action::Generate(kind) => return generation::generate(shared, kind, fields).await,
        Action::Load => return loading::load(shared, &fields),
        Action::Health => match catalog::health(&shared) {
            Ok(healthy) => healthy,
            Err(ill) => return Ok((StatusCode::SERVICE_UNAVAILABLE, Json(ill)).into_response()),
        },
        Action::Service => catalog::service(),
        Action::Models => catalog::models(&shared, permission),
        Action::Model => catalog::model(&*shared.place.model()?),
        Action::Props => catalog::props(&*shared.place.model()?),
        Action::Unload => loading::unload(&shared)?,
        Action::Drafts => catalog::drafts(&shared, permission),
        Action::EmbeddingList | Action::Loras => catalog::list(Vec::new()),
        Action::Embeddings => {
            return Err(Refusal::unavailable("No embedding models are currently loaded."));
        }
        Action::EmbeddingLoad => {
            return Err(Refusal::bad("Could not find the embedding model path for load."));
        }
        Action::Encode => tokens::encode(&shared, &fields)?,
        Action::Decode => tokens::decode(&shared, &fields)?,
        Action::Permission => match permission {
            Permission::Api => json!({"permission": "api"}),
            Permission::Admin => json!({"permission": "admin"}),
        },
        Action::Templates => catalog::templates(&shared, permission),
        Action::TemplateSwitch => {
            catalog::check_template(&fields)?;
            loading::set_template(&*shared.place.model()?, true)
        }
        Action::TemplateUnload => loading::set_template(&*shared.place.model()?, false),
        Action::Overrides => catalog::overrides(&shared),
        Action::OverrideSwitch => catalog::set_overrides(&shared, &fields)?,
        Action::OverrideUnload => {
            super::lock(&shared.overrides).clear();
            Value::Null
        }
        Action::LoraLoad => return Err(Refusal::bad("A parent lora directory does not exist.")),
        Action::LoraUnload => Value::Null,
        Action::Download => return Err(Refusal::bad("downloads are not configured")),
    };
    Ok(Json(value).into_response())
}
