//! E_resonance (§1.4): how far a long reply goes from what it was asked, window by window.
//!
//! It is a number for those who know it from elsewhere. What gates on quantisation is the divergence of the
//! distributions, and on long runs the oracle of the cache.

use std::collections::BTreeMap;

use exrail_metrics::{
    Interval, MODE_MARGIN, MODE_PROMPTS, TREND_MARGIN, TREND_SIZE, Tost, mean, residual, spikes,
    theil_sen, tost,
};
use exrail_retrieval::Encode;
use serde::Serialize;

use crate::encode::{Side, TextVectors};
use crate::error::VerifyError;
use crate::evaluate::{Progress, Stage, sample};
use crate::gold::{GoldItem, GoldKind, GoldSet};
use crate::prompt::FrameMessage;
use crate::quant::QuantMode;
use crate::system::GenerateError;

/// Tokens of a window, and the least and most of one that ends with a sentence.
const WINDOW: (usize, usize, usize) = (64, 48, 96);
/// Windows at the beginning that a trend leaves out.
const SETTLING: usize = 2;
/// Windows at the end whose mean residual is `e_res`.
const SHOWN: usize = 5;
/// Tokens of a reply of the trend: the windows that it needs, with room for sentences that end late.
pub const TREND_TOKENS: usize = TREND_SIZE.1 * WINDOW.0 * 11 / 10;
/// Tokens of a reply that is compared between modes.
pub const MODE_TOKENS: usize = 512;
/// Replies that are asked for at once.
const AT_ONCE: usize = 8;

/// A generator that writes on as long as it is asked to.
pub trait WriteOn {
    /// A reply of so many tokens to each of these messages of a user, in their order, whatever would end one otherwise.
    ///
    /// # Errors
    /// The generator failed.
    fn write_on(
        &self,
        asked: &[(&FrameMessage, u64)],
        n_tokens: usize,
    ) -> Result<Vec<Vec<Said>>, GenerateError>;
}

/// One token of a reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// What became certain with it; often empty.
    pub text: String,
    /// Entropy of the distribution that it was drawn from, nats.
    pub entropy: f64,
}

/// One reply, window by window.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplyWindows {
    /// The item.
    pub id: String,
    /// Tokens up to the end of each window.
    pub ends: Vec<usize>,
    /// `√(2·ΔS)` of the window and what was asked, raw ΔS; none of a window without a word.
    pub residuals: Vec<Option<f64>>,
    /// Mean entropy of its tokens, nats.
    pub entropies: Vec<f64>,
}

/// E over long replies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResonanceSection {
    /// `flat`, `rising`, `falling` or `inconclusive`.
    pub trend: &'static str,
    /// Mean over the replies of the Theil–Sen slope of the residual per 1,000 tokens.
    pub slope_per_1k: f64,
    /// 90 % interval of it; `flat` is one within ±0.02.
    pub interval: [f64; 2],
    /// Mean over the replies of the mean of the last five residuals.
    pub e_res: f64,
    /// Windows whose residual, or whose entropy, is more than twice the median of its reply.
    pub spikes: [usize; 2],
    /// Replies.
    pub replies: usize,
    /// Windows.
    pub windows: usize,
    /// What it was computed from.
    #[serde(skip)]
    pub observed: Vec<ReplyWindows>,
}

/// Whether E of a mode is that of the reference (§1.4.4).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResonanceDifference {
    /// `flat`: the same; `rising`, `falling`: the mode's is greater or less; `inconclusive`.
    pub found: &'static str,
    /// Mean difference of the mean residuals, prompt by prompt.
    pub mean: f64,
    /// 90 % interval of it; `flat` is one within ±0.05.
    pub interval: [f64; 2],
    /// Spikes of the mode beyond those of the reference; more than none is not flat.
    pub more_spikes: usize,
    /// Prompts.
    pub prompts: usize,
}

