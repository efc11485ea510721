//! Every route times every credential; what keys may use, and what answers say about it.

use crate::client::{Reply, ask, get};
use crate::desk::Desk;
use anyhow::{Context as _, Result};
use mlxnode_api::front::{AnswerEvent, FrontError, GenerationRequest, Input};
use mlxnode_api::gate::{Gate, GateOptions};
use mlxnode_api::http::HttpOptions;
use mlxnode_api::http::routes::{Access, routes};
use mlxnode_api::keys::{KeyEntry, KeyLimits, KeyRole, KeyText, KeysView};
use mlxnode_api::metrics::{Metrics, Observations};
use mlxnode_compute::TraceContext;
use mlxnode_coordinator::requests::Parameters;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

fn key(name: &str, byte: u8, role: KeyRole) -> (KeyText, KeyEntry) {
    let text = KeyText::new(&[byte; 32]);
    let entry = KeyEntry {
        name: name.into(),
        hash: text.hash(),
        role,
        models: Vec::new(),
        limits: KeyLimits::default(),
        created_unix: 0,
    };
    (text, entry)
}

async fn desk(view: KeysView, options: GateOptions) -> Result<(Desk, watch::Sender<KeysView>)> {
    let (sender, keys) = watch::channel(view);
    let listener = HttpOptions { any_port_will_do: false, ..HttpOptions::local() };
    Ok((Desk::behind(listener, Gate::new(keys, options)).await?, sender))
}

/// A path of the table with something in the place of its parts.
fn filled(path: &str) -> String {
    let mut filled = String::new();
    for part in path.split('/').skip(1) {
        filled.push('/');
        filled.push_str(if part.starts_with('{') { "demo" } else { part });
    }
    filled
}

async fn with_key(address: SocketAddr, method: &str, path: &str, key: Option<&str>) -> Result<Reply> {
    let header = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    ask(address, method, path, &header, "").await
}

/// The matrix that decides who gets in: every route of the router, every state that a credential can be in.
#[tokio::test]
async fn every_route_denies_every_credential_that_is_not_meant_for_it() -> Result<()> {
    let (user, user_entry) = key("user", 1, KeyRole::User);
    let (admin, admin_entry) = key("admin", 2, KeyRole::Admin);
    let (trainer, trainer_entry) = key("trainer", 5, KeyRole::Trainer);
    let (metrics, metrics_entry) = key("metrics", 3, KeyRole::Metrics);
    let (revoked, revoked_entry) = key("revoked", 4, KeyRole::Admin);
    let valid = vec![user_entry, trainer_entry, admin_entry, metrics_entry];
    let before = KeysView { keys: [valid.clone(), vec![revoked_entry]].concat(), is_known: true };
    let (desk, keys) = desk(before, GateOptions { is_public: true, requires_key: false }).await?;
    assert_eq!(with_key(desk.address, "GET", "/v1/models", Some(revoked.reveal())).await?.status, 200);
    keys.send_replace(KeysView { keys: valid, is_known: true });
    let never = KeyText::new(&[99; 32]);
    let credentials: [(&str, Option<&str>); 8] = [
        ("none", None),
        ("malformed", Some("sk-123")),
        ("wrong", Some(never.reveal())),
        ("revoked", Some(revoked.reveal())),
        ("user", Some(user.reveal())),
        ("trainer", Some(trainer.reveal())),
        ("metrics", Some(metrics.reveal())),
        ("admin", Some(admin.reveal())),
    ];
    let mut denied = 0;
    for route in routes() {
        let path = filled(route.path);
        for (name, credential) in credentials {
            let reply = with_key(desk.address, route.method.as_str(), &path, credential).await?;
            let may = matches!(
                (route.access, name),
                (Access::Open, _)
                    | (_, "admin")
                    | (Access::User | Access::Read, "user" | "trainer")
                    | (Access::Train, "trainer")
                    | (Access::Metrics, "metrics")
            );
            let is_known = matches!(name, "user" | "trainer" | "metrics");
            let expected = if is_known { 403 } else { 401 };
            if may {
                assert!(![401, 403].contains(&reply.status), "{} {path} {name}: {reply:?}", route.method);
            } else {
                denied += 1;
                assert_eq!(reply.status, expected, "{} {path} {name}", route.method);
                let error = &reply.json()?["error"];
                assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{reply:?}");
            }
        }
    }
    assert!(denied > routes().len(), "something was denied: {denied}");
    // What is in no table is not there, for nobody.
    for path in ["/v1/keys", "/admin", "/v1/models/../../metrics"] {
        let reply = with_key(desk.address, "GET", path, Some(admin.reveal())).await?;
        assert_eq!(reply.status, 404, "{path}");
    }
    desk.stop().await
}

