//! The model's chat template: a conversation becomes the one string that the model was trained to continue.
//!
//! Templates are programs written by strangers, in the Jinja of Python's transformers. They run in an environment that
//! imitates that one and that has nothing to reach: no files, no network, no other templates. Work is bounded by fuel,
//! output by the size of the conversation; memory and time by the [`Sandbox`] that carries them out.

mod control_tokens;
mod deepseek_v32;
mod environment;
mod json;
mod program;
mod python;

use std::{collections::BTreeMap, sync::Arc};

use control_tokens::ControlTokens;
pub(crate) use program::Program;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{ChatRequest, Message, Sandbox, SandboxError, TextError, TextFiles, Tokenizer, reasoning};

/// The largest honest template has about 30 KiB.
const MAX_TEMPLATE: usize = 256 << 10;
/// Output may be this much longer than four times the conversation.
const OUTPUT_ALLOWANCE: usize = 1 << 20;
/// Names of templates, where there are several: for requests with tools, and for all others.
const USED: [&str; 2] = ["tool_use", "default"];
/// Brackets within brackets of a conversation. Readers of JSON give up at 128.
const MAX_NESTING: usize = 100;
/// What the request sets by itself.
const RESERVED: [&str; 10] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "return_dict",
    "raise_exception",
    "strftime_now",
];
/// Put behind the answer that is to be continued; found again in the output, and everything from there is cut off.
const CONTINUATION_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A model's chat template, ready to render. Cheap to clone, usable from many threads.
#[derive(Clone)]
pub struct ChatTemplate {
    parts: Arc<Parts>,
}

struct Parts {
    templates: BTreeMap<String, Template>,
    sandbox: Arc<dyn Sandbox>,
    /// Longest source, part of the output bound.
    source_bytes: usize,
    special_tokens: Map<String, Value>,
    control_tokens: ControlTokens,
    has_thinking: bool,
}

struct Template {
    /// Where it was found, for people.
    place: String,
    written: Source,
}

enum Source {
    Jinja(String),
    /// A format that models have as Python only; code of ours stands in for it.
    DeepSeekV32,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let places: Vec<&str> = self.parts.templates.values().map(|one| one.place.as_str()).collect();
        f.debug_struct("ChatTemplate").field("places", &places).finish_non_exhaustive()
    }
}

