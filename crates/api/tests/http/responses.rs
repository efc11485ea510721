//! `/v1/responses`.

use crate::client::{good, post, refused};
use crate::desk::Desk;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";
const ALL: &str =
    "SAY <think>hm</think>\n\nSo: <tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}</tool_call>";

fn request(input: &str) -> Value {
    json!({"model": "demo", "input": input, "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]})
}

#[tokio::test]
async fn a_response_has_items() -> Result<()> {
    let desk = Desk::start().await?;
    let response = good(desk.address, PATH, request(ALL)).await?;
    assert_eq!(
        (&response["object"], &response["status"], &response["store"]),
        (&json!("response"), &json!("completed"), &json!(false))
    );
    let output = response["output"].as_array().context("output")?;
    let kinds: Vec<&Value> = output.iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(output[0]["content"][0]["text"], "hm");
    assert_eq!(output[1]["content"][0]["text"], "So: ");
    assert_eq!((&output[2]["name"], &output[2]["arguments"]), (&json!("f"), &json!("{\"x\":1}")));
    let usage = &response["usage"];
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 3);
    assert_eq!(
        usage["total_tokens"].as_u64(),
        usage["input_tokens"].as_u64().zip(usage["output_tokens"].as_u64()).map(|(a, b)| a + b)
    );
    // What came back goes back in.
    let mut items = vec![json!({"role": "user", "content": "x"})];
    items.extend(output.iter().cloned());
    items
        .push(json!({"type": "function_call_output", "call_id": output[2]["call_id"], "output": "SAY done"}));
    let again = json!({"model": "demo", "input": items, "instructions": "Be brief.", "store": false});
    assert_eq!(good(desk.address, PATH, again).await?["output"][0]["content"][0]["text"], "done");
    let cut = json!({"model": "demo", "input": "SAY one two", "max_output_tokens": 1});
    let cut = good(desk.address, PATH, cut).await?;
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    desk.stop().await
}

#[tokio::test]
async fn a_stream_ends_in_the_response() -> Result<()> {
    let desk = Desk::start().await?;
    let mut body = request(ALL);
    body["stream"] = true.into();
    let reply = post(desk.address, PATH, &body).await?;
    let events: Vec<Value> =
        reply.events().into_iter().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let numbers: Vec<Option<u64>> = events.iter().map(|event| event["sequence_number"].as_u64()).collect();
    assert_eq!(numbers, (0..events.len() as u64).map(Some).collect::<Vec<_>>());
    let last = events.last().context("events")?;
    assert_eq!(last["type"], "response.completed");
    let done: Vec<Value> = events
        .iter()
        .filter(|event| event["type"] == "response.output_item.done")
        .map(|event| event["item"].clone())
        .collect();
    assert_eq!(Value::from(done), last["response"]["output"]);
    let text: String = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(text, "So: ");
    body["input"] = "SAY It will BREAK".into();
    let broken = post(desk.address, PATH, &body).await?;
    assert!(
        broken.body.contains("event: error\n") && broken.body.contains("event: response.failed\n"),
        "{}",
        broken.body
    );
    desk.stop().await
}

#[tokio::test]
async fn what_needs_a_memory_is_refused() -> Result<()> {
    let desk = Desk::start().await?;
    for (field, value) in [
        ("previous_response_id", json!("x")),
        ("store", json!(true)),
        ("background", json!(true)),
        ("conversation", json!("c")),
    ] {
        let mut body = request("SAY x");
        body[field] = value;
        let (status, param, _) = refused(desk.address, PATH, body).await?;
        assert_eq!((status, param), (400, json!(field)));
    }
    desk.stop().await
}
