//! Chat templates: untrusted Jinja programs from model files, rendered as Hugging Face does.
//!
//! The environment is that of `transformers.apply_chat_template`: `trim_blocks`, `lstrip_blocks`,
//! loop controls, lenient undefined values, `raise_exception`, `strftime_now`, `tojson` without
//! HTML escapes. A construct that is not supported is refused when the template is *compiled*.

use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant, SystemTime};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};

use crate::chat::{ChatMessage, RenderOptions, ToolCall, Walk, check};
use crate::prompt::Prompt;
use crate::provenance::{Marks, masked};
use crate::sha256::sha256_hex;
use crate::template_functions::{Raised, register};
use crate::template_parts::{self, TooLong};

const NAME: &str = "chat_template";
/// Longest template accepted; the longest published ones are below 20 kB.
const MAX_SOURCE_BYTES: usize = 64 * 1024;
/// Nested macros, loops and includes. A quarter of what minijinja allows, because server threads
/// have smaller stacks than the main thread it was tuned on.
const MAX_RECURSION: usize = 120;

/// Kinds of errors that mean that a template calls something that does not exist here.
const UNKNOWN_NAME: [ErrorKind; 5] = [
    ErrorKind::UnknownFilter,
    ErrorKind::UnknownTest,
    ErrorKind::UnknownFunction,
    ErrorKind::UnknownMethod,
    ErrorKind::TemplateNotFound,
];

/// Stack of the thread that compiles and renders. minijinja 3.1.0 parses chains of unary operators,
/// and prints and drops nested lists, by recursion of unbounded depth. Source length and fuel
/// allow some 10⁵ levels, which need about 1 kB each. Only pages that are touched take memory.
const STACK_BYTES: usize = 256 * 1024 * 1024;

/// Work that each message of a chat adds to what a render may do; templates take up to half of it.
const FUEL_OF_MESSAGE: u64 = 500;
/// Bytes of a chat that add one unit of work: each may be copied sixteen times, or written as JSON once.
const BYTES_OF_FUEL: u64 = 4;
/// A long chat gets at most this many times the work of a short one.
const MOST_TIMES: u64 = 4;
/// Short chats that a template is tried on when it is compiled; together they get what one chat gets.
const N_PROBES: u64 = 12;

/// What a render may cost before it is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateLimits {
    /// Work for the chat without messages: about one per instruction and per 64 bytes created. Each message adds 500
    /// and every 4 bytes one, up to four times this, so memory is bounded by 256 × this.
    pub fuel: u64,
    /// Most bytes of output.
    pub output_bytes: usize,
    /// Most time to compile, and most time for one call of [`ChatTemplate::render`]. The latter is
    /// looked at when the template writes; between two writes `fuel` is the bound.
    pub wall_clock: Duration,
}

impl Default for TemplateLimits {
    /// Room for some thousand messages or several megabytes. What a template can do with a short chat takes 50 ms on
    /// a core of 2023, whatever it is.
    fn default() -> TemplateLimits {
        TemplateLimits {
            fuel: 250_000,
            output_bytes: 16 * 1024 * 1024,
            wall_clock: Duration::from_secs(2),
        }
    }
}

