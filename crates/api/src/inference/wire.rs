//! `Inference` messages to our types and back.

use crate::conversation::{Conversation, Format, MAX_TOOLS, Tools, function};
use crate::error::ApiError;
use crate::front::{End, Input};
use crate::inference::run::{Asked, Ended, Plain, Said, What};
use crate::inference::status;
use mlxnode_compute::{Grammar, Sampled};
use mlxnode_coordinator::requests::Parameters;
use mlxnode_proto::v1;
use mlxnode_text::grammar::ToolChoice;
use mlxnode_text::{Delta, Message, ToolCall};
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

/// Largest prompt text that is looked at, in bytes: two million characters are beyond any model's context.
const MAX_TEXT: usize = 8 << 20;
/// Most messages of a conversation, most calls in one, and most texts of tokens that end an answer.
const MAX_MESSAGES: usize = 10_000;
const MAX_CALLS: usize = 1_000;
const MAX_EXTRA_EOS: usize = 64;
/// Most samples of one prompt.
const MAX_SAMPLES: u32 = 16;
/// Most requests of a batch, most answers to them, and most texts to embed.
pub(super) const MAX_REQUESTS: usize = 128;

/// A request, read.
///
/// # Errors
/// The first field that is wrong whatever the model is.
pub(super) fn asked(request: v1::GenerateRequest, deadline: Option<Instant>) -> Result<Asked, ApiError> {
    use v1::generate_request::Input as Wire;
    let samples = match request.samples {
        0 => 1,
        samples if samples <= MAX_SAMPLES => samples as usize,
        samples => {
            return Err(ApiError::field(
                "samples",
                format!("samples is {samples}, but must be at most {MAX_SAMPLES}"),
            ));
        }
    };
    at_most("extra_eos", request.extra_eos.len(), MAX_EXTRA_EOS)?;
    let format = request.format.map(format).transpose()?.unwrap_or_default();
    let sampling = request.sampling.unwrap_or_default();
    let parameters = Parameters {
        max_tokens: request.max_tokens,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        min_tokens_to_keep: sampling.min_tokens_to_keep,
        top_k: sampling.top_k,
        xtc_probability: sampling.xtc_probability,
        xtc_threshold: sampling.xtc_threshold,
        seed: sampling.seed,
        logit_bias: sampling.logit_bias.into_iter().collect(),
        repetition_penalty: sampling.repetition_penalty,
        repetition_context_size: sampling.repetition_context_size,
        presence_penalty: sampling.presence_penalty,
        presence_context_size: sampling.presence_context_size,
        frequency_penalty: sampling.frequency_penalty,
        frequency_context_size: sampling.frequency_context_size,
        stop: request.stop,
        ignore_eos: request.ignore_eos,
        top_logprobs: request.top_logprobs,
        prompt_logprobs: request.prompt_logprobs,
        adapter: Some(request.adapter).filter(|adapter| !adapter.is_empty()),
        num_draft_tokens: request.num_draft_tokens,
        draft_model: Some(request.draft_model).filter(|draft| !draft.is_empty()),
        ..Parameters::default()
    };
    let input = match request.input {
        Some(Wire::Chat(chat)) => {
            let conversation = Conversation {
                format,
                format_field: "format",
                parameters,
                extra_eos: request.extra_eos,
                deadline,
                ..conversation(chat)?
            };
            return Ok(Asked { model: request.model, what: What::Chat(Box::new(conversation)), samples });
        }
        Some(Wire::Prompt(text)) => Input::Prompt(bounded("prompt", text)?),
        Some(Wire::Tokens(tokens)) => Input::Tokens(tokens.ids),
        None => return Err(ApiError::field("prompt", "one of prompt, chat and tokens is needed")),
    };
    let plain = Plain { input, format, parameters, extra_eos: request.extra_eos, deadline };
    Ok(Asked { model: request.model, what: What::Plain(Box::new(plain)), samples })
}

fn at_most(field: &str, count: usize, most: usize) -> Result<(), ApiError> {
    match count > most {
        true => Err(ApiError::field(
            field,
            format!("{field} has {count} entries, but at most {most} are allowed"),
        )),
        false => Ok(()),
    }
}

fn bounded(field: &str, text: String) -> Result<String, ApiError> {
    match text.len() > MAX_TEXT {
        true => {
            Err(ApiError::field(field, format!("{field} has {} bytes, more than {MAX_TEXT}", text.len())))
        }
        false => Ok(text),
    }
}

