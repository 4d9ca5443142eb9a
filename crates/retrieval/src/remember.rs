//! An encoder that computes each text once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Encode, EncodeError, EncoderFacts};

/// Texts that are remembered; those behind are computed each time. At 384 dimensions 8,192 vectors are 13 MB.
const MAX_TEXTS: usize = 8192;

/// Gives what another encoder gave the first time it was asked for a text, to the bit. For runs that ask the same texts
/// many times; whether an encoder still says the same must be asked of the other one.
pub struct RememberingEncoder {
    inner: Arc<dyn Encode>,
    known: Mutex<HashMap<String, Vec<f32>>>,
}

impl RememberingEncoder {
    /// Remembers nothing yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Encode>) -> RememberingEncoder {
        RememberingEncoder { inner, known: Mutex::new(HashMap::new()) }
    }
}

impl Encode for RememberingEncoder {
    fn fingerprint(&self) -> &str {
        self.inner.fingerprint()
    }

    fn facts(&self) -> EncoderFacts {
        self.inner.facts()
    }

    fn tokenize(&self, text: &str) -> Vec<(u32, Range<usize>)> {
        self.inner.tokenize(text)
    }

    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
        // A panic inside leaves whole vectors behind: they are put in last.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new: Vec<&str> = Vec::new();
        for &text in texts {
            if !known.contains_key(text) && !new.contains(&text) {
                new.push(text);
            }
        }
        if known.len() + new.len() > MAX_TEXTS {
            drop(known);
            return self.inner.encode(texts);
        }
        if !new.is_empty() {
            let Ok(vectors) = self.inner.encode(&new) else {
                // The error names a text by its place among those of the caller.
                return self.inner.encode(texts);
            };
            known.extend(new.into_iter().map(str::to_owned).zip(vectors));
        }
        Ok(texts.iter().map(|&text| known[text].clone()).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::testing::FakeEncoder;

    /// Counts the texts that are computed.
    struct Counting {
        inner: FakeEncoder,
        n_computed: AtomicUsize,
    }

    impl Encode for Counting {
        fn fingerprint(&self) -> &str {
            self.inner.fingerprint()
        }

        fn facts(&self) -> EncoderFacts {
            self.inner.facts()
        }

        fn tokenize(&self, text: &str) -> Vec<(u32, Range<usize>)> {
            self.inner.tokenize(text)
        }

        fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
            self.n_computed.fetch_add(texts.len(), Ordering::Relaxed);
            self.inner.encode(texts)
        }
    }

    fn counting() -> Arc<Counting> {
        Arc::new(Counting { inner: FakeEncoder::new(1), n_computed: AtomicUsize::new(0) })
    }

    #[test]
    fn each_text_is_computed_once_and_comes_in_its_place() {
        let inner = counting();
        let encoder = RememberingEncoder::new(inner.clone());
        let texts = ["a cold start", "another text", "a cold start"];
        let expected = inner.inner.encode(&texts).unwrap();
        assert_eq!(encoder.encode(&texts).unwrap(), expected);
        assert_eq!(encoder.encode(&texts[1..]).unwrap(), expected[1..]);
        assert_eq!(inner.n_computed.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn an_error_names_the_place_in_the_call_and_spoils_nothing() {
        let encoder = RememberingEncoder::new(counting());
        let known = encoder.encode(&["known"]).unwrap();
        let failed = encoder.encode(&["known", "new", " "]);
        assert!(matches!(failed, Err(EncodeError::Empty { index: 2 })), "{failed:?}");
        assert_eq!(encoder.encode(&["known"]).unwrap(), known);
    }

    #[test]
    fn beyond_its_size_it_computes_each_time() {
        let inner = counting();
        let encoder = RememberingEncoder::new(inner.clone());
        let texts: Vec<String> = (0..MAX_TEXTS).map(|n| format!("text {n}")).collect();
        encoder.encode(&texts.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        for _ in 0..2 {
            encoder.encode(&["one more"]).unwrap();
        }
        encoder.encode(&["text 7"]).unwrap();
        assert_eq!(inner.n_computed.load(Ordering::Relaxed), MAX_TEXTS + 2);
    }
}
