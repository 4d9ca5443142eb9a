//! The one place that prints: text for people, or JSON for programs.

#![expect(clippy::print_stderr, reason = "this module is the output")]

use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal, Write};

use serde_json::{Value, json};

/// Where and how a command prints.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
    is_silent: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, is_silent: false }
    }

    /// Nobody looks at it.
    pub(crate) fn silent() -> Self {
        Self { json: true, is_silent: true }
    }

    /// Whether nobody does.
    pub(crate) fn is_silent(self) -> bool {
        self.is_silent
    }

    /// Whether a person sees it on a terminal.
    pub(crate) fn is_terminal(self) -> bool {
        !self.json && std::io::stdout().is_terminal()
    }

    /// Columns of the terminal, or a readable default.
    pub(crate) fn width(self) -> usize {
        let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        columns.unwrap_or(100)
    }

    /// A line for people only.
    pub(crate) fn line(self, text: impl std::fmt::Display) {
        if !self.json {
            write(format_args!("{text}\n"));
        }
    }

    /// Text without a line break, shown at once.
    pub(crate) fn piece(self, text: &str) {
        if !self.json {
            write(format_args!("{text}"));
        }
    }

    /// A value for programs only, one line.
    pub(crate) fn value(self, value: &Value) {
        if self.json && !self.is_silent {
            write(format_args!("{value}\n"));
        }
    }

    /// A line about the run, beside the output.
    pub(crate) fn note(self, text: impl std::fmt::Display) {
        if !self.is_silent {
            eprintln!("{text}");
        }
    }

    /// The end of a command that failed.
    pub(crate) fn error(self, error: &anyhow::Error) {
        let text = explain(error);
        if self.json {
            write(format_args!("{}\n", json!({ "error": text })));
        }
        eprintln!("error: {text}");
    }
}

/// What the shell reports of a command that a closed pipe ended: 128 and the number of SIGPIPE.
const CLOSED_PIPE: i32 = 141;

/// Prints at once. Who reads the output may leave early, as `head` does: then there is nobody to
/// print for and the command ends, as other commands do.
fn write(text: Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(CLOSED_PIPE),
        Err(error) => {
            eprintln!("error: output: {error}");
            std::process::exit(1);
        }
    }
}

/// The chain of causes, without those that an outer message has already told.
pub(crate) fn explain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| {
        let cause = cause.to_string();
        match told.as_str() {
            "" => cause,
            outer if outer.contains(&cause) => told,
            outer => format!("{outer}: {cause}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let error =
            anyhow::anyhow!("x.gguf: truncated").context("x.gguf: truncated").context("model");
        assert_eq!(explain(&error), "model: x.gguf: truncated");
    }
}
