//! What a search asks for, what it returns, and how the two rankings become one.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::generation::Generation;
use crate::vectors::dot;
use crate::{Chunk, RetrievalError};

/// The constant of reciprocal rank fusion, from Cormack, Clarke and Büttcher (SIGIR 2009).
const RRF_K: f64 = 60.0;

/// Each ranking is looked at down to this place, or four times `k` if that is more.
const RANKING_DEPTH: usize = 100;

/// How to search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchOptions {
    /// At most so many hits.
    pub k: usize,
    /// Which index ranks.
    pub mode: SearchMode,
    /// Documents that must not be found. Calibration masks the gold document to learn what the
    /// nearest wrong chunk looks like (§1.1.7, set U).
    pub mask_docs: Vec<String>,
}

impl Default for SearchOptions {
    fn default() -> SearchOptions {
        SearchOptions { k: 5, mode: SearchMode::Hybrid, mask_docs: Vec::new() }
    }
}

/// Which index ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SearchMode {
    /// Both, joined by reciprocal rank fusion.
    #[default]
    Hybrid,
    /// BM25 only.
    Lexical,
    /// Cosine only.
    Vector,
}

/// One found chunk. Hits are sorted by (`score_raw` descending, `section_id`, `snippet_id`).
#[derive(Clone, Debug)]
pub struct Hit {
    /// What was found.
    pub chunk: Arc<Chunk>,
    /// The number that ranked it: RRF sum, BM25 or cosine, by mode.
    pub score_raw: f32,
    /// `score_raw` in [0, 1]: RRF divided by its largest possible value 2/61, BM25 by the best
    /// hit's, cosine as (1 + c)/2.
    pub score_norm: f32,
    /// Cosine of question and chunk in [−1, 1], in every mode; ΔS raw is `1 − cosine`.
    pub cosine: f32,
    /// Place in the lexical list from 1, if it was there.
    pub rank_lexical: Option<usize>,
    /// Place in the vector list from 1, if it was there.
    pub rank_vector: Option<usize>,
    /// Place among the hits from 1.
    pub k_pos: usize,
}

/// Searches a generation with the vectors of the question's windows, each (dim).
///
/// The cosine of a chunk is the largest over the windows (§1.1.3). Word statistics of BM25 count
/// masked documents too.
pub(crate) fn search(
    generation: &Generation,
    question: &str,
    windows: &[Vec<f32>],
    options: &SearchOptions,
) -> Result<Vec<Hit>, RetrievalError> {
    let content = &generation.content;
    let masked: BTreeSet<&str> = options.mask_docs.iter().map(String::as_str).collect();
    let visible = |ordinal: usize| !masked.contains(content.chunks[ordinal].doc_id.as_str());
    let cosines = cosines(&content.vectors, windows, content.chunks.len());
    let by_id = |left: usize, right: usize| {
        let key = |ordinal: usize| {
            let chunk = &content.chunks[ordinal];
            (&chunk.section_id, &chunk.snippet_id)
        };
        key(left).cmp(&key(right))
    };
    let by_score = |left: &(usize, f32), right: &(usize, f32)| -> Ordering {
        right.1.total_cmp(&left.1).then_with(|| by_id(left.0, right.0))
    };

    let depth = RANKING_DEPTH.max(options.k.saturating_mul(4));
    let mut near: Vec<(usize, f32)> =
        cosines.iter().copied().enumerate().filter(|(ordinal, _)| visible(*ordinal)).collect();
    near.sort_by(by_score);
    let n_masked = content.chunks.len() - near.len();
    near.truncate(depth);
    let limit = depth.saturating_add(n_masked).min(content.chunks.len());
    let mut worded = generation.lexical.search(question, limit)?;
    worded.retain(|(ordinal, _)| *ordinal < content.chunks.len() && visible(*ordinal));
    worded.sort_by(by_score);
    worded.truncate(depth);

    let mut ranking = match options.mode {
        SearchMode::Hybrid => fuse(&near, &worded),
        SearchMode::Lexical => worded.clone(),
        SearchMode::Vector => near.clone(),
    };
    ranking.sort_by(by_score);
    ranking.truncate(options.k);
    let best = ranking.first().map_or(0.0, |(_, score)| *score);
    let rank_in = |list: &[(usize, f32)], ordinal: usize| {
        list.iter().position(|(other, _)| *other == ordinal).map(|place| place + 1)
    };
    let hits = ranking.into_iter().enumerate().map(|(place, (ordinal, score_raw))| Hit {
        chunk: Arc::clone(&content.chunks[ordinal]),
        score_raw,
        score_norm: normalise(options.mode, score_raw, best),
        cosine: cosines[ordinal],
        rank_lexical: rank_in(&worded, ordinal),
        rank_vector: rank_in(&near, ordinal),
        k_pos: place + 1,
    });
    Ok(hits.collect())
}

/// The largest cosine of each of `count` chunks with one of the windows, in [−1, 1].
fn cosines(vectors: &[f32], windows: &[Vec<f32>], count: usize) -> Vec<f32> {
    let mut cosines = vec![-1f32; count];
    for window in windows {
        for (best, row) in cosines.iter_mut().zip(vectors.chunks_exact(window.len())) {
            *best = best.max(dot(window, row).min(1.0));
        }
    }
    cosines
}

/// Σ 1/(60 + rank) over the lists a chunk is in.
fn fuse(near: &[(usize, f32)], worded: &[(usize, f32)]) -> Vec<(usize, f32)> {
    let mut sums = std::collections::BTreeMap::new();
    for list in [near, worded] {
        let mut rank = 0.0;
        for (ordinal, _) in list {
            rank += 1.0;
            *sums.entry(*ordinal).or_insert(0f64) += 1.0 / (RRF_K + rank);
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "a score is f32, see Hit")]
    sums.into_iter().map(|(ordinal, sum)| (ordinal, sum as f32)).collect()
}

fn normalise(mode: SearchMode, score: f32, best: f32) -> f32 {
    let normalised = match mode {
        SearchMode::Hybrid => score * 61.0 / 2.0,
        SearchMode::Lexical if best > 0.0 => score / best,
        SearchMode::Lexical => 0.0,
        SearchMode::Vector => f32::midpoint(1.0, score),
    };
    normalised.clamp(0.0, 1.0)
}
