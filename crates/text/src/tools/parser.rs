//! Takes generated text apart while it grows: thought, text, calls.
//!
//! Text that may still become a marker is held back, as stop strings are; a call is held back until its last
//! bracket and its closing marker. What comes out depends on the text alone, not on how it was cut.

use super::judge::{Verdict, is_meant, judge};
use super::region::{Ended, Kind, Region};
use super::{CallFault, CallLimits, Malformed, Piece, ThoughtLead, Thoughts, ToolFamily};
use super::{ToolFormat, ToolSpec};

/// Reads one answer. Made by [`ToolFormat::parser`].
#[derive(Clone, Debug)]
pub struct CallParser {
    /// Markers that open a call.
    openings: Vec<(&'static str, Kind)>,
    /// Whether an object at the beginning of the answer may be a call.
    has_leading: bool,
    tools: Vec<ToolSpec>,
    limits: CallLimits,
    thoughts: Option<Thoughts>,
    state: State,
    /// Text that nothing is decided about.
    held: String,
    /// Blanks since the beginning or the last call: of no meaning if a call follows.
    space: String,
    /// Text has been given since the beginning or the last call.
    is_visible: bool,
    /// A thought came last: the blanks behind it belong to its markers.
    is_behind_thought: bool,
    n_calls: usize,
}

#[derive(Clone, Debug)]
enum State {
    /// The answer may begin with a thought.
    MayThink,
    Thought,
    /// Behind nothing but blanks: an object may be a call.
    Leading,
    Text,
    Call(Region),
}

impl CallParser {
    pub(crate) fn new(
        format: &ToolFormat,
        tools: &[ToolSpec],
        lead: ThoughtLead,
        limits: CallLimits,
    ) -> CallParser {
        let (mut openings, mut has_leading) = openings(format.family);
        if tools.is_empty() {
            openings.clear();
            has_leading = false;
        }
        let begin = if has_leading { State::Leading } else { State::Text };
        let state = match lead {
            ThoughtLead::Absent => begin,
            ThoughtLead::MayOpen if format.thoughts.is_none() => begin,
            ThoughtLead::MayOpen => State::MayThink,
            ThoughtLead::IsOpen => State::Thought,
        };
        CallParser {
            openings,
            has_leading,
            tools: tools.to_vec(),
            limits,
            thoughts: format.thoughts.clone(),
            state,
            held: String::new(),
            space: String::new(),
            is_visible: false,
            is_behind_thought: false,
            n_calls: 0,
        }
    }

    /// Takes the next piece of text; gives what has become certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces) {}
        pieces
    }