/// Asks so many answerable questions to be answered at such a length. What stands in the prompt is what a window is
/// compared with.
///
/// # Errors
/// The generator or the encoder failed.
pub fn long_replies(
    generator: &dyn WriteOn,
    encoder: &dyn Encode,
    gold: &GoldSet,
    (n_replies, n_tokens, seed): (usize, usize, u64),
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<ReplyWindows>, VerifyError> {
    let items: Vec<&GoldItem> = gold.of_kind(GoldKind::Answerable).collect();
    let chosen = sample(&items, Some(n_replies), seed, |item| &item.id);
    let mut vectors = TextVectors::new(encoder);
    let mut replies = Vec::with_capacity(chosen.len());
    for group in chosen.chunks(AT_ONCE) {
        let goals: Vec<FrameMessage> = group.iter().map(|item| goal(&item.question)).collect();
        let asked: Vec<(&FrameMessage, u64)> = goals.iter().map(|goal| (goal, seed)).collect();
        let written = generator.write_on(&asked, n_tokens)?;
        for ((item, goal), said) in group.iter().zip(&goals).zip(written) {
            replies.push(windows_of(&item.id, goal, &said, &mut vectors)?);
        }
        let (n_done, n_total) = (replies.len(), chosen.len());
        progress(Progress { stage: Stage::Write, n_done, n_total });
    }
    Ok(replies)
}

fn goal(question: &str) -> FrameMessage {
    let content = format!("Explain at length and in detail. {question}");
    FrameMessage { role: "user", content }
}

fn windows_of(
    id: &str,
    goal: &FrameMessage,
    said: &[Said],
    vectors: &mut TextVectors<'_>,
) -> Result<ReplyWindows, VerifyError> {
    let mut windows = ReplyWindows {
        id: id.to_owned(),
        ends: Vec::new(),
        residuals: Vec::new(),
        entropies: Vec::new(),
    };
    let mut from = 0;
    while let Some(to) = window_end(&said[from..]).map(|n_tokens| from + n_tokens) {
        let text: String = said[from..to].iter().map(|token| token.text.as_str()).collect();
        let ds = vectors.ds((Side::Query, &text), (Side::Query, &goal.content))?;
        windows.ends.push(to);
        windows.residuals.push(ds.value().map(residual));
        let entropies: Vec<f64> = said[from..to].iter().map(|token| token.entropy).collect();
        windows.entropies.push(mean(&entropies)?);
        from = to;
    }
    Ok(windows)
}

/// Tokens of the next window: to the sentence end that is nearest to 64, or 64. None where less is left.
fn window_end(said: &[Said]) -> Option<usize> {
    let (aim, least, most) = WINDOW;
    let ends_sentence = |n: &usize| said[n - 1].text.trim_end().ends_with(['.', '!', '?']);
    let sentence_ends = (least..=most.min(said.len())).filter(ends_sentence);
    let nearest = sentence_ends.min_by_key(|n| n.abs_diff(aim));
    nearest.or_else(|| (said.len() >= aim).then_some(aim))
}

impl ReplyWindows {
    fn known(&self) -> Vec<f64> {
        self.residuals.iter().copied().flatten().collect()
    }

    /// Spikes of residual and entropy.
    fn spikes(&self) -> Result<[usize; 2], VerifyError> {
        Ok([spikes(&self.known())?, spikes(&self.entropies)?])
    }

    /// Slope of the residual per 1,000 tokens, without the windows at the beginning.
    fn slope(&self) -> Result<f64, VerifyError> {
        let points = self.ends.iter().zip(&self.residuals).skip(SETTLING);
        #[expect(clippy::cast_precision_loss, reason = "replies are far below 2^52 tokens")]
        let (x, y): (Vec<f64>, Vec<f64>) =
            points.filter_map(|(end, r)| Some((*end as f64 / 1000.0, (*r)?))).unzip();
        Ok(theil_sen(&x, &y)?.slope)
    }
}

impl ResonanceSection {
    /// The trend of long replies, or why it cannot be told: fewer than 20 of 50 windows each.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn of(replies: Vec<ReplyWindows>) -> Result<Result<ResonanceSection, String>, VerifyError> {
        let (n_replies, n_windows) = TREND_SIZE;
        let long = replies.iter().filter(|reply| reply.known().len() >= n_windows).count();
        if long < n_replies {
            return Ok(Err(format!(
                "needs {n_replies} replies of {n_windows} windows, found {long} of {}",
                replies.len()
            )));
        }
        let slopes = replies.iter().map(ReplyWindows::slope).collect::<Result<Vec<_>, _>>()?;
        let (found, interval) = tost(&slopes, TREND_MARGIN)?;
        let last = |reply: &ReplyWindows| {
            let known = reply.known();
            Ok(mean(&known[known.len().saturating_sub(SHOWN)..])?)
        };
        let shown = replies.iter().map(last).collect::<Result<Vec<f64>, VerifyError>>()?;
        Ok(Ok(ResonanceSection {
            trend: in_words(found),
            slope_per_1k: mean(&slopes)?,
            interval: ends(interval),
            e_res: mean(&shown)?,
            spikes: all_spikes(&replies)?,
            replies: replies.len(),
            windows: replies.iter().map(|reply| reply.ends.len()).sum(),
            observed: replies,
        }))
    }
}

