//! `exrail diagnose`: a model, an encoder and a collection measured once in every part, with one fix.

mod compare;
mod measure;
mod served;
mod write;

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Result, bail};
use clap::Args;
use exrail_server::{BootBoard, Services};
use exrail_verify::{Color, GoldSet, Verdict, VerifyOptions};

pub(crate) use self::served::Served;

use self::measure::Run;
use super::{
    demo::{self, Corpus},
    verify::{Calibrate, SampleArgs},
};
use crate::{
    Ended,
    load::{Boot, CollectionSpec, Prepare},
    options::{EncoderArgs, EngineArgs, QuantOption, Sources},
    output::Output,
    preflight::Declared,
};

/// Measure everything once, judge it and name the smallest fix; or compare two such reports.
///
/// Boots the model as it is served, with encoder and collection, and measures ΔS, coverage, citations, refusals and λ over
/// the gold set, the KV cache against fresh prefills, int8 and int4 against the stored weights, and 180 attempts to inject.
/// Prints where to start. Exits 0 when every gate passes and 3 when one does not; with --compare 0 when no gate got
/// worse and 3 when one did.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail diagnose                                          the default model on the sample corpus
  exrail diagnose model.gguf --gold gold.jsonl --collection docs --html report.html --junit report.xml
  exrail diagnose model.gguf --manifest model.manifest.json --made-of Org/Model-16bit
  exrail diagnose model.gguf --json > new.json
  exrail diagnose --compare old.json new.json              whether another model made a gate worse
  exrail diagnose --compare old.json new.json --under-test index_hash")]
pub(crate) struct Diagnose {
    /// Generator: a name of the registry, a GGUF file or a Hugging Face folder.
    #[arg(value_name = "MODEL")]
    diagnosed: Option<String>,
    /// The gold set, JSON lines; that of the sample corpus when absent.
    #[arg(long, value_name = "FILE", requires = "collection")]
    gold: Option<PathBuf>,
    /// The collection: a name, a folder, or NAME=DIR; the sample corpus when absent.
    #[arg(long, value_name = "NAME|DIR", requires = "gold")]
    collection: Option<String>,
    /// A question of your own: its ΔS and what it retrieves.
    #[arg(long, value_name = "TEXT")]
    question: Option<String>,
    /// The checkpoint that the model was quantised from: every matrix is compared with it.
    #[arg(long, value_name = "NAME|PATH")]
    made_of: Option<String>,
    /// Ask every question of the gold set, and read four times as much text: minutes become tens of them.
    #[arg(long)]
    deep: bool,
    /// Widths that are compared with the stored weights.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "int8,int4")]
    modes: Vec<QuantOption>,
    /// Write the report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the report as JUnit XML, for CI.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Where to write what every number was computed from, JSON lines; into the folder of the traces when absent.
    #[arg(long, value_name = "FILE")]
    observations: Option<PathBuf>,
    /// Compare two reports of `exrail diagnose --json`, and measure nothing.
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    compare: Option<Vec<PathBuf>>,
    /// With --compare: the pin that may differ between the reports.
    #[arg(long, value_name = "PIN", requires = "compare", default_value = "model_fp",
          value_parser = clap::builder::PossibleValuesParser::new(exrail_verify::PINS))]
    under_test: String,
    #[command(flatten)]
    declared: Declared,
    #[command(flatten)]
    sample: DiagnosedSample,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Sample")]
struct DiagnosedSample {
    /// Answerable questions to answer; 12 when absent, all with --deep.
    #[arg(long, value_name = "N")]
    answered: Option<usize>,
    /// Unanswerable questions to ask; 12 when absent, all with --deep.
    #[arg(long, value_name = "N")]
    unanswerable: Option<usize>,
    /// Questions to probe for λ, 12 generations each; 3 when absent, 50 with --deep.
    #[arg(long, value_name = "N")]
    lambda: Option<usize>,
    /// Tokens of the cache probe, at least 2,048; 2,048 when absent, 8,192 with --deep, at most the context.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2048..))]
    cache_tokens: Option<u64>,
    /// Tokens of each text that the widths are compared on; 2,048 when absent, 8,192 with --deep.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(512..))]
    quant_tokens: Option<u64>,
    /// Seed that chooses the samples.
    #[arg(long, value_name = "N", default_value_t = 1)]
    sample_seed: u64,
}

