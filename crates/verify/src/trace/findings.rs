//! What a check found, by rule.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

/// What is checked about records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// A line is one JSON object in UTF-8.
    Json,
    /// `record_sha256` is that of the line.
    Seal,
    /// The record has the published shape.
    Schema,
    /// `pins.schema_hash` is that of the published schemas.
    SchemaHash,
    /// `mem_rev` and `mem_hash` come together.
    Memory,
    /// The records of one trace come in their order.
    Order,
    /// `q_id` is the question's hash.
    QuestionId,
    /// `answer_sha256` is the answer's hash.
    AnswerHash,
    /// `snippet_id` is the hash of document, revision and place.
    SnippetId,
    /// Every span has a start in front of its end, lies in its text and cuts no character.
    Spans,
    /// Every cited snippet was retrieved and was in the prompt; an answer cites at least one.
    Citations,
    /// A segment rests on one section, that of its snippets.
    Sections,
    /// Token counts are the sums of what they count.
    Tokens,
    /// Results come in the order of their ranks, and their distances are those of their cosines.
    Ranks,
    /// A refusal is the exact token with a reason, and nothing else is.
    Refusal,
    /// The prompt offered the selected snippets, in slots of the one admissible order.
    Prompt,
    /// `constraints_sha256` is the rules' hash.
    ConstraintsHash,
    /// What was measured agrees with its status.
    Metrics,
    /// `pins.index_hash` is that of the collection.
    IndexHash,
    /// Each snippet is stored in the collection as it was recorded, and its text has its hash.
    Stored,
    /// The steps of an answer are what it is made of, and those that do not stand were drawn anew.
    Steps,
    /// An answer was drawn from what the search in front of it found.
    Search,
}

impl Rule {
    /// All of them, in the order of reports.
    pub const ALL: [Rule; 22] = [
        Rule::Json,
        Rule::Seal,
        Rule::Schema,
        Rule::SchemaHash,
        Rule::Memory,
        Rule::Order,
        Rule::QuestionId,
        Rule::AnswerHash,
        Rule::SnippetId,
        Rule::Spans,
        Rule::Citations,
        Rule::Sections,
        Rule::Tokens,
        Rule::Ranks,
        Rule::Refusal,
        Rule::Prompt,
        Rule::ConstraintsHash,
        Rule::Metrics,
        Rule::IndexHash,
        Rule::Stored,
        Rule::Steps,
        Rule::Search,
    ];

    /// Its name in reports and errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Rule::Json => "json",
            Rule::Seal => "seal",
            Rule::Schema => "schema",
            Rule::SchemaHash => "schema_hash",
            Rule::Memory => "memory",
            Rule::Order => "order",
            Rule::QuestionId => "question_id",
            Rule::AnswerHash => "answer_hash",
            Rule::SnippetId => "snippet_id",
            Rule::Spans => "spans",
            Rule::Citations => "citations",
            Rule::Sections => "sections",
            Rule::Tokens => "tokens",
            Rule::Ranks => "ranks",
            Rule::Refusal => "refusal",
            Rule::Prompt => "prompt",
            Rule::ConstraintsHash => "constraints_hash",
            Rule::Metrics => "metrics",
            Rule::IndexHash => "index_hash",
            Rule::Stored => "stored",
            Rule::Steps => "steps",
            Rule::Search => "search",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A record that breaks the contract.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{pointer}: expected {expected}, found {found} (rule {rule})")]
pub struct Breach {
    /// What is broken.
    pub rule: Rule,
    /// JSON pointer into the record; empty: the record as a whole.
    pub pointer: String,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
}

/// Checks by rule, and what they found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    n_checked: BTreeMap<Rule, usize>,
    breaches: Vec<Breach>,
}

impl Findings {
    /// What is broken, in the order in which it was found.
    #[must_use]
    pub fn breaches(&self) -> &[Breach] {
        &self.breaches
    }

    /// The first breach, if there is one.
    ///
    /// # Errors
    /// The breach.
    pub fn first(self) -> Result<(), Breach> {
        self.breaches.into_iter().next().map_or(Ok(()), Err)
    }

    /// How often a rule was looked at.
    #[must_use]
    pub fn n_checked(&self, rule: Rule) -> usize {
        self.n_checked.get(&rule).copied().unwrap_or(0)
    }

    pub(super) fn passed(&mut self, rule: Rule) {
        *self.n_checked.entry(rule).or_default() += 1;
    }

    pub(super) fn note(
        &mut self,
        rule: Rule,
        pointer: impl Into<String>,
        expected: impl Into<String>,
        found: impl fmt::Display,
    ) {
        self.passed(rule);
        let (pointer, expected) = (pointer.into(), expected.into());
        self.breaches.push(Breach { rule, pointer, expected, found: found.to_string() });
    }

    /// Notes a breach unless both are equal.
    pub(super) fn equal<T: PartialEq + fmt::Display + ?Sized>(
        &mut self,
        rule: Rule,
        pointer: &str,
        expected: &T,
        found: &T,
    ) {
        if expected == found {
            self.passed(rule);
        } else {
            self.note(rule, pointer, expected.to_string(), found);
        }
    }

    /// Notes a breach unless it holds.
    pub(super) fn holds(
        &mut self,
        rule: Rule,
        pointer: &str,
        is_so: bool,
        (expected, found): (&str, &dyn fmt::Display),
    ) {
        if is_so {
            self.passed(rule);
        } else {
            self.note(rule, pointer, expected, found);
        }
    }
}
