//! A model in several GGUF files: read as the file that it was split from, and refused when the
//! files are not all parts of it under their names. The parts are llama.cpp's, see golden/split.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::fs;
use std::path::{Path, PathBuf};

use exrail_checkpoint::{
    Checkpoint, CheckpointFiles, DecoderConfig, Gguf, LoadError, TensorView, Tensors,
    VocabularyTable, sha256_hex,
};
use exrail_testkit::{GgufValue, GgufWriter};

const FIRST: &str = "tiny-00001-of-00003.gguf";
const SECOND: &str = "tiny-00002-of-00003.gguf";
const THIRD: &str = "tiny-00003-of-00003.gguf";

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

fn whole() -> Gguf {
    Gguf::open(&golden("families/llama-llama3/model.gguf")).unwrap()
}

/// A folder with the three parts, to be spoiled.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        for name in [FIRST, SECOND, THIRD] {
            fs::copy(golden("split").join(name), folder.path(name)).unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self) -> Result<Gguf, LoadError> {
        Gguf::open(&self.path(FIRST))
    }

    fn rename(self, from: &str, to: &str) -> Folder {
        fs::rename(self.path(from), self.path(to)).unwrap();
        self
    }

    fn without(self, name: &str) -> Folder {
        fs::remove_file(self.path(name)).unwrap();
        self
    }

    /// Writes `value` over the value of `key`, of the same length.
    fn set(self, name: &str, key: &str, value: &[u8]) -> Folder {
        let mut bytes = fs::read(self.path(name)).unwrap();
        let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
        // The key is followed by its type.
        let at = at + key.len() + 4;
        bytes[at..at + value.len()].copy_from_slice(value);
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    /// Writes a later part anew, with more keys and with the tensors that `change` makes of its own.
    fn rewrite(self, number: u16, change: impl Fn(GgufWriter) -> GgufWriter) -> Folder {
        let gguf = self.open().unwrap();
        let before = usize::from(number - 1);
        let skipped = gguf.parts()[..before].iter().map(|part| part.n_tensors()).sum();
        let n_tensors = gguf.parts()[before].n_tensors();
        let keys = change(split_keys(number - 1, 3, 22));
        let part = gguf.tensors().skip(skipped).take(n_tensors).fold(keys, with_tensor);
        fs::write(self.path([FIRST, SECOND, THIRD][before]), part.finish()).unwrap();
        self
    }

    /// The refusal, which must name all of `parts`.
    fn refused(&self, parts: &[&str]) -> LoadError {
        let error = self.open().expect_err("parts that are not those of one model");
        names(&error, parts);
        let checked = Checkpoint::open(&self.path(FIRST)).unwrap_err();
        assert_eq!(checked.to_string(), error.to_string());
        error
    }
}