impl Diagnose {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        if let Some(files) = &self.compare {
            let [a, b] = files.as_slice() else { bail!("--compare: expected two files") };
            return compare::run(a, b, &self.under_test, *output);
        }
        if self.question.as_ref().is_some_and(|question| question.trim().is_empty()) {
            bail!("--question: expected text, found none");
        }
        match (&self.gold, &self.collection) {
            (Some(gold), Some(collection)) => {
                let gold = GoldSet::read(gold)?;
                let spec = CollectionSpec::parse(collection)?;
                self.measure(&gold, &spec, &Calibrate { gold: &gold, anew: false }, *output)
            }
            _ => {
                let pack = demo::unpack()?;
                let gold = GoldSet::read(&pack.join("gold.jsonl"))?;
                let spec = CollectionSpec::parse(demo::COLLECTION)?;
                let corpus = Corpus { documents: pack.join("docs"), gold: &gold, spec: &spec };
                self.measure(&gold, &spec, &corpus, *output)
            }
        }
    }

    fn measure(
        &self,
        gold: &GoldSet,
        spec: &CollectionSpec,
        prepare: &dyn Prepare,
        output: Output,
    ) -> Result<Ended> {
        let started = Instant::now();
        let services = self.boot(&self.engine(), Some((spec, prepare)), output)?;
        let ready_s = started.elapsed().as_secs_f64();
        let index = services.collections[&spec.name].index().remembering();
        let run = Run {
            options: self,
            services: &services,
            index: &index,
            gold,
            spec,
            output,
            started,
            ready_s,
            is_over: &|| false,
        };
        let measured = run.measure();
        services.engine.shutdown();
        let (diagnosis, observed) = measured?;
        let json = diagnosis.to_json()?;
        let file = write::observations(self.observations.as_deref(), &diagnosis, &observed)?;
        write::trace(&services, spec, &diagnosis.trace_id, &json)?;
        if let Some(html) = &self.html {
            write::file(html, &diagnosis.render_html())?;
        }
        if let Some(junit) = &self.junit {
            write::file(junit, &diagnosis.render_junit())?;
        }
        output.note(format!("observations: {}", file.display()));
        output.value(&json);
        let color = if output.is_terminal() { Color::Always } else { Color::Never };
        output.line(diagnosis.render_text(output.width(), color).trim_end());
        Ok(match diagnosis.verdict {
            Verdict::Pass => Ended::Done,
            Verdict::Review | Verdict::Fail | Verdict::Inconclusive => Ended::NotPassed,
        })
    }

    fn model(&self) -> &str {
        self.diagnosed.as_ref().unwrap_or(&self.engine.model)
    }

    /// The options as given.
    fn engine(&self) -> EngineArgs {
        EngineArgs { model: self.model().to_owned(), ..self.engine.clone() }
    }

    /// Boots a generator, with the collection or alone.
    fn boot(
        &self,
        engine: &EngineArgs,
        collection: Option<(&CollectionSpec, &dyn Prepare)>,
        output: Output,
    ) -> Result<Services> {
        Boot {
            board: &Arc::new(BootBoard::new()),
            keys: None,
            retries: 0,
            declared: None,
            traces: None,
            output,
            sources: &self.sources,
            engine,
            encoder: collection.map(|_| &self.encoder),
            collections: collection.iter().map(|(spec, _)| (*spec).clone()).collect(),
            prepare: collection.map_or(&crate::load::AsItIs, |(_, prepare)| prepare),
            in_place_of: None,
        }
        .run()
    }

    fn sample(&self) -> SampleArgs {
        let quick = VerifyOptions::default();
        let or = |asked: Option<usize>, quick, deep| {
            asked.unwrap_or(if self.deep { deep } else { quick })
        };
        SampleArgs {
            answered: or(self.sample.answered, quick.n_answered, usize::MAX),
            unanswerable: or(self.sample.unanswerable, quick.n_unanswerable, usize::MAX),
            lambda: or(self.sample.lambda, quick.n_lambda, 50),
            sample_seed: self.sample.sample_seed,
        }
    }

    /// Questions whose prompts are built; none means all.
    fn n_prompts(&self) -> Option<usize> {
        (!self.deep).then_some(60)
    }

    /// Tokens of the cache probe, and of each text of the widths.
    fn tokens(&self) -> (Option<usize>, usize, usize) {
        let most = if self.deep { 8192 } else { 2048 };
        let size = |tokens: u64| usize::try_from(tokens).unwrap_or(usize::MAX);
        let asked = self.sample.cache_tokens.map(size);
        (asked, most, self.sample.quant_tokens.map_or(most, size))
    }
}