/// What can be wrong with a template or a chat for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The source is longer than any template needs.
    #[error("chat template: expected at most {limit} bytes, found {found}")]
    SourceTooLong {
        /// Bytes of the source.
        found: usize,
        /// Most bytes accepted.
        limit: usize,
    },
    /// The source is not a template, or uses a construct that is not supported.
    #[error("chat template line {line}: {reason}")]
    Unsupported {
        /// Line of the construct, from 1; 0 if unknown.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The template itself refused the messages.
    #[error("the chat template refuses these messages: {message}")]
    Raised {
        /// The template's own words.
        message: String,
    },
    /// A role with characters that no role has; roles are written into the prompt as they are.
    #[error(
        "message {index}: expected a role of 1 to 64 letters, digits, `_` or `-`, found {found:?}"
    )]
    BadRole {
        /// Index of the message.
        index: usize,
        /// The role, at most its first 64 characters.
        found: String,
    },
    /// An extra variable with the name of one that is given anyway.
    #[error("chat template: expected an extra with a name of its own, found `{name}`")]
    ReservedName {
        /// The name.
        name: String,
    },
    /// Rendering needs more work than allowed.
    #[error("chat template: rendering exceeds {fuel} units of work")]
    OutOfFuel {
        /// The limit.
        fuel: u64,
    },
    /// The output is longer than allowed.
    #[error("chat template: the output exceeds {limit} bytes")]
    OutputTooLong {
        /// The limit.
        limit: usize,
    },
    /// Rendering took longer than allowed.
    #[error("chat template: rendering exceeds {limit:?}")]
    OutOfTime {
        /// The limit.
        limit: Duration,
    },
    /// The operating system gave no thread to render on, or rendering panicked.
    #[error("chat template: the rendering thread {what}")]
    Thread {
        /// `could not start` or `panicked`.
        what: &'static str,
    },
    /// Anything else that went wrong while rendering.
    #[error("chat template line {line}: rendering failed: {reason}")]
    Render {
        /// Line of the template, from 1; 0 if unknown.
        line: usize,
        /// What went wrong.
        reason: String,
    },
}

/// A compiled chat template. Immutable; rendering takes `&self`.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    limits: TemplateLimits,
    source: String,
    sha256: String,
}

impl ChatTemplate {
    /// Compiles `source` with default limits. `bos` and `eos` are what `bos_token` and
    /// `eos_token` show.
    ///
    /// # Errors
    /// [`TemplateError::SourceTooLong`], [`TemplateError::Unsupported`], and a limit of
    /// [`TemplateLimits`] that short chats exceed already.
    pub fn compile(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::compile_with_limits(source, bos, eos, TemplateLimits::default())
    }

