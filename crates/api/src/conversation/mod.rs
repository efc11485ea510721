//! A request for an answer, whatever dialect it came in, and the answer's parts as they come: what HTTP and gRPC have in common.
//!
//! ```text
//! JSON or messages ─▶ Conversation ─▶ prepare ─▶ Answers (the samples, running) ─▶ Reader (content, reasoning, calls)
//! ```
//!
//! | module | one line |
//! |---|---|
//! | `model` | the model that a request means |
//! | `tools` | the functions that a request offers |
//! | `samples` | the samples of a request, running at the same time |
//! | `reader` | what their events mean |
//! | `embeddings` | the vectors of several texts |

mod embeddings;
mod model;
mod reader;
mod samples;
mod tools;

pub(crate) use embeddings::embed;
pub(crate) use model::{Model, check_grammar, find_model};
pub(crate) use reader::{Finish, Part, Reader, Reason, ReasoningCount, Step, collect};
pub(crate) use samples::Answers;
pub(crate) use tools::{MAX_TOOLS, Tools, function, named_function};

use crate::caller::Caller;
use crate::error::ApiError;
use crate::front::{Front, GenerationRequest, Input, Prepared};
use mlxnode_compute::Grammar;
use mlxnode_coordinator::requests::Parameters;
use mlxnode_text::grammar::{AnswerWish, answer_grammar};
use mlxnode_text::{ChatRequest, Message};
use serde_json::{Map, Value};
use std::time::Instant;

/// The format that a request wishes for its answer's content.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Format {
    /// As the model likes.
    #[default]
    Text,
    /// This language.
    Grammar(Grammar),
}

impl Format {
    fn grammar(&self) -> Option<&Grammar> {
        match self {
            Self::Text => None,
            Self::Grammar(grammar) => Some(grammar),
        }
    }
}

/// What a client wants answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Tools,
    pub(crate) format: Format,
    /// The field that asked for the format.
    pub(crate) format_field: &'static str,
    pub(crate) parameters: Parameters,
    /// Is the model to think first? None: as its template has it.
    pub(crate) thinking: Option<bool>,
    /// Further variables of the template.
    pub(crate) arguments: Map<String, Value>,
    /// The beginning of the answer, which the model goes on from.
    pub(crate) prefill: Option<String>,
    /// The answer is not opened: the model goes on from the last message as it stands.
    pub(crate) is_unopened: bool,
    /// Tokens, as text or number, that end the answer besides the model's own.
    pub(crate) extra_eos: Vec<String>,
    /// When the client stops waiting.
    pub(crate) deadline: Option<Instant>,
}

/// Everything before the first step.
///
/// # Errors
/// Whatever is wrong with the conversation, for this model.
pub(crate) async fn prepare(
    front: &Front,
    caller: &Caller,
    model: &Model,
    conversation: Conversation,
) -> Result<Prepared, ApiError> {
    let Conversation { messages, tools, format, format_field, mut parameters, thinking, arguments, .. } =
        conversation;
    if parameters.adapter.is_none() {
        parameters.adapter.clone_from(&model.adapter);
    }
    let chat = ChatRequest {
        messages,
        tools: tools.for_template(&model.text)?,
        add_generation_prompt: !conversation.is_unopened && conversation.prefill.is_none(),
        continue_final: conversation.prefill,
        thinking,
        arguments,
        ..ChatRequest::default()
    };
    let request = GenerationRequest {
        model: model.deployment.name.clone(),
        input: Input::Chat(chat),
        parameters,
        extra_eos: conversation.extra_eos,
        deadline: conversation.deadline,
        tenant: caller.tenant.clone(),
        trace: caller.trace,
        is_read: true,
    };
    let mut prepared = front.prepare(request).await?;
    let wish = AnswerWish {
        format: format.grammar(),
        tools: &tools.offered,
        choice: &tools.choice,
        parallel: tools.parallel,
    };
    let (text, prompt) = (&model.text, &prepared.valid.prompt);
    let grammar = answer_grammar(&text.tokenizer, &text.answers, &wish, prompt)
        .map_err(|error| ApiError::grammar(error, format_field))?;
    let field = if format == Format::Text { "tools" } else { format_field };
    check_grammar(model, grammar.as_ref(), field).await?;
    prepared.valid.spec.grammar = grammar;
    Ok(prepared)
}
