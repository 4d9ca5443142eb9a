//! [`quantize`]: a whole checkpoint, unit by unit.

use std::collections::HashSet;
use std::path::Path;

use exrail_checkpoint::{HfFolder, QuantMethod, sha256_file};
use exrail_kernels::{Backend, TokenId};
use exrail_model::{Block, embed_tokens};
use exrail_tensor::{DType, IntGrid};

use crate::finish::finish;
use crate::manifest::{CalibrationIdentity, Identity, Method, SourceFile, UnitReport};
use crate::options::{Calibration, QuantizeOptions};
use crate::overlay::Overlay;
use crate::plan::{Item, Plan, Treatment, check_finite, check_view};
use crate::recorder::Recorder;
use crate::shard::Stored;
use crate::work::WorkFolder;
use crate::{
    Codes, GptqTensors, KeptTensor, Manifest, QuantisedTensor, QuantizeError, WeightError,
    calibrate,
};

/// How far a run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantizeProgress {
    /// Bytes of the source hashed.
    Hashed {
        /// So far.
        bytes: u64,
        /// Of all files.
        total_bytes: u64,
    },
    /// Units finished: the tensors outside the layers, and each layer.
    Quantised {
        /// So far, those of an earlier run included.
        n_done: usize,
        /// All.
        n_total: usize,
    },
}

/// Quantises the Hugging Face folder `source` into the new folder `destination`.
///
/// The result is written to `destination` with `.partial` behind its name and renamed when it is
/// whole. A run that finds such a folder of a run with the same source and options goes on there;
/// the bytes of the result do not depend on how often it was interrupted.
///
/// Memory: the tensors of one layer, quantised; one matrix in 32 bits; with calibration the 16-bit
/// layer, one 64-bit matrix K x K for each distinct input of the layer and two for the matrix at
/// work, and the residual stream of all calibration tokens in 32 bits.
///
/// # Errors
/// The source is refused, quantised already or not finite; the destination exists or is another
/// run's; the calibration does not fit the model; or a file cannot be written.
pub fn quantize<B: Backend + Clone>(
    backend: &B,
    source: &Path,
    destination: &Path,
    options: &QuantizeOptions,
    report: &mut dyn FnMut(QuantizeProgress),
) -> Result<Manifest, QuantizeError> {
    let folder = open(source)?;
    if let Some(calibration) = &options.calibration {
        let expected = folder.config().vocab_size;
        if let Some(&found) = calibration.ids.iter().find(|&&id| id as usize >= expected) {
            return Err(QuantizeError::UnknownToken { expected, found });
        }
    }
    let plan = Plan::new(&folder, options)?;
    let identity = identity(&folder, source, options, report)?;
    let work = WorkFolder::open(destination, &identity, plan.units.len())?;
    let run = Run { backend, folder: &folder, plan: &plan, work: &work };
    let n_total = plan.units.len();
    let mut done = |n_done| report(QuantizeProgress::Quantised { n_done, n_total });
    done(0);
    run.unit(0, None)?;
    done(1);
    match &options.calibration {
        None => {
            for unit in 1..n_total {
                run.unit(unit, None)?;
                done(unit + 1);
            }
        }
        Some(calibration) => run.calibrated_layers(calibration, &mut done)?,
    }
    finish(work, source, &plan, identity)
}

fn open(source: &Path) -> Result<HfFolder, QuantizeError> {
    if source.is_file() {
        return Err(QuantizeError::NotAFolder { path: source.to_owned() });
    }
    let folder = HfFolder::open(source)?;
    match folder.quant_method() {
        None => Ok(folder),
        Some(method) => {
            let found = match method {
                QuantMethod::Gptq(config) => format!("gptq, {} bits", config.bits),
                QuantMethod::Awq(_) => "awq, 4 bits".to_owned(),
                QuantMethod::Exl2 => "exl2".to_owned(),
                QuantMethod::Exl3 => "exl3".to_owned(),
            };
            Err(QuantizeError::AlreadyQuantised { path: source.to_owned(), found })
        }
    }
}