    /// Compiles `source` with the given limits.
    ///
    /// # Errors
    /// As [`ChatTemplate::compile`].
    pub fn compile_with_limits(
        source: &str,
        bos: &str,
        eos: &str,
        limits: TemplateLimits,
    ) -> Result<ChatTemplate, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            let found = source.len();
            return Err(TemplateError::SourceTooLong { found, limit: MAX_SOURCE_BYTES });
        }
        template_parts::check(&without_generation_tags(source)).map_err(too_long)?;
        let [source, bos, eos] = [source, bos, eos].map(str::to_owned);
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        // Not joined: a compilation cannot be stopped, only left alone.
        let thread = builder().spawn(move || {
            // The receiver is gone if time was up, and then nobody wants the template.
            sender.send(ChatTemplate::build(&source, &bos, &eos, limits)).ok()
        });
        thread.map_err(|_| TemplateError::Thread { what: "could not start" })?;
        receiver.recv_timeout(limits.wall_clock).map_err(|error| match error {
            RecvTimeoutError::Timeout => TemplateError::OutOfTime { limit: limits.wall_clock },
            RecvTimeoutError::Disconnected => TemplateError::Thread { what: "panicked" },
        })?
    }

    fn build(
        source: &str,
        bos: &str,
        eos: &str,
        limits: TemplateLimits,
    ) -> Result<ChatTemplate, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| unsupported(&error))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_debug(false);
        environment.set_recursion_limit(MAX_RECURSION);
        register(&mut environment);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| unsupported(&error))?;
        let template = ChatTemplate {
            environment,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            limits,
            source: source.to_owned(),
            sha256: sha256_hex(source.as_bytes()),
        };
        template.refuse_at_once()?;
        Ok(template)
    }

    /// The source as it was given.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// SHA-256 of the source, 64 hexadecimal digits (`template_hash`).
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Renders `messages` and finds out which bytes of the prompt came from them.
    ///
    /// # Errors
    /// [`TemplateError::Raised`] with the template's own message, [`TemplateError::BadRole`],
    /// [`TemplateError::ReservedName`], a limit of [`TemplateLimits`], or [`TemplateError::Render`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        options: &RenderOptions,
    ) -> Result<Prompt, TemplateError> {
        check(messages, options)?;
        on_large_stack(|| self.render_thrice(messages, options))?
    }

    /// The three renderings that `provenance` explains.
    fn render_thrice(
        &self,
        messages: &[ChatMessage],
        options: &RenderOptions,
    ) -> Result<Prompt, TemplateError> {
        // All three show one time, also where a second ends between them.
        let now = Some(options.now.unwrap_or_else(SystemTime::now));
        let options = RenderOptions { now, ..options.clone() };
        let mut walk = Walk::new(&str::to_owned);
        let variables = walk.context(messages, &options);
        let Walk { texts, fixed, .. } = walk;
        let n_bytes = texts.iter().chain(&fixed).map(String::len).sum();
        let budget = self.budget(self.fuel_of(messages.len(), n_bytes));
        let render_with = |walk: &mut Walk| {
            let variables = walk.context(messages, &options);
            self.render_text(variables, &budget)
        };

        let plain = self.render_text(variables, &budget)?;
        let marks = Marks::draw(texts.iter().chain(&fixed).map(String::as_str));
        let marked = render_with(&mut Walk::new(&|text| marks.around(text)));
        let veiled = render_with(&mut Walk::new(&masked));
        // Only the plain prompt has to succeed: a template may refuse the altered texts, and
        // then there is no proof, which `encode_prompt` deals with.
        if let (Ok(marked), Ok(veiled)) = (marked, veiled)
            && let Some(untrusted) = marks.locate(&marked, &plain)
        {
            return Ok(Prompt::marked(&plain, &untrusted, veiled, texts, fixed));
        }
        Ok(Prompt::unproven(plain, texts, fixed))
    }

    /// Work for one render of a chat with so many messages, and so many bytes in all of its texts.
    fn fuel_of(&self, n_messages: usize, n_bytes: usize) -> u64 {
        let of_messages = (n_messages as u64).saturating_mul(FUEL_OF_MESSAGE);
        let fuel = self.limits.fuel.saturating_add(of_messages);
        let fuel = fuel.saturating_add(n_bytes as u64 / BYTES_OF_FUEL);
        fuel.min(self.limits.fuel.saturating_mul(MOST_TIMES))
    }

    /// From now on; each render with it may do so much work.
    fn budget(&self, fuel: u64) -> Budget {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        Budget { environment, fuel, deadline: Instant::now() + self.limits.wall_clock }
    }

    fn render_text(
        &self,
        mut variables: Vec<(String, Value)>,
        budget: &Budget,
    ) -> Result<String, TemplateError> {
        let Budget { environment, fuel, deadline } = budget;
        variables.push(("bos_token".to_owned(), Value::from(self.bos.as_str())));
        variables.push(("eos_token".to_owned(), Value::from(self.eos.as_str())));
        let context = Value::from_pairs(variables);
        let refused = |error: Error| self.render_error(&error, *fuel);
        let template = environment.get_template(NAME).map_err(refused)?;
        let mut output =
            BoundedOutput { bytes: Vec::new(), limits: self.limits, deadline: *deadline };
        template.render_captured_to(context, &mut output).map(drop).map_err(refused)?;
        if Instant::now() > *deadline {
            return Err(TemplateError::OutOfTime { limit: self.limits.wall_clock });
        }
        Ok(String::from_utf8(output.bytes).expect("minijinja writes whole strings"))
    }

    /// Renders short chats and refuses a template that calls what we do not have, or that exceeds
    /// its limits even on these.
    /// (field-faults B19: first-turn chats worked, every later one gave status 500.)
    fn refuse_at_once(&self) -> Result<(), TemplateError> {
        let budget = self.budget(self.limits.fuel / N_PROBES);
        let options = RenderOptions::default();
        let with_tools = RenderOptions { tools: Some(vec![probe_tool()]), ..options.clone() };
        let chats: [(&[&str], &RenderOptions); 6] = [
            (&["user"], &options),
            (&["system", "user"], &options),
            (&["user", "assistant", "user"], &options),
            (&["system", "user", "assistant", "user"], &options),
            (&["user"], &with_tools),
            (&["user", "assistant", "tool", "assistant", "user"], &with_tools),
        ];
        for (roles, options) in chats {
            let messages = probe_chat(roles);
            for add_generation_prompt in [false, true] {
                let options = RenderOptions { add_generation_prompt, ..options.clone() };
                let variables = Walk::new(&str::to_owned).context(&messages, &options);
                match self.render_text(variables, &budget) {
                    // It may well raise: a chat of these roles need not be one that it takes.
                    Ok(_) | Err(TemplateError::Raised { .. } | TemplateError::Render { .. }) => {}
                    Err(refused) => return Err(refused),
                }
            }
        }
        Ok(())
    }

    fn render_error(&self, error: &Error, fuel: u64) -> TemplateError {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(current) = cause {
            if let Some(Raised(message)) = current.downcast_ref() {
                return TemplateError::Raised { message: message.clone() };
            }
            match current.downcast_ref::<io::Error>().map(io::Error::kind) {
                Some(io::ErrorKind::TimedOut) => {
                    return TemplateError::OutOfTime { limit: self.limits.wall_clock };
                }
                Some(io::ErrorKind::FileTooLarge) => {
                    return TemplateError::OutputTooLong { limit: self.limits.output_bytes };
                }
                Some(_) | None => {}
            }
            if let Some(inner) = current.downcast_ref::<Error>() {
                if inner.kind() == ErrorKind::OutOfFuel {
                    return TemplateError::OutOfFuel { fuel };
                }
                // A string method on something else fails in Python too, and says nothing about us.
                let misplaced = inner.kind() == ErrorKind::UnknownMethod
                    && inner.detail().is_some_and(|it| !it.starts_with("string has"));
                if UNKNOWN_NAME.contains(&inner.kind()) && !misplaced {
                    return unsupported(inner);
                }
            }
            cause = current.source();
        }
        TemplateError::Render { line: error.line().unwrap_or(0), reason: reason(error) }
    }
}

