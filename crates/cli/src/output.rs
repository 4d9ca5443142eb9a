//! The one place that prints: text for people, or JSON for programs.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this module is the output")]

use std::io::{IsTerminal, Write};

use serde_json::{Value, json};

/// Where and how a command prints.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
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
            println!("{text}");
        }
    }

    /// Text without a line break, shown at once.
    pub(crate) fn piece(self, text: &str) {
        if !self.json {
            print!("{text}");
            // A closed pipe ends the command at the next line.
            drop(std::io::stdout().flush());
        }
    }

    /// A value for programs only, one line.
    pub(crate) fn value(self, value: &Value) {
        if self.json {
            println!("{value}");
        }
    }

    /// A line about the run, beside the output.
    pub(crate) fn note(self, text: impl std::fmt::Display) {
        eprintln!("{text}");
    }

    /// The end of a command that failed.
    pub(crate) fn error(self, error: &anyhow::Error) {
        let text = explain(error);
        if self.json {
            println!("{}", json!({ "error": text }));
        }
        eprintln!("error: {text}");
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
