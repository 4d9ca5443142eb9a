//! Asks questions over evidence behind guards, and measures whether a system that does so may be
//! trusted: calibration, the λ probe, gates, and the acceptance report.
//!
//! The server and the probes answer a question through the same two functions, [`begin`] before
//! and [`conclude`] after the generator, so what is measured is what is served. Models and indexes
//! are behind the traits [`Generate`], [`Retrieve`] and [`exrail_retrieval::Encode`]; nothing here
//! knows HTTP or the engine.
//!
//! Section numbers (§1.1, G-15 and so on) are those of the project's guardrail specification.

mod answer;
mod ask;
mod attribution;
mod cache;
mod calibrate;
mod cite;
mod collection;
mod diagnose;
mod distributions;
mod encode;
mod error;
mod evaluate;
mod evidence_gate;
mod fix;
mod gates;
mod gold;
mod held_out;
mod injection;
mod lambda_modes;
mod leak;
mod lexical;
mod live;
mod observations;
mod positions;
mod probe;
mod prompt;
mod quant;
mod render;
mod report;
mod resonance;
mod retrieval_quality;
mod rules;
mod runs;
mod scale;
mod steps;
mod system;
mod tool_fence;
pub mod trace;

#[cfg(any(test, feature = "fakes"))]
pub mod fakes;
#[cfg(test)]
mod null_tests;
#[cfg(any(test, feature = "fakes"))]
pub mod sound;
#[cfg(test)]
mod tests;

pub use answer::{CitationSource, ParsedAnswer, Segment, UnknownCitation, parse_answer};
pub use ask::{
    AnswerCheck, AskOutcome, AskPolicy, Begun, ConstraintCheck, DeltaSGate, GateReading, LeakCheck,
    RefusalReason, answer_over, ask, begin, conclude, evidence_ds, retrieve,
};
pub use attribution::{Attribution, attribute};
pub use cache::{
    BIN_TOKENS, Bin, CHECKPOINT_TOKENS, CacheFault, CacheObservations, CacheOracle, CacheReport,
    Checkpoint, KvWidth, MIN_PROBE_TOKENS, ProbeText, UntilDrift, cache_probe, drift,
};
pub use calibrate::{
    CorpusCalibration, FamilyFit, JointScale, MaskedNull, Signal, SignalFit, calibrate,
};
pub use cite::{cite_lark, step_lark};
pub use collection::CollectionIndex;
pub use diagnose::{
    AssemblyCheck, AssemblyObservation, AssemblySystem, BootSection, CacheSection, Change,
    CompareError, Comparison, DiagnosedDeltaS, DiagnosedLambda, Diagnosis, DiagnosisConfig,
    Distance, GateChange, InjectionSection, Manifest, MatrixObservation, ModeFidelity, PINS, Parts,
    QuantPart, QuantisationSection, QuestionSection, QuestionSnippet, Reasons, RepeatCheck,
    RepeatObservation, RetrievalBits, RetrievedBits, SchemaObservation, SchemaSection, Section,
    Served, ShardSection, SpikeAttribution, SpikeCause, VectorCheck, VectorObservations, Weights,
    WeightsSection, WrongMatrix, ask_index, attribute_spike, check_assembly, check_repeats,
    check_vectors, compare, diagnose, retrieved_bits, schema_probe,
};
pub use distributions::{
    GOLDEN_KL, GOLDEN_PLACES, GoldenDistributions, GoldenDivergence, GoldenError,
};
pub use error::{CalibrationError, GoldError, VerifyError};
pub use evaluate::{Progress, Stage, System, VerifyOptions, verify, verify_observed};
pub use evidence_gate::EvidenceGate;
pub use fix::{Confidence, Fix, FixStage, Mismatch};
pub use gates::unfit_in_words;
pub use gold::{
    AnchorMode, EvidenceQuote, GoldItem, GoldKind, GoldSet, ResolvedItem, ResolvedSpan,
};
pub use held_out::{HeldOut, HeldOutErrors, Rate, Splits};
pub use injection::{
    Attack, AttackClass, AttackOutcome, InjectionTally, SuccessClass, injection_suite,
};
pub use lambda_modes::{
    Difference, FaultStage, FoundAt, ItemComparison, ItemMode, ItemModes, LambdaModes,
    LambdaModesOptions, LambdaModesReport, LeakCause, ModeComparison, ModeCost, ModeSection,
    ModeSystem, ModesProgress, RetrievalCheck, RetrievalEquality, Stages, Told,
};
pub use leak::{LEAK_TOKENS, Leak, LeakGuard, LeakWatch, Screened};
pub use lexical::LexicalEvidence;
pub use live::{Distance as AnswerDistance, LiveChecker, LiveChecks};
pub use observations::{
    AnswerObservation, ChunkObservation, CitedObservation, Observations, ReadingObservation,
    RefusalObservation, RetrievalObservation, ScaleObservation, Stretches, SweepObservation,
    observe_scale,
};
pub use probe::{ItemLambda, lambda_probe};
pub use prompt::{
    FenceBroken, FrameMessage, Live, Nonce, PromptFrame, REFUSAL_TOKEN, Slot, constraints_sha256,
};
pub use quant::{
    BaselineDiffers, FidelityBaseline, FidelityGate, LIMITS_FROM_PARAMETERS, NoiseFloor, QuantMode,
    QuantReport, QuantText, Regression, RowOracle, TextFidelity, TextObservations, quant_probe,
};
pub use render::Color;
pub use report::{
    Config, Cost, CoverageSection, DeltaSSection, Gate, LambdaSection, Measured, NotMeasured, Pins,
    Report, RetrievalItem, Sample, Status, Unit, Verdict,
};
pub use resonance::{
    MODE_TOKENS, ModeResonance, ReplyWindows, ResonanceDifference, ResonanceSection, Said,
    TREND_TOKENS, WriteOn, long_replies,
};
pub use retrieval_quality::{
    Asked, CoverageAt, DEPTHS, Difference as PairedDifference, FirstStage, Missed,
    RetrievalQuality, WeightRow, retrieval_quality,
};
pub use rules::{
    BadRule, Contradiction, EchoDiffers, HardRule, MAX_PATTERN_BYTES, MAX_PATTERNS, MAX_RULE_BYTES,
    MAX_RULES, NLI, RuleSet, RuleWatch, compare_echo, read_rules, write_rules,
};
pub use runs::{FrozenRuns, ModeLambda, ProbeRun};
pub use scale::AnswerScale;
pub use steps::{
    LOGIC_COLLAPSE, MAX_ROLLBACKS, MAX_STEPS, STALL_STEPS, Step, StepCheck, StepFault, StepPolicy,
    step_seed,
};
pub use system::{
    Generate, GenerateError, Generated, GeneratedEnd, GeneratorFacts, OfSchema, Placed, Retrieve,
    RetrieveError, SamplingKind,
};
pub use tool_fence::{
    Refusal, TAINT_WORDS, TaintPolicy, ToolCircuit, ToolFence, Verdict as ToolVerdict, dedupe_key,
};
