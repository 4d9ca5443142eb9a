//! Sessions on disk: the whole pages of a conversation, saved under a name and restored by a later process.
//!
//! - `file`: the format, and a reader that refuses whatever is not what was saved.
//! - `memory`: which state of a session it is, and what it is compared by.
//! - `store`: the folder, its cap, and who owns which file.
//! - `pages`: how pages leave the engine and come back.
//!
//! What is restored is put where the cache finds prefixes, under the pins and the tenant of the engine that
//! it is restored into: the next request reads it as if it had been computed there.

mod error;
mod file;
mod memory;
mod pages;
mod store;

use std::{path::Path, time::SystemTime};

use exrail_kernels::PAGE_TOKENS;

pub use self::error::SessionError;
use self::file::{Checked, Expected, Header, Writer, check_header, peek};
use self::memory::Life;
pub use self::memory::{Difference, Memory, SessionState};
pub(crate) use self::pages::{Found, PageCommand, Placed, Prefix};
use self::store::Folder;
pub use self::store::SessionName;
use crate::handle::EngineHandle;

/// Whose sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOwner {
    /// Its tenant in the engine.
    pub tenant: Option<String>,
    /// Its name on disk: of letters and digits, and the same in every process.
    pub folder: String,
}

/// What is to be saved.
#[derive(Clone, Debug)]
pub struct Saving {
    /// The conversation, of which the whole pages that the engine has cached are saved.
    pub tokens: Vec<u32>,
    /// What shapes the answers that go on from it.
    pub state: SessionState,
    /// Random: it tells a first save of this name from every other one. A later save does not need it.
    pub lineage: String,
}

/// A session that was saved or restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSession {
    /// Tokens whose keys and values are in it: whole pages.
    pub tokens: usize,
    /// Bytes of its file.
    pub bytes: u64,
    /// Which state of it this is.
    pub memory: Memory,
}

/// What a session says of itself; its pages were not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// Which state of it this is.
    pub memory: Memory,
    /// What shapes the answers that go on from it.
    pub state: SessionState,
    /// The tokens whose keys and values are in it.
    pub tokens: Vec<u32>,
}

/// A session that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Bytes of its file.
    pub bytes: u64,
    /// When it was last saved or restored.
    pub used: SystemTime,
    /// Which state of it this is; `None`: its file cannot be restored, which restoring it says why.
    pub memory: Option<Memory>,
}

/// Sessions in a folder. Its owner is one thread: calls block while files are read and written.
#[derive(Debug)]
pub struct SessionStore {
    folder: Folder,
}

impl SessionStore {
    /// Takes a folder, which is made when it is not there; what was left half-written goes, and then what is
    /// more than `cap_bytes`, the longest unused first.
    ///
    /// # Errors
    /// Another process has the folder, or the system refuses it.
    pub fn open(path: &Path, cap_bytes: u64) -> Result<SessionStore, SessionError> {
        Ok(SessionStore { folder: Folder::open(path, cap_bytes)? })
    }

    /// Saves what the engine has cached of these tokens, in the place of a session of the same name, whose next
    /// revision it is. It is on the medium when this returns.
    ///
    /// # Errors
    /// Nothing of them is cached, it cannot be kept, or the session of that name is damaged or of another format,
    /// so that its revision is not known. That session is as it was then.
    pub fn save(
        &mut self,
        engine: &EngineHandle,
        owner: &SessionOwner,
        name: &SessionName,
        saving: Saving,
    ) -> Result<SavedSession, SessionError> {
        let Saving { mut tokens, state, lineage } = saving;
        let n_tokens = tokens.len();
        let life = match self.header(owner, name) {
            Ok(Header { life: Life { lineage, rev }, .. }) => Life { lineage, rev: rev + 1 },
            Err(SessionError::NotFound { .. }) => Life { lineage, rev: 1 },
            Err(error) => return Err(error),
        };
        let (found, pins) = find(engine, owner, &tokens)?;
        if found.n_pages == 0 {
            return Err(SessionError::NothingCached { tokens: n_tokens, page_tokens: PAGE_TOKENS });
        }
        tokens.truncate(found.n_pages * PAGE_TOKENS);
        let header = Header {
            memory: life.memory(name.as_str(), &state, &tokens),
            name: name.as_str().to_owned(),
            owner: owner.folder.clone(),
            life,
            state,
            pins,
            page_bytes: found.page_bytes as u64,
            tokens,
        };
        self.write(engine, owner, name, header)
    }

    fn write(
        &mut self,
        engine: &EngineHandle,
        owner: &SessionOwner,
        name: &SessionName,
        header: Header,
    ) -> Result<SavedSession, SessionError> {
        let bytes = Writer::<Vec<u8>>::len_bytes(&header);
        self.folder.replace(&owner.folder, name, bytes, |file| {
            let unwritten = || SessionError::io("session file");
            let mut writer = Writer::begin(file, &header).map_err(unwritten())?;
            let mut page = vec![0; header.page_len()?];
            for n in 1..=header.n_pages() {
                let prefix = prefix(owner, &header.tokens, n);
                page = engine.read_page(prefix, page)?.ok_or(SessionError::Lost)?;
                writer.page(&page).map_err(unwritten())?;
            }
            writer.end().map_err(unwritten())
        })?;
        Ok(header.saved())
    }

