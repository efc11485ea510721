//! Hundreds of requests that are wrong: each is answered soon by a typed error, and the listener goes on.

use crate::client::{Reply, get, post, raw};
use crate::desk::Desk;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Refusals come at once; a busy machine gets a few more tries.
const SOON: Duration = Duration::from_millis(50);

fn check(reply: &Reply, what: &str) -> Result<()> {
    ensure!((400..500).contains(&reply.status), "{what}: {reply:?}");
    let body = reply.json().with_context(|| what.to_owned())?;
    let message = body["error"]["message"].as_str().with_context(|| format!("{what}: {body}"))?;
    ensure!(!message.is_empty() && message.len() < 2000, "{what}: {message}");
    ensure!(body["error"]["type"].is_string(), "{what}: {body}");
    Ok(())
}

async fn soon(address: SocketAddr, path: &str, body: &Value, what: &str) -> Result<()> {
    let mut took = Duration::MAX;
    for _ in 0..8 {
        let started = Instant::now();
        check(&post(address, path, body).await?, what)?;
        took = took.min(started.elapsed());
        if took <= SOON {
            return Ok(());
        }
    }
    anyhow::bail!("{what} took {took:?}")
}

/// Values that do not fit what the document says about a field.
fn wrong(schema: &Value) -> Vec<Value> {
    let far = [json!(-1e30), json!(1e30), json!(u64::MAX)];
    let mut values = match schema["type"].as_str() {
        Some("number") => vec![json!("1"), json!([]), json!({}), json!(true)],
        Some("integer") => vec![json!("1"), json!([1]), json!({}), json!(true), json!(1.5)],
        Some("string") => vec![json!(7), json!([]), json!({}), json!(false)],
        Some("boolean") => vec![json!("true"), json!(1), json!([]), json!({})],
        Some("array") => vec![json!(7), json!({}), json!("x"), json!(true)],
        Some("object") => vec![json!(7), json!([]), json!("x"), json!(true)],
        _ => Vec::new(),
    };
    if let Some(low) = schema["minimum"].as_f64() {
        values.extend([json!(low - 1.0), far[0].clone()]);
    }
    if let Some(high) = schema["maximum"].as_f64() {
        values.extend([json!(high + 1.0), far[1].clone()]);
    }
    if schema["type"] == "integer" {
        values.push(far[1].clone());
    }
    if schema["enum"].is_array() {
        values.push(json!("no such word"));
    }
    if let Some(most) = schema["maxItems"].as_u64() {
        values.push(Value::from(vec![json!("x"); most as usize + 1]));
    }
    values
}

#[tokio::test]
async fn every_documented_field_is_known_and_checked() -> Result<()> {
    let desk = Desk::start().await?;
    let document = get(desk.address, "/openapi.json").await?.json()?;
    let messages = json!([{"role": "user", "content": "SAY x"}]);
    let bodies = [
        ("/v1/chat/completions", "ChatCompletionRequest", json!({"messages": messages})),
        ("/v1/completions", "CompletionRequest", json!({"prompt": "SAY x"})),
        ("/v1/embeddings", "EmbeddingRequest", json!({"input": "x"})),
        ("/v1/responses", "ResponseRequest", json!({"input": "SAY x"})),
        ("/v1/messages", "MessageRequest", json!({"messages": messages, "max_tokens": 4})),
        ("/v1/messages/count_tokens", "CountTokensRequest", json!({"messages": messages})),
        ("/api/v1/plan", "PlanWish", json!({})),
        ("/api/v1/load", "LoadWish", json!({})),
        ("/api/v1/unload", "UnloadWish", json!({})),
        ("/v1/fine_tuning/jobs", "FineTuningRequest", json!({"training_file": "file-x"})),
        ("/api/v1/jobs/x/publish", "PublishWish", json!({})),
    ];
    let mut cases = 0;
    for (path, schema, mut good) in bodies {
        good["model"] = "demo".into();
        // The first request of a model reads its tokenizer.
        // There is no cluster behind this listener, which is told to those whose wish is sound.
        let sound = if path.starts_with("/api/") || path.contains("fine_tuning") { 503 } else { 200 };
        let reply = post(desk.address, path, &good).await?;
        ensure!(reply.status == sound, "{path}: {reply:?}");
        let schema = &document["components"]["schemas"][schema];
        let fields: &Map<String, Value> = schema["properties"].as_object().context("properties")?;
        for (field, schema) in fields {
            for value in wrong(schema) {
                // What has no effect is not looked at.
                if schema["description"]
                    .as_str()
                    .is_some_and(|words| words.starts_with("Accepted without effect"))
                {
                    continue;
                }
                let mut body = good.clone();
                body[field] = value.clone();
                let shown: String = value.to_string().chars().take(60).collect();
                let what = format!("{path} {field} = {shown}");
                soon(desk.address, path, &body, &what).await?;
                cases += 1;
            }
            // A documented field is never unknown, whatever stands in it.
            let mut body = good.clone();
            body[field] = json!({"x": []});
            let reply = post(desk.address, path, &body).await?;
            ensure!(
                !reply.body.contains(&format!("\"{field} is not a field")),
                "{path} {field}: {}",
                reply.body
            );
        }
        for field in schema["required"].as_array().context("required")?.iter().filter_map(Value::as_str) {
            let mut body = good.clone();
            body.as_object_mut().context("object")?.remove(field);
            soon(desk.address, path, &body, &format!("{path} without {field}")).await?;
            cases += 1;
        }
        for field in ["", "x", "Model", "n ", "__proto__", "постой"] {
            let mut body = good.clone();
            body[field] = json!(1);
            soon(desk.address, path, &body, &format!("{path} with {field:?}")).await?;
            cases += 1;
        }
        for body in [json!([]), json!("x"), json!(7), Value::Null, json!(true), json!([good.clone()])] {
            soon(desk.address, path, &body, &format!("{path} {body}")).await?;
            cases += 1;
        }
    }
    assert!(cases >= 500, "only {cases}");
    assert_eq!(get(desk.address, "/health").await?.status, 200);
    desk.stop().await
}

