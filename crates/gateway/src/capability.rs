//! What an upstream can and cannot do, and how that is known.

use serde::Serialize;

/// Whether it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It can.
    Yes,
    /// It cannot.
    No,
    /// The test did not tell.
    Unknown,
}

/// How that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Requests were sent, and their answers read.
    Tested,
    /// It stands in the documentation or the source of this kind of server; trying it would disturb its users.
    Documented,
}

/// One thing that a server may be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ability {
    /// Answers a chat at all, with tokens.
    Generates,
    /// Streams, and ends its streams.
    Streams,
    /// Tells the usage of a stream.
    StreamUsage,
    /// Tells the usage of a whole reply.
    Usage,
    /// The same answer to the same seed, and another one to another.
    Seed,
    /// A value of the schema, whatever the prompt asks for.
    JsonSchema,
    /// An object for `json_object`.
    JsonObject,
    /// Says so when it cannot compile a schema.
    RefusesBadSchema,
    /// Log-probabilities.
    Logprobs,
    /// Token ids of a text.
    Tokenize,
    /// Shows or applies its chat template.
    Template,
    /// Another model can be loaded by request.
    LoadModel,
    /// Its cache can be told something.
    CacheControls,
    /// Its health route says that tokens come.
    HealthProvesTokens,
}

/// What is known of one ability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Which.
    pub ability: Ability,
    /// Whether.
    pub answer: Answer,
    /// How that is known.
    pub source: Source,
    /// What was seen, or where it stands.
    pub detail: String,
}

/// What is known of an upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Its kind.
    pub kind: &'static str,
    /// By what the kind was told.
    pub evidence: String,
    /// Its version, where it tells one.
    pub version: Option<String>,
    /// The model that was asked.
    pub model: String,
    /// All that it answers to.
    pub models: Vec<String>,
    /// SHA-256 of what it says of itself.
    pub fingerprint: String,
    /// SHA-256 over the token ids of texts that tokenizers differ on; null without a route for them.
    pub tok_fp: Option<String>,
    /// One each.
    pub abilities: Vec<Capability>,
}

impl Capabilities {
    /// Whether an ability is there, as far as is known.
    #[must_use]
    pub fn answer(&self, ability: Ability) -> Answer {
        let found = self.abilities.iter().find(|it| it.ability == ability);
        found.map_or(Answer::Unknown, |it| it.answer)
    }

    /// As a table for people.
    #[must_use]
    pub fn render(&self) -> String {
        let version = self.version.as_deref().unwrap_or("tells no version");
        let mut told = format!(
            "kind         {} ({version}), by {}\nmodel        {}\nfingerprint  {}\ntokenizer    {}\n\n",
            self.kind,
            self.evidence,
            self.models.join(", "),
            self.fingerprint,
            self.tok_fp.as_deref().unwrap_or("not available: no route for token ids"),
        );
        for Capability { ability, answer, source, detail } in &self.abilities {
            let (name, answer, source) = (word(ability), word(answer), word(source));
            told.push_str(&format!("{name:22} {answer:8} {source:11} {detail}\n"));
        }
        told
    }
}

/// A variant as it is written in JSON.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|it| it.as_str().map(str::to_owned))
        .unwrap_or_default()
}
