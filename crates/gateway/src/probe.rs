//! Tests what a server can do, by asking it.
//!
//! Some dozen short generations. A schema is tested with a prompt that asks for something else, so that only a grammar
//! gives a value of it; a seed with two equal calls and one with another seed, at temperature 1.

use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    capability::{Ability, Answer, Capabilities, Capability, Source},
    client::Client,
    detect::{Detected, detect},
    events::{Event, Events},
    fault::{UpstreamFault, brief},
    kind::{Api, SchemaField},
    reply::{self, Text},
};

/// How long one answer may take; the first one may load a model.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two events of a stream.
const STALL: Duration = Duration::from_secs(30);

/// Texts that tokenizers differ on.
pub(crate) const GOLDEN_TEXTS: [&str; 12] = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces   three",
    "tabs\tand\nlines\r\n",
    "1234567890 3.14159 1e-9",
    "naïve café Straße Ω≈ç√",
    "日本語のテキスト",
    "Привет, мир",
    "مرحبا بالعالم",
    "👩‍👩‍👧 🇩🇪 ✨",
    "fn main() { println!(\"{x:?}\"); }",
    "<|im_start|>user</s>[INST]",
];

/// Asks a server what it can do, with this model or the first that it names.
///
/// # Errors
/// It is not there, refuses the key, has no model, or gives no answer at all.
pub async fn probe(client: &Client, model: Option<&str>) -> Result<Capabilities, UpstreamFault> {
    let detected = detect(client).await?;
    let model = match (model, detected.models.first()) {
        (Some(model), _) if detected.models.iter().any(|it| it == model) => model.to_owned(),
        (Some(model), _) => {
            let found = detected.models.join(", ");
            return Err(UpstreamFault::WrongModel { expected: model.to_owned(), found });
        }
        (None, Some(first)) => first.clone(),
        (None, None) => return Err(UpstreamFault::NoAnswer { expected: "a loaded model" }),
    };
    let probe = Probe { client, api: detected.kind.api(), model: &model };
    let first = probe.chat("Say hello.", 10, |_| {}).await?;
    let tok_fp = probe.tokenizer().await;
    let mut abilities = vec![
        tested(Ability::Generates, Answer::Yes, format!("{:?}", brief(&first.text))),
        probe.usage(&first),
    ];
    abilities.extend(probe.streams().await);
    abilities.push(probe.seed().await);
    abilities.push(json_schema(client, probe.api, &model).await);
    abilities.push(probe.json_object().await);
    abilities.push(probe.bad_schema().await);
    abilities.push(probe.logprobs().await);
    abilities.push(match &tok_fp {
        Ok(_) => {
            tested(Ability::Tokenize, Answer::Yes, route(probe.api.tokenize.map(|it| it.path)))
        }
        Err(told) => tested(Ability::Tokenize, Answer::No, told.clone()),
    });
    abilities.extend(documented(probe.api));
    let Detected { evidence, version, models, fingerprint, .. } = detected;
    let (kind, tok_fp) = (probe.api.name, tok_fp.ok());
    Ok(Capabilities { kind, evidence, version, model, models, fingerprint, tok_fp, abilities })
}

/// What stands in the documentation.
fn documented(api: &Api) -> [Capability; 4] {
    let of = |ability, found: Option<&str>| Capability {
        ability,
        answer: if found.is_some() { Answer::Yes } else { Answer::No },
        source: Source::Documented,
        detail: route(found),
    };
    let proves = api.health_hides.starts_with("nothing");
    [
        of(Ability::Template, api.template),
        of(Ability::LoadModel, api.load),
        of(Ability::CacheControls, api.cache),
        Capability {
            ability: Ability::HealthProvesTokens,
            answer: if proves { Answer::Yes } else { Answer::No },
            source: Source::Documented,
            detail: format!("{}: {}", api.health, api.health_hides),
        },
    ]
}

fn route(found: Option<&str>) -> String {
    found.unwrap_or("this kind has none").to_owned()
}

fn tested(ability: Ability, answer: Answer, detail: impl Into<String>) -> Capability {
    Capability { ability, answer, source: Source::Tested, detail: detail.into() }
}

/// A schema as this kind takes it; none when it takes none.
pub(crate) fn put_schema(api: &Api, body: &mut Value, schema: &Value) -> bool {
    match api.schema {
        SchemaField::ResponseFormat => {
            body["response_format"] = json!({
                "type": "json_schema",
                "json_schema": { "name": "answer", "strict": true, "schema": schema },
            });
        }
        SchemaField::TopLevel => body["json_schema"] = schema.clone(),
        SchemaField::None => return false,
    }
    true
}

