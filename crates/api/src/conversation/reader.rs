//! What the events of an answer mean: content, reasoning, calls, and how it ended.

use super::samples::Answers;
use crate::error::ApiError;
use crate::front::{AnswerEvent, End, Front, Piece, Prepared, Summary};
use mlxnode_compute::Sampled;
use mlxnode_text::{Delta, ToolCall};

/// A part of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    /// More of the content.
    Content(String),
    /// More of the reasoning.
    Reasoning(String),
    /// A whole call.
    Call(ToolCall),
}

/// What a token brought: parts, and the token itself unless it ends the answer.
pub(crate) struct Step {
    pub(crate) parts: Vec<Part>,
    pub(crate) tokens: Vec<Sampled>,
    /// Set in the last one.
    pub(crate) finish: Option<Finish>,
}

/// How an answer ended.
pub(crate) struct Finish {
    pub(crate) reason: Reason,
    pub(crate) summary: Summary,
    pub(crate) reasoning_tokens: usize,
    /// The stop string that did it, if one did.
    pub(crate) stopped_by: Option<String>,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Stop,
    Length,
    ToolCalls,
}

/// Reads one answer's events.
pub(crate) struct Reader {
    stop_tokens: Vec<u32>,
    reasoning: ReasoningCount,
    has_call: bool,
    has_content: bool,
    has_reasoning: bool,
    /// Whitespace at the start: content only if content follows, or nothing else.
    blank: String,
}

impl Reader {
    pub(crate) fn new(prepared: &Prepared) -> Self {
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
    pub(crate) fn read(&mut self, event: AnswerEvent) -> Option<Step> {
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

/// Tells how many tokens of an answer are reasoning, from what became of each token's text. Tokens whose text is held back belong to what
/// comes out next.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ReasoningCount {
    pub(crate) tokens: usize,
    pending: usize,
}

impl ReasoningCount {
    /// Takes one token: did reasoning come out of it, did anything else?
    pub(crate) fn take(&mut self, reasoning: bool, other: bool) {
        self.pending += 1;
        if reasoning {
            self.tokens += self.pending;
        }
        if reasoning || other {
            self.pending = 0;
        }
    }
}

/// A whole answer.
#[derive(Default)]
pub(crate) struct Whole {
    pub(crate) content: String,
    pub(crate) reasoning: String,
    pub(crate) calls: Vec<ToolCall>,
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) finish: Option<Finish>,
}

/// Collects all answers of a prepared conversation. `parallel`: an answer may have several calls.
pub(crate) async fn collect(
    front: &Front,
    prepared: &Prepared,
    samples: usize,
    parallel: bool,
) -> Result<Vec<Whole>, ApiError> {
    let mut answers = Answers::start(front, std::slice::from_ref(prepared), samples).await?;
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
