//! References of a schema: each points to a schema of the same document that has been screened, and none to
//! another document, as nothing is fetched.

use std::collections::HashSet;

use super::{keywords, unsupported};
use crate::GrammarError;

#[derive(Debug, Default)]
pub(crate) struct References {
    /// Pointers of all schemas.
    schemas: HashSet<String>,
    /// The `$id`s.
    ids: Vec<String>,
    /// Where each reference stands, what it says, and what it must find.
    wanted: Vec<Wanted>,
}

#[derive(Debug)]
struct Wanted {
    pointer: String,
    reference: String,
    target: Target,
}

#[derive(Debug)]
enum Target {
    /// A schema at this pointer.
    At(String),
    /// A schema of a part with an `$id`, whose pointer ends like this.
    Within(String),
    /// A name, which the validator resolves.
    Named,
}

impl References {
    pub(crate) fn stands_at(&mut self, pointer: &str) {
        self.schemas.insert(pointer.to_owned());
    }

    pub(crate) fn named(&mut self, id: &str) {
        self.ids.push(id.to_owned());
    }

    /// Notes a reference.
    pub(crate) fn add(
        &mut self,
        reference: &str,
        pointer: &str,
        root: &str,
    ) -> Result<(), GrammarError> {
        let (document, fragment) = reference.split_once('#').unwrap_or((reference, ""));
        let Some(fragment) = percent_decoded(fragment) else {
            return Err(unsupported(pointer, format!("`{reference}` is no reference")));
        };
        let is_pointer = fragment.is_empty() || fragment.starts_with('/');
        let target = match (document.is_empty(), is_pointer) {
            (true, true) => Target::At(format!("{root}{fragment}")),
            (false, true) if keywords::draft_of(document).is_none() => Target::Within(fragment),
            (true | false, _) => Target::Named,
        };
        let wanted =
            Wanted { pointer: pointer.to_owned(), reference: reference.to_owned(), target };
        self.wanted.push(wanted);
        Ok(())
    }

    /// Whether a reference names a document, this one or a part of it among them.
    pub(crate) fn leave_a_document(&self) -> bool {
        self.wanted.iter().any(|it| !it.reference.starts_with('#'))
    }

    /// Refuses the first reference that leads nowhere, or out of the document.
    pub(crate) fn check(&self) -> Result<(), GrammarError> {
        for Wanted { pointer, reference, target } in &self.wanted {
            let is_there = match target {
                Target::At(target) => self.schemas.contains(target),
                Target::Within(end) => self.schemas.iter().any(|it| it.ends_with(end.as_str())),
                Target::Named => true,
            };
            let document = reference.split_once('#').map_or(reference.as_str(), |it| it.0);
            let is_own = document.is_empty() || keywords::draft_of(document).is_some();
            if !is_own && self.ids.is_empty() {
                let reason = format!("`{reference}` is another document, and nothing is fetched");
                return Err(unsupported(pointer, reason));
            }
            if !is_there {
                let reason = format!("`{reference}`: no schema stands there");
                return Err(unsupported(pointer, reason));
            }
        }
        Ok(())
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |it: Option<u8>| it.and_then(|it| char::from(it).to_digit(16));
        let (high, low) = (digit(rest.next())?, digit(rest.next())?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}
