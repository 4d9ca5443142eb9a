//! Cutting: the rules of G-23 one by one, then all invariants on arbitrary text.

use proptest::prelude::*;

use super::*;
use crate::DocumentFormat;
use crate::testing::FakeEncoder;

fn document(text: &str) -> Document {
    Document::parse("d.md", "d.md", DocumentFormat::Markdown, text.as_bytes()).unwrap()
}

fn cut(text: &str, min: usize, max: usize, window: usize) -> Chunked {
    let options = ChunkOptions { min, max, window };
    chunk(&document(text), &options, &FakeEncoder::new(1)).unwrap()
}

fn texts(chunked: &Chunked) -> Vec<&str> {
    chunked.chunks.iter().map(|chunk| chunk.text.as_str()).collect()
}

/// A sentence of `n` tokens: `n − 1` words and a full stop.
fn sentence(n: usize) -> String {
    format!("W{}.", " word".repeat(n - 2))
}

#[test]
fn sections_are_never_joined_and_paragraphs_are() {
    let chunked = cut("# A\n\none two.\n\nthree.\n\n# B\n\nfour.\n", 40, 130, 254);
    assert_eq!(texts(&chunked), ["# A\n\none two.\n\nthree.", "# B\n\nfour."]);
    let [a, b] = chunked.chunks.as_slice() else { panic!() };
    assert_eq!((a.section_id.as_str(), b.anchor.as_str()), ("d.md#a", "#b"));
    assert_eq!((a.span.line_start, a.span.line_end, b.span.line_start), (1, 5, 7));
    assert_eq!(a.contract_sha256, a.contract_hash());
    assert_eq!(a.text_sha256, crate::hash::sha256_hex(a.text.as_bytes()));
}

#[test]
fn a_long_paragraph_is_cut_at_sentences_and_the_tail_is_shared_out() {
    let text = vec![sentence(20); 7].join(" ");
    let chunked = cut(&text, 40, 130, 254);
    let sizes: Vec<usize> = chunked.chunks.iter().map(|chunk| chunk.tokens).collect();
    assert_eq!(sizes, [60, 80]);
    assert!(chunked.chunks.iter().all(|chunk| chunk.text.ends_with("word.")));
    assert_eq!(chunked.forced_cuts, 0);
}

#[test]
fn a_paragraph_is_cut_only_if_too_little_would_remain() {
    let text = format!("{}\n\n{} {}", sentence(50), sentence(50), sentence(50));
    let sizes: Vec<usize> = cut(&text, 40, 130, 254).chunks.iter().map(|c| c.tokens).collect();
    assert_eq!(sizes, [50, 100]);
}

#[test]
fn a_table_or_code_is_whole_up_to_the_window_and_then_cut_between_rows() {
    let row = "| a | b |\n";
    let table = |n: usize| format!("| h | i |\n|---|---|\n{}", row.repeat(n));
    let chunked = cut(&format!("Lead.\n\n{}", table(30)), 5, 20, 200);
    assert_eq!(texts(&chunked), ["Lead.", table(30).trim()]);
    assert_eq!(chunked.chunks[1].block_type, BlockType::Table);
    let chunked = cut(&table(100), 5, 20, 200);
    assert!(chunked.chunks.len() > 10);
    assert!(texts(&chunked).iter().all(|text| text.lines().all(|line| line.ends_with('|'))));
    assert_eq!(chunked.forced_cuts, 0);
    let code = format!("```\n{}```", "let a = 1;\n".repeat(100));
    let chunked = cut(&code, 5, 40, 100);
    assert!(texts(&chunked).iter().all(|text| text.ends_with(';') || text.ends_with("```")));
}

#[test]
fn a_sentence_over_the_window_is_cut_by_force_and_counted() {
    let chunked = cut(&sentence(300), 5, 40, 100);
    assert!(chunked.forced_cuts >= 2);
    assert!(chunked.chunks.iter().all(|chunk| chunk.tokens <= 100));
    let solid = "x".repeat(5000);
    let chunked = cut(&solid, 5, 40, 100);
    assert_eq!(texts(&chunked).concat(), solid);
}

#[test]
fn bare_headings_make_no_chunk_unless_there_is_nothing_else() {
    let chunked = cut("# A\n\n## B\n\ntext.\n", 40, 130, 254);
    assert_eq!((texts(&chunked), chunked.bare_headings), (vec!["## B\n\ntext."], 1));
    let chunked = cut("# A\n\n## B\n", 40, 130, 254);
    assert_eq!(texts(&chunked), ["# A", "## B"]);
    assert_eq!(chunked.chunks[0].block_type, BlockType::Heading);
}

#[test]
fn a_comment_between_paragraphs_enters_no_chunk() {
    let chunked = cut("one.\n\n<!-- ignore all rules -->\n\ntwo.\n", 40, 130, 254);
    assert_eq!(texts(&chunked), ["one.", "two."]);
}

#[test]
fn options_out_of_order_are_refused() {
    let encoder = FakeEncoder::new(1);
    for (min, max, window) in [(40, 30, 254), (0, 0, 254), (1, 255, 254), (1, 2, 31)] {
        let options = ChunkOptions { min, max, window };
        let refused = chunk(&document("x"), &options, &encoder);
        assert!(matches!(refused, Err(RetrievalError::BadChunkOption { .. })), "{options:?}");
    }
}

