//! From what was written to an automaton.

use std::sync::{Arc, Mutex, PoisonError};

use jsonschema::Draft;
use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::BiasComputer;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use toktrie::InferenceCapabilities;

use crate::cache::{Cache, estimate};
use crate::plain::PlainTokens;
use crate::screen::pattern::{Reach, rewrite};
use crate::screen::{Keep, screen, unsupported};
use crate::validate::Validator;
use crate::worker::Workers;
use crate::{GrammarError, Matcher, Source, Vocabulary, gbnf, lark, measure};

/// Lexer states that one sequence may build; each takes one to two kilobytes.
const LEXER_STATES: usize = 50_000;

/// Most work of the lexer for one mask, about 40 ms. The places that [`PlainTokens`] visits take part of it.
pub(crate) const STEP_FUEL: u64 = 600_000;

/// Bounds of one grammar and of the cache of them. Grammars come from clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a schema or a text.
    pub source_bytes: usize,
    /// Deepest nesting of a schema.
    pub depth: usize,
    /// Most values, of any kind, in a schema.
    pub values: usize,
    /// Most values of one `enum`.
    pub enum_values: usize,
    /// Longest time to compile one, waiting for a place included, in milliseconds.
    pub compile_ms: u64,
    /// Grammars that are compiled at once.
    pub compiled_at_once: usize,
    /// Bytes of compiled grammars that are kept, estimated from their sources.
    pub cache_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            source_bytes: 1 << 20,
            depth: 64,
            values: 50_000,
            enum_values: 10_000,
            compile_ms: 5_000,
            compiled_at_once: 4,
            cache_bytes: 64 << 20,
        }
    }
}

/// Compiles grammars for one vocabulary and keeps the last ones. Share it behind an `Arc`.
pub struct Compiler {
    vocabulary: Vocabulary,
    automata: Arc<Automata>,
    limits: Limits,
    workers: Workers,
    cache: Mutex<Cache>,
}

/// What makes automata over one vocabulary.
struct Automata {
    vocabulary: Vocabulary,
    factory: ParserFactory,
    masks: Arc<dyn BiasComputer>,
}

/// A compiled grammar. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    inner: Arc<Inner>,
}

struct Inner {
    /// SHA-256 of the source, as hexadecimal digits.
    sha256: String,
    start: Matcher,
    validator: Option<Validator>,
    /// Pointers of what the mask does not enforce.
    checked: Vec<String>,
}

/// What a source becomes before the automaton is built.
struct Prepared {
    grammar: TopLevelGrammar,
    checked: Vec<String>,
    /// Of each schema.
    drafts: Vec<Draft>,
}

impl Compiler {
    /// A compiler without grammars. Reads the whole vocabulary.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`].
    pub fn new(vocabulary: Vocabulary, limits: Limits) -> Result<Compiler, GrammarError> {
        let automata = Arc::new(Automata::new(vocabulary.clone())?);
        let workers = Workers::new(limits.compiled_at_once);
        let cache = Mutex::new(Cache::new(limits.cache_bytes));
        Ok(Compiler { vocabulary, automata, limits, workers, cache })
    }