    /// The answer ended. A call that did not is [`CallFault::Cut`], never a call.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Text) {
            State::Thought if held.is_empty() => {}
            State::Thought => pieces.push(Piece::Thought(held)),
            State::MayThink | State::Leading | State::Text => self.release(&held, &mut pieces),
            State::Call(Region { kind: Kind::Leading, .. }) if !is_meant(&held, &self.tools) => {
                self.release(&held, &mut pieces);
            }
            State::Call(_) => self.tell(held, CallFault::Cut, &mut pieces),
        }
        let space = std::mem::take(&mut self.space);
        if !space.is_empty() && self.n_calls == 0 && !self.is_behind_thought {
            pieces.push(Piece::Text(space));
        }
        pieces
    }

    /// How many calls there were.
    #[must_use]
    pub fn n_calls(&self) -> usize {
        self.n_calls
    }

    /// Decides one thing; false when more text is needed.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::MayThink => self.may_think(),
            State::Thought => self.thought(pieces),
            State::Leading => self.leading(),
            State::Text => self.text(pieces),
            State::Call(region) => match region.step(&self.held, self.limits.bytes) {
                None => false,
                Some(ended) => {
                    let kind = region.kind;
                    self.ended(kind, &ended, pieces);
                    true
                }
            },
        }
    }

    fn may_think(&mut self) -> bool {
        let Some(thoughts) = &self.thoughts else {
            self.state = self.beginning();
            return true;
        };
        let text = self.held.trim_start();
        if text.starts_with(&thoughts.open) {
            let len = self.held.len() - text.len() + thoughts.open.len();
            self.held.drain(..len);
            self.state = State::Thought;
            return true;
        }
        if thoughts.open.starts_with(text) {
            return false;
        }
        self.state = self.beginning();
        true
    }

    fn thought(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let close = self.thoughts.as_ref().map_or("", |thoughts| thoughts.close.as_str());
        let found = if close.is_empty() { None } else { self.held.find(close) };
        let (len, rest) = match found {
            Some(at) => (at, at + close.len()),
            None => {
                let len = self.held.len() - partial(&self.held, close);
                (len, len)
            }
        };
        let thought = self.held[..len].to_owned();
        self.held.drain(..rest);
        if !thought.is_empty() {
            pieces.push(Piece::Thought(thought));
        }
        if found.is_some() {
            self.is_behind_thought = true;
            self.state = self.beginning();
        }
        found.is_some()
    }

    fn beginning(&self) -> State {
        if self.has_leading { State::Leading } else { State::Text }
    }

    /// Behind a call a semicolon may stand before the next one.
    fn leading(&mut self) -> bool {
        let mut rest = self.held.trim_start();
        if self.n_calls > 0 {
            rest = rest.strip_prefix(';').unwrap_or(rest).trim_start();
        }
        if rest.is_empty() {
            return false;
        }
        if rest.starts_with('{') {
            let len = self.held.len() - rest.len();
            self.space.extend(self.held.drain(..len));
            self.state = State::Call(Region::new(Kind::Leading, 0));
        } else {
            self.state = State::Text;
        }
        true
    }

    fn text(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let held = std::mem::take(&mut self.held);
        let found = self.openings.iter().filter_map(|(marker, kind)| {
            held.find(marker).map(|at| (at, std::cmp::Reverse(marker.len()), *kind))
        });
        if let Some((at, std::cmp::Reverse(len), kind)) = found.min_by_key(|it| (it.0, it.1)) {
            self.release(&held[..at], pieces);
            self.held = held[at..].to_owned();
            self.state = State::Call(Region::new(kind, len));
            return true;
        }
        let hold = self.openings.iter().map(|(marker, _)| partial(&held, marker)).max();
        let len = held.len() - hold.unwrap_or(0);
        self.release(&held[..len], pieces);
        self.held = held[len..].to_owned();
        false
    }

    fn ended(&mut self, kind: Kind, ended: &Ended, pieces: &mut Vec<Piece>) {
        let verdict = judge(kind, &self.held, ended, &self.tools);
        let stretch: String = self.held.drain(..ended.len).collect();
        self.state = State::Text;
        match verdict {
            Verdict::Text => self.release(&stretch, pieces),
            Verdict::Fault(fault) => self.tell(stretch, fault, pieces),
            Verdict::Calls(calls) if self.n_calls + calls.len() > self.limits.calls => {
                self.tell(stretch, CallFault::TooMany { limit: self.limits.calls }, pieces);
            }
            Verdict::Calls(calls) => {
                for mut call in calls {
                    call.index = self.n_calls;
                    self.n_calls += 1;
                    pieces.push(Piece::Call(call));
                }
                self.space.clear();
                self.is_visible = false;
                self.is_behind_thought = false;
                // A fence may be followed by another one anyway.
                self.state = self.beginning();
            }
        }
    }

    /// Gives text to the reader, blanks only once something follows them.
    fn release(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        if self.is_visible {
            pieces.push(Piece::Text(text.to_owned()));
            return;
        }
        self.space.push_str(text);
        if self.space.trim().is_empty() {
            return;
        }
        let text = std::mem::take(&mut self.space);
        let text = if self.is_behind_thought { text.trim_start().to_owned() } else { text };
        self.is_visible = true;
        self.is_behind_thought = false;
        pieces.push(Piece::Text(text));
    }

    fn tell(&mut self, text: String, fault: CallFault, pieces: &mut Vec<Piece>) {
        let space = std::mem::take(&mut self.space);
        let text = if self.is_behind_thought { text } else { space + &text };
        self.is_visible = true;
        self.is_behind_thought = false;
        pieces.push(Piece::Malformed(Malformed { text, fault }));
    }
}

/// The markers of a family, and whether an object at the beginning may be a call.
fn openings(family: ToolFamily) -> (Vec<(&'static str, Kind)>, bool) {
    match family {
        ToolFamily::Hermes | ToolFamily::Generic => {
            (vec![("<tool_call>", Kind::Fenced { close: "</tool_call>" })], false)
        }
        ToolFamily::Llama3 => (vec![("<|python_tag|>", Kind::Tagged)], true),
        ToolFamily::Mistral => (vec![("[TOOL_CALLS]", Kind::Mistral)], false),
        ToolFamily::Gemma => (vec![("```tool_call", Kind::Fenced { close: "```" })], false),
    }
}

/// Length of the longest end of `text` that begins `marker` without being all of it.
fn partial(text: &str, marker: &str) -> usize {
    let most = text.len().min(marker.len().saturating_sub(1));
    (1..=most).rev().find(|&len| text.as_bytes().ends_with(&marker.as_bytes()[..len])).unwrap_or(0)
}
