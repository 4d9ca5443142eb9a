//! `exrail fix`: what to do about a fault.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    Ended, markdown,
    output::Output,
    pack::{self, Page},
};

/// Print the page about a fault.
///
/// There is a page for each of the five breakpoints and for each guard. It says what a user sees, why it happens, where
/// exrail shows it, what to change in exrail, in a gateway or in the pipeline, and how to confirm that it helped. A
/// report that does not pass names the page to start with.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail fix                             the names
  exrail fix chunking-checklist          one page, in Markdown
  exrail fix G-17                        the page of a guard
  exrail fix chunking-checklist --background
                                         the method behind it, a page of the sample corpus")]
pub(crate) struct Fix {
    /// Page, as a report names it, or a guard, such as G-17; absent: all names and titles.
    #[arg(value_name = "NAME")]
    page: Option<String>,
    /// Print the page of the sample corpus, which explains the method and knows nothing of this program.
    #[arg(long, requires = "page")]
    background: bool,
}

impl Fix {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let Some(name) = &self.page else {
            list(*output);
            return Ok(Ended::Done);
        };
        let page = if self.background { named(name, &pack::pages()) } else { named(name, &all()) }?;
        let text = page.text.trim_end();
        if output.is_terminal() {
            output.piece(&markdown::for_terminal(text, output.width()));
        } else {
            output.line(text);
        }
        let guard = page.guard();
        output.value(&json!({
            "page": page.name, "guard": guard, "title": page.title(), "text": page.text
        }));
        Ok(Ended::Done)
    }
}

/// Fix pages, and behind them the pages of the corpus whose names they do not have.
fn all() -> Vec<Page> {
    let mut pages = pack::fixes();
    let others =
        pack::pages().into_iter().filter(|page| pages.iter().all(|it| it.name != page.name));
    let others: Vec<Page> = others.collect();
    pages.extend(others);
    pages
}

fn named(name: &str, pages: &[Page]) -> Result<Page> {
    let is_meant = |page: &&Page| {
        page.name == name || page.guard().is_some_and(|guard| guard.eq_ignore_ascii_case(name))
    };
    if let Some(page) = pages.iter().find(is_meant) {
        return Ok(*page);
    }
    let names = pages.iter().map(|page| page.name);
    let near: Vec<&str> = names.filter(|it| it.contains(name) || name.contains(it)).collect();
    let near =
        if near.is_empty() { String::new() } else { format!(" such as {}", near.join(", ")) };
    bail!("page `{name}`: expected a name{near}, found none; `exrail fix` lists all")
}

