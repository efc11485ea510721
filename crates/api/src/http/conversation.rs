//! A conversation that wants an answer, whatever dialect it came in, and the answer's parts as they come.

use crate::front::{AnswerEvent, End, GenerationRequest, Input, Piece, Prepared, Summary};
use crate::http::constraint::{self, Format};
use crate::http::generation::{Answers, Model, check_grammar};
use crate::http::openai::usage::ReasoningCount;
use crate::http::tools::Tools;
use crate::http::{ApiError, Caller, HttpServices};
use mlxnode_compute::Sampled;
use mlxnode_coordinator::requests::Parameters;
use mlxnode_text::{ChatRequest, Delta, Message, ToolCall};
use serde_json::{Map, Value};

/// What a client wants answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) tools: Tools,
    pub(super) format: Format,
    /// The field that asked for the format.
    pub(super) format_field: &'static str,
    pub(super) parameters: Parameters,
    /// Is the model to think first? None: as its template has it.
    pub(super) thinking: Option<bool>,
    /// Further variables of the template.
    pub(super) arguments: Map<String, Value>,
}

impl HttpServices {
    /// Everything before the first step.
    pub(super) async fn prepare(
        &self,
        caller: &Caller,
        model: &Model,
        conversation: Conversation,
    ) -> Result<Prepared, ApiError> {
        let Conversation { messages, tools, format, format_field, mut parameters, thinking, arguments } =
            conversation;
        if parameters.adapter.is_none() {
            parameters.adapter.clone_from(&model.adapter);
        }
        let chat = ChatRequest {
            messages,
            tools: tools.for_template(&model.text)?,
            add_generation_prompt: true,
            thinking,
            arguments,
            ..ChatRequest::default()
        };
        let request = GenerationRequest {
            model: model.deployment.name.clone(),
            input: Input::Chat(chat),
            parameters,
            extra_eos: Vec::new(),
            deadline: None,
            tenant: caller.tenant.clone(),
            trace: caller.trace,
            is_read: true,
        };
        let mut prepared = self.front.prepare(request).await?;
        let grammar =
            constraint::grammar(&model.text, &format, format_field, &tools, &prepared.valid.prompt)?;
        let field = if format == Format::Text { "tools" } else { format_field };
        check_grammar(model, grammar.as_ref(), field).await?;
        prepared.valid.spec.grammar = grammar;
        Ok(prepared)
    }
}

/// A part of an answer.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// More of the content.
    Content(String),
    /// More of the reasoning.
    Reasoning(String),
    /// A whole call.
    Call(ToolCall),
}

/// What a token brought: parts, and the token itself unless it ends the answer.
pub(super) struct Step {
    pub(super) parts: Vec<Part>,
    pub(super) tokens: Vec<Sampled>,
    /// Set in the last one.
    pub(super) finish: Option<Finish>,
}

/// How an answer ended.
pub(super) struct Finish {
    pub(super) reason: Reason,
    pub(super) summary: Summary,
    pub(super) reasoning_tokens: usize,
    /// The stop string that did it, if one did.
    pub(super) stopped_by: Option<String>,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Stop,
    Length,
    ToolCalls,
}

/// Reads one answer's events.
pub(super) struct Reader {
    stop_tokens: Vec<u32>,
    reasoning: ReasoningCount,
    has_call: bool,
    has_content: bool,
    has_reasoning: bool,
    /// Whitespace at the start: content only if content follows, or nothing else.
    blank: String,
}

impl Reader {
    pub(super) fn new(prepared: &Prepared) -> Self {
        Self {
            stop_tokens: prepared.valid.spec.stop_tokens.clone(),
            reasoning: ReasoningCount::default(),
            has_call: false,
            has_content: false,
            has_reasoning: false,
            blank: String::new(),
        }
    }

