//! The largest of a row, sixteen values at a time, against its definition by pairs.

use exrail_kernels::Largest;
use proptest::prelude::*;

fn by_pairs(values: &[f32]) -> Largest {
    let each = (0_u32..).zip(values).map(|(index, &value)| Largest { index, value });
    each.reduce(Largest::or).expect("not empty")
}

/// Few different values, so that there are ties, and zeros of both signs among them.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        12 => (-4_i8..4).prop_map(f32::from),
        4 => any::<f32>().prop_filter("finite", |x| x.is_finite()),
        1 => Just(-0.0),
    ]
}

proptest! {
    #[test]
    fn it_is_the_first_of_the_largest(values in prop::collection::vec(value(), 1..70)) {
        let (found, expected) = (Largest::of(&values), by_pairs(&values));
        prop_assert_eq!(found.index, expected.index);
        prop_assert_eq!(found.value.to_bits(), expected.value.to_bits());
    }

    #[test]
    fn nothing_is_found_beside_what_is_no_number(
        mut values in prop::collection::vec(value(), 1..70),
        place in any::<prop::sample::Index>(),
        fault in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let place = place.index(values.len());
        values[place] = fault;
        prop_assert!(Largest::of(&values).value.is_nan());
        prop_assert!(by_pairs(&values).value.is_nan() || values.len() == 1);
    }
}
