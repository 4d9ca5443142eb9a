//! Cite-then-explain as a grammar (G-15): what a grounded answer may be, token by token.
//!
//! An answer is the refusal token, or sentences of which each stands behind the labels of its sources. The labels
//! are those of the snippets in the prompt, so an invented one cannot be sampled; those in front of one sentence
//! are of one section.

use std::fmt::Write as _;

use crate::prompt::{Live, REFUSAL_TOKEN};

/// Most labels in front of one sentence.
const MAX_LABELS: usize = 3;

/// The grammar of an answer over these snippets, in llguidance's dialect of Lark with the rule `start`.
///
/// A sentence ends with `.`, `!` or `?` and holds no square brackets, and in round ones nothing that
/// [`crate::parse_answer`] reads as a label. Without snippets the refusal token is all there is.
#[must_use]
pub fn cite_lark(live: &Live) -> String {
    let sections = by_section(live);
    let mut lark = String::from("start: REFUSAL");
    if !sections.is_empty() {
        lark.push_str(" | segment+");
    }
    // Writing to a String cannot fail.
    let _infallible = write!(lark, "\nREFUSAL: \"{REFUSAL_TOKEN}\"\n");
    if sections.is_empty() {
        return lark;
    }
    let names: Vec<String> = (0..sections.len()).map(|at| format!("section_{at}")).collect();
    let _infallible = writeln!(lark, "segment: ({}) SENTENCE", names.join(" | "));
    for (name, labels) in names.iter().zip(&sections) {
        let labels: Vec<String> = labels.iter().map(|label| format!("\"[S{label}]\"")).collect();
        let most = labels.len().min(MAX_LABELS);
        let _infallible = writeln!(lark, "{name}: ({}){{1,{most}}}", labels.join(" | "));
    }
    // The blank behind the mark is a part of the sentence: a lexeme that ends in front of it could not go on.
    lark.push_str(
        r#"SENTENCE: /[ ][^\[\]\r\n]*[A-Za-z0-9\u{80}-\u{10FFFF}][^\[\]\r\n]*[.!?]["')]?[ \n]?/ & ~LABEL
LABEL: /(.|\n)*\([ ]*([Ss][0-9]+|[0-9A-Fa-f]{8,})[ ]*[,;)](.|\n)*/
"#,
    );
    lark
}

/// The labels of each section, in the order of its first one.
fn by_section(live: &Live) -> Vec<Vec<usize>> {
    let mut sections: Vec<(&str, Vec<usize>)> = Vec::new();
    for (at, chunk) in live.iter().enumerate() {
        match sections.iter_mut().find(|(section, _)| *section == chunk.section_id) {
            Some((_, labels)) => labels.push(at + 1),
            None => sections.push((&chunk.section_id, vec![at + 1])),
        }
    }
    sections.into_iter().map(|(_, labels)| labels).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use exrail_retrieval::Hit;

    use super::*;
    use crate::fakes::hit;

    fn live() -> Live {
        let mut hits: Vec<Hit> = vec![
            hit("a.md", 0, "A page has 256 tokens.", 0.9),
            hit("b.md", 0, "Rotate the cache.", 0.8),
            hit("a.md", 50, "A page is evicted last.", 0.7),
        ];
        Arc::make_mut(&mut hits[2].chunk).section_id = "a.md#0".into();
        Live::new(&hits)
    }

    #[test]
    fn labels_are_those_of_the_prompt_by_section() {
        let lark = cite_lark(&live());
        assert!(lark.contains("section_0: (\"[S1]\" | \"[S3]\"){1,2}"), "{lark}");
        assert!(lark.contains("section_1: (\"[S2]\"){1,1}"), "{lark}");
        assert!(!lark.contains("[S4]"));
    }

    #[test]
    fn without_snippets_the_refusal_is_all_there_is() {
        let lark = cite_lark(&Live::default());
        assert_eq!(lark, "start: REFUSAL\nREFUSAL: \"not in context\"\n");
    }
}
