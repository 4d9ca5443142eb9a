//! A short way to the end of an answer.
//!
//! The search goes where a person would: closing brackets and quotes first, then the shortest values, and from each
//! state the best choice costs nothing while each worse one costs more. So the first path is greedy, and where it
//! does not end within the bound, paths with one worse choice follow, then with two. What is bound to follow is
//! taken whole. All of it happens on a copy of the state. A thought is closed first, by what closes one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use exrail_text::tools::Thoughts;

use crate::{Mask, Matcher, Vocabulary};

/// Masks that a search within one of at most four bounds may compute.
const MOST_MASKS: usize = 500;
/// Ways that go on from one state.
const MOST_WAYS: usize = 12;
/// A mask with at most so many tokens is looked at whole.
const FEW: usize = 64;

/// Control tokens that may close a free text.
const FEW_ENDS: usize = 4;

/// Tokens that end things, the best first, and tokens that fill what must be long.
#[derive(Debug)]
pub(crate) struct Closers {
    /// Nothing but closing brackets.
    brackets: Vec<u32>,
    /// A quote, and brackets behind it.
    quotes: Vec<u32>,
    /// Quotes, values, punctuation and single bytes.
    others: Vec<u32>,
    /// Words, the longest first.
    fillers: Vec<u32>,
    /// A sign that JSON has in strings only.
    text_only: Option<u32>,
    /// A line's end, which no string of JSON holds.
    line: Option<u32>,
    /// Tokens that are no text. One of them may close a thought.
    special: Vec<u32>,
}

impl Closers {
    /// Of a vocabulary, by what its tokens say.
    pub(crate) fn of(words: &[Vec<u8>], is_special: impl Fn(u32) -> bool) -> Closers {
        let mut ranked: Vec<(u32, Reverse<usize>, u32)> = Vec::new();
        let mut fillers: Vec<(Reverse<usize>, u32)> = Vec::new();
        let (mut text_only, mut line, mut special) = (None, None, Vec::new());
        for (id, word) in (0..).zip(words) {
            if is_special(id) {
                special.push(id);
                continue;
            }
            if word.is_empty() {
                continue;
            }
            let rank = rank(word);
            if rank < Rank::Text as u32 || word.len() == 1 {
                ranked.push((rank, Reverse(word.len()), id));
            } else if word.len() > 2 && word.iter().all(u8::is_ascii_lowercase) {
                fillers.push((Reverse(word.len()), id));
            }
            if word == b"~" {
                text_only = Some(id);
            }
            if word == b"\n" {
                line = Some(id);
            }
        }
        ranked.sort_unstable();
        fillers.sort_unstable();
        let n_brackets = ranked.partition_point(|it| it.0 == Rank::Brackets as u32);
        let quotes = ranked.iter().map(|it| it.2).filter(|&id| {
            let word = &words[id as usize];
            word[0] == b'"' && rank(word) == Rank::Quote as u32
        });
        let quotes = quotes.collect();
        let ids = |of: &[(u32, Reverse<usize>, u32)]| of.iter().map(|it| it.2).collect();
        Closers {
            brackets: ids(&ranked[..n_brackets]),
            quotes,
            others: ids(&ranked[n_brackets..]),
            fillers: fillers.iter().take(FEW).map(|it| it.1).collect(),
            text_only,
            line,
            special,
        }
    }

    /// What may close a free text: a control token, or the words that close a thought. None where the mask is of
    /// something else; a string of JSON holds no line's end.
    fn ends_of_text(&self, mask: &Mask, vocabulary: &Vocabulary) -> Vec<Vec<u32>> {
        let allows = |id: Option<u32>| id.is_some_and(|id| mask.allows(id));
        if !allows(self.text_only) || !allows(self.line) {
            return Vec::new();
        }
        let special = self.special.iter().filter(|&&id| mask.allows(id) && !vocabulary.is_end(id));
        let mut ends: Vec<Vec<u32>> = special.take(FEW_ENDS).map(|&id| vec![id]).collect();
        ends.extend(Thoughts::ends().map(|text| vocabulary.spell(text)));
        ends
    }

    /// The best tokens of a mask. Where text may stand, a bracket closes nothing.
    fn best(&self, mask: &Mask) -> Vec<u32> {
        let is_text = self.text_only.is_some_and(|id| mask.allows(id));
        let some = |ids: &[u32], most: usize| -> Vec<u32> {
            ids.iter().copied().filter(|&id| mask.allows(id)).take(most).collect()
        };
        if is_text {
            let mut ids = some(&self.quotes, MOST_WAYS / 3);
            ids.extend(some(&self.fillers, 2));
            ids.extend(some(&self.brackets, 1));
            return ids;
        }
        let mut ids = some(&self.brackets, MOST_WAYS / 3);
        ids.extend(some(&self.others, MOST_WAYS / 2));
        ids
    }
}

/// What a token does for an end, the best first.
#[derive(Clone, Copy)]
enum Rank {
    Brackets,
    Quote,
    Separator,
    Value,
    Punctuation,
    Text,
    Blank,
}

fn rank(word: &[u8]) -> u32 {
    let all = |set: &[u8]| word.iter().all(|byte| set.contains(byte));
    let rank = if all(b"}]") {
        Rank::Brackets
    } else if (word[0] == b'"' && word[1..].iter().all(|it| b"}]".contains(it)))
        || [&b"\"\""[..], b"{}", b"[]", b"[]}", b"{}}"].contains(&word)
    {
        Rank::Quote
    } else if b",:".contains(&word[0]) && all(b"\"{}[],:") {
        // Before a digit: a number need not go on.
        Rank::Separator
    } else if [&b"null"[..], b"true", b"false"].contains(&word)
        || (word.len() == 1 && word[0].is_ascii_digit())
    {
        Rank::Value
    } else if all(b"\"{}[],:") {
        Rank::Punctuation
    } else if word.iter().all(u8::is_ascii_whitespace) {
        Rank::Blank
    } else {
        Rank::Text
    };
    rank as u32
}

