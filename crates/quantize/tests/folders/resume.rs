//! An interrupted run goes on and ends in the same bytes.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use exrail_tensor::IntGrid;

use super::{QuantizeProgress, calibration, cpu, family, options, quantised, quantize};

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let read = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

#[test]
fn a_run_killed_after_any_unit_ends_in_the_same_bytes() {
    let source = family("smollm3");
    for calibrated in [None, Some(calibration())] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(IntGrid::Int4, calibrated);
        let whole = dir.path().join("whole");
        quantised(&source, &whole, &options);
        let expected = files(&whole);
        for last in 1..=4 {
            let destination = dir.path().join(format!("killed-{last}"));
            let killed = catch_unwind(AssertUnwindSafe(|| {
                quantize(&cpu(), &source, &destination, &options, &mut |step| {
                    if let QuantizeProgress::Quantised { n_done, .. } = step {
                        assert!(n_done < last, "killed");
                    }
                })
            }));
            assert!(killed.is_err());
            assert!(!destination.exists(), "nothing unfinished has the name");
            let mut first = None;
            quantize(&cpu(), &source, &destination, &options, &mut |step| {
                if let QuantizeProgress::Quantised { n_done, .. } = step {
                    first.get_or_insert(n_done);
                }
            })
            .unwrap();
            assert!(files(&destination) == expected, "killed after unit {last}");
        }
    }
}

#[test]
fn half_a_file_is_written_again() {
    let (source, dir) = (family("llama"), tempfile::tempdir().unwrap());
    let options = options(IntGrid::Int8, None);
    let whole = dir.path().join("whole");
    quantised(&source, &whole, &options);
    let destination = dir.path().join("out");
    let killed = catch_unwind(AssertUnwindSafe(|| {
        quantize(&cpu(), &source, &destination, &options, &mut |step| {
            if let QuantizeProgress::Quantised { n_done, .. } = step {
                assert!(n_done < 2, "killed");
            }
        })
    }));
    assert!(killed.is_err());
    // As if power had failed between the weights and their report, and while writing others.
    let partial = dir.path().join("out.partial");
    let shard = |n: usize| {
        let name = files(&partial).into_keys().find(|name| name.contains("-of-")).unwrap();
        format!("model-{n:05}-of-{}", name.split_once("-of-").unwrap().1.trim_end_matches(".json"))
    };
    std::fs::write(partial.join(shard(3)), b"half").unwrap();
    std::fs::write(partial.join(format!("{}.tmp", shard(2))), b"half").unwrap();
    std::fs::remove_file(partial.join(format!("{}.json", shard(2)))).unwrap();
    quantised(&source, &destination, &options);
    assert!(files(&destination) == files(&whole));
}