fn format(format: v1::ResponseFormat) -> Result<Format, ApiError> {
    use v1::response_format::Kind;
    let kind = format.kind.ok_or_else(|| ApiError::field("format", "format says nothing; leave it out"))?;
    Ok(Format::Grammar(match kind {
        Kind::JsonObject(v1::JsonObject {}) => Grammar::JsonObject,
        Kind::JsonSchema(schema) => Grammar::JsonSchema(schema),
        Kind::Regex(expression) => Grammar::Regex(expression),
        Kind::Lark(grammar) => Grammar::Lark(grammar),
    }))
}

/// A conversation, without the fields of its request.
///
/// # Errors
/// The first field that is wrong.
pub(super) fn conversation(chat: v1::Chat) -> Result<Conversation, ApiError> {
    at_most("messages", chat.messages.len(), MAX_MESSAGES)?;
    let size: usize =
        chat.messages.iter().map(|message| message.content.len() + message.reasoning.len()).sum();
    if size > MAX_TEXT {
        return Err(ApiError::field(
            "messages",
            format!("the messages have {size} bytes, more than {MAX_TEXT}"),
        ));
    }
    let prefill = bounded("prefill_response", chat.prefill_response)?;
    let tools = tools(&chat.tools_json, chat.tool_choice, !chat.no_parallel_tool_calls)?;
    let arguments = match chat.template_arguments_json.as_str() {
        "" => Map::new(),
        text => object("template_arguments_json", text)
            .map_err(|error| ApiError { param: Some("chat_template_kwargs".to_owned()), ..error })?,
    };
    let messages = chat.messages.into_iter().enumerate();
    Ok(Conversation {
        messages: messages.map(|(index, one)| message(one, index)).collect::<Result<_, _>>()?,
        tools,
        thinking: chat.thinking,
        arguments,
        prefill: Some(prefill).filter(|text| !text.is_empty()),
        is_unopened: chat.no_generation_prompt,
        ..Conversation::default()
    })
}

fn message(message: v1::ChatMessage, index: usize) -> Result<Message, ApiError> {
    let mut extra = Map::new();
    let path = format!("messages[{index}]");
    for (name, text) in [
        ("name", message.name),
        ("reasoning_content", message.reasoning),
        ("tool_call_id", message.tool_call_id),
    ] {
        if !text.is_empty() {
            extra.insert(name.to_owned(), text.into());
        }
    }
    at_most(&format!("{path}.tool_calls"), message.tool_calls.len(), MAX_CALLS)?;
    let mut calls = Vec::with_capacity(message.tool_calls.len());
    for (number, call) in message.tool_calls.into_iter().enumerate() {
        let arguments = match call.arguments_json.trim() {
            "" => Map::new(),
            text => object(&format!("{path}.tool_calls[{number}].arguments_json"), text)?,
        };
        let function = json!({"name": call.name, "arguments": arguments});
        calls.push(json!({"id": call.id, "type": "function", "function": function}));
    }
    let is_silent = !calls.is_empty() && message.content.is_empty();
    if !calls.is_empty() {
        extra.insert("tool_calls".to_owned(), calls.into());
    }
    let content = if is_silent { Value::Null } else { message.content.into() };
    Ok(Message { role: message.role, content: Some(content), extra })
}

fn tools(tools_json: &[String], choice: Option<v1::ToolChoice>, parallel: bool) -> Result<Tools, ApiError> {
    use v1::tool_choice::Choice;
    at_most("tools", tools_json.len(), MAX_TOOLS)?;
    let mut offered = Vec::with_capacity(tools_json.len());
    for (index, text) in tools_json.iter().enumerate() {
        let path = format!("tools[{index}]");
        offered.push(function(Value::Object(object(&path, text)?), &path)?);
    }
    let choice = match choice.map(|choice| choice.choice) {
        None => None,
        Some(None) => return Err(ApiError::field("tool_choice", "tool_choice says nothing; leave it out")),
        Some(Some(Choice::Function(name))) => Some(ToolChoice::Named(name)),
        Some(Some(Choice::Mode(mode))) => match v1::ToolMode::try_from(mode) {
            Ok(v1::ToolMode::Unspecified) => None,
            Ok(v1::ToolMode::Auto) => Some(ToolChoice::Auto),
            Ok(v1::ToolMode::None) => Some(ToolChoice::None),
            Ok(v1::ToolMode::Required) => Some(ToolChoice::Required),
            Err(_) => {
                let message = format!("tool_choice.mode is {mode}, which is no ToolMode of this version");
                return Err(ApiError::field("tool_choice.mode", message));
            }
        },
    };
    Tools::new(offered, choice, parallel)
}

