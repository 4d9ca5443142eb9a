//! What each kind of server offers, as data: paths, shapes and what its own words are worth.
//!
//! Read from the sources and, where one could be run, seen; what a row says is believed for paths alone. Whether a
//! seed or a schema is honoured is tested ([`crate::probe`]).

use serde_json::{Value, json};

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// This project's own.
    Exrail,
    /// `TabbyAPI`, over exllamav2 or exllamav3.
    TabbyApi,
    /// text-generation-webui with `--api`.
    TextGeneration,
    /// llama.cpp's `llama-server`.
    LlamaServer,
    /// vLLM's OpenAI-compatible server.
    Vllm,
    /// Ollama.
    Ollama,
    /// Anything else that answers OpenAI's requests.
    OpenAi,
}

/// How a JSON Schema is passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchemaField {
    /// `response_format` of type `json_schema`, as OpenAI writes it.
    ResponseFormat,
    /// `json_schema` at the top: the server reads no `response_format` of type `json_object`.
    TopLevel,
    /// There is no field for one.
    None,
}

/// A path that turns text into token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokenize {
    /// Where.
    pub path: &'static str,
    /// The field of the text.
    pub text: &'static str,
    /// Fields that keep it to the text alone, without control tokens around it.
    pub plain: &'static [(&'static str, bool)],
}

