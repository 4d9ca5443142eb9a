//! What a folder says about text: special tokens, sampling defaults, chat templates. Nothing here
//! tokenizes or compiles.

use serde_json::Value;

use super::fields::{Fields, short};
use super::files::{Files, MAX_SMALL_BYTES};
use crate::LoadError;

const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Folder of further templates, such as `tool_use.jinja`.
const TEMPLATES: &str = "additional_chat_templates";
const TEMPLATE_JSON: &str = "chat_template.json";
/// A model has a handful of templates.
const MAX_TEMPLATES: usize = 64;
/// And of tokens that end an answer.
const MAX_END_TOKENS: usize = 1024;

/// Special tokens and sampling defaults: `generation_config.json`, and `config.json` where that is
/// silent. `None` where neither says anything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationSettings {
    /// Token before a text.
    pub bos: Option<u32>,
    /// Tokens that end an answer, any of them.
    pub eos: Vec<u32>,
    /// Token that fills batches.
    pub padding: Option<u32>,
    /// Whether the publisher recommends sampling; otherwise the most probable token is taken.
    pub samples: Option<bool>,
    /// Divisor of the logits.
    pub temperature: Option<f32>,
    /// Most probable tokens to draw from.
    pub top_k: Option<u32>,
    /// Probability mass to draw from.
    pub top_p: Option<f32>,
    /// Least probability, as a share of the largest.
    pub min_p: Option<f32>,
    /// Divisor of the logits of tokens that occurred; 1 is none.
    pub repetition_penalty: Option<f32>,
}

/// A chat template of a folder that has several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTemplate {
    /// Name, such as `default`, `tool_use` or `rag`.
    pub name: String,
    /// Jinja source.
    pub source: String,
}

/// Chat templates and the literals of special tokens: `chat_template.jinja`, the folder
/// `additional_chat_templates`, `chat_template.json` and `tokenizer_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextSettings {
    /// All templates; one without a name is `default`.
    pub templates: Vec<NamedTemplate>,
    /// Literal of the token before a text.
    pub bos: Option<String>,
    /// Literal of the token after a text.
    pub eos: Option<String>,
    /// Literal of the token for what is not in the vocabulary.
    pub unknown: Option<String>,
    /// Literal of the token that fills batches.
    pub padding: Option<String>,
    /// Whether a text starts with `bos`, where the file says so.
    pub adds_bos: Option<bool>,
}

impl GenerationSettings {
    pub(super) fn read(files: &Files, config: &Value) -> Result<GenerationSettings, LoadError> {
        let path = files.path("config.json");
        let whole = Fields::new(config, "")?;
        let inner = whole.object("text_config", "text_config.").ok().flatten();
        let mut found = GenerationSettings::default();
        found.tokens(whole).map_err(|error| error.in_file(&path))?;
        if let Some(inner) = inner {
            found.tokens(inner).map_err(|error| error.in_file(&path))?;
        }
        let Some(json) = files.json(GENERATION)? else { return Ok(found) };
        let mut stated = GenerationSettings::default();
        let read = Fields::new(&json, "").and_then(|fields| {
            stated.tokens(fields)?;
            stated.sampling(fields)
        });
        read.map_err(|error| error.in_file(&files.path(GENERATION)))?;
        Ok(GenerationSettings {
            bos: stated.bos.or(found.bos),
            eos: if stated.eos.is_empty() { found.eos } else { stated.eos },
            padding: stated.padding.or(found.padding),
            ..stated
        })
    }

    /// Takes the tokens of `fields` that are not known yet.
    fn tokens(&mut self, fields: Fields<'_>) -> Result<(), LoadError> {
        self.bos = self.bos.or(fields.u32("bos_token_id")?);
        // Early Llama folders say -1 for none.
        let has_padding = fields.get("pad_token_id").is_some_and(|id| id.as_i64() != Some(-1));
        if has_padding && self.padding.is_none() {
            self.padding = fields.u32("pad_token_id")?;
        }
        if !self.eos.is_empty() {
            return Ok(());
        }
        let key = "eos_token_id";
        self.eos = match fields.get(key) {
            Some(Value::Array(list)) if list.len() <= MAX_END_TOKENS => {
                let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
                let ids: Option<Vec<u32>> = list.iter().map(id).collect();
                ids.ok_or_else(|| fields.bad(key, "token ids", "something else in the list"))?
            }
            Some(Value::Array(list)) => {
                let expected = format!("at most {MAX_END_TOKENS} tokens");
                return Err(fields.bad(key, expected, list.len()));
            }
            Some(_) | None => fields.u32(key)?.into_iter().collect(),
        };
        Ok(())
    }