/// What the renderings of one chat may take.
struct Budget {
    /// The template's, with this much fuel for each rendering.
    environment: Environment<'static>,
    fuel: u64,
    deadline: Instant,
}

/// Runs `work` on a thread of its own, which ends before this returns.
fn on_large_stack<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R, TemplateError> {
    std::thread::scope(|scope| {
        let thread = builder().spawn_scoped(scope, work);
        let thread = thread.map_err(|_| TemplateError::Thread { what: "could not start" })?;
        thread.join().map_err(|_| TemplateError::Thread { what: "panicked" })
    })
}

fn builder() -> std::thread::Builder {
    std::thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES)
}

/// Output that ends at the limit or the deadline.
struct BoundedOutput {
    bytes: Vec<u8>,
    limits: TemplateLimits,
    deadline: Instant,
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limits.output_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if Instant::now() > self.deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn too_long(TooLong { line, n_parts }: TooLong) -> TemplateError {
    let reason = format!(
        "its expressions would take too long to compile: expected shorter ones, found one of {n_parts} parts here"
    );
    TemplateError::Unsupported { line, reason }
}

fn unsupported(error: &Error) -> TemplateError {
    TemplateError::Unsupported { line: error.line().unwrap_or(0), reason: reason(error) }
}

fn reason(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// A chat of `roles`, in which the message before a `tool` one calls the probe tool.
fn probe_chat(roles: &[&str]) -> Vec<ChatMessage> {
    let mut messages: Vec<_> = roles.iter().map(|&it| ChatMessage::new(it, "text")).collect();
    for at in 1..messages.len() {
        if messages[at].role == "tool" {
            let id = Some("probe0000".to_owned());
            let arguments = serde_json::Map::from_iter([("key".to_owned(), "value".into())]);
            messages[at].tool_call_id.clone_from(&id);
            messages[at].name = Some("probe".to_owned());
            // Not `None`, on which many templates call string methods, and so fail in Python too.
            messages[at - 1].content = Some(String::new());
            messages[at - 1].tool_calls = vec![ToolCall { id, name: "probe".into(), arguments }];
        }
    }
    messages
}

fn probe_tool() -> serde_json::Value {
    let key = serde_json::json!({ "type": "string", "description": "text" });
    let parameters = serde_json::json!({
        "type": "object", "properties": { "key": key }, "required": ["key"]
    });
    serde_json::json!({
        "type": "function",
        "function": { "name": "probe", "description": "text", "parameters": parameters }
    })
}

/// Replaces the `generation` block, which marks assistant tokens for training, by a block that is
/// always taken. minijinja has no such tag, and the whitespace rules stay those of a block.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        text.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = tag[..end].trim_matches(['-', '+']).trim();
        let replacement = match inner {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        let at = tag.find(inner).expect("the tag contains its own inner part");
        text.push_str(&tag[..at]);
        text.push_str(replacement);
        rest = &tag[at + inner.len()..];
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Half a second of folding and more, where 64 kB take a minute.
    fn chain() -> String {
        format!("{{{{ 1{} }}}}", "~1".repeat(5_000))
    }

    #[test]
    fn l7_an_expression_that_folds_for_ever_is_refused_before_it_is_compiled() {
        let error = ChatTemplate::compile(&chain(), "", "").unwrap_err();
        let TemplateError::Unsupported { line: 1, reason } = &error else { panic!("{error}") };
        assert!(reason.contains("10001 parts"), "{reason}");
    }

    /// The mutation: nobody counts, and a thread of the server is busy with it whatever the limits are.
    #[test]
    fn mutation_l7_without_the_count_of_parts_a_template_takes_a_core() {
        let (sender, ended) = std::sync::mpsc::channel();
        let limits = TemplateLimits { wall_clock: Duration::ZERO, ..TemplateLimits::default() };
        let built = builder().spawn(move || {
            sender.send(ChatTemplate::build(&chain(), "", "", limits).is_ok()).ok();
        });
        let built = built.unwrap();
        let waited = ended.recv_timeout(Duration::from_millis(100));
        assert_eq!(waited, Err(RecvTimeoutError::Timeout), "long behind its limit");
        built.join().unwrap();
    }

    /// Work that a chat gets grows with the chat, and not without end.
    #[test]
    fn a_long_chat_gets_more_work_and_never_more_than_four_times() {
        let template = ChatTemplate::compile("{{ messages[0].content }}", "", "").unwrap();
        let fuel = template.limits.fuel;
        for (n_messages, n_bytes, expected) in [
            (0, 0, fuel),
            (10, 4_000, fuel + 6_000),
            (1_000, 400_000, fuel + 600_000),
            (100_000, 0, 4 * fuel),
            (1, usize::MAX, 4 * fuel),
        ] {
            assert_eq!(template.fuel_of(n_messages, n_bytes), expected);
        }
        // A hundred rounds a message are more than the short chat's work.
        let source = "{% for m in messages %}{% for i in range(100) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::compile(source, "", "").unwrap();
        let chat = vec![ChatMessage::new("user", ""); 1_500];
        template.render(&chat, &RenderOptions::default()).unwrap();
        let Err(error) = template.render_text(
            Walk::new(&str::to_owned).context(&chat, &RenderOptions::default()),
            &template.budget(fuel),
        ) else {
            panic!("it was enough")
        };
        assert!(matches!(error, TemplateError::OutOfFuel { fuel: 250_000 }), "{error}");
    }
}
