//! What a page holds, and where a prefix is found.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use exrail_kernels::{PAGE_TOKENS, PageId};

use super::host::Path;
use super::pages::{PageRef, index};
use super::pins::Namespace;
use crate::faults::{Fault, Switchboard};

/// Contents by page, and pages by the hash of their content.
#[derive(Debug)]
pub(super) struct Prefixes {
    contents: Vec<Option<Content>>,
    by_hash: HashMap<u64, Vec<PageRef>>,
    /// Keys of the hash: new in each process, so that nobody can aim at one list.
    keys: RandomState,
}

/// One whole page that can be found.
#[derive(Debug)]
struct Content {
    entry: PageRef,
    /// Of `before`, its hash and `tokens`.
    hash: u64,
    before: Before,
    /// `PAGE_TOKENS` of them.
    tokens: Box<[u32]>,
}

/// What stands in front of a page.
#[derive(Clone, Debug)]
enum Before {
    /// Nothing: a first page.
    Start(Namespace),
    /// The content of this page.
    Page(PageRef),
}

impl Prefixes {
    pub(super) fn new(n_pages: usize) -> Prefixes {
        let contents = std::iter::repeat_with(|| None).take(n_pages).collect();
        Prefixes { contents, by_hash: HashMap::new(), keys: RandomState::new() }
    }

    /// The pages of the longest known prefix of `tokens`, at most `most`.
    pub(super) fn find(
        &self,
        namespace: &Namespace,
        tokens: &[u32],
        most: usize,
        switchboard: &Switchboard,
    ) -> Vec<PageRef> {
        let mut found = Vec::new();
        let mut chain = (Before::Start(namespace.clone()), 0);
        for tokens in tokens.chunks_exact(PAGE_TOKENS).take(most) {
            let hash = self.hash(&chain, tokens, switchboard);
            let Some(entry) = self.at(hash, &chain.0, tokens, switchboard) else { break };
            found.push(entry);
            chain = (Before::Page(entry), hash);
        }
        found
    }

    /// Makes the content of these pages known, the pages of `tokens` in order. What is known already is
    /// not added twice; what followed on a page that is gone follows on this one from now on.
    pub(super) fn add(
        &mut self,
        namespace: &Namespace,
        tokens: &[u32],
        pages: &[PageRef],
        switchboard: &Switchboard,
    ) {
        let mut chain = (Before::Start(namespace.clone()), 0);
        for (tokens, own) in tokens.chunks_exact(PAGE_TOKENS).zip(pages) {
            let hash = self.hash(&chain, tokens, switchboard);
            let known = self.at(hash, &chain.0, tokens, switchboard);
            if known.is_none() {
                self.forget(own.page);
                self.by_hash.entry(hash).or_default().push(*own);
                let (before, tokens) = (chain.0, tokens.into());
                self.contents[index(own.page)] =
                    Some(Content { entry: *own, hash, before, tokens });
            }
            chain = (Before::Page(known.unwrap_or(*own)), hash);
        }
    }

    /// The page as its content names it, if it holds something that can be found.
    pub(super) fn entry(&self, page: PageId) -> Option<PageRef> {
        self.contents[index(page)].as_ref().map(|content| content.entry)
    }

    /// Whether the entry's page holds something that can be found.
    pub(super) fn holds(&self, entry: PageRef) -> bool {
        self.contents[index(entry.page)].as_ref().is_some_and(|content| content.entry == entry)
    }

    /// Whether the page, if it holds something, holds these tokens.
    pub(super) fn agrees(&self, entry: PageRef, tokens: &[u32]) -> bool {
        let content = self.contents[index(entry.page)].as_ref();
        content.is_none_or(|content| content.entry != entry || *content.tokens == *tokens)
    }

    /// Whether the page's content is what its hash says, and is found by it. A content whose page
    /// before is gone is not found, and is sound all the same.
    pub(super) fn is_sound(&self, page: PageId, switchboard: &Switchboard) -> bool {
        let Some(content) = &self.contents[index(page)] else { return true };
        let listed = self.by_hash.get(&content.hash);
        if !listed.is_some_and(|entries| entries.contains(&content.entry)) {
            return false;
        }
        let hash_before = match &content.before {
            Before::Start(_) => Some(0),
            Before::Page(before) => {
                let content = self.contents[index(before.page)].as_ref();
                content.filter(|content| content.entry == *before).map(|content| content.hash)
            }
        };
        hash_before.is_none_or(|before| {
            let chain = (content.before.clone(), before);
            self.hash(&chain, &content.tokens, switchboard) == content.hash
        })
    }