    fn sampling(&mut self, fields: Fields<'_>) -> Result<(), LoadError> {
        let share = |key: &str| match fields.f32(key)? {
            Some(found) if !(0.0..=1.0).contains(&found) => {
                Err(fields.bad(key, "a number from 0 to 1", found))
            }
            found => Ok(found),
        };
        self.samples = fields.bool("do_sample")?;
        self.temperature = match fields.f32("temperature")? {
            Some(found) if found < 0.0 => {
                return Err(fields.bad("temperature", "at least 0", found));
            }
            found => found,
        };
        self.top_k = fields.u32("top_k")?;
        self.top_p = share("top_p")?;
        self.min_p = share("min_p")?;
        self.repetition_penalty = fields.positive_f32("repetition_penalty")?;
        Ok(())
    }
}

impl TextSettings {
    /// The template for a chat without tools and documents: the only one, or `default`.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.template("default").or_else(|| match self.templates.as_slice() {
            [only] => Some(&only.source),
            _ => None,
        })
    }

    /// The template called `name`.
    #[must_use]
    pub fn template(&self, name: &str) -> Option<&str> {
        let found = self.templates.iter().find(|template| template.name == name);
        found.map(|template| template.source.as_str())
    }

    pub(super) fn read(files: &Files) -> Result<TextSettings, LoadError> {
        let mut text = TextSettings::default();
        if let Some(json) = files.json(TOKENIZER)? {
            let read = Fields::new(&json, "").and_then(|fields| text.tokenizer(fields));
            read.map_err(|error| error.in_file(&files.path(TOKENIZER)))?;
        }
        // Where both are there, transformers takes the files beside.
        if let Some(json) = files.json(TEMPLATE_JSON)? {
            let templates = Fields::new(&json, "").and_then(templates);
            text.templates =
                templates.map_err(|error| error.in_file(&files.path(TEMPLATE_JSON)))?;
        }
        text.take_file(files, TEMPLATE, "default")?;
        let more = files.ending_in(TEMPLATES, ".jinja")?;
        if more.len() > MAX_TEMPLATES {
            let (what, limit) = (format!("files of {TEMPLATES}"), MAX_TEMPLATES as u64);
            return Err(LoadError::LimitExceeded { what, limit, found: more.len() as u64 });
        }
        for path in more {
            let name = path.rsplit(['/', '\\']).next().unwrap_or_default();
            text.take_file(files, &path, name.trim_end_matches(".jinja"))?;
        }
        Ok(text)
    }

    /// The template in the file `path`, if there is one, in place of another called `name`.
    fn take_file(&mut self, files: &Files, path: &str, name: &str) -> Result<(), LoadError> {
        let Some(bytes) = files.read(path, MAX_SMALL_BYTES)? else { return Ok(()) };
        let source = String::from_utf8(bytes).map_err(|error| {
            let (what, at) = ("the template".to_owned(), error.utf8_error().valid_up_to());
            LoadError::BadText { what, at }.in_file(&files.path(path))
        })?;
        self.templates.retain(|template| template.name != name);
        self.templates.push(NamedTemplate { name: name.to_owned(), source });
        Ok(())
    }

    fn tokenizer(&mut self, fields: Fields<'_>) -> Result<(), LoadError> {
        self.bos = literal(fields, "bos_token")?;
        self.eos = literal(fields, "eos_token")?;
        self.unknown = literal(fields, "unk_token")?;
        self.padding = literal(fields, "pad_token")?;
        self.adds_bos = fields.bool("add_bos_token")?;
        self.templates = templates(fields)?;
        Ok(())
    }
}

/// A token as text, or as an object with its `content`.
fn literal(fields: Fields<'_>, key: &str) -> Result<Option<String>, LoadError> {
    match fields.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value) => match value.get("content").and_then(Value::as_str) {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(fields.bad(key, "text or an added token", short(value))),
        },
    }
}

/// `chat_template`: one, or a list of named ones.
fn templates(fields: Fields<'_>) -> Result<Vec<NamedTemplate>, LoadError> {
    let key = "chat_template";
    let expected = "a template or a list of named ones";
    match fields.get(key) {
        None => Ok(Vec::new()),
        Some(Value::String(source)) => {
            Ok(vec![NamedTemplate { name: "default".to_owned(), source: source.clone() }])
        }
        Some(Value::Array(list)) => {
            let named = |value: &Value| {
                let part = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
                Some(NamedTemplate { name: part("name")?, source: part("template")? })
            };
            let all: Option<Vec<NamedTemplate>> = list.iter().map(named).collect();
            all.ok_or_else(|| fields.bad(key, expected, "an entry without name or template"))
        }
        Some(value) => Err(fields.bad(key, expected, short(value))),
    }
}
