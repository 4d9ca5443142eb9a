//! Pages that leave for a session and come back; see `session/pages.rs`.

use std::sync::Arc;

use exrail_kernels::{Backend, PAGE_TOKENS};

use super::Worker;
use super::paging::PoolPages;
use crate::cache::Namespace;
use crate::session::{Found, PageCommand, Placed, Prefix};

impl<B: Backend> Worker<B> {
    /// Between two steps. Whoever asked may have gone.
    pub(super) fn page_command(&mut self, command: PageCommand) {
        self.name_the_model();
        match command {
            PageCommand::Find { prefix, found } => {
                let page_bytes = self.loaded.backend.kv_page_bytes(&self.pool);
                let n_pages = self.recalled(&prefix);
                found.send(Found { n_pages, page_bytes, pins: self.pins.named() }).ok();
            }
            PageCommand::Read { prefix, mut bytes, page } => {
                let n_pages = prefix.tokens.len() / PAGE_TOKENS;
                let found = self.cache.find(&self.namespace_of(&prefix), &prefix.tokens);
                let last = found.get(n_pages.wrapping_sub(1));
                let read = last.map(|last| {
                    self.loaded.backend.kv_read_page(&self.pool, last.page, &mut bytes);
                    bytes
                });
                page.send(read).ok();
            }
            PageCommand::Write { prefix, bytes, placed } => {
                let result = self.place_page(&prefix, &bytes);
                placed.send((result, bytes)).ok();
            }
        }
    }

    /// Pages of a prefix that are on the device, those that were in the host's memory among them.
    fn recalled(&mut self, prefix: &Prefix) -> usize {
        let namespace = self.namespace_of(prefix);
        let mut device = PoolPages { backend: &self.loaded.backend, pool: &mut self.pool };
        if let Err(fault) = self.cache.recall(&namespace, &prefix.tokens, &mut device) {
            self.contain(fault);
        }
        self.publish();
        self.cache.find(&namespace, &prefix.tokens).len()
    }

    fn place_page(&mut self, prefix: &Prefix, bytes: &[u8]) -> Placed {
        let namespace = self.namespace_of(prefix);
        let mut device = PoolPages { backend: &self.loaded.backend, pool: &mut self.pool };
        let placed = self.cache.place(&namespace, &prefix.tokens, bytes, &mut device);
        self.publish();
        placed.unwrap_or_else(|fault| {
            self.contain(fault);
            Placed::Lost
        })
    }

    fn namespace_of(&self, prefix: &Prefix) -> Namespace {
        let tenant = prefix.tenant.as_deref().map(Arc::from);
        Namespace { pins: Arc::clone(&self.pins), tenant }
    }
}
