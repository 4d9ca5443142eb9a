//! The statistics agree with numpy and scipy; `golden/metrics/make.py` wrote the expected values.

#![expect(clippy::unwrap_used, reason = "a golden file of another shape is a failed test")]

use exrail_metrics::{
    Fidelity, LogProbabilities, Tost, auroc, kld_from_logits, quantile, theil_sen, tost, wilson,
};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../golden/metrics/statistics.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "the file holds f32 values")]
fn logits(value: &Value) -> Vec<f32> {
    numbers(value).into_iter().map(|x| x as f32).collect()
}

fn near(found: f64, expected: &Value) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found} ≠ {expected}");
}

#[test]
fn quantile_is_numpys_linear_method() {
    for case in golden()["quantile"].as_array().unwrap() {
        let p = case["p"].as_f64().unwrap();
        near(quantile(&numbers(&case["values"]), p).unwrap(), &case["expected"]);
    }
}

#[test]
fn auroc_is_the_scaled_mann_whitney_u() {
    for case in golden()["auroc"].as_array().unwrap() {
        let found = auroc(&numbers(&case["lower"]), &numbers(&case["higher"])).unwrap();
        near(found, &case["expected"]);
    }
}

#[test]
fn wilson_is_scipys() {
    for case in golden()["wilson"].as_array().unwrap() {
        let count = |key: &str| usize::try_from(case[key].as_u64().unwrap()).unwrap();
        let interval = wilson(count("successes"), count("trials")).unwrap();
        near(interval.low, &case["low"]);
        near(interval.high, &case["high"]);
    }
}

#[test]
fn theil_sen_is_scipys() {
    for case in golden()["theil_sen"].as_array().unwrap() {
        let line = theil_sen(&numbers(&case["x"]), &numbers(&case["y"])).unwrap();
        near(line.slope, &case["slope"]);
        near(line.intercept, &case["intercept"]);
    }
}

#[test]
fn kld_is_scipys_entropy() {
    for case in golden()["kld"].as_array().unwrap() {
        let found = kld_from_logits(&logits(&case["reference"]), &logits(&case["other"])).unwrap();
        near(found, &case["expected"]);
    }
}

#[test]
fn fidelity_is_numpys() {
    for case in golden()["fidelity"].as_array().unwrap() {
        let rows = |key: &str| -> Vec<LogProbabilities> {
            let rows = case[key].as_array().unwrap().iter();
            rows.map(|row| LogProbabilities::of(&logits(row)).unwrap()).collect()
        };
        let (reference, other) = (rows("reference"), rows("other"));
        let count = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
        let following = case["following"].as_array().unwrap();
        let (mut fidelity, mut at) = (Fidelity::default(), 0);
        for n in case["lengths"].as_array().unwrap().iter().map(count) {
            fidelity.begin_sequence();
            for end in (0..n).rev() {
                let next = (end > 0).then(|| count(&following[at]));
                fidelity.add(&reference[at], &other[at], next).unwrap();
                at += 1;
            }
        }
        let found = serde_json::to_value(fidelity.summary().unwrap()).unwrap();
        for key in [
            "kld_mean",
            "kld_mean_se",
            "kld_median",
            "kld_p99",
            "kld_max",
            "top1",
            "ln_ppl_ratio",
            "ln_ppl_ratio_se",
            "rms_dp",
        ] {
            match found[key].as_f64() {
                Some(value) => near(value, &case[key]),
                None => assert!(case[key].is_null(), "{key}"),
            }
        }
    }
}

#[test]
fn tost_is_scipys_two_one_sided_tests() {
    for case in golden()["tost"].as_array().unwrap() {
        let margin = case["margin"].as_f64().unwrap();
        let (found, interval) = tost(&numbers(&case["values"]), margin).unwrap();
        near(interval.low, &case["low"]);
        near(interval.high, &case["high"]);
        for (name, of) in [("same", Tost::Same), ("above", Tost::Above), ("below", Tost::Below)] {
            assert_eq!(case[name], found == of, "{name}: {found:?}");
        }
    }
}
