//! Draws against their definition, written down as it reads.

use exrail_kernels::{Draw, DrawScratch, Draws, exp_nonpositive};
use proptest::prelude::*;

/// Tokens with their masses and weights, in the order of ids.
type Candidates = Vec<(usize, u128, f32)>;

fn total(candidates: &Candidates) -> u128 {
    candidates.iter().map(|candidate| candidate.1).sum()
}

/// What top-k, top-p and min-p leave.
fn kept(draw: &Draw, logits: &[f32]) -> Candidates {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut left: Candidates = Vec::new();
    for (id, x) in logits.iter().enumerate() {
        let weight = exp_nonpositive((x - max) / draw.temperature);
        let mass = (f64::from(weight) * 2_f64.powi(40)).floor() as u128;
        if mass > 0 {
            left.push((id, mass, weight));
        }
    }
    left.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
    if draw.top_k > 0 {
        left.truncate(draw.top_k as usize);
    }
    let share = (f64::from(draw.top_p) * 2_f64.powi(32)).ceil() as u128;
    let wanted = (share * total(&left)).div_ceil(1 << 32);
    let mut head = Candidates::new();
    for candidate in left {
        if total(&head) >= wanted {
            break;
        }
        head.push(candidate);
    }
    head.retain(|candidate| candidate.2 >= draw.min_p);
    head.sort_by_key(|candidate| candidate.0);
    head
}

fn drawn(draw: &Draw, logits: &[f32]) -> usize {
    let kept = kept(draw, logits);
    let place = u128::from(draw.numerator) * total(&kept) / (1 << 53);
    let mut end = 0;
    for (id, mass, _) in kept {
        end += mass;
        if place < end {
            return id;
        }
    }
    panic!("the place is behind all: {draw:?}");
}

/// Normal-like, of few different values, or all equal.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let wide = prop::collection::vec(-30.0_f32..10.0, 1..600);
    let tied = prop::collection::vec((-4_i8..4).prop_map(f32::from), 1..600);
    let flat = (1..600_usize).prop_map(|n| vec![1.5; n]);
    prop_oneof![4 => wide, 3 => tied, 1 => flat]
}

fn draw() -> impl Strategy<Value = Draw> {
    let temperature = prop_oneof![0.05_f32..5.0, Just(1.0), Just(1e-30)];
    let top_k = prop_oneof![Just(0), 1..20_u32, 1..700_u32, Just(u32::MAX)];
    let top_p = prop_oneof![Just(1.0), 0.001_f32..1.0, Just(1e-12)];
    let min_p = prop_oneof![Just(0.0), 0.0_f32..1.0, Just(1.0)];
    let numerator = prop_oneof![0..1_u64 << 53, Just(0), Just((1 << 53) - 1)];
    (temperature, top_k, top_p, min_p, numerator).prop_map(
        |(temperature, top_k, top_p, min_p, numerator)| Draw {
            temperature,
            top_k,
            top_p,
            min_p,
            numerator,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_draw_is_what_its_definition_says(draw in draw(), logits in logits()) {
        let found = draw.of(&logits, &mut DrawScratch::default());
        prop_assert_eq!(found.index as usize, drawn(&draw, &logits));
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        prop_assert_eq!(found.value, max);
    }
}

/// A scratch that held another row changes nothing, and padding is not drawn from.
#[test]
fn rows_do_not_touch_each_other() {
    let draw = Draw { temperature: 1.0, top_k: 0, top_p: 0.9, min_p: 0.0, numerator: 1 << 52 };
    let rows = [[0.0, 1.0, 2.0, f32::NAN], [5.0, 1.0, -2.0, 100.0], [f32::NAN, 0.0, 0.0, 0.0]];
    let draws = Draws { limit: 3, rows: &[draw, Draw::LARGEST, draw] };
    let found = draws.of_rows(rows.as_flattened(), 4);
    assert_eq!(found[0].index as usize, drawn(&draw, &rows[0][..3]));
    assert_eq!((found[1].index, found[1].value), (0, 5.0));
    assert!(found[2].value.is_nan());
}

/// A draw is a share: of many places, each token gets its part.
#[test]
fn even_places_give_each_token_its_share() {
    let logits = [0.5_f32.ln(), 0.25_f32.ln(), 0.25_f32.ln()];
    let n = 4000_u64;
    let mut counts = [0_u32; 3];
    for i in 0..n {
        let numerator = ((1 << 53) / n) * i + 1;
        let draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, numerator };
        counts[draw.of(&logits, &mut DrawScratch::default()).index as usize] += 1;
    }
    for (count, expected) in counts.into_iter().zip([2000_u32, 1000, 1000]) {
        assert!(count.abs_diff(expected) <= 1, "{counts:?}");
    }
}
