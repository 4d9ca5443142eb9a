//! Rotation (guardrails G-16): what becomes of an answer that outgrows its place in the cache.
//!
//! A sequence that may rotate owns pages for `rotate_at` tokens and not for its whole answer. When prompt
//! and answer have grown to that many, `reprefill` makes its context the pinned ranges of the prompt and the
//! last `window` tokens, computed anew from position 0 by the ordinary prefill; so that what follows is what
//! a fresh request with these tokens would get. Everything that is not the cache stays: the sampler with
//! its counts and its random numbers, the text and its stop strings, the caller's channel. Penalties see the
//! whole history.
//!
//! `sink_window` keeps the first `sink` tokens as well (Xiao et al. 2023, arXiv:2309.17453, §3.2), and keeps
//! keys and values as they are: they move to the front of the sequence's pages, and keys turn to their new
//! positions. No prefill is needed, and what is kept still encodes what was dropped; so that nobody else may
//! read it, and no fresh sequence gives the same.
//!
//! Ranges are counted over the history, which is prompt and answer from the prompt's first token, however
//! often it was rotated. A rotation loses what it drops; it is no cure for a model that fails beyond its
//! trained range (§1.6.3).

use std::ops::Range;

use crate::error::SubmitError;
use crate::open_json::OpenJson;

/// Largest `rotate_at` that nobody asked for.
pub const DEFAULT_ROTATE_AT: usize = 8192;
/// Largest window that nobody asked for.
pub const DEFAULT_WINDOW: usize = 4096;
/// First tokens that `sink_window` keeps when nobody says how many.
pub const DEFAULT_SINK: usize = 4;
/// Most tokens by which an open JSON value puts a rotation off.
pub const MAX_HELD_TOKENS: usize = 512;
/// Most tokens of an answer that may rotate; others end with their context.
pub const MAX_ROTATED_TOKENS: usize = 1 << 17;

/// What happens to a sequence that reaches `rotate_at`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RotatePolicy {
    /// None may reach it: prompt plus `max_tokens` must fit the context.
    #[default]
    Off,
    /// Its context is built anew from the pinned ranges and the last tokens.
    Reprefill,
    /// The first tokens, the pinned ranges and the last tokens stay in the cache and are renumbered there.
    SinkWindow,
    /// The answer ends.
    Stop,
}

impl RotatePolicy {
    /// Its name in options and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            RotatePolicy::Off => "off",
            RotatePolicy::Reprefill => "reprefill",
            RotatePolicy::SinkWindow => "sink_window",
            RotatePolicy::Stop => "stop",
        }
    }
}

/// When a sequence is rotated and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RotationOptions {
    /// What happens.
    pub policy: RotatePolicy,
    /// Tokens of prompt and answer at which it happens, above the prompt's and at most the context. `None` of
    /// a request: the engine's, or where the prompt is as long, the context less a reserve, or else the
    /// context; the reserve is 512 tokens, at most a quarter of the context. `None` of an engine: 8192, or the
    /// context less the reserve if that is smaller.
    pub rotate_at: Option<usize>,
    /// Last tokens that are kept, at least 1; with the pinned ones at most three quarters of `rotate_at`,
    /// or else nearly every token would be a prefill. `None` of a request: the engine's, as far as the pinned
    /// ones leave room. `None` of an engine: 4096, at most half of `rotate_at`.
    pub window: Option<usize>,
    /// First tokens of prompt and answer that are kept, at least 1; of [`RotatePolicy::SinkWindow`] alone,
    /// where they count as pinned. `None` of a request: the engine's. `None` of an engine: 4.
    pub sink: Option<usize>,
}

/// Rotation of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rotation {
    /// When and how.
    pub options: RotationOptions,
    /// Ranges of the prompt's tokens that are never dropped. A BOS in front is kept in any case.
    pub pinned: Vec<Range<usize>>,
    /// Whether a rotation waits while the answer stands in an open JSON value, for 512 tokens at most (less
    /// where the context ends); then the answer ends instead.
    pub waits_for_json: bool,
}