fn identity(
    folder: &HfFolder,
    source: &Path,
    options: &QuantizeOptions,
    report: &mut dyn FnMut(QuantizeProgress),
) -> Result<Identity, QuantizeError> {
    let mut files = vec![source.join("config.json")];
    files.extend(folder.weight_files());
    let total_bytes = folder.len_bytes();
    let (mut before, mut hashed) = (0, Vec::with_capacity(files.len()));
    for path in files {
        let mut len = 0;
        let sha256 = sha256_file(&path, &mut |bytes| {
            len = bytes;
            // config.json is not counted in the total.
            let bytes = (before + bytes).min(total_bytes);
            report(QuantizeProgress::Hashed { bytes, total_bytes });
            Ok(())
        })
        .map_err(QuantizeError::io(&path))?;
        before += len;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hashed.push(SourceFile { name, sha256 });
    }
    let calibration = options.calibration.as_ref().map(|calibration| CalibrationIdentity {
        text_sha256: calibration.text_sha256.clone(),
        n_tokens: calibration.ids.len(),
        sequence_len: Calibration::sequence_len(folder.config().context_len),
    });
    let (bits, group) = (options.grid.bits(), options.group);
    Ok(Identity { source: hashed, bits, group, calibration })
}

/// What all units share.
struct Run<'a, B> {
    backend: &'a B,
    folder: &'a HfFolder,
    plan: &'a Plan,
    work: &'a WorkFolder,
}

impl<B: Backend + Clone> Run<'_, B> {
    /// Quantises a unit if it is not there yet, with the inputs of its matrices if there are some.
    fn unit(&self, unit: usize, inputs: Option<&Recorder<B>>) -> Result<(), QuantizeError> {
        if self.work.finished(unit)?.is_some() {
            return Ok(());
        }
        let (mut tensors, mut report) = (Vec::new(), UnitReport::default());
        for item in &self.plan.units[unit] {
            match &item.treatment {
                Treatment::Keep { reason } => {
                    let view = self.folder.stored_tensor(&item.stored)?;
                    check_view(&view)?;
                    report.kept.push(KeptTensor {
                        name: item.stored.clone(),
                        dtype: view.dtype.to_string(),
                        reason: reason.clone(),
                    });
                    tensors.push(Stored {
                        name: item.stored.clone(),
                        dtype: safetensors_type(view.dtype),
                        shape: view.shape.to_vec(),
                        bytes: view.bytes,
                    });
                }
                Treatment::Quantise { grid, group, fallback } => {
                    let (codes, mut done) = self.matrix(item, *grid, *group, inputs)?;
                    if done.fallback.is_none() {
                        done.fallback.clone_from(fallback);
                    }
                    report.quantised.push(done);
                    tensors.extend(packed(module(&item.stored), &codes));
                }
            }
        }
        // Widest elements first, so that each tensor lies on a multiple of its elements.
        tensors.sort_by_key(|tensor| tensor.dtype != "I32" && tensor.dtype != "F32");
        self.work.finish_unit(unit, &tensors, &report)
    }

    fn matrix(
        &self,
        item: &Item,
        grid: IntGrid,
        group: usize,
        inputs: Option<&Recorder<B>>,
    ) -> Result<(Codes, QuantisedTensor), QuantizeError> {
        let view = self.folder.stored_tensor(&item.stored)?;
        let (rows, columns) = (view.shape[0], view.shape[1]);
        let values = view.to_f32()?;
        check_finite(&item.stored, &values, 0)?;
        let nearest = || {
            let codes = Codes::nearest(grid, &values, columns, group);
            let error = WeightError::measure(&codes, &values, None);
            (codes, error, None)
        };
        let name = item.name.as_deref().unwrap_or_default();
        let calibrated = inputs.and_then(|inputs| {
            inputs.hessian(name, |hessian| {
                let found = calibrate(&item.stored, grid, &values, hessian, group)?;
                let error = WeightError::measure(&found.codes, &values, Some(hessian));
                Ok::<_, QuantizeError>((found.codes, error, Some(found.damping)))
            })
        });
        let unreached = inputs.is_some() && calibrated.is_none();
        let (codes, error, damping) = calibrated.transpose()?.unwrap_or_else(nearest);
        let tensor = QuantisedTensor {
            name: item.stored.clone(),
            shape: [rows, columns],
            method: if damping.is_some() { Method::Calibrated } else { Method::Nearest },
            bits: grid.bits(),
            group,
            fallback: unreached.then(|| "no calibration token reached it".to_owned()),
            damping,
            error,
        };
        Ok((codes, tensor))
    }

    /// Layer by layer: its inputs come from the quantised layers before it.
    fn calibrated_layers(
        &self,
        calibration: &Calibration,
        done: &mut dyn FnMut(usize),
    ) -> Result<(), QuantizeError> {
        let (config, backend) = (self.folder.config(), self.backend);
        let ids: Vec<TokenId> = calibration.ids.iter().map(|&id| TokenId(id)).collect();
        let sequence_len = Calibration::sequence_len(config.context_len);
        let sequence = sequence_len * config.width;
        let mut residual: Option<Vec<f32>> = None;
        let n_units = self.plan.units.len();
        let mut n_unfinished = 0;
        for unit in 1..n_units {
            n_unfinished += usize::from(self.work.finished(unit)?.is_none());
        }
        for unit in 1..n_units {
            if n_unfinished == 0 {
                break;
            }
            let layer_idx = unit - 1;
            let residual = match &mut residual {
                Some(residual) => residual,
                None => residual.insert(embed_tokens(backend, config, self.folder, &ids)?),
            };
            if self.work.finished(unit)?.is_none() {
                let recorder = Recorder::new(backend.clone(), self.watched(unit));
                let mut block =
                    Block::load(&recorder, config, self.folder, layer_idx, sequence_len)?;
                let mut scratch = Vec::with_capacity(sequence);
                for sequence in residual.chunks(sequence) {
                    scratch.clear();
                    scratch.extend_from_slice(sequence);
                    block.run(&recorder, &mut scratch);
                }
                drop(block);
                self.unit(unit, Some(&recorder))?;
                n_unfinished -= 1;
            }
            done(unit + 1);
            if n_unfinished > 0 {
                let overlay = Overlay::new(self.folder, &self.work.shard(unit), self.items(unit))?;
                let mut block = Block::load(backend, config, &overlay, layer_idx, sequence_len)?;
                residual.chunks_mut(sequence).for_each(|sequence| block.run(backend, sequence));
            }
        }
        Ok(())
    }

    fn items(&self, unit: usize) -> &[Item] {
        &self.plan.units[unit]
    }

    /// The engine's names of the matrices of a unit that are to be quantised.
    fn watched(&self, unit: usize) -> HashSet<String> {
        let quantised = |item: &&Item| matches!(item.treatment, Treatment::Quantise { .. });
        self.items(unit).iter().filter(quantised).filter_map(|item| item.name.clone()).collect()
    }
}

