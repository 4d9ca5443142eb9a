//! How early a ranking has what it should have: recall, nDCG and the reciprocal rank (guardrails G-24).

/// Discounted cumulative gain with gains of 0 or 1 over the best there could be, in [0, 1] (Järvelin and Kekäläinen,
/// TOIS 2002): `Σ rel_i / log2(i + 1)` over the first `k` places, i from 1. `n_relevant` counts all that there are, found
/// or not; none without any.
#[must_use]
pub fn ndcg(relevant: &[bool], n_relevant: usize, k: usize) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "places are far below 2^52")]
    let discount = |place: usize| 1.0 / ((place + 2) as f64).log2();
    let best: f64 = (0..n_relevant.min(k)).map(discount).sum();
    let found = relevant.iter().take(k).enumerate();
    let gain: f64 = found.filter(|(_, is)| **is).map(|(place, _)| discount(place)).sum();
    (n_relevant > 0).then(|| gain / best)
}

/// One over the place of the first that is relevant, from 1; 0 where none is (Voorhees, TREC-8).
#[must_use]
pub fn reciprocal_rank(relevant: &[bool]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "places are far below 2^52")]
    relevant.iter().position(|is| *is).map_or(0.0, |place| 1.0 / (place + 1) as f64)
}

/// The order of things that two rankings placed, by weighted reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR
/// 2009): `w / (60 + a) + (1 − w) / (60 + b)` for places `a` and `b` from 1, `w` in [0, 1]. What neither placed comes last;
/// equal sums keep their order.
#[must_use]
pub fn fused(places: &[(Option<usize>, Option<usize>)], weight: f64) -> Vec<usize> {
    #[expect(clippy::cast_precision_loss, reason = "places are far below 2^52")]
    let term = |place: Option<usize>| place.map_or(0.0, |place| 1.0 / (60 + place) as f64);
    let score = |at: usize| weight * term(places[at].0) + (1.0 - weight) * term(places[at].1);
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_values() {
        // 1/log2(2) + 1/log2(4) over 1/log2(2) + 1/log2(3): scikit-learn's ndcg_score of [[1, 0, 1]] is 0.9197.
        let found = ndcg(&[true, false, true], 2, 10).unwrap();
        assert!((found - 0.919_720_789_1).abs() < 1e-9, "{found}");
        assert_eq!(ndcg(&[true, true], 2, 10), Some(1.0));
        assert_eq!(ndcg(&[false; 3], 2, 10), Some(0.0));
        assert_eq!(ndcg(&[], 0, 10), None);
        // Of three there is room for one.
        assert_eq!(ndcg(&[true, false], 3, 1), Some(1.0));
        assert!((reciprocal_rank(&[false, false, true]) - 1.0 / 3.0).abs() < 1e-12);
        assert!(reciprocal_rank(&[false]).abs() < 1e-12);
    }

    #[test]
    fn the_weight_goes_from_one_ranking_to_the_other() {
        let places = [(Some(1), Some(9)), (None, Some(1)), (Some(2), Some(2)), (None, None)];
        assert_eq!(fused(&places, 1.0), [0, 2, 1, 3]);
        assert_eq!(fused(&places, 0.0), [1, 2, 0, 3]);
        assert_eq!(fused(&places, 0.5), [2, 0, 1, 3]);
    }

    proptest! {
        #[test]
        fn shares_lie_between_nothing_and_all(relevant in prop::collection::vec(any::<bool>(), 0..40), k in 1_usize..50) {
            let n = relevant.iter().filter(|is| **is).count();
            let rank = reciprocal_rank(&relevant);
            prop_assert!((0.0..=1.0).contains(&rank));
            if let Some(share) = ndcg(&relevant, n, k) {
                prop_assert!((0.0..=1.0 + 1e-12).contains(&share));
            }
        }

        #[test]
        fn whoever_moves_what_is_right_forward_loses_nothing(
            mut relevant in prop::collection::vec(any::<bool>(), 2..40), at in 0_usize..38,
        ) {
            let at = at % (relevant.len() - 1);
            let n = relevant.iter().filter(|is| **is).count();
            let before = (ndcg(&relevant, n, 10), reciprocal_rank(&relevant));
            if !relevant[at] && relevant[at + 1] {
                relevant.swap(at, at + 1);
            }
            prop_assert!(ndcg(&relevant, n, 10) >= before.0);
            prop_assert!(reciprocal_rank(&relevant) >= before.1);
        }
    }
}
