//! What an ingest did and what G-23 wants measured about it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::vectors::dot;
use crate::{Chunk, Chunked, Document};

/// What an ingest did. Sizes and duplicates are those of the whole collection afterwards.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IngestReport {
    /// Documents that were not there before, by `doc_id`.
    pub added: Vec<String>,
    /// Documents whose revision or source changed.
    pub replaced: Vec<String>,
    /// Documents that were there as they are.
    pub unchanged: Vec<String>,
    /// Documents that were taken out.
    pub removed: Vec<String>,
    /// Documents of this ingest that gave no chunk.
    pub without_chunks: Vec<String>,
    /// Documents now.
    pub n_documents: usize,
    /// Chunks now.
    pub n_chunks: usize,
    /// Chunks that were embedded in this ingest.
    pub n_embedded: usize,
    /// Chunk sizes in tokens; `None` without chunks.
    pub sizes: Option<Spread>,
    /// σ/μ of the sizes; G-23 wants at most 0.20.
    pub size_variation: Option<f64>,
    /// Count of chunks per ten tokens: `[i]` counts sizes in [10·i, 10·i + 10).
    pub size_histogram: Vec<usize>,
    /// Chunks under `min` tokens that could not be joined inside their section.
    pub below_min: usize,
    /// Groups of `snippet_id` with the same text.
    pub duplicates: Vec<Vec<String>>,
    /// Cuts inside a sentence, row or line in the documents of this ingest.
    pub forced_cuts: usize,
    /// Headings without content in the documents of this ingest.
    pub bare_headings: usize,
    /// Stretches without tokens in the documents of this ingest.
    pub without_tokens: usize,
    /// Lines that look like page headers or footers (`Page 3 of 9`, a number alone) in the
    /// documents of this ingest. They are reported, not removed.
    pub page_lines: usize,
    /// Raw ΔS of adjacent chunks of a document, a diagnostic and no gate (ledger C-10).
    pub ds_join: Option<Spread>,
    /// [`crate::Collection::index_hash`] now.
    pub index_hash: String,
    /// Name of the generation on disk now.
    pub generation: String,
}

/// A distribution by a few numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Count.
    pub n: usize,
    /// Smallest.
    pub min: f64,
    /// 10th percentile, nearest rank.
    pub p10: f64,
    /// Median, nearest rank.
    pub median: f64,
    /// 90th percentile, nearest rank.
    pub p90: f64,
    /// Largest.
    pub max: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard deviation over n.
    pub sd: f64,
}

impl Spread {
    /// The spread of finite values; `None` without values.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let n = values.len();
        let rank = |percent: usize| values[(n * percent).div_ceil(100).clamp(1, n) - 1];
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        let count = n as f64;
        let mean = values.iter().sum::<f64>() / count;
        let square: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let sd = (square / count).sqrt();
        Some(Spread { n, min, p10: rank(10), median: rank(50), p90: rank(90), max, mean, sd })
    }
}

/// What the cutting of this ingest's documents adds up to.
#[derive(Debug, Default)]
pub(crate) struct CutCounts {
    pub(crate) forced_cuts: usize,
    pub(crate) bare_headings: usize,
    pub(crate) without_tokens: usize,
    pub(crate) page_lines: usize,
    pub(crate) without_chunks: Vec<String>,
}

impl CutCounts {
    pub(crate) fn add(&mut self, document: &Document, chunked: &Chunked) {
        self.forced_cuts += chunked.forced_cuts;
        self.bare_headings += chunked.bare_headings;
        self.without_tokens += chunked.without_tokens;
        self.page_lines += document.text.lines().filter(|line| is_page_line(line)).count();
        if chunked.chunks.is_empty() {
            self.without_chunks.push(document.doc_id.clone());
        }
    }
}

/// `Page 3`, `Page 3 of 9`, `3 / 9`, `- 3 -`, `3`.
fn is_page_line(line: &str) -> bool {
    let lower = line.trim().to_lowercase();
    let rest = lower.strip_prefix("page").unwrap_or(&lower).replace("of", "/");
    let digits = rest.chars().filter(char::is_ascii_digit).count();
    (1..=8).contains(&digits)
        && rest.chars().all(|c| c.is_ascii_digit() || matches!(c, '/' | '-' | '|' | ' '))
}

/// Token sizes of chunks as numbers.
#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
pub(crate) fn sizes<'a>(chunks: impl Iterator<Item = &'a Chunk>) -> Vec<f64> {
    chunks.map(|chunk| chunk.tokens as f64).collect()
}

/// Counts per ten tokens.
pub(crate) fn histogram<'a>(chunks: impl Iterator<Item = &'a Chunk>) -> Vec<usize> {
    let mut counts = Vec::new();
    for chunk in chunks {
        let bin = chunk.tokens / 10;
        if counts.len() <= bin {
            counts.resize(bin + 1, 0);
        }
        counts[bin] += 1;
    }
    counts
}

/// Groups of snippets with equal text, in order of first appearance of their text's hash.
pub(crate) fn duplicates<'a>(chunks: impl Iterator<Item = &'a Chunk>) -> Vec<Vec<String>> {
    let mut groups: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for chunk in chunks {
        groups.entry(&chunk.text_sha256).or_default().push(chunk.snippet_id.clone());
    }
    groups.into_values().filter(|group| group.len() > 1).collect()
}

/// `1 − cosine` of each pair of neighbours in one document; `vectors` (chunks, dim).
pub(crate) fn joins<'a>(
    chunks: impl Iterator<Item = &'a Chunk>,
    vectors: &[f32],
    dim: usize,
) -> Vec<f64> {
    let rows: Vec<(&Chunk, &[f32])> = chunks.zip(vectors.chunks_exact(dim)).collect();
    let pairs = rows.windows(2).filter(|pair| pair[0].0.doc_id == pair[1].0.doc_id);
    pairs.map(|pair| 1.0 - f64::from(dot(pair[0].1, pair[1].1))).collect()
}
