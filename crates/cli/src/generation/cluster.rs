//! A model on the cluster, asked through the local node.

use super::{Finish, Input, Model, Outcome, Piece, Request};
use crate::connection::Connection;
use crate::interrupts::AnswerGuard;
use anyhow::{Context as _, Result};
use mlxnode_compute::{Candidate, Grammar, Penalty, Sampled, Sampling};
use mlxnode_proto::v1;
use mlxnode_text::grammar::ToolChoice;
use mlxnode_text::{ChatRequest, Delta, Message, ToolCall, ToolError};
use serde_json::Value;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// A deployment behind a connection.
pub struct ClusterModel {
    runtime: Runtime,
    connection: Connection,
    /// The deployment's name; empty for the only one.
    model: String,
    /// Most tokens that are guessed ahead at once; None: as many as the deployment does.
    guesses: Option<u32>,
}

impl ClusterModel {
    /// A deployment of the cluster. `runtime` is the one that the connection was made on.
    pub fn new(runtime: Runtime, connection: Connection, model: String, guesses: Option<u32>) -> Self {
        Self { runtime, connection, model, guesses }
    }
}

impl Model for ClusterModel {
    fn generate(
        &mut self,
        request: &Request,
        guard: &AnswerGuard,
        on_piece: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<Outcome> {
        let message =
            v1::GenerateRequest { num_draft_tokens: self.guesses, ..generate_request(&self.model, request)? };
        let mut client = self.connection.inference();
        self.runtime.block_on(async {
            let started = Instant::now();
            let mut answer = client.generate(message).await?.into_inner();
            let mut first = None;
            let (mut prompt_tokens, mut generation_tokens) = (0, 0);
            loop {
                let response = tokio::select! {
                    response = answer.message() => response?,
                    () = guard.wait() => {
                        // Dropping the stream stops the work. Times are then as they look from here, memory is not known.
                        let now = Instant::now();
                        let first = first.unwrap_or(now);
                        return Ok(Outcome {
                            finish: Finish::Cancelled,
                            prompt_tokens,
                            cached_tokens: 0,
                            generation_tokens,
                            guessed: None,
                            prompt_time: first - started,
                            generation_time: now - first,
                            peak_memory_bytes: 0,
                        });
                    }
                };
                let response = response.context("the node ended the answer without saying why")?;
                prompt_tokens = prompt_tokens.max(response.prompt_tokens as usize);
                generation_tokens += response.token_ids.len();
                if generation_tokens > 0 {
                    first.get_or_insert_with(Instant::now);
                }
                let finish = response.finish;
                let deltas = response.parts.into_iter().filter_map(delta).collect::<Result<_>>()?;
                on_piece(Piece { deltas, ..piece(response.text, response.token_ids, response.logprobs) })?;
                if let Some(finish) = finish {
                    return Ok(outcome(&finish));
                }
            }
        })
    }
}

fn piece(text: String, tokens: Vec<u32>, logprobs: Vec<v1::TokenLogprobs>) -> Piece {
    let mut logprobs = logprobs.into_iter();
    let sampled = |token| {
        let known = logprobs.next();
        let logprob = known.as_ref().map(|known| known.logprob);
        let top = known.map(|known| known.top).unwrap_or_default();
        let top =
            top.into_iter().map(|one| Candidate { token: one.token_id, logprob: one.logprob }).collect();
        Sampled { token, logprob, top }
    };
    Piece { text, tokens: tokens.into_iter().map(sampled).collect(), deltas: Vec::new() }
}

/// What a part of an answer means; none for what this version does not know.
fn delta(part: v1::AnswerPart) -> Option<Result<Delta>> {
    use v1::answer_part::Part;
    Some(Ok(match part.part? {
        Part::Content(text) => Delta::Content(text),
        Part::Reasoning(text) => Delta::Reasoning(text),
        Part::ToolCallStarted(v1::ToolCallStarted {}) => Delta::ToolCallStarted,
        Part::ToolCall(call) => match tool_call(call) {
            Ok(call) => Delta::ToolCall(call),
            Err(error) => return Some(Err(error)),
        },
        Part::Warning(problem) => Delta::Warning(ToolError::Told(problem)),
    }))
}

fn tool_call(call: v1::ToolCall) -> Result<ToolCall> {
    let arguments = serde_json::from_str(&call.arguments_json).with_context(|| {
        format!("the node sent a call of {} with arguments that are no object", call.name)
    })?;
    Ok(ToolCall { id: Some(call.id).filter(|id| !id.is_empty()), name: call.name, arguments })
}

fn outcome(finish: &v1::Finish) -> Outcome {
    let usage = finish.usage.unwrap_or_default();
    let timing = finish.timing.unwrap_or_default();
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    Outcome {
        finish: match finish.reason() {
            v1::FinishReason::Stop | v1::FinishReason::ToolCalls => Finish::Stop,
            v1::FinishReason::Length => Finish::Length,
            v1::FinishReason::Cancelled | v1::FinishReason::Unspecified => Finish::Cancelled,
        },
        prompt_tokens: usage.prompt_tokens as usize,
        cached_tokens: usage.cached_tokens as usize,
        generation_tokens: usage.generation_tokens as usize,
        guessed: None,
        prompt_time: seconds(timing.prompt_seconds),
        generation_time: seconds(timing.generation_seconds),
        peak_memory_bytes: timing.peak_memory_bytes,
    }
}

fn generate_request(model: &str, request: &Request) -> Result<v1::GenerateRequest> {
    let input = match &request.input {
        Input::Text(text) => v1::generate_request::Input::Prompt(text.clone()),
        Input::Chat(chat) => v1::generate_request::Input::Chat(v1::Chat {
            tool_choice: tool_choice(&request.shape.choice),
            ..chat_message(chat)?
        }),
    };
    Ok(v1::GenerateRequest {
        model: model.to_owned(),
        input: Some(input),
        max_tokens: request.max_tokens.map_or(u32::MAX, |tokens| u32::try_from(tokens).unwrap_or(u32::MAX)),
        top_logprobs: request.sampling.logprobs.map(|logprobs| logprobs.top as u32),
        sampling: Some(sampling(&request.sampling)),
        stop: request.stop.clone(),
        extra_eos: request.extra_eos.clone(),
        adapter: request.shape.adapter.clone().unwrap_or_default(),
        format: request.shape.format.as_ref().map(format),
        ..v1::GenerateRequest::default()
    })
}

fn format(grammar: &Grammar) -> v1::ResponseFormat {
    use v1::response_format::Kind;
    let kind = match grammar.clone() {
        Grammar::JsonObject => Kind::JsonObject(v1::JsonObject {}),
        Grammar::JsonSchema(schema) => Kind::JsonSchema(schema),
        Grammar::Regex(pattern) => Kind::Regex(pattern),
        Grammar::Lark(grammar) => Kind::Lark(grammar),
    };
    v1::ResponseFormat { kind: Some(kind) }
}

/// None leaves it to the node: it may where there are functions.
fn tool_choice(choice: &ToolChoice) -> Option<v1::ToolChoice> {
    use v1::tool_choice::Choice;
    let choice = match choice {
        ToolChoice::Auto => return None,
        ToolChoice::None => Choice::Mode(v1::ToolMode::None.into()),
        ToolChoice::Required => Choice::Mode(v1::ToolMode::Required.into()),
        ToolChoice::Named(name) => Choice::Function(name.clone()),
    };
    Some(v1::ToolChoice { choice: Some(choice) })
}

fn chat_message(chat: &ChatRequest) -> Result<v1::Chat> {
    let template_arguments_json = match chat.arguments.is_empty() {
        true => String::new(),
        false => serde_json::to_string(&chat.arguments).context("cannot write the template's arguments")?,
    };
    Ok(v1::Chat {
        messages: chat.messages.iter().map(message).collect(),
        tools_json: chat.tools.iter().flatten().map(Value::to_string).collect(),
        prefill_response: chat.continue_final.clone().unwrap_or_default(),
        template_arguments_json,
        no_generation_prompt: !chat.add_generation_prompt,
        thinking: chat.thinking,
        ..v1::Chat::default()
    })
}

fn message(message: &Message) -> v1::ChatMessage {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    v1::ChatMessage {
        role: message.role.clone(),
        content: text(message.content.as_ref()),
        reasoning: text(message.extra.get("reasoning_content")),
        ..v1::ChatMessage::default()
    }
}

fn sampling(sampling: &Sampling) -> v1::SamplingParameters {
    let penalty = |penalty: Option<Penalty>| match penalty {
        None => (0.0, 0),
        // No limit is 0 here, but 0 is the default there.
        Some(Penalty { strength, context: 0 }) => (strength, u32::MAX),
        Some(Penalty { strength, context }) => (strength, u32::try_from(context).unwrap_or(u32::MAX)),
    };
    let (repetition_penalty, repetition_context_size) = penalty(sampling.repetition);
    let (presence_penalty, presence_context_size) = penalty(sampling.presence);
    let (frequency_penalty, frequency_context_size) = penalty(sampling.frequency);
    v1::SamplingParameters {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        min_tokens_to_keep: sampling.min_tokens_to_keep as u32,
        top_k: sampling.top_k as u32,
        xtc_probability: sampling.xtc.as_ref().map_or(0.0, |xtc| xtc.probability),
        xtc_threshold: sampling.xtc.as_ref().map_or(0.0, |xtc| xtc.threshold),
        seed: Some(sampling.seed),
        logit_bias: sampling.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
        repetition_penalty,
        repetition_context_size,
        presence_penalty,
        presence_context_size,
        frequency_penalty,
        frequency_context_size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::Shape;
    use mlxnode_compute::{LogprobRequest, Xtc};
    use mlxnode_text::Message;

    fn request(input: Input, sampling: Sampling, max_tokens: Option<usize>) -> Request {
        Request {
            input,
            sampling,
            max_tokens,
            stop: vec!["x".into()],
            extra_eos: vec!["</s>".into()],
            shape: Shape::default(),
        }
    }

    #[test]
    fn no_limit_is_said_so_that_it_is_not_taken_for_the_default() {
        let sampling = Sampling {
            repetition: Some(Penalty { strength: 1.1, context: 0 }),
            presence: Some(Penalty { strength: 0.5, context: 7 }),
            xtc: Some(Xtc { probability: 0.5, threshold: 0.1, special_tokens: Vec::new() }),
            logprobs: Some(LogprobRequest { top: 3 }),
            seed: 9,
            ..Sampling::default()
        };
        let message = generate_request("m", &request(Input::Text("p".into()), sampling, None)).unwrap();
        let sampling = message.sampling.unwrap();
        assert_eq!((message.max_tokens, message.top_logprobs, sampling.seed), (u32::MAX, Some(3), Some(9)));
        assert_eq!((sampling.repetition_penalty, sampling.repetition_context_size), (1.1, u32::MAX));
        assert_eq!((sampling.presence_penalty, sampling.presence_context_size), (0.5, 7));
        assert_eq!((sampling.frequency_penalty, sampling.xtc_probability), (0.0, 0.5));
        assert_eq!((message.stop, message.extra_eos), (vec!["x".to_owned()], vec!["</s>".to_owned()]));
    }

    #[test]
    fn a_conversation_travels_whole() {
        let chat = ChatRequest {
            messages: vec![Message::new("system", "s"), Message::new("user", "u")],
            continue_final: Some("Yes".into()),
            arguments: [("enable_thinking".to_owned(), false.into())].into_iter().collect(),
            ..ChatRequest::default()
        };
        let input = Input::Chat(Box::new(chat));
        let message = generate_request("", &request(input, Sampling::default(), Some(5))).unwrap();
        let Some(v1::generate_request::Input::Chat(chat)) = message.input else { panic!("not a chat") };
        assert_eq!((chat.messages.len(), chat.messages[1].content.as_str()), (2, "u"));
        assert_eq!((chat.prefill_response.as_str(), chat.no_generation_prompt), ("Yes", true));
        assert_eq!(chat.template_arguments_json, r#"{"enable_thinking":false}"#);
        assert_eq!(message.max_tokens, 5);
    }

    #[test]
    fn an_outcome_is_read_from_the_last_message() {
        let finish = v1::Finish {
            reason: v1::FinishReason::Length.into(),
            usage: Some(v1::Usage {
                prompt_tokens: 10,
                generation_tokens: 4,
                cached_tokens: 2,
                reasoning_tokens: 1,
            }),
            timing: Some(v1::Timing {
                prompt_seconds: 0.5,
                generation_seconds: -1.0,
                ..v1::Timing::default()
            }),
            seed: 1,
            ..v1::Finish::default()
        };
        let outcome = outcome(&finish);
        assert_eq!(
            (outcome.finish, outcome.prompt_tps(), outcome.generation_tps()),
            (Finish::Length, 16.0, 0.0)
        );
    }
}