struct Probe<'a> {
    client: &'a Client,
    api: &'a Api,
    model: &'a str,
}

impl Probe<'_> {
    fn body(&self, prompt: &str, max_tokens: usize) -> Value {
        chat_body(self.api, self.model, prompt, max_tokens)
    }

    /// One answer.
    async fn chat(
        &self,
        prompt: &str,
        max_tokens: usize,
        change: impl FnOnce(&mut Value),
    ) -> Result<Text, UpstreamFault> {
        let mut body = self.body(prompt, max_tokens);
        change(&mut body);
        let value = self.client.post("/v1/chat/completions", &body, LIMIT).await?;
        reply::text(&value)
    }

    fn usage(&self, first: &Text) -> Capability {
        let how = if self.api.usage_on_request {
            " when stream_options.include_usage asks for it"
        } else {
            ""
        };
        match first.tokens {
            Some([prompt, answer]) => tested(
                Ability::Usage,
                Answer::Yes,
                format!("{prompt} tokens in, {answer} out{how}"),
            ),
            None => tested(Ability::Usage, Answer::No, "usage is absent or null"),
        }
    }

    async fn streams(&self) -> [Capability; 2] {
        let both = |answer, told: &str| {
            [tested(Ability::Streams, answer, told), tested(Ability::StreamUsage, answer, told)]
        };
        match self.streamed().await {
            Err(fault) => both(Answer::No, &fault.to_string()),
            Ok((events, has_usage)) => {
                let usage = if has_usage { Answer::Yes } else { Answer::No };
                let told =
                    if has_usage { "with stream_options.include_usage" } else { "no event has it" };
                [
                    tested(
                        Ability::Streams,
                        Answer::Yes,
                        format!("{events} events, a finish reason and [DONE]"),
                    ),
                    tested(Ability::StreamUsage, usage, told),
                ]
            }
        }
    }

    /// Events of a stream, and whether one had the usage.
    async fn streamed(&self) -> Result<(usize, bool), UpstreamFault> {
        let mut body = self.body("Count to five.", 16);
        body["stream"] = Value::Bool(true);
        body["stream_options"] = json!({ "include_usage": true });
        let mut events =
            Events::open(self.client, "/v1/chat/completions", &body, (LIMIT, STALL)).await?;
        let (mut n, mut has_usage) = (0, false);
        loop {
            match events.next().await? {
                Event::Data(value) => {
                    n += 1;
                    has_usage |= value["usage"].is_object();
                }
                Event::Done => return Ok((n, has_usage)),
            }
        }
    }

    async fn seed(&self) -> Capability {
        if !self.api.has_seed {
            let told = format!("{} has no seed: the λ probe runs as `repeats`", self.api.name);
            return Capability {
                ability: Ability::Seed,
                answer: Answer::No,
                source: Source::Documented,
                detail: told,
            };
        }
        let mut texts = Vec::new();
        for seed in [7, 7, 8] {
            let drawn = |body: &mut Value| {
                body["temperature"] = json!(1.0);
                body["seed"] = json!(seed);
            };
            match self.chat("Tell me a story about a fox.", 24, drawn).await {
                Ok(answer) => texts.push(answer.text),
                Err(fault) => return tested(Ability::Seed, Answer::Unknown, fault.to_string()),
            }
        }
        match (texts[0] == texts[1], texts[1] == texts[2]) {
            (true, false) => {
                tested(Ability::Seed, Answer::Yes, "two equal calls agreed, another seed did not")
            }
            (true, true) => tested(
                Ability::Seed,
                Answer::Unknown,
                "seeds 7 and 8 gave one text: nothing was drawn",
            ),
            (false, _) => tested(Ability::Seed, Answer::No, "two calls with seed 7 gave two texts"),
        }
    }

    async fn json_object(&self) -> Capability {
        let put = |body: &mut Value| body["response_format"] = json!({ "type": "json_object" });
        match self.chat("Tell me about the sea, as JSON.", 64, put).await {
            Err(fault) => tested(Ability::JsonObject, Answer::No, fault.to_string()),
            // What was cut began as an object all the same.
            Ok(answer) if answer.text.trim_start().starts_with('{') => {
                tested(Ability::JsonObject, Answer::Yes, "the answer is, or begins as, an object")
            }
            Ok(answer) => {
                tested(Ability::JsonObject, Answer::No, format!("{:?}", brief(&answer.text)))
            }
        }
    }

    async fn bad_schema(&self) -> Capability {
        let schema = json!({ "type": "string", "pattern": "(unclosed" });
        let put = |body: &mut Value| {
            put_schema(self.api, body, &schema);
        };
        match self.chat("Hello.", 8, put).await {
            Err(UpstreamFault::Refused { status, message, .. }) => {
                tested(Ability::RefusesBadSchema, Answer::Yes, format!("{status}: {message}"))
            }
            Err(fault) => tested(Ability::RefusesBadSchema, Answer::No, fault.to_string()),
            Ok(_) => tested(Ability::RefusesBadSchema, Answer::No, "200, unconstrained"),
        }
    }

    async fn logprobs(&self) -> Capability {
        let put = |body: &mut Value| {
            body["logprobs"] = Value::Bool(true);
            body["top_logprobs"] = json!(2);
        };
        match self.chat("Say hello.", 4, put).await {
            Err(fault) => tested(Ability::Logprobs, Answer::No, fault.to_string()),
            Ok(answer) if answer.has_logprobs => {
                tested(Ability::Logprobs, Answer::Yes, "choices[0].logprobs.content")
            }
            Ok(_) => tested(Ability::Logprobs, Answer::No, "absent, null or empty"),
        }
    }

    /// SHA-256 over the ids of texts that tokenizers differ on, or why there is none.
    async fn tokenizer(&self) -> Result<String, String> {
        tokenizer_fingerprint(self.client, self.api, self.model).await
    }
}