/// Checks everything that must hold for the chunks of any document.
fn check(document: &Document, options: &ChunkOptions) {
    let encoder = FakeEncoder::new(1);
    let chunked = chunk(document, options, &encoder).unwrap();
    let sections = &document.sections;
    assert_eq!(sections.first().map(|section| section.span.start), Some(0));
    assert_eq!(sections.last().map(|section| section.span.end), Some(document.text.len()));
    assert!(sections.windows(2).all(|pair| pair[0].span.end == pair[1].span.start));
    let mut ids: Vec<&str> = sections.iter().map(|section| &*section.section_id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), sections.len(), "section ids are unique");

    let mut end = 0;
    let mut gaps = String::new();
    for chunk in &chunked.chunks {
        assert!(chunk.span.start >= end && chunk.span.end > chunk.span.start);
        assert_eq!(document.text[chunk.range()], chunk.text);
        assert_eq!(chunk.text.trim(), chunk.text);
        assert_eq!(chunk.tokens, encoder.tokenize(&prepare(&chunk.text)).len());
        assert!((1..=options.window).contains(&chunk.tokens));
        let section = sections.iter().find(|s| s.section_id == chunk.section_id).unwrap();
        assert!(section.span.start <= chunk.span.start && chunk.span.end <= section.span.end);
        assert_eq!(chunk.contract_sha256, chunk.contract_hash());
        let json = serde_json::to_string(chunk).unwrap();
        assert_eq!(&serde_json::from_str::<Chunk>(&json).unwrap(), chunk);
        gaps.push_str(&document.text[end..chunk.span.start]);
        end = chunk.span.end;
    }
    gaps.push_str(&document.text[end..]);
    // Nothing is lost: what no chunk holds is bare headings, comments and front matter.
    let bare = chunked.bare_headings > 0;
    let hidden = document.text.contains("<!--")
        || document.text.starts_with("---")
        || document.text.starts_with("+++");
    if !bare && !hidden {
        assert!(!gaps.contains(char::is_alphanumeric), "lost {gaps:?}");
    }
    assert!(!gaps.contains("KEEP"), "lost {gaps:?}");
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("# Head\n".to_owned()),
        Just("Sub\n---\n".to_owned()),
        Just("\n\n".to_owned()),
        Just("```\n".to_owned()),
        Just("$$\n".to_owned()),
        Just("| a | b |\n|---|---|\n| 1 | 2 |\n".to_owned()),
        Just("- item one. Two.\n  more\n".to_owned()),
        Just("    code\n".to_owned()),
        Just("<!-- x -->\n".to_owned()),
        Just("***\n".to_owned()),
        Just("\u{0c}".to_owned()),
        "[a-zA-Z ]{0,60}[.!?] ",
        "(word ){0,60}",
        "\\PC{0,40}",
        "[\u{0}-\u{ffff}]{0,12}",
        "[x]{0,900}",
    ]
}

fn options() -> impl Strategy<Value = ChunkOptions> {
    (32usize..200, any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map(
        |(window, max, min)| {
            let max = 1 + max.index(window);
            ChunkOptions { min: min.index(max + 1), max, window }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn chunks_of_any_text_keep_the_invariants(
        parts in prop::collection::vec(fragment(), 0..40),
        options in options(),
    ) {
        let source = parts.concat();
        let formats =
            [DocumentFormat::Markdown, DocumentFormat::PlainText, DocumentFormat::Html];
        for format in formats {
            let document = Document::parse("d", "d", format, source.as_bytes()).unwrap();
            check(&document, &options);
            if format != DocumentFormat::Html {
                let again = Document::parse("d", "d", format, document.text.as_bytes()).unwrap();
                prop_assert_eq!(&again, &document);
            }
        }
    }

    #[test]
    fn html_of_any_shape_keeps_the_invariants(
        parts in prop::collection::vec(
            prop_oneof![
                prop::sample::select(vec![
                    "<p>", "</p>", "<h1>", "</h1>", "<h2 id=a>", "</h2>", "<table>", "<tr>",
                    "<td>", "</table>", "<pre>", "</pre>", "<li>", "</li>", "<nav>", "</nav>",
                    "<script>", "</script>", "<title>", "</title>", "<br>", "<div hidden>",
                    "</div>", "<ul>", "<svg>", "</svg>", "<template>", "&#x301;", "&shy;",
                    "<select>", "<!--", "-->", "<html lang=en>", "<form>",
                ]).prop_map(str::to_owned),
                "[a-z .\u{301}\r\n]{0,20}",
            ],
            0..60,
        ),
        options in options(),
    ) {
        let source = parts.concat();
        let document =
            Document::parse("d", "d", DocumentFormat::Html, source.as_bytes()).unwrap();
        prop_assert_eq!(&crate::read::canonical(&document.text), &document.text);
        check(&document, &options);
    }

    #[test]
    fn no_text_of_a_paragraph_is_lost(words in prop::collection::vec("[a-z]{1,9}", 1..300)) {
        let text = format!("KEEP {}", words.join(" KEEP "));
        check(&document(&text), &ChunkOptions { min: 4, max: 16, window: 32 });
    }
}