/// One rotation, as the caller is told. Ranges are over prompt and answer, from the prompt's first token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotated {
    /// How.
    pub policy: RotatePolicy,
    /// What left the context, in order.
    pub dropped: Vec<Range<usize>>,
    /// What the context is made of from here on, in order.
    pub kept: Vec<Range<usize>>,
    /// Tokens at which it was due.
    pub rotate_at: usize,
    /// Tokens of the context before.
    pub tokens_before: usize,
    /// Tokens of the context after.
    pub tokens_after: usize,
}

/// What a request's rotation comes to, with nothing left open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RotationPlan {
    way: Way,
    rotate_at: usize,
    window: usize,
    /// Tokens by which it may be put off.
    hold: usize,
    waits_for_json: bool,
    /// In order, disjoint, not empty; the sinks among them.
    pinned: Vec<Range<usize>>,
}

/// What becomes of a sequence whose context is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It ends.
    End,
    /// It is computed anew from what is kept.
    Anew,
    /// What is kept moves inside its pages.
    InPlace,
}

/// What a request asks of its place in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lengths {
    pub(crate) prompt: usize,
    pub(crate) max_tokens: usize,
    /// Whether the prompt begins with a BOS.
    pub(crate) has_bos: bool,
    /// Positions that a sequence can have.
    pub(crate) context: usize,
    /// The engine's, for what a request leaves open.
    pub(crate) usual: RotationOptions,
}

impl Lengths {
    fn reserve(self) -> usize {
        MAX_HELD_TOKENS.min(self.context / 4)
    }

    /// The first default above the prompt. `None`: the prompt does not fit at all.
    fn default_rotate_at(self) -> Option<usize> {
        let usual = self.context - self.reserve();
        let first = self.usual.rotate_at.unwrap_or(DEFAULT_ROTATE_AT.min(usual));
        [first, usual, self.context].into_iter().find(|&at| at > self.prompt)
    }
}

impl RotationPlan {
    /// Checks a request's rotation and decides what it leaves open. `None`: the sequence never rotates, and
    /// prompt plus `max_tokens` must fit the context.
    ///
    /// # Errors
    /// [`SubmitError::BadOption`] naming the field, [`SubmitError::TooManyTokens`] beyond
    /// [`MAX_ROTATED_TOKENS`].
    pub(crate) fn of(
        rotation: &Rotation,
        lengths: Lengths,
    ) -> Result<Option<RotationPlan>, SubmitError> {
        let pinned = pinned(rotation, lengths)?;
        let options = rotation.options;
        for (field, asked) in [("rotation.window", options.window), ("rotation.sink", options.sink)]
        {
            if asked == Some(0) {
                return Err(bad(field, "at least 1", 0));
            }
        }
        let way = match options.policy {
            RotatePolicy::Off => return Ok(None),
            RotatePolicy::SinkWindow => Way::InPlace,
            RotatePolicy::Reprefill => Way::Anew,
            RotatePolicy::Stop => Way::End,
        };
        let Some(rotate_at) = rotate_at(options, lengths)? else { return Ok(None) };
        let Lengths { prompt, max_tokens, context, .. } = lengths;
        let never = max_tokens <= rotate_at - prompt;
        if never && options.window.is_none() && options.sink.is_none() {
            return Ok(None);
        }
        let n_pinned = pinned.iter().map(ExactSizeIterator::len).sum();
        let window = match way {
            Way::End => Some(0),
            Way::Anew | Way::InPlace => window(options.window, n_pinned, rotate_at, lengths)?,
        };
        // What was asked for is checked, needed or not.
        let Some(window) = window.filter(|_| !never) else { return Ok(None) };
        if max_tokens > MAX_ROTATED_TOKENS {
            let limit = MAX_ROTATED_TOKENS;
            return Err(SubmitError::TooManyTokens { prompt_tokens: prompt, max_tokens, limit });
        }
        let waits_for_json = rotation.waits_for_json && way != Way::End;
        let hold = if waits_for_json { MAX_HELD_TOKENS.min(context - rotate_at) } else { 0 };
        Ok(Some(RotationPlan { way, rotate_at, window, hold, waits_for_json, pinned }))
    }