#[tokio::test]
async fn bytes_that_are_no_request_end_their_connection_only() -> Result<()> {
    let desk = Desk::start().await?;
    let address = desk.address;
    let with_body = |headers: &str, body: &[u8]| {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{headers}\r\n"
        );
        [head.as_bytes(), body].concat()
    };
    let sized = |body: &[u8]| with_body(&format!("content-length: {}\r\n", body.len()), body);
    let deep = [b"{\"messages\": ".as_slice(), &b"[".repeat(200_000)].concat();
    let many = format!("{{\"messages\": [{}0]}}", "0,".repeat(1_100_000));
    let typed: Vec<(&str, Vec<u8>, u16)> = vec![
        ("no body", sized(b""), 400),
        ("half an object", sized(b"{\"messages\": ["), 400),
        ("no text", sized(b"{\"model\": \"\xff\xfe\"}"), 400),
        ("a lone surrogate", sized(b"{\"model\": \"\\ud800\"}"), 400),
        ("depth", sized(&deep), 400),
        ("a million values", sized(many.as_bytes()), 413),
        ("too long, declared", with_body("content-length: 99999999\r\n", b"{}"), 413),
        ("a broken chunk", with_body("transfer-encoding: chunked\r\n", b"zz\r\n{}\r\n"), 400),
        (
            "a name twice",
            format!(
                "GET /v1/models HTTP/1.1\r\nhost: a.example\r\nhost: {address}\r\nconnection: close\r\n\r\n"
            )
            .into_bytes(),
            403,
        ),
        (
            "another way",
            format!("PATCH /v1/models HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").into_bytes(),
            405,
        ),
        (
            "a path above",
            format!("GET /../../etc/passwd HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")
                .into_bytes(),
            404,
        ),
        (
            "an escaped path",
            format!("GET /v1/models/%ff%00 HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")
                .into_bytes(),
            400,
        ),
    ];
    for (what, request, status) in typed {
        let reply = raw(address, &request).await.with_context(|| what.to_owned())?;
        assert_eq!(reply.status, status, "{what}: {}", reply.body);
        check(&reply, what)?;
    }
    // What is not even HTTP is refused below the endpoints, with a status and no words. (The limit on headers is one on the buffer,
    // which may take a read more than that.)
    let long = format!("GET / HTTP/1.1\r\nhost: {address}\r\nx: {}\r\n\r\n", "y".repeat(300_000));
    let headers = (0..200).map(|index| format!("x{index}: y\r\n")).collect::<String>();
    let crowd = format!("GET / HTTP/1.1\r\nhost: {address}\r\n{headers}\r\n");
    let bytes: Vec<(&str, &[u8])> = vec![
        ("noise", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("no version", b"GET /\r\n\r\n"),
        ("another protocol", b"SSH-2.0-OpenSSH\r\n"),
        ("a long header", long.as_bytes()),
        ("two hundred headers", crowd.as_bytes()),
        (
            "two lengths",
            b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        ),
        ("no length at all", b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\nx"),
    ];
    for (what, request) in bytes {
        // Or it is closed without a word.
        if let Ok(reply) = raw(address, request).await {
            assert!((400..500).contains(&reply.status), "{what}: {reply:?}");
        }
        assert_eq!(get(address, "/health").await?.status, 200, "after {what}");
    }
    desk.stop().await
}

/// Measured where the system tells it simply; the code is the same everywhere.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn memory_stays_where_it_is() -> Result<()> {
    let resident = || -> Option<u64> {
        let pages =
            std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse::<u64>().ok()?;
        Some(pages * 4096)
    };
    let desk = Desk::start().await?;
    let large = json!({"model": "demo", "messages": [{"role": "user", "content": "x"}], "typo": vec!["x".repeat(64); 1 << 16]});
    let round = async || -> Result<()> {
        for _ in 0..8 {
            ensure!(post(desk.address, "/v1/chat/completions", &large).await?.status == 400);
        }
        Ok(())
    };
    round().await?;
    let before = resident().context("statm")?;
    for _ in 0..4 {
        round().await?;
    }
    let grown = resident().context("statm")?.saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
    desk.stop().await
}
