//! A rendered prompt, and its token ids.

use std::ops::Range;

use crate::{Specials, Tokenizer, TokenizerError};

/// A stretch of a prompt that comes from one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The text, never empty.
    pub text: String,
    /// Written by the template; `false` for what came out of a message.
    pub trusted: bool,
}

/// A rendered chat, split into what the template wrote and what the messages said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// In order; their concatenation is the prompt.
    pub segments: Vec<Segment>,
    /// Untrusted texts, for the test whether anything needs proof.
    contents: Vec<String>,
    /// Untrusted keys and words, which stand in the prompt as if the template had written them.
    fixed: Vec<String>,
    proof: Proof,
}

/// How sure the split into segments is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Proof {
    /// The marks were paired; `masked` is the prompt with every content replaced by filler.
    Marked { masked: String },
    /// The template changed the contents beyond recognition; there is one segment.
    None,
}

/// Why a prompt cannot become token ids.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// The template transforms contents, so a control literal in a message cannot be told from
    /// one of the template.
    #[error(
        "a message contains the control literal `{literal}`, and this chat template changes message contents so that it cannot be kept apart from the template's own"
    )]
    UnprovenContent {
        /// The literal in the message.
        literal: String,
    },
    /// A key or an identifier contains a control literal; neither can be told from the template's
    /// own text.
    #[error("a key or identifier of a tool or call contains the control literal `{literal}`")]
    ControlInKey {
        /// The literal.
        literal: String,
    },
    /// The tokenizer refused the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Prompt {
    /// A prompt whose `untrusted` ranges (ordered, disjoint) are proven.
    pub(crate) fn marked(
        plain: &str,
        untrusted: &[Range<usize>],
        masked: String,
        contents: Vec<String>,
        fixed: Vec<String>,
    ) -> Prompt {
        let mut segments = Vec::new();
        let mut at = 0;
        let mut push = |range: Range<usize>, trusted| {
            if !range.is_empty() {
                segments.push(Segment { text: plain[range].to_owned(), trusted });
            }
        };
        for range in untrusted {
            push(at..range.start, true);
            push(range.clone(), false);
            at = range.end;
        }
        push(at..plain.len(), true);
        Prompt { segments, contents, fixed, proof: Proof::Marked { masked } }
    }

    /// A prompt that nothing is known about.
    pub(crate) fn unproven(plain: String, contents: Vec<String>, fixed: Vec<String>) -> Prompt {
        let segments = vec![Segment { text: plain, trusted: true }];
        Prompt { segments, contents, fixed, proof: Proof::None }
    }

    /// The whole prompt.
    #[must_use]
    pub fn text(&self) -> String {
        self.segments.iter().map(|segment| segment.text.as_str()).collect()
    }

    /// Whether `text` stands in something that came from outside and may stand in trusted text: a key, or
    /// a message whose place is not proven.
    pub(crate) fn says(&self, text: &str) -> bool {
        let has = |texts: &[String]| texts.iter().any(|it| it.contains(text));
        has(&self.fixed) || (self.proof == Proof::None && has(&self.contents))
    }

    /// Byte ranges of the untrusted segments in [`Prompt::text`], in order.
    fn untrusted(&self) -> Vec<Range<usize>> {
        let mut at = 0;
        let mut ranges = Vec::new();
        for segment in &self.segments {
            let end = at + segment.text.len();
            if !segment.trusted {
                ranges.push(at..end);
            }
            at = end;
        }
        ranges
    }
}

/// Token ids of a rendered prompt, with exactly one BOS if the model wants one.
///
/// The text is cut into words as a whole, as the reference implementations do, so a prompt
/// without control literals in its messages gives the same ids. A control literal counts only
/// where every byte of it was written by the template.
///
/// # Errors
/// [`PromptError::ControlInKey`]; [`PromptError::UnprovenContent`] if a message contains a control literal and its place in the
/// prompt cannot be proven; [`PromptError::Tokenizer`] as [`Tokenizer::encode`].
pub fn encode_prompt(tokenizer: &Tokenizer, prompt: &Prompt) -> Result<Vec<u32>, PromptError> {
    let ids = encode_ranges(tokenizer, prompt)?;
    Ok(with_bos(tokenizer, ids.into_iter().map(|(id, _)| id).collect()))
}

/// Token ids of a prompt, and where its messages are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedPrompt {
    /// The ids.
    pub ids: Vec<u32>,
    /// The tokens of each message: of its text, and of what the template wrote around it up to its neighbours.
    /// Where that is more than one control token, the first one and what follows it up to the second end the
    /// message before. `None` for a text that the template changed, or an empty one.
    pub places: Vec<Option<Range<usize>>>,
}

/// [`encode_prompt`] with the place of each of `contents`, the messages' texts in their order.
///
/// # Errors
/// As [`encode_prompt`].
pub fn encode_messages(
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    contents: &[&str],
) -> Result<PlacedPrompt, PromptError> {
    encode_slots(tokenizer, prompt, contents, &[]).map(|(placed, _)| placed)
}

/// The tokens of a stretch of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotTokens {
    /// Indexes into the ids.
    pub tokens: Range<usize>,
    /// Text in front of the stretch that its first token holds, too.
    pub before: String,
    /// Text behind it that its last token holds, too.
    pub after: String,
}