/// SHA-256 over the ids of [`GOLDEN_TEXTS`], or why there is none.
pub(crate) async fn tokenizer_fingerprint(
    client: &Client,
    api: &Api,
    model: &str,
) -> Result<String, String> {
    let mut digest = Sha256::new();
    for text in GOLDEN_TEXTS {
        let Some((path, body)) = api.tokenize_body(model, text) else {
            return Err(route(None));
        };
        let found = client.post(path, &body, LIMIT).await.map_err(|fault| fault.to_string())?;
        let ids = found["tokens"].as_array().ok_or("expected a list `tokens`, found none")?;
        for id in ids {
            let id = id.as_u64().ok_or("expected token ids, found something else")?;
            digest.update(id.to_le_bytes());
        }
        digest.update(u64::MAX.to_le_bytes());
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A greedy chat of one message.
pub(crate) fn chat_body(api: &Api, model: &str, prompt: &str, max_tokens: usize) -> Value {
    let mut body = json!({
        "model": model,
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": max_tokens,
        "temperature": 0.0,
    });
    if api.usage_on_request {
        body["stream_options"] = json!({ "include_usage": true });
    }
    body
}

/// Whether a server keeps to a schema when the prompt asks for something else.
pub(crate) async fn json_schema(client: &Client, api: &Api, model: &str) -> Capability {
    let probe = Probe { client, api, model };
    // Nobody says this of their own will; every value is short.
    let schema = json!({
        "type": "object",
        "properties": { "zq_7": { "enum": ["x1", "x2"] }, "kw": { "enum": [true, false] } },
        "required": ["zq_7", "kw"],
        "additionalProperties": false,
    });
    let told = |answer, detail: String| tested(Ability::JsonSchema, answer, detail);
    if api.schema == SchemaField::None {
        return Capability {
            ability: Ability::JsonSchema,
            answer: Answer::No,
            source: Source::Documented,
            detail: "it reads neither response_format nor json_schema".to_owned(),
        };
    }
    let put = |body: &mut Value| {
        put_schema(api, body, &schema);
    };
    let answer = match probe.chat("Tell me about the sea.", 64, put).await {
        Ok(answer) => answer,
        Err(fault) => return told(Answer::No, fault.to_string()),
    };
    let found = exrail_grammar::Validator::new(&schema).map(|it| it.check_text(&answer.text));
    match found {
        Ok(Ok(_)) => {
            told(Answer::Yes, "a prompt about something else got a value of the schema".to_owned())
        }
        Ok(Err(invalid)) => {
            let text = brief(&answer.text);
            told(Answer::No, format!("{text:?} ended as {}: {invalid}", answer.finish))
        }
        Err(error) => told(Answer::Unknown, error.to_string()),
    }
}
