//! Reads a reply: sentences, the labels that cite snippets, labels that cite nothing, refusal.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::prompt::{Live, REFUSAL_TOKEN};

/// Fewest hex digits of a snippet id that name it.
const MIN_ID_PREFIX: usize = 8;

/// A reply, taken apart. Nothing in it is trusted yet.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedAnswer {
    /// The reply without labels and with plain spacing; the text that a user may see.
    pub text: String,
    /// Its sentences, in order.
    pub segments: Vec<Segment>,
    /// Labels that name no snippet of the prompt.
    pub unknown_citations: Vec<UnknownCitation>,
    /// Whether the reply is the refusal token.
    pub refusal: bool,
}

/// One sentence of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Segment {
    /// Byte range in [`ParsedAnswer::text`].
    pub text_span: Range<usize>,
    /// Section of the first snippet that supports it; none without support.
    pub section_id: Option<String>,
    /// The snippets that support it.
    pub snippet_ids: Vec<String>,
    /// Who named them; none without support.
    pub citation_source: Option<CitationSource>,
}

/// Who named the snippet of a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CitationSource {
    /// The model wrote its label.
    Model,
    /// The model wrote none; the engine found the snippet that holds the sentence's words.
    Attributed,
}

/// A label that names no snippet of the prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnknownCitation {
    /// What stood in the brackets.
    pub label: String,
}

/// Takes a reply apart. `[S1]`, `[s1]`, `[1]`, `(S1)`, `[S1, S2]` and `[` at least eight digits of
/// a snippet id `]` are labels. A bare number is a label only if no snippet contains the same
/// bracket, because then it may be copied text. In a reply that begins with a label, labels belong to what
/// follows them, up to the next one: cite, then explain, as it was asked for. In any other one they belong to the
/// sentence that they stand in or directly follow. A sentence that repeats an earlier one word for word is dropped.
#[must_use]
pub fn parse_answer(reply: &str, live: &Live) -> ParsedAnswer {
    let mut unknown_citations = Vec::new();
    let mut text = String::with_capacity(reply.len());
    let mut segments: Vec<Segment> = Vec::new();
    for (plain, labels) in cited_sentences(reply.trim(), live) {
        let mut snippet_ids = Vec::new();
        for label in labels {
            match label {
                Label::Known(id) if snippet_ids.contains(&id) => {}
                Label::Known(id) => snippet_ids.push(id),
                Label::Unknown(label) => {
                    let unknown = UnknownCitation { label };
                    if !unknown_citations.contains(&unknown) {
                        unknown_citations.push(unknown);
                    }
                }
            }
        }
        if plain.is_empty() {
            // Only labels: they follow the sentence before.
            if let Some(last) = segments.last_mut() {
                cite(last, snippet_ids, live);
            }
            continue;
        }
        let said = |segment: &&mut Segment| text[segment.text_span.clone()] == plain;
        if let Some(same) = segments.iter_mut().find(said) {
            // A small model that falls into a loop says nothing new: once is enough.
            cite(same, snippet_ids, live);
            continue;
        }
        if !text.is_empty() {
            text.push(' ');
        }
        let start = text.len();
        text.push_str(&plain);
        let text_span = start..text.len();
        let mut segment =
            Segment { text_span, section_id: None, snippet_ids: Vec::new(), citation_source: None };
        cite(&mut segment, snippet_ids, live);
        segments.push(segment);
    }
    let refusal = is_refusal(&text);
    ParsedAnswer { text, segments, unknown_citations, refusal }
}

