//! Writing a safetensors file, tensor after tensor, beside its place and then into it.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::QuantizeError;

/// The data of a safetensors file begins on a multiple of this.
const ALIGNMENT: usize = 8;

/// A tensor to write.
pub(crate) struct Stored<'a> {
    pub(crate) name: String,
    /// As safetensors calls it: `F16`, `I32`.
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
}

/// Writes `tensors` to `path`, which either is there whole afterwards or not at all.
pub(crate) fn write_safetensors(path: &Path, tensors: &[Stored<'_>]) -> Result<(), QuantizeError> {
    write_whole(path, |file| {
        let header = header(tensors);
        let padding = (ALIGNMENT - header.len() % ALIGNMENT) % ALIGNMENT;
        file.write_all(&((header.len() + padding) as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.write_all(&b"        "[..padding])?;
        tensors.iter().try_for_each(|tensor| file.write_all(&tensor.bytes))
    })
}

fn header(tensors: &[Stored<'_>]) -> String {
    let mut map = Map::new();
    map.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.bytes.len();
        let (dtype, shape) = (tensor.dtype, &tensor.shape);
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] });
        map.insert(tensor.name.clone(), entry);
        at = end;
    }
    Value::Object(map).to_string()
}

/// Writes a file beside `path`, onto the disk, and renames it; nothing is left when that fails.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), QuantizeError> {
    let beside = beside(path);
    let written = File::create(&beside).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.into_inner()?.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&beside, path));
    renamed.map_err(|source| {
        // The first error is the one to tell.
        drop(std::fs::remove_file(&beside));
        QuantizeError::Io { path: path.to_owned(), source }
    })
}

/// Where a file is written before it is whole.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use exrail_checkpoint::SafetensorsFile;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let tensors = [
            Stored {
                name: "a.qweight".into(),
                dtype: "I32",
                shape: vec![1, 2],
                bytes: vec![1, 2, 3, 4, 5, 6, 7, 8].into(),
            },
            Stored {
                name: "b".into(),
                dtype: "F16",
                shape: vec![3],
                bytes: vec![0, 60, 0, 64, 0, 66].into(),
            },
        ];
        write_safetensors(&path, &tensors).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.raw("a.qweight").unwrap().bytes, &*tensors[0].bytes);
        assert_eq!(file.tensor("b").unwrap().to_f32().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_that_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::os::unix::fs::symlink("/dev/full", beside(&path)).unwrap();
        let bytes = vec![0; 1 << 20].into();
        let tensor = Stored { name: "a".into(), dtype: "F16", shape: vec![1 << 19], bytes };
        let error = write_safetensors(&path, &[tensor]).unwrap_err();
        assert!(error.to_string().contains("No space left on device"), "{error}");
        assert!(error.to_string().contains("model.safetensors"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
