//! A document of any format, from its first byte to its chunks. The first byte picks the format
//! and the chunk sizes. What is not UTF-8 is an error; everything else has chunks that are byte
//! ranges of the canonical text, in order, apart, and inside the window.

#![no_main]

use exrail_retrieval::testing::FakeEncoder;
use exrail_retrieval::{ChunkOptions, Document, DocumentFormat, chunk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((pick, source)) = bytes.split_first() else { return };
    let format = match pick % 3 {
        0 => DocumentFormat::Markdown,
        1 => DocumentFormat::PlainText,
        _ => DocumentFormat::Html,
    };
    let Ok(document) = Document::parse("d", "d", format, source) else { return };
    let max = 8 + usize::from(pick / 3);
    let options = ChunkOptions { min: max / 3, max, window: max.max(32) };
    let chunked = chunk(&document, &options, &FakeEncoder::new(1)).expect("sizes are in order");
    let mut end = 0;
    for chunk in &chunked.chunks {
        assert!(end <= chunk.span.start && chunk.span.start < chunk.span.end);
        assert_eq!(document.text[chunk.range()], chunk.text);
        assert!((1..=options.window).contains(&chunk.tokens));
        end = chunk.span.end;
    }
});