fn list(output: Output) {
    let (fixes, pages) = (pack::fixes(), all());
    let longest = pages.iter().map(|page| page.name.len()).max().unwrap_or_default();
    for (place, page) in pages.iter().enumerate() {
        if place == fixes.len() {
            output.line("\nBackground, of the sample corpus:");
        }
        output.line(format!("{:longest$}  {}", page.name, page.title()));
    }
    let each = |page: &Page| {
        let is_fix = fixes.iter().any(|fix| fix.name == page.name);
        json!({ "page": page.name, "guard": page.guard(), "title": page.title(), "fix": is_fix })
    };
    output.value(&json!({ "pages": pages.iter().map(each).collect::<Vec<Value>>() }));
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::Cli;

    /// What every fix page has, in this order.
    const HEADINGS: [&str; 5] = [
        "## Symptom",
        "## Cause",
        "## How exrail measures it",
        "## What to change",
        "## How to confirm",
    ];
    /// Where something can be changed.
    const PLACES: [&str; 3] =
        ["- In exrail: ", "- In a gateway or another server: ", "- In the pipeline: "];
    /// Lines that a person reads without losing patience.
    const MAX_LINES: usize = 60;

    /// The parts of the text between backticks, and the lines of its blocks of code.
    fn code(text: &str) -> Vec<&str> {
        let mut parts = Vec::new();
        let mut in_block = false;
        for line in text.lines() {
            if line.starts_with("```") {
                in_block = !in_block;
            } else if in_block {
                parts.push(line);
            } else {
                parts.extend(line.split('`').skip(1).step_by(2));
            }
        }
        parts
    }

    /// Words as a shell makes them of our commands: quotes hold blanks together, ` #` begins a comment.
    fn words(command: &str) -> Vec<String> {
        let command = command.split(" #").next().unwrap_or_default();
        let parts = command.split('"').enumerate();
        parts
            .flat_map(|(place, part)| -> Vec<String> {
                if place % 2 == 1 {
                    vec![part.to_owned()]
                } else {
                    part.split_whitespace().map(str::to_owned).collect()
                }
            })
            .collect()
    }

    fn faults_of(page: Page) -> Vec<String> {
        let mut faults = Vec::new();
        let headings: Vec<&str> = page.text.lines().filter(|it| it.starts_with("## ")).collect();
        if headings != HEADINGS {
            faults.push(format!("expected the headings {HEADINGS:?}, found {headings:?}"));
        }
        if !page.text.lines().nth(2).is_some_and(|line| line.starts_with("In exrail: ")) {
            faults.push("expected a third line on whether exrail has it".to_owned());
        }
        for place in PLACES {
            if page.text.lines().filter(|line| line.starts_with(place)).count() != 1 {
                faults.push(format!("expected one item `{place}`"));
            }
        }
        let confirmed = page.text.split("## How to confirm").nth(1).unwrap_or_default();
        if !code(confirmed).iter().any(|part| part.starts_with("exrail ")) {
            faults.push("expected a command that confirms".to_owned());
        }
        if page.text.lines().count() > MAX_LINES {
            faults.push(format!("expected at most {MAX_LINES} lines"));
        }
        faults
    }

    #[test]
    fn every_page_has_its_parts() {
        let pages = pack::fixes();
        assert!(pages.len() >= 37, "five breakpoints and 32 guards, found {}", pages.len());
        for page in pages {
            let faults = faults_of(page);
            assert!(faults.is_empty(), "{}: {faults:?}", page.name);
        }
        let lacking = Page { name: "x", text: "# G-01: x\n\n## Symptom\n" };
        assert_eq!(faults_of(lacking).len(), 6, "{:?}", faults_of(lacking));
    }

    #[test]
    fn every_guard_and_every_breakpoint_has_one_page() {
        for number in 1..=32 {
            let guard = format!("G-{number:02}");
            let pages = pack::fixes();
            let n_pages = pages.iter().filter(|page| page.guard() == Some(guard.as_str())).count();
            assert_eq!(n_pages, 1, "{guard}");
            assert_eq!(named(&guard.to_lowercase(), &all()).unwrap().guard(), Some(&guard[..]));
        }
        let titles: Vec<&str> = pack::fixes().iter().map(|page| page.title()).collect();
        for (place, title) in titles.iter().take(5).enumerate() {
            assert!(title.starts_with(&format!("Breakpoint {}: ", place + 1)), "{titles:?}");
        }
    }

    /// The choice of a fix is in another crate; what it names is read out of its source.
    #[test]
    fn every_page_that_a_report_names_is_a_fix_page() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/src/fix.rs");
        let source = fs::read_to_string(source).unwrap();
        let fields = |name: &str| -> BTreeSet<String> {
            let field = format!("{name}: \"");
            let parts = source.split(&field).skip(1);
            parts.map(|part| part.split('"').next().unwrap().to_owned()).collect()
        };
        let decision_order = [
            "predeploy-collapse",
            "embedding-vs-semantic",
            "bootstrap-ordering",
            "deployment-deadlock",
            "context-drift",
            "entropy-collapse",
            "prompt-injection",
            "logic-collapse",
            "retrieval-playbook",
            "chunking-checklist",
            "retrieval-traceability",
            "quantisation-drift",
            "data-contracts",
            "tokenizer-drift",
        ];
        let named_there = fields("page");
        assert!(named_there.len() >= 5, "{named_there:?}");
        for page in named_there.iter().map(String::as_str).chain(decision_order) {
            assert!(pack::fixes().iter().any(|it| it.name == page), "{page}");
        }
        for guard in fields("guardrail") {
            assert!(named(&guard, &pack::fixes()).is_ok(), "{guard}");
        }
    }

    #[test]
    fn every_command_in_a_page_is_one_that_this_program_takes() {
        let mut n_commands = 0;
        for page in pack::fixes() {
            for command in code(page.text).into_iter().filter(|it| it.starts_with("exrail ")) {
                // A name alone, in a sentence, may lack what it requires.
                let parsed = Cli::try_parse_from(words(command));
                let is_name = page.text.contains(&format!("`{command}`"));
                let is_right = match &parsed {
                    Ok(_) => true,
                    Err(error) => {
                        is_name && error.kind() == clap::error::ErrorKind::MissingRequiredArgument
                    }
                };
                assert!(is_right, "{}: `{command}`: {}", page.name, parsed.err().unwrap());
                n_commands += 1;
            }
        }
        assert!(n_commands > 100, "{n_commands}");
        assert!(Cli::try_parse_from(words("exrail verify --golden x")).is_err());
    }

    /// All options of all commands, with their dashes.
    fn options(command: &clap::Command, into: &mut BTreeSet<String>) {
        let longs = command.get_arguments().filter_map(clap::Arg::get_long);
        into.extend(longs.map(|long| format!("--{long}")));
        command.get_subcommands().for_each(|it| options(it, into));
    }

    #[test]
    fn every_option_and_page_that_a_page_names_is_there() {
        let mut known = BTreeSet::new();
        options(&Cli::command(), &mut known);
        // Of vLLM, where a page says so.
        known.insert("--enforce-eager".to_owned());
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for page in pack::fixes() {
            for word in code(page.text).into_iter().flat_map(str::split_whitespace) {
                if word.starts_with("--") {
                    assert!(known.contains(word), "{}: {word}", page.name);
                }
                if word.starts_with("docs/") && word != "docs/" {
                    assert!(root.join(word).is_file(), "{}: {word}", page.name);
                }
            }
            for command in code(page.text) {
                if let Some(name) = command.strip_prefix("exrail fix ") {
                    assert!(named(name, &pack::fixes()).is_ok(), "{}: {name}", page.name);
                }
            }
        }
    }

    #[test]
    fn the_corpus_keeps_pages_of_its_own() {
        let background = named("chunking-checklist", &pack::pages()).unwrap();
        let fix = named("chunking-checklist", &all()).unwrap();
        assert_ne!(background.text, fix.text);
        assert_eq!(pack::pages().len(), 32);
        assert!(!pack::sample_text().contains("## How exrail measures it"));
        assert!(named("cache-oracle", &all()).is_ok(), "what has no fix page is printed, too");
    }
}
