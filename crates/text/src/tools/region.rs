//! The stretch of an answer that may be a call, from its marker to its end, while the text still grows.
//!
//! Every decision depends on the bytes up to where it is taken and never on how they were cut into pushes
//! (field-faults B21). Nothing is judged here but the extent; `judge` in `parser` looks inside.

use std::ops::Range;

use super::json::{Scan, Scanned};
use super::{CallFault, MAX_NAME_BYTES};

/// Separates the name from the arguments in Mistral's newer format.
pub(crate) const ARGUMENTS: &str = "[ARGS]";
/// Between the two, the identifier in the newest.
pub(crate) const CALL_ID: &str = "[CALL_ID]";
const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";

/// How a call begins and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Between two markers; this is the second.
    Fenced {
        /// Ends it.
        close: &'static str,
    },
    /// An object with which the answer begins.
    Leading,
    /// A marker and an object.
    Tagged,
    /// A marker, and a list or a name with arguments.
    Mistral,
}

/// A stretch and how far it has been looked at. All offsets are in the held text, whose first byte is the
/// first of the opening marker.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) kind: Kind,
    /// Bytes of the opening marker.
    opening_len: usize,
    at: usize,
    phase: Phase,
}

#[derive(Clone, Debug)]
enum Phase {
    /// Blanks before what decides about the format.
    Start,
    /// The name before `[ARGS]`.
    Name,
    /// The identifier behind `[CALL_ID]`.
    Id {
        name: Range<usize>,
    },
    /// Blanks before the arguments.
    Arguments {
        name: Range<usize>,
    },
    Json {
        start: usize,
        name: Option<Range<usize>>,
        scan: Scan,
    },
    /// Blanks before the closing marker.
    Tail {
        json: Range<usize>,
    },
    /// Qwen-Coder's elements.
    Xml {
        start: usize,
    },
    /// No call; the closing marker is looked for.
    Broken {
        fault: CallFault,
    },
}

/// A stretch that has ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ended {
    /// Bytes of the held text, the opening marker included.
    pub(crate) len: usize,
    pub(crate) body: Body,
}

/// What is inside.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Body {
    /// An object or a list that is called with.
    Json { json: Range<usize>, name: Option<Range<usize>> },
    /// `<function=…>` to `</function>`.
    Xml(Range<usize>),
    /// No call.
    Broken(CallFault),
    /// Nothing that even looks like one.
    Text,
}

/// Whether a text goes on as `literal`.
enum Meets {
    Yes,
    No,
    /// As far as it goes.
    NotYet,
}

fn meets(text: &[u8], literal: &str) -> Meets {
    let common = text.len().min(literal.len());
    if text[..common] != literal.as_bytes()[..common] {
        Meets::No
    } else if common == literal.len() {
        Meets::Yes
    } else {
        Meets::NotYet
    }
}

/// Outcome of one phase: go on with the next, or wait for text, or the end.
enum Step {
    Next(Phase),
    Wait,
    End(Ended),
}

impl Region {
    pub(crate) fn new(kind: Kind, opening_len: usize) -> Region {
        Region { kind, opening_len, at: opening_len, phase: Phase::Start }
    }

    /// Looks at what has come; `None` while the end is not among it. At most `limit` bytes are looked at.
    pub(crate) fn step(&mut self, held: &str, limit: usize) -> Option<Ended> {
        let window = &held.as_bytes()[..held.len().min(limit)];
        loop {
            match self.phase_step(window) {
                Step::Next(phase) => self.phase = phase,
                Step::End(ended) => return Some(ended),
                Step::Wait if held.len() > limit => {
                    let len = held.floor_char_boundary(limit).max(1);
                    return Some(Ended { len, body: Body::Broken(CallFault::TooLong { limit }) });
                }
                Step::Wait => return None,
            }
        }
    }