/// How templates are written in JSON: one, or several with names.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    One(String),
    Several(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct InJson {
    #[serde(default)]
    chat_template: Option<Written>,
    /// mlx-lm's name for a format that is no template.
    #[serde(default)]
    chat_template_type: Option<String>,
}

impl ChatTemplate {
    /// Finds the model's template: chat_template.jinja, or else tokenizer_config.json, or else chat_template.json. None is
    /// fine; what to do without one is the caller's matter ([`TextError::NoChatTemplate`] tells a person). Before all of them
    /// comes a `chat_template_type` in tokenizer_config.json, as in mlx-lm.
    ///
    /// `sandbox` carries it out. A process that has more to lose than this template takes `mlxnode-sandbox`'s; [`InProcess`]
    /// ends with a template that asks for more memory than there is.
    ///
    /// # Errors
    /// [`TextError`] when a file cannot be read, or its template is too large or does not compile.
    pub fn from_files(
        files: &TextFiles,
        tokenizer: &Tokenizer,
        sandbox: Arc<dyn Sandbox>,
    ) -> Result<Option<Self>, TextError> {
        let config: Option<InJson> = files.json("tokenizer_config.json")?;
        match config.and_then(|config| config.chat_template_type).as_deref() {
            Some("deepseek_v32") => return Ok(Some(Self::deepseek_v32(tokenizer, sandbox))),
            // Muse Spark's name stands for how its answers are read; its prompts have a template.
            None | Some("muse_spark") => {}
            Some(other) => {
                return Err(TextError::InvalidFile {
                    file: "tokenizer_config.json".to_owned(),
                    reason: format!(
                        "chat_template_type is {other:?}, but must be \"deepseek_v32\" or \"muse_spark\""
                    ),
                });
            }
        }
        if let Some(source) = files.text("chat_template.jinja")? {
            let sources = [("default".to_owned(), source.to_owned())];
            return Self::compile("chat_template.jinja", sources.into(), tokenizer, sandbox).map(Some);
        }
        for file in ["tokenizer_config.json", "chat_template.json"] {
            let found: Option<InJson> = files.json(file)?;
            let sources = match found.and_then(|found| found.chat_template) {
                None => continue,
                Some(Written::One(source)) => BTreeMap::from([("default".to_owned(), source)]),
                Some(Written::Several(list)) => {
                    list.into_iter().map(|one| (one.name, one.template)).collect()
                }
            };
            return Self::compile(file, sources, tokenizer, sandbox).map(Some);
        }
        Ok(None)
    }

    fn deepseek_v32(tokenizer: &Tokenizer, sandbox: Arc<dyn Sandbox>) -> Self {
        let control = deepseek_v32::CONTROL.map(str::to_owned);
        let template =
            Template { place: "chat_template_type deepseek_v32".to_owned(), written: Source::DeepSeekV32 };
        let parts = Parts {
            templates: BTreeMap::from([("default".to_owned(), template)]),
            sandbox,
            source_bytes: MAX_TEMPLATE / 16, // its longest text of its own has 1.6 KiB, once for each system message
            special_tokens: tokenizer.special().named.clone(),
            control_tokens: ControlTokens::of(tokenizer, control.iter()),
            has_thinking: reasoning::has_thinking(tokenizer),
        };
        Self { parts: Arc::new(parts) }
    }

    fn compile(
        file: &str,
        sources: BTreeMap<String, String>,
        tokenizer: &Tokenizer,
        sandbox: Arc<dyn Sandbox>,
    ) -> Result<Self, TextError> {
        let control_tokens = ControlTokens::of(tokenizer, sources.values());
        let mut templates = BTreeMap::new();
        let mut source_bytes = 0;
        for (name, source) in sources {
            let place =
                if name == "default" { file.to_owned() } else { format!("{file} (template {name:?})") };
            if source.len() > MAX_TEMPLATE {
                let (bytes, limit) = (source.len() as u64, MAX_TEMPLATE as u64);
                return Err(TextError::FileTooLarge { file: place, bytes, limit });
            }
            // The others are never chosen.
            if USED.contains(&name.as_str()) {
                sandbox.compile(&source).map_err(|error| text_error(error, &place, 0))?;
                source_bytes = source_bytes.max(source.len());
            }
            templates.insert(name, Template { place, written: Source::Jinja(source) });
        }
        let parts = Parts {
            templates,
            sandbox,
            source_bytes,
            special_tokens: tokenizer.special().named.clone(),
            control_tokens,
            has_thinking: reasoning::has_thinking(tokenizer),
        };
        Ok(Self { parts: Arc::new(parts) })
    }

    /// Renders the conversation. The text still has to be encoded, without adding special tokens; that is what mlx-lm does,
    /// and control tokens in the messages then count as such. For messages of strangers there is [`ChatTemplate::encode`].
    pub fn render(&self, request: &ChatRequest) -> Result<String, TextError> {
        self.render_request(request.clone())
    }

    /// Renders a conversation whose last message is left open: its text is the end, so that more of it can follow. That is what
    /// transformers calls `continue_final_message`, of a message of any role.
    pub fn render_open(&self, request: &ChatRequest) -> Result<String, TextError> {
        let mut request =
            ChatRequest { add_generation_prompt: false, continue_final: None, ..request.clone() };
        let Some(Value::String(text)) = request.messages.last_mut().and_then(|last| last.content.as_mut())
        else {
            return Err(TextError::Continuation { reason: "its last message is no text" });
        };
        let end = text.clone();
        text.push_str(CONTINUATION_MARK);
        cut_at_mark(self.render_request(request)?, &end)
    }

    /// Renders the conversation into token ids. Control tokens in the request's strings are encoded as the words they are.
    pub fn encode(&self, request: &ChatRequest, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let text = self.render_request(self.marked(request.clone()))?;
        control_tokens::encode_marked(tokenizer, &text)
    }

    /// The text of the template that a request with tools gets.
    pub(crate) fn source(&self) -> Option<&str> {
        let template = USED.iter().find_map(|name| self.parts.templates.get(*name))?;
        match &template.written {
            Source::Jinja(source) => Some(source),
            Source::DeepSeekV32 => None,
        }
    }

    fn marked(&self, mut request: ChatRequest) -> ChatRequest {
        let tokens = &self.parts.control_tokens;
        for message in &mut request.messages {
            message.role = tokens.mark(&message.role);
            message
                .content
                .iter_mut()
                .chain(message.extra.values_mut())
                .for_each(|value| tokens.mark_all(value));
        }
        let lists = request.tools.iter_mut().chain(request.documents.iter_mut()).flatten();
        lists.chain(request.arguments.values_mut()).for_each(|value| tokens.mark_all(value));
        request.continue_final = request.continue_final.map(|answer| tokens.mark(&answer));
        request
    }

    fn render_request(&self, request: ChatRequest) -> Result<String, TextError> {
        let template = self.choose(&request)?;
        let context = self.context(&request)?;
        let variables = context.to_string();
        let limit = 4 * (variables.len() + self.parts.source_bytes) + OUTPUT_ALLOWANCE;

        let text = match &template.written {
            Source::Jinja(source) => {
                let rendered = self.parts.sandbox.render(source, &variables, limit);
                rendered.map_err(|error| text_error(error, &template.place, limit))?
            }
            Source::DeepSeekV32 => deepseek_v32::render(&context, limit)?,
        };
        match &request.continue_final {
            None => Ok(text),
            Some(answer) => cut_at_mark(text, answer),
        }
    }

    /// With tools, the template for tools if there is one; else the default.
    fn choose(&self, request: &ChatRequest) -> Result<&Template, TextError> {
        let templates = &self.parts.templates;
        let for_tools = request.tools.as_ref().and_then(|_| templates.get("tool_use"));
        for_tools
            .or_else(|| templates.get("default"))
            .ok_or_else(|| TextError::NoDefaultTemplate { names: templates.keys().cloned().collect() })
    }

    fn context(&self, request: &ChatRequest) -> Result<Value, TextError> {
        if let Some(name) = request.arguments.keys().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(TextError::ReservedArgument { name: name.clone() });
        }
        let mut messages: Vec<Value> = request.messages.iter().map(message_value).collect();
        if let Some(answer) = &request.continue_final {
            let open = Message::new("assistant", format!("{answer}{CONTINUATION_MARK}"));
            messages.push(message_value(&open));
        }
        let add_generation_prompt = request.add_generation_prompt && request.continue_final.is_none();

        let mut context = self.parts.special_tokens.clone();
        let thinking = request.thinking.unwrap_or(self.parts.has_thinking);
        context.insert("enable_thinking".to_owned(), Value::Bool(thinking));
        if request.thinking.is_some() {
            // What DeepSeek-V3.1, Kimi and Granite call it. Not set on our own account: mlx-lm does not, and their
            // templates then choose.
            context.insert("thinking".to_owned(), Value::Bool(thinking));
        }
        context.extend(request.arguments.clone());
        context.insert("messages".to_owned(), Value::Array(messages));
        // Absent is none and not undefined: some templates ask `tools is not none`, and transformers passes None.
        context.insert("tools".to_owned(), request.tools.clone().map_or(Value::Null, Value::Array));
        context.insert("documents".to_owned(), request.documents.clone().map_or(Value::Null, Value::Array));
        context.insert("add_generation_prompt".to_owned(), Value::Bool(add_generation_prompt));
        let context = Value::Object(context);
        if is_deeper(&context, MAX_NESTING) {
            return Err(TextError::TooNested { limit: MAX_NESTING });
        }
        Ok(context)
    }
}

