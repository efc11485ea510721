//! `Inference` messages to the front's types and back.

use crate::front::{End, FrontError, GenerationRequest, Input, Piece, Summary};
use mlxnode_compute::{ByteCount, Sampled, TraceContext};
use mlxnode_coordinator::requests::Parameters;
use mlxnode_coordinator::scheduler::RunError;
use mlxnode_proto::v1;
use mlxnode_text::{ChatRequest, Message, TextError};
use serde_json::{Map, Value};
use std::time::{Duration, Instant};
use tonic::Status;

/// Largest prompt text that is looked at, in bytes: two million characters are beyond any model's context.
const MAX_TEXT: usize = 8 << 20;

pub(super) fn generation_request(
    request: v1::GenerateRequest,
    deadline: Option<Instant>,
    trace: Option<TraceContext>,
) -> Result<GenerationRequest, Status> {
    use v1::generate_request::Input as Wire;
    let input = match request.input {
        Some(Wire::Prompt(text)) if text.len() > MAX_TEXT => {
            return Err(Status::invalid_argument(format!(
                "prompt has {} bytes, more than {MAX_TEXT}",
                text.len()
            )));
        }
        Some(Wire::Prompt(text)) => Input::Prompt(text),
        Some(Wire::Chat(chat)) => Input::Chat(chat_request(chat)?),
        Some(Wire::Tokens(tokens)) => Input::Tokens(tokens.ids),
        None => return Err(Status::invalid_argument("one of prompt, chat and tokens is needed")),
    };
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
        extra_stop_tokens: Vec::new(),
        ignore_eos: request.ignore_eos,
        top_logprobs: request.top_logprobs,
        ..Parameters::default()
    };
    Ok(GenerationRequest {
        model: request.model,
        input,
        parameters,
        extra_eos: request.extra_eos,
        deadline,
        tenant: String::new(),
        trace,
        is_read: false,
    })
}

pub(super) fn chat_request(chat: v1::Chat) -> Result<ChatRequest, Status> {
    let size: usize = chat.messages.iter().map(|message| message.content.len()).sum();
    if size > MAX_TEXT {
        return Err(Status::invalid_argument(format!(
            "the messages have {size} bytes, more than {MAX_TEXT}"
        )));
    }
    let tools = chat
        .tools_json
        .iter()
        .map(|tool| json::<Value>("tools_json", tool))
        .collect::<Result<Vec<_>, _>>()?;
    let arguments = match chat.template_arguments_json.as_str() {
        "" => Map::new(),
        text => json("template_arguments_json", text)?,
    };
    let prefill = Some(chat.prefill_response).filter(|text| !text.is_empty());
    Ok(ChatRequest {
        messages: chat
            .messages
            .into_iter()
            .map(|message| Message::new(message.role, message.content))
            .collect(),
        tools: Some(tools).filter(|tools| !tools.is_empty()),
        documents: None,
        add_generation_prompt: !chat.no_generation_prompt && prefill.is_none(),
        continue_final: prefill,
        thinking: None,
        arguments,
    })
}

fn json<T: serde::de::DeserializeOwned>(field: &str, text: &str) -> Result<T, Status> {
    serde_json::from_str(text)
        .map_err(|error| Status::invalid_argument(format!("{field} is not valid: {error}")))
}

pub(super) fn response(piece: Piece, prompt_tokens: u32) -> v1::GenerateResponse {
    v1::GenerateResponse {
        text: piece.text,
        token_ids: piece.tokens.iter().map(|sampled| sampled.token).collect(),
        logprobs: piece.tokens.iter().filter_map(token_logprobs).collect(),
        finish: None,
        prompt_tokens,
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

pub(super) fn finish(summary: Summary, peak_memory: ByteCount) -> v1::Finish {
    v1::Finish {
        reason: match summary.end {
            End::Stop => v1::FinishReason::Stop,
            End::Length => v1::FinishReason::Length,
        }
        .into(),
        usage: Some(v1::Usage {
            prompt_tokens: summary.prompt_tokens as u32,
            generation_tokens: summary.generation_tokens as u32,
        }),
        timing: Some(v1::Timing {
            queue_seconds: summary.queue.as_secs_f64(),
            prompt_seconds: summary.prompt.as_secs_f64(),
            generation_seconds: summary.generation.as_secs_f64(),
            peak_memory_bytes: peak_memory.0,
        }),
        seed: summary.seed,
    }
}

/// The status that tells a client what went wrong.
pub(crate) fn status(error: FrontError) -> Status {
    let text = error.to_string();
    match error {
        FrontError::UnknownModel { .. } | FrontError::UnknownAdapter { .. } => Status::not_found(text),
        FrontError::BrokenAdapter { .. } => Status::unavailable(text),
        FrontError::Text(TextError::SandboxBusy) => Status::resource_exhausted(text),
        FrontError::Text(TextError::Sandbox { .. }) => Status::unavailable(text),
        FrontError::AmbiguousModel(_) | FrontError::Request(_) | FrontError::Text(_) => {
            Status::invalid_argument(text)
        }
        FrontError::NotReady { .. } => Status::unavailable(text),
        FrontError::Busy { .. } => Status::resource_exhausted(text),
        FrontError::Run(error) => run_status(error),
    }
}

fn run_status(error: RunError) -> Status {
    let text = error.to_string();
    match error {
        RunError::QueueFull { .. } => Status::resource_exhausted(text),
        RunError::TooLong { .. } | RunError::Invalid(_) => Status::invalid_argument(text),
        RunError::DeadlineExceeded => Status::deadline_exceeded(text),
        RunError::Cancelled => Status::cancelled(text),
        RunError::Unavailable(_) => Status::unavailable(text),
        RunError::Failed(_) => Status::internal(text),
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
    fn a_chat_with_broken_json_is_refused_by_field() {
        let chat = v1::Chat { tools_json: vec!["{".into()], ..v1::Chat::default() };
        let status = chat_request(chat).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains("tools_json"));
    }
}
