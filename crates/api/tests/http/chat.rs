//! `/v1/chat/completions`.

use crate::client::{ask, good, post, refused, streamed};
use crate::desk::Desk;
use anyhow::{Context as _, Result, ensure};
use mlxnode_coordinator::placement::Guessing;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const PATH: &str = "/v1/chat/completions";

/// A request for the words to be said.
fn say(words: &str) -> Value {
    json!({"model": "demo", "messages": [{"role": "user", "content": format!("SAY {words}")}]})
}

fn with(mut body: Value, more: Value) -> Value {
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}

#[tokio::test]
async fn an_answer_has_openais_shape() -> Result<()> {
    let desk = Desk::start().await?;
    let answer = good(desk.address, PATH, say("Good day.")).await?;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "demo");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Good day.", "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    let prompt = desk.replicas.last().prompt.len();
    let said = desk.replicas.tokenizer.encode("Good day.", false)?.len() + 1;
    let usage = &answer["usage"];
    assert_eq!(usage["prompt_tokens"], prompt);
    assert_eq!(usage["completion_tokens"], said);
    assert_eq!(usage["total_tokens"], prompt + said);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
    // OpenAI's defaults, since this model's authors say nothing.
    let spec = desk.replicas.last().spec;
    assert_eq!((spec.sampling.temperature, spec.sampling.top_p), (1.0, 1.0));
    assert_eq!(spec.max_tokens, 512 - prompt);
    desk.stop().await
}

#[tokio::test]
async fn every_field_about_sampling_arrives() -> Result<()> {
    let desk = Desk::start().await?;
    let body = with(
        say("x"),
        json!({
            "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1, "logit_bias": {"5": -100, "6": 2.5},
            "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.4, "frequency_context_size": 9,
            "max_completion_tokens": 4, "max_tokens": 9, "stop": ["a", "b"], "stop_token_ids": [9], "xtc_probability": 0.5,
            "xtc_threshold": 0.1, "user": "me", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
            "logprobs": true, "top_logprobs": 2, "n": 1, "stream_options": null
        }),
    );
    good(desk.address, PATH, body).await?;
    let spec = desk.replicas.last().spec;
    let sampling = &spec.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.9, 7, 0.1));
    assert_eq!(sampling.seed, u64::MAX);
    assert_eq!(sampling.logit_bias, [(5, -100.0), (6, 2.5)].into());
    assert_eq!(sampling.repetition.map(|penalty| (penalty.strength, penalty.context)), Some((1.2, 20)));
    assert_eq!(sampling.frequency.map(|penalty| (penalty.strength, penalty.context)), Some((-0.4, 9)));
    assert_eq!(sampling.xtc.as_ref().map(|xtc| (xtc.probability, xtc.threshold)), Some((0.5, 0.1)));
    assert_eq!(sampling.logprobs.map(|wish| wish.top), Some(2));
    assert_eq!((spec.max_tokens, spec.stop_tokens), (4, vec![2, 9]));
    desk.stop().await
}

