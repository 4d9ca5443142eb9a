//! Valid folders with bytes changed: whatever comes of them, it is no panic.

use std::sync::LazyLock;

use exrail_checkpoint::{LoadError, Tensors};
use proptest::prelude::*;

use crate::folder::Folder;

static FOLDERS: LazyLock<Vec<Folder>> = LazyLock::new(|| {
    let families = ["llama", "mixtral", "gemma3", "phi3", "smollm3", "cohere2"];
    let packed =
        ["gptq", "awq", "exl2", "exl3"].map(|name| Folder::read(&format!("quantised/{name}")));
    families.into_iter().map(Folder::family).chain(packed).collect()
});

/// Everything that a loader does with a folder.
fn load(folder: &Folder) {
    let Ok(folder) = folder.load() else { return };
    for name in folder.names() {
        let info = folder.info(name).unwrap();
        match folder.tensor(name) {
            Ok(view) => {
                let len: usize = info.shape.iter().product();
                assert_eq!(view.to_f32().unwrap().len(), len);
            }
            Err(error) => assert!(matches!(error.root(), LoadError::BadValue { .. }), "{error}"),
        }
    }
}

/// Bytes that numbers, names and structure of JSON trip over.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![prop::sample::select(b"0123456789-.eE\"{}[],:ntf \0\xff".to_vec()), any::<u8>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_folders_never_panic(
        folder in any::<prop::sample::Index>(),
        file in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 1..4),
        is_header in any::<bool>(),
    ) {
        let folder = folder.get(&FOLDERS).clone();
        let names: Vec<&String> =
            folder.0.keys().filter(|name| !name.ends_with(".gguf") && *name != "golden.bin").collect();
        let name = (*file.get(&names)).clone();
        let mut bytes = folder.0[&name].to_vec();
        // Most of a safetensors file is data, where a change is only another weight.
        let len = if is_header { bytes.len().min(4096) } else { bytes.len() };
        for (at, value) in changes {
            let at = at.index(len);
            bytes[at] = value;
        }
        load(&folder.with(&name, bytes));
    }

    #[test]
    fn cut_files_never_panic(
        folder in any::<prop::sample::Index>(),
        file in any::<prop::sample::Index>(),
        len in any::<prop::sample::Index>(),
    ) {
        let folder = folder.get(&FOLDERS).clone();
        let name = (*file.get(&folder.0.keys().collect::<Vec<_>>())).clone();
        let bytes = folder.0[&name].to_vec();
        load(&folder.with(&name, &bytes[..len.index(bytes.len())]));
    }
}
