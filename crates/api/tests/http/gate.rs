//! Every route times every credential; what keys may use, and what answers say about it.

use crate::client::{Reply, ask, get};
use crate::desk::Desk;
use anyhow::{Context as _, Result};
use mlxnode_api::gate::{Gate, GateOptions};
use mlxnode_api::http::HttpOptions;
use mlxnode_api::http::routes::{Access, routes};
use mlxnode_api::keys::{KeyEntry, KeyLimits, KeyRole, KeyText, KeysView};
use std::net::SocketAddr;
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
    let (metrics, metrics_entry) = key("metrics", 3, KeyRole::Metrics);
    let (revoked, revoked_entry) = key("revoked", 4, KeyRole::Admin);
    let valid = vec![user_entry, admin_entry, metrics_entry];
    let before = KeysView { keys: [valid.clone(), vec![revoked_entry]].concat(), is_known: true };
    let (desk, keys) = desk(before, GateOptions { is_public: true, requires_key: false }).await?;
    assert_eq!(with_key(desk.address, "GET", "/v1/models", Some(revoked.reveal())).await?.status, 200);
    keys.send_replace(KeysView { keys: valid, is_known: true });
    let never = KeyText::new(&[99; 32]);
    let credentials: [(&str, Option<&str>); 7] = [
        ("none", None),
        ("malformed", Some("sk-123")),
        ("wrong", Some(never.reveal())),
        ("revoked", Some(revoked.reveal())),
        ("user", Some(user.reveal())),
        ("metrics", Some(metrics.reveal())),
        ("admin", Some(admin.reveal())),
    ];
    let mut denied = 0;
    for route in routes() {
        let path = filled(route.path);
        for (name, credential) in credentials {
            let reply = with_key(desk.address, route.method.as_str(), &path, credential).await?;
            let may = match (route.access, name) {
                (Access::Open, _) | (_, "admin") => true,
                (Access::User, "user") => true,
                (Access::Metrics, "metrics") => true,
                _ => false,
            };
            let is_known = matches!(name, "user" | "metrics");
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