/// What a kind offers.
#[derive(Clone, Copy, Debug)]
pub struct Api {
    /// The kind.
    pub kind: Kind,
    /// Its name in tables and options.
    pub name: &'static str,
    /// Who its models belong to, in its list of models: the first thing that tells a kind.
    pub owned_by: Option<&'static str>,
    /// Answers on this kind, with a value at this place that is this one, or any; the second thing.
    pub sign: Option<(&'static str, &'static str, Option<&'static str>)>,
    /// Field of [`Api::card`] with the version.
    pub version: Option<&'static str>,
    /// Its fingerprint is made of these fields of this answer, beside the list of models. What else is there may differ from
    /// one answer to the next.
    pub card: Option<(&'static str, &'static [&'static str])>,
    /// Text to token ids.
    pub tokenize: Option<Tokenize>,
    /// Where the chat template is shown or applied.
    pub template: Option<&'static str>,
    /// Where a model is loaded.
    pub load: Option<&'static str>,
    /// Where it is unloaded.
    pub unload: Option<&'static str>,
    /// What its cache can be told.
    pub cache: Option<&'static str>,
    /// Its health route.
    pub health: &'static str,
    /// What a healthy answer there does not say.
    pub health_hides: &'static str,
    /// How a schema is passed on.
    pub schema: SchemaField,
    /// Whether it has a field `seed` at all.
    pub has_seed: bool,
    /// Whether a plain reply has its usage only when the request asks for one as of a stream.
    pub usage_on_request: bool,
}

/// All kinds, the most particular first.
pub const APIS: [Api; 7] = [
    Api {
        kind: Kind::Exrail,
        name: "exrail",
        owned_by: Some("exrail"),
        sign: None,
        version: None,
        card: None,
        tokenize: Some(Tokenize { path: "/v1/tokenize", text: "text", plain: &[] }),
        template: None,
        load: None,
        unload: None,
        cache: Some("sessions on disk: /v1/exrail/sessions"),
        health: "/readyz",
        health_hides: "nothing: it follows generated tokens",
        schema: SchemaField::ResponseFormat,
        has_seed: true,
        usage_on_request: false,
    },
    Api {
        kind: Kind::TabbyApi,
        name: "tabbyapi",
        owned_by: Some("tabbyAPI"),
        sign: Some(("/.well-known/serviceinfo", "/software/name", Some("TabbyAPI"))),
        version: None,
        card: Some(("/v1/model", &["id", "parameters"])),
        tokenize: Some(Tokenize {
            path: "/v1/token/encode",
            text: "text",
            plain: &[("add_bos_token", false), ("encode_special_tokens", false)],
        }),
        template: Some("/props"),
        load: Some("/v1/model/load"),
        unload: Some("/v1/model/unload"),
        cache: None,
        health: "/health",
        health_hides: "healthy without a model, and before the first token, which took 4.1 s when measured",
        schema: SchemaField::TopLevel,
        has_seed: false,
        usage_on_request: true,
    },
    Api {
        kind: Kind::TextGeneration,
        name: "text-generation-webui",
        owned_by: Some("user"),
        sign: Some(("/v1/internal/model/info", "/model_name", None)),
        version: None,
        card: Some(("/v1/internal/model/info", &["model_name", "lora_names", "loader"])),
        tokenize: Some(Tokenize { path: "/v1/internal/encode", text: "text", plain: &[] }),
        template: Some("/v1/internal/chat-prompt"),
        load: Some("/v1/internal/model/load"),
        unload: Some("/v1/internal/model/unload"),
        cache: None,
        health: "/v1/internal/health",
        health_hides: "ok whenever the process answers: no word on the model",
        schema: SchemaField::None,
        has_seed: true,
        usage_on_request: false,
    },
    Api {
        kind: Kind::LlamaServer,
        name: "llama-server",
        owned_by: Some("llamacpp"),
        sign: Some(("/props", "/default_generation_settings", None)),
        version: Some("build_info"),
        card: Some((
            "/props",
            &["build_info", "model_path", "model_alias", "chat_template", "total_slots"],
        )),
        tokenize: Some(Tokenize {
            path: "/tokenize",
            text: "content",
            plain: &[("add_special", false), ("parse_special", false)],
        }),
        template: Some("/apply-template"),
        load: None,
        unload: None,
        cache: Some("cache_prompt in requests; /slots when it was started with --slots"),
        health: "/health",
        health_hides: "says when the model is loaded, not that it generates",
        schema: SchemaField::ResponseFormat,
        has_seed: true,
        usage_on_request: false,
    },
    Api {
        kind: Kind::Vllm,
        name: "vllm",
        owned_by: Some("vllm"),
        sign: Some(("/version", "/version", None)),
        version: Some("version"),
        card: Some(("/version", &["version"])),
        tokenize: Some(Tokenize {
            path: "/tokenize",
            text: "prompt",
            plain: &[("add_special_tokens", false)],
        }),
        template: Some("/tokenize"),
        load: None,
        unload: None,
        cache: Some("/reset_prefix_cache in development mode"),
        health: "/health",
        health_hides: "that the engine's process lives, not that it generates",
        schema: SchemaField::ResponseFormat,
        has_seed: true,
        usage_on_request: false,
    },
    Api {
        kind: Kind::Ollama,
        name: "ollama",
        owned_by: Some("library"),
        sign: Some(("/api/version", "/version", None)),
        version: Some("version"),
        card: Some(("/api/version", &["version"])),
        tokenize: None,
        template: None,
        load: None,
        unload: None,
        cache: Some("keep_alive of its own API"),
        health: "/api/version",
        health_hides: "models are loaded by the first request",
        schema: SchemaField::ResponseFormat,
        has_seed: true,
        usage_on_request: false,
    },
    Api {
        kind: Kind::OpenAi,
        name: "openai",
        owned_by: None,
        sign: None,
        version: None,
        card: None,
        tokenize: None,
        template: None,
        load: None,
        unload: None,
        cache: None,
        health: "/v1/models",
        health_hides: "that a model is named, not that it generates",
        schema: SchemaField::ResponseFormat,
        has_seed: true,
        usage_on_request: false,
    },
];

impl Kind {
    /// What it offers.
    #[must_use]
    pub fn api(self) -> &'static Api {
        // Every kind is in the table: a test goes through them.
        APIS.iter().find(|api| api.kind == self).unwrap_or(&APIS[APIS.len() - 1])
    }

    /// The kind of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        APIS.iter().find(|api| api.name == name).map(|api| api.kind)
    }
}

impl Api {
    /// A request for the ids of a text alone.
    #[must_use]
    pub fn tokenize_body(&self, model: &str, text: &str) -> Option<(&'static str, Value)> {
        let Tokenize { path, text: field, plain } = self.tokenize?;
        let mut body = json!({ "model": model, field: text });
        for (name, value) in plain {
            body[*name] = Value::Bool(*value);
        }
        Some((path, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_row_of_its_own() {
        for api in APIS {
            assert_eq!(api.kind.api().name, api.name);
            assert_eq!(Kind::named(api.name), Some(api.kind));
        }
        assert_eq!(Kind::named("none"), None);
    }
}
