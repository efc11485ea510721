//! Several models at once: replicas, a time to stay, room for others, loads on demand.

use anyhow::{Context as _, Result, ensure};
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::{GenerateRequest, TokenIds, generate_request};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::time::Duration;

async fn ask(node: &NodeProcess, model: &str, ids: Vec<u32>) -> Result<Vec<u32>> {
    let channel = connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")?;
    let input = Some(generate_request::Input::Tokens(TokenIds { ids }));
    let request = GenerateRequest {
        model: model.to_owned(),
        input,
        max_tokens: 8,
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let mut stream = InferenceClient::new(channel).generate(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = stream.message().await? {
        tokens.extend(response.token_ids);
    }
    Ok(tokens)
}

/// Everything that is loaded, as "name replica state".
fn loaded(node: &NodeProcess) -> Result<Vec<String>> {
    let status = node.json(&["status"])?;
    let all = status["deployments"].as_array().context("deployments")?;
    let text = |it: &Value| {
        format!(
            "{} {} {}",
            it["model"].as_str().unwrap_or("?"),
            it["replica"],
            it["state"].as_str().unwrap_or("?")
        )
    };
    Ok(all.iter().map(text).collect())
}

fn until(node: &NodeProcess, expected: &[&str]) -> Result<()> {
    eventually(Duration::from_secs(60), || {
        let found = loaded(node)?;
        ensure!(found == expected, "{found:?}, not {expected:?}");
        Ok(())
    })
}

fn get(node: &NodeProcess, path: &str) -> Result<String> {
    let url = node.ready.http.as_deref().context("an HTTP listener")?;
    Ok(ureq::get(format!("{url}{path}")).call()?.into_body().read_to_string()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn story_two_replicas_answer_as_one_model() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let first = cluster.first();
    let refused = first.output(&["load", "demo", "--replicas", "3"])?;
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && words.contains("further replica"), "{words}");
    until(first, &[])?; // a load is whole or not at all
    first.json(&["load", "demo", "--replicas", "2", "--pin"])?;
    until(&cluster.nodes[1], &["demo 1 ready", "demo 2 ready"])?;
    let models: Value = serde_json::from_str(&get(first, "/v1/models")?)?;
    assert_eq!(models["data"].as_array().map(Vec::len), Some(1), "{models}");

    // Many prompts with three beginnings: each beginning has a home, and both replicas work.
    let beginning =
        |kind: u32| (0..130).map(move |place| 40 + (place * 11 + kind * 17) % 300).collect::<Vec<u32>>();
    let expected = ask(first, "", beginning(0)).await?;
    for round in 0..4 {
        for kind in 0..3 {
            let mut prompt = beginning(kind);
            prompt.extend((0..round).map(|it| 50 + it));
            ask(first, "demo", prompt).await?;
        }
    }
    assert_eq!(ask(&cluster.nodes[1], "demo", beginning(0)).await?, expected, "whoever answers");
    for node in &cluster.nodes {
        let figures = get(node, "/metrics")?;
        let steps = figures.lines().find(|line| line.starts_with("mlxnode_stage_steps_total{"));
        let line = steps.context("a stage runs here")?;
        assert!(line.contains("model_name=\"demo\""), "{line}");
        let steps: f64 = line.rsplit(' ').next().context("a number")?.parse()?;
        assert!(steps > 8.0, "this replica worked too: {line}");
    }

    // One replica dies: requests go to the other at once, and it comes back.
    let status = first.json(&["status"])?;
    let second = &status["deployments"][1];
    let pid = second["stages"][0]["worker_pid"].as_i64().context("a worker")?;
    let epoch = second["epoch"].clone();
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    eventually(Duration::from_secs(60), || {
        ensure!(first.json(&["status"])?["deployments"][1]["epoch"] != epoch, "the loss is not known yet");
        Ok(())
    })?;
    for _ in 0..4 {
        assert_eq!(ask(first, "demo", beginning(0)).await?, expected);
    }
    until(first, &["demo 1 ready", "demo 2 ready"])?;
    first.json(&["unload", "demo"])?;
    until(&cluster.nodes[1], &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn story_models_come_when_asked_and_go_when_not() -> Result<()> {
    // Room for one demo model and not for two: about 4 MB of weights, the rest is a worker's reserve and its caches.
    let cluster = LocalCluster::start_with(1, &["--memory-budget", "120MB", "--load-on-demand", "4s"])?;
    let node = cluster.first();
    // Nobody loads what is not here, nor folders.
    for model in ["gpt-9", "/tmp", "nobody/nothing-at-all"] {
        let error = ask(node, model, vec![50]).await.err().context("refused")?;
        assert!(error.to_string().contains("is loaded"), "{model}: {error}");
    }
    // The first one who asks loads it; others wait with it.
    let (one, two) = tokio::join!(ask(node, "demo", vec![50, 60]), ask(node, "demo", vec![50, 60]));
    assert_eq!(one?, two?);
    let status = node.json(&["status"])?;
    assert_eq!(status["deployments"][0]["ttl_seconds"], 4, "{status}");
    let adapters = node.output(&["adapters", "list", "nobody"])?;
    assert!(!adapters.status.success());
    // It goes when nobody asks, and comes again.
    until(node, &[])?;
    ask(node, "demo", vec![50]).await?;

    // An explicit load takes no room from anybody, unless it may; a pinned model gives none.
    let refused = node.output(&["load", "demo", "--name", "other"])?;
    assert!(!refused.status.success(), "two do not fit");
    node.json(&["load", "demo", "--name", "other", "--pin", "--make-room"])?;
    assert_eq!(loaded(node)?, ["other 1 ready"]);
    let error = ask(node, "demo", vec![50]).await;
    assert!(error.is_ok(), "by its source it is the pinned one: {error:?}");
    let refused = node.output(&["load", "demo", "--name", "third", "--make-room"])?;
    assert!(!refused.status.success(), "nobody goes for it");
    assert_eq!(loaded(node)?, ["other 1 ready"]);
    let wrong = node.output(&["load", "demo", "--pin", "--ttl", "1m"])?;
    assert_eq!(wrong.status.code(), Some(2));

    // With a time of its own.
    node.json(&["unload", "other"])?;
    node.json(&["load", "demo", "--ttl", "2s"])?;
    let body = json!({"model": "demo", "prompt": [50], "max_tokens": 4}).to_string();
    let url = format!("{}/v1/completions", node.ready.http.as_deref().context("http")?);
    assert_eq!(ureq::post(&url).send(body)?.status().as_u16(), 200);
    until(node, &[])
}
