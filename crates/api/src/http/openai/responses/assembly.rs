//! The output of a response, put together part by part: items begin, grow and end one after the other, and each of that is an event.

use crate::conversation::Part;
use crate::http::id;
use serde_json::{Value, json};

/// The items so far, the last of which may be open.
pub(super) struct Assembly {
    pub(super) output: Vec<Value>,
    open: Option<Open>,
    parallel: bool,
    calls: usize,
}

struct Open {
    kind: Kind,
    id: String,
    text: String,
    /// Of the text's tokens, when they were asked for.
    logprobs: Vec<Value>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
}

impl Assembly {
    /// `parallel`: there may be several calls.
    pub(super) fn new(parallel: bool) -> Self {
        Self { output: Vec::new(), open: None, parallel, calls: 0 }
    }

    /// Takes a part of the answer, and the log-probabilities of its tokens; gives the events that it leads to.
    pub(super) fn part(&mut self, part: Part, logprobs: Vec<Value>) -> Vec<Value> {
        let (kind, text) = match part {
            Part::Content(text) => (Kind::Message, text),
            Part::Reasoning(text) => (Kind::Reasoning, text),
            Part::Call(_) if !self.parallel && self.calls > 0 => return Vec::new(),
            Part::Call(call) => {
                self.calls += 1;
                let mut events = self.close();
                let call_id = call.id.clone().unwrap_or_else(|| id("call_"));
                let arguments = Value::Object(call.arguments).to_string();
                let item = |status: &str, arguments: &str, id: &str| {
                    json!({"id": id, "type": "function_call", "status": status, "call_id": call_id, "name": call.name,
                        "arguments": arguments})
                };
                let (name, index) = (id("fc_"), self.output.len());
                let whole = item("completed", &arguments, &name);
                events.push(json!({"type": "response.output_item.added", "output_index": index,
                    "item": item("in_progress", "", &name)}));
                events.push(json!({"type": "response.function_call_arguments.delta", "item_id": name, "output_index": index,
                    "delta": arguments}));
                events.push(json!({"type": "response.function_call_arguments.done", "item_id": name, "output_index": index,
                    "name": call.name, "arguments": arguments}));
                events
                    .push(json!({"type": "response.output_item.done", "output_index": index, "item": whole}));
                self.output.push(whole);
                return events;
            }
        };
        let mut events = Vec::new();
        if self.open.as_ref().is_none_or(|open| open.kind != kind) {
            events = self.close();
            events.extend(self.begin(kind));
        }
        let index = self.output.len();
        if let Some(open) = &mut self.open {
            open.text.push_str(&text);
            let mut event = json!({"type": kind.event("delta"), "item_id": open.id, "output_index": index, "content_index": 0,
                "delta": text});
            if kind == Kind::Message {
                event["logprobs"] = json!(logprobs);
                open.logprobs.extend(logprobs);
            }
            events.push(event);
        }
        events
    }

    /// Is an item of reasoning open?
    pub(super) fn is_reasoning(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.kind == Kind::Reasoning)
    }

    fn begin(&mut self, kind: Kind) -> [Value; 2] {
        let open = Open { kind, id: id(kind.prefix()), text: String::new(), logprobs: Vec::new() };
        let index = self.output.len();
        let added = json!({"type": "response.output_item.added", "output_index": index, "item": open.item("in_progress", false)});
        let part = json!({"type": "response.content_part.added", "item_id": open.id, "output_index": index,
            "content_index": 0, "part": open.part()});
        self.open = Some(open);
        [added, part]
    }

    /// Ends the open item; gives the events of that.
    pub(super) fn close(&mut self) -> Vec<Value> {
        let Some(open) = self.open.take() else { return Vec::new() };
        let index = self.output.len();
        let item = open.item("completed", true);
        let mut done = json!({"type": open.kind.event("done"), "item_id": open.id, "output_index": index, "content_index": 0,
            "text": open.text});
        if open.kind == Kind::Message {
            done["logprobs"] = json!(open.logprobs);
        }
        let part = json!({"type": "response.content_part.done", "item_id": open.id, "output_index": index,
            "content_index": 0, "part": open.part()});
        let end = json!({"type": "response.output_item.done", "output_index": index, "item": item});
        self.output.push(item);
        vec![done, part, end]
    }
}

impl Open {
    fn part(&self) -> Value {
        match self.kind {
            Kind::Message => {
                json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs})
            }
            Kind::Reasoning => json!({"type": "reasoning_text", "text": self.text}),
        }
    }

    fn item(&self, status: &str, is_whole: bool) -> Value {
        let content = if is_whole { vec![self.part()] } else { Vec::new() };
        match self.kind {
            Kind::Message => {
                json!({"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            Kind::Reasoning => {
                json!({"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content})
            }
        }
    }
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Message => "msg_",
            Self::Reasoning => "rs_",
        }
    }

    fn event(self, what: &str) -> String {
        match self {
            Self::Message => format!("response.output_text.{what}"),
            Self::Reasoning => format!("response.reasoning_text.{what}"),
        }
    }
}
