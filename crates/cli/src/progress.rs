//! Progress bars on the terminal; nothing when nobody looks.

use std::time::Duration;

use exrail_model::LoadProgress;
use exrail_quantize::QuantizeProgress;
use exrail_retrieval::IngestProgress;
use exrail_server::BootProgress;
use exrail_verify::{Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::Output;

/// Shows one stage at a time on standard error.
pub(crate) struct Bars {
    output: Output,
    bar: Option<(String, ProgressBar)>,
    /// Hears that a boot goes on.
    boot: Option<BootProgress>,
}

impl Bars {
    pub(crate) fn new(output: Output) -> Self {
        Self { output, bar: None, boot: None }
    }

    /// The bars of a boot, which is told of everything that they show.
    pub(crate) fn of_boot(output: Output, boot: BootProgress) -> Self {
        Self { output, bar: None, boot: Some(boot) }
    }

    /// The bar of a stage; another stage's bar is finished first.
    fn stage(&mut self, name: &str, total: Option<u64>, template: &str) -> &ProgressBar {
        if self.bar.as_ref().is_none_or(|(current, _)| current != name) {
            self.clear();
        }
        if let Some(boot) = &self.boot {
            boot.doing(name);
        }
        let (_, bar) = self.bar.get_or_insert_with(|| {
            let bar = match total {
                // indicatif draws to standard error, and only when that is a terminal.
                _ if self.output.is_silent() => ProgressBar::hidden(),
                Some(total) => ProgressBar::new(total),
                None => ProgressBar::new_spinner(),
            };
            // The templates are constants of this file.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
            }
            bar.set_message(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            (name.to_owned(), bar)
        });
        bar
    }

    /// Takes the bar away.
    pub(crate) fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    pub(crate) fn load(&mut self, progress: &LoadProgress) {
        let total = progress.n_total as u64;
        self.stage("load weights", Some(total), COUNT).set_position(progress.n_done as u64);
    }

    /// The hash of a model, while somebody waits for it.
    pub(crate) fn hash(&mut self, bytes: u64, total_bytes: u64) {
        self.stage("hash model", Some(total_bytes), BYTES).set_position(bytes);
    }

    pub(crate) fn quantize(&mut self, progress: &QuantizeProgress) {
        match *progress {
            QuantizeProgress::Hashed { bytes, total_bytes } => {
                self.hash(bytes, total_bytes);
            }
            QuantizeProgress::Quantised { n_done, n_total } => {
                let bar = self.stage("quantise layers", Some(n_total as u64), COUNT);
                bar.set_position(n_done as u64);
            }
        }
    }

    pub(crate) fn ingest(&mut self, progress: IngestProgress) {
        let total = progress.total as u64;
        self.stage("embed chunks", Some(total), COUNT).set_position(progress.embedded as u64);
    }

    /// How many runs of the warm-up are done.
    pub(crate) fn warm_up(&mut self, done: usize, total: usize) {
        self.stage("warm up", Some(total as u64), COUNT).set_position(done as u64);
    }

    /// How many of `total` runs are done.
    pub(crate) fn bench(&mut self, what: &str, done: usize, total: usize) {
        self.stage(what, Some(total as u64), COUNT).set_position(done as u64);
    }

    pub(crate) fn probe(&mut self, progress: Progress) {
        let name = match progress.stage {
            Stage::Calibrate => "calibrate ΔS",
            Stage::Retrieve => "retrieve",
            Stage::Answer => "answer",
            Stage::Refuse => "ask the unanswerable",
            Stage::Lambda => "probe λ",
            Stage::Encode => "compare vectors",
            Stage::Assemble => "build prompts",
            Stage::Write => "write at length",
        };
        self.stage(name, Some(progress.n_total as u64), COUNT).set_position(progress.n_done as u64);
    }
}

const BYTES: &str = "  {msg:24} {wide_bar:.cyan/dim} {bytes:>10}/{total_bytes} {eta:>4}";
const COUNT: &str = "  {msg:24} {wide_bar:.cyan/dim} {pos:>6}/{len} {eta:>4}";
const SPIN: &str = "  {msg:24} {spinner} {elapsed}";

impl exrail_hub::Progress for Bars {
    fn start(&mut self, what: &str, total_bytes: Option<u64>) {
        self.clear();
        // pip tells nothing while it runs.
        let template = if what.starts_with("pip ") { SPIN } else { BYTES };
        self.stage(what, total_bytes, template);
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(boot) = &self.boot {
            boot.made();
        }
        if let Some((_, bar)) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        self.clear();
    }

    fn note(&mut self, text: &str) {
        self.clear();
        self.output.note(format!("  {text}"));
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.clear();
    }
}
