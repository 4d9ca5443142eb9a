//! [`SplitFile`]: names of the parts of a split GGUF file. `checkpoint`, which opens them, is in the
//! same layer and has its own reading of a name; here nothing is opened.

/// `a/qwen-00002-of-00003.gguf`, taken apart.
pub(crate) struct SplitFile<'a> {
    /// `a/qwen`.
    pub(crate) model: &'a str,
    /// 2.
    pub(crate) number: u16,
    /// 3.
    pub(crate) count: u16,
}

impl<'a> SplitFile<'a> {
    /// The parts of `path`, or `None` when it is not the name of a part.
    pub(crate) fn of(path: &'a str) -> Option<SplitFile<'a>> {
        let (rest, count) = path.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (model, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| -> Option<u16> {
            let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            if is_number { text.parse().ok() } else { None }
        };
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        let is_part = !model.is_empty() && !model.ends_with('/') && number > 0 && number <= count;
        is_part.then_some(SplitFile { model, number, count })
    }

    /// The paths of all parts.
    pub(crate) fn all(&self) -> impl Iterator<Item = String> {
        let (model, count) = (self.model, self.count);
        (1..=count).map(move |number| format!("{model}-{number:05}-of-{count:05}.gguf"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_name() {
        let file = SplitFile::of("a/b-00002-of-00003.gguf").unwrap();
        assert_eq!((file.model, file.number, file.count), ("a/b", 2, 3));
        assert_eq!(file.all().last().unwrap(), "a/b-00003-of-00003.gguf");
        for other in ["a.gguf", "a/-00001-of-00002.gguf", "a-00003-of-00002.gguf", "a-1-of-2.gguf"]
        {
            assert!(SplitFile::of(other).is_none(), "{other}");
        }
    }
}
