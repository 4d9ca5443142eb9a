//! The grammars compiled last, by what they were compiled from, within a bound of bytes.

use std::collections::{BTreeMap, HashMap};

use crate::Grammar;

/// What the smallest grammar is taken to hold: an automaton, its lexer and a validator. Estimated, not counted: the
/// library does not say what it holds, and its lexer grows while answers are made.
const LEAST_BYTES: usize = 64 << 10;
/// Bytes of automaton and validator for a byte of source.
const BYTES_FOR_ONE: usize = 48;

/// Bytes that a compiled grammar takes, estimated from its source. What a sequence adds to its own copy while it
/// generates is not in the cache.
pub(crate) fn estimate(source_bytes: usize) -> usize {
    LEAST_BYTES + BYTES_FOR_ONE * source_bytes
}

/// Least recently used goes first.
pub(crate) struct Cache {
    most_bytes: usize,
    bytes: usize,
    clock: u64,
    entries: HashMap<String, Entry>,
    by_age: BTreeMap<u64, String>,
}

struct Entry {
    grammar: Grammar,
    bytes: usize,
    used: u64,
}

impl Cache {
    pub(crate) fn new(most_bytes: usize) -> Cache {
        Cache { most_bytes, bytes: 0, clock: 0, entries: HashMap::new(), by_age: BTreeMap::new() }
    }

    pub(crate) fn get(&mut self, key: &str) -> Option<Grammar> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        self.by_age.remove(&entry.used);
        entry.used = self.clock;
        self.by_age.insert(entry.used, key.to_owned());
        Some(entry.grammar.clone())
    }

    /// Keeps a grammar, and forgets old ones until all fit. One that alone is too large is not kept.
    pub(crate) fn insert(&mut self, key: &str, grammar: Grammar, bytes: usize) {
        if bytes > self.most_bytes || self.entries.contains_key(key) {
            return;
        }
        while self.bytes + bytes > self.most_bytes {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.bytes -= entry.bytes;
            }
        }
        self.clock += 1;
        self.bytes += bytes;
        self.by_age.insert(self.clock, key.to_owned());
        self.entries.insert(key.to_owned(), Entry { grammar, bytes, used: self.clock });
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}
