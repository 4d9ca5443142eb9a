//! What a search asks for and what it returns. The work is in `collection`.

use std::sync::Arc;

use crate::Chunk;

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
    /// `score_raw` in [0, 1]: RRF and BM25 divided by the best hit's score, cosine as (1 + c)/2.
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
