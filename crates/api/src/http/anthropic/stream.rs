//! A message as a stream of events: it starts, blocks start, grow and stop one after the other, it ends.

use super::messages::{head, stop_reason, tool_use, usage};
use super::request::Wish;
use crate::conversation::Answers;
use crate::conversation::{Finish, Part, Reader};
use crate::front::Prepared;
use crate::http::Dialect;
use crate::http::events::{Events, Gone};
use serde_json::{Value, json};

/// Which kind of block is open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Nothing,
    Text,
    Thinking,
}

pub(super) struct Blocks {
    events: Events,
    prepared: Prepared,
    wish: Wish,
    open: Open,
    index: usize,
    calls: usize,
}

impl Blocks {
    pub(super) fn new(events: Events, prepared: Prepared, wish: Wish) -> Self {
        Self { events, prepared, wish, open: Open::Nothing, index: 0, calls: 0 }
    }

    pub(super) async fn send(mut self, mut answers: Answers) -> Result<(), Gone> {
        self.event("message_start", json!({"message": head(&self.prepared)})).await?;
        let mut reader = Reader::new(&self.prepared);
        let mut finish = None;
        while let Some((_, event)) = answers.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => return self.events.named("error", &error.body(Dialect::Anthropic)).await,
            };
            let Some(step) = reader.read(event) else { continue };
            for part in step.parts {
                self.part(part).await?;
            }
            finish = step.finish.or(finish);
        }
        self.close().await?;
        if let Some(finish) = &finish {
            self.end(finish).await?;
        }
        self.event("message_stop", json!({})).await
    }

    async fn part(&mut self, part: Part) -> Result<(), Gone> {
        match part {
            Part::Content(text) => {
                self.open(Open::Text, json!({"type": "text", "text": ""})).await?;
                self.delta(json!({"type": "text_delta", "text": text})).await
            }
            Part::Reasoning(_) if !self.wish.shows_thinking => Ok(()),
            Part::Reasoning(text) => {
                self.open(Open::Thinking, json!({"type": "thinking", "thinking": "", "signature": ""}))
                    .await?;
                self.delta(json!({"type": "thinking_delta", "thinking": text})).await
            }
            Part::Call(_) if !self.wish.parallel && self.calls > 0 => Ok(()),
            Part::Call(call) => {
                self.calls += 1;
                self.close().await?;
                let block = tool_use(&call, json!({}));
                self.event("content_block_start", json!({"index": self.index, "content_block": block}))
                    .await?;
                let input = Value::Object(call.arguments).to_string();
                self.delta(json!({"type": "input_json_delta", "partial_json": input})).await?;
                self.stop().await
            }
        }
    }

    async fn open(&mut self, kind: Open, block: Value) -> Result<(), Gone> {
        if self.open == kind {
            return Ok(());
        }
        self.close().await?;
        self.open = kind;
        self.event("content_block_start", json!({"index": self.index, "content_block": block})).await
    }

    async fn close(&mut self) -> Result<(), Gone> {
        match std::mem::replace(&mut self.open, Open::Nothing) {
            Open::Nothing => Ok(()),
            Open::Text | Open::Thinking => self.stop().await,
        }
    }

    async fn stop(&mut self) -> Result<(), Gone> {
        self.event("content_block_stop", json!({"index": self.index})).await?;
        self.index += 1;
        Ok(())
    }

    async fn delta(&self, delta: Value) -> Result<(), Gone> {
        self.event("content_block_delta", json!({"index": self.index, "delta": delta})).await
    }

    async fn end(&self, finish: &Finish) -> Result<(), Gone> {
        let delta = json!({"stop_reason": stop_reason(finish), "stop_sequence": finish.stopped_by});
        self.event("message_delta", json!({"delta": delta, "usage": usage(&self.prepared, finish)})).await
    }

    /// An event whose data begin with its name.
    async fn event(&self, name: &str, data: Value) -> Result<(), Gone> {
        let mut whole = json!({"type": name});
        if let (Some(whole), Value::Object(data)) = (whole.as_object_mut(), data) {
            whole.extend(data);
        }
        self.events.named(name, &whole).await
    }
}
