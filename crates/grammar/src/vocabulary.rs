//! A tokenizer as the automaton wants it: bytes of each token, control tokens apart, canonical tokenization.

use std::sync::Arc;

use exrail_text::Tokenizer;
use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::GrammarError;
use crate::closing::Closers;

/// Stands in front of a text that is spelled as if it stood in the middle of one. No vocabulary that was looked at
/// merges it with what follows; where one does, [`Environment::spell`] sees it.
const ANCHORS: [&str; 3] = ["\n", "\u{1}", "a\n"];

/// Pieces of JSON as schemas force them. A vocabulary that does not spell all of them so that their bytes come back
/// is not forced.
const PROBES: [&str; 8] =
    ["{\"name\":\"", "\",\"id\":", "}],\"a b\":[{", "true", " and", "\n  \"x_y\": ", "é", "<|x|>"];

/// A vocabulary that grammars are compiled over. Cheap to clone.
#[derive(Clone)]
pub struct Vocabulary {
    environment: Arc<Environment>,
}

struct Environment {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
    /// What is forced is spelled as the tokenizer would. Without it nothing is forced.
    is_canonical: bool,
    closers: Closers,
}

impl Vocabulary {
    /// The vocabulary of a tokenizer. Its control tokens are no text, so that no string can hold one; nor is what
    /// stands for no byte, for the byte FF, which no text has, or for nothing yet (`<unused7>`).
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`] without an end-of-sequence token: an answer could not end. Or where a printable
    /// character of ASCII has no token: JSON could not be written.
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Result<Vocabulary, GrammarError> {
        let eos = tokenizer.eos_ids();
        let Some(&first) = eos.first() else {
            return Err(GrammarError::Vocabulary("it has no end-of-sequence token".into()));
        };
        let n_tokens = tokenizer.vocab_len();
        let Ok(count) = u32::try_from(n_tokens) else {
            return Err(GrammarError::Vocabulary(format!("{n_tokens} tokens")));
        };
        let words: Vec<Vec<u8>> = (0..count).map(|id| word(tokenizer, id)).collect();
        check_ascii(&words)?;
        let trie = TokTrie::from(&TokRxInfo::new(count, first), &words).with_eos_tokens(eos);
        let closers = Closers::of(&words, |id| trie.is_special_token(id));
        let tokenizer = Arc::clone(tokenizer);
        let mut environment = Environment { tokenizer, trie, is_canonical: false, closers };
        environment.is_canonical =
            PROBES.iter().all(|probe| environment.spell(probe).is_some_and(|ids| !ids.is_empty()));
        Ok(Vocabulary { environment: Arc::new(environment) })
    }

    /// Token ids that masks cover.
    #[must_use]
    pub fn len(&self) -> usize {
        self.environment.trie.vocab_size()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Of the tokenizer.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        self.environment.tokenizer.fingerprint()
    }

    /// Whether what is bound to follow can be spelled as the tokenizer spells it in the middle of a text. Where not
    /// (`WordPiece`; a normaliser that changes text), [`crate::Matcher::forced`] is always empty.
    #[must_use]
    pub fn is_canonical(&self) -> bool {
        self.environment.is_canonical
    }

    /// Bytes of a token where it is text; empty for control tokens, unused ones and ids outside.
    pub(crate) fn text_of(&self, id: u32) -> &[u8] {
        let trie = &self.environment.trie;
        if id as usize >= trie.vocab_size() || trie.is_special_token(id) {
            return &[];
        }
        trie.token(id)
    }

    /// Whether a token ends a sequence.
    pub(crate) fn is_end(&self, id: u32) -> bool {
        self.environment.trie.eos_tokens().contains(&id)
    }

    pub(crate) fn closers(&self) -> &Closers {
        &self.environment.closers
    }

    /// A text in the middle of another, as the tokenizer spells it.
    #[must_use]
    pub fn spell(&self, text: &str) -> Vec<u32> {
        self.environment.tokenize_bytes(text.as_bytes())
    }

    pub(crate) fn environment(&self) -> TokEnv {
        Arc::clone(&self.environment) as TokEnv
    }
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("fingerprint", &self.fingerprint()).finish()
    }
}

/// Bytes of a token; those of a control token carry a byte in front that no text has. Empty for what is never allowed.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    if tokenizer.is_control(id) || tokenizer.eos_ids().contains(&id) {
        let named = !bytes.is_empty();
        let name = if named { bytes.to_vec() } else { format!("[{id}]").into_bytes() };
        return [&[TokTrie::SPECIAL_TOKEN_MARKER][..], &name].concat();
    }
    if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) || is_placeholder(bytes) {
        return Vec::new();
    }
    bytes.to_vec()
}

/// Whether a token keeps a place free for later, by its spelling: `<unused12>`, `[unused3]`, `<|reserved_4|>`,
/// `<extra_id_0>`, `<pad>`. Files do not mark them alike.
fn is_placeholder(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let inner = |open, close| text.strip_prefix(open).and_then(|it| it.strip_suffix(close));
    let brackets = [("<|", "|>"), ("<", ">"), ("[", "]")];
    let Some(inner) = brackets.iter().find_map(|&(open, close)| inner(open, close)) else {
        return false;
    };
    let name = inner.trim_end_matches(|it: char| it.is_ascii_digit());
    let name = name.trim_end_matches(['_', '-', ' ']).to_ascii_lowercase();
    let numbered = ["unused", "unused_token", "reserved", "extra_id", "reserved_special_token"];
    (name.len() < inner.len() && numbered.contains(&name.as_str()))
        || (["pad", "unk"].contains(&name.as_str()) && name.len() == inner.len())
}

/// JSON is written in ASCII; every printable character of it must have a token of its own or an answer could be
/// bound to a text that cannot be spelled.
fn check_ascii(words: &[Vec<u8>]) -> Result<(), GrammarError> {
    let mut has = [false; 256];
    for word in words {
        if let [byte] = word[..] {
            has[usize::from(byte)] = true;
        }
    }
    match (b' '..=b'~').find(|&byte| !has[usize::from(byte)]) {
        None => Ok(()),
        Some(byte) => Err(GrammarError::Vocabulary(format!(
            "expected a token for every printable character of ASCII, found none for {:?}",
            char::from(byte)
        ))),
    }
}

impl Environment {
    /// Ids of a text in the middle of another one; `None` where their bytes are not the text's.
    fn spell(&self, text: &str) -> Option<Vec<u32>> {
        ANCHORS.iter().find_map(|anchor| self.spell_behind(anchor, text))
    }

    fn spell_behind(&self, anchor: &str, text: &str) -> Option<Vec<u32>> {
        let whole = format!("{anchor}{text}");
        let spelled = self.tokenizer.encode_with_offsets(&whole).ok()?;
        let first = spelled.iter().position(|(_, span)| span.start >= anchor.len())?;
        // A token that reaches over the border is not what follows the anchor in any text.
        let is_clean = spelled[..first].iter().all(|(_, span)| span.end <= anchor.len());
        let ids: Vec<u32> = spelled[first..].iter().map(|&(id, _)| id).collect();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.trie.token(id)).copied().collect();
        (is_clean && bytes == text.as_bytes()).then_some(ids)
    }
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.spell(text).unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.is_canonical
    }
}
