//! The oracle of §1.6 over HTTP: what was served, against a fresh prefill of the same tokens.
//!
//! A compared answer tells its token ids and, at each token, the likeliest ones with their log-probabilities. The
//! same tokens are then asked for again with `"prefix_cache": false`, which computes all of them anew.
//! HTTP tells the 20 likeliest tokens and not all, so that the divergence is of these and of the rest as one:
//! never more than the whole one but for a token that only one side has among its 20, which counts on the
//! other as its least likely one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use exrail_metrics::{kld_probabilities, quantile};
use exrail_verify::{Checkpoint, KvWidth, drift};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    http::{self, Target},
    request::TOP,
};

/// Comparisons of one answer: its first token, one within, and its last.
const CHECKPOINTS: usize = 3;
/// Tokens of the answer that the noise is taken of, and between two of its rows.
const NOISE_TOKENS: usize = 32;
const NOISE_EVERY: usize = 4;
/// Longest wait for a prefill.
const PATIENCE: Duration = Duration::from_secs(600);

/// The comparisons of one answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Compared {
    /// How often its context was rotated.
    pub(super) n_rotations: usize,
    /// In the order of positions.
    pub(super) checkpoints: Vec<Checkpoint>,
    /// Of the one with the largest divergence; none without any.
    #[serde(skip)]
    pub(super) worst: Option<Witness>,
}

/// Everything to look at one comparison again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Witness {
    /// In nats.
    pub(super) kl: f64,
    /// Place in the answer.
    pub(super) at: usize,
    /// How often the context of the answer was rotated.
    pub(super) n_rotations: usize,
    /// The tokens in front of it.
    pub(super) context: Vec<u32>,
    /// The likeliest tokens by their text, as served and as prefilled.
    pub(super) live: Map<String, Value>,
    pub(super) fresh: Map<String, Value>,
}

/// What all comparisons come to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct OracleReport {
    /// Answers that were compared, and how many of them were rotated.
    pub(super) n_answers: usize,
    pub(super) n_rotated: usize,
    pub(super) n_checkpoints: usize,
    /// 99th percentile of the divergence on a server without other work, nats.
    pub(super) noise_p99: f64,
    /// Whether that leaves anything to be told.
    pub(super) is_noise_low: bool,
    /// What a divergence may be.
    pub(super) limit: f64,
    pub(super) kl_max: f64,
    /// Of all checkpoints, their median and 99th percentile; none without a checkpoint.
    pub(super) kl_p50: Option<f64>,
    pub(super) kl_p99: Option<f64>,
    /// The comparison with the largest divergence.
    pub(super) worst: Option<Witness>,
    /// Answers that drifted.
    pub(super) drifted: Vec<Compared>,
}

impl OracleReport {
    pub(super) fn of(compared: &[Compared], noise_p99: f64, width: KvWidth) -> Self {
        let limit = width.limit(noise_p99);
        let points = || compared.iter().flat_map(|one| &one.checkpoints);
        let kls: Vec<f64> = points().map(|point| point.kl).collect();
        let drifted = compared.iter().filter(|one| drift(&one.checkpoints, limit).is_some());
        Self {
            n_answers: compared.len(),
            n_rotated: compared.iter().filter(|one| one.n_rotations > 0).count(),
            n_checkpoints: points().count(),
            noise_p99,
            is_noise_low: noise_p99 <= width.least_limit(),
            limit,
            kl_max: kls.iter().copied().fold(0.0, f64::max),
            kl_p50: quantile(&kls, 0.5).ok(),
            kl_p99: quantile(&kls, 0.99).ok(),
            worst: larger(compared.iter().filter_map(|one| one.worst.as_ref())).cloned(),
            drifted: drifted.cloned().collect(),
        }
    }
}

/// A served answer with everything that a comparison needs.
struct Served<'a> {
    prompt: Vec<u32>,
    ids: Vec<u32>,
    /// The likeliest tokens at each one of the answer.
    tops: &'a [Value],
    rotations: &'a [Value],
}

impl<'a> Served<'a> {
    fn of(body: &'a Value) -> Result<Self> {
        let choice = &body["choices"][0];
        let ids = |field: &str| -> Result<Vec<u32>> {
            serde_json::from_value(choice[field].clone())
                .with_context(|| format!("answer: expected `{field}`, found {}", choice[field]))
        };
        let list = |value: &'a Value| value.as_array().map_or(&[][..], Vec::as_slice);
        let served = Self {
            prompt: ids("prompt_token_ids")?,
            ids: ids("token_ids")?,
            tops: list(&choice["logprobs"]["top_logprobs"]),
            rotations: list(&choice["rotations"]),
        };
        let (expected, found) = (served.ids.len(), served.tops.len());
        ensure!(expected == found, "answer: expected {expected} log-probabilities, found {found}");
        Ok(served)
    }