#[tokio::test]
async fn a_stream_says_the_same_piece_by_piece() -> Result<()> {
    let desk = Desk::start().await?;
    let body = with(
        say("One two three."),
        json!({"stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2}),
    );
    let whole = good(desk.address, PATH, with(body.clone(), json!({"stream_options": null}))).await?;
    let chunks = streamed(desk.address, PATH, body).await?;
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (mut text, mut scores) = (String::new(), Vec::new());
    let mut finish = None;
    for chunk in &chunks[..chunks.len() - 1] {
        assert_eq!((&chunk["object"], &chunk["usage"]), (&json!("chat.completion.chunk"), &Value::Null));
        let choice = &chunk["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        scores.extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
        finish = choice["finish_reason"].as_str().or(finish);
    }
    assert_eq!((text.as_str(), finish), ("One two three.", Some("stop")));
    assert_eq!(Value::from(scores), whole["choices"][0]["logprobs"]["content"]);
    let last = chunks.last().context("chunks")?;
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    desk.stop().await
}

#[tokio::test]
async fn log_probabilities_have_tokens_bytes_and_ids() -> Result<()> {
    let desk = Desk::start().await?;
    let answer =
        good(desk.address, PATH, with(say("é!"), json!({"logprobs": true, "top_logprobs": 1}))).await?;
    let scores = answer["choices"][0]["logprobs"]["content"].as_array().context("content")?.clone();
    let bytes: Vec<u8> = scores
        .iter()
        .flat_map(|score| score["bytes"].as_array().cloned().unwrap_or_default())
        .filter_map(|byte| byte.as_u64()?.try_into().ok())
        .collect();
    assert_eq!(bytes, "é!".as_bytes());
    for score in &scores {
        assert_eq!(score["logprob"], -0.5);
        assert_eq!(score["top_logprobs"][0]["id"], score["id"]);
    }
    desk.stop().await
}

#[tokio::test]
async fn reasoning_is_told_apart() -> Result<()> {
    let desk = Desk::start().await?;
    let body = say("<think>hm hm</think>\n\nFour.");
    let answer = good(desk.address, PATH, body.clone()).await?;
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("Four."), &json!("hm hm")));
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let reasoning =
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().context("tokens")?;
    let said = answer["usage"]["completion_tokens"].as_u64().context("tokens")?;
    assert!(reasoning >= 2 && reasoning < said, "{reasoning} of {said}");
    let chunks = streamed(desk.address, PATH, body).await?;
    let joined = |field: &str| -> String {
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!(
        (joined("content"), joined("reasoning_content"), joined("reasoning")),
        ("Four.".into(), "hm hm".into(), "hm hm".into())
    );
    desk.stop().await
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]});
    json!([{"type": "function", "function": {"name": "f", "description": "Adds.", "parameters": parameters, "strict": true}},
        {"type": "function", "function": {"name": "g"}}])
}

const CALLS: &str = "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}</tool_call>\n<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>";

#[tokio::test]
async fn tool_calls_come_whole_and_with_ids() -> Result<()> {
    let desk = Desk::start().await?;
    let body = with(say(CALLS), json!({"tools": tools()}));
    let answer = good(desk.address, PATH, body.clone()).await?;
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null)
    );
    let calls = choice["message"]["tool_calls"].as_array().context("calls")?;
    assert_eq!(calls[0]["function"], json!({"name": "f", "arguments": "{\"x\":1}"}));
    assert_eq!(calls[1]["function"]["name"], "g");
    assert!(calls[0]["id"].as_str().is_some_and(|id| id.starts_with("call_") && calls[1]["id"] != *id));
    let chunks = streamed(desk.address, PATH, body.clone()).await?;
    let deltas: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].get(0)).collect();
    assert_eq!(deltas.iter().map(|call| call["index"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(1)]);
    assert_eq!(deltas[0]["function"]["arguments"], "{\"x\":1}");
    let single = good(desk.address, PATH, with(body, json!({"parallel_tool_calls": false}))).await?;
    assert_eq!(single["choices"][0]["message"]["tool_calls"].as_array().map(Vec::len), Some(1));
    // With "none" the model does not even learn of them.
    let none =
        good(desk.address, PATH, with(say("Hi."), json!({"tools": tools(), "tool_choice": "none"}))).await?;
    assert_eq!(none["choices"][0]["message"]["content"], "Hi.");
    let prompt = desk.replicas.tokenizer.decode(&desk.replicas.last().prompt, false)?;
    assert!(!prompt.contains("Adds."), "{prompt}");
    desk.stop().await
}

#[tokio::test]
async fn a_conversation_with_results_of_tools_reaches_the_template() -> Result<()> {
    let desk = Desk::start().await?;
    let messages = json!([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "one."}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "SAY two"}
    ]);
    let answer =
        good(desk.address, PATH, json!({"model": "demo", "messages": messages, "tools": tools()})).await?;
    assert_eq!(answer["choices"][0]["message"]["content"], "two");
    let prompt = desk.replicas.tokenizer.decode(&desk.replicas.last().prompt, false)?;
    for words in ["<|system|>Be brief.", "<|user|>Add one.", "\"x\": 1", "Adds."] {
        assert!(prompt.contains(words), "{words:?} in {prompt}");
    }
    desk.stop().await
}

