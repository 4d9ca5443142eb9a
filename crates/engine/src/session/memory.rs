//! What a session is taken for (G-22): which save of its name it is, and what would make an answer that goes on
//! from it another one.
//!
//! Nothing here decides whether a request fits. Whoever asks compares, and is told what differs.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Hexadecimal digits of a hash that a context id has.
const SHORT: usize = 16;

/// One state of a session: nothing else has the same revision and hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// 1 at the first save of a name, and 1 more at each later one.
    pub rev: u64,
    /// Lower-case hex of the sha256 over the life of the name, the revision, the state key and the tokens.
    pub hash: String,
}

impl Memory {
    /// Both in short, `REV:HASH` with the first 16 digits of the hash.
    #[must_use]
    pub fn context_id(&self) -> String {
        format!("{}:{}", self.rev, self.hash.get(..SHORT).unwrap_or(&self.hash))
    }
}

/// What shapes an answer beside the tokens in front of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    /// Of the system messages: lower-case hex of a sha256.
    pub system_rev: String,
    /// Everything else by name, each as a hash or a short word.
    pub policy: Vec<(String, String)>,
}

impl SessionState {
    /// Lower-case hex of the sha256 over names and values of the policy.
    #[must_use]
    pub fn policy_hash(&self) -> String {
        let parts =
            self.policy.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]);
        sha256_of(parts)
    }

    /// `sha256(session, system_rev, policy_hash)` in lower-case hex.
    #[must_use]
    pub fn key(&self, session: &str) -> String {
        let policy_hash = self.policy_hash();
        sha256_of([session.as_bytes(), self.system_rev.as_bytes(), policy_hash.as_bytes()])
    }

    /// What this state expects and `found` has not, by name; empty when they are equal.
    #[must_use]
    pub fn differences(&self, found: &SessionState) -> Vec<Difference> {
        let mut differences = Vec::new();
        let mut compare = |field: &str, expected: Option<&str>, found: Option<&str>| {
            if expected != found {
                differences.push(Difference::new(field, expected.into(), found.into()));
            }
        };
        compare("system_rev", Some(&self.system_rev), Some(&found.system_rev));
        for (name, value) in &self.policy {
            compare(name, Some(value), found.of_policy(name));
        }
        for (name, value) in found.policy.iter().filter(|(name, _)| self.of_policy(name).is_none())
        {
            compare(name, None, Some(value));
        }
        differences
    }

    fn of_policy(&self, wanted: &str) -> Option<&str> {
        let found = self.policy.iter().find(|(name, _)| name == wanted);
        found.map(|(_, value)| value.as_str())
    }
}

/// Something that a request and a session do not agree on.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Its name.
    pub field: String,
    /// What the request takes it for; null: it takes it for absent.
    pub expected: Value,
    /// What the session has; null: nothing.
    pub found: Value,
}

impl Difference {
    /// A difference of a field.
    #[must_use]
    pub fn new(field: &str, expected: Value, found: Value) -> Difference {
        Difference { field: field.to_owned(), expected, found }
    }
}

/// Which life of a name: a session that was deleted and saved anew is another one, whatever it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Life {
    /// Random, drawn at the first save.
    pub(super) lineage: String,
    /// The save of this life, from 1.
    pub(super) rev: u64,
}

impl Life {
    /// The memory of a session that holds these tokens in this state.
    pub(super) fn memory(&self, name: &str, state: &SessionState, tokens: &[u32]) -> Memory {
        let (rev, key) = (self.rev.to_le_bytes(), state.key(name));
        let tokens: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let parts = [self.lineage.as_bytes(), &rev, key.as_bytes(), &tokens];
        Memory { rev: self.rev, hash: sha256_of(parts) }
    }
}

/// Over the parts with the length of each, so that no two lists of parts are the same bytes.
fn sha256_of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(policy: &[(&str, &str)]) -> SessionState {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        SessionState { system_rev: "s".into(), policy: policy.iter().map(own).collect() }
    }

    fn life(lineage: &str, rev: u64) -> Life {
        Life { lineage: lineage.into(), rev }
    }

    #[test]
    fn whatever_is_remembered_is_in_the_hash() {
        let of = |life: Life, name: &str, state: &SessionState, tokens: &[u32]| {
            life.memory(name, state, tokens).hash
        };
        let (tools, none) = (state(&[("tools", "a")]), state(&[]));
        let other = SessionState { system_rev: "t".into(), ..tools.clone() };
        let hashes = [
            of(life("a", 1), "talk", &tools, &[1, 2]),
            of(life("b", 1), "talk", &tools, &[1, 2]),
            of(life("a", 2), "talk", &tools, &[1, 2]),
            of(life("a", 1), "walk", &tools, &[1, 2]),
            of(life("a", 1), "talk", &none, &[1, 2]),
            of(life("a", 1), "talk", &other, &[1, 2]),
            of(life("a", 1), "talk", &tools, &[1, 3]),
            of(life("a", 1), "talk", &tools, &[1]),
        ];
        for (at, hash) in hashes.iter().enumerate() {
            assert_eq!(hash.len(), 64);
            assert!(!hashes[..at].contains(hash), "{at}");
        }
        assert_eq!(of(life("a", 1), "talk", &tools, &[1, 2]), hashes[0]);
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(state(&[("ab", "c")]).policy_hash(), state(&[("a", "bc")]).policy_hash());
        let one = SessionState { system_rev: "ab".into(), policy: Vec::new() };
        let two = SessionState { system_rev: "b".into(), policy: Vec::new() };
        assert_ne!(one.key("x"), two.key("xa"));
    }

    #[test]
    fn every_difference_is_named_with_both_sides() {
        let asks = state(&[("template_hash", "t"), ("tools", "new"), ("constraint", "c")]);
        let mut has = state(&[("template_hash", "t"), ("tools", "old"), ("leak_guard", "on")]);
        has.system_rev = "other".into();
        let told = [
            ("system_rev", json!("s"), json!("other")),
            ("tools", json!("new"), json!("old")),
            ("constraint", json!("c"), json!(null)),
            ("leak_guard", json!(null), json!("on")),
        ];
        let told = told.map(|(field, expected, found)| Difference::new(field, expected, found));
        assert_eq!(asks.differences(&has), told);
        assert_eq!(asks.differences(&asks), []);
    }

    #[test]
    fn a_context_id_is_short_and_has_both() {
        let memory = Memory { rev: 3, hash: "0123456789abcdef0123".into() };
        assert_eq!(memory.context_id(), "3:0123456789abcdef");
    }
}