#[tokio::test]
async fn anthropics_header_counts_as_well() -> Result<()> {
    let (text, entry) = key("user", 1, KeyRole::User);
    let (desk, _keys) = desk(KeysView { keys: vec![entry], is_known: true }, GateOptions::default()).await?;
    let header = format!("x-api-key: {}\r\n", text.reveal());
    assert_eq!(ask(desk.address, "GET", "/v1/models", &header, "").await?.status, 200);
    let refused = get(desk.address, "/v1/models").await?;
    assert_eq!((refused.status, refused.json()?["error"]["code"].as_str()), (401, Some("invalid_api_key")));
    assert!(refused.headers.contains("www-authenticate: bearer"), "{}", refused.headers);
    desk.stop().await
}

#[tokio::test]
async fn until_the_keys_are_known_nobody_is_let_in() -> Result<()> {
    let (desk, keys) = desk(KeysView::default(), GateOptions::default()).await?;
    let early = get(desk.address, "/v1/models").await?;
    assert_eq!(early.status, 503);
    assert!(early.headers.contains("retry-after: 1"), "{}", early.headers);
    assert_eq!(get(desk.address, "/health").await?.status, 200);
    keys.send_replace(KeysView { keys: Vec::new(), is_known: true });
    assert_eq!(get(desk.address, "/v1/models").await?.status, 200);
    desk.stop().await
}

#[tokio::test]
async fn limits_are_told_and_kept() -> Result<()> {
    let (text, mut entry) = key("user", 1, KeyRole::User);
    entry.limits = KeyLimits { requests_per_minute: Some(2), tokens_per_minute: Some(1000) };
    let (desk, _keys) = desk(KeysView { keys: vec![entry], is_known: true }, GateOptions::default()).await?;
    for left in ["1", "0"] {
        let reply = with_key(desk.address, "GET", "/v1/models", Some(text.reveal())).await?;
        assert_eq!(reply.status, 200);
        for line in [
            "x-ratelimit-limit-requests: 2".to_owned(),
            format!("x-ratelimit-remaining-requests: {left}"),
            "x-ratelimit-remaining-tokens: 1000".to_owned(),
        ] {
            assert!(reply.headers.contains(&line), "no {line} in {}", reply.headers);
        }
    }
    let asked = Instant::now();
    let refused = with_key(desk.address, "GET", "/v1/models", Some(text.reveal())).await?;
    assert!(asked.elapsed() < Duration::from_millis(500), "a refusal is quick");
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()?["error"]["type"], "rate_limit_exceeded");
    let wait: u64 = refused
        .headers
        .lines()
        .find_map(|line| line.strip_prefix("retry-after: "))
        .context("retry-after")?
        .parse()?;
    assert!((1..=30).contains(&wait), "{wait}");
    // Figures need no key here, and say what happened; the key is not in them.
    let figures = get(desk.address, "/metrics").await?;
    assert!(
        figures.body.contains("mlxnode_requests_rejected_total{reason=\"key_limit\"} 1"),
        "{}",
        figures.body
    );
    let answered = "mlxnode_http_answers_total{route=\"/v1/models\",status=\"200\"} 2";
    assert!(figures.body.contains(answered), "{}", figures.body);
    assert!(!figures.body.contains(&text.reveal()[4..]));
    desk.stop().await
}