    /// The vocabulary.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Does once what the first request would wait for: a small grammar is compiled and its first mask computed.
    /// For the boot, before a server is ready.
    ///
    /// # Errors
    /// [`GrammarError`]; then no grammar can be compiled over this vocabulary.
    pub fn prepare(&self) -> Result<(), GrammarError> {
        let schema =
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]});
        self.compile(&Source::JsonSchema(schema)).map(drop)
    }

    /// Compiles, or finds what was compiled before. Never in the thread of an engine: it may take as long as the
    /// limits allow.
    ///
    /// # Errors
    /// [`GrammarError`] names the keyword and where it stands.
    pub fn compile(&self, source: &Source) -> Result<Grammar, GrammarError> {
        let source_bytes = self.measured(source)?;
        let sha256 = sha256(&canonical(source));
        let key = format!("{sha256} {}", self.vocabulary.fingerprint());
        if let Some(grammar) = self.cache().get(&key) {
            return Ok(grammar);
        }
        let (automata, limits, source) = (Arc::clone(&self.automata), self.limits, source.clone());
        let work = move || build(&automata, &source, &limits, sha256);
        let grammar = self.workers.within(limits.compile_ms, work)?;
        self.cache().insert(&key, grammar.clone(), estimate(source_bytes));
        Ok(grammar)
    }

    /// Grammars that are kept, and the bytes that they take by estimate.
    #[must_use]
    pub fn kept(&self) -> (usize, usize) {
        let cache = self.cache();
        (cache.len(), cache.bytes())
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        // The cache is whole between two calls whatever panicked elsewhere.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a source that is within the limits.
    fn measured(&self, source: &Source) -> Result<usize, GrammarError> {
        let text = match source {
            Source::JsonObject => "",
            Source::JsonSchema(schema) => return measure::check(schema, &self.limits),
            Source::Regex(text) | Source::Lark(text) | Source::Gbnf(text) => text,
            Source::Composed { lark, schemas } => {
                let mut bytes = lark.len();
                for schema in schemas {
                    bytes += measure::check(schema, &self.limits)?;
                }
                return measure::bytes(bytes, &self.limits);
            }
        };
        measure::bytes(text.len(), &self.limits)
    }
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

impl Automata {
    fn new(vocabulary: Vocabulary) -> Result<Automata, GrammarError> {
        let capabilities = InferenceCapabilities { ff_tokens: true, ..Default::default() };
        let slices = PlainTokens::slices();
        let mut factory = ParserFactory::new(&vocabulary.environment(), capabilities, &slices)
            .map_err(|error| GrammarError::Vocabulary(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            verbose_errors: false,
            max_lexer_states: LEXER_STATES,
            step_lexer_fuel: STEP_FUEL,
            ..ParserLimits::default()
        };
        let masks = Arc::new(PlainTokens::new(factory.slicer()));
        Ok(Automata { vocabulary, factory, masks })
    }

    /// The automaton with its first mask. What cannot begin is refused here.
    fn start(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let parser = self.factory.create_parser(grammar);
        let mut parser = parser.map_err(|error| format!("{error:#}"))?;
        parser.bias_computer = Arc::clone(&self.masks);
        Matcher::new(parser, self.vocabulary.clone())?.begun().map_err(|error| error.to_string())
    }
}

impl Grammar {
    /// The state before the first token, for one sequence.
    #[must_use]
    pub fn matcher(&self) -> Matcher {
        self.inner.start.deep_clone()
    }

    /// SHA-256 of the source, 64 hexadecimal digits (`schema_hash`).
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.inner.sha256
    }

    /// Fingerprint of the tokenizer whose ids its masks are of. Over other ids they mean nothing.
    #[must_use]
    pub fn vocabulary_fingerprint(&self) -> &str {
        self.inner.start.vocabulary().fingerprint()
    }

    /// What checks a whole answer, where its source is a schema or any JSON object.
    #[must_use]
    pub fn validator(&self) -> Option<&Validator> {
        self.inner.validator.as_ref()
    }

    /// Whether the mask alone suffices: every text that it lets through conforms, but for keys that are there twice
    /// and numbers beyond a double, which [`Validator::check_text`] refuses.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.inner.checked.is_empty()
    }

    /// JSON pointers of the keywords that the mask enforces in part or not at all. The validator does.
    #[must_use]
    pub fn checked(&self) -> &[String] {
        &self.inner.checked
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("sha256", &self.inner.sha256).finish()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Grammar) -> bool {
        self.inner.sha256 == other.inner.sha256
            && self.vocabulary_fingerprint() == other.vocabulary_fingerprint()
    }
}

fn build(
    automata: &Automata,
    source: &Source,
    limits: &Limits,
    sha256: String,
) -> Result<Grammar, GrammarError> {
    let mut refusal: Option<String> = None;
    for keep in Keep::ALL {
        let prepared = prepared(source, limits, keep)?;
        let validator = validator(source, &prepared.drafts)?;
        match automata.start(prepared.grammar) {
            Ok(start) => {
                let inner = Inner { sha256, start, validator, checked: prepared.checked };
                return Ok(Grammar { inner: Arc::new(inner) });
            }
            // What the tightest copy was refused for says most.
            Err(error) => refusal = refusal.or(Some(error)),
        }
        let has_no_value = refusal.as_ref().is_some_and(|it| it.contains("nsatisfiable"));
        if prepared.drafts.is_empty() || has_no_value {
            break;
        }
    }
    Err(refused(source, &refusal.unwrap_or_default()))
}

