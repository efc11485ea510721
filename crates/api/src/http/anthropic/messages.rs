//! `/v1/messages` and `/v1/messages/count_tokens`.

use super::request::{self, Wish};
use super::stream::Blocks;
use crate::conversation::Answers;
use crate::conversation::{Finish, Reason, collect};
use crate::front::Prepared;
use crate::http::body::JsonBody;
use crate::http::{ApiError, Caller, HttpServices, events, id};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mlxnode_text::ToolCall;
use serde_json::{Value, json};

/// The handler.
pub(in crate::http) async fn messages(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (prepared, wish) = prepare(&services, &caller, body, false).await?;
    if !wish.stream {
        return Ok(Json(whole(&services, &prepared, &wish).await?).into_response());
    }
    let answers = Answers::start(&services.front, std::slice::from_ref(&prepared), 1).await?;
    Ok(events::stream(move |events| Blocks::new(events, prepared, wish).send(answers)))
}

/// The handler of `count_tokens`.
pub(in crate::http) async fn count_tokens(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (prepared, _) = prepare(&services, &caller, body, true).await?;
    Ok(Json(json!({"input_tokens": prepared.valid.prompt.len()})))
}

async fn prepare(
    services: &HttpServices,
    caller: &Caller,
    body: JsonBody,
    counts: bool,
) -> Result<(Prepared, Wish), ApiError> {
    let mut fields = body.fields;
    let name = fields.needed_string("model")?;
    let model = services.model(caller, &name).await?;
    let (conversation, wish) = request::read(fields, &model.text.sampling, counts)?;
    Ok((services.prepare(caller, &model, conversation).await?, wish))
}

async fn whole(services: &HttpServices, prepared: &Prepared, wish: &Wish) -> Result<Value, ApiError> {
    let mut wholes = collect(&services.front, prepared, 1, wish.parallel).await?;
    let answer = wholes.pop().unwrap_or_default();
    let mut content = Vec::new();
    if !answer.reasoning.is_empty() && wish.shows_thinking {
        content.push(json!({"type": "thinking", "thinking": answer.reasoning, "signature": ""}));
    }
    if !answer.content.is_empty() {
        content.push(json!({"type": "text", "text": answer.content}));
    }
    content.extend(answer.calls.iter().map(|call| tool_use(call, Value::Object(call.arguments.clone()))));
    let mut message = head(prepared);
    message["content"] = content.into();
    if let Some(finish) = &answer.finish {
        message["stop_reason"] = stop_reason(finish).into();
        message["stop_sequence"] = finish.stopped_by.clone().into();
        message["usage"] = usage(prepared, finish);
    }
    Ok(message)
}

/// A message without content.
pub(super) fn head(prepared: &Prepared) -> Value {
    json!({
        "id": id("msg_"), "type": "message", "role": "assistant", "model": prepared.deployment.name, "content": [],
        "stop_reason": null, "stop_sequence": null,
        "usage": {"input_tokens": prepared.valid.prompt.len(), "output_tokens": 0}
    })
}

/// A call as a block with this input.
pub(super) fn tool_use(call: &ToolCall, input: Value) -> Value {
    let name = call.id.clone().unwrap_or_else(|| id("toolu_"));
    json!({"type": "tool_use", "id": name, "name": call.name, "input": input})
}

pub(super) fn stop_reason(finish: &Finish) -> &'static str {
    match (finish.reason, &finish.stopped_by) {
        (Reason::ToolCalls, _) => "tool_use",
        (Reason::Length, _) => "max_tokens",
        (Reason::Stop, Some(_)) => "stop_sequence",
        (Reason::Stop, None) => "end_turn",
    }
}

/// Tokens as Anthropic counts them: what was in the cache is not input.
pub(super) fn usage(prepared: &Prepared, finish: &Finish) -> Value {
    let cached = finish.summary.cached_tokens;
    json!({
        "input_tokens": prepared.valid.prompt.len().saturating_sub(cached), "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0, "output_tokens": finish.summary.generation_tokens
    })
}