#[tokio::test]
async fn several_answers_have_seeds_of_their_own() -> Result<()> {
    let desk = Desk::start().await?;
    let body = with(say("Hi."), json!({"n": 3, "seed": 40}));
    let answer = good(desk.address, PATH, body.clone()).await?;
    let choices = answer["choices"].as_array().context("choices")?;
    assert_eq!(
        choices.iter().map(|choice| choice["index"].as_u64()).collect::<Vec<_>>(),
        [Some(0), Some(1), Some(2)]
    );
    assert!(choices.iter().all(|choice| choice["message"]["content"] == "Hi."));
    let mut seeds: Vec<u64> = desk
        .replicas
        .seen
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .iter()
        .map(|run| run.spec.sampling.seed)
        .collect();
    seeds.sort_unstable();
    assert_eq!(seeds, [40, 41, 42]);
    let said = desk.replicas.tokenizer.encode("Hi.", false)?.len() + 1;
    assert_eq!(answer["usage"]["completion_tokens"], 3 * said);
    let chunks = streamed(desk.address, PATH, body).await?;
    for index in 0..3 {
        let of_choice = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
        let text: String =
            of_choice.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, "Hi.");
    }
    desk.stop().await
}

#[tokio::test]
async fn answers_end_where_they_should() -> Result<()> {
    let desk = Desk::start().await?;
    let cases = [
        (json!({"stop": " three"}), "one two", "stop"),
        (json!({"max_tokens": 1}), "o", "length"),
        (json!({}), "one two three", "stop"),
    ];
    for (more, text, reason) in cases {
        let answer = good(desk.address, PATH, with(say("one two three"), more.clone())).await?;
        let choice = &answer["choices"][0];
        let content = choice["message"]["content"].as_str().context("content")?;
        assert!(content.starts_with(text) && choice["finish_reason"] == reason, "{more}: {choice}");
    }
    desk.stop().await
}

#[tokio::test]
async fn models_go_by_several_names() -> Result<()> {
    let desk = Desk::start().await?;
    for model in [json!("demo"), json!("hub/demo"), json!("demo:style")] {
        good(desk.address, PATH, with(say("Hi."), json!({"model": model}))).await?;
    }
    assert_eq!(desk.replicas.last().spec.adapter.as_deref(), Some("style#3"));
    for (model, status) in [
        (json!("demo:prose"), 404),
        (json!("gpt-9"), 404),
        (json!("later"), 503),
        (json!("default_model"), 400),
        (Value::Null, 400),
    ] {
        let (found, param, _) =
            refused(desk.address, PATH, with(say("Hi."), json!({"model": model}))).await?;
        assert_eq!(found, status, "{model}");
        assert_eq!(param, if status == 503 { Value::Null } else { json!("model") }, "{model}");
    }
    desk.stop().await
}

#[tokio::test]
async fn a_request_may_ask_for_fewer_guesses_but_not_for_another_draft_model() -> Result<()> {
    let desk = Desk::start().await?;
    let asked = async |more: Value| {
        good(desk.address, PATH, with(say("Hi."), more)).await?;
        anyhow::Ok(desk.replicas.last().spec.most_guesses)
    };
    assert_eq!(asked(json!({})).await?, None, "as many as the deployment does");
    assert_eq!(asked(json!({"num_draft_tokens": 0, "draft_model": "default_model"})).await?, Some(0));
    assert_eq!(asked(json!({"num_draft_tokens": 3, "draft_model": null})).await?, Some(3));
    let (status, param, message) =
        refused(desk.address, PATH, with(say("Hi."), json!({"draft_model": "small"}))).await?;
    assert_eq!((status, param), (400, json!("draft_model")));
    assert!(
        message.contains("with none as its draft model") && message.contains("mlxnode load"),
        "{message}"
    );
    desk.deployments.send_modify(|view| {
        let draft = Some("/models/small".to_owned());
        view.deployments[0].guessing = Some(Guessing { draft, ngram: 0, tokens: 4 });
    });
    assert_eq!(asked(json!({"draft_model": "/models/small"})).await?, None);
    let (_, param, message) =
        refused(desk.address, PATH, with(say("Hi."), json!({"draft_model": "other"}))).await?;
    assert_eq!(param, json!("draft_model"));
    assert!(message.contains("another one") && !message.contains("/models"), "no folder is told: {message}");
    desk.stop().await
}

