//! The fence around the sessions (G-22): whoever uses one says what it takes it for, one may write, and nobody gets
//! the newer one in silence.
//!
//! All of it runs on the thread that owns the folder, so that nothing comes between a comparison and what follows
//! from it.

use std::collections::BTreeMap;

use exrail_engine::{
    Difference, EngineHandle, Listed, Memory, Remembered, SavedSession, Saving, SessionError,
    SessionName, SessionOwner, SessionStore,
};

use super::{
    belief::{Belief, differences},
    turn::Beginning,
};

/// Which session of whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) owner: SessionOwner,
    pub(crate) name: SessionName,
}

/// A turn that may write; no two have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// Folder and name of a session.
type Key = (String, String);

/// The sessions, and the turns that may write.
#[derive(Debug)]
pub(crate) struct Fenced {
    store: SessionStore,
    /// Of each session that has one.
    writers: BTreeMap<Key, Ticket>,
    last_ticket: u64,
    /// False only where a test shows what the fence is for.
    is_up: bool,
}

impl Fenced {
    pub(super) fn new(store: SessionStore) -> Fenced {
        Fenced { store, writers: BTreeMap::new(), last_ticket: 0, is_up: true }
    }

    #[cfg(test)]
    pub(super) fn lowered(self) -> Fenced {
        Fenced { is_up: false, ..self }
    }

    /// Saves a session as the next revision of what the request takes it for.
    pub(crate) fn save(
        &mut self,
        engine: &EngineHandle,
        at: &Place,
        belief: Option<&Belief>,
        saving: Saving,
    ) -> Result<SavedSession, SessionError> {
        let found = self.found(at)?;
        let found = found.as_ref().map(|found| &found.memory);
        self.refuse_busy(at, found)?;
        let differences = match belief {
            None => differences(None, found),
            Some(belief) => belief.differences(found),
        };
        self.refuse(at, found, differences)?;
        self.store.save(engine, &at.owner, &at.name, saving)
    }

    /// Restores a session, which is what the request takes it for where it says so.
    pub(crate) fn restore(
        &self,
        engine: &EngineHandle,
        at: &Place,
        belief: Option<&Belief>,
    ) -> Result<SavedSession, SessionError> {
        self.compare(at, belief)?;
        self.store.restore(engine, &at.owner, &at.name)
    }

    /// The same of a session that is to go. One that cannot be read goes when nothing is said of it.
    pub(crate) fn remove(
        &mut self,
        at: &Place,
        belief: Option<&Belief>,
    ) -> Result<(), SessionError> {
        let found = self.found(at);
        let found = found.as_ref().ok().and_then(Option::as_ref).map(|found| &found.memory);
        self.refuse_busy(at, found)?;
        self.compare(at, belief)?;
        self.store.remove(&at.owner, &at.name)
    }

    pub(crate) fn list(&self, owner: &SessionOwner) -> Result<Vec<Listed>, SessionError> {
        self.store.list(owner)
    }

    /// Begins a turn: the session is what the request takes it for, the conversation goes on from it under the same
    /// state, and what it holds is in the cache.
    pub(super) fn begin(
        &mut self,
        engine: &EngineHandle,
        at: &Place,
        beginning: &Beginning,
    ) -> Result<(Memory, Option<Ticket>), SessionError> {
        let found = self.store.remembered(&at.owner, &at.name)?;
        if !beginning.is_reader {
            self.refuse_busy(at, Some(&found.memory))?;
        }
        let mut differences = beginning.belief.differences(Some(&found.memory));
        differences.extend(beginning.state.differences(&found.state));
        differences.extend(elsewhere(&beginning.tokens, &found.tokens));
        self.refuse(at, Some(&found.memory), differences)?;
        self.store.warm(engine, &at.owner, &at.name)?;
        let ticket = (!beginning.is_reader).then(|| {
            self.last_ticket += 1;
            Ticket(self.last_ticket)
        });
        if let Some(ticket) = ticket {
            self.writers.insert(key(at), ticket);
        }
        Ok((found.memory, ticket))
    }

    /// Ends a turn, for which the session has to be what it began from.
    pub(super) fn end(
        &mut self,
        at: &Place,
        ticket: Option<Ticket>,
        began: &Memory,
    ) -> Result<(), SessionError> {
        self.give_back(at, ticket);
        let found = self.found(at)?;
        let found = found.as_ref().map(|found| &found.memory);
        let differences = differences(Some((began.rev, began.hash.as_str())), found);
        self.refuse(at, found, differences)
    }

    /// Lets the next turn write.
    pub(super) fn give_back(&mut self, at: &Place, ticket: Option<Ticket>) {
        let key = key(at);
        if ticket.is_some() && self.writers.get(&key).copied() == ticket {
            self.writers.remove(&key);
        }
    }

    fn compare(&self, at: &Place, belief: Option<&Belief>) -> Result<(), SessionError> {
        let Some(belief) = belief else { return Ok(()) };
        let found = self.store.remembered(&at.owner, &at.name)?.memory;
        self.refuse(at, Some(&found), belief.differences(Some(&found)))
    }

    fn found(&self, at: &Place) -> Result<Option<Remembered>, SessionError> {
        match self.store.remembered(&at.owner, &at.name) {
            Ok(found) => Ok(Some(found)),
            Err(SessionError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn refuse_busy(&self, at: &Place, found: Option<&Memory>) -> Result<(), SessionError> {
        if self.is_up && self.writers.contains_key(&key(at)) {
            let (name, memory) = (at.name.as_str().to_owned(), found.cloned());
            return Err(SessionError::Busy { name, memory });
        }
        Ok(())
    }

    fn refuse(
        &self,
        at: &Place,
        found: Option<&Memory>,
        differences: Vec<Difference>,
    ) -> Result<(), SessionError> {
        if !self.is_up || differences.is_empty() {
            return Ok(());
        }
        let (name, memory) = (at.name.as_str().to_owned(), found.cloned());
        Err(SessionError::Conflict { name, memory, differences })
    }
}

fn key(at: &Place) -> Key {
    (at.owner.folder.clone(), at.name.as_str().to_owned())
}

/// A conversation that does not go on from the session's tokens is another one.
fn elsewhere(asked: &[u32], found: &[u32]) -> Option<Difference> {
    if asked.starts_with(found) {
        return None;
    }
    let n_common = asked.iter().zip(found).take_while(|(asked, found)| asked == found).count();
    Some(Difference::new("tokens", n_common.into(), found.len().into()))
}