/// Sentences without labels, each with its own.
fn cited_sentences(reply: &str, live: &Live) -> Vec<(String, Vec<Label>)> {
    if !begins_with_label(reply, live) {
        return sentences(reply).into_iter().map(|sentence| take_labels(sentence, live)).collect();
    }
    let mut found: Vec<(String, Vec<Label>)> = Vec::new();
    let mut labels: Vec<Label> = Vec::new();
    // Whether the labels have a sentence already; the next label then begins anew.
    let mut is_used = false;
    let mut rest = reply;
    while !rest.is_empty() {
        let end = next_label(rest, live);
        for sentence in sentences(&rest[..end]) {
            let (plain, own) = take_labels(sentence, live);
            labels.extend(own);
            if !plain.is_empty() {
                found.push((plain, labels.clone()));
                is_used = true;
            }
        }
        rest = &rest[end..];
        if let Some(close) = rest.find(']') {
            if is_used {
                labels.clear();
                is_used = false;
            }
            read_bracket(&rest[..=close], live, &mut labels);
            rest = &rest[close + 1..];
        }
    }
    if !is_used {
        // Labels that nothing follows.
        found.push((String::new(), labels));
    }
    found
}

fn begins_with_label(reply: &str, live: &Live) -> bool {
    reply.starts_with('[') && next_label(reply, live) == 0
}

/// Where the next label in square brackets begins, or the end of the text.
fn next_label(text: &str, live: &Live) -> usize {
    let is_label = |at: &usize| {
        let bracket = &text[*at..];
        bracket
            .find(']')
            .is_some_and(|close| read_bracket(&bracket[..=close], live, &mut Vec::new()))
    };
    text.match_indices('[').map(|(at, _)| at).find(is_label).unwrap_or(text.len())
}

fn cite(segment: &mut Segment, snippet_ids: Vec<String>, live: &Live) {
    for id in snippet_ids {
        if !segment.snippet_ids.contains(&id) {
            segment.snippet_ids.push(id);
        }
    }
    if let Some(first) = segment.snippet_ids.first() {
        let section = live.iter().find(|chunk| chunk.snippet_id == *first);
        segment.section_id = section.map(|chunk| chunk.section_id.clone());
        segment.citation_source = Some(CitationSource::Model);
    }
}

/// The refusal token alone, or as the first words: a small model tends to go on talking.
fn is_refusal(text: &str) -> bool {
    let text = text.trim_start_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
    text.strip_prefix(REFUSAL_TOKEN)
        .is_some_and(|rest| rest.chars().next().is_none_or(|c| !c.is_alphanumeric()))
}

#[derive(Clone)]
enum Label {
    Known(String),
    Unknown(String),
}

/// Splits a sentence into its text with single spaces and its labels.
fn take_labels(sentence: &str, live: &Live) -> (String, Vec<Label>) {
    let mut labels = Vec::new();
    let mut plain = String::with_capacity(sentence.len());
    let mut rest = sentence;
    while let Some(open) = rest.find(['[', '(']) {
        let (before, bracket) = rest.split_at(open);
        plain.push_str(before);
        let close = if bracket.starts_with('[') { ']' } else { ')' };
        match bracket.find(close) {
            Some(end) if read_bracket(&bracket[..=end], live, &mut labels) => {
                rest = &bracket[end + 1..];
            }
            _ => {
                plain.push_str(&bracket[..1]);
                rest = &bracket[1..];
            }
        }
    }
    plain.push_str(rest);
    let mut spaced = String::with_capacity(plain.len());
    for word in plain.split_whitespace() {
        let closing = word.starts_with(['.', ',', ';', ':', '!', '?']) && word.len() == 1;
        if !spaced.is_empty() && !closing {
            spaced.push(' ');
        }
        spaced.push_str(word);
    }
    if !spaced.contains(char::is_alphanumeric) {
        spaced.clear();
    }
    (spaced, labels)
}

