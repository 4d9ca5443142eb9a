//! A released tensor gives its memory back and can be read again. One test a process: it looks at
//! the memory of all of it.
#![cfg(target_os = "linux")]

use std::io::Write;

use exrail_checkpoint::{SafetensorsFile, Tensors};

const LEN_BYTES: usize = 64 << 20;

/// Bytes of files that this process has in memory.
fn mapped_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find(|line| line.starts_with("RssFile:")).expect("since 4.5");
    let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok());
    kib.expect("a number of KiB") << 10
}

#[test]
fn a_released_tensor_gives_its_memory_back_and_reads_the_same_again() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let header = format!(
        r#"{{"x":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{LEN_BYTES}]}}}}"#,
        LEN_BYTES / 4
    );
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&[0x11; LEN_BYTES]).unwrap();

    let opened = SafetensorsFile::open(file.path()).unwrap();
    let sum =
        || -> u64 { opened.tensor("x").unwrap().bytes.iter().map(|&byte| u64::from(byte)).sum() };
    let before = mapped_bytes();
    assert_eq!(sum(), 0x11 * LEN_BYTES as u64);
    assert!(mapped_bytes() > before + LEN_BYTES / 2, "reading maps the file");
    Tensors::release(&opened, "x");
    assert!(mapped_bytes() < before + LEN_BYTES / 8, "{} bytes stay", mapped_bytes() - before);
    assert_eq!(sum(), 0x11 * LEN_BYTES as u64);
    Tensors::release(&opened, "no such tensor");
}
