//! The preflight diff for commands: a manifest, what the files say, and whether the model may be loaded.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use exrail_engine::{Class, Manifest, Row};
use exrail_verify::GoldenDistributions;
use serde_json::{Value, json};

use crate::{environment, output::Output, progress::Bars};

/// Mismatches that an error tells; the command prints all.
const TOLD: usize = 4;
/// Characters of a value in a table.
const CELL: usize = 34;

/// What is declared of the model, and what may be overlooked.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Preflight")]
pub(crate) struct Declared {
    /// Manifest that the model's files must agree with before its weights are loaded; write one with
    /// `exrail preflight MODEL --write FILE`.
    #[arg(long, value_name = "FILE", env = environment::MANIFEST)]
    pub(crate) manifest: Option<PathBuf>,
    /// Why a soft mismatch, such as another version of exrail, is overlooked: logged, and stamped into every
    /// trace. A hard one never is.
    #[arg(long, value_name = "REASON", requires = "manifest",
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) force: Option<String>,
}

impl Declared {
    /// Compares the files at `path` with the manifest; `None` when there is no manifest.
    pub(crate) fn compare(&self, path: &Path, bars: &mut Bars) -> Result<Option<Compared>> {
        let Some(file) = &self.manifest else { return Ok(None) };
        let manifest = Manifest::read(file)?;
        let rows = manifest.check(path, &mut hashing(path, bars))?;
        bars.clear();
        let golden = manifest.distributions().map(GoldenDistributions::from_json).transpose();
        let shown = file.display().to_string();
        let golden = golden.with_context(|| format!("manifest {shown}"))?;
        Ok(Some(Compared { file: shown, rows, golden, force: self.force.clone() }))
    }
}

/// Writes a manifest in whole: one that is cut in two would refuse its own model.
pub(crate) fn save(manifest: &Manifest, file: &Path) -> Result<()> {
    let partial = file.with_extension("partial");
    let written =
        std::fs::write(&partial, manifest.to_json()).and_then(|()| std::fs::rename(&partial, file));
    written.with_context(|| format!("file {}", file.display()))
}

/// A progress function for the hash of the files at `path`.
pub(crate) fn hashing<'a>(
    path: &Path,
    bars: &'a mut Bars,
) -> impl FnMut(u64) -> std::io::Result<()> + 'a {
    let total = crate::load::model_bytes(path);
    move |bytes| {
        bars.hash(bytes, total);
        Ok(())
    }
}

/// What a comparison found.
pub(crate) struct Compared {
    file: String,
    rows: Vec<Row>,
    golden: Option<GoldenDistributions>,
    force: Option<String>,
}

impl Compared {
    fn differing(&self, class: Class) -> Vec<&Row> {
        self.rows.iter().filter(|row| !row.agrees() && row.class == class).collect()
    }

    /// What the loaded model is to be compared with.
    pub(crate) fn golden(&self) -> Option<&GoldenDistributions> {
        self.golden.as_ref()
    }

    /// The reason for which soft mismatches are overlooked, when there are any.
    pub(crate) fn overlooked(&self) -> Option<&str> {
        self.force.as_deref().filter(|_| !self.differing(Class::Soft).is_empty())
    }

    /// A line for people, or what stands in the way.
    pub(crate) fn verdict(&self) -> Result<String> {
        let (hard, soft) = (self.differing(Class::Hard), self.differing(Class::Soft));
        let file = &self.file;
        if !hard.is_empty() {
            bail!(
                "manifest {file}: expected all values to agree, found {} hard mismatches: {}; `exrail preflight` \
                 prints the table, and nothing overrides it",
                hard.len(),
                told(&hard)
            );
        }
        match (&self.force, soft.len()) {
            (_, 0) => Ok(format!("manifest: {} values agree", self.rows.len())),
            (Some(reason), n) => Ok(format!("manifest: {n} soft mismatches overlooked: {reason}")),
            (None, n) => bail!(
                "manifest {file}: expected all values to agree, found {n} soft mismatches: {}; pass --force \
                 REASON to go on, or write the manifest anew",
                told(&soft)
            ),
        }
    }

    /// The same for a diagnosis.
    pub(crate) fn section(&self) -> exrail_verify::Manifest {
        exrail_verify::Manifest {
            values: self.rows.len(),
            differs: self.verdict().err().map(|error| error.to_string()),
            overlooked: self.overlooked().map(str::to_owned),
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "path": row.path,
                "declared": row.declared,
                "effective": row.effective,
                "class": class_name(row.class),
                "verdict": self.row_verdict(row),
            })
        };
        json!({
            "passes": self.verdict().is_ok(),
            "forced": self.overlooked(),
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
        })
    }

    fn row_verdict(&self, row: &Row) -> &'static str {
        match (row.agrees(), row.class, &self.force) {
            (true, Class::Hard | Class::Soft, _) => "agrees",
            (false, Class::Soft, Some(_)) => "overlooked",
            (false, Class::Hard, _) | (false, Class::Soft, None) => "REFUSED",
        }
    }

    /// The table declared, effective, verdict; golden texts that agree are only counted.
    pub(crate) fn print(&self, output: Output) {
        let (value, declared) = ("value", "declared");
        output.line(format!("{value:38} {declared:34} {:34} verdict", "effective"));
        let mut n_golden = 0;
        for row in &self.rows {
            if row.agrees() && row.path.starts_with("golden.") {
                n_golden += 1;
                continue;
            }
            let (declared, effective) = (cell(row.declared.as_ref()), cell(row.effective.as_ref()));
            let (path, verdict) = (cut(&row.path, 38), self.row_verdict(row));
            output.line(format!("{path:38} {declared:34} {effective:34} {verdict}"));
        }
        output.line(format!("{n_golden} golden texts, control tokens and conversations agree"));
    }
}

fn class_name(class: Class) -> &'static str {
    match class {
        Class::Hard => "hard",
        Class::Soft => "soft",
    }
}

fn told(rows: &[&Row]) -> String {
    let one = |row: &&Row| {
        let (declared, found) = (cell(row.declared.as_ref()), cell(row.effective.as_ref()));
        format!("`{}`: declared {declared}, found {found}", cut(&row.path, CELL))
    };
    let mut told: Vec<_> = rows.iter().take(TOLD).map(one).collect();
    if rows.len() > TOLD {
        told.push(format!("and {} more", rows.len() - TOLD));
    }
    told.join("; ")
}

fn cell(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), |value| cut(&value.to_string(), CELL))
}

/// At most so many characters, on one line.
fn cut(text: &str, most: usize) -> String {
    let line = text.escape_debug().to_string().replace("\\\"", "\"");
    if line.chars().count() <= most {
        return line;
    }
    let head: String = line.chars().take(most - 1).collect();
    format!("{head}…")
}