impl ResonanceDifference {
    /// Of a mode against the reference on the same prompts, or why it cannot be told: fewer than 50.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn of(
        mode: &[ReplyWindows],
        reference: &[ReplyWindows],
    ) -> Result<Result<ResonanceDifference, String>, VerifyError> {
        let mut differences = Vec::new();
        for (of, against) in mode.iter().zip(reference).filter(|(of, on)| of.id == on.id) {
            let (of, against) = (of.known(), against.known());
            if !of.is_empty() && !against.is_empty() {
                differences.push(mean(&of)? - mean(&against)?);
            }
        }
        let prompts = differences.len();
        if prompts < MODE_PROMPTS {
            return Ok(Err(format!("needs {MODE_PROMPTS} prompts, found {prompts}")));
        }
        let (found, interval) = tost(&differences, MODE_MARGIN)?;
        let total = |replies: &[ReplyWindows]| Ok::<_, VerifyError>(all_spikes(replies)?[0]);
        let more_spikes = total(mode)?.saturating_sub(total(reference)?);
        let found =
            if found == Tost::Same && more_spikes > 0 { "more_spikes" } else { in_words(found) };
        Ok(Ok(ResonanceDifference {
            found,
            mean: mean(&differences)?,
            interval: ends(interval),
            more_spikes,
            prompts,
        }))
    }
}

/// E of several modes on the same prompts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModeResonance {
    /// Each mode against the served one, and int4 against int8; or why that cannot be told.
    pub differences: BTreeMap<(QuantMode, QuantMode), Result<ResonanceDifference, String>>,
    /// What they were computed from.
    pub observed: BTreeMap<QuantMode, Vec<ReplyWindows>>,
}

impl ModeResonance {
    /// Compares replies at length, mode by mode.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn of(
        observed: BTreeMap<QuantMode, Vec<ReplyWindows>>,
    ) -> Result<ModeResonance, VerifyError> {
        let mut differences = BTreeMap::new();
        for pair in [
            (QuantMode::Int8, QuantMode::AsServed),
            (QuantMode::Int4, QuantMode::AsServed),
            (QuantMode::Int4, QuantMode::Int8),
        ] {
            if let (Some(mode), Some(reference)) = (observed.get(&pair.0), observed.get(&pair.1)) {
                differences.insert(pair, ResonanceDifference::of(mode, reference)?);
            }
        }
        Ok(ModeResonance { differences, observed })
    }
}

fn all_spikes(replies: &[ReplyWindows]) -> Result<[usize; 2], VerifyError> {
    let mut total = [0, 0];
    for reply in replies.iter().filter(|reply| !reply.known().is_empty()) {
        let [residual, entropy] = reply.spikes()?;
        total = [total[0] + residual, total[1] + entropy];
    }
    Ok(total)
}

fn ends(interval: Interval) -> [f64; 2] {
    [interval.low, interval.high]
}

fn in_words(found: Tost) -> &'static str {
    match found {
        Tost::Same => "flat",
        Tost::Above => "rising",
        Tost::Below => "falling",
        Tost::Inconclusive => "inconclusive",
    }
}

#[cfg(test)]
mod tests {
    use exrail_retrieval::testing::FakeEncoder;

    use super::*;
    use crate::fakes::gold_text;

    /// Says the question's words and other ones, in sentences of eight words.
    struct Fake {
        /// Of twelve words so many are other ones, by their place.
        away: fn(usize) -> usize,
        entropy: fn(usize) -> f64,
    }

