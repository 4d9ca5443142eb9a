//! What each keyword of JSON Schema is to the automaton and to the validator.

use jsonschema::Draft;

/// Who honours a keyword.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The mask, and the validator after it.
    Mask,
    /// The validator alone: the mask lets more through.
    Check,
}

/// What stands behind a keyword, and who honours it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Says nothing about which values are valid.
    Annotation,
    /// Names a schema or its draft.
    Identity,
    /// A plain value.
    Value(By),
    /// A schema.
    Schema(By),
    /// A list of schemas.
    List(By),
    /// Schemas by name.
    Map(By),
    /// A schema, or a list of them.
    Items,
    /// Schemas by regular expression.
    PatternMap,
    /// A regular expression.
    Pattern,
    /// The name of a format.
    Format,
    /// A reference.
    Reference,
    /// Lists of names, or schemas, by name.
    Dependencies,
}

/// Keywords with the first and the last draft that have them.
const KEYWORDS: &[(&str, Draft, Draft, Role)] = {
    use Draft::{Draft4 as D4, Draft6 as D6, Draft7 as D7, Draft201909 as D19, Draft202012 as D20};
    &[
        ("$schema", D4, D20, Role::Identity),
        ("$id", D6, D20, Role::Identity),
        // Names a schema in draft 4, and nothing in later ones, where schemas still carry it.
        ("id", D4, D20, Role::Identity),
        ("$anchor", D19, D20, Role::Identity),
        ("$dynamicAnchor", D20, D20, Role::Identity),
        ("$recursiveAnchor", D19, D19, Role::Annotation),
        ("$comment", D4, D20, Role::Annotation),
        ("title", D4, D20, Role::Annotation),
        ("description", D4, D20, Role::Annotation),
        ("default", D4, D20, Role::Annotation),
        ("examples", D4, D20, Role::Annotation),
        ("example", D4, D20, Role::Annotation),
        ("deprecated", D4, D20, Role::Annotation),
        ("readOnly", D4, D20, Role::Annotation),
        ("writeOnly", D4, D20, Role::Annotation),
        ("contentEncoding", D4, D20, Role::Annotation),
        ("contentMediaType", D4, D20, Role::Annotation),
        ("contentSchema", D4, D20, Role::Annotation),
        ("$defs", D4, D20, Role::Map(By::Mask)),
        ("definitions", D4, D20, Role::Map(By::Mask)),
        ("$ref", D4, D20, Role::Reference),
        ("$dynamicRef", D20, D20, Role::Value(By::Check)),
        ("$recursiveRef", D19, D19, Role::Value(By::Check)),
        ("type", D4, D20, Role::Value(By::Mask)),
        ("enum", D4, D20, Role::Value(By::Mask)),
        ("const", D6, D20, Role::Value(By::Mask)),
        ("allOf", D4, D20, Role::List(By::Mask)),
        ("anyOf", D4, D20, Role::List(By::Mask)),
        ("oneOf", D4, D20, Role::List(By::Mask)),
        ("not", D4, D20, Role::Schema(By::Check)),
        ("if", D7, D20, Role::Schema(By::Check)),
        ("then", D7, D20, Role::Schema(By::Check)),
        ("else", D7, D20, Role::Schema(By::Check)),
        ("properties", D4, D20, Role::Map(By::Mask)),
        ("patternProperties", D4, D20, Role::PatternMap),
        ("additionalProperties", D4, D20, Role::Schema(By::Mask)),
        ("unevaluatedProperties", D19, D20, Role::Schema(By::Check)),
        ("required", D4, D20, Role::Value(By::Mask)),
        ("minProperties", D4, D20, Role::Value(By::Mask)),
        ("maxProperties", D4, D20, Role::Value(By::Mask)),
        ("propertyNames", D6, D20, Role::Schema(By::Check)),
        ("dependencies", D4, D20, Role::Dependencies),
        ("dependentRequired", D19, D20, Role::Value(By::Check)),
        ("dependentSchemas", D19, D20, Role::Map(By::Check)),
        ("items", D4, D20, Role::Items),
        ("prefixItems", D20, D20, Role::List(By::Mask)),
        ("additionalItems", D4, D19, Role::Schema(By::Mask)),
        ("unevaluatedItems", D19, D20, Role::Schema(By::Check)),
        ("contains", D6, D20, Role::Schema(By::Check)),
        ("minContains", D19, D20, Role::Value(By::Check)),
        ("maxContains", D19, D20, Role::Value(By::Check)),
        ("minItems", D4, D20, Role::Value(By::Mask)),
        ("maxItems", D4, D20, Role::Value(By::Mask)),
        ("uniqueItems", D4, D20, Role::Value(By::Check)),
        ("minLength", D4, D20, Role::Value(By::Mask)),
        ("maxLength", D4, D20, Role::Value(By::Mask)),
        ("pattern", D4, D20, Role::Pattern),
        ("format", D4, D20, Role::Format),
        ("minimum", D4, D20, Role::Value(By::Mask)),
        ("maximum", D4, D20, Role::Value(By::Mask)),
        ("exclusiveMinimum", D4, D20, Role::Value(By::Mask)),
        ("exclusiveMaximum", D4, D20, Role::Value(By::Mask)),
        ("multipleOf", D4, D20, Role::Value(By::Mask)),
    ]
};

