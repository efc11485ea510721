//! Formats and required calls: what the last stage is asked to enforce, and that it allows the right answers.

use crate::client::{good, refused};
use crate::desk::Desk;
use anyhow::{Context as _, Result, ensure};
use mlxnode_compute::Grammar;
use mlxnode_text::grammar::Vocabulary;
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";

/// Whether the grammar of the last request has this answer for a sentence.
fn allows(desk: &Desk, text: &str) -> Result<bool> {
    let grammar = desk.replicas.last().spec.grammar.context("a grammar")?;
    let mut matcher = Vocabulary::new(&desk.replicas.tokenizer, 514)?.compile((&grammar).into())?;
    for token in desk.replicas.tokenizer.encode(text, false)? {
        if matcher.accept(token).is_err() {
            return Ok(false);
        }
    }
    Ok(matcher.is_complete())
}

async fn asked(desk: &Desk, more: Value) -> Result<()> {
    let mut body = json!({"model": "demo", "messages": [{"role": "user", "content": "SAY x"}]});
    body.as_object_mut().context("object")?.extend(more.as_object().cloned().context("object")?);
    good(desk.address, PATH, body).await.map(drop)
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"x": {"$ref": "#/$defs/number"}}, "required": ["x"],
        "additionalProperties": false, "$defs": {"number": {"type": "integer"}}});
    json!([{"type": "function", "function": {"name": "add", "parameters": parameters}},
        {"type": "function", "function": {"name": "stop"}}])
}

async fn check(more: Value, good: &[&str], bad: &[&str]) -> Result<()> {
    let desk = Desk::start().await?;
    asked(&desk, more.clone()).await?;
    for text in good {
        ensure!(
            allows(&desk, text)?,
            "{more} does not allow {text:?}: {:?}",
            desk.replicas.last().spec.grammar
        );
    }
    for text in bad {
        ensure!(!allows(&desk, text)?, "{more} allows {text:?}");
    }
    desk.stop().await
}

#[tokio::test]
async fn json_comes_with_reasoning_or_without() -> Result<()> {
    let good = ["{\"a\": 1}", "<think>hm {</think>\n\n{\"a\": 1}", "<think></think>{\"a\": 1}"];
    check(
        json!({"response_format": {"type": "json_object"}}),
        &good,
        &["[1]", "hello", "<think>x{}", "{\"a\": 1} and"],
    )
    .await
}

#[tokio::test]
async fn a_schema_is_followed() -> Result<()> {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    let (good, bad) =
        (["{\"n\": 7}", "<think>a</think>{\"n\": 7}"], ["{}", "{\"n\": \"7\"}", "{\"n\": 7, \"m\": 1}"]);
    check(json!({"response_format": format}), &good, &bad).await?;
    check(json!({"guided_json": schema}), &good, &bad).await
}

#[tokio::test]
async fn a_required_call_is_one_of_the_functions() -> Result<()> {
    let add = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 1}}\n</tool_call>";
    let stop = "<tool_call>\n{\"name\": \"stop\", \"arguments\": {}}\n</tool_call>";
    let (both, thought) = (format!("{add}\n{stop}"), format!("<think>Hm.</think>\n\n{add}"));
    let wrong = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"y\": 1}}\n</tool_call>";
    let other = "<tool_call>\n{\"name\": \"divide\", \"arguments\": {}}\n</tool_call>";
    let required = json!({"tools": tools(), "tool_choice": "required"});
    check(required, &[add, stop, &both, &thought], &["Hello", wrong, other, "<think>Hm.</think>"]).await?;
    let single = json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false});
    check(single, &[add], &[&both]).await?;
    let named = json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "stop"}}});
    check(named, &[stop], &[add]).await?;
    // With a format, the model may call or answer.
    let format = json!({"tools": tools(), "response_format": {"type": "json_object"}});
    check(format, &[add, "{\"a\": 1}"], &["Hello", other]).await
}

#[tokio::test]
async fn expressions_for_whole_answers_need_a_model_that_does_not_reason() -> Result<()> {
    let desk = Desk::start().await?;
    let body =
        json!({"model": "demo", "messages": [{"role": "user", "content": "x"}], "guided_regex": "[0-9]+"});
    let (status, _, message) = refused(desk.address, PATH, body).await?;
    assert_eq!(status, 400, "{message}");
    let body = json!({"model": "demo", "prompt": "SAY 1", "guided_regex": "[0-9]+"});
    good(desk.address, "/v1/completions", body).await?;
    assert_eq!(desk.replicas.last().spec.grammar, Some(Grammar::Regex("[0-9]+".into())));
    desk.stop().await
}