    fn phase_step(&mut self, window: &[u8]) -> Step {
        match &mut self.phase {
            Phase::Start => self.start(window),
            Phase::Name => self.name(window),
            Phase::Id { name } => {
                let name = name.clone();
                self.id(window, name)
            }
            Phase::Arguments { name } => {
                let name = name.clone();
                match skip_space(window, &mut self.at) {
                    None => Step::Wait,
                    Some(b'{') => self.json(Some(name)),
                    Some(_) => {
                        self.broken(CallFault::NotACall { expected: "an object of arguments" })
                    }
                }
            }
            Phase::Json { start, name, scan } => {
                while let Some(&byte) = window.get(self.at) {
                    match scan.advance(byte) {
                        Scanned::More => self.at += 1,
                        Scanned::End => {
                            self.at += 1;
                            let (json, name) = (*start..self.at, name.take());
                            return match self.kind {
                                Kind::Fenced { .. } => Step::Next(Phase::Tail { json }),
                                Kind::Leading | Kind::Tagged | Kind::Mistral => Step::End(Ended {
                                    len: self.at,
                                    body: Body::Json { json, name },
                                }),
                            };
                        }
                        Scanned::Bad(what) => {
                            let at = self.at - *start;
                            return self.broken(CallFault::NotJson { what, at });
                        }
                    }
                }
                Step::Wait
            }
            Phase::Tail { json } => {
                let json = json.clone();
                self.tail(window, json)
            }
            Phase::Xml { start } => {
                let start = *start;
                self.xml(window, start)
            }
            Phase::Broken { fault } => {
                let fault = fault.clone();
                match self.find_close(window) {
                    Some(len) => Step::End(Ended { len, body: Body::Broken(fault) }),
                    None => Step::Wait,
                }
            }
        }
    }

    fn start(&mut self, window: &[u8]) -> Step {
        if self.kind == Kind::Leading {
            return self.leading(window);
        }
        let Some(byte) = skip_space(window, &mut self.at) else { return Step::Wait };
        match (self.kind, byte) {
            (Kind::Fenced { .. } | Kind::Mistral, b'{' | b'[') | (Kind::Tagged, b'{') => {
                self.json(None)
            }
            (Kind::Fenced { .. }, b'<') => match meets(&window[self.at..], FUNCTION) {
                Meets::Yes => Step::Next(Phase::Xml { start: self.at }),
                Meets::NotYet => Step::Wait,
                Meets::No => self.no_call(),
            },
            (Kind::Mistral, _) if is_name_byte(byte) => Step::Next(Phase::Name),
            (Kind::Fenced { .. } | Kind::Tagged | Kind::Mistral | Kind::Leading, _) => {
                self.no_call()
            }
        }
    }

    /// `{"name"` or `{"type"` may begin a call; every other object is text as soon as that is certain.
    fn leading(&mut self, window: &[u8]) -> Step {
        let mut at = 1;
        if skip_space(window, &mut at).is_none() {
            return Step::Wait;
        }
        let keys = ["\"name\"", "\"type\""].map(|key| meets(&window[at..], key));
        if keys.iter().any(|it| matches!(it, Meets::Yes)) {
            self.at = 0;
            return self.json(None);
        }
        if keys.iter().any(|it| matches!(it, Meets::NotYet)) {
            return Step::Wait;
        }
        Step::End(Ended { len: 1, body: Body::Text })
    }

    fn name(&mut self, window: &[u8]) -> Step {
        let start = self.at;
        let name_len = window[start..].iter().take_while(|&&byte| is_name_byte(byte)).count();
        let end = start + name_len;
        if name_len > MAX_NAME_BYTES {
            self.at = end;
            return self.broken(CallFault::NotACall { expected: "a name of at most 64 bytes" });
        }
        let Some(&byte) = window.get(end) else { return Step::Wait };
        let name = start..end;
        if byte == b'{' {
            self.at = end;
            return self.json(Some(name));
        }
        match (meets(&window[end..], ARGUMENTS), meets(&window[end..], CALL_ID)) {
            (Meets::Yes, _) => {
                self.at = end + ARGUMENTS.len();
                Step::Next(Phase::Arguments { name })
            }
            (_, Meets::Yes) => {
                self.at = end + CALL_ID.len();
                Step::Next(Phase::Id { name })
            }
            (Meets::NotYet, _) | (_, Meets::NotYet) => Step::Wait,
            (Meets::No, Meets::No) => {
                self.at = end;
                self.broken(CallFault::NotACall { expected: "`[ARGS]` behind the name" })
            }
        }
    }

