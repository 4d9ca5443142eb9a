//! The gold set: questions with their evidence, questions that the corpus cannot answer, and
//! questions about something else. One JSON object per line.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use exrail_retrieval::Document;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{GoldError, VerifyError};
use crate::prompt::hex;
use crate::system::Retrieve;

/// Paraphrases per answerable item (§1.3.1).
pub(crate) const N_PARAPHRASES: usize = 3;

/// One line of a gold set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldItem {
    /// Unique name.
    pub id: String,
    /// What kind of question it is.
    pub kind: GoldKind,
    /// The question.
    pub question: String,
    /// At least three other wordings of an answerable question; none for the other kinds.
    #[serde(default)]
    pub paraphrases: Vec<String>,
    /// Short reference answers; none for the other kinds.
    #[serde(default)]
    pub answers: Vec<String>,
    /// Where the answer stands; none for the other kinds.
    #[serde(default)]
    pub evidence: Vec<EvidenceQuote>,
    /// Whether all quotes are needed or any one is enough.
    #[serde(default)]
    pub anchor_mode: AnchorMode,
}

impl GoldItem {
    /// The wordings that a probe asks.
    pub(crate) fn asked(&self) -> &[String] {
        &self.paraphrases[..self.paraphrases.len().min(N_PARAPHRASES)]
    }
}

/// A quote from a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvidenceQuote {
    /// File name of the document.
    pub doc: String,
    /// Exact text of its canonical form; occurs there once.
    pub quote: String,
}

/// What kind of question a gold item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoldKind {
    /// The corpus answers it.
    Answerable,
    /// On topic, but the corpus does not answer it.
    Unanswerable,
    /// About something else.
    OffTopic,
}

/// How several quotes make an anchor (§1.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnchorMode {
    /// The anchor is their union.
    #[default]
    All,
    /// They are alternatives.
    Any,
}

/// A validated gold set.
#[derive(Clone, Debug)]
pub struct GoldSet {
    items: Vec<GoldItem>,
    sha256: String,
}

/// An answerable item with its quotes found in the index's documents.
#[derive(Clone, Debug)]
pub struct ResolvedItem {
    /// The item.
    pub item: GoldItem,
    /// One span per quote, in order.
    pub spans: Vec<ResolvedSpan>,
}

/// Where a quote stands.
#[derive(Clone, Debug)]
pub struct ResolvedSpan {
    /// The document.
    pub document: Arc<Document>,
    /// Byte range in its canonical text.
    pub range: Range<usize>,
}

impl GoldSet {
    /// Reads and validates a gold file.
    ///
    /// # Errors
    /// See [`GoldError`].
    pub fn read(path: &Path) -> Result<GoldSet, GoldError> {
        let text = fs::read_to_string(path)
            .map_err(|source| GoldError::Io { path: path.to_owned(), source })?;
        GoldSet::parse(&text)
    }

    /// Validates the text of a gold file. Blank lines are skipped.
    ///
    /// # Errors
    /// See [`GoldError`].
    pub fn parse(text: &str) -> Result<GoldSet, GoldError> {
        let mut items: Vec<GoldItem> = Vec::new();
        let mut seen = BTreeMap::new();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line_number = index + 1;
            let item: GoldItem = serde_json::from_str(line)
                .map_err(|source| GoldError::Line { line: line_number, source })?;
            check_fields(&item)?;
            if seen.insert(item.id.clone(), line_number).is_some() {
                return Err(GoldError::DuplicateId { id: item.id, line: line_number });
            }
            items.push(item);
        }
        Ok(GoldSet { items, sha256: hex(&Sha256::digest(text.as_bytes())) })
    }

    /// Hex sha256 of the file.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// All items in file order.
    #[must_use]
    pub fn items(&self) -> &[GoldItem] {
        &self.items
    }

    /// The questions of one kind, in file order.
    pub fn of_kind(&self, kind: GoldKind) -> impl Iterator<Item = &GoldItem> {
        self.items.iter().filter(move |item| item.kind == kind)
    }

    /// The answerable items with their quotes found in the documents of the index.
    ///
    /// # Errors
    /// A document is missing or ambiguous, or a quote does not occur exactly once.
    pub fn resolve(&self, index: &dyn Retrieve) -> Result<Vec<ResolvedItem>, VerifyError> {
        let doc_ids = index.doc_ids();
        let mut resolved = Vec::new();
        for item in self.of_kind(GoldKind::Answerable) {
            let mut spans = Vec::with_capacity(item.evidence.len());
            for evidence in &item.evidence {
                spans.push(resolve_quote(item, evidence, &doc_ids, index)?);
            }
            resolved.push(ResolvedItem { item: item.clone(), spans });
        }
        Ok(resolved)
    }
}

impl ResolvedItem {
    /// Names of the documents that hold the evidence, each once.
    #[must_use]
    pub fn doc_ids(&self) -> Vec<String> {
        let mut ids: Vec<String> =
            self.spans.iter().map(|span| span.document.doc_id.clone()).collect();
        ids.sort();
        ids.dedup();
        ids
    }
}

impl ResolvedSpan {
    /// Whether a byte range of a document overlaps this quote.
    #[must_use]
    pub fn overlaps(&self, doc_id: &str, range: &Range<usize>) -> bool {
        self.document.doc_id == doc_id
            && range.start < self.range.end
            && self.range.start < range.end
    }

