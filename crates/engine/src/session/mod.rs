//! Sessions on disk: the whole pages of a conversation, saved under a name and restored by a later process.
//!
//! - `file`: the format, and a reader that refuses whatever is not what was saved.
//! - `store`: the folder, its cap, and who owns which file.
//! - `pages`: how pages leave the engine and come back.
//!
//! What is restored is put where the cache finds prefixes, under the pins and the tenant of the engine that
//! it is restored into: the next request reads it as if it had been computed there.

mod error;
mod file;
mod pages;
mod store;

use std::path::Path;

use exrail_kernels::PAGE_TOKENS;

pub use self::error::SessionError;
use self::file::{Checked, Expected, Header, Writer};
pub(crate) use self::pages::{Found, PageCommand, Placed, Prefix};
use self::store::Folder;
pub use self::store::{Listed, SessionName};
use crate::handle::EngineHandle;

/// Whose sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOwner {
    /// Its tenant in the engine.
    pub tenant: Option<String>,
    /// Its name on disk: of letters and digits, and the same in every process.
    pub folder: String,
}

/// A session that was saved or restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionSize {
    /// Tokens whose keys and values are in it: whole pages.
    pub tokens: usize,
    /// Bytes of its file.
    pub bytes: u64,
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

    /// Saves what the engine has cached of these tokens, in the place of a session of the same name. It is on
    /// the medium when this returns.
    ///
    /// # Errors
    /// Nothing of them is cached, or it cannot be kept; a session of that name is as it was then.
    pub fn save(
        &mut self,
        engine: &EngineHandle,
        owner: &SessionOwner,
        name: &SessionName,
        mut tokens: Vec<u32>,
    ) -> Result<SessionSize, SessionError> {
        let n_tokens = tokens.len();
        let (found, pins) = find(engine, owner, &tokens)?;
        if found.n_pages == 0 {
            return Err(SessionError::NothingCached { tokens: n_tokens, page_tokens: PAGE_TOKENS });
        }
        tokens.truncate(found.n_pages * PAGE_TOKENS);
        let header = Header {
            name: name.as_str().to_owned(),
            owner: owner.folder.clone(),
            pins,
            page_bytes: found.page_bytes as u64,
            tokens,
        };
        let bytes = Writer::<Vec<u8>>::len_bytes(&header);
        self.folder.replace(&owner.folder, name, bytes, |file| {
            let unwritten = || SessionError::io("session file");
            let mut writer = Writer::begin(file, &header).map_err(unwritten())?;
            let mut page = vec![0; found.page_bytes];
            for n in 1..=header.n_pages() {
                let prefix = prefix(owner, &header.tokens, n);
                page = engine.read_page(prefix, page)?.ok_or(SessionError::Lost)?;
                writer.page(&page).map_err(unwritten())?;
            }
            writer.end().map_err(unwritten())
        })?;
        Ok(SessionSize { tokens: header.tokens.len(), bytes })
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
    ) -> Result<SessionSize, SessionError> {
        let file = self.folder.open_file(&owner.folder, name)?;
        let (found, pins) = find(engine, owner, &[])?;
        let expected = Expected {
            name: name.as_str(),
            owner: &owner.folder,
            pins: &pins,
            page_bytes: found.page_bytes as u64,
            vocab_len: engine.facts().vocab_len,
        };
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
        let bytes = Writer::<Vec<u8>>::len_bytes(&header);
        Ok(SessionSize { tokens: header.tokens.len(), bytes })
    }

    /// The sessions of an owner, by name.
    ///
    /// # Errors
    /// The system refuses the folder.
    pub fn list(&self, owner: &SessionOwner) -> Result<Vec<Listed>, SessionError> {
        self.folder.list(&owner.folder)
    }

    /// Removes a session from the folder; what the engine has cached of it stays.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove(&mut self, owner: &SessionOwner, name: &SessionName) -> Result<(), SessionError> {
        self.folder.remove(&owner.folder, name)
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
