//! The official clients against a model that says what it is told.

use crate::desk::Desk;
use anyhow::Result;
use mlxnode_testkit::clients;

async fn run(suite: &'static str) -> Result<()> {
    let desk = Desk::start().await?;
    let url = format!("http://{}", desk.address);
    tokio::task::spawn_blocking(move || clients::run(suite, &url, "demo", "scripted")).await??;
    desk.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn openais_client_sees_what_it_expects() -> Result<()> {
    run("openai_suite.py").await
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropics_client_sees_what_it_expects() -> Result<()> {
    run("anthropic_suite.py").await
}