    /// Puts a session into the engine's cache, where the next request of its owner finds it.
    ///
    /// # Errors
    /// There is none of that name, it is not what was saved, it was computed under other conditions, or the
    /// pool has not the pages. Pages in front of a fault may be cached: each was checked.
    pub fn restore(
        &self,
        engine: &EngineHandle,
        owner: &SessionOwner,
        name: &SessionName,
    ) -> Result<SavedSession, SessionError> {
        let file = self.folder.open_file(&owner.folder, name)?;
        let (found, pins) = find(engine, owner, &[])?;
        let expected = expected(engine, (owner, name), (&found, &pins));
        let mut checked = Checked::open(file, &expected)?;
        let header = checked.header().clone();
        let mut page = vec![0; found.page_bytes];
        for n in 1..=header.n_pages() {
            checked.page(n - 1, &mut page)?;
            let (placed, back) = engine.write_page(prefix(owner, &header.tokens, n), page)?;
            page = back;
            match placed {
                Placed::Known => {}
                Placed::NoRoom | Placed::Lost => {
                    return Err(SessionError::NoRoom { needed: header.n_pages(), found: n - 1 });
                }
            }
        }
        Ok(header.saved())
    }

    /// [`SessionStore::restore`] of what is not cached: a session whose pages all are is not read again.
    ///
    /// # Errors
    /// As of [`SessionStore::restore`]; damaged pages that were not needed are not found.
    pub fn warm(
        &self,
        engine: &EngineHandle,
        owner: &SessionOwner,
        name: &SessionName,
    ) -> Result<SavedSession, SessionError> {
        let header =
            peek(self.folder.open_file(&owner.folder, name)?, (name.as_str(), &owner.folder))?;
        let (found, pins) = find(engine, owner, &header.tokens)?;
        check_header(&header, &expected(engine, (owner, name), (&found, &pins)))?;
        if found.n_pages == header.n_pages() {
            return Ok(header.saved());
        }
        self.restore(engine, owner, name)
    }

    /// What a session says of itself, without reading its pages. That is no use of it.
    ///
    /// # Errors
    /// There is none of that name, or what it says cannot be: it is damaged, or of another format.
    pub fn remembered(
        &self,
        owner: &SessionOwner,
        name: &SessionName,
    ) -> Result<Remembered, SessionError> {
        let Header { memory, state, tokens, .. } = self.header(owner, name)?;
        Ok(Remembered { memory, state, tokens })
    }

    /// The sessions of an owner, by name.
    ///
    /// # Errors
    /// The system refuses the folder.
    pub fn list(&self, owner: &SessionOwner) -> Result<Vec<Listed>, SessionError> {
        let listed = |kept: store::Kept| Listed {
            memory: self.header(owner, &kept.name).ok().map(|header| header.memory),
            name: kept.name.as_str().to_owned(),
            bytes: kept.bytes,
            used: kept.used,
        };
        Ok(self.folder.list(&owner.folder)?.into_iter().map(listed).collect())
    }

    /// Removes a session from the folder; what the engine has cached of it stays.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove(&mut self, owner: &SessionOwner, name: &SessionName) -> Result<(), SessionError> {
        self.folder.remove(&owner.folder, name)
    }

    fn header(&self, owner: &SessionOwner, name: &SessionName) -> Result<Header, SessionError> {
        peek(self.folder.look(&owner.folder, name)?, (name.as_str(), &owner.folder))
    }
}

/// What a file must be to be restored into this engine.
fn expected<'a>(
    engine: &EngineHandle,
    (owner, name): (&'a SessionOwner, &'a SessionName),
    (found, pins): (&Found, &'a [(String, String)]),
) -> Expected<'a> {
    Expected {
        name: name.as_str(),
        owner: &owner.folder,
        pins,
        page_bytes: found.page_bytes as u64,
        vocab_len: engine.facts().vocab_len,
    }
}

/// The first `n_pages` pages of these tokens.
fn prefix(owner: &SessionOwner, tokens: &[u32], n_pages: usize) -> Prefix {
    let tokens = tokens[..n_pages * PAGE_TOKENS].to_vec();
    Prefix { tenant: owner.tenant.as_deref().map(Box::from), tokens }
}

/// What the engine has of these tokens, and its pins.
fn find(
    engine: &EngineHandle,
    owner: &SessionOwner,
    tokens: &[u32],
) -> Result<(Found, Vec<(String, String)>), SessionError> {
    if !engine.facts().options.prefix_cache {
        return Err(SessionError::NoPrefixCache);
    }
    let whole = prefix(owner, tokens, tokens.len() / PAGE_TOKENS);
    let mut found = engine.find_pages(whole)?;
    let pins = found.pins.take().ok_or(SessionError::Unnamed)?;
    Ok((found, pins))
}
