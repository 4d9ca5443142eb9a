//! A turn that begins from a session (G-22): nobody writes what it began from before it ends, or it fails.

use exrail_engine::{EngineHandle, Memory, SessionError, SessionOwner, SessionState};

use super::{
    SessionKeeper,
    belief::{Belief, Claim},
    fence::{Place, Ticket},
    keeper,
};
use crate::{
    AppState,
    auth::{Caller, KeyFolder},
    error::ApiError,
    extract::Answerer,
    state::{Services, hashed},
    trace::TraceIdentity,
};

/// Whose sessions a request may begin from, and who learns from which one it did.
pub(crate) struct Origin {
    owner: SessionOwner,
    answerer: Answerer,
}

impl Origin {
    pub(crate) fn new(caller: &Caller, folder: KeyFolder, answerer: Answerer) -> Origin {
        let owner = SessionOwner { tenant: caller.0.clone(), folder: folder.0 };
        Origin { owner, answerer }
    }
}

/// What a turn takes its session for, and what it goes on with.
#[derive(Clone, Debug)]
pub(crate) struct Beginning {
    pub(super) belief: Belief,
    pub(super) is_reader: bool,
    pub(super) state: SessionState,
    /// All of the conversation.
    pub(super) tokens: Vec<u32>,
}

/// A turn on its way. One that is dropped before its end lets the next one write.
#[derive(Debug)]
pub(crate) struct Turn {
    keeper: SessionKeeper,
    place: Place,
    /// What it began from.
    memory: Memory,
    /// Of a turn that may write, until it ends.
    ticket: Option<Ticket>,
}

/// Begins the turn that a request claims, if it claims one; what the session holds is then in the cache.
pub(crate) async fn begin(
    state: &AppState,
    services: &Services,
    origin: &Origin,
    claim: Option<Claim>,
    (tokens, shaped): (&[u32], SessionState),
) -> Result<Option<Turn>, ApiError> {
    let Some(Claim { name, belief, is_reader }) = claim else { return Ok(None) };
    let keeper = keeper(state)?;
    hashed(&services.engine).await;
    let beginning = Beginning { belief, is_reader, state: shaped, tokens: tokens.to_vec() };
    let place = Place { owner: origin.owner.clone(), name };
    let turn = keeper.begin(services.engine.clone(), place, beginning).await?;
    origin.answerer.turned(&turn);
    Ok(Some(turn))
}

impl SessionKeeper {
    async fn begin(
        &self,
        engine: EngineHandle,
        place: Place,
        beginning: Beginning,
    ) -> Result<Turn, SessionError> {
        let keeper = self.clone();
        // Made where it begins: a turn that nobody waits for any more is dropped there, and ends with that.
        self.call(move |fenced| {
            let (memory, ticket) = fenced.begin(&engine, &place, &beginning)?;
            Ok(Turn { keeper, place, memory, ticket })
        })
        .await
    }
}

impl Turn {
    /// Ends it. The session has to be what it began from: otherwise its answer goes on from something that is no
    /// longer there.
    ///
    /// # Errors
    /// Somebody has written meanwhile.
    pub(crate) async fn end(mut self) -> Result<(), ApiError> {
        let (place, began) = (self.place.clone(), self.memory.clone());
        let ticket = self.ticket.take();
        Ok(self.keeper.call(move |fenced| fenced.end(&place, ticket, &began)).await?)
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn name(&self) -> &str {
        self.place.name.as_str()
    }

    /// Who the records of its answer belong to.
    pub(crate) fn identity(turn: Option<&Turn>, identity: TraceIdentity) -> TraceIdentity {
        match turn {
            None => identity,
            Some(turn) => identity.of_session(turn.name(), Some(turn.memory())),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let place = self.place.clone();
            self.keeper.tell(move |fenced| fenced.give_back(&place, Some(ticket)));
        }
    }
}
