//! `/v1/chat/completions`.

use super::logprobs::{ChatLogprobs, TokenLogprob, of_token};
use super::usage::Usage;
use super::{format, messages, sampling};
use crate::conversation::Answers;
use crate::conversation::{Conversation, Finish, Part, Reader, Reason, Step, collect};
use crate::front::Prepared;
use crate::http::body::JsonBody;
use crate::http::events::{self, Events, Gone};
use crate::http::fields::Fields;
use crate::http::tools;
use crate::http::{ApiError, Caller, Dialect, HttpServices, id, unix_time};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mlxnode_text::{Tokenizer, ToolCall};
use serde::Serialize;
use serde_json::{Value, json};

/// What a request says besides the conversation.
struct Wish {
    samples: usize,
    stream: bool,
    include_usage: bool,
    logprobs: bool,
    parallel: bool,
}

/// What every piece of an answer says.
#[derive(Clone, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

/// The handler.
pub(in crate::http) async fn chat_completions(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let mut fields = body.fields;
    let name = fields.string("model")?.unwrap_or_default();
    let model = services.model(&caller, &name).await?;
    let (conversation, wish) = read(fields, &model.text.sampling)?;
    let prepared = services.prepare(&caller, &model, conversation).await?;
    let head = Head {
        id: id("chatcmpl-"),
        object: if wish.stream { "chat.completion.chunk" } else { "chat.completion" },
        created: unix_time(),
        model: prepared.deployment.name.clone(),
        system_fingerprint: fingerprint(&prepared),
    };
    if !wish.stream {
        return Ok(Json(whole(&services, &prepared, head, &wish).await?).into_response());
    }
    let answers = Answers::start(&services.front, std::slice::from_ref(&prepared), wish.samples).await?;
    Ok(events::stream(
        move |events| async move { Chunks { events, prepared, head, wish }.send(answers).await },
    ))
}

/// What would have to be the same for the same answer: our version and the deployment's attempt.
pub(super) fn fingerprint(prepared: &Prepared) -> String {
    format!("mlxnode-{}-{}", env!("CARGO_PKG_VERSION"), prepared.deployment.epoch)
}

fn read(
    mut fields: Fields,
    defaults: &crate::front::SamplingDefaults,
) -> Result<(Conversation, Wish), ApiError> {
    let messages = messages::messages(&mut fields)?;
    let tools = tools::read(&mut fields)?;
    let (format, format_field) = format::format(&mut fields)?;
    let mut parameters = sampling::parameters(&mut fields, defaults)?;
    let longest = [
        fields.integer("max_completion_tokens", 1..=i64::from(u32::MAX))?,
        fields.integer("max_tokens", 1..=i64::from(u32::MAX))?,
    ];
    // To the end of the context, as OpenAI has it.
    let longest = longest.into_iter().flatten().next().unwrap_or(i64::from(u32::MAX));
    parameters.max_tokens = u32::try_from(longest).unwrap_or(u32::MAX);
    let logprobs = fields.boolean("logprobs")?.unwrap_or_default();
    // mlx_lm.server's -1 is "none".
    let top = fields.integer("top_logprobs", -1..=20)?.filter(|top| *top >= 0);
    if top.is_some_and(|top| top > 0) && !logprobs {
        return Err(ApiError::field("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    parameters.top_logprobs =
        logprobs.then(|| top.and_then(|top| u32::try_from(top).ok()).unwrap_or_default());
    let mut arguments = fields.map("chat_template_kwargs")?.unwrap_or_default();
    let mut thinking = None;
    let efforts = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
    match fields.one_of("reasoning_effort", &efforts)? {
        Some("none") => thinking = Some(false),
        // Templates that know the word take it; to others it means nothing.
        Some(effort) => {
            arguments.entry("reasoning_effort").or_insert_with(|| effort.into());
        }
        None => {}
    }
    let wish = Wish {
        samples: sampling::samples(&mut fields)?,
        stream: fields.boolean("stream")?.unwrap_or_default(),
        include_usage: include_usage(&mut fields)?,
        logprobs,
        parallel: tools.parallel,
    };
    sampling::without_effect(&mut fields)?;
    fields
        .refuse("role_mapping", "it is for models without a chat template; use /v1/completions for those")?;
    fields.only("modalities", &[json!(["text"])], "answers are text")?;
    fields.refuse("audio", "answers are text")?;
    fields.refuse("prediction", "predicted outputs are not served")?;
    fields.refuse("web_search_options", "there is no web search")?;
    fields.refuse("verbosity", "say it in the system message")?;
    fields.finish()?;
    let conversation = Conversation {
        messages,
        tools,
        format,
        format_field,
        parameters,
        thinking,
        arguments,
        ..Conversation::default()
    };
    Ok((conversation, wish))
}

/// `stream_options.include_usage`.
pub(super) fn include_usage(fields: &mut Fields) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    let include = options.boolean("include_usage")?.unwrap_or_default();
    options.only("include_obfuscation", &[false.into()], "pieces are as long as they are")?;
    options.finish()?;
    Ok(include)
}

pub(super) fn finish_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Stop => "stop",
        Reason::Length => "length",
        Reason::ToolCalls => "tool_calls",
    }
}

