//! The tool calls of an answer in every notation of [`ToolFormat`], as a grammar whose sentences [`ToolFormat::parse`] reads.

use super::arguments::{Argument, arguments, gemma_object, value_until};
use super::rules::{Rules, SPACE, quoted};
use super::{AnswerWish, ToolChoice, functions};
use crate::ToolFormat;
use serde_json::{Value, json};

/// What stands around the calls of an answer.
struct Frame {
    open: String,
    /// Between two calls; none where there is only one.
    between: Option<String>,
    close: String,
}

/// The name of the rule for all calls of an answer.
pub(super) fn calls(rules: &mut Rules<'_>, notation: ToolFormat, wish: &AnswerWish<'_>) -> String {
    let mut names = Vec::new();
    for (name, schema) in functions(wish.tools) {
        if let ToolChoice::Named(wanted) = wish.choice
            && name != wanted
        {
            continue;
        }
        let body = call(rules, notation, name, schema);
        names.push(rules.named(&body));
    }
    let call = rules.named(&names.join(" | "));
    let Frame { open, between, close } = frame(rules, notation);
    let more = match between.filter(|_| wish.parallel) {
        Some(between) => format!("({between} {call})*"),
        None => String::new(),
    };
    rules.named(&format!("{open} {call} {more} {close}"))
}