/// Reads `[S1, S2]`; false if any part is no label, so that "(see below)" stays text.
fn read_bracket(bracket: &str, live: &Live, labels: &mut Vec<Label>) -> bool {
    let inner = &bracket[1..bracket.len() - 1];
    let copied = || live.iter().any(|chunk| chunk.text.contains(bracket));
    let mut found = Vec::new();
    for part in inner.split([',', ';']).map(str::trim) {
        let numbered = part.strip_prefix(['S', 's']).filter(|digits| is_number(digits));
        let bare = (bracket.starts_with('[') && is_number(part) && !copied()).then_some(part);
        if let Some(digits) = numbered.or(bare) {
            let chunk = digits.parse().ok().and_then(|label| live.by_label(label));
            found.push(match chunk {
                Some(chunk) => Label::Known(chunk.snippet_id.clone()),
                None => Label::Unknown(part.to_owned()),
            });
        } else if part.len() >= MIN_ID_PREFIX && part.bytes().all(|b| b.is_ascii_hexdigit()) {
            let id = part.to_ascii_lowercase();
            let mut matching = live.iter().filter(|chunk| chunk.snippet_id.starts_with(&id));
            found.push(match (matching.next(), matching.next()) {
                (Some(chunk), None) => Label::Known(chunk.snippet_id.clone()),
                _ => Label::Unknown(part.to_owned()),
            });
        } else {
            return false;
        }
    }
    labels.extend(found);
    true
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.len() <= 3 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Cuts at line breaks and after `.`, `!`, `?` before blank space, keeping labels that follow the
/// mark with their sentence. Abbreviations such as "e.g." and numbered list marks do not end one.
pub(crate) fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut start = 0;
        for (index, mark) in line.char_indices().filter(|(_, c)| matches!(c, '.' | '!' | '?')) {
            let end = index + mark.len_utf8();
            let at_end = line[end..].chars().next().is_none_or(char::is_whitespace);
            if at_end && end > start && !is_abbreviation(line[start..end].trim()) {
                let end = end + label_len(&line[end..]);
                found.push(&line[start..end]);
                start = end;
            }
        }
        found.push(&line[start.min(line.len())..]);
    }
    found.retain(|sentence| !sentence.trim().is_empty());
    found
}

fn is_abbreviation(sentence: &str) -> bool {
    let last = sentence.rsplit(char::is_whitespace).next().unwrap_or(sentence);
    let list_mark = sentence.len() == last.len()
        && last.trim_end_matches('.').bytes().all(|byte| byte.is_ascii_digit());
    list_mark || matches!(last, "e.g." | "i.e." | "etc." | "vs." | "cf." | "approx." | "no.")
}