fn object(path: &str, text: &str) -> Result<Map<String, Value>, ApiError> {
    serde_json::from_str(text)
        .map_err(|error| ApiError::field(path, format!("{path} is not a JSON object: {error}")))
}

/// The texts to embed.
///
/// # Errors
/// When there are none, too many, or one says nothing.
pub(super) fn inputs(inputs: Vec<v1::EmbedInput>) -> Result<Vec<Input>, ApiError> {
    use v1::embed_input::Input as Wire;
    if inputs.is_empty() {
        return Err(ApiError::field("inputs", "inputs is empty, but must have at least one text"));
    }
    at_most("inputs", inputs.len(), MAX_REQUESTS)?;
    let read = |(index, input): (usize, v1::EmbedInput)| match input.input {
        Some(Wire::Text(text)) => Ok(Input::Prompt(bounded(&format!("inputs[{index}].text"), text)?)),
        Some(Wire::Tokens(tokens)) => Ok(Input::Tokens(tokens.ids)),
        None => Err(ApiError::field(
            format!("inputs[{index}]"),
            format!("inputs[{index}] has neither text nor tokens"),
        )),
    };
    inputs.into_iter().enumerate().map(read).collect()
}

/// A text that is to be tokenized.
///
/// # Errors
/// When it is too long.
pub(super) fn text(text: String) -> Result<String, ApiError> {
    bounded("text", text)
}

pub(super) fn embeddings(vectors: Vec<(Vec<f32>, usize)>) -> v1::EmbedResponse {
    let embedding = |(values, tokens)| v1::Embedding { values, tokens: tokens as u32 };
    v1::EmbedResponse { embeddings: vectors.into_iter().map(embedding).collect() }
}

/// What was said, as a message.
pub(super) fn response(said: Said) -> v1::GenerateResponse {
    let Said { sample, prompt_tokens, piece, scores, end } = said;
    let stopped_by = piece.stopped_by.unwrap_or_default();
    v1::GenerateResponse {
        text: piece.text,
        token_ids: piece.tokens.iter().map(|sampled| sampled.token).collect(),
        logprobs: piece.tokens.iter().filter_map(token_logprobs).collect(),
        finish: end.map(|end| finish(&end, stopped_by)),
        prompt_tokens: prompt_tokens.unwrap_or_default() as u32,
        sample: sample as u32,
        parts: piece.deltas.into_iter().map(part).collect(),
        prompt_scores: scores
            .iter()
            .map(|scored| v1::ScoredToken { token_id: scored.token, logprobs: token_logprobs(scored) })
            .collect(),
    }
}

fn part(delta: Delta) -> v1::AnswerPart {
    use v1::answer_part::Part;
    let part = match delta {
        Delta::Content(text) => Part::Content(text),
        Delta::Reasoning(text) => Part::Reasoning(text),
        Delta::ToolCallStarted => Part::ToolCallStarted(v1::ToolCallStarted {}),
        Delta::ToolCall(call) => Part::ToolCall(tool_call(call)),
        Delta::Warning(problem) => Part::Warning(problem.to_string()),
    };
    v1::AnswerPart { part: Some(part) }
}

fn tool_call(call: ToolCall) -> v1::ToolCall {
    v1::ToolCall {
        id: call.id.unwrap_or_default(),
        name: call.name,
        arguments_json: Value::Object(call.arguments).to_string(),
    }
}

fn token_logprobs(sampled: &Sampled) -> Option<v1::TokenLogprobs> {
    let top = sampled
        .top
        .iter()
        .map(|candidate| v1::TokenLogprob { token_id: candidate.token, logprob: candidate.logprob })
        .collect();
    Some(v1::TokenLogprobs { logprob: sampled.logprob?, top })
}

fn finish(end: &Ended, stopped_by: String) -> v1::Finish {
    let summary = &end.summary;
    v1::Finish {
        reason: match summary.end {
            _ if end.has_calls => v1::FinishReason::ToolCalls,
            End::Stop => v1::FinishReason::Stop,
            End::Length => v1::FinishReason::Length,
        }
        .into(),
        usage: Some(v1::Usage {
            prompt_tokens: summary.prompt_tokens as u32,
            generation_tokens: summary.generation_tokens as u32,
            cached_tokens: summary.cached_tokens as u32,
            reasoning_tokens: end.reasoning_tokens as u32,
        }),
        timing: Some(v1::Timing {
            queue_seconds: summary.queue.as_secs_f64(),
            prompt_seconds: summary.prompt.as_secs_f64(),
            generation_seconds: summary.generation.as_secs_f64(),
            peak_memory_bytes: end.peak_memory.0,
        }),
        seed: summary.seed,
        stopped_by,
    }
}