fn is_deeper(value: &Value, levels: usize) -> bool {
    let inside = |value: &Value| levels == 0 || is_deeper(value, levels - 1);
    match value {
        Value::Array(items) => items.iter().any(inside),
        Value::Object(fields) => fields.values().any(inside),
        _ => false,
    }
}

/// The message as templates see it: what is null is not there, as in transformers (clients send `"content": null` beside tool
/// calls, and many templates would write "None"). Reasoning goes by several names; templates read `reasoning_content`, some
/// `thinking`.
fn message_value(message: &Message) -> Value {
    let mut fields = Map::new();
    fields.insert("role".to_owned(), Value::String(message.role.clone()));
    if let Some(content) = &message.content {
        fields.insert("content".to_owned(), content.clone());
    }
    fields.extend(message.extra.clone());
    fields.retain(|_, value| !value.is_null());
    let reasoning =
        ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| fields.get(*name).cloned());
    if let Some(reasoning) = reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    Value::Object(fields)
}

/// Cuts behind the answer. A template that trims its messages has eaten the mark's space: then our own goes too.
fn cut_at_mark(mut text: String, answer: &str) -> Result<String, TextError> {
    let mark = CONTINUATION_MARK.trim_end();
    let Some(at) = text.rfind(mark) else {
        return Err(TextError::Continuation { reason: "it leaves the answer out" });
    };
    if !text.contains(answer.trim()) {
        return Err(TextError::Continuation { reason: "it changes the beginning of the answer" });
    }
    let spacing_kept = text[at..].starts_with(CONTINUATION_MARK);
    text.truncate(at);
    if !spacing_kept {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// A sandbox's error with the place of the template; `limit` bounded its output.
fn text_error(error: SandboxError, place: &str, limit: usize) -> TextError {
    let file = place.to_owned();
    match error {
        SandboxError::Wrong { line, reason } => {
            TextError::Template { file, line: usize::try_from(line).unwrap_or(0), reason }
        }
        SandboxError::Refused(reason) => TextError::Refused { reason },
        SandboxError::Work => TextError::TemplateTooSlow { file },
        SandboxError::Output => TextError::TemplateOutput { file, limit },
        SandboxError::Memory { mebibytes } => TextError::TemplateMemory { file, mebibytes },
        SandboxError::Busy => TextError::SandboxBusy,
        SandboxError::Unavailable(reason) => TextError::Sandbox { reason },
    }
}