    /// Whether it writes pages that it has filled: they must be its own.
    pub(crate) fn is_in_place(&self) -> bool {
        self.way == Way::InPlace
    }

    /// Positions of the cache that it needs.
    pub(crate) fn positions(&self) -> usize {
        self.rotate_at + self.hold
    }
}

/// Where it rotates; `None`: the prompt does not fit, which is refused elsewhere.
fn rotate_at(options: RotationOptions, lengths: Lengths) -> Result<Option<usize>, SubmitError> {
    let Lengths { prompt, context, .. } = lengths;
    let Some(asked) = options.rotate_at else { return Ok(lengths.default_rotate_at()) };
    if asked > context {
        let expected = "at most the context";
        let found = format!("{asked}, with a context of {context}");
        return Err(SubmitError::BadOption { field: "rotation.rotate_at", expected, found });
    }
    if asked <= prompt {
        let expected = "more than the prompt has tokens";
        let found = format!("{asked}, with a prompt of {prompt}");
        return Err(SubmitError::BadOption { field: "rotation.rotate_at", expected, found });
    }
    Ok(Some(asked))
}

/// Last tokens that are kept beside the pinned ones. `None`: the pinned ones leave too little of what
/// nobody asked for, and the sequence fits the context without a rotation.
fn window(
    asked: Option<usize>,
    n_pinned: usize,
    rotate_at: usize,
    lengths: Lengths,
) -> Result<Option<usize>, SubmitError> {
    let most = rotate_at * 3 / 4;
    let usual = lengths.usual.window.unwrap_or(DEFAULT_WINDOW.min(rotate_at / 2));
    let usual = usual.min(most.saturating_sub(n_pinned));
    let window = asked.unwrap_or(usual);
    let least = (rotate_at / 8).min(lengths.usual.window.unwrap_or(usize::MAX));
    let is_enough = asked.is_some() || window >= least;
    if is_enough && n_pinned.saturating_add(window) <= most {
        return Ok(Some(window));
    }
    if asked.is_none() && lengths.max_tokens <= lengths.context - lengths.prompt {
        return Ok(None);
    }
    let expected = "at least an eighth of rotate_at, with the pinned tokens at most three quarters";
    let found = format!("{window}, beside {n_pinned} pinned, of {rotate_at}");
    Err(SubmitError::BadOption { field: "rotation.window", expected, found })
}

fn bad(field: &'static str, expected: &'static str, found: impl ToString) -> SubmitError {
    SubmitError::BadOption { field, expected, found: found.to_string() }
}

/// The pinned ranges in order, disjoint, with the BOS and the sinks.
fn pinned(rotation: &Rotation, lengths: Lengths) -> Result<Vec<Range<usize>>, SubmitError> {
    for range in &rotation.pinned {
        if range.start >= range.end || range.end > lengths.prompt {
            let expected = "ranges of the prompt's tokens that are not empty";
            let found = format!("{range:?} of {}", lengths.prompt);
            return Err(SubmitError::BadOption { field: "rotation.pinned", expected, found });
        }
    }
    let bos = lengths.has_bos.then_some(0..1);
    let sink = rotation.options.sink.or(lengths.usual.sink).unwrap_or(DEFAULT_SINK);
    let sinks = (rotation.options.policy == RotatePolicy::SinkWindow).then_some(0..sink);
    Ok(union(rotation.pinned.iter().cloned().chain(bos).chain(sinks).collect()))
}

/// The same elements, in order and disjoint.
fn union(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            Some(_) | None => merged.push(range),
        }
    }
    merged
}

