//! The listener itself: who is let in, what is told about models, how it ends.

use crate::client::{ask, get, raw};
use crate::desk::Desk;
use anyhow::Result;
use mlxnode_api::http::HttpOptions;
use mlxnode_api::http::routes::routes;
use serde_json::json;

#[tokio::test]
async fn tells_its_health_and_its_models() -> Result<()> {
    let desk = Desk::start().await?;
    let health = get(desk.address, "/health").await?;
    assert_eq!((health.status, health.json()?), (200, json!({"status": "ok"})));
    let models = get(desk.address, "/v1/models").await?.json()?;
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], "demo");
    assert_eq!(models["data"][0]["max_model_len"], 512);
    assert_eq!(models["data"][1]["state"], "loading");
    assert_eq!(get(desk.address, "/v1/models/demo").await?.json()?["object"], "model");
    let missing = get(desk.address, "/v1/models/org/none").await?;
    assert_eq!((missing.status, &missing.json()?["error"]["code"]), (404, &json!("model_not_found")));
    desk.stop().await
}

#[tokio::test]
async fn what_is_not_there_is_an_error_with_a_body() -> Result<()> {
    let desk = Desk::start().await?;
    let cases = [
        ("GET", "/nothing", 404, "unknown_url"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/models", 405, "method_not_allowed"),
    ];
    for (method, path, status, code) in cases {
        let reply = ask(desk.address, method, path, "", "").await?;
        assert_eq!(
            (reply.status, &reply.json()?["error"]["code"]),
            (status, &json!(code)),
            "{method} {path}"
        );
    }
    desk.stop().await
}

#[tokio::test]
async fn other_names_and_other_pages_are_refused() -> Result<()> {
    let desk = Desk::start().await?;
    let named = |host: &str| format!("GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    for (host, status) in
        [("localhost:1", 200), ("STUDIO", 200), ("evil.example", 403), ("", 403), ("10.1.2.3", 403)]
    {
        assert_eq!(raw(desk.address, named(host).as_bytes()).await?.status, status, "{host}");
    }
    let without = raw(desk.address, b"GET /health HTTP/1.0\r\n\r\n").await?;
    assert_eq!(without.status, 403);
    let foreign = ask(desk.address, "GET", "/health", "origin: https://evil.example\r\n", "").await?;
    assert_eq!(foreign.status, 403);
    assert!(!foreign.headers.contains("access-control"), "{}", foreign.headers);
    desk.stop().await
}

#[tokio::test]
async fn an_allowed_page_is_told_that_it_is() -> Result<()> {
    let origins = vec!["https://chat.example".to_owned()];
    let desk = Desk::with(HttpOptions { origins, ..HttpOptions::local() }).await?;
    let headers = "origin: https://chat.example\r\naccess-control-request-method: POST\r\n\
                   access-control-request-headers: authorization, content-type\r\n";
    let preflight = ask(desk.address, "OPTIONS", "/v1/models", headers, "").await?;
    assert_eq!(preflight.status, 204);
    for header in [
        "allow-origin: https://chat.example",
        "allow-headers: authorization, content-type",
        "allow-methods: get, post",
    ] {
        assert!(preflight.headers.contains(header), "{header} in {}", preflight.headers);
    }
    let asked = ask(desk.address, "GET", "/v1/models", "origin: https://chat.example\r\n", "").await?;
    assert_eq!(asked.status, 200);
    assert!(asked.headers.contains("access-control-allow-origin: https://chat.example"), "{}", asked.headers);
    desk.stop().await
}

#[tokio::test]
async fn a_taken_port_moves_only_when_nobody_named_it() -> Result<()> {
    let desk = Desk::start().await?;
    let named = HttpOptions { listen: desk.address, any_port_will_do: false, ..HttpOptions::local() };
    let error = mlxnode_api::http::HttpServer::bind(named.clone()).await.unwrap_err();
    assert_eq!(error.address, desk.address);
    let other = mlxnode_api::http::HttpServer::bind(HttpOptions { any_port_will_do: true, ..named }).await?;
    assert!(other.moved() && other.address().port() != desk.address.port());
    desk.stop().await
}

#[tokio::test]
async fn too_many_connections_are_told_so_and_others_go_on() -> Result<()> {
    let desk = Desk::start().await?;
    let mut held = Vec::new();
    for _ in 0..1024 {
        held.push(tokio::net::TcpStream::connect(desk.address).await?);
    }
    let refused = get(desk.address, "/health").await?;
    assert_eq!((refused.status, &refused.json()?["error"]["code"]), (503, &json!("service_unavailable")));
    assert!(refused.headers.contains("retry-after"), "{}", refused.headers);
    drop(held);
    let mut status = 503;
    for _ in 0..200 {
        status = get(desk.address, "/health").await?.status;
        if status == 200 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(status, 200);
    desk.stop().await
}

#[test]
fn every_route_says_who_may_call_it() {
    let mut seen = std::collections::BTreeSet::new();
    for route in routes() {
        assert!(seen.insert((route.path, route.method.to_string())), "{} twice", route.path);
    }
    assert!(seen.len() > 2);
}
