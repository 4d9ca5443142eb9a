//! `/v1/exrail/sessions`: save, restore, list and delete.

use std::{sync::Arc, time::SystemTime};

use axum::{Extension, Json, extract::State};
use exrail_engine::{Listed, SessionError, SessionName, SessionOwner, SessionSize};
use exrail_wire::{
    RestoreRequest, SessionCard, SessionDeleted, SessionList, SessionRequest, SessionResponse,
};

use super::completions;
use crate::{
    AppState,
    auth::{Caller, KeyFolder},
    echo::brief,
    error::ApiError,
    extract::{Body, MaybeBody, Name, Ready, refuse_unknown},
    messages::{self, Conversation},
    sessions::SessionKeeper,
    state::{Services, hashed},
};

const OBJECT: &str = "exrail.session";

pub(crate) async fn save(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    ready: Ready,
    Name(name): Name,
    Body(request): Body<SessionRequest>,
) -> Result<Json<SessionResponse>, ApiError> {
    let (keeper, name) = (keeper(&state)?, session_name(&name)?);
    refuse_unknown("", &request.unknown)?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    let tokens = conversation(pass.services(), request)?;
    let (owner, engine) = (owner(caller, folder), pass.engine.clone());
    hashed(&engine).await;
    let of = name.as_str().to_owned();
    let size = keeper.call(move |store| store.save(&engine, &owner, &name, tokens)).await?;
    Ok(response(of, size))
}

pub(crate) async fn restore(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    ready: Ready,
    Name(name): Name,
    MaybeBody(request): MaybeBody<RestoreRequest>,
) -> Result<Json<SessionResponse>, ApiError> {
    let (keeper, name) = (keeper(&state)?, session_name(&name)?);
    refuse_unknown("", &request.unknown)?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    let (owner, engine) = (owner(caller, folder), pass.engine.clone());
    hashed(&engine).await;
    let of = name.as_str().to_owned();
    let size = keeper.call(move |store| store.restore(&engine, &owner, &name)).await?;
    Ok(response(of, size))
}

pub(crate) async fn list(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
) -> Result<Json<SessionList>, ApiError> {
    let owner = owner(caller, folder);
    let listed = keeper(&state)?.call(move |store| store.list(&owner)).await?;
    Ok(Json(SessionList { object: "list", data: listed.into_iter().map(card).collect() }))
}

pub(crate) async fn remove(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    Name(name): Name,
) -> Result<Json<SessionDeleted>, ApiError> {
    let (keeper, session) = (keeper(&state)?, session_name(&name)?);
    let owner = owner(caller, folder);
    keeper.call(move |store| store.remove(&owner, &session)).await?;
    Ok(Json(SessionDeleted { object: OBJECT, name, deleted: true }))
}

fn keeper(state: &AppState) -> Result<&SessionKeeper, ApiError> {
    state.sessions.get().ok_or(ApiError::NotAvailable {
        what: "sessions",
        why: "they are kept in a folder; start the server with --session-dir DIR",
    })
}

/// A name that cannot leave its folder.
fn session_name(name: &str) -> Result<SessionName, SessionError> {
    let named = SessionName::new(name);
    if let Err(SessionError::Name { found, longest }) = &named {
        return Err(SessionError::Name { found: brief(found), longest: *longest });
    }
    named
}

fn owner(Caller(tenant): Caller, KeyFolder(folder): KeyFolder) -> SessionOwner {
    SessionOwner { tenant, folder }
}

/// The tokens of a conversation as the other routes would have them.
fn conversation(services: &Services, request: SessionRequest) -> Result<Vec<u32>, ApiError> {
    let one =
        |problem: &str| ApiError::BadField { field: "messages".into(), problem: problem.into() };
    match (request.messages, request.prompt) {
        (Some(messages), None) => {
            let messages = messages::of_wire(messages)?;
            Ok(Conversation::new(services, messages, &[])?.placed.ids)
        }
        (None, Some(prompt)) => {
            let mut prompts = completions::prompts(services, prompt)?;
            match (prompts.pop(), prompts.is_empty()) {
                (Some(only), true) => Ok(only),
                (Some(_) | None, _) => Err(ApiError::BadField {
                    field: "prompt".into(),
                    problem: "expected one prompt, found several".into(),
                }),
            }
        }
        (Some(_), Some(_)) => Err(one("expected `messages` or `prompt`, found both")),
        (None, None) => Err(one("expected `messages` or `prompt`, found neither")),
    }
}

fn response(name: String, SessionSize { tokens, bytes }: SessionSize) -> Json<SessionResponse> {
    Json(SessionResponse { object: OBJECT, name, tokens, bytes })
}

fn card(Listed { name, bytes, used }: Listed) -> SessionCard {
    // A clock before 1970 is no reason to hide the session.
    let used = jiff::Timestamp::try_from(used.max(SystemTime::UNIX_EPOCH)).unwrap_or_default();
    SessionCard { object: OBJECT, name, bytes, used: used.to_string() }
}