    /// What an event means; none for those that a conversation does not ask for.
    pub(super) fn read(&mut self, event: AnswerEvent) -> Option<Step> {
        match event {
            AnswerEvent::Prompt(_) => None,
            AnswerEvent::Piece(piece) => Some(self.step(piece, None)),
            AnswerEvent::Ended { piece, summary } => Some(self.step(piece, Some(summary))),
        }
    }

    fn step(&mut self, piece: Piece, summary: Option<Summary>) -> Step {
        let (mut reasoning, mut other) = (false, false);
        let mut parts = Vec::new();
        for delta in piece.deltas {
            match delta {
                Delta::Reasoning(text) => {
                    reasoning = true;
                    self.has_reasoning = true;
                    parts.push(Part::Reasoning(text));
                }
                Delta::Content(text) => {
                    other = true;
                    self.content(text, &mut parts);
                }
                Delta::ToolCallStarted => other = true,
                Delta::ToolCall(call) => {
                    self.has_call = true;
                    self.blank.clear();
                    parts.push(Part::Call(call));
                }
                // What could not be read as a call follows as content.
                Delta::Warning(error) => tracing::debug!(%error, "a tool call could not be read"),
            }
        }
        if summary.is_some() && !self.has_call && !self.has_reasoning && !self.blank.is_empty() {
            parts.push(Part::Content(std::mem::take(&mut self.blank)));
        }
        self.reasoning.take(reasoning, other);
        let mut tokens = piece.tokens;
        if piece.end == Some(End::Stop) {
            // An end token is no part of the answer; a token that completes a stop string is.
            tokens.retain(|sampled| !self.stop_tokens.contains(&sampled.token));
        }
        let finish = summary.map(|summary| Finish {
            reason: match summary.end {
                _ if self.has_call => Reason::ToolCalls,
                End::Stop => Reason::Stop,
                End::Length => Reason::Length,
            },
            summary,
            reasoning_tokens: self.reasoning.tokens,
            stopped_by: piece.stopped_by,
        });
        Step { parts, tokens, finish }
    }

    /// Models put line breaks behind their reasoning and around calls; they are content only if nothing else is there.
    fn content(&mut self, text: String, parts: &mut Vec<Part>) {
        if self.has_content {
            return parts.push(Part::Content(text));
        }
        self.blank.push_str(&text);
        if !self.blank.trim().is_empty() {
            self.has_content = true;
            let text = std::mem::take(&mut self.blank);
            let text = if self.has_reasoning { text.trim_start().to_owned() } else { text };
            parts.push(Part::Content(text));
        }
    }
}

/// A whole answer.
#[derive(Default)]
pub(super) struct Whole {
    pub(super) content: String,
    pub(super) reasoning: String,
    pub(super) calls: Vec<ToolCall>,
    pub(super) tokens: Vec<Sampled>,
    pub(super) finish: Option<Finish>,
}

/// Collects all answers of a prepared conversation. `parallel`: an answer may have several calls.
pub(super) async fn collect(
    services: &HttpServices,
    prepared: &Prepared,
    samples: usize,
    parallel: bool,
) -> Result<Vec<Whole>, ApiError> {
    let mut answers = Answers::start(&services.front, std::slice::from_ref(prepared), samples).await?;
    let mut readers: Vec<Reader> = (0..samples).map(|_| Reader::new(prepared)).collect();
    let mut wholes: Vec<Whole> = (0..samples).map(|_| Whole::default()).collect();
    while let Some((index, event)) = answers.next().await {
        let Some(step) = readers[index].read(event?) else { continue };
        let whole = &mut wholes[index];
        for part in step.parts {
            match part {
                Part::Content(text) => whole.content.push_str(&text),
                Part::Reasoning(text) => whole.reasoning.push_str(&text),
                Part::Call(call) if parallel || whole.calls.is_empty() => whole.calls.push(call),
                Part::Call(_) => {}
            }
        }
        whole.tokens.extend(step.tokens);
        whole.finish = step.finish.or(whole.finish.take());
    }
    Ok(wholes)
}
