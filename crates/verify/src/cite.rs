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
    write_labels(&mut lark, &sections);
    // The blank behind the mark is a part of the sentence: a lexeme that ends in front of it could not go on.
    lark.push_str(
        r#"SENTENCE: /[ ][^\[\]\r\n]*[A-Za-z0-9\u{80}-\u{10FFFF}][^\[\]\r\n]*[.!?]["')]?[ \n]?/ & ~LABEL
"#,
    );
    lark.push_str(LABEL);
    lark
}

/// The grammar of one step of an answer whose beginning is `so_far` (G-20): one sentence behind its labels, or nothing,
/// which is the end. The first step may be the refusal token, and is not nothing.
///
/// A sentence ends where [`crate::parse_answer`] ends it. Behind its last mark may stand the bracket that begins the
/// next label: so a model says that the answer goes on, and is not made to go on otherwise.
#[must_use]
pub fn step_lark(live: &Live, so_far: &str) -> String {
    let sections = by_section(live);
    let mut lark = match (so_far.is_empty(), sections.is_empty()) {
        (true, true) => return cite_lark(live),
        (true, false) => format!("start: REFUSAL | segment\nREFUSAL: \"{REFUSAL_TOKEN}\"\n"),
        (false, true) => return "start: \"\"\n".to_owned(),
        (false, false) => "start: (BLANK segment)?\nBLANK: /[ \\n]/\n".to_owned(),
    };
    write_labels(&mut lark, &sections);
    // A mark with a blank behind it is the end, but for an abbreviation and the number of a list, and a closing
    // quote lets a sentence go on.
    lark.push_str(
        r#"SENTENCE: /[ ]([0-9]+[.][ ])?(ABBR[ ])*([^\[\]\r\n.!?]|[.!?]+[^\[\]\r\n.!? ]|[ ](ABBR[ ])+)*[.!?]+["')]?([ \n]\[?)?/ & WORD & ~LABEL
WORD: /(.|\n)*[A-Za-z0-9\u{80}-\u{10FFFF}](.|\n)*/
"#
        .replace("ABBR", r"(e\.g\.|i\.e\.|etc\.|vs\.|cf\.|approx\.|no\.)")
        .as_str(),
    );
    lark.push_str(LABEL);
    lark
}

/// A bracket that would be read as a label inside a sentence.
const LABEL: &str = "LABEL: /(.|\\n)*\\([ ]*([Ss][0-9]+|[0-9A-Fa-f]{8,})[ ]*[,;)](.|\\n)*/\n";

/// A segment, and the labels that may stand in front of its sentence.
fn write_labels(lark: &mut String, sections: &[Vec<usize>]) {
    let names: Vec<String> = (0..sections.len()).map(|at| format!("section_{at}")).collect();
    // Writing to a String cannot fail.
    let _infallible = writeln!(lark, "segment: ({}) SENTENCE", names.join(" | "));
    for (name, labels) in names.iter().zip(sections) {
        let labels: Vec<String> = labels.iter().map(|label| format!("\"[S{label}]\"")).collect();
        let most = labels.len().min(MAX_LABELS);
        let _infallible = writeln!(lark, "{name}: ({}){{1,{most}}}", labels.join(" | "));
    }
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
        assert_eq!(step_lark(&Live::default(), ""), lark);
        assert_eq!(step_lark(&Live::default(), "[S1] A page."), "start: \"\"\n");
    }

    #[test]
    fn a_step_is_a_segment_and_the_first_one_the_refusal_or_a_segment() {
        let (first, next) = (step_lark(&live(), ""), step_lark(&live(), "[S1] A page."));
        assert!(first.starts_with("start: REFUSAL | segment\n"), "{first}");
        assert!(
            next.starts_with("start: (BLANK segment)?\n") && !next.contains("REFUSAL"),
            "{next}"
        );
        for lark in [first, next] {
            assert!(lark.contains("section_0: (\"[S1]\" | \"[S3]\"){1,2}"), "{lark}");
            assert!(!lark.contains("[S4]") && lark.ends_with(LABEL), "{lark}");
        }
    }
}