/// Why one request of several failed.
pub(super) fn failure(error: &ApiError) -> v1::Failure {
    v1::Failure {
        code: status::code(error.kind).into(),
        message: error.message.clone(),
        field: status::field(error).unwrap_or_default(),
        retry_seconds: status::retry_seconds(error),
    }
}

/// Reads the header `grpc-timeout`: up to 8 digits and a unit.
pub(super) fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_timeout_header_and_nothing_else() {
        let cases =
            [("5S", Some(5_000)), ("250m", Some(250)), ("2M", Some(120_000)), ("", None), ("S", None)];
        for (text, millis) in cases {
            assert_eq!(grpc_timeout(text), millis.map(Duration::from_millis), "{text}");
        }
        assert_eq!(grpc_timeout("123456789S"), None);
        assert_eq!(grpc_timeout("5é"), None);
    }

    #[test]
    fn what_is_wrong_whatever_the_model_is_is_said_by_field() {
        let chat = |chat: v1::Chat| v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Chat(chat)),
            ..v1::GenerateRequest::default()
        };
        let tool = |json: &str| v1::Chat { tools_json: vec![json.to_owned()], ..v1::Chat::default() };
        let choice =
            |choice| v1::Chat { tool_choice: Some(v1::ToolChoice { choice }), ..v1::Chat::default() };
        let called = v1::ChatMessage {
            tool_calls: vec![v1::ToolCall { arguments_json: "[".into(), ..v1::ToolCall::default() }],
            ..v1::ChatMessage::default()
        };
        let cases = [
            (chat(tool("{")), "chat.tools_json[0]"),
            (chat(tool("7")), "chat.tools_json[0]"),
            (
                chat(tool(r#"{"type": "function", "function": {"name": "a b"}}"#)),
                "chat.tools_json[0].function.name",
            ),
            (chat(choice(None)), "chat.tool_choice"),
            (chat(choice(Some(v1::tool_choice::Choice::Mode(77)))), "chat.tool_choice.mode"),
            (chat(choice(Some(v1::tool_choice::Choice::Mode(3)))), "chat.tool_choice"),
            (chat(choice(Some(v1::tool_choice::Choice::Function("f".into())))), "chat.tool_choice"),
            (
                chat(v1::Chat { template_arguments_json: "[]".into(), ..v1::Chat::default() }),
                "chat.template_arguments_json",
            ),
            (
                chat(v1::Chat { messages: vec![called], ..v1::Chat::default() }),
                "chat.messages[0].tool_calls[0].arguments_json",
            ),
            (v1::GenerateRequest::default(), "prompt"),
            (v1::GenerateRequest { samples: 17, ..v1::GenerateRequest::default() }, "samples"),
            (
                v1::GenerateRequest {
                    format: Some(v1::ResponseFormat::default()),
                    ..v1::GenerateRequest::default()
                },
                "format",
            ),
        ];
        for (request, expected) in cases {
            let error = asked(request.clone(), None).err().unwrap();
            assert_eq!(status::field(&error).as_deref(), Some(expected), "{request:?}: {error:?}");
        }
    }

    #[test]
    fn a_conversation_with_calls_is_what_templates_know() {
        let call = v1::ToolCall { id: "1".into(), name: "f".into(), arguments_json: r#"{"x": 1}"#.into() };
        let chat = v1::Chat {
            messages: vec![
                v1::ChatMessage {
                    role: "assistant".into(),
                    tool_calls: vec![call],
                    ..v1::ChatMessage::default()
                },
                v1::ChatMessage {
                    role: "tool".into(),
                    content: "7".into(),
                    tool_call_id: "1".into(),
                    ..v1::ChatMessage::default()
                },
            ],
            ..v1::Chat::default()
        };
        let messages = conversation(chat).unwrap().messages;
        assert_eq!(messages[0].content, Some(Value::Null));
        assert_eq!(messages[0].extra["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(
            (messages[1].content.clone(), &messages[1].extra["tool_call_id"]),
            (Some("7".into()), &json!("1"))
        );
    }
}