/// What of `all` is in `part` and what is not; both in order and disjoint, and so are the results.
fn split(all: &[Range<usize>], part: &[Range<usize>]) -> [Vec<Range<usize>>; 2] {
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for range in all {
        let mut at = range.start;
        for other in part {
            let cut = other.start.max(at)..other.end.min(range.end);
            if cut.start < cut.end {
                outside.extend((at < cut.start).then_some(at..cut.start));
                at = cut.end;
                inside.push(cut);
            }
        }
        outside.extend((at < range.end).then_some(at..range.end));
    }
    [inside, outside]
}

/// The positions of `kept` in a context that is made of `context`. Each range of the one lies in one of the
/// other, as those of [`split`] do.
fn positions(context: &[Range<usize>], kept: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut positions = Vec::with_capacity(kept.len());
    let mut first = 0;
    for whole in context {
        let inside = kept.iter().filter(|part| whole.start <= part.start && part.end <= whole.end);
        let place =
            |part: &Range<usize>| first + part.start - whole.start..first + part.end - whole.start;
        positions.extend(inside.map(place));
        first += whole.len();
    }
    positions
}

/// Whether it is time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    No,
    Now,
    /// The answer is to end instead.
    End,
}

/// What a rotation kept of a context.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) rotated: Rotated,
    /// Positions that they had, in order.
    pub(crate) positions: Vec<Range<usize>>,
}

/// The rotation of an admitted sequence.
#[derive(Debug)]
pub(crate) struct Rotating {
    plan: RotationPlan,
    /// From the first rotation on; before, it is the context.
    history: Vec<u32>,
    /// Ranges of the history that are the context, in order; the last one grows.
    context: Vec<Range<usize>>,
    json: OpenJson,
}

impl Rotating {
    pub(crate) fn new(plan: RotationPlan, n_prompt: usize) -> Rotating {
        let context = std::iter::once(0..n_prompt).collect();
        Rotating { plan, history: Vec::new(), context, json: OpenJson::default() }
    }

    /// Prompt and answer so far; `tokens` is the context.
    pub(crate) fn history<'a>(&'a self, tokens: &'a [u32]) -> &'a [u32] {
        if self.history.is_empty() { tokens } else { &self.history }
    }

    /// Notes a token that joined the context, and what it shows.
    pub(crate) fn push(&mut self, id: u32, bytes: &[u8]) {
        if let Some(last) = self.context.last_mut() {
            last.end += 1;
        }
        if !self.history.is_empty() {
            self.history.push(id);
        }
        if self.plan.waits_for_json {
            self.json.push(bytes);
        }
    }

    /// See [`RotationPlan::is_in_place`].
    pub(crate) fn is_in_place(&self) -> bool {
        self.plan.is_in_place()
    }

    /// What of JSON is open.
    pub(crate) fn json(&self) -> OpenJson {
        self.json.clone()
    }

    /// Forgets the last `n` tokens, none of which was there at the last rotation.
    pub(crate) fn go_back(&mut self, n: usize, json: OpenJson) {
        if let Some(last) = self.context.last_mut() {
            last.end -= n;
        }
        self.history.truncate(self.history.len().saturating_sub(n));
        self.json = json;
    }

    /// Whether a context of so many tokens may not become longer.
    pub(crate) fn is_full(&self, n_tokens: usize) -> bool {
        n_tokens >= self.plan.rotate_at
    }

    /// Whether it waits while an open value is written.
    pub(crate) fn waits(&self) -> bool {
        self.plan.waits_for_json
    }

    /// Whether a context of so many tokens is to be rotated. `is_open`: whether its grammar stands inside a
    /// value, where it has one, which knows better than the text.
    pub(crate) fn due(&self, n_tokens: usize, is_open: Option<bool>) -> Due {
        let RotationPlan { way, rotate_at, hold, .. } = self.plan;
        let is_open = is_open.unwrap_or_else(|| self.json.is_open());
        match (self.is_full(n_tokens), is_open) {
            (false, _) => Due::No,
            (true, _) if way == Way::End => Due::End,
            (true, false) => Due::Now,
            (true, true) if n_tokens < rotate_at + hold => Due::No,
            (true, true) => Due::End,
        }
    }

