//! A safetensors file: every view that it offers must be convertible.

#![no_main]

use exrail_checkpoint::SafetensorsFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = SafetensorsFile::parse(bytes) else { return };
    for view in file.tensors() {
        assert!(view.to_f32().is_ok(), "{view:?}");
    }
    for name in file.stored_names() {
        assert!(file.stored_type(name).is_some());
        if let Some(raw) = file.raw(name) {
            assert!(raw.bytes.len() <= bytes.len());
        }
    }
});