#[tokio::test]
async fn what_is_not_served_is_refused_by_name() -> Result<()> {
    let desk = Desk::start().await?;
    let cases = [
        (json!({"store": true}), "store"),
        (json!({"functions": []}), "functions"),
        (json!({"draft_model": "x"}), "draft_model"),
        (json!({"num_draft_tokens": -1}), "num_draft_tokens"),
        (json!({"num_draft_tokens": "3"}), "num_draft_tokens"),
        (json!({"role_mapping": {}}), "role_mapping"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"n": 17}), "n"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_k": 514}), "top_k"),
        (json!({"logit_bias": {"514": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999999999": 1}}), "logit_bias"),
        (json!({"xtc_threshold": 0.6}), "xtc_threshold"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"stop": [""]}), "stop"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"messages": []}), "messages"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"guided_regex": "(", "response_format": null}), "guided_regex"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}),
            "response_format",
        ),
        (json!({"guided_regex": "a", "guided_grammar": "start: \"a\""}), "guided_grammar"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"stream_options": {"include_everything": true}}), "stream_options.include_everything"),
    ];
    for (more, param) in cases {
        let (status, found, message) = refused(desk.address, PATH, with(say("Hi."), more.clone())).await?;
        assert_eq!((status, found), (400, json!(param)), "{more}: {message}");
    }
    assert_eq!(good(desk.address, PATH, say("Hi.")).await?["choices"][0]["message"]["content"], "Hi.");
    desk.stop().await
}

#[tokio::test]
async fn a_full_queue_and_a_lost_worker_have_their_status() -> Result<()> {
    let desk = Desk::start().await?;
    let lost = post(desk.address, PATH, &say("It will BREAK now")).await?;
    assert_eq!(lost.status, 503);
    let reply = post(desk.address, PATH, &with(say("It will BREAK now"), json!({"stream": true}))).await?;
    let events = reply.events();
    let last: Value = serde_json::from_str(events.last().context("events")?)?;
    assert_eq!((reply.status, &last["error"]["code"]), (200, &json!("service_unavailable")));
    ensure!(events.len() > 2, "the beginning came: {events:?}");
    // Last, because the front lets nobody in for a moment after it was refused.
    for stream in [false, true] {
        let reply = post(desk.address, PATH, &with(say("QUEUE FULL"), json!({"stream": stream}))).await?;
        assert_eq!(reply.status, 429);
        assert!(reply.headers.contains("retry-after: "), "{}", reply.headers);
    }
    desk.stop().await
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_answer() -> Result<()> {
    let desk = Desk::start().await?;
    for stream in [true, false] {
        let body = with(say("WAIT"), json!({"stream": stream})).to_string();
        let mut connection = tokio::net::TcpStream::connect(desk.address).await?;
        let request = format!(
            "POST {PATH} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n{body}",
            desk.address,
            body.len()
        );
        connection.write_all(request.as_bytes()).await?;
        if stream {
            let mut some = [0; 64];
            connection.read_exact(&mut some).await?;
        }
        for _ in 0..200 {
            if desk.replicas.running() == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(desk.replicas.running(), 1, "stream: {stream}");
        drop(connection);
        for _ in 0..400 {
            if desk.replicas.running() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(desk.replicas.running(), 0, "stream: {stream}");
    }
    desk.stop().await
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive() -> Result<()> {
    let desk = Desk::start().await?;
    let body = with(say("WAIT"), json!({"stream": true})).to_string();
    let mut connection = tokio::net::TcpStream::connect(desk.address).await?;
    let request = format!(
        "POST {PATH} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n{body}",
        desk.address,
        body.len()
    );
    connection.write_all(request.as_bytes()).await?;
    let mut read = Vec::new();
    let waiting = tokio::time::timeout(Duration::from_secs(15), async {
        while !String::from_utf8_lossy(&read).contains(": keep-alive") {
            let mut some = [0; 4096];
            let count = connection.read(&mut some).await?;
            ensure!(count > 0, "the stream ended");
            read.extend_from_slice(&some[..count]);
        }
        Ok(())
    });
    waiting.await??;
    drop(connection);
    let preflight = ask(desk.address, "GET", "/health", "", "").await?;
    assert_eq!(preflight.status, 200);
    desk.stop().await
}