    /// Makes `tokens`, the context, what is kept of it.
    pub(crate) fn rotate(&mut self, tokens: &mut Vec<u32>) -> Kept {
        if self.history.is_empty() {
            self.history.clone_from(tokens);
        }
        let tail = self.history.len().saturating_sub(self.plan.window)..self.history.len();
        let part = union(self.plan.pinned.iter().cloned().chain([tail]).collect());
        let [kept, dropped] = split(&self.context, &part);
        let tokens_before = tokens.len();
        let positions = positions(&self.context, &kept);
        tokens.clear();
        tokens.extend(kept.iter().flat_map(|range| &self.history[range.clone()]));
        self.context.clone_from(&kept);
        let policy = match self.plan.way {
            Way::InPlace => RotatePolicy::SinkWindow,
            Way::Anew => RotatePolicy::Reprefill,
            Way::End => RotatePolicy::Stop,
        };
        let (rotate_at, tokens_after) = (self.plan.rotate_at, tokens.len());
        let rotated = Rotated { policy, dropped, kept, rotate_at, tokens_before, tokens_after };
        Kept { rotated, positions }
    }
}

/// What tests break by hand.
#[cfg(test)]
impl Rotating {
    /// Forgets which ranges are pinned.
    pub(crate) fn unpin(&mut self) {
        self.plan.pinned.clear();
    }

    /// Reads text that no token gave.
    pub(crate) fn push_text(&mut self, bytes: &[u8]) {
        self.json.push(bytes);
    }