    pub(super) fn forget(&mut self, page: PageId) {
        let Some(content) = self.contents[index(page)].take() else { return };
        if let Some(entries) = self.by_hash.get_mut(&content.hash) {
            entries.retain(|entry| entry.page != page);
            if entries.is_empty() {
                self.by_hash.remove(&content.hash);
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.by_hash.clear();
        self.contents.fill_with(|| None);
    }

    /// The page with this content, compared token by token.
    fn at(
        &self,
        hash: u64,
        before: &Before,
        tokens: &[u32],
        switchboard: &Switchboard,
    ) -> Option<PageRef> {
        let trusts = switchboard.injects(Fault::TrustHash);
        let is_it = |entry: &&PageRef| {
            let content = self.contents[index(entry.page)].as_ref();
            content.is_some_and(|content| {
                content.entry == **entry
                    && (trusts
                        || *content.tokens == *tokens && content.before.is(before, switchboard))
            })
        };
        self.by_hash.get(&hash)?.iter().find(is_it).copied()
    }

    /// Of what is before, its hash, and one page of tokens.
    fn hash(&self, chain: &(Before, u64), tokens: &[u32], switchboard: &Switchboard) -> u64 {
        let start = match &chain.0 {
            Before::Start(namespace) => Some(namespace),
            Before::Page(_) => None,
        };
        self.hash_of(start, chain.1, tokens, switchboard)
    }

    /// The hashes of these pages of tokens, whether anybody holds them or not.
    pub(super) fn hashes(
        &self,
        namespace: &Namespace,
        tokens: &[u32],
        switchboard: &Switchboard,
    ) -> Vec<u64> {
        let mut before = (Some(namespace), 0);
        let pages = tokens.chunks_exact(PAGE_TOKENS);
        let hash = |tokens: &[u32]| {
            let hash = self.hash_of(before.0, before.1, tokens, switchboard);
            before = (None, hash);
            hash
        };
        pages.map(hash).collect()
    }

    /// What a page holds with everything before it; `None`: nothing, or what is before it is gone.
    pub(super) fn path(&self, page: PageId) -> Option<Path> {
        let content = self.contents[index(page)].as_ref()?;
        let mut pages = vec![&content.tokens];
        let mut before = &content.before;
        let namespace = loop {
            match before {
                Before::Start(namespace) => break namespace.clone(),
                Before::Page(entry) => {
                    let content = self.contents[index(entry.page)].as_ref();
                    let content = content.filter(|content| content.entry == *entry)?;
                    pages.push(&content.tokens);
                    before = &content.before;
                }
            }
        };
        let tokens = pages.into_iter().rev().flat_map(|tokens| tokens.iter().copied()).collect();
        Some(Path { hash: content.hash, namespace, tokens })
    }

    fn hash_of(
        &self,
        start: Option<&Namespace>,
        before: u64,
        tokens: &[u32],
        switchboard: &Switchboard,
    ) -> u64 {
        if switchboard.injects(Fault::OneHash) {
            return 0;
        }
        let mut hasher = self.keys.build_hasher();
        if let Some(namespace) = start {
            namespace.hash_into(&mut hasher, switchboard.injects(Fault::OneTenant));
        }
        before.hash(&mut hasher);
        tokens.hash(&mut hasher);
        hasher.finish()
    }

    /// A page with a content.
    pub(super) fn first(&self) -> Option<PageId> {
        let at = self.contents.iter().position(Option::is_some)?;
        Some(PageId(u32::try_from(at).ok()?))
    }

    /// Flips a bit of a content's first token.
    pub(super) fn flip_token(&mut self, page: PageId) {
        let content = self.contents[index(page)].as_mut().expect("a page with content");
        content.tokens[0] ^= 1;
    }
}

impl Before {
    fn is(&self, other: &Before, switchboard: &Switchboard) -> bool {
        match (self, other) {
            (Before::Start(a), Before::Start(b)) => a.is_as(b, switchboard),
            (Before::Page(a), Before::Page(b)) => a == b,
            (Before::Start(_), Before::Page(_)) | (Before::Page(_), Before::Start(_)) => false,
        }
    }
}
