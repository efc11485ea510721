//! The page's files and the endpoints that it lives on, as far as they need no cluster; tests/page.rs has one.

use crate::client::{Reply, ask, get};
use crate::desk::Desk;
use anyhow::{Context as _, Result};
use mlxnode_api::gate::{Gate, GateOptions};
use mlxnode_api::jobs::{JobTable, JobView, LossPoint};
use mlxnode_api::keys::{KeyEntry, KeyLimits, KeyRole, KeyText, KeysView};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::watch;

fn header<'a>(reply: &'a Reply, name: &str) -> Result<&'a str> {
    let line = reply.headers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    line.with_context(|| format!("no {name} in {}", reply.headers))
}

#[tokio::test]
async fn the_page_comes_with_a_policy_and_is_kept_by_browsers() -> Result<()> {
    let desk = Desk::start().await?;
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ] {
        let reply = get(desk.address, path).await?;
        assert_eq!((reply.status, header(&reply, "content-type")?), (200, kind), "{path}");
        let policy = header(&reply, "content-security-policy")?;
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(header(&reply, "x-content-type-options")?, "nosniff");
        let tag = header(&reply, "etag")?.to_owned();
        for (known, status) in [(tag.clone(), 304), (format!("\"x\", W/{tag}"), 304), ("\"x\"".into(), 200)] {
            let again = ask(desk.address, "GET", path, &format!("if-none-match: {known}\r\n"), "").await?;
            assert_eq!((again.status, again.body.is_empty()), (status, status == 304), "{path} {known}");
        }
    }
    for path in ["/page/", "/page/x.js", "/page/..%2Findex.html", "/page/../style.css"] {
        assert_eq!(get(desk.address, path).await?.status, 404, "{path}");
    }
    desk.stop().await
}

#[tokio::test]
async fn a_link_from_another_site_leads_to_the_page_and_no_further() -> Result<()> {
    let desk = Desk::start().await?;
    let visit = "sec-fetch-site: cross-site\r\nsec-fetch-mode: navigate\r\n";
    for (method, path, headers, status) in [
        ("GET", "/", visit, 200),
        ("GET", "/", "sec-fetch-site: cross-site\r\nsec-fetch-mode: no-cors\r\n", 403),
        ("POST", "/", visit, 403),
        ("GET", "/api/v1/cluster", visit, 403),
        ("GET", "/v1/models", visit, 403),
    ] {
        let reply = ask(desk.address, method, path, headers, "").await?;
        assert_eq!(reply.status, status, "{method} {path} {headers}");
    }
    desk.stop().await
}

#[tokio::test]
async fn who_asks_is_told_who_they_are() -> Result<()> {
    let desk = Desk::start().await?;
    let session = get(desk.address, "/api/v1/session").await?.json()?;
    assert_eq!((&session["role"], &session["key"]), (&json!("admin"), &Value::Null));
    let without = get(desk.address, "/api/v1/cluster").await?;
    assert_eq!(without.status, 503, "there is no cluster here: {without:?}");
    desk.stop().await
}

struct Table;

impl JobTable for Table {
    fn jobs(&self) -> Vec<JobView> {
        let losses = vec![LossPoint { step: 10, training: Some(2.5), validation: None }];
        vec![JobView {
            id: "1".into(),
            kind: "fine-tuning".into(),
            model: "demo".into(),
            state: "running".into(),
            step: 10,
            steps: 100,
            losses,
            owner: "ann".into(),
            ..JobView::default()
        }]
    }
}

/// A key sees its own jobs, one that administers the cluster all.
#[tokio::test]
async fn jobs_are_shown_to_whom_they_belong() -> Result<()> {
    let entry = |name: &str, byte: u8, role| {
        let text = KeyText::new(&[byte; 32]);
        let (hash, limits) = (text.hash(), KeyLimits::default());
        (text, KeyEntry { name: name.into(), hash, role, models: Vec::new(), limits, created_unix: 0 })
    };
    let keys = [("ann", KeyRole::User), ("bob", KeyRole::User), ("root", KeyRole::Admin)];
    let keys: Vec<_> = keys.iter().zip(1..).map(|((name, role), byte)| entry(name, byte, *role)).collect();
    let view = KeysView { keys: keys.iter().map(|(_, entry)| entry.clone()).collect(), is_known: true };
    let (_sender, view) = watch::channel(view);
    let gate = Gate::new(view, GateOptions::default());
    let desk = Desk::with_jobs_behind(Arc::new(Table), gate).await?;
    for ((text, entry), seen) in keys.iter().zip([1, 0, 1]) {
        let header = format!("authorization: Bearer {}\r\n", text.reveal());
        let listed = ask(desk.address, "GET", "/api/v1/jobs", &header, "").await?.json()?;
        assert_eq!(listed["jobs"].as_array().map(Vec::len), Some(seen), "{}: {listed}", entry.name);
    }
    desk.stop().await
}

#[tokio::test]
async fn jobs_are_listed_with_their_curves() -> Result<()> {
    let desk = Desk::start().await?;
    assert_eq!(get(desk.address, "/api/v1/jobs").await?.json()?, json!({"jobs": []}));
    desk.stop().await?;
    let desk = Desk::with_jobs(Arc::new(Table)).await?;
    let listed = get(desk.address, "/api/v1/jobs").await?.json()?;
    assert_eq!(listed["jobs"][0]["kind"], "fine-tuning");
    let point = json!({"step": 10, "training": 2.5, "validation": null});
    assert_eq!(listed["jobs"][0]["losses"], json!([point]));
    desk.stop().await
}
