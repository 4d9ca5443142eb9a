//! Pages of the cache from outside the engine's thread, one a message, so that answers go on between them.
//!
//! A page is named by all tokens up to its end. Nothing is held between two messages: the content of a page
//! that can be found never changes, so that pages that were read one after the other fit together, and one
//! that was given up meanwhile is not found.

use super::error::SessionError;
use crate::handle::{Command, EngineHandle};

/// Whole pages of tokens and whose they are.
#[derive(Clone, Debug)]
pub(crate) struct Prefix {
    pub(crate) tenant: Option<Box<str>>,
    pub(crate) tokens: Vec<u32>,
}

/// A question of the engine's thread, with where the answer goes.
#[derive(Debug)]
pub(crate) enum PageCommand {
    /// What is cached of these tokens.
    Find { prefix: Prefix, found: flume::Sender<Found> },
    /// The last page of them, into these bytes; `None`: it is not cached.
    Read { prefix: Prefix, bytes: Vec<u8>, page: flume::Sender<Option<Vec<u8>>> },
    /// Makes the last page of them known, whose predecessors are.
    Write { prefix: Prefix, bytes: Vec<u8>, placed: flume::Sender<(Placed, Vec<u8>)> },
}

/// What an engine has of a prefix, and under which conditions.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Whole pages at the front.
    pub(crate) n_pages: usize,
    /// Bytes of a page.
    pub(crate) page_bytes: usize,
    /// By name; `None` while the model has no name.
    pub(crate) pins: Option<Vec<(String, String)>>,
}

/// What became of a page that was to be made known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    /// It is known.
    Known,
    /// All pages are held.
    NoRoom,
    /// Its predecessors are not known any more.
    Lost,
}

impl EngineHandle {
    pub(super) fn find_pages(&self, prefix: Prefix) -> Result<Found, SessionError> {
        self.ask_pages(|found| PageCommand::Find { prefix, found })
    }

    pub(super) fn read_page(
        &self,
        prefix: Prefix,
        bytes: Vec<u8>,
    ) -> Result<Option<Vec<u8>>, SessionError> {
        self.ask_pages(|page| PageCommand::Read { prefix, bytes, page })
    }

    pub(super) fn write_page(
        &self,
        prefix: Prefix,
        bytes: Vec<u8>,
    ) -> Result<(Placed, Vec<u8>), SessionError> {
        self.ask_pages(|placed| PageCommand::Write { prefix, bytes, placed })
    }

    fn ask_pages<T>(
        &self,
        command: impl FnOnce(flume::Sender<T>) -> PageCommand,
    ) -> Result<T, SessionError> {
        let (sender, answer) = flume::bounded(1);
        self.command(Command::Pages(command(sender))).map_err(|_| SessionError::Stopped)?;
        // A thread that ends drops what it did not answer.
        answer.recv().map_err(|_| SessionError::Stopped)
    }
}
