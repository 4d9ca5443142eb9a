//! What a request takes a session for: its revision and its hash, as the last answer about it told them.

use exrail_engine::{Difference, Memory, SessionName};
use exrail_wire::{BeliefFields, SessionField};
use serde_json::Value;

use super::session_name;
use crate::error::ApiError;

/// Hexadecimal digits of a whole hash, and of the one in a context id.
const WHOLE: usize = 64;
const SHORT: usize = 16;

/// A revision, and the hash or its first digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Belief {
    rev: u64,
    hash: String,
}

/// The session that a turn is to begin from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) name: SessionName,
    pub(crate) belief: Belief,
    /// Whether others may begin from it meanwhile.
    pub(crate) is_reader: bool,
}

impl Belief {
    /// Of the fields of a request, where `path` stands before their names; `None`: it takes the session for absent, or
    /// says nothing of it.
    pub(crate) fn of(path: &str, fields: &BeliefFields) -> Result<Option<Belief>, ApiError> {
        let bad = |field: &str, problem: &str| {
            Err(ApiError::BadField { field: format!("{path}{field}"), problem: problem.into() })
        };
        let BeliefFields { mem_rev, mem_hash, context_id } = fields;
        match (mem_rev, mem_hash, context_id) {
            (None | Some(0), None, None) => Ok(None),
            (None, None, Some(id)) => match parsed(id) {
                Some(belief) => Ok(Some(belief)),
                None => bad("context_id", "expected REV:HASH as an answer told it, with 16 digits"),
            },
            (_, _, Some(_)) => {
                bad("context_id", "expected it, or `mem_rev` and `mem_hash`, found both")
            }
            (Some(rev @ 1..), Some(hash), None) if is_hash(hash, WHOLE) => {
                Ok(Some(Belief { rev: *rev, hash: hash.clone() }))
            }
            (Some(1..), Some(_), None) => {
                bad("mem_hash", "expected 64 lower-case hexadecimal digits, as an answer told them")
            }
            (Some(1..), None, None) => bad("mem_hash", "expected it together with `mem_rev`"),
            (None | Some(0), Some(_), None) => {
                bad("mem_rev", "expected it, from 1, together with `mem_hash`")
            }
        }
    }

    /// What differs in the memory that was found; nothing when it is the one of the belief.
    pub(crate) fn differences(&self, found: Option<&Memory>) -> Vec<Difference> {
        differences(Some((self.rev, self.hash.as_str())), found)
    }
}

impl Claim {
    /// Of the field of a request.
    pub(crate) fn of(field: &SessionField) -> Result<Claim, ApiError> {
        let name = session_name(&field.name)?;
        let Some(belief) = Belief::of("session.", &field.belief())? else {
            let problem = "expected what the session is taken for: `context_id`, or `mem_rev` and `mem_hash`, as \
                           saving or listing it told them, found none";
            return Err(ApiError::BadField { field: "session".into(), problem: problem.into() });
        };
        Ok(Claim { name, belief, is_reader: field.read_only.unwrap_or(false) })
    }
}

/// What differs between a revision with a hash, or its first digits, and the memory that was found.
pub(super) fn differences(
    expected: Option<(u64, &str)>,
    found: Option<&Memory>,
) -> Vec<Difference> {
    let (rev, hash) = expected.unzip();
    let (rev, found_rev) = (rev.unwrap_or(0), found.map_or(0, |memory| memory.rev));
    let found_hash = found.map(|memory| memory.hash.as_str());
    let mut differences = Vec::new();
    if rev != found_rev {
        differences.push(Difference::new("mem_rev", rev.into(), found_rev.into()));
    }
    let is_same = match (hash, found_hash) {
        (Some(hash), Some(found)) => found.starts_with(hash),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    };
    if !is_same {
        let told = |hash: Option<&str>| hash.map_or(Value::Null, Value::from);
        differences.push(Difference::new("mem_hash", told(hash), told(found_hash)));
    }
    differences
}

fn parsed(id: &str) -> Option<Belief> {
    let (rev, hash) = id.split_once(':')?;
    let rev = rev.parse().ok().filter(|&rev| rev > 0)?;
    is_hash(hash, SHORT).then(|| Belief { rev, hash: hash.to_owned() })
}

fn is_hash(text: &str, n_digits: usize) -> bool {
    text.len() == n_digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(fields: Value) -> Result<Option<Belief>, ApiError> {
        let mut unknown = serde_json::from_value(fields).unwrap();
        Belief::of("", &BeliefFields::take(&mut unknown).unwrap())
    }

    fn hash() -> String {
        "0123456789abcdef".repeat(4)
    }

    #[test]
    fn a_belief_is_whole_or_refused_by_the_field_at_fault() {
        let whole = Belief { rev: 7, hash: hash() };
        assert_eq!(of(json!({"mem_rev": 7, "mem_hash": hash()})).unwrap(), Some(whole));
        let short = Belief { rev: 7, hash: "0123456789abcdef".into() };
        assert_eq!(of(json!({"context_id": "7:0123456789abcdef"})).unwrap(), Some(short));
        for nothing in [json!({}), json!({"mem_rev": 0}), json!({"mem_rev": 0, "mem_hash": null})] {
            assert_eq!(of(nothing).unwrap(), None);
        }
        let cases = [
            (json!({"mem_rev": 7}), "mem_hash"),
            (json!({"mem_hash": hash()}), "mem_rev"),
            (json!({"mem_rev": 0, "mem_hash": hash()}), "mem_rev"),
            (json!({"mem_rev": 7, "mem_hash": "0123456789abcdef"}), "mem_hash"),
            (json!({"mem_rev": 7, "mem_hash": hash().to_uppercase()}), "mem_hash"),
            (
                json!({"mem_rev": 7, "mem_hash": hash(), "context_id": "7:0123456789abcdef"}),
                "context_id",
            ),
            (json!({"context_id": "7"}), "context_id"),
            (json!({"context_id": "7:"}), "context_id"),
            (json!({"context_id": "0:0123456789abcdef"}), "context_id"),
            (json!({"context_id": format!("7:{}", hash())}), "context_id"),
        ];
        for (fields, expected) in cases {
            let error = of(fields.clone()).unwrap_err();
            let ApiError::BadField { field, .. } = &error else { panic!("{fields}: {error}") };
            assert_eq!(field, expected, "{fields}");
        }
    }

    #[test]
    fn what_differs_is_told_and_nothing_else() {
        let memory = Memory { rev: 7, hash: hash() };
        let belief = |rev, hash: &str| Belief { rev, hash: hash.into() };
        assert_eq!(belief(7, &hash()).differences(Some(&memory)), []);
        assert_eq!(belief(7, "0123456789abcdef").differences(Some(&memory)), []);
        let rev = Difference::new("mem_rev", json!(6), json!(7));
        assert_eq!(belief(6, &hash()).differences(Some(&memory)), [rev]);
        let other = "f".repeat(16);
        let of_hash = Difference::new("mem_hash", json!(other), json!(hash()));
        assert_eq!(belief(7, &other).differences(Some(&memory)), [of_hash]);
        let gone = [
            Difference::new("mem_rev", json!(7), json!(0)),
            Difference::new("mem_hash", json!(hash()), json!(null)),
        ];
        assert_eq!(belief(7, &hash()).differences(None), gone);
        let there = [
            Difference::new("mem_rev", json!(0), json!(7)),
            Difference::new("mem_hash", json!(null), json!(hash())),
        ];
        assert_eq!(differences(None, Some(&memory)), there);
        assert_eq!(differences(None, None), []);
    }
}
