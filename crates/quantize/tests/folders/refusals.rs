//! What is refused, and what the message names.

use std::fs;
use std::path::Path;

use exrail_tensor::IntGrid;

use super::{
    Calibration, QuantizeError, QuantizeOptions, QuantizeProgress, cpu, family, ids, options,
    quantised, quantize,
};

fn refused(source: &Path, destination: &Path, options: &QuantizeOptions) -> QuantizeError {
    quantize(&cpu(), source, destination, options, &mut |_| {}).unwrap_err()
}

/// A copy of a family's folder that may be spoilt.
fn copy(name: &str, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(family(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn an_existing_destination_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let error = refused(&family("llama"), dir.path(), &options(IntGrid::Int4, None));
    assert!(matches!(error, QuantizeError::DestinationExists { .. }), "{error}");
}

#[test]
fn an_unfinished_run_with_other_options_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let destination = dir.path().join("out");
    let killed = std::panic::catch_unwind(|| {
        let stop = &mut |step| {
            assert!(!matches!(step, QuantizeProgress::Quantised { n_done: 2, .. }), "killed");
        };
        quantize(&cpu(), &family("llama"), &destination, &options(IntGrid::Int4, None), stop)
    });
    assert!(killed.is_err());
    for (other, field) in [
        (options(IntGrid::Int8, None), "width: expected 8, found 4"),
        (QuantizeOptions::new(IntGrid::Int4, 64, None).unwrap(), "group: expected 64, found 32"),
        (
            options(IntGrid::Int4, Some(super::calibration())),
            "calibration: expected {\"text_sha256\"",
        ),
    ] {
        let error = refused(&family("llama"), &destination, &other).to_string();
        assert!(error.contains(field), "{error}");
    }
    let error = refused(&family("qwen2"), &destination, &options(IntGrid::Int4, None)).to_string();
    assert!(error.contains("another source"), "{error}");
    quantised(&family("llama"), &destination, &options(IntGrid::Int4, None));
}

#[test]
fn what_is_quantised_already_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let once = dir.path().join("once");
    quantised(&family("llama"), &once, &options(IntGrid::Int4, None));
    let error = refused(&once, &dir.path().join("twice"), &options(IntGrid::Int4, None));
    assert!(error.to_string().contains("quantised already (gptq, 4 bits)"), "{error}");
}

#[test]
fn a_gguf_file_is_refused_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let source = family("llama").join("model.gguf");
    let error = refused(&source, &dir.path().join("out"), &options(IntGrid::Int4, None));
    assert!(error.to_string().contains("load it with --quant instead"), "{error}");
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (part, at) in [("model.layers.1.mlp.down_proj.weight", 5), ("model.norm.weight", 3)] {
        let source = dir.path().join(part);
        copy("llama", &source);
        let path = source.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        let start = header[part]["data_offsets"][0].as_u64().unwrap() as usize;
        assert_eq!(header[part]["dtype"], "F16");
        let place = 8 + header_len + start + 2 * at;
        bytes[place..place + 2].copy_from_slice(&0x7c00_u16.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let error = refused(
            &source,
            &dir.path().join(format!("{part}-out")),
            &options(IntGrid::Int4, None),
        );
        let expected = format!("tensor `{part}`: expected finite weights, found inf at index {at}");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_calibration_that_does_not_fit_is_refused() {
    let calibration = |ids| Some(Calibration { text_sha256: String::new(), ids });
    let error = QuantizeOptions::new(IntGrid::Int4, 32, calibration(ids(2047, 1))).unwrap_err();
    let expected = "calibration text: expected at least 2048 tokens, found 2047";
    assert_eq!(error.to_string(), expected);
    let error = QuantizeOptions::new(IntGrid::Int4, 48, None).unwrap_err();
    assert_eq!(error.to_string(), "group: expected 32, 64 or 128, found 48");
    let dir = tempfile::tempdir().unwrap();
    let mut foreign = ids(2048, 1);
    foreign[100] = 320;
    let options = options(IntGrid::Int4, calibration(foreign));
    let error = refused(&family("llama"), &dir.path().join("out"), &options);
    let expected = "calibration text: expected token ids below 320, found 320";
    assert_eq!(error.to_string(), expected);
}
