//! `/v1/exrail/sessions`: save, restore, list and delete.

use std::{sync::Arc, time::SystemTime};

use axum::{Extension, Json, extract::State};
use exrail_engine::{Listed, Memory, SavedSession, Saving, SessionOwner, SessionState};
use exrail_wire::{
    BeliefFields, DeleteRequest, RestoreRequest, SessionCard, SessionDeleted, SessionList,
    SessionRequest, SessionResponse, StructuredFields, Unknown,
};

use super::{chat, completions};
use crate::{
    AppState,
    auth::{Caller, KeyFolder},
    error::ApiError,
    extract::{Body, MaybeBody, Name, Ready, refuse_unknown},
    ids,
    sessions::{Belief, LeakWatch, Place, keeper, of_text, session_name},
    state::{Services, hashed},
    structured::Demand,
};

const OBJECT: &str = "exrail.session";

pub(crate) async fn save(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    ready: Ready,
    Name(name): Name,
    Body(mut request): Body<SessionRequest>,
) -> Result<Json<SessionResponse>, ApiError> {
    let (keeper, name) = (keeper(&state)?, session_name(&name)?);
    let fields = StructuredFields::take(&mut request.unknown)?;
    let belief = belief(&mut request.unknown)?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    let (tokens, shape) = conversation(&state, pass.services(), &caller, (request, &fields))?;
    let saving = Saving { tokens, state: shape, lineage: ids::name("life")? };
    let (at, engine) = (Place { owner: owner(caller, folder), name }, pass.engine.clone());
    hashed(&engine).await;
    let of = at.name.as_str().to_owned();
    let saved =
        keeper.call(move |fenced| fenced.save(&engine, &at, belief.as_ref(), saving)).await?;
    Ok(response(of, saved))
}

pub(crate) async fn restore(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    ready: Ready,
    Name(name): Name,
    MaybeBody(mut request): MaybeBody<RestoreRequest>,
) -> Result<Json<SessionResponse>, ApiError> {
    let (keeper, name) = (keeper(&state)?, session_name(&name)?);
    let belief = belief(&mut request.unknown)?;
    let pass = ready.generator_for(&caller, request.model.as_deref()).await?;
    let (at, engine) = (Place { owner: owner(caller, folder), name }, pass.engine.clone());
    hashed(&engine).await;
    let of = at.name.as_str().to_owned();
    let saved = keeper.call(move |fenced| fenced.restore(&engine, &at, belief.as_ref())).await?;
    Ok(response(of, saved))
}

pub(crate) async fn list(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
) -> Result<Json<SessionList>, ApiError> {
    let owner = owner(caller, folder);
    let listed = keeper(&state)?.call(move |fenced| fenced.list(&owner)).await?;
    Ok(Json(SessionList { object: "list", data: listed.into_iter().map(card).collect() }))
}

pub(crate) async fn remove(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(folder): Extension<KeyFolder>,
    Name(name): Name,
    MaybeBody(mut request): MaybeBody<DeleteRequest>,
) -> Result<Json<SessionDeleted>, ApiError> {
    let (keeper, session) = (keeper(&state)?, session_name(&name)?);
    let belief = belief(&mut request.unknown)?;
    let at = Place { owner: owner(caller, folder), name: session };
    keeper.call(move |fenced| fenced.remove(&at, belief.as_ref())).await?;
    Ok(Json(SessionDeleted { object: OBJECT, name, deleted: true }))
}

/// What the request takes the session for; nothing else may be left in it.
fn belief(unknown: &mut Unknown) -> Result<Option<Belief>, ApiError> {
    let fields = BeliefFields::take(unknown)?;
    refuse_unknown("", unknown)?;
    Belief::of("", &fields)
}

fn owner(Caller(tenant): Caller, KeyFolder(folder): KeyFolder) -> SessionOwner {
    SessionOwner { tenant, folder }
}

/// The tokens of a conversation as the other routes would have them, and what shapes the answers that go on.
fn conversation(
    state: &AppState,
    services: &Services,
    Caller(tenant): &Caller,
    (request, fields): (SessionRequest, &StructuredFields),
) -> Result<(Vec<u32>, SessionState), ApiError> {
    let one =
        |problem: &str| ApiError::BadField { field: "messages".into(), problem: problem.into() };
    match (request.messages, request.prompt) {
        (Some(messages), None) => {
            let demand = Demand::of_chat(fields, &state.limits.structured)?;
            let is_on = request.leak_guard.unwrap_or(state.limits.leak_guard);
            let who = (LeakWatch::of(is_on), tenant.as_deref());
            let framed = chat::framed(state, services, who, messages, (&demand, None))?;
            Ok((framed.conversation.placed.ids, framed.shape))
        }
        (None, Some(_)) if request.leak_guard == Some(true) => Err(ApiError::UnsupportedField {
            field: "leak_guard".into(),
            why: "a text completion has no system message to guard",
        }),
        (None, Some(prompt)) => {
            let mut prompts = completions::prompts(services, prompt)?;
            match (prompts.pop(), prompts.is_empty()) {
                (Some(only), true) => Ok((only, of_text(&Demand::of_text(fields)?))),
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

fn response(name: String, saved: SavedSession) -> Json<SessionResponse> {
    let SavedSession { tokens, bytes, memory } = saved;
    let (context_id, Memory { rev, hash }) = (memory.context_id(), memory);
    let (object, mem_rev, mem_hash) = (OBJECT, rev, hash);
    Json(SessionResponse { object, name, tokens, bytes, mem_rev, mem_hash, context_id })
}

fn card(Listed { name, bytes, used, memory }: Listed) -> SessionCard {
    // A clock before 1970 is no reason to hide the session.
    let used = jiff::Timestamp::try_from(used.max(SystemTime::UNIX_EPOCH)).unwrap_or_default();
    SessionCard {
        object: OBJECT,
        name,
        bytes,
        used: used.to_string(),
        context_id: memory.as_ref().map(Memory::context_id),
        mem_rev: memory.as_ref().map(|memory| memory.rev),
        mem_hash: memory.map(|memory| memory.hash),
    }
}