fn frame(rules: &Rules<'_>, notation: ToolFormat) -> Frame {
    let marked = |open: &str, between: &str, close: &str| Frame {
        open: rules.mark(open),
        between: Some(rules.mark(between)),
        close: rules.mark(close),
    };
    match notation {
        // Every call has its own marks.
        ToolFormat::JsonTools | ToolFormat::Longcat | ToolFormat::Qwen3Coder | ToolFormat::Glm47 => {
            Frame { open: String::new(), between: Some(SPACE.to_owned()), close: String::new() }
        }
        ToolFormat::Minicpm5 => marked("", "\n", ""),
        ToolFormat::Gemma4 | ToolFormat::FunctionGemma => marked("", "", ""),
        ToolFormat::KimiK2 => marked("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>"),
        ToolFormat::KimiK3 => marked("<|open|>tools<|sep|>", "", "<|close|>tools<|sep|>"),
        ToolFormat::MinimaxM2 => marked("<minimax:tool_call>\n", "", "</minimax:tool_call>"),
        ToolFormat::MuseSpark => marked("<atem:function_calls>\n", "", "</atem:function_calls>"),
        ToolFormat::DeepSeek => marked("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"),
        ToolFormat::DeepSeekV32 => marked("<｜DSML｜function_calls>\n", "", "</｜DSML｜function_calls>"),
        ToolFormat::Pythonic => marked("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
        // One call is the whole answer.
        ToolFormat::Llama3 | ToolFormat::Mistral | ToolFormat::Harmony => {
            Frame { open: String::new(), between: None, close: String::new() }
        }
    }
}

/// One call of a function.
fn call(rules: &mut Rules<'_>, notation: ToolFormat, name: &str, schema: Option<&Value>) -> String {
    let anything = json!({"type": "object"});
    let schema_or_any = schema.unwrap_or(&anything);
    match notation {
        ToolFormat::JsonTools | ToolFormat::Longcat => {
            let (start, end) = (notation.start().unwrap_or_default(), notation.end().unwrap_or_default());
            let (start, end) = (rules.mark(start), rules.mark(end));
            let head = quoted(&format!("{{\"name\": {}, \"arguments\": ", Value::from(name)));
            format!("{start} {SPACE} {head} {} \"}}\" {SPACE} {end}", rules.json(schema_or_any))
        }
        ToolFormat::Llama3 => {
            let head = quoted(&format!("{{\"name\": {}, \"parameters\": ", Value::from(name)));
            format!("{head} {} \"}}\"", rules.json(schema_or_any))
        }
        ToolFormat::Mistral if rules.tokenizer().token_to_id("[ARGS]").is_some() => {
            let (start, separator) = (rules.mark("[TOOL_CALLS]"), rules.mark("[ARGS]"));
            format!("{start} {} {separator} {}", quoted(name), rules.json(schema_or_any))
        }
        ToolFormat::Mistral => {
            let head = quoted(&format!("[{{\"name\": {}, \"arguments\": ", Value::from(name)));
            format!("{} {SPACE} {head} {} \"}}]\"", rules.mark("[TOOL_CALLS]"), rules.json(schema_or_any))
        }
        ToolFormat::KimiK2 => {
            let (begin, separator) =
                (rules.mark("<|tool_call_begin|>"), rules.mark("<|tool_call_argument_begin|>"));
            let end = rules.mark("<|tool_call_end|>");
            let head = quoted(&format!("functions.{name}:"));
            format!("{begin} {head} /[0-9]{{1,3}}/ {separator} {} {end}", rules.json(schema_or_any))
        }
        ToolFormat::Harmony => {
            let head = quoted(&format!("commentary to=functions.{name} "));
            let (channel, constrain) = (rules.mark("<|channel|>"), rules.mark("<|constrain|>"));
            let message = rules.mark("<|message|>");
            let tokenizer = rules.tokenizer();
            let ends_answer =
                tokenizer.token_to_id("<|call|>").is_some_and(|id| tokenizer.eos_tokens().contains(&id));
            let end = if ends_answer { String::new() } else { rules.mark("<|call|>") };
            format!("{channel} {head} {constrain} \"json\" {message} {} {end}", rules.json(schema_or_any))
        }
        ToolFormat::DeepSeek => {
            // Two layouts: V3 and R1 fence the arguments, V3.1 does not. The model knows its own.
            let (begin, separator) = (rules.mark("<｜tool▁call▁begin｜>"), rules.mark("<｜tool▁sep｜>"));
            let end = rules.mark("<｜tool▁call▁end｜>");
            let arguments = rules.json(schema_or_any);
            let fenced = quoted(&format!("{name}\n```json\n"));
            format!(
                "{begin} (\"function\" {separator} {fenced} {arguments} \"\\n```\" | {} {separator} {arguments}) {end}",
                quoted(name)
            )
        }
        ToolFormat::Qwen3Coder => {
            let open = rules.mark(&format!("<tool_call>\n<function={name}>\n"));
            let before = |argument: &Argument<'_>| format!("<parameter={}>\n", argument.name);
            let close = rules.mark("</function>\n</tool_call>");
            tagged(rules, schema, (&open, &close), &before, "\n</parameter>\n")
        }
        ToolFormat::Glm47 => {
            let open = rules.mark(&format!("<tool_call>{name}\n"));
            let before =
                |argument: &Argument<'_>| format!("<arg_key>{}</arg_key>\n<arg_value>", argument.name);
            let close = rules.mark("</tool_call>");
            tagged(rules, schema, (&open, &close), &before, "</arg_value>\n")
        }
        ToolFormat::KimiK3 => {
            let open = rules.mark(&format!("<|open|>call tool=\"{name}\"<|sep|>"));
            let before = |argument: &Argument<'_>| {
                let kind = if argument.kind.is_text() { "string" } else { "json" };
                format!("<|open|>argument key=\"{}\" type=\"{kind}\"<|sep|>", argument.name)
            };
            let close = rules.mark("<|close|>call<|sep|>");
            tagged(rules, schema, (&open, &close), &before, "<|close|>argument<|sep|>")
        }
        ToolFormat::MinimaxM2 => {
            let open = rules.mark(&format!("<invoke name=\"{name}\">\n"));
            let before = |argument: &Argument<'_>| format!("<parameter name=\"{}\">", argument.name);
            let close = rules.mark("</invoke>\n");
            tagged(rules, schema, (&open, &close), &before, "</parameter>\n")
        }
        ToolFormat::MuseSpark => {
            let open = rules.mark(&format!("<atem:invoke name=\"{name}\">\n"));
            let close = rules.mark("</atem:invoke>\n");
            // Whatever is JSON is read as JSON, so that a text that looks like a number needs its quotes.
            let before = |argument: &Argument<'_>| format!("<atem:parameter name=\"{}\">", argument.name);
            let end = rules.mark("</atem:parameter>\n");
            let mut parts = open;
            for argument in arguments(schema) {
                let value = rules.json(&argument.kind.schema());
                let part = format!("{} {value} {end}", rules.mark(&before(&argument)));
                push(&mut parts, &part, argument.is_required);
            }
            format!("{parts} {close}")
        }
        ToolFormat::Minicpm5 => {
            let open = rules.mark(&format!("<function name=\"{name}\">"));
            let before = |argument: &Argument<'_>| format!("<param name=\"{}\">", argument.name);
            let close = rules.mark("</function>");
            tagged(rules, schema, (&open, &close), &before, "</param>")
        }
        ToolFormat::DeepSeekV32 => {
            let open = rules.mark(&format!("<｜DSML｜invoke name=\"{name}\">\n"));
            let before = |argument: &Argument<'_>| {
                let is_text = argument.kind.is_text();
                format!("<｜DSML｜parameter name=\"{}\" string=\"{is_text}\">", argument.name)
            };
            let close = rules.mark("</｜DSML｜invoke>\n");
            tagged(rules, schema, (&open, &close), &before, "</｜DSML｜parameter>\n")
        }
        ToolFormat::Pythonic => pythonic(rules, name, schema),
        ToolFormat::Gemma4 | ToolFormat::FunctionGemma => {
            let (start, end) = (notation.start().unwrap_or_default(), notation.end().unwrap_or_default());
            let (start, end) = (rules.mark(start), rules.mark(end));
            let delimiter = if notation == ToolFormat::Gemma4 { "<|\"|>" } else { "<escape>" };
            let object = gemma_object(rules, schema_or_any, schema_or_any, delimiter, 0);
            format!("{start} {} {object} {end}", quoted(&format!("call:{name}")))
        }
    }
}