    /// The tokens that the model saw in front of the answer's token `at`.
    fn context(&self, at: usize) -> Result<Vec<u32>> {
        let history = [&self.prompt[..], &self.ids[..at]].concat();
        let before = |rotation: &&Value| rotation["at"].as_u64().is_some_and(|n| n <= at as u64);
        let Some(last) = self.rotations.iter().rev().find(before) else { return Ok(history) };
        let kept: Vec<[usize; 2]> =
            serde_json::from_value(last["kept"].clone()).context("rotation: kept")?;
        let rotated_at = usize::try_from(last["at"].as_u64().unwrap_or(0))?;
        let since = self.prompt.len() + rotated_at;
        let ranges = kept.into_iter().chain([[since, history.len()]]);
        let context: Option<Vec<&[u32]>> = ranges.map(|[from, to]| history.get(from..to)).collect();
        Ok(context.context("rotation: expected ranges of prompt and answer")?.concat())
    }
}

/// Compares an answer at a few of its tokens; none of an answer without a token.
///
/// # Errors
/// The answer lacks what was asked for, or the server did not prefill it again.
pub(super) fn compare(target: Target<'_>, model: &str, body: &Value) -> Result<Compared> {
    let served = Served::of(body)?;
    let last = served.ids.len().checked_sub(1);
    let mut places: Vec<usize> = last
        .into_iter()
        .flat_map(|last| (0..CHECKPOINTS).map(move |n| last * n / (CHECKPOINTS - 1)))
        .collect();
    places.dedup();
    let compared = places.into_iter().map(|at| compare_at(target, model, &served, at));
    let (checkpoints, witnesses): (Vec<_>, Vec<_>) =
        compared.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let worst = larger(witnesses.iter()).cloned();
    Ok(Compared { n_rotations: served.rotations.len(), checkpoints, worst })
}

/// The one with the largest divergence.
fn larger<'a>(witnesses: impl Iterator<Item = &'a Witness>) -> Option<&'a Witness> {
    witnesses.max_by(|a, b| a.kl.total_cmp(&b.kl))
}

/// 99th percentile of the divergence of an answer that had the server for itself.
///
/// # Errors
/// As [`compare`].
pub(super) fn noise(target: Target<'_>, model: &str, prompt: &[u32]) -> Result<f64> {
    let asked = json!({
        "model": model, "prompt": prompt, "max_tokens": NOISE_TOKENS, "temperature": 1.0, "seed": 1,
        "logprobs": TOP, "return_token_ids": true, "loop_guard": false,
    });
    let body = complete(target, &asked)?;
    let served = Served::of(&body)?;
    let places = (0..served.ids.len()).step_by(NOISE_EVERY);
    let points = places.map(|at| Ok(compare_at(target, model, &served, at)?.0.kl));
    Ok(quantile(&points.collect::<Result<Vec<_>>>()?, 0.99)?)
}

fn compare_at(
    target: Target<'_>,
    model: &str,
    served: &Served<'_>,
    at: usize,
) -> Result<(Checkpoint, Witness)> {
    let context = served.context(at)?;
    // Log-probabilities are of the model's own distribution; the bias keeps an end of sequence from
    // being drawn, with which none are told.
    let asked = json!({
        "model": model, "prompt": context, "max_tokens": 1, "temperature": 0.0, "logprobs": TOP,
        "prefix_cache": false, "logit_bias": {served.ids[at].to_string(): 100.0},
    });
    let body = complete(target, &asked)?;
    let fresh = body["choices"][0]["logprobs"]["top_logprobs"][0].as_object();
    let fresh = fresh.with_context(|| format!("prefill: expected log-probabilities: {body}"))?;
    let live = served.tops[at].as_object().context("answer: expected log-probabilities")?;
    let point = checkpoint(context.len(), fresh, live)?;
    let (live, fresh) = (live.clone(), fresh.clone());
    let n_rotations = served.rotations.len();
    Ok((point, Witness { kl: point.kl, at, n_rotations, context, live, fresh }))
}

fn checkpoint(
    tokens: usize,
    fresh: &Map<String, Value>,
    live: &Map<String, Value>,
) -> Result<Checkpoint> {
    let logprob = |value: &Value| value.as_f64().unwrap_or(f64::NEG_INFINITY);
    let mut ranked: Vec<(&str, f64)> =
        fresh.iter().map(|(text, value)| (text.as_str(), logprob(value))).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    let most_likely = live.iter().max_by(|a, b| logprob(a.1).total_cmp(&logprob(b.1)));
    let least = live.values().map(logprob).fold(0.0, f64::min);
    let of_live = |text: &str| live.get(text).map_or(least, logprob);
    let with_rest = |logprobs: Vec<f64>| -> Vec<f64> {
        let mut shares: Vec<f64> = logprobs.into_iter().map(f64::exp).collect();
        // Rounding of single precision, with which log-probabilities are told, is not a difference.
        let rest = (1.0 - shares.iter().sum::<f64>()).max(1e-6);
        shares.push(rest);
        let sum: f64 = shares.iter().sum();
        shares.iter().map(|share| share / sum).collect()
    };
    let p = with_rest(ranked.iter().map(|(_, x)| *x).collect());
    let q = with_rest(ranked.iter().map(|(text, _)| of_live(text)).collect());
    let kl = kld_probabilities(&p, &q)?;
    let best = ranked.first().context("prefill: expected log-probabilities, found none")?;
    let margin = ranked.get(1).map_or(f64::INFINITY, |second| best.1 - second.1);
    let argmax_changed = most_likely.is_none_or(|(text, _)| text != best.0);
    Ok(Checkpoint { tokens, kl, argmax_changed, margin })
}

