//! Answers that lose their replica in the middle: the client sees the same as if nothing had happened, or a clear error.

use crate::client::{post, streamed};
use crate::desk::Desk;
use anyhow::{Context as _, Result, ensure};
use mlxnode_api::deployments::State;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const CHAT: &str = "/v1/chat/completions";
const CALLS: &str =
    "<think>hm</think>Now: <tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}</tool_call>";
const LONG: Duration = Duration::from_secs(20);

fn chat(words: &str, more: Value) -> Value {
    let mut body = json!({"model": "demo", "max_tokens": 200, "messages": [{"role": "user", "content": format!("SAY {words}")}]});
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}

/// One of everything that depends on the tokens before: text, log-probabilities, calls, stop strings over several tokens, counts.
fn requests() -> Vec<(&'static str, Value)> {
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let usage = json!({"include_usage": true});
    vec![
        (CHAT, chat("one two three, four five six seven eight.", json!({"stream_options": usage}))),
        (CHAT, chat("one two three four five", json!({"logprobs": true, "top_logprobs": 2}))),
        (CHAT, chat("one two three four five six", json!({"stop": ["e four fi"], "stream_options": usage}))),
        (CHAT, chat("one two three four five six", json!({"max_completion_tokens": 7}))),
        (CHAT, chat("a b c d e f", json!({"n": 2}))),
        (CHAT, chat(CALLS, json!({"tools": tools}))),
        (
            "/v1/completions",
            json!({"model": "demo", "prompt": "SAY one two three four", "echo": true, "logprobs": 2, "max_tokens": 9}),
        ),
        ("/v1/messages", chat("one two three four five", json!({}))),
        ("/v1/responses", json!({"model": "demo", "input": "SAY one two three four five"})),
    ]
}

/// Without what is new in every answer.
fn scrubbed(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            for name in ["id", "created", "created_at", "completed_at", "item_id", "call_id"] {
                fields.remove(name);
            }
            fields.values_mut().for_each(|field| *field = scrubbed(field.take()));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = scrubbed(item.take())),
        _ => {}
    }
    value
}

async fn answer(desk: &Desk, path: &str, body: &Value, stream: bool) -> Result<Vec<Value>> {
    let mut body = body.clone();
    if stream {
        let mut events = streamed(desk.address, path, body).await?;
        if body_has_several(&events) {
            // Several answers come in any order, each in its own.
            events.sort_by_key(|event| event["choices"][0]["index"].as_u64());
        }
        return Ok(events.into_iter().map(scrubbed).collect());
    }
    if let Some(fields) = body.as_object_mut() {
        fields.remove("stream_options");
    }
    let reply = post(desk.address, path, &body).await?;
    ensure!(reply.status == 200, "{body}: {reply:?}");
    Ok(vec![scrubbed(reply.json()?)])
}

fn body_has_several(events: &[Value]) -> bool {
    events.iter().any(|event| event["choices"][0]["index"] == 1)
}

#[tokio::test]
async fn the_client_sees_no_gap_and_no_repeat_in_any_dialect() -> Result<()> {
    let desk = Desk::patient(LONG).await?;
    let cases: Vec<_> =
        requests().into_iter().flat_map(|case| [(case.clone(), false), (case, true)]).collect();
    let all = || {
        let asked = cases.iter().map(|((path, body), stream)| answer(&desk, path, body, *stream));
        futures::future::join_all(asked)
    };
    let undisturbed = all().await;
    for tokens in [2, 5] {
        desk.replicas.tokens_per_replica.store(tokens, Ordering::SeqCst);
        let before = desk.replicas.requests();
        for ((case, disturbed), undisturbed) in cases.iter().zip(all().await).zip(&undisturbed) {
            let undisturbed = undisturbed.as_ref().map_err(|error| anyhow::anyhow!("{case:?}: {error}"))?;
            assert_eq!(&disturbed?, undisturbed, "{case:?}, {tokens} tokens a replica");
        }
        ensure!(desk.replicas.requests() > before + 2 * cases.len(), "too little was lost");
    }
    desk.stop().await
}

#[tokio::test]
async fn an_answer_waits_for_the_replica_that_is_formed_again() -> Result<()> {
    let desk = Desk::patient(LONG).await?;
    let body = chat("one two three four five", json!({}));
    let undisturbed = answer(&desk, CHAT, &body, true).await?;
    desk.replicas.tokens_per_replica.store(3, Ordering::SeqCst);
    let asked = answer(&desk, CHAT, &body, true);
    let formed = async {
        while desk.replicas.requests() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        desk.set_state(State::Recovering, 2);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let asked = desk.replicas.requests();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(desk.replicas.requests(), asked, "a replica that is being formed is not asked");
        desk.replicas.tokens_per_replica.store(usize::MAX, Ordering::SeqCst);
        desk.set_state(State::Ready, 2);
    };
    let (answered, ()) = tokio::join!(asked, formed);
    assert_eq!(answered?, undisturbed);
    desk.stop().await
}

#[tokio::test]
async fn a_model_that_does_not_come_back_ends_the_answer_with_a_clear_error() -> Result<()> {
    let body = chat("one two three four five", json!({"stream": true}));
    // How long it waits, what becomes of the model, and what is said.
    let cases = [
        (Duration::from_millis(400), Some(State::Failed), "was formed in time"),
        (LONG, Some(State::Unloading), "signal 9"),
        (LONG, None, "signal 9"),
    ];
    for (within, state, words) in cases {
        let desk = Desk::patient(within).await?;
        desk.replicas.tokens_per_replica.store(4, Ordering::SeqCst);
        let started = Instant::now();
        let lose = async {
            while desk.replicas.requests() < 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            match state {
                Some(state) => desk.set_state(state, 1),
                None => desk.deployments.send_modify(|view| view.deployments.clear()),
            }
        };
        let (reply, ()) = tokio::join!(post(desk.address, CHAT, &body), lose);
        let reply = reply?;
        let events = reply.events();
        let last: Value = serde_json::from_str(events.last().context("events")?)?;
        assert_eq!(
            (reply.status, &last["error"]["code"]),
            (200, &json!("service_unavailable")),
            "{events:?}"
        );
        assert!(last["error"]["message"].as_str().is_some_and(|text| text.contains(words)), "{last}");
        ensure!(events.len() > 4, "what was there came: {events:?}");
        ensure!(started.elapsed() < LONG, "{state:?} took {:?}", started.elapsed());
        desk.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_request_that_breaks_every_replica_is_given_up() -> Result<()> {
    let desk = Desk::patient(LONG).await?;
    desk.replicas.tokens_per_replica.store(0, Ordering::SeqCst);
    let reply = post(desk.address, CHAT, &chat("boom", json!({}))).await?;
    assert_eq!(reply.status, 503);
    assert_eq!(desk.replicas.requests(), 4, "the first time, and three times more");
    ensure!(reply.body.contains("without a token"), "{}", reply.body);
    desk.stop().await
}