/// A call whose arguments stand between tags: `before` an argument's value, and `end` behind it.
fn tagged(
    rules: &mut Rules<'_>,
    schema: Option<&Value>,
    (open, close): (&str, &str),
    before: &dyn Fn(&Argument<'_>) -> String,
    end: &str,
) -> String {
    let mut parts = open.to_owned();
    for argument in arguments(schema) {
        let value = value_until(rules, &argument.kind, end);
        let part = format!("{} {value}", rules.mark(&before(&argument)));
        push(&mut parts, &part, argument.is_required);
    }
    format!("{parts} {close}")
}

fn push(parts: &mut String, part: &str, is_required: bool) {
    match is_required {
        true => parts.push_str(&format!(" {part}")),
        false => parts.push_str(&format!(" ({part})?")),
    }
}

/// `name(key=value, …)`, values as JSON, which Python's readers of such calls understand.
fn pythonic(rules: &mut Rules<'_>, name: &str, schema: Option<&Value>) -> String {
    let (mut more, mut whole) = (String::new(), String::new());
    for argument in arguments(schema).into_iter().rev() {
        let value = rules.json(&argument.kind.schema());
        let first = format!("{} {value} {more}", quoted(&format!("{}=", argument.name)));
        let next = format!("\", \" {first}");
        let either = |one: String, other: &str| match (argument.is_required, other.is_empty()) {
            (true, _) => one,
            (false, true) => format!("({one})?"),
            (false, false) => format!("({one} | {other})"),
        };
        whole = either(first, &whole);
        whole = rules.named(&whole);
        let next = either(next, &more);
        more = rules.named(&next);
    }
    format!("{} {whole} \")\"", quoted(&format!("{name}(")))
}
