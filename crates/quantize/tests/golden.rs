//! Calibration against numpy: golden/quantize/make.py.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::path::Path;

use exrail_quantize::{Codes, Hessian, WeightError, calibrate};
use exrail_tensor::IntGrid;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    bits: u32,
    group: usize,
    rows: usize,
    columns: usize,
    weights_4096: Vec<i16>,
    inputs_16: Vec<i16>,
    scales: Vec<u16>,
    codes: Vec<i8>,
    output_error: f64,
    output_error_nearest: f64,
}

fn golden() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/quantize/calibrated.json");
    serde_json::from_str::<Golden>(&std::fs::read_to_string(path).unwrap()).unwrap().cases
}

#[test]
fn scales_codes_and_errors_are_those_of_numpy() {
    let cases = golden();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let grid = if case.bits == 4 { IntGrid::Int4 } else { IntGrid::Int8 };
        let weights: Vec<f32> = case.weights_4096.iter().map(|&w| f32::from(w) / 4096.0).collect();
        let inputs: Vec<f32> = case.inputs_16.iter().map(|&x| f32::from(x) / 16.0).collect();
        let mut hessian = Hessian::new(case.columns);
        hessian.add(&inputs);
        let found = calibrate("w", grid, &weights, &hessian, case.group).unwrap();
        assert_eq!(found.damping, 0.01);
        assert_eq!(found.codes.rows, case.rows);
        assert_eq!(found.codes.scales, case.scales, "scales, group {}", case.group);
        assert_eq!(found.codes.codes, case.codes, "codes, group {}", case.group);
        let output = |codes: &Codes| {
            let error = WeightError::measure(codes, &weights, Some(&hessian));
            error.output_relative_rms.unwrap()
        };
        let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-9 * b, "{a} {b}");
        close(output(&found.codes), case.output_error);
        let nearest = Codes::nearest(grid, &weights, case.columns, case.group);
        close(output(&nearest), case.output_error_nearest);
    }
}