    /// Takes every text for one without JSON.
    pub(crate) fn ignore_json(&mut self) {
        self.plan.waits_for_json = false;
        self.json = OpenJson::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONE: RotationOptions =
        RotationOptions { policy: RotatePolicy::Off, rotate_at: None, window: None, sink: None };
    const LENGTHS: Lengths =
        Lengths { prompt: 100, max_tokens: 5000, has_bos: false, context: 2048, usual: NONE };

    fn reprefill() -> Rotation {
        let options =
            RotationOptions { policy: RotatePolicy::Reprefill, ..RotationOptions::default() };
        Rotation { options, ..Rotation::default() }
    }

    fn plan(change: impl FnOnce(&mut Rotation), lengths: Lengths) -> Option<RotationPlan> {
        let mut rotation = reprefill();
        change(&mut rotation);
        RotationPlan::of(&rotation, lengths).unwrap()
    }

    fn refused(change: impl FnOnce(&mut Rotation), lengths: Lengths) -> String {
        let mut rotation = reprefill();
        change(&mut rotation);
        RotationPlan::of(&rotation, lengths).unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_those_of_g16() {
        let at = |context, prompt| {
            let lengths = Lengths { prompt, context, max_tokens: 100_000, ..LENGTHS };
            let plan = plan(|_| {}, lengths).unwrap();
            (plan.rotate_at, plan.window)
        };
        assert_eq!(at(32_768, 10), (8192, 4096));
        assert_eq!(at(8192, 10), (7680, 3840));
        assert_eq!(at(2048, 10), (1536, 768));
        // A prompt is never cut: one that is longer than the default gets more room.
        assert_eq!(at(32_768, 9000), (32_256, 4096));
        assert_eq!(at(32_768, 32_500), (32_768, 4096));
    }

    /// What an operator names is a default as well: it gives way where the prompt leaves it no room.
    #[test]
    fn the_engines_numbers_are_for_what_a_request_leaves_open() {
        let usual = RotationOptions { rotate_at: Some(1000), window: Some(300), ..NONE };
        let with = |prompt, n_pinned| {
            let lengths = Lengths { prompt, usual, ..LENGTHS };
            let plan =
                plan(|r| r.pinned = vec![Range { start: 0, end: n_pinned }], lengths).unwrap();
            (plan.rotate_at, plan.window)
        };
        assert_eq!(with(100, 10), (1000, 300));
        assert_eq!(with(900, 600), (1000, 150));
        assert_eq!(with(1000, 10), (1536, 300));
        let asked = plan(|r| r.options.rotate_at = Some(500), Lengths { usual, ..LENGTHS });
        assert_eq!(asked.map(|plan| (plan.rotate_at, plan.window)), Some((500, 300)));
    }

    #[test]
    fn a_sequence_that_cannot_reach_it_has_no_plan() {
        let with = |max_tokens| Lengths { max_tokens, ..LENGTHS };
        assert_eq!(plan(|_| {}, with(1436)), None, "1536 tokens at its end");
        assert!(plan(|_| {}, with(1437)).is_some());
        assert_eq!(plan(|r| r.options.policy = RotatePolicy::Off, LENGTHS), None);
        // Nothing of the default helps a prompt that is pinned nearly whole; where it fits, it may go on.
        let long = Lengths { prompt: 1400, max_tokens: 600, ..LENGTHS };
        assert_eq!(plan(|r| r.pinned = vec![Range { start: 0, end: 1400 }], long), None);
        let more = Lengths { max_tokens: 700, ..long };
        assert!(
            refused(|r| r.pinned = vec![Range { start: 0, end: 1400 }], more)
                .contains("1400 pinned"),
            "context 2048"
        );
    }

    /// C5 of the field faults: numbers of a client are checked before they are used.
    #[test]
    fn c5_every_number_out_of_range_is_refused_by_name() {
        for (n, field) in [(0, "rotate_at"), (100, "prompt of 100"), (2049, "context of 2048")] {
            let message = refused(|r| r.options.rotate_at = Some(n), LENGTHS);
            assert!(message.contains(field), "{message}");
        }
        for window in [0, 1153, usize::MAX] {
            let message = refused(|r| r.options.window = Some(window), LENGTHS);
            assert!(message.contains("rotation.window"), "{message}");
        }
        assert!(plan(|r| r.options.window = Some(1152), LENGTHS).is_some());
        let short = Lengths { max_tokens: 4, ..LENGTHS };
        assert!(refused(|r| r.options.window = Some(1153), short).contains("rotation.window"));
        let backwards = Range { start: 9, end: 8 };
        for range in [0..101, 5..5, backwards, usize::MAX - 1..usize::MAX] {
            let message = refused(|r| r.pinned = vec![range.clone()], LENGTHS);
            assert!(message.contains("rotation.pinned"), "{message}");
        }
        for max_tokens in [MAX_ROTATED_TOKENS + 1, usize::MAX] {
            let message = refused(|_| {}, Lengths { max_tokens, ..LENGTHS });
            assert!(message.contains("131072"), "{message}");
        }
        for sink in [0, 1153, usize::MAX] {
            let change = |r: &mut Rotation| {
                r.options.policy = RotatePolicy::SinkWindow;
                r.options.sink = Some(sink);
            };
            let message = refused(change, LENGTHS);
            let field = if sink == 0 { "rotation.sink" } else { "rotation.window" };
            assert!(message.contains(field), "{sink}: {message}");
        }
    }

    #[test]
    fn pages_are_for_what_may_be_used_before_a_rotation() {
        let positions = |change: fn(&mut Rotation)| plan(change, LENGTHS).unwrap().positions();
        assert_eq!(positions(|_| {}), 1536);
        assert_eq!(positions(|r| r.waits_for_json = true), 2048);
        let late = |r: &mut Rotation| {
            r.options.rotate_at = Some(2000);
            r.waits_for_json = true;
        };
        assert_eq!(positions(late), 2048, "no further than the context");
    }

    fn rotating(window: usize, pinned: Vec<Range<usize>>, n_prompt: usize) -> Rotating {
        let (rotate_at, hold) = (n_prompt + 10, 5);
        let plan =
            RotationPlan { way: Way::Anew, rotate_at, window, hold, waits_for_json: true, pinned };
        Rotating::new(plan, n_prompt)
    }

    #[test]
    fn ranges_are_over_the_history_however_often_it_rotates() {
        let mut rotating = rotating(4, vec![0..2, 5..6], 10);
        let mut tokens: Vec<u32> = (0..10).collect();
        for id in 10..20 {
            assert_eq!(rotating.due(tokens.len(), None), Due::No);
            tokens.push(id);
            rotating.push(id, b"x");
        }
        assert_eq!(rotating.due(tokens.len(), None), Due::Now);
        let first = rotating.rotate(&mut tokens).rotated;
        assert_eq!(tokens, [0, 1, 5, 16, 17, 18, 19]);
        assert_eq!(first.dropped, [2..5, 6..16]);
        assert_eq!(first.kept, [0..2, 5..6, 16..20]);
        assert_eq!((first.tokens_before, first.tokens_after), (20, 7));
        for id in 20..33 {
            tokens.push(id);
            rotating.push(id, b"x");
        }
        assert_eq!(rotating.history(&tokens), (0..33).collect::<Vec<u32>>());
        let second = rotating.rotate(&mut tokens).rotated;
        assert_eq!(tokens, [0, 1, 5, 29, 30, 31, 32]);
        assert_eq!(second.dropped, [Range { start: 16, end: 29 }]);
    }

    #[test]
    fn an_open_object_waits_so_long_and_then_the_answer_ends() {
        let mut rotating = rotating(4, vec![], 10);
        rotating.push(0, b"so: {\"a\": [1");
        assert_eq!(rotating.due(20, None), Due::No);
        assert_eq!(rotating.due(24, None), Due::No);
        assert_eq!(rotating.due(25, None), Due::End);
        rotating.push(0, b"]}");
        assert_eq!(rotating.due(20, None), Due::Now);
        rotating.push(0, b" {\"b\"");
        assert_eq!(rotating.due(20, None), Due::No);
        rotating.ignore_json();
        assert_eq!(rotating.due(20, None), Due::Now, "mutation: nobody looks");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn kept_and_dropped_are_the_context(
            n_prompt in 1..60_usize,
            window in 1..40_usize,
            cuts in prop::collection::vec((0..60_usize, 1..20_usize), 0..4),
            rounds in 1..5_usize,
        ) {
            let pinned: Vec<_> = cuts
                .into_iter()
                .map(|(start, len)| start.min(n_prompt - 1)..(start.min(n_prompt - 1) + len).min(n_prompt))
                .collect();
            let mut rotating = rotating(window, union(pinned.clone()), n_prompt);
            let mut tokens: Vec<u32> = (0..).take(n_prompt).collect();
            for _ in 0..rounds {
                for _ in 0..window + 3 {
                    let id = u32::try_from(rotating.history(&tokens).len()).unwrap();
                    tokens.push(id);
                    rotating.push(id, b"x");
                }
                let before = tokens.clone();
                let Kept { rotated: told, positions } = rotating.rotate(&mut tokens);
                let flat = |ranges: &[Range<usize>]| -> Vec<u32> {
                    ranges.iter().cloned().flatten().map(|at| u32::try_from(at).unwrap()).collect()
                };
                prop_assert_eq!(&flat(&told.kept), &tokens);
                let at_positions = positions.iter().cloned().flatten().map(|at| before[at]);
                prop_assert_eq!(&at_positions.collect::<Vec<u32>>(), &tokens);
                let mut all = [flat(&told.kept), flat(&told.dropped)].concat();
                all.sort_unstable();
                prop_assert_eq!(&all, &before);
                let n = rotating.history(&tokens).len();
                let stays = |at: usize| pinned.iter().any(|range| range.contains(&at)) || at + window >= n;
                for at in (0..n).filter(|&at| stays(at)) {
                    prop_assert!(tokens.contains(&u32::try_from(at).unwrap()), "{}", at);
                }
            }
        }
    }
}