/// [`encode_messages`] with the tokens of some stretches of the messages: each is the index of a content and bytes
/// of it. `None` for a stretch of a text that the template changed, and for one without text. Stretches of a message that
/// the template moved are told where they stand, so that they may come in another order.
///
/// # Errors
/// As [`encode_prompt`].
pub fn encode_slots(
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    contents: &[&str],
    slots: &[(usize, Range<usize>)],
) -> Result<(PlacedPrompt, Vec<Option<SlotTokens>>), PromptError> {
    let pieces = encode_ranges(tokenizer, prompt)?;
    let untrusted = prompt.untrusted();
    let text = prompt.text();
    let inside = |bytes: &Range<usize>| {
        let start = pieces.partition_point(|(_, piece)| piece.end <= bytes.start);
        start..pieces.partition_point(|(_, piece)| piece.start < bytes.end)
    };
    let texts: Vec<Range<usize>> = untrusted.iter().map(inside).collect();
    let ids: Vec<u32> = pieces.iter().map(|(id, _)| *id).collect();
    let cuts = cuts(tokenizer, &ids, &texts);
    let without_bos = ids.len();
    let ids = with_bos(tokenizer, ids);
    let shift = ids.len() - without_bos;
    let mut next = 0;
    let found = |content: &&str| {
        let is_it = |bytes: &Range<usize>| text[bytes.clone()].trim() == content.trim();
        let at = next + untrusted[next..].iter().position(is_it)?;
        next = at + 1;
        Some(at)
    };
    let found: Vec<Option<usize>> = contents.iter().map(found).collect();
    let place = |at: usize| {
        let start = if at == 0 { 0 } else { cuts[at] + shift };
        start..cuts[at + 1] + shift
    };
    let places = found.iter().map(|at| at.map(place)).collect();
    // A message that the template moved in front of an earlier one has no place among them, but its parts stand somewhere.
    let moved = |content: &str| {
        untrusted.iter().position(|bytes| text[bytes.clone()].trim() == content.trim())
    };
    let slot = |(content, slot): &(usize, Range<usize>)| {
        let at = (*found.get(*content)?).or_else(|| moved(contents[*content]))?;
        let bytes = in_prompt(&text, &untrusted[at], contents[*content], slot)?;
        let tokens = inside(&bytes);
        let (first, last) =
            (&pieces.get(tokens.start)?.1, &pieces.get(tokens.end.checked_sub(1)?)?.1);
        Some(SlotTokens {
            before: text.get(first.start..bytes.start).unwrap_or_default().to_owned(),
            after: text.get(bytes.end..last.end).unwrap_or_default().to_owned(),
            tokens: tokens.start + shift..tokens.end + shift,
        })
    };
    let slots = slots.iter().map(slot).collect();
    Ok((PlacedPrompt { ids, places }, slots))
}

/// Where bytes of a content stand in the prompt, whose place of it may have lost blanks around it.
fn in_prompt(
    text: &str,
    place: &Range<usize>,
    content: &str,
    slot: &Range<usize>,
) -> Option<Range<usize>> {
    let lead = |text: &str| text.len() - text.trim_start().len();
    let (there, here) = (place.start + lead(&text[place.clone()]), lead(content));
    let is_there =
        slot.start >= here && slot.start < slot.end && slot.end <= content.trim_end().len();
    is_there.then(|| there + slot.start - here..there + slot.end - here)
}

/// Where each text's message begins, and where the last one ends, as indexes of tokens.
fn cuts(tokenizer: &Tokenizer, ids: &[u32], texts: &[Range<usize>]) -> Vec<usize> {
    let mut cuts = vec![0];
    for (at, before) in texts.iter().enumerate() {
        let end = texts.get(at + 1).map_or(ids.len(), |next| next.start).max(before.end);
        let gap = before.end..end;
        let mut controls = gap.clone().filter(|&at| tokenizer.is_control(ids[at]));
        let cut = match (controls.next(), controls.next()) {
            (Some(_), Some(second)) => second,
            (Some(first), None) => first + 1,
            (None, _) => gap.start,
        };
        cuts.push(cut);
    }
    cuts
}

/// Ids with byte ranges of [`Prompt::text`].
fn encode_ranges(
    tokenizer: &Tokenizer,
    prompt: &Prompt,
) -> Result<Vec<(u32, Range<usize>)>, PromptError> {
    if let Some(literal) = prompt.fixed.iter().find_map(|it| tokenizer.control_literal_in(it)) {
        return Err(PromptError::ControlInKey { literal: literal.to_owned() });
    }
    let text = prompt.text();
    let untrusted = prompt.untrusted();
    let permitted = |literal: Range<usize>| {
        let next = untrusted.partition_point(|range| range.end <= literal.start);
        untrusted.get(next).is_none_or(|range| range.start >= literal.end)
    };
    let suspect = prompt.contents.iter().find_map(|it| tokenizer.control_literal_in(it));
    if let Some(literal) = suspect {
        let proven = match &prompt.proof {
            Proof::Marked { masked } => {
                tokenizer.controls_where(masked, &|_| true)
                    == tokenizer.controls_where(&text, &permitted)
            }
            Proof::None => false,
        };
        if !proven {
            return Err(PromptError::UnprovenContent { literal: literal.to_owned() });
        }
    }
    Ok(tokenizer.encode_where(&text, &permitted)?)
}

/// Token ids of a raw completion prompt, with exactly one BOS if the model wants one and the
/// text does not begin with it already.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn encode_completion(
    tokenizer: &Tokenizer,
    text: &str,
    specials: Specials,
) -> Result<Vec<u32>, TokenizerError> {
    Ok(with_bos(tokenizer, tokenizer.encode(text, specials)?))
}

/// Puts the BOS in front if the tokenizer adds one. Nothing is ever removed: a template that
/// writes two different prefix tokens means both (field-faults E5).
fn with_bos(tokenizer: &Tokenizer, mut ids: Vec<u32>) -> Vec<u32> {
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.add_bos())
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    ids
}