/// An answer of the raw route, asked again while the server is full.
fn complete(target: Target<'_>, asked: &Value) -> Result<Value> {
    let text = asked.to_string();
    loop {
        let (status, body) =
            http::ask(target, "POST", "/v1/completions", text.as_bytes(), PATIENCE)?;
        if status == 429 {
            std::thread::sleep(Duration::from_millis(200));
            continue;
        }
        ensure!(status == 200, "prefill: expected status 200, found {status}: {body}");
        return serde_json::from_str(&body).context("prefill");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pairs: &[(&str, f64)]) -> Map<String, Value> {
        pairs.iter().map(|(text, p)| ((*text).to_owned(), json!(p.ln()))).collect()
    }

    #[test]
    fn equal_distributions_do_not_diverge_and_others_do() {
        let fresh = row(&[("a", 0.6), ("b", 0.2), ("c", 0.1)]);
        let point = checkpoint(9, &fresh, &fresh).unwrap();
        assert!(point.kl.abs() < 1e-12 && !point.argmax_changed, "{point:?}");
        assert!((point.margin - 3f64.ln()).abs() < 1e-9);
        // By hand: 0.6 ln 2 + 0.2 ln (2/3) + 0.1 ln (1/2) + 0.1 ln (1/3).
        let live = row(&[("a", 0.3), ("b", 0.3), ("c", 0.2)]);
        let point = checkpoint(9, &fresh, &live).unwrap();
        let by_hand = 0.6 * 2f64.ln() + 0.2 * (2.0f64 / 3.0).ln() + 0.1 * 0.5f64.ln();
        let by_hand = by_hand + 0.1 * 0.5f64.ln();
        assert!((point.kl - by_hand).abs() < 1e-9, "{} {by_hand}", point.kl);
        // Tokens that have nothing in common diverge, instead of being the rest on both sides.
        let other = row(&[("x", 0.6), ("y", 0.2), ("z", 0.1)]);
        let point = checkpoint(9, &fresh, &other).unwrap();
        assert!(point.kl > 0.5 && point.argmax_changed, "{point:?}");
    }

    fn answer() -> Value {
        let tops: Vec<Value> = (0..5).map(|_| json!(row(&[("a", 0.9)]))).collect();
        json!({"choices": [{
            "prompt_token_ids": [1, 2, 3, 4], "token_ids": [5, 6, 7, 8, 9],
            "logprobs": {"top_logprobs": tops},
            "rotations": [{"at": 2, "kept": [[0, 1], [4, 6]]}, {"at": 4, "kept": [[0, 1], [6, 8]]}],
        }]})
    }

    /// Each token of an answer is compared behind what the model saw then.
    #[test]
    fn a_rotated_context_is_what_was_kept_and_what_came_since() {
        let body = answer();
        let served = Served::of(&body).unwrap();
        let contexts: Vec<Vec<u32>> = (0..5).map(|at| served.context(at).unwrap()).collect();
        assert_eq!(contexts[1], [1, 2, 3, 4, 5]);
        assert_eq!(contexts[2], [1, 5, 6]);
        assert_eq!(contexts[3], [1, 5, 6, 7]);
        assert_eq!(contexts[4], [1, 7, 8]);
        let mut lacking = body.clone();
        lacking["choices"][0]["token_ids"] = json!([5]);
        assert!(Served::of(&lacking).is_err());
    }

    #[test]
    fn one_slip_is_none_two_are_drift_and_loud_noise_is_told() {
        let point = |kl| Checkpoint { tokens: 9, kl, argmax_changed: false, margin: 1.0 };
        let compared = |kls: [f64; 3]| Compared {
            n_rotations: 1,
            checkpoints: kls.map(point).into(),
            worst: None,
        };
        let all = [compared([0.0, 0.02, 0.0]), compared([0.02, 0.02, 0.0])];
        let report = OracleReport::of(&all, 0.0, KvWidth::Sixteen);
        assert_eq!((report.drifted.len(), report.n_rotated, report.n_checkpoints), (1, 2, 6));
        assert!((report.kl_max - 0.02).abs() < 1e-12 && report.is_noise_low);
        assert!(report.kl_p50 <= report.kl_p99 && report.kl_p99 <= Some(report.kl_max));
        let noisy = OracleReport::of(&all, 0.02, KvWidth::Sixteen);
        assert!(!noisy.is_noise_low && noisy.drifted.is_empty());
    }
}