    impl WriteOn for Fake {
        fn write_on(
            &self,
            asked: &[(&FrameMessage, u64)],
            n_tokens: usize,
        ) -> Result<Vec<Vec<Said>>, GenerateError> {
            let reply = |(message, seed): &(&FrameMessage, u64)| {
                let words: Vec<&str> = message.content.split_whitespace().collect();
                let token = |at: usize| {
                    let word = if at % 12 < (self.away)(at) {
                        format!("w{at}")
                    } else {
                        let nth = at * 7 + usize::try_from(*seed).unwrap();
                        words[nth % words.len()].trim_matches(['.', '?']).to_owned()
                    };
                    let end = if at % 8 == 7 { "." } else { "" };
                    Said { text: format!(" {word}{end}"), entropy: (self.entropy)(at) }
                };
                (0..n_tokens).map(token).collect()
            };
            Ok(asked.iter().map(reply).collect())
        }
    }

    fn replies(fake: &Fake, sizes: (usize, usize)) -> Vec<ReplyWindows> {
        let gold = GoldSet::parse(&gold_text()).unwrap();
        let (encoder, mut n_told) = (FakeEncoder::new(1), 0);
        let asked = (sizes.0, sizes.1, 3);
        let mut told = |step: Progress| n_told = step.n_done;
        let replies = long_replies(fake, &encoder, &gold, asked, &mut told).unwrap();
        assert_eq!(n_told, sizes.0);
        replies
    }

    const STEADY: Fake = Fake { away: |_| 0, entropy: |_| 1.0 };

    #[test]
    fn windows_end_with_a_sentence_near_64_tokens() {
        let said = |ends: &[usize], n: usize| -> Vec<Said> {
            let token = |at: usize| Said {
                text: if ends.contains(&(at + 1)) { " end.".into() } else { " on".into() },
                entropy: 0.0,
            };
            (0..n).map(token).collect()
        };
        assert_eq!(window_end(&said(&[50, 60, 70], 200)), Some(60));
        assert_eq!(window_end(&said(&[40, 97], 200)), Some(64));
        assert_eq!(window_end(&said(&[96], 200)), Some(96));
        assert_eq!(window_end(&said(&[50], 55)), Some(50));
        assert_eq!(window_end(&said(&[40], 63)), None);
    }

    #[test]
    fn a_steady_reply_is_flat_and_one_that_leaves_its_goal_rises() {
        let steady = ResonanceSection::of(replies(&STEADY, (20, TREND_TOKENS))).unwrap().unwrap();
        assert_eq!(steady.trend, "flat", "{steady:?}");
        assert_eq!((steady.replies, steady.spikes), (20, [0, 0]));
        assert!(steady.windows >= 20 * 50 && steady.e_res > 0.0);
        let drifting = Fake { away: |at| at.saturating_sub(400) / 200, entropy: |_| 1.0 };
        let rising = ResonanceSection::of(replies(&drifting, (20, TREND_TOKENS))).unwrap().unwrap();
        assert_eq!(rising.trend, "rising", "{:?}", (rising.slope_per_1k, rising.interval));
        assert!(rising.e_res > steady.e_res);
    }

    #[test]
    fn short_or_few_replies_cannot_tell() {
        for sizes in [(19, TREND_TOKENS), (20, 2000)] {
            let found = ResonanceSection::of(replies(&STEADY, sizes)).unwrap();
            assert!(found.unwrap_err().starts_with("needs 20 replies of 50 windows"));
        }
    }

    #[test]
    fn a_burst_of_entropy_is_a_spike() {
        let bursting = Fake { entropy: |at| if at / 64 == 9 { 9.0 } else { 1.0 }, ..STEADY };
        let found = ResonanceSection::of(replies(&bursting, (20, TREND_TOKENS))).unwrap().unwrap();
        assert_eq!(found.spikes, [0, 20]);
    }

    #[test]
    fn modes_are_compared_prompt_by_prompt() {
        let reference = replies(&STEADY, (50, MODE_TOKENS));
        let same = ResonanceDifference::of(&reference, &reference).unwrap().unwrap();
        assert_eq!((same.found, same.prompts, same.more_spikes), ("flat", 50, 0));
        let away = replies(&Fake { away: |_| 12, ..STEADY }, (50, MODE_TOKENS));
        let other = ResonanceDifference::of(&away, &reference).unwrap().unwrap();
        assert_eq!(other.found, "rising", "{other:?}");
        let few = ResonanceDifference::of(&reference[..49], &reference[..49]).unwrap();
        assert_eq!(few.unwrap_err(), "needs 50 prompts, found 49");
    }
}
