//! The layer table of ARCHITECTURE.md: rows `| layer | crate | … |`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

/// Where a crate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the product; may depend on lower numbers only.
    Layer(u32),
    /// Beside it (test kit, tools, benches): may use any crate, and no layer may use it.
    Beside,
}

/// Folder name of each crate, without the `exrail-` of the package.
pub(crate) type Table = BTreeMap<String, Place>;

/// Reads the first table whose head begins `| layer | crate |`.
///
/// # Errors
/// No such table, a layer that is neither a number nor `beside`, or a crate that stands twice.
pub(crate) fn parse(text: &str) -> Result<Table> {
    let mut lines = text.lines().skip_while(|line| !is_head(line));
    lines.next().context("expected a table with the head `| layer | crate | …`, found none")?;
    let mut table = Table::new();
    for line in lines.skip(1).take_while(|line| line.starts_with('|')) {
        let cells = cells(line);
        let [layer, name, ..] = cells[..] else {
            bail!("row `{line}`: expected a layer and a crate");
        };
        let place = match layer {
            "beside" => Place::Beside,
            number => Place::Layer(number.parse().with_context(|| {
                format!("row `{line}`: expected a number or `beside`, found `{number}`")
            })?),
        };
        let name = name.trim_matches('`').to_owned();
        ensure!(table.insert(name.clone(), place).is_none(), "crate `{name}` stands twice");
    }
    ensure!(!table.is_empty(), "the layer table has no rows");
    Ok(table)
}

fn is_head(line: &str) -> bool {
    cells(line).starts_with(&["layer", "crate"])
}

fn cells(line: &str) -> Vec<&str> {
    line.trim().trim_matches('|').split('|').map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# x\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\
        | layer | crate | what |\n|---|---|---|\n| 0 | `tensor` | x |\n| beside | `xtask` | y |\n\n\
        | 9 | `later` | not of the table |\n";

    #[test]
    fn rows_of_the_right_table_are_read() {
        let table = parse(TEXT).unwrap();
        let expected = [("tensor".into(), Place::Layer(0)), ("xtask".into(), Place::Beside)];
        assert_eq!(table, Table::from(expected));
    }

    #[test]
    fn a_page_without_the_table_is_refused() {
        let error = parse("# nothing\n").unwrap_err().to_string();
        assert!(error.contains("found none"), "{error}");
    }

    #[test]
    fn a_crate_that_stands_twice_is_refused() {
        let text = TEXT.replace("`xtask`", "`tensor`");
        assert_eq!(parse(&text).unwrap_err().to_string(), "crate `tensor` stands twice");
    }

    #[test]
    fn a_layer_that_is_no_number_is_named() {
        let error = parse(&TEXT.replace("| 0 |", "| low |")).unwrap_err().to_string();
        assert!(error.contains("found `low`"), "{error}");
    }
}