/// Drafts by their `$schema`, without a `#` at the end.
const DRAFTS: [(&str, Draft, &str); 5] = [
    ("http://json-schema.org/draft-04/schema", Draft::Draft4, "draft 4"),
    ("http://json-schema.org/draft-06/schema", Draft::Draft6, "draft 6"),
    ("http://json-schema.org/draft-07/schema", Draft::Draft7, "draft 7"),
    ("https://json-schema.org/draft/2019-09/schema", Draft::Draft201909, "draft 2019-09"),
    ("https://json-schema.org/draft/2020-12/schema", Draft::Draft202012, "draft 2020-12"),
];

/// Formats that the mask enforces.
const MASKED: [&str; 10] =
    ["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"];

/// Formats that the validator checks, with the first draft where it does.
const CHECKED: [(&str, Draft); 17] = [
    ("date", Draft::Draft4),
    ("date-time", Draft::Draft4),
    ("email", Draft::Draft4),
    ("hostname", Draft::Draft4),
    ("ipv4", Draft::Draft4),
    ("ipv6", Draft::Draft4),
    ("regex", Draft::Draft4),
    ("time", Draft::Draft4),
    ("uri", Draft::Draft4),
    ("uuid", Draft::Draft4),
    ("json-pointer", Draft::Draft6),
    ("uri-reference", Draft::Draft6),
    ("uri-template", Draft::Draft6),
    ("iri", Draft::Draft7),
    ("iri-reference", Draft::Draft7),
    ("relative-json-pointer", Draft::Draft7),
    ("duration", Draft::Draft201909),
];

/// What a keyword is in a draft; `None` where it must be refused: another draft has it, or another dialect, or it is
/// a slip of the pen for one that would have asked something. Any other word describes, as the drafts say.
pub(crate) fn role(draft: Draft, keyword: &str) -> Option<Role> {
    if let Some((_, first, last, role)) = KEYWORDS.iter().find(|(name, ..)| *name == keyword) {
        return (*first..=*last).contains(&draft).then_some(*role);
    }
    let is_private = keyword.starts_with("x-") || keyword.starts_with('_');
    if FOREIGN.iter().any(|it| it.0 == keyword) {
        return None;
    }
    let asks = !is_private && nearest(keyword).is_some_and(|(_, role)| role != Role::Annotation);
    (!asks).then_some(Role::Annotation)
}

/// Words of other dialects that would ask something, and what to write instead.
const FOREIGN: [(&str, &str); 5] = [
    ("nullable", "write `\"type\": [T, \"null\"]`"),
    ("discriminator", "give the property a `const` in each branch"),
    ("x-guidance", "options of the automaton are not the client's to set"),
    ("optional", "leave it out of `required`"),
    ("$vocabulary", "only the known drafts are taken"),
];

/// The keyword that a word is a slip of the pen for.
fn nearest(keyword: &str) -> Option<(&'static str, Role)> {
    let lower = keyword.to_lowercase();
    let most = (lower.len() / 3).min(2);
    let near = KEYWORDS.iter().map(|it| (distance(&it.0.to_lowercase(), &lower), it));
    let near = near.filter(|it| it.0 <= most).min_by_key(|it| it.0);
    near.map(|(_, it)| (it.0, it.3))
}

/// The draft that a `$schema` names.
pub(crate) fn draft_of(uri: &str) -> Option<Draft> {
    let uri = uri.strip_suffix('#').unwrap_or(uri);
    let plain = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let same = |known: &str| known.split_once("://").is_some_and(|(_, rest)| rest == plain);
    DRAFTS.iter().find(|(known, ..)| same(known)).map(|it| it.1)
}

/// How a draft is called, and its `$schema`.
pub(crate) fn name_of(draft: Draft) -> (&'static str, &'static str) {
    let found = DRAFTS.iter().find(|(_, it, _)| *it == draft);
    found.map_or(("an unknown draft", ""), |(uri, _, name)| (name, uri))
}

/// Who honours a format of strings; `None`: nobody.
pub(crate) fn format(draft: Draft, name: &str) -> Option<By> {
    let is_checked = CHECKED.iter().any(|(it, first)| *it == name && draft >= *first);
    match (MASKED.contains(&name), is_checked) {
        (true, true) => Some(By::Mask),
        (false, true) => Some(By::Check),
        // Where the schema is relaxed nobody would look at it.
        (true | false, false) => None,
    }
}

/// What to write instead of a keyword that is refused.
pub(crate) fn hint(keyword: &str) -> String {
    if let Some((_, instead)) = FOREIGN.iter().find(|it| it.0 == keyword) {
        return (*instead).to_owned();
    }
    match nearest(keyword) {
        Some((known, _)) if known != keyword => format!("did you mean `{known}`?"),
        Some(_) | None => "another draft has it; name that in `$schema`".into(),
    }
}

/// Edits between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(40).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