    fn id(&mut self, window: &[u8], name: Range<usize>) -> Step {
        let len = window[self.at..].iter().take_while(|&&byte| is_name_byte(byte)).count();
        let end = self.at + len;
        match meets(&window[end..], ARGUMENTS) {
            Meets::NotYet => Step::Wait,
            Meets::Yes => {
                self.at = end + ARGUMENTS.len();
                Step::Next(Phase::Arguments { name })
            }
            Meets::No => {
                self.at = end;
                self.broken(CallFault::NotACall { expected: "`[ARGS]` behind the identifier" })
            }
        }
    }

    fn json(&mut self, name: Option<Range<usize>>) -> Step {
        Step::Next(Phase::Json { start: self.at, name, scan: Scan::default() })
    }

    fn tail(&mut self, window: &[u8], json: Range<usize>) -> Step {
        let Kind::Fenced { close } = self.kind else {
            return Step::End(Ended { len: self.at, body: Body::Json { json, name: None } });
        };
        if skip_space(window, &mut self.at).is_none() {
            return Step::Wait;
        }
        match meets(&window[self.at..], close) {
            Meets::Yes => {
                let len = self.at + close.len();
                Step::End(Ended { len, body: Body::Json { json, name: None } })
            }
            Meets::NotYet => Step::Wait,
            Meets::No => self.broken(CallFault::ExtraText),
        }
    }

    /// A value may speak of the closing marker; the one behind `</function>` counts.
    fn xml(&mut self, window: &[u8], start: usize) -> Step {
        loop {
            let Some(len) = self.find_close(window) else { return Step::Wait };
            let Kind::Fenced { close } = self.kind else { return self.no_call() };
            let body = start..len - close.len();
            if window[body.clone()].trim_ascii_end().ends_with(FUNCTION_END.as_bytes()) {
                return Step::End(Ended { len, body: Body::Xml(body) });
            }
            self.at = len;
        }
    }

    /// Where the next closing marker at or behind `at` ends; remembers what has been looked at.
    fn find_close(&mut self, window: &[u8]) -> Option<usize> {
        let Kind::Fenced { close } = self.kind else { return None };
        let close = close.as_bytes();
        let found = window[self.at..].windows(close.len()).position(|it| it == close);
        match found {
            Some(offset) => Some(self.at + offset + close.len()),
            None => {
                self.at = self.at.max((window.len() + 1).saturating_sub(close.len()));
                None
            }
        }
    }

    fn no_call(&mut self) -> Step {
        self.broken(CallFault::NotACall { expected: "an object with a name and arguments" })
    }

    /// Behind a marker with a closing one the whole stretch is broken, otherwise up to here.
    fn broken(&mut self, fault: CallFault) -> Step {
        match self.kind {
            Kind::Fenced { .. } => {
                self.at = self.opening_len;
                Step::Next(Phase::Broken { fault })
            }
            Kind::Leading | Kind::Tagged | Kind::Mistral => {
                // The end of the last whole character: a fault may be at the first byte of one.
                Step::End(Ended { len: self.at.max(1), body: Body::Broken(fault) })
            }
        }
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-'
}

/// The byte behind blanks.
fn skip_space(window: &[u8], at: &mut usize) -> Option<u8> {
    while window.get(*at).is_some_and(u8::is_ascii_whitespace) {
        *at += 1;
    }
    window.get(*at).copied()
}
