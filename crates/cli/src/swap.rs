//! Loading a generator in place of another one while a server runs.

use std::error::Error;

use anyhow::{Context, Result, bail};
use exrail_checkpoint::Checkpoint;
use exrail_engine::{Admission, Free, Need};
use exrail_hub::Resolved;
use exrail_server::{BootProgress, LoadCall, Loader, Services, TraceLog};

use crate::{
    device::Planned,
    load::{AsItIs, Boot},
    memory,
    options::{EngineArgs, Sources},
    output::{Output, explain},
    preflight::Declared,
};

/// Names or paths of generators, each with its name in requests.
///
/// # Errors
/// There is no such generator, or two of them have one name.
pub(crate) fn named(sources: &Sources, given: Vec<String>) -> Result<Vec<(String, String)>> {
    let mut named: Vec<(String, String)> = Vec::new();
    for given in given {
        let name = sources.expected(&given)?.name;
        if let Some((_, other)) = named.iter().find(|(known, _)| *known == name) {
            bail!(
                "--also {given}: expected another name than `{name}`, which `{other}` has; rename its file"
            );
        }
        named.push((name, given));
    }
    Ok(named)
}

/// Loads the generators of a server.
pub(crate) struct Reloader {
    /// By their names in requests; the first one is that of `--model`.
    pub(crate) generators: Vec<(String, String)>,
    pub(crate) engine: EngineArgs,
    pub(crate) sources: Sources,
    pub(crate) declared: Declared,
    pub(crate) retries: u32,
    pub(crate) traces: TraceLog,
    pub(crate) output: Output,
}

impl Reloader {
    fn given(&self, name: &str) -> Option<&str> {
        let found = self.generators.iter().find(|(known, _)| known == name);
        found.map(|(_, given)| given.as_str())
    }

    fn run(&self, call: &LoadCall<'_>) -> Result<Services> {
        let given = self.given(call.model).context("expected one of the server's generators")?;
        let engine = EngineArgs { model: given.to_owned(), ..self.engine.clone() };
        // A manifest is of one model.
        let declared = (given == self.engine.model).then_some(&self.declared);
        let current = call.current.and_then(|current| self.given(current));
        let boot = Boot {
            board: call.board,
            output: self.output,
            keys: Some("as they were read at the start"),
            retries: self.retries,
            declared,
            traces: Some(&self.traces),
            sources: &self.sources,
            engine: &engine,
            encoder: None,
            collections: Vec::new(),
            prepare: &AsItIs,
            in_place_of: Some(InPlaceOf { call, current }),
        };
        boot.run()
    }
}

impl Loader for Reloader {
    fn load(&self, call: &LoadCall<'_>) -> Result<Services, Box<dyn Error + Send + Sync>> {
        self.run(call).map_err(|error| explain(&error).into())
    }
}

/// The place that a boot takes over.
pub(crate) struct InPlaceOf<'a> {
    pub(crate) call: &'a LoadCall<'a>,
    /// Name or path of the generator that has it.
    pub(crate) current: Option<&'a str>,
}

impl InPlaceOf<'_> {
    /// Waits for the place, if the model can fit into it at all.
    pub(crate) fn take_place(
        &self,
        boot: &Boot<'_>,
        model: &Resolved,
        progress: &BootProgress,
    ) -> Result<()> {
        self.would_fit(boot, model)?;
        let waits = format!("waiting for the place of {}", self.call.current.unwrap_or("nobody"));
        progress.doing(&waits);
        // Long requests are no stall.
        Ok(self.call.vacate(&mut || progress.made())?)
    }

    /// Compares the plan with what is free and what will be given back. What the plan of the present model
    /// overrates, such as pages that nobody has touched yet, the admission behind it still refuses.
    fn would_fit(&self, boot: &Boot<'_>, model: &Resolved) -> Result<()> {
        let args = boot.engine;
        let need = Need::Engine(args.engine());
        let Planned { footprint, free, .. } = Planned::of(args.device, args.cpu(), args.memory);
        let mut admission = Admission { device: footprint, free: None, need };
        // What is given by --memory is for all that is loaded.
        let back = if args.memory.is_none() { self.gives_back(boot, &admission) } else { 0 };
        admission.free = free.map(|Free { bytes, basis }| Free { bytes: bytes + back, basis });
        let checkpoint = Checkpoint::open(&model.path)?;
        admission.admit(&checkpoint, args.load()).map_err(memory::refused)?;
        Ok(())
    }

    /// Bytes of the present model; 0 where nobody can say.
    fn gives_back(&self, boot: &Boot<'_>, admission: &Admission<'_>) -> usize {
        let planned = |current: &str| -> Result<usize> {
            let found = boot.sources.expected(current)?;
            let plan = admission.plan(&Checkpoint::open(&found.path)?, boot.engine.load())?;
            Ok(plan.total().most - plan.reserve.bytes)
        };
        self.current.and_then(|current| planned(current).ok()).unwrap_or(0)
    }
}
