//! Per token of a vocabulary: the bytes it stands for, its literal, and whether it steers the model.

use std::collections::HashMap;

use crate::TokenizerError;

/// More tokens than any published vocabulary; keeps a hostile file from asking for memory.
const MAX_VOCAB_LEN: usize = 1 << 22;

/// Per token: its bytes, its literal and whether it is a control token.
#[derive(Debug, Default)]
pub(crate) struct TokenTable {
    /// Bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// (V + 1) where each token starts in `bytes`.
    starts: Vec<usize>,
    /// (V)
    control: Vec<bool>,
    ids: HashMap<String, u32>,
}

impl TokenTable {
    pub(crate) fn push(&mut self, literal: &str, bytes: &[u8], control: bool) {
        let id = u32::try_from(self.control.len()).expect("the vocabulary size has been checked");
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.bytes.extend_from_slice(bytes);
        self.starts.push(self.bytes.len());
        self.control.push(control);
        self.ids.entry(literal.to_owned()).or_insert(id);
    }

    pub(crate) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        (id < self.control.len()).then(|| &self.bytes[self.starts[id]..self.starts[id + 1]])
    }

    /// Id of the first token that is spelled like this.
    pub(crate) fn id(&self, literal: &str) -> Option<u32> {
        self.ids.get(literal).copied()
    }

    /// All spellings with their ids, in no order.
    pub(crate) fn literals(&self) -> impl Iterator<Item = (&str, u32)> {
        self.ids.iter().map(|(literal, &id)| (literal.as_str(), id))
    }

    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    /// Makes `id` a control token, if it is in the vocabulary.
    pub(crate) fn set_control(&mut self, id: u32) {
        if let Some(control) = self.control.get_mut(id as usize) {
            *control = true;
        }
    }

    /// Number of tokens, V.
    pub(crate) fn len(&self) -> usize {
        self.control.len()
    }
}

/// Refuses a vocabulary without tokens, or with more than any has.
pub(crate) fn check_vocab_len(found: usize) -> Result<(), TokenizerError> {
    if found == 0 || found > MAX_VOCAB_LEN {
        return Err(TokenizerError::VocabularySize { found, limit: MAX_VOCAB_LEN });
    }
    Ok(())
}