/// Bytes of blank space and brackets that directly follow the end of a sentence, such as ` [S1]`.
fn label_len(rest: &str) -> usize {
    let mut taken = 0;
    loop {
        let tail = &rest[taken..];
        let blank = tail.len() - tail.trim_start().len();
        let bracket = &tail[blank..];
        match bracket.find(']') {
            Some(close) if bracket.starts_with('[') => taken += blank + close + 1,
            _ => return taken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::hit;

    fn live() -> Live {
        Live::new(&[
            hit("a.md", 0, "A page has 256 tokens.", 0.9),
            hit("b.md", 0, "As shown in [7], rotate the cache.", 0.8),
        ])
    }

    fn ids(live: &Live) -> Vec<String> {
        live.iter().map(|chunk| chunk.snippet_id.clone()).collect()
    }

    #[test]
    fn a_repeated_sentence_is_said_once_and_keeps_its_labels() {
        let (live, ids) = (live(), ids(&live()));
        let reply = "A page has 256 tokens. [S1] A page has 256 tokens. [S2] Rotate it.";
        let parsed = parse_answer(reply, &live);
        assert_eq!(parsed.text, "A page has 256 tokens. Rotate it.");
        assert_eq!(parsed.segments[0].snippet_ids, ids);
    }

    #[test]
    fn labels_map_to_live_snippets_and_leave_the_text() {
        let (live, ids) = (live(), ids(&live()));
        let parsed = parse_answer("A page has 256 tokens [S1]. Rotate it. [s2] [1]", &live);
        assert_eq!(parsed.text, "A page has 256 tokens. Rotate it.");
        assert_eq!(parsed.segments[0].snippet_ids, [ids[0].clone()]);
        assert_eq!(parsed.segments[1].snippet_ids, [ids[1].clone(), ids[0].clone()]);
        assert_eq!(parsed.segments[0].citation_source, Some(CitationSource::Model));
        assert_eq!(&parsed.text[parsed.segments[1].text_span.clone()], "Rotate it.");
        assert!(parsed.unknown_citations.is_empty() && !parsed.refusal);
    }

    /// Cite, then explain: a label in front belongs to what follows, up to the next one.
    #[test]
    fn a_label_in_front_belongs_to_the_sentences_behind_it() {
        let (live, ids) = (live(), ids(&live()));
        let reply = "[S1] A page has 256 tokens. It is one. [S2] Rotate it.\n[S2][S1] Both hold.";
        let parsed = parse_answer(reply, &live);
        assert_eq!(parsed.text, "A page has 256 tokens. It is one. Rotate it. Both hold.");
        let cited: Vec<&[String]> = parsed.segments.iter().map(|it| &it.snippet_ids[..]).collect();
        let both = [ids[1].clone(), ids[0].clone()];
        assert_eq!(cited, [&ids[..1], &ids[..1], &ids[1..], &both[..]]);
        let parsed = parse_answer("[S1] A page. [S9] Invented. [S2]", &live);
        assert_eq!(parsed.unknown_citations[0].label, "S9");
        assert_eq!(parsed.segments[1].snippet_ids, [ids[1].clone()]);
    }

    #[test]
    fn lists_of_labels_and_id_prefixes() {
        let (live, ids) = (live(), ids(&live()));
        let parsed = parse_answer(&format!("Both (S1, S2). One [{}].", &ids[1][..8]), &live);
        assert_eq!(parsed.segments[0].snippet_ids, ids);
        assert_eq!(parsed.segments[1].snippet_ids, [ids[1].clone()]);
    }

    #[test]
    fn invented_labels_are_named() {
        let parsed = parse_answer("It is so [S9]. And so [deadbeefdeadbeef] [S0].", &live());
        let labels: Vec<&str> =
            parsed.unknown_citations.iter().map(|unknown| unknown.label.as_str()).collect();
        assert_eq!(labels, ["S9", "deadbeefdeadbeef", "S0"]);
    }

    #[test]
    fn copied_brackets_are_text() {
        let parsed = parse_answer("As shown in [7], rotate (see below) x[i].", &live());
        assert_eq!(parsed.text, "As shown in [7], rotate (see below) x[i].");
        assert!(parsed.unknown_citations.is_empty());
    }

    #[test]
    fn refusal_is_the_token_and_not_a_mention() {
        for reply in
            ["not in context", "Not in context.", " \"not in context\"", "not in context. So"]
        {
            assert!(parse_answer(reply, &live()).refusal, "{reply}");
        }
        for reply in ["It is not in context here.", "not in contexts", ""] {
            assert!(!parse_answer(reply, &live()).refusal, "{reply}");
        }
    }

    #[test]
    fn sentence_ends() {
        let cases: [(&str, &[&str]); 4] = [
            ("Use 0.45 as limit. Then stop.", &["Use 0.45 as limit.", "Then stop."]),
            ("Some, e.g. pages. More", &["Some, e.g. pages.", "More"]),
            ("1. Warm up.\n2. Serve", &["1. Warm up.", "2. Serve"]),
            ("Ja. [S1] Nein! [S2][S1]", &["Ja. [S1]", "Nein! [S2][S1]"]),
        ];
        for (text, expected) in cases {
            let found: Vec<&str> = sentences(text).into_iter().map(str::trim).collect();
            assert_eq!(found, expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_reply_parses_into_spans_of_its_text(reply in "[ \\[\\](),.!?Ss0-9a-zé\n]{0,80}") {
            let parsed = parse_answer(&reply, &live());
            for segment in &parsed.segments {
                proptest::prop_assert!(parsed.text.get(segment.text_span.clone()).is_some());
            }
        }
    }
}