fn names(error: &LoadError, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` in: {message}");
    }
}

fn u16_value(value: u16) -> GgufValue {
    GgufValue::Raw { type_id: 2, bytes: value.to_le_bytes().to_vec() }
}

fn split_keys(number: u16, count: u16, n_tensors: i32) -> GgufWriter {
    GgufWriter::new()
        .key("split.no", u16_value(number))
        .key("split.count", u16_value(count))
        .key("split.tensors.count", GgufValue::I32(n_tensors))
}

fn with_tensor(writer: GgufWriter, view: TensorView<'_>) -> GgufWriter {
    writer.tensor(view.name, view.dtype, view.shape, &view.bytes)
}

#[test]
fn parts_are_read_as_the_file_that_they_were_split_from() {
    let whole = whole();
    let config = DecoderConfig::from_gguf(&whole).unwrap();
    let n_keys = whole.metadata().iter().count();
    for (first, sizes) in [(FIRST, vec![9, 9, 4]), ("bare-00001-of-00004.gguf", vec![0, 9, 9, 4])] {
        let gguf = Gguf::open(&golden("split").join(first)).unwrap();
        let found: Vec<usize> = gguf.parts().iter().map(|part| part.n_tensors()).collect();
        assert_eq!(found, sizes);
        assert!(gguf.names().eq(whole.names()), "{first}");
        for (found, expected) in gguf.tensors().zip(whole.tensors()) {
            assert_eq!((found.dtype, found.shape), (expected.dtype, expected.shape));
            assert_eq!(found.bytes, expected.bytes, "{}", found.name);
            // Given back and read again.
            gguf.release(found.name);
            assert_eq!(found.bytes, expected.bytes, "{}", found.name);
        }
        assert_eq!(DecoderConfig::from_gguf(&gguf).unwrap(), config);
        assert_eq!(VocabularyTable::from_gguf(&gguf).unwrap().tokens.len(), config.vocab_size);
        assert_eq!(gguf.metadata().iter().count(), n_keys + 3);
        let lens =
            gguf.parts().iter().map(|part| fs::metadata(part.path().unwrap()).unwrap().len());
        assert_eq!(lens.sum::<u64>(), gguf.file_len());
    }
}

#[test]
fn parts_in_memory_are_read_as_those_on_disk() {
    let read = |name| fs::read(golden("split").join(name)).unwrap();
    let all = [FIRST, SECOND, THIRD].map(read);
    let parse =
        |parts: &[&Vec<u8>]| Gguf::parse_parts(parts.iter().map(|bytes| bytes.as_slice().into()));
    let [first, second, third] = &all;
    let gguf = parse(&[first, second, third]).unwrap();
    assert!(gguf.names().eq(whole().names()));
    assert!(gguf.parts().iter().all(|part| part.path().is_none()));
    assert!(Checkpoint::Gguf(gguf).files().unwrap_err().to_string().contains("in memory"));
    let count = ["part 1 of 3", "`split.count`", "expected 2, the number of files", "found 3"];
    names(&parse(&[first, second]).unwrap_err(), &count);
    names(&Gguf::parse(first.as_slice()).unwrap_err(), &["`split.count`", "expected 1"]);
    names(&parse(&[first, second, third, third]).unwrap_err(), &["expected 4", "found 3"]);
    names(&parse(&[second, third, first]).unwrap_err(), &["part 2 of 3", "the first part"]);
    names(&parse(&[first, third, second]).unwrap_err(), &["part 2 of 3", "`split.no`"]);
}

#[test]
fn the_fingerprint_covers_every_part() {
    let fingerprint = |folder: &Folder| {
        let files = Checkpoint::open(&folder.path(FIRST)).unwrap().files().unwrap();
        let names: Vec<_> = files.paths().iter().map(|path| path.file_name().unwrap()).collect();
        assert_eq!(names, [FIRST, SECOND, THIRD]);
        assert!(matches!(files, CheckpointFiles::Parts(_)));
        files.sha256(&mut |_| Ok(())).unwrap()
    };
    let folder = Folder::new();
    let bytes = [FIRST, SECOND, THIRD].map(|name| fs::read(folder.path(name)).unwrap());
    let expected = sha256_hex(&bytes.concat());
    assert_eq!(fingerprint(&folder), expected);
    for name in [FIRST, SECOND, THIRD] {
        let folder = Folder::new();
        let mut bytes = fs::read(folder.path(name)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(folder.path(name), bytes).unwrap();
        assert_ne!(fingerprint(&folder), expected, "{name}");
    }
}

#[test]
fn a_later_part_names_the_first() {
    let folder = Folder::new();
    for (name, part) in [(SECOND, "part 2 of 3"), (THIRD, "part 3 of 3")] {
        let error = Gguf::open(&folder.path(name)).unwrap_err();
        assert!(matches!(error.root(), LoadError::NotFirstPart { count: 3, .. }), "{error}");
        let first = format!("open {}", folder.path(FIRST).display());
        names(&error, &[name, part, "expected the first part", &first]);
    }
}

#[test]
fn a_missing_part_is_named_with_where_it_should_be() {
    for (name, part) in [(SECOND, "part 2 of 3"), (THIRD, "part 3 of 3")] {
        let folder = Folder::new().without(name);
        let path = folder.path(name).display().to_string();
        let error = folder.refused(&[part, &path, "found no such file", "download it too"]);
        assert!(matches!(error.root(), LoadError::MissingPart { count: 3, .. }), "{error}");
    }
    let folder = Folder::new().without(THIRD);
    fs::create_dir(folder.path(THIRD)).unwrap();
    folder.refused(&[THIRD, "expected a regular file"]);
}

#[test]
fn a_renamed_part_is_refused_with_the_name_that_it_should_have() {
    let folder = Folder::new().rename(FIRST, "model.gguf");
    let wrong_name = |name: &str, parts: &[&str]| {
        let error = Gguf::open(&folder.path(name)).unwrap_err();
        assert!(matches!(error.root(), LoadError::PartName { .. }), "{error}");
        names(&error, parts);
    };
    let expected = "expected a name that ends in `-00001-of-00003.gguf`";
    wrong_name("model.gguf", &[expected, "found `model.gguf`", "part 1 of 3", "the names under"]);
    let folder = folder.rename("model.gguf", "tiny-00001-of-00004.gguf");
    let error = Gguf::open(&folder.path("tiny-00001-of-00004.gguf")).unwrap_err();
    names(&error, &[expected, "found `tiny-00001-of-00004.gguf`"]);
    let folder = folder.rename(SECOND, FIRST);
    let expected = "expected a name that ends in `-00002-of-00003.gguf`";
    folder.refused(&["part 2 of 3", expected, "found `tiny-00001-of-00003.gguf`"]);
    // All of them renamed alike are a model of another name.
    let folder = Folder::new();
    for (i, name) in [FIRST, SECOND, THIRD].into_iter().enumerate() {
        let other = format!("other-0000{}-of-00003.gguf", i + 1);
        fs::rename(folder.path(name), folder.path(&other)).unwrap();
    }
    assert!(Gguf::open(&folder.path("other-00001-of-00003.gguf")).is_ok());
}

#[cfg(unix)]
#[test]
fn a_link_has_the_name_and_the_neighbours_of_its_own_folder() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    let links = tempfile::tempdir().unwrap();
    let at = |name: &str| links.path().join(name);
    symlink(folder.path(FIRST), at("model.gguf")).unwrap();
    names(&Gguf::open(&at("model.gguf")).unwrap_err(), &["`model.gguf`", "or links to them"]);
    symlink(folder.path(FIRST), at(FIRST)).unwrap();
    let missing = at(SECOND).display().to_string();
    names(&Gguf::open(&at(FIRST)).unwrap_err(), &["part 2 of 3 is missing", &missing]);
    // A link to nothing is a missing part, and two names of one part are seen by its number.
    symlink(at("nowhere"), at(SECOND)).unwrap();
    names(&Gguf::open(&at(FIRST)).unwrap_err(), &["part 2 of 3 is missing", &missing]);
    fs::remove_file(at(SECOND)).unwrap();
    symlink(folder.path(SECOND), at(SECOND)).unwrap();
    symlink(folder.path(SECOND), at(THIRD)).unwrap();
    let twice = Gguf::open(&at(FIRST)).unwrap_err();
    names(&twice, &[THIRD, "part 3 of 3", "`split.no`: expected 2, found 1"]);
    fs::remove_file(at(THIRD)).unwrap();
    symlink(folder.path(THIRD), at(THIRD)).unwrap();
    assert!(Gguf::open(&at(FIRST)).unwrap().names().eq(whole().names()));
}

#[test]
fn numbers_that_contradict_each_other_are_refused() {
    let two = 2_u16.to_le_bytes();
    let swapped = Folder::new().rename(SECOND, "x").rename(THIRD, SECOND).rename("x", THIRD);
    let error = swapped.refused(&[SECOND, "part 2 of 3", "`split.no`: expected 1, found 2"]);
    assert!(matches!(error.root(), LoadError::WrongPart { number: 2, .. }), "{error}");
    let folder = Folder::new().set(THIRD, "split.count", &two);
    folder.refused(&[THIRD, "part 3 of 3", "`split.count`: expected 3, found 2", "one place"]);
    let folder = Folder::new().set(FIRST, "split.count", &two);
    folder.refused(&["part 1 of 2", "ends in `-00001-of-00002.gguf`"]);
    let folder = Folder::new().set(FIRST, "split.no", &[7, 0]);
    folder.refused(&[FIRST, "`split.no`: expected 0 to 2 (`split.count` is 3), found 7"]);
    let folder = Folder::new().set(SECOND, "split.tensors.count", &21_i32.to_le_bytes());
    folder.refused(&[SECOND, "`split.tensors.count`: expected 22, found 21"]);
    let folder = Folder::new().set(FIRST, "split.tensors.count", &(-1_i32).to_le_bytes());
    folder.refused(&[FIRST, "`split.tensors.count`", "found -1"]);
    // A whole model under the name of a part.
    let folder = Folder::new();
    fs::copy(golden("families/llama/model.gguf"), folder.path(SECOND)).unwrap();
    folder.refused(&[SECOND, "`split.count`: expected 3, found no such key"]);
}

#[test]
fn split_keys_that_are_incomplete_are_refused() {
    let refused = |writer: GgufWriter, key: &str| {
        let error = Gguf::parse(writer.finish()).unwrap_err();
        assert!(matches!(&error, LoadError::MissingKey { key: k } if k == key), "{error}");
    };
    let empty = GgufWriter::new;
    refused(empty().key("split.no", u16_value(0)), "split.count");
    refused(empty().key("split.tensors.count", GgufValue::I32(0)), "split.count");
    refused(empty().key("split.count", u16_value(2)), "split.no");
    let keys = empty().key("split.count", u16_value(2)).key("split.no", u16_value(0));
    refused(keys, "split.tensors.count");
    let text = Gguf::parse(empty().key("split.count", "3").finish()).unwrap_err();
    assert!(matches!(text, LoadError::WrongKeyType { .. }), "{text}");
    let large = Gguf::parse(empty().key("split.count", 65_536_u32).finish()).unwrap_err();
    names(&large, &["`split.count`: expected an integer from 0 to 65535, found 65536"]);
}

#[test]
fn a_merged_model_and_a_split_of_one_file_are_whole() {
    // `gguf-split --merge` leaves the keys with a count of 0.
    for count in [0, 1] {
        assert!(Gguf::parse(split_keys(0, count, 0).finish()).is_ok());
        let error = Gguf::parse(split_keys(0, count, 3).finish()).unwrap_err();
        names(&error, &["expected 3 tensors (`split.tensors.count`), found 0"]);
        names(&Gguf::parse(split_keys(1, count, 0).finish()).unwrap_err(), &["`split.no`"]);
    }
}

#[test]
fn a_part_of_another_model_is_refused_by_what_it_repeats() {
    // The same is no harm, and its own alignment is its own affair.
    let same =
        Folder::new().rewrite(2, |keys| keys.alignment(64).key("general.architecture", "llama"));
    assert!(same.open().unwrap().names().eq(whole().names()));
    let other = Folder::new().rewrite(2, |keys| keys.key("general.architecture", "qwen2"));
    let expected = "`general.architecture`: expected `llama`, found `qwen2`";
    other.refused(&[SECOND, "part 2 of 3", expected, "not those of one model"]);
    let other = Folder::new().rewrite(3, |keys| keys.key("llama.block_count", 5_u32));
    other.refused(&[THIRD, "`llama.block_count`: expected 2, found 5"]);
    let other = Folder::new().rewrite(3, |keys| keys.key("llama.new", true));
    other.refused(&[THIRD, "`llama.new`: expected no such key, as in part 1, found true"]);
    let tokens = GgufValue::Texts(vec!["a".to_owned()]);
    let other = Folder::new().rewrite(3, |keys| keys.key("tokenizer.ggml.tokens", tokens.clone()));
    other.refused(&[THIRD, "`tokenizer.ggml.tokens`", "found another array of string"]);
}

#[test]
fn a_tensor_in_two_parts_is_refused() {
    let whole = whole();
    let first = whole.tensors().next().unwrap();
    let folder = Folder::new().rewrite(3, |keys| with_tensor(keys, first.clone()));
    let error = folder.refused(&[THIRD, first.name, "in part 1 and in part 3", "one place"]);
    assert!(matches!(error.root(), LoadError::TensorInTwoParts { first: 1, second: 3, .. }));
}

#[test]
fn a_total_that_differs_is_refused() {
    let whole = whole();
    let extra = whole.tensors().next().unwrap();
    let folder = Folder::new()
        .rewrite(3, |keys| keys.tensor("extra.weight", extra.dtype, extra.shape, &extra.bytes));
    let error = folder.refused(&["expected 22 tensors (`split.tensors.count`), found 23"]);
    assert!(matches!(error.root(), LoadError::WrongTensorTotal { count: 3, .. }), "{error}");
    let folder = Folder::new();
    fs::write(folder.path(THIRD), split_keys(2, 3, 22).finish()).unwrap();
    folder.refused(&["expected 22 tensors (`split.tensors.count`), found 18"]);
}

#[test]
fn a_damaged_part_is_named() {
    let folder = Folder::new();
    let bytes = fs::read(folder.path(SECOND)).unwrap();
    fs::write(folder.path(SECOND), &bytes[..bytes.len() / 2]).unwrap();
    folder.refused(&[SECOND, "truncated", "download it again"]);
}
