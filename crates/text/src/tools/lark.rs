//! Answers with tools as grammars: Lark in llguidance's dialect, with a hole `json_0`, `json_1`, … for each schema.
//!
//! llguidance reads all terminals that may come at a place side by side, each as far as it goes. Three rules
//! follow from that here. Free text is a terminal that cannot hold the marker, so that it has ended for
//! certain where a call begins (field-faults B5). A terminal ends *with* the marker (`suffix`), so that a token that
//! completes the marker and carries more is held against what comes behind it. And what may begin like free
//! text is one terminal from its beginning.

use std::fmt::Write as _;

use serde_json::Value;

use super::region::{ARGUMENTS, CALL_ID};
use super::{CallChoice, CallLimits, ThoughtLead, ToolFamily, ToolFormat, ToolSpec};

/// A grammar with holes, for `exrail_grammar::Source::Composed`.
#[derive(Clone, Debug, PartialEq)]
pub struct Composed {
    /// The grammar, rule `start`. `<[7]>` stands for the control token of id 7.
    pub lark: String,
    /// The schema of each hole, `json_0` first.
    pub schemas: Vec<Value>,
}

/// Blanks that may stand between a thought and a locked answer; bounded, so that a model that likes blanks
/// cannot stall.
const GAP: &str = "/[ \\n]{1,4}/";
/// Any text.
const ANY: &str = "/(?s:.*)/";

/// A terminal or control token for a literal.
fn literal(format: &ToolFormat, text: &str) -> String {
    format.control(text).map_or_else(|| quoted(text), |id| format!("<[{id}]>"))
}

/// A Lark string, which is a JSON string.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

pub(super) fn schema(format: &ToolFormat, schema: Value, lead: ThoughtLead) -> Composed {
    let lark = format!("{}answer: json_0\n", start(format, lead, Gap::Own));
    Composed { lark, schemas: vec![schema] }
}

pub(super) fn calls(
    format: &ToolFormat,
    tools: &[&ToolSpec],
    choice: CallChoice<'_>,
    lead: ThoughtLead,
    limits: CallLimits,
) -> Composed {
    let is_free = match choice {
        CallChoice::Auto => true,
        CallChoice::Required | CallChoice::Named(_) => false,
    };
    let gap = if is_free { Gap::InText } else { Gap::Own };
    let mut lark = start(format, lead, gap);
    let syntax = Syntax::of(format);
    lark.push_str(&syntax.answer(format, is_free, limits.calls));
    let names: Vec<String> = (0..tools.len()).map(|at| format!("call_{at}")).collect();
    writeln!(lark, "one: {}", names.join(" | ")).expect("a String takes everything");
    for (at, tool) in tools.iter().enumerate() {
        lark.push_str(&syntax.call(format, at, tool.name(), is_free));
    }
    let schemas = tools.iter().map(|tool| tool.arguments_schema()).collect();
    Composed { lark, schemas }
}

/// Whether blanks behind a thought have a terminal of their own, or the free text takes them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gap {
    Own,
    InText,
}

/// `start`: the thought, if there may be one, and rule `answer`.
fn start(format: &ToolFormat, lead: ThoughtLead, gap: Gap) -> String {
    let Some(thoughts) = &format.thoughts else { return "start: answer\n".to_owned() };
    let (open, close) = (format.control(&thoughts.open), format.control(&thoughts.close));
    let (open_text, close_text) = (quoted(&thoughts.open), quoted(&thoughts.close));
    let gap = match gap {
        Gap::Own => " GAP?",
        Gap::InText => "",
    };
    // The end of a thought is a control token, or the end of its terminal.
    let inside = match close {
        Some(id) => {
            format!("inside: INSIDE? <[{id}]>\nINSIDE: /(?s:.+)/ & ~({ANY} {close_text} {ANY})\n")
        }
        None => format!("inside[suffix={close_text}]: {ANY}\n"),
    };
    let whole = match (open, close) {
        (Some(id), _) => format!("whole: <[{id}]> inside\n{inside}"),
        (None, Some(id)) => format!(
            "whole: OPENED <[{id}]>\nOPENED: /[ \\n]*/ {open_text} ({ANY} & ~({ANY} {close_text} {ANY}))\n"
        ),
        (None, None) => format!("whole[suffix={close_text}]: /[ \\n]*/ {open_text} {ANY}\n"),
    };
    let gap_rule = if gap.is_empty() { String::new() } else { format!("GAP: {GAP}\n") };
    match lead {
        ThoughtLead::Absent => "start: answer\n".to_owned(),
        ThoughtLead::IsOpen => format!("start: inside{gap} answer\n{inside}{gap_rule}"),
        ThoughtLead::MayOpen => {
            format!("start: answer | whole{gap} answer\n{whole}{gap_rule}")
        }
    }
}

/// The literals of a family.
struct Syntax {
    family: ToolFamily,
    /// Opens a call, or all of them.
    open: &'static str,
    /// Before the list, behind `open`.
    list_open: &'static str,
    /// Between two calls.
    between: &'static str,
    /// Whether `open` stands before each.
    opens_each: bool,
    /// Behind the last one.
    list_close: &'static str,
}