#[tokio::test]
async fn a_key_that_is_held_to_models_sees_no_others() -> Result<()> {
    let (text, mut entry) = key("user", 1, KeyRole::User);
    entry.models = vec!["later".into()];
    let (desk, _keys) = desk(KeysView { keys: vec![entry], is_known: true }, GateOptions::default()).await?;
    let listed = with_key(desk.address, "GET", "/v1/models", Some(text.reveal())).await?.json()?;
    let names: Vec<&str> =
        listed["data"].as_array().context("data")?.iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(names, ["later"]);
    let mut told = Vec::new();
    for model in ["demo", "nothing"] {
        let reply =
            with_key(desk.address, "GET", &format!("/v1/models/{model}"), Some(text.reveal())).await?;
        assert_eq!(reply.status, 404);
        assert!(!reply.body.contains("demo"), "{}", reply.body);
        told.push(reply.json()?["error"]["message"].clone());
    }
    assert_eq!(told[0], told[1], "what is forbidden and what is not there look the same");
    // Whoever names none, or one of the others, is not told their names either.
    for (body, status) in [(r#"{"prompt": "hi"}"#, 400), (r#"{"prompt": "hi", "model": "demo"}"#, 404)] {
        let headers =
            format!("authorization: Bearer {}\r\ncontent-type: application/json\r\n", text.reveal());
        let reply = ask(desk.address, "POST", "/v1/completions", &headers, body).await?;
        assert_eq!(reply.status, status, "{body}: {reply:?}");
        assert!(!reply.body.contains("demo"), "{body}: {}", reply.body);
    }
    desk.stop().await
}

#[tokio::test]
async fn every_answer_has_a_request_id() -> Result<()> {
    let (desk, _keys) = desk(KeysView { keys: Vec::new(), is_known: true }, GateOptions::default()).await?;
    let id = |reply: &Reply| {
        let id = reply.headers.lines().find_map(|line| line.strip_prefix("x-request-id: "));
        id.map(str::to_owned).context("x-request-id")
    };
    let first = id(&get(desk.address, "/health").await?)?;
    let second = id(&get(desk.address, "/nothing").await?)?;
    assert_ne!(first, second);
    assert_eq!(first.len(), 32, "{first}");
    let trace = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    let traced = ask(desk.address, "GET", "/health", trace, "").await?;
    assert_eq!(id(&traced)?, "4bf92f3577b34da6a3ce929d0e0e4736");
    let own = ask(desk.address, "GET", "/health", "x-request-id: job-7\r\n", "").await?;
    assert_eq!(id(&own)?, "job-7");
    for bad in ["a b", "\"x\"", &"a".repeat(129)] {
        let reply = ask(desk.address, "GET", "/health", &format!("x-request-id: {bad}\r\n"), "").await?;
        assert_ne!(id(&reply)?, bad);
    }
    desk.stop().await
}

fn says(text: &str, tenant: String) -> GenerationRequest {
    GenerationRequest {
        model: "demo".into(),
        input: Input::Prompt(format!("SAY {text}")),
        parameters: Parameters { max_tokens: 20, ..Parameters::default() },
        extra_eos: Vec::new(),
        deadline: None,
        tenant,
        trace: TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        is_read: false,
    }
}

#[tokio::test]
async fn tokens_are_counted_for_the_key_that_asked_and_in_the_figures() -> Result<()> {
    let (text, mut entry) = key("user", 1, KeyRole::User);
    entry.limits.tokens_per_minute = Some(1000);
    let view = KeysView { keys: vec![entry.clone()], is_known: true };
    let (_keys, receiver) = watch::channel(view);
    let gate = Gate::new(receiver, GateOptions::default());
    let desk = Desk::start().await?;
    let metrics = Arc::new(Metrics::default());
    let front = desk.front.clone().counting(metrics.clone(), Some(gate.clone()));
    gate.admit(Access::User, Some(text.reveal()), Instant::now())?;

    let mut answer = front.generate(says("hi", entry.tenant())).await?;
    let mut summary = None;
    while let Some(event) = answer.next().await {
        if let AnswerEvent::Ended { summary: told, .. } = event? {
            summary = Some(told);
        }
    }
    let summary = summary.context("it ended")?;
    let used = (summary.prompt_tokens + summary.generation_tokens) as u64;
    assert!(used > 2, "{used}");
    let left = gate.admit(Access::User, Some(text.reveal()), Instant::now())?.balance.tokens;
    let left = left.context("a balance")?.remaining;
    // The bucket fills while the test runs: 1000 a minute are 17 a second.
    assert!((1000 - used..1000 - used + 100).contains(&left), "{left} left, {used} used");
    // Its trace goes with it, and nothing else of the client.
    let seen = desk.replicas.last();
    assert_eq!(seen.spec.trace.map(|trace| trace.id()).as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
    assert_eq!(seen.tenant, entry.tenant());

    // Who hangs up is counted as well.
    drop(front.generate(says("WAIT", String::new())).await?);
    let figures = metrics.text(Observations::default())?;
    for (line, value) in [
        ("vllm:request_success_total{model_name=\"demo\",finished_reason=\"stop\"}", 1.0),
        ("vllm:request_success_total{model_name=\"demo\",finished_reason=\"abort\"}", 1.0),
        ("vllm:generation_tokens_total{model_name=\"demo\"}", summary.generation_tokens as f64),
        ("vllm:prompt_tokens_total{model_name=\"demo\"}", summary.prompt_tokens as f64),
        ("vllm:prefix_cache_hits_total{model_name=\"demo\"}", 3.0),
    ] {
        let found = figures.lines().find_map(|it| it.strip_prefix(line)?.trim().parse::<f64>().ok());
        assert_eq!(found, Some(value), "{line} in {figures}");
    }
    assert!(!figures.contains("SAY"), "no prompt is in the figures");
    desk.stop().await
}

#[tokio::test]
async fn under_overload_a_refusal_says_when_to_come_back_and_costs_nothing() -> Result<()> {
    let desk = Desk::start().await?;
    let front = desk.front.clone();
    let mut full = front.generate(says("QUEUE FULL", String::new())).await?;
    let refused = full.next().await.context("an answer")?;
    assert!(matches!(refused, Err(FrontError::Busy { .. })), "{refused:?}");
    let asked = desk.replicas.seen.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.len();
    let mut times = Vec::new();
    let begin = Instant::now();
    // What a replica refused a moment ago is refused here, before it is tokenized.
    while begin.elapsed() < Duration::from_millis(50) {
        let started = Instant::now();
        let refused = front.generate(says(&"long ".repeat(400), String::new())).await.err();
        times.push(started.elapsed());
        let Some(FrontError::Busy { retry_after, .. }) = refused else { anyhow::bail!("{refused:?}") };
        assert!(retry_after >= Duration::from_secs(1));
    }
    times.sort();
    let p99 = times[(times.len() - 1) * 99 / 100];
    assert!(p99 < Duration::from_millis(10), "{p99:?} of {}", times.len());
    assert_eq!(desk.replicas.seen.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.len(), asked);
    // And then somebody is let through to see.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(front.generate(says("hi", String::new())).await.is_ok());
    desk.stop().await
}