/// The module of a weight: its name without `.weight`.
pub(crate) fn module(stored: &str) -> &str {
    stored.strip_suffix(".weight").unwrap_or(stored)
}

/// The tensors that a GPTQ checkpoint has for a module.
fn packed(module: &str, codes: &Codes) -> [Stored<'static>; 4] {
    let GptqTensors { qweight, qzeros, scales, g_idx } = GptqTensors::pack(codes);
    let per_word = 32 / codes.grid.bits() as usize;
    let (n, k, n_groups) = (codes.rows, codes.columns, codes.n_groups());
    let words = |name: &str, shape: Vec<usize>, words: Vec<i32>| Stored {
        name: format!("{module}.{name}"),
        dtype: "I32",
        shape,
        bytes: words.into_iter().flat_map(i32::to_le_bytes).collect(),
    };
    [
        words("g_idx", vec![k], g_idx),
        words("qweight", vec![k / per_word, n], qweight),
        words("qzeros", vec![n_groups, n / per_word], qzeros),
        Stored {
            name: format!("{module}.scales"),
            dtype: "F16",
            shape: vec![n_groups, n],
            bytes: scales.into_iter().flat_map(u16::to_le_bytes).collect(),
        },
    ]
}

/// What safetensors calls a type; the source has only these.
fn safetensors_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::BF16 => "BF16",
        DType::F16
        | DType::Q4_0
        | DType::Q4_1
        | DType::Q5_0
        | DType::Q5_1
        | DType::Q8_0
        | DType::Q2_K
        | DType::Q3_K
        | DType::Q4_K
        | DType::Q5_K
        | DType::Q6_K
        | DType::IQ4_NL
        | DType::IQ4_XS
        | DType::MXFP4 => "F16",
    }
}