impl Syntax {
    fn of(format: &ToolFormat) -> Syntax {
        let family = format.family;
        let fenced = |open| Syntax {
            family,
            open,
            list_open: "",
            between: "\n",
            opens_each: true,
            list_close: "",
        };
        match family {
            ToolFamily::Hermes | ToolFamily::Generic => fenced("<tool_call>"),
            ToolFamily::Gemma => fenced("```tool_call"),
            // Its templates refuse a second call in an answer.
            ToolFamily::Llama3 => fenced("<|python_tag|>"),
            ToolFamily::Mistral if format.has_named_arguments => {
                Syntax { between: "", ..fenced("[TOOL_CALLS]") }
            }
            ToolFamily::Mistral => Syntax {
                list_open: "/ ?\\[/",
                between: ", ",
                opens_each: false,
                list_close: "]",
                ..fenced("[TOOL_CALLS]")
            },
        }
    }

    /// Rule `answer`, over rule `one`.
    fn answer(&self, format: &ToolFormat, is_free: bool, most: usize) -> String {
        if self.family == ToolFamily::Llama3 {
            return self.leading_answer(format, is_free);
        }
        let open = literal(format, self.open);
        let mut next = if self.between.is_empty() { String::new() } else { quoted(self.between) };
        if self.opens_each {
            next = format!("{next} {open}");
        }
        let repeated =
            if most > 1 { format!(" ({next} one)~0..{}", most - 1) } else { String::new() };
        let close =
            if self.list_close.is_empty() { String::new() } else { quoted(self.list_close) };
        let calls = format!("calls: {} one{repeated} {close}\n", self.list_open);
        if !is_free {
            return format!("answer: {open} calls\n{calls}");
        }
        let not_free = not_free(self.open);
        let free = format!("FREE: /(?s:.+)/{not_free}{}\n", not_thought(format));
        match format.control(self.open) {
            Some(id) => format!("answer: FREE? | FREE? <[{id}]> calls\n{free}{calls}"),
            None => format!(
                "answer: FREE? | lead calls\n{free}lead[suffix={}]: BEFORE\nBEFORE: {ANY}{}\n{calls}",
                quoted(self.open),
                not_thought(format)
            ),
        }
    }

    /// An object that is the whole answer. Free text cannot begin like one.
    fn leading_answer(&self, format: &ToolFormat, is_free: bool) -> String {
        if !is_free {
            return "answer: one\n".to_owned();
        }
        let not_free = not_free(self.open);
        let free = format!(
            "FREE: /(?s:.+)/ & ~(/\\s*\\{{\\s*\"(name|type)\"/ {ANY}){not_free}{}\n",
            not_thought(format)
        );
        let tagged = format.control(self.open).map(|id| format!(" | <[{id}]> one"));
        format!("answer: FREE? | one{}\n{free}", tagged.unwrap_or_default())
    }

    /// Rule `call_{at}`: one call of the tool.
    fn call(&self, format: &ToolFormat, at: usize, name: &str, is_free: bool) -> String {
        let head = |key: &str| format!("{{\"name\": \"{name}\", \"{key}\": ");
        match self.family {
            ToolFamily::Hermes | ToolFamily::Generic => {
                let open = quoted(&format!("\n{}", head("arguments")));
                let close = literal(format, "</tool_call>");
                format!("call_{at}: {open} json_{at} \"}}\\n\" {close}\n")
            }
            ToolFamily::Gemma => {
                let open = quoted(&format!("\n{}", head("arguments")));
                format!("call_{at}: {open} json_{at} \"}}\\n```\"\n")
            }
            ToolFamily::Llama3 => {
                // One terminal with the blanks before it: free text may begin with blanks, too.
                let blanks = if is_free { "/[ \\n]{0,4}/ " } else { "" };
                let open = quoted(&head("parameters"));
                format!("call_{at}: OPEN_{at} json_{at} \"}}\"\nOPEN_{at}: {blanks}{open}\n")
            }
            ToolFamily::Mistral if format.has_named_arguments => {
                let (id, arguments) = (literal(format, CALL_ID), literal(format, ARGUMENTS));
                let name = quoted(name);
                format!("call_{at}: {name} ({id} /[a-zA-Z0-9]{{9}}/)? {arguments} json_{at}\n")
            }
            ToolFamily::Mistral => {
                let open = quoted(&head("arguments"));
                format!(
                    "call_{at}: {open} json_{at} (\", \\\"id\\\": \\\"\" /[a-zA-Z0-9]{{9}}/ \"\\\"\")? \"}}\"\n"
                )
            }
        }
    }
}

/// That free text does not hold the marker, spelled out.
fn not_free(open: &str) -> String {
    format!(" & ~({ANY} {} {ANY})", quoted(open))
}

/// That free text does not begin a thought, which has a rule of its own.
fn not_thought(format: &ToolFormat) -> String {
    match &format.thoughts {
        Some(thoughts) => format!(" & ~(/[ \\n]*/ {} {ANY})", quoted(&thoughts.open)),
        None => String::new(),
    }
}