/// A path of choices from the start of the search.
struct Path {
    tokens: Vec<u32>,
    cost: u32,
}

/// A way from the state of `matcher`, which is not complete, to a complete one. Short ways are looked for first: a
/// greedy path that never ends costs no more than its bound.
pub(crate) fn search(matcher: &mut Matcher, most: usize) -> Option<Vec<u32>> {
    let mask = matcher.mask().ok()?;
    let vocabulary = matcher.vocabulary().clone();
    // Any text goes on for ever, and only one leads out of a thought: letter by letter nobody would find it.
    for mut way in vocabulary.closers().ends_of_text(&mask, &vocabulary) {
        let mut behind = matcher.deep_clone();
        if way.len() > most || way.iter().any(|&id| behind.advance(id).is_err()) {
            continue;
        }
        if let Some(rest) = search_bounds(&behind, most - way.len()) {
            way.extend(rest);
            return Some(way);
        }
    }
    search_bounds(matcher, most)
}

fn search_bounds(matcher: &Matcher, most: usize) -> Option<Vec<u32>> {
    let bounds = [12, 40, 120].into_iter().filter(|&bound| bound < most).chain([most]);
    for bound in bounds {
        let found = search_within(matcher.deep_clone(), bound);
        if found.is_some() {
            return found;
        }
    }
    None
}

fn search_within(matcher: Matcher, most: usize) -> Option<Vec<u32>> {
    let mut walker = Walker { matcher, tokens: Vec::new() };
    let mut paths = vec![Path { tokens: Vec::new(), cost: 0 }];
    // The cheapest first; of these the longest, which is nearest to an end.
    let mut open = BinaryHeap::from([(Reverse(0_u32), 0_usize, 0_usize)]);
    let mut n_masks = 0;
    while let Some((_, _, at)) = open.pop() {
        let from = std::mem::take(&mut paths[at].tokens);
        let cost = paths[at].cost;
        if !walker.go_to(&from) || !walker.take_forced(most) {
            continue;
        }
        if walker.matcher.is_complete() {
            return Some(walker.tokens);
        }
        if walker.tokens.len() >= most {
            continue;
        }
        n_masks += 1;
        if n_masks > MOST_MASKS {
            return None;
        }
        let Ok(mask) = walker.matcher.mask() else { continue };
        for (worse, id) in (0..).zip(ways(&mask, walker.matcher.vocabulary())) {
            let mut tokens = walker.tokens.clone();
            tokens.push(id);
            let cost = cost + worse;
            open.push((Reverse(cost), tokens.len(), paths.len()));
            paths.push(Path { tokens, cost });
        }
    }
    None
}

/// Tokens that a path may go on with, the best first.
fn ways(mask: &Mask, vocabulary: &Vocabulary) -> Vec<u32> {
    if mask.n_allowed() <= FEW {
        let mut ids: Vec<u32> =
            mask.ids().filter(|&id| !vocabulary.text_of(id).is_empty()).collect();
        ids.sort_by_key(|&id| Reverse(vocabulary.text_of(id).len()));
        // Tokens that begin with another byte are another choice; those that begin alike say more or less of one.
        let mut n_alike = [0_usize; 256];
        let mut ranked: Vec<(u32, usize, u32)> = Vec::with_capacity(ids.len());
        for id in ids {
            let word = vocabulary.text_of(id);
            let alike = &mut n_alike[usize::from(word[0])];
            ranked.push((rank(word), *alike, id));
            *alike += 1;
        }
        ranked.sort_by_key(|&(rank, n_before, _)| (rank, n_before));
        return ranked.into_iter().take(MOST_WAYS).map(|(_, _, id)| id).collect();
    }
    let mut ids = vocabulary.closers().best(mask);
    ids.extend(mask.ids().filter(|&id| !vocabulary.text_of(id).is_empty()).take(MOST_WAYS));
    let mut seen = std::collections::HashSet::new();
    ids.retain(|&id| seen.insert(id));
    ids.truncate(MOST_WAYS);
    ids
}

/// A matcher that goes from one path to another by what they share.
struct Walker {
    matcher: Matcher,
    tokens: Vec<u32>,
}

impl Walker {
    /// Whether the path can be gone.
    fn go_to(&mut self, path: &[u32]) -> bool {
        let shared = self.tokens.iter().zip(path).take_while(|(a, b)| a == b).count();
        if self.matcher.roll_back(self.tokens.len() - shared).is_err() {
            return false;
        }
        self.tokens.truncate(shared);
        path[shared..].iter().all(|&id| self.take(id))
    }

    fn take(&mut self, id: u32) -> bool {
        let is_taken = self.matcher.advance(id).is_ok();
        if is_taken {
            self.tokens.push(id);
        }
        is_taken
    }

    /// Takes what is bound to follow; false where that leads beyond the bound.
    fn take_forced(&mut self, most: usize) -> bool {
        loop {
            if self.matcher.is_complete() {
                return true;
            }
            let forced = self.matcher.forced();
            if forced.is_empty() {
                return true;
            }
            if self.tokens.len() + forced.len() > most {
                return false;
            }
            for id in forced {
                if !self.take(id) {
                    // The mask knows better than the spelling; it decides.
                    return true;
                }
                if self.matcher.is_complete() {
                    return true;
                }
            }
        }
    }
}
