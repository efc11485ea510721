//! `/v1/responses`, as far as it needs no memory: each request brings its whole conversation, and nothing is stored.

mod assembly;
mod request;

use self::assembly::Assembly;
use self::request::Wish;
use crate::conversation::Answers;
use crate::conversation::{Finish, Part, Reader, Reason};
use crate::front::Prepared;
use crate::http::body::JsonBody;
use crate::http::events::{self, Events, Gone};
use crate::http::openai::logprobs::of_token;
use crate::http::{ApiError, Caller, HttpServices, id, unix_time};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mlxnode_compute::Sampled;
use serde_json::{Value, json};

/// The handler.
pub(in crate::http) async fn responses(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let mut fields = body.fields;
    let name = fields.string("model")?.unwrap_or_default();
    let model = services.model(&caller, &name).await?;
    let (conversation, wish) = request::read(fields, &model.text.sampling)?;
    let prepared = services.prepare(&caller, &model, conversation).await?;
    let run = Run {
        response: empty(&prepared, &wish),
        reader: Reader::new(&prepared),
        prepared,
        parallel: wish.parallel,
        has_logprobs: wish.top_logprobs.is_some(),
        scores: Vec::new(),
    };
    let answers = Answers::start(&services.front, std::slice::from_ref(&run.prepared), 1).await?;
    match wish.stream {
        false => Ok(Json(run.collect(answers).await?).into_response()),
        true => Ok(events::stream(move |events| run.stream(answers, events))),
    }
}

/// A response before anything was said: what was asked, field by field.
fn empty(prepared: &Prepared, wish: &Wish) -> Value {
    let sampling = &prepared.valid.spec.sampling;
    json!({
        "id": id("resp_"), "object": "response", "created_at": unix_time(), "status": "in_progress", "error": null,
        "incomplete_details": null, "instructions": wish.instructions, "max_output_tokens": wish.max_output_tokens,
        "model": prepared.deployment.name, "output": [], "parallel_tool_calls": wish.parallel,
        "previous_response_id": null, "reasoning": {"effort": wish.effort, "summary": null}, "store": false,
        "temperature": sampling.temperature, "text": {"format": wish.format}, "tool_choice": wish.tool_choice,
        "tools": wish.tools, "top_logprobs": wish.top_logprobs.unwrap_or_default(), "top_p": sampling.top_p, "truncation": "disabled", "usage": null, "user": null, "metadata": {}
    })
}

/// A response that is being made.
struct Run {
    response: Value,
    reader: Reader,
    prepared: Prepared,
    parallel: bool,
    has_logprobs: bool,
    /// Of tokens whose text is still to come.
    scores: Vec<Value>,
}

impl Run {
    /// Takes what a token brought; gives the events that it leads to. Only tokens of the content have their log-probabilities told: a
    /// token goes with the text that comes out next.
    fn take(&mut self, assembly: &mut Assembly, parts: Vec<Part>, tokens: &[Sampled]) -> Vec<Value> {
        if self.has_logprobs {
            let tokenizer = &self.prepared.text.tokenizer;
            self.scores
                .extend(tokens.iter().filter_map(|token| of_token(tokenizer, token)).map(|it| json!(it)));
        }
        let has_content = parts.iter().any(|part| matches!(part, Part::Content(_)));
        // What ends the reasoning has no text, and neither have line breaks behind it.
        if !has_content && (!parts.is_empty() || assembly.is_reasoning()) {
            self.scores.clear();
        }
        let mut events = Vec::new();
        for part in parts {
            let scores = match part {
                Part::Content(_) => std::mem::take(&mut self.scores),
                _ => Vec::new(),
            };
            events.extend(assembly.part(part, scores));
        }
        events
    }

    async fn collect(mut self, mut answers: Answers) -> Result<Value, ApiError> {
        let mut assembly = Assembly::new(self.parallel);
        let mut finish = None;
        while let Some((_, event)) = answers.next().await {
            let Some(step) = self.reader.read(event?) else { continue };
            self.take(&mut assembly, step.parts, &step.tokens);
            finish = step.finish.or(finish);
        }
        assembly.close();
        Ok(self.finished(assembly, finish.as_ref()))
    }

    fn finished(mut self, assembly: Assembly, finish: Option<&Finish>) -> Value {
        self.response["output"] = assembly.output.into();
        let is_cut = finish.is_some_and(|finish| finish.reason == Reason::Length);
        self.response["status"] = if is_cut { "incomplete" } else { "completed" }.into();
        if is_cut {
            self.response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        if let Some(finish) = finish {
            let (input, output) = (self.prepared.valid.prompt.len(), finish.summary.generation_tokens);
            self.response["usage"] = json!({
                "input_tokens": input, "input_tokens_details": {"cached_tokens": finish.summary.cached_tokens},
                "output_tokens": output, "output_tokens_details": {"reasoning_tokens": finish.reasoning_tokens},
                "total_tokens": input + output
            });
        }
        self.response
    }

    async fn stream(mut self, mut answers: Answers, events: Events) -> Result<(), Gone> {
        let mut numbered = Numbered { events, number: 0 };
        for kind in ["response.created", "response.in_progress"] {
            numbered.send(json!({"type": kind, "response": self.response})).await?;
        }
        let mut assembly = Assembly::new(self.parallel);
        let mut finish = None;
        while let Some((_, event)) = answers.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => return numbered.fail(self.response, &error).await,
            };
            let Some(step) = self.reader.read(event) else { continue };
            let events = self.take(&mut assembly, step.parts, &step.tokens);
            numbered.send_all(events).await?;
            finish = step.finish.or(finish);
        }
        numbered.send_all(assembly.close()).await?;
        let response = self.finished(assembly, finish.as_ref());
        let kind =
            if response["status"] == "incomplete" { "response.incomplete" } else { "response.completed" };
        numbered.send(json!({"type": kind, "response": response})).await
    }
}

/// Events with their names and numbers.
struct Numbered {
    events: Events,
    number: u64,
}

impl Numbered {
    async fn send(&mut self, mut event: Value) -> Result<(), Gone> {
        event["sequence_number"] = self.number.into();
        self.number += 1;
        let name = event["type"].as_str().unwrap_or_default().to_owned();
        self.events.named(&name, &event).await
    }

    async fn send_all(&mut self, events: Vec<Value>) -> Result<(), Gone> {
        for event in events {
            self.send(event).await?;
        }
        Ok(())
    }

    /// The end of a response that broke.
    async fn fail(&mut self, mut response: Value, error: &ApiError) -> Result<(), Gone> {
        let body = error.body(crate::http::Dialect::OpenAi);
        let code = body["error"]["code"].as_str().unwrap_or("server_error").to_owned();
        response["status"] = "failed".into();
        response["error"] = json!({"code": code, "message": error.message});
        self.send(json!({"type": "error", "code": code, "message": error.message, "param": error.param}))
            .await?;
        self.send(json!({"type": "response.failed", "response": response})).await
    }
}