/// A call as OpenAI writes it, with the model's own name for it if that is one.
pub(super) fn call(call: &ToolCall) -> Value {
    let name = call.id.clone().unwrap_or_else(|| id("call_"));
    let arguments = Value::Object(call.arguments.clone()).to_string();
    json!({"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}})
}

async fn whole(
    services: &HttpServices,
    prepared: &Prepared,
    head: Head,
    wish: &Wish,
) -> Result<Value, ApiError> {
    let wholes = collect(&services.front, prepared, wish.samples, wish.parallel).await?;
    let mut usage = Usage::default();
    usage.add_prompt(prepared.valid.prompt.len());
    let mut choices = Vec::with_capacity(wholes.len());
    for (index, answer) in wholes.into_iter().enumerate() {
        let mut message = json!({"role": "assistant", "content": answer.content, "refusal": null});
        if !answer.reasoning.is_empty() {
            message["reasoning_content"] = answer.reasoning.clone().into();
            message["reasoning"] = answer.reasoning.into();
        }
        if !answer.calls.is_empty() {
            message["tool_calls"] = answer.calls.iter().map(call).collect();
            if answer.content.is_empty() {
                message["content"] = Value::Null;
            }
        }
        let logprobs =
            wish.logprobs.then(|| ChatLogprobs::new(scores(&prepared.text.tokenizer, &answer.tokens)));
        let reason = answer.finish.as_ref().map(|finish| finish_reason(finish.reason));
        if let Some(finish) = &answer.finish {
            usage.add_sample(&finish.summary, finish.reasoning_tokens, index == 0);
        }
        choices
            .push(json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}));
    }
    let mut body = serde_json::to_value(head)?;
    body["choices"] = choices.into();
    body["usage"] = serde_json::to_value(usage)?;
    Ok(body)
}

fn scores(tokenizer: &Tokenizer, tokens: &[mlxnode_compute::Sampled]) -> Vec<TokenLogprob> {
    tokens.iter().filter_map(|sampled| of_token(tokenizer, sampled)).collect()
}

/// A stream of chunks.
struct Chunks {
    events: Events,
    prepared: Prepared,
    head: Head,
    wish: Wish,
}

/// One chunk. `usage` is there in every chunk, and `null`, when the last one has it.
#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<Value>>,
}

impl Chunks {
    async fn send(self, mut answers: Answers) -> Result<(), Gone> {
        for index in 0..self.wish.samples {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            self.chunk(index, delta, None, None).await?;
        }
        let mut readers: Vec<Reader> = (0..self.wish.samples).map(|_| Reader::new(&self.prepared)).collect();
        let mut calls = vec![0; self.wish.samples];
        let mut usage = Usage::default();
        usage.add_prompt(self.prepared.valid.prompt.len());
        while let Some((index, event)) = answers.next().await {
            let step = match event {
                Ok(event) => readers[index].read(event),
                Err(error) => return self.events.data(&error.body(Dialect::OpenAi)).await,
            };
            let Some(step) = step else { continue };
            if let Some(Finish { summary, reasoning_tokens, .. }) = &step.finish {
                usage.add_sample(summary, *reasoning_tokens, index == 0);
            }
            self.step(index, step, &mut calls[index]).await?;
        }
        if self.wish.include_usage {
            let chunk = Chunk { head: &self.head, choices: Vec::new(), usage: Some(Some(usage)) };
            self.events.data(&chunk).await?;
        }
        self.events.done().await
    }

    async fn step(&self, index: usize, step: Step, calls: &mut usize) -> Result<(), Gone> {
        let mut delta = Delta::default();
        for part in step.parts {
            match part {
                Part::Content(text) => delta.content.get_or_insert_default().push_str(&text),
                Part::Reasoning(text) => delta.reasoning_content.get_or_insert_default().push_str(&text),
                Part::Call(_) if !self.wish.parallel && *calls > 0 => {}
                Part::Call(tool_call) => {
                    let mut written = call(&tool_call);
                    written["index"] = (*calls).into();
                    *calls += 1;
                    delta.tool_calls.get_or_insert_default().push(written);
                }
            }
        }
        delta.reasoning.clone_from(&delta.reasoning_content);
        let scores =
            if self.wish.logprobs { scores(&self.prepared.text.tokenizer, &step.tokens) } else { Vec::new() };
        let is_empty = delta.content.is_none() && delta.reasoning.is_none() && delta.tool_calls.is_none();
        if !is_empty || !scores.is_empty() {
            let logprobs = (!scores.is_empty()).then(|| ChatLogprobs::new(scores));
            self.chunk(index, delta, logprobs, None).await?;
        }
        match step.finish {
            Some(finish) => {
                self.chunk(index, Delta::default(), None, Some(finish_reason(finish.reason))).await
            }
            None => Ok(()),
        }
    }

    async fn chunk(
        &self,
        index: usize,
        delta: Delta,
        logprobs: Option<ChatLogprobs>,
        finish_reason: Option<&'static str>,
    ) -> Result<(), Gone> {
        let choices = vec![ChunkChoice { index, delta, logprobs, finish_reason }];
        let usage = self.wish.include_usage.then_some(None);
        self.events.data(&Chunk { head: &self.head, choices, usage }).await
    }
}
