//! Records against the collection that they were drawn from.

use exrail_retrieval::Collection;

use super::findings::{Findings, Rule};
use super::record::Retrieved;
use crate::prompt::sha256_hex;

/// Every snippet is in the collection as the record says, and its text has the recorded hash.
pub(super) fn check(
    retrieved: &[Retrieved],
    index_hash: Option<&str>,
    collection: &Collection,
    findings: &mut Findings,
) {
    let live = collection.index_hash();
    findings.equal(Rule::IndexHash, "/pins/index_hash", live, index_hash.unwrap_or("none"));
    for (at, item) in retrieved.iter().enumerate() {
        let pointer = format!("/retrieved/{at}");
        let Some(chunk) = collection.chunk(&item.snippet_id) else {
            let found = format!("{}, which is not stored", item.snippet_id);
            findings.note(Rule::Stored, format!("{pointer}/snippet_id"), "a stored snippet", found);
            continue;
        };
        let text_sha256 = sha256_hex(chunk.text.as_bytes());
        for (field, stored, found) in [
            ("rev", chunk.rev.as_str(), item.rev.as_str()),
            ("doc_id", &chunk.doc_id, &item.doc_id),
            ("section_id", &chunk.section_id, &item.section_id),
            ("text_sha256", &text_sha256, &item.text_sha256),
        ] {
            findings.equal(Rule::Stored, &format!("{pointer}/{field}"), stored, found);
        }
        for (field, stored, found) in [
            ("tokens", chunk.tokens, item.tokens),
            ("span/start", chunk.span.start, item.span.start),
            ("span/end", chunk.span.end, item.span.end),
        ] {
            findings.equal(Rule::Stored, &format!("{pointer}/{field}"), &stored, &found);
        }
    }
}