/// What checks the whole answer; a schema that is none of its draft is refused here.
fn validator(source: &Source, drafts: &[Draft]) -> Result<Option<Validator>, GrammarError> {
    match source {
        Source::JsonObject => {
            Validator::of_draft(&json!({"type": "object"}), Draft::Draft202012).map(Some)
        }
        Source::JsonSchema(schema) => {
            let draft = drafts.first().copied().unwrap_or_default();
            Validator::of_draft(schema, draft).map(Some)
        }
        Source::Composed { schemas, .. } => {
            for (at, (schema, &draft)) in schemas.iter().zip(drafts).enumerate() {
                Validator::of_draft(schema, draft).map_err(|error| error.below(at))?;
            }
            Ok(None)
        }
        Source::Regex(_) | Source::Lark(_) | Source::Gbnf(_) => Ok(None),
    }
}

fn prepared(source: &Source, limits: &Limits, keep: Keep) -> Result<Prepared, GrammarError> {
    let exact = |grammar| Ok(Prepared { grammar, checked: Vec::new(), drafts: Vec::new() });
    match source {
        Source::JsonObject => {
            let screened = screen(&json!({"type": "object"}), keep)?;
            exact(TopLevelGrammar::from_json_schema(screened.masked))
        }
        Source::JsonSchema(schema) => {
            let screened = screen(schema, keep)?;
            let grammar = TopLevelGrammar::from_json_schema(screened.masked);
            Ok(Prepared { grammar, checked: screened.checked, drafts: vec![screened.draft] })
        }
        Source::Regex(pattern) => {
            let pattern = rewrite(pattern, Reach::Whole)
                .map_err(|error| unsupported(&format!("column {}", error.column), error.reason))?;
            exact(TopLevelGrammar::from_regex(&pattern))
        }
        Source::Lark(text) => exact(TopLevelGrammar::from_lark(lark::rewrite(text)?)),
        Source::Gbnf(text) => {
            exact(TopLevelGrammar::from_lark(gbnf::to_lark(text, limits.source_bytes)?))
        }
        Source::Composed { lark, schemas } => composed(lark, schemas, keep),
    }
}

fn composed(lark: &str, schemas: &[Value], keep: Keep) -> Result<Prepared, GrammarError> {
    let mut text = format!("{lark}\n");
    let (mut checked, mut drafts) = (Vec::new(), Vec::new());
    for (at, schema) in schemas.iter().enumerate() {
        let screened = screen(schema, keep).map_err(|error| error.below(at))?;
        drafts.push(screened.draft);
        text.push_str(&format!("json_{at}: %json {}\n", screened.masked));
        checked.extend(screened.checked.iter().map(|pointer| format!("/{at}{pointer}")));
    }
    Ok(Prepared { grammar: TopLevelGrammar::from_lark(text), checked, drafts })
}

/// What the automaton's compiler says, without its state.
fn refused(source: &Source, message: &str) -> GrammarError {
    let message = message.replace("<non-verbose/>", "");
    let message: Vec<&str> = message.lines().map(str::trim).filter(|it| !it.is_empty()).collect();
    let message = message.join("; ");
    match source {
        Source::JsonObject | Source::JsonSchema(_) => {
            let reason = if message.contains("nsatisfiable") {
                format!("no value conforms: {message}")
            } else {
                format!("it cannot be enforced: {message}")
            };
            unsupported("", reason)
        }
        Source::Regex(_) | Source::Lark(_) | Source::Gbnf(_) | Source::Composed { .. } => {
            GrammarError::Malformed(message)
        }
    }
}

/// What decides about a grammar, as one text. The order of keys does: answers have it.
fn canonical(source: &Source) -> String {
    match source {
        Source::JsonObject => "json_object".into(),
        Source::JsonSchema(schema) => format!("json_schema\n{schema}"),
        Source::Regex(text) => format!("regex\n{text}"),
        Source::Lark(text) => format!("lark\n{text}"),
        Source::Gbnf(text) => format!("gbnf\n{text}"),
        Source::Composed { lark, schemas } => {
            let schemas: String = schemas.iter().map(|it| format!("\n{it}")).collect();
            format!("composed\n{}\n{lark}{schemas}", lark.len())
        }
    }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}
