//! The files of a split GGUF model, each after its length in four bytes. Files that do not belong
//! together are errors; of those that do, every tensor lies inside one file.

#![no_main]

use std::sync::Arc;

use exrail_checkpoint::{Gguf, Tensors};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let (mut rest, mut parts): (&[u8], Vec<Arc<[u8]>>) = (bytes, Vec::new());
    while let Some((len, after)) = rest.split_first_chunk::<4>() {
        let len = after.len().min(u32::from_le_bytes(*len) as usize);
        let (part, after) = after.split_at(len);
        parts.push(part.into());
        rest = after;
    }
    if parts.is_empty() {
        return;
    }
    let n_parts = parts.len();
    let Ok(gguf) = Gguf::parse_parts(parts) else { return };
    assert_eq!(gguf.parts().len(), n_parts);
    assert!(gguf.file_len() <= bytes.len() as u64);
    let mut n_tensors = 0;
    for view in gguf.tensors() {
        n_tensors += 1;
        let found = gguf.info(view.name).expect("a name of the model");
        assert_eq!((found.dtype, found.shape), (view.dtype, view.shape));
    }
    assert_eq!(n_tensors, gguf.parts().iter().map(|part| part.n_tensors()).sum::<usize>());
});
