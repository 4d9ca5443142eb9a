//! `exrail fix`: the pages that a diagnosis names.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::{Ended, output::Output, pack};

/// Print the page about a fault.
///
/// A report that does not pass names the page to start with. Each says what a user sees, why it happens, what to change and
/// how to check that it helped.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail fix                       the names
  exrail fix chunking-checklist    one page, in Markdown")]
pub(crate) struct Fix {
    /// Page, as a report names it; absent: all names and titles.
    #[arg(value_name = "NAME")]
    page: Option<String>,
}

impl Fix {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let pages = pack::pages();
        let Some(name) = &self.page else {
            let longest = pages.iter().map(|page| page.name.len()).max().unwrap_or_default();
            for page in &pages {
                output.line(format!("{:longest$}  {}", page.name, page.title()));
            }
            let each = |page: &pack::Page| json!({ "page": page.name, "title": page.title() });
            output.value(&json!({ "pages": pages.iter().map(each).collect::<Vec<Value>>() }));
            return Ok(Ended::Done);
        };
        let Some(page) = pages.iter().find(|page| page.name == name.as_str()) else {
            let names: Vec<&str> = pages.iter().map(|page| page.name).collect();
            bail!("page `{name}`: expected one of {}, found none", names.join(", "));
        };
        output.line(page.text.trim_end());
        output.value(&json!({ "page": page.name, "title": page.title(), "text": page.text }));
        Ok(Ended::Done)
    }
}
