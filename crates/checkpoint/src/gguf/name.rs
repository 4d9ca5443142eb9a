//! [`SplitName`]: how the files of a split model are called.

use std::fmt;
use std::path::Path;

/// A file name as llama.cpp's `gguf-split` gives it: `qwen-00002-of-00003.gguf` is part 2 of 3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitName {
    model: String,
    number: u16,
    count: u16,
}

impl SplitName {
    /// The name of the file at `path`, or `None` when it is not such a one. The file is not read,
    /// and a link keeps its own name.
    #[must_use]
    pub fn of(path: &Path) -> Option<SplitName> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (model, number) = rest.rsplit_once('-')?;
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        let is_part = !model.is_empty() && number > 0 && number <= count;
        is_part.then(|| SplitName { model: model.to_owned(), number, count })
    }

    /// What stands before the number: the name of the whole.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Number of this part, from 1.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Number of parts.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.count
    }

    /// The name of part `number` of the same model.
    #[must_use]
    pub fn part(&self, number: u16) -> SplitName {
        SplitName { model: self.model.clone(), number, count: self.count }
    }

    /// The end of the name of part `number` of `count`.
    pub(super) fn ending(number: u16, count: u16) -> String {
        format!("-{number:05}-of-{count:05}.gguf")
    }
}

impl fmt::Display for SplitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.model, SplitName::ending(self.number, self.count))
    }
}

fn five_digits(text: &str) -> Option<u16> {
    let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_read_and_written() {
        let name = SplitName::of(Path::new("/a/b-00001-of-00002-00003-of-00012.gguf")).unwrap();
        assert_eq!((name.model(), name.number(), name.count()), ("b-00001-of-00002", 3, 12));
        assert_eq!(name.part(1).to_string(), "b-00001-of-00002-00001-of-00012.gguf");
        assert_eq!(name.part(3), name);
    }

    #[test]
    fn other_names_are_none() {
        for name in [
            "model.gguf",
            "-00001-of-00002.gguf",
            "a-00000-of-00002.gguf",
            "a-00003-of-00002.gguf",
            "a-1-of-2.gguf",
            "a-+0001-of-00002.gguf",
            "a-99999-of-99999.gguf",
            "a-00001-of-00002.safetensors",
            "a-00001-of-00002",
            "a_00001-of-00002.gguf",
            "",
        ] {
            assert_eq!(SplitName::of(Path::new(name)), None, "{name}");
        }
    }
}