    /// The quote.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.document.text[self.range.clone()]
    }
}

fn resolve_quote(
    item: &GoldItem,
    evidence: &EvidenceQuote,
    doc_ids: &[String],
    index: &dyn Retrieve,
) -> Result<ResolvedSpan, VerifyError> {
    let as_file = format!("/{}", evidence.doc);
    let matching: Vec<&String> =
        doc_ids.iter().filter(|id| **id == evidence.doc || id.ends_with(&as_file)).collect();
    let document = match matching.as_slice() {
        [id] => index.document(id)?,
        _ => None,
    };
    let Some(document) = document else {
        let found = matching.len();
        return Err(
            GoldError::Document { id: item.id.clone(), doc: evidence.doc.clone(), found }.into()
        );
    };
    let places = occurrences(&document.text, &evidence.quote);
    match places.as_slice() {
        [start] => Ok(ResolvedSpan { range: *start..start + evidence.quote.len(), document }),
        _ => Err(GoldError::Quote {
            id: item.id.clone(),
            doc: evidence.doc.clone(),
            quote: evidence.quote.clone(),
            found: places.len(),
        }
        .into()),
    }
}

/// Starts of all occurrences, overlapping ones included.
fn occurrences(text: &str, quote: &str) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut from = 0;
    while let Some(found) = text[from..].find(quote) {
        let start = from + found;
        starts.push(start);
        let step = text[start..].chars().next().map_or(1, char::len_utf8);
        from = start + step;
    }
    starts
}

fn check_fields(item: &GoldItem) -> Result<(), GoldError> {
    let fields = [
        ("paraphrases", item.paraphrases.len(), N_PARAPHRASES, "at least three"),
        ("answers", item.answers.len(), 1, "at least one"),
        ("evidence", item.evidence.len(), 1, "at least one"),
    ];
    let id = || item.id.clone();
    for (field, found, least, at_least) in fields {
        match item.kind {
            GoldKind::Answerable if found < least => {
                return Err(GoldError::Field { id: id(), field, expected: at_least, found });
            }
            GoldKind::Unanswerable | GoldKind::OffTopic if found > 0 => {
                return Err(GoldError::Field { id: id(), field, expected: "none", found });
            }
            GoldKind::Answerable | GoldKind::Unanswerable | GoldKind::OffTopic => {}
        }
    }
    let texts = [("id", &item.id), ("question", &item.question)].into_iter().chain(
        item.paraphrases.iter().map(|text| ("paraphrases", text)).chain(
            item.answers
                .iter()
                .map(|text| ("answers", text))
                .chain(item.evidence.iter().map(|evidence| ("evidence", &evidence.quote))),
        ),
    );
    for (field, text) in texts {
        if text.trim().is_empty() {
            return Err(GoldError::Field { id: id(), field, expected: "text", found: 0 });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::FakeIndex;

    const GOOD: &str = r#"{"id":"q1","kind":"answerable","question":"How big?","paraphrases":["a","b","c"],"answers":["256"],"evidence":[{"doc":"a.md","quote":"256 tokens"}],"anchor_mode":"any"}"#;

    fn resolve(quote: &str, text: &str) -> Result<Vec<ResolvedItem>, VerifyError> {
        let gold = GoldSet::parse(&GOOD.replace("256 tokens", quote)).unwrap();
        gold.resolve(&FakeIndex::of_texts(&[("docs/a.md", text)]))
    }

    #[test]
    fn quotes_become_byte_ranges() {
        let items = resolve("256 tokens", "Größe: 256 tokens.").unwrap();
        assert_eq!(items[0].spans[0].range, 9..19);
        assert_eq!(items[0].spans[0].text(), "256 tokens");
        assert_eq!(items[0].doc_ids(), ["docs/a.md"]);
    }

    #[test]
    fn a_quote_must_occur_exactly_once() {
        for (text, found) in [("nothing", 0), ("256 tokens and 256 tokens", 2)] {
            let error = resolve("256 tokens", text).unwrap_err().to_string();
            assert!(error.contains(&format!("found it {found} times")), "{error}");
        }
        // "aba" stands twice in "ababa", overlapping.
        assert!(resolve("aba", "ababa").unwrap_err().to_string().contains("2 times"));
    }

    #[test]
    fn faults_are_named() {
        let cases = [
            (GOOD.replace("\"id\"", "\"name\""), "line 1"),
            (format!("{GOOD}\n\n{GOOD}"), "same on line 3"),
            (
                GOOD.replace(r#"["a","b","c"]"#, r#"["a"]"#),
                "`paraphrases`: expected at least three",
            ),
            (GOOD.replace("answerable", "off_topic"), "`paraphrases`: expected none, found 3"),
            (GOOD.replace("How big?", "  "), "`question`: expected text"),
            (GOOD.replace("answerable", "maybe"), "unknown variant"),
        ];
        for (text, expected) in cases {
            let error = GoldSet::parse(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let gold = GoldSet::parse(GOOD).unwrap();
        let error = gold.resolve(&FakeIndex::of_texts(&[("b.md", "256 tokens")])).unwrap_err();
        assert!(error.to_string().contains("one document `a.md`"), "{error}");
    }
}
