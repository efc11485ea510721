//! `/v1/messages`.

use crate::client::{good, post, refused};
use crate::desk::Desk;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

const PATH: &str = "/v1/messages";

fn say(words: &str, more: Value) -> Value {
    let mut body = json!({"model": "demo", "max_tokens": 100, "messages": [{"role": "user", "content": format!("SAY {words}")}]});
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}

fn tools() -> Value {
    json!([{"name": "f", "description": "Adds.", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}])
}

const ALL: &str =
    "<think>hm</think>\n\nSo: <tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}</tool_call>";

#[tokio::test]
async fn a_message_has_blocks() -> Result<()> {
    let desk = Desk::start().await?;
    let message = good(desk.address, PATH, say(ALL, json!({"tools": tools()}))).await?;
    assert_eq!(
        (&message["type"], &message["role"], &message["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("tool_use"))
    );
    let content = message["content"].as_array().context("content")?;
    assert_eq!(content[0], json!({"type": "thinking", "thinking": "hm", "signature": ""}));
    assert_eq!(content[1], json!({"type": "text", "text": "So: "}));
    assert_eq!(
        (&content[2]["type"], &content[2]["name"], &content[2]["input"]),
        (&json!("tool_use"), &json!("f"), &json!({"x": 1}))
    );
    let prompt = desk.replicas.last().prompt.len();
    assert_eq!(
        (&message["usage"]["input_tokens"], &message["usage"]["cache_read_input_tokens"]),
        (&json!(prompt - 3), &json!(3))
    );
    let cut = good(desk.address, PATH, say("one two", json!({"max_tokens": 1}))).await?;
    assert_eq!(cut["stop_reason"], "max_tokens");
    let stopped = good(desk.address, PATH, say("one two", json!({"stop_sequences": [" two"]}))).await?;
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!(" two"))
    );
    let whole = good(desk.address, PATH, say("one", json!({"system": "Be brief."}))).await?;
    assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    let count = good(
        desk.address,
        "/v1/messages/count_tokens",
        json!({"model": "demo", "system": "Be brief.",
        "messages": [{"role": "user", "content": "SAY one"}]}),
    )
    .await?;
    assert_eq!(count["input_tokens"], desk.replicas.last().prompt.len());
    desk.stop().await
}

#[tokio::test]
async fn a_stream_opens_and_closes_its_blocks() -> Result<()> {
    let desk = Desk::start().await?;
    let reply = post(desk.address, PATH, &say(ALL, json!({"tools": tools(), "stream": true}))).await?;
    let names: Vec<&str> = reply.body.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    let events: Vec<Value> =
        reply.events().into_iter().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(
        events.iter().map(|event| event["type"].as_str().unwrap_or_default()).collect::<Vec<_>>(),
        names
    );
    assert_eq!(
        (names[0], names[names.len() - 1], names[names.len() - 2]),
        ("message_start", "message_stop", "message_delta")
    );
    let starts: Vec<&Value> = events
        .iter()
        .filter(|event| event["type"] == "content_block_start")
        .map(|event| &event["content_block"]["type"])
        .collect();
    assert_eq!(starts, ["thinking", "text", "tool_use"]);
    let joined = |field: &str| -> String {
        events.iter().filter_map(|event| event["delta"][field].as_str()).collect()
    };
    assert_eq!(
        (joined("thinking"), joined("text"), joined("partial_json")),
        ("hm".into(), "So: ".into(), "{\"x\":1}".into())
    );
    let (mut open, mut next) = (None, 0);
    for event in &events {
        match event["type"].as_str().unwrap_or_default() {
            "content_block_start" => {
                assert_eq!((open, event["index"].as_u64()), (None, Some(next)));
                open = Some(next);
            }
            "content_block_delta" => assert_eq!(event["index"].as_u64(), open),
            "content_block_stop" => {
                assert_eq!(event["index"].as_u64(), open.take());
                next += 1;
            }
            _ => {}
        }
    }
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"]["stop_reason"], "tool_use");
    assert!(end["usage"]["output_tokens"].as_u64() > Some(3), "{end}");
    desk.stop().await
}

#[tokio::test]
async fn errors_have_anthropics_shape() -> Result<()> {
    let desk = Desk::start().await?;
    let cases = [
        (say("x", json!({"max_tokens": 0})), 400, "invalid_request_error", "max_tokens"),
        (say("x", json!({"model": "claude"})), 404, "not_found_error", "claude"),
        (say("x", json!({"n": 2})), 400, "invalid_request_error", "n is not a field"),
        (json!([]), 400, "invalid_request_error", "object"),
    ];
    for (body, status, kind, words) in cases {
        let reply = post(desk.address, PATH, &body).await?;
        let error = reply.json()?;
        assert_eq!(
            (reply.status, &error["type"], &error["error"]["type"]),
            (status, &json!("error"), &json!(kind)),
            "{body}"
        );
        assert!(
            error["error"]["message"].as_str().is_some_and(|text| text.contains(words)),
            "{body}: {error}"
        );
    }
    let wrong_method = crate::client::get(desk.address, PATH).await?;
    assert_eq!((wrong_method.status, &wrong_method.json()?["type"]), (405, &json!("error")));
    let (status, _, _) = refused(desk.address, "/v1/messages/count_tokens", json!({"model": "demo"})).await?;
    assert_eq!(status, 400);
    let broken = post(desk.address, PATH, &say("It will BREAK", json!({"stream": true}))).await?;
    assert!(broken.body.contains("event: error\n"), "{}", broken.body);
    // Last, because the front lets nobody in for a moment after it was refused.
    let reply = post(desk.address, PATH, &say("QUEUE FULL", json!({}))).await?;
    let error = reply.json()?;
    assert_eq!((reply.status, &error["error"]["type"]), (429, &json!("rate_limit_error")), "{error}");
    desk.stop().await
}
