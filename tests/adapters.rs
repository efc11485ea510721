//! Adapters over a cluster: two stages on two nodes give what mlx-lm gives with each adapter, several in one batch, before and after
//! losses.

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::{GenerateRequest, TokenIds, generate_request};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use mlxnode_testkit::oracle;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;

const TOKENS: u32 = 16;

#[derive(Deserialize)]
struct Answers {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    tokens: Vec<u32>,
}

fn prompts() -> Vec<Vec<u32>> {
    (0..3).map(|number| (0..8 + 13 * number).map(|place| 40 + (place * 7 + number) % 300).collect()).collect()
}

/// Two adapters of the demo model, made by mlx-lm, and the greedy tokens after each prompt with each of them.
fn made_by_mlx_lm(folder: &Path) -> Result<[(PathBuf, Vec<Vec<u32>>); 2]> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/hub/demo-model/model");
    let adapters = ["one", "two"].map(|name| folder.join(name));
    let case = |seed: usize| {
        json!({"model": model, "adapter": adapters[seed], "kind": "lora", "layers": -1, "seed": seed,
            "parameters": {"rank": 4 + seed, "scale": 12.0, "dropout": 0.0}, "prompts": prompts(), "tokens": TOKENS})
    };
    let request = folder.join("request.json");
    std::fs::write(&request, json!({"cases": [case(0), case(1)]}).to_string())?;
    let answers: Answers = oracle::run("adapters.py", &[request.to_str().context("a path in UTF-8")?])?;
    let mut expected =
        answers.cases.into_iter().map(|case| case.runs.into_iter().map(|run| run.tokens).collect());
    let [one, two] = adapters;
    Ok([(one, expected.next().context("one")?), (two, expected.next().context("two")?)])
}

async fn client(node: &NodeProcess) -> Result<InferenceClient<Channel>> {
    Ok(InferenceClient::new(
        connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")?,
    ))
}

async fn ask(mut client: InferenceClient<Channel>, model: String, prompt: Vec<u32>) -> Result<Vec<u32>> {
    let input = Some(generate_request::Input::Tokens(TokenIds { ids: prompt }));
    let request =
        GenerateRequest { model, input, max_tokens: TOKENS, ignore_eos: true, ..GenerateRequest::default() };
    let mut stream = client.generate(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = stream.message().await? {
        tokens.extend(response.token_ids);
    }
    Ok(tokens)
}

/// Every prompt with every adapter and without, all at once.
async fn all(client: &InferenceClient<Channel>) -> Result<Vec<Vec<u32>>> {
    let models = ["demo:one", "demo", "demo:two"];
    let pairs =
        prompts().into_iter().flat_map(|prompt| models.map(|model| (model.to_owned(), prompt.clone())));
    try_join_all(pairs.map(|(model, prompt)| ask(client.clone(), model, prompt))).await
}

fn post(node: &NodeProcess, path: &str, body: &Value) -> Result<(u16, Value)> {
    let url = node.ready.http.as_deref().context("an HTTP listener")?;
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = agent.post(format!("{url}{path}")).send(body.to_string())?;
    let status = answer.status().as_u16();
    Ok((status, serde_json::from_str(&answer.body_mut().read_to_string()?)?))
}

fn is_ready(node: &NodeProcess) -> Result<()> {
    eventually(Duration::from_secs(60), || {
        let status = node.json(&["status"])?;
        let deployment = &status["deployments"][0];
        ensure!(deployment["state"] == "ready", "{status}");
        ensure!(deployment["adapters"].as_array().is_some_and(|adapters| adapters.len() == 2), "{status}");
        Ok(())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn story_adapters_do_over_two_nodes_what_they_do_in_mlx_lm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [(one, with_one), (two, with_two)] = made_by_mlx_lm(folder.path())?;
    let mut cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo", "--stages", "2", "--sequences", "9"])?;
    let front = client(&cluster.nodes[1]).await?;
    let mut plain = Vec::new();
    for prompt in prompts() {
        plain.push(ask(front.clone(), String::new(), prompt).await?);
    }

    // Before there are any, asking for one says so.
    let refused = ask(front.clone(), "demo:one".into(), vec![50]).await;
    let refused = refused.err().context("an unknown adapter is refused")?;
    let status = refused.downcast_ref::<tonic::Status>().context("a status")?;
    assert_eq!(status.code(), Code::NotFound, "{status}");

    let (one, two) = (one.display().to_string(), two.display().to_string());
    let loaded = cluster.nodes[1].json(&["adapters", "load", "demo", &one])?;
    assert_eq!(loaded["id"], "demo:one");
    let (status, loaded) =
        post(cluster.first(), "/v1/load_lora_adapter", &json!({"lora_name": "two", "lora_path": two}))?;
    assert_eq!((status, &loaded["id"]), (200, &json!("demo:two")), "{loaded}");
    cluster.first().json(&["adapters", "load", "demo", &one])?; // twice is once

    let mut expected = Vec::new();
    for ((one, plain), two) in with_one.iter().zip(&plain).zip(&with_two) {
        expected.extend([one.clone(), plain.clone(), two.clone()]);
    }
    assert_eq!(all(&front).await?, expected);

    // Other people's mistakes.
    let node = cluster.first();
    let completion = |model: &str| json!({"model": model, "prompt": [50, 51], "max_tokens": 2});
    let (status, answer) = post(node, "/v1/completions", &completion("demo:three"))?;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")), "{answer}");
    assert!(answer["error"]["message"].as_str().is_some_and(|text| text.contains("one, two")), "{answer}");
    assert_eq!(post(node, "/v1/completions", &completion("demo:two"))?.0, 200);
    for (body, status) in [
        (json!({"lora_name": "one", "lora_path": two}), 409),
        (json!({"lora_name": "x", "lora_path": folder.path()}), 400),
        (json!({"lora_name": "x", "lora_path": "/nowhere/at/all"}), 404),
        (json!({"lora_name": "a:b", "lora_path": one}), 400),
        (json!({"lora_name": "x", "lora_path": one, "model": "gpt"}), 404),
        (json!({"lora_path": one}), 400),
    ] {
        let (found, answer) = post(node, "/v1/load_lora_adapter", &body)?;
        assert_eq!(found, status, "{body}: {answer}");
    }
    let models = ureq::get(format!("{}/v1/models", node.ready.http.as_deref().context("http")?)).call()?;
    let models: Value = serde_json::from_str(&models.into_body().read_to_string()?)?;
    let ids: Vec<&str> =
        models["data"].as_array().context("data")?.iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(ids, ["demo", "demo:one", "demo:two"]);
    assert_eq!(models["data"][1]["parent"], "demo");

    // A worker that is lost comes back with the adapters, and so does a coordinator.
    let status = node.json(&["status"])?;
    let epoch = status["deployments"][0]["epoch"].clone();
    let pid = status["deployments"][0]["stages"][1]["worker_pid"].as_i64().context("a worker")?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    eventually(Duration::from_secs(60), || {
        let status = node.json(&["status"])?;
        ensure!(status["deployments"][0]["epoch"] != epoch, "{status}");
        Ok(())
    })?;
    is_ready(node)?;
    is_ready(&cluster.nodes[1])?;
    assert_eq!(all(&front).await?, expected);
    cluster.restart(0)?;
    is_ready(cluster.first())?;
    assert_eq!(all(&client(cluster.first()).await?).await?, expected);

    cluster.first().json(&["adapters", "unload", "demo", "one"])?;
    let (status, answer) = post(cluster.first(), "/v1/completions", &completion("demo:one"))?;
    assert_eq!(status, 404, "{answer}");
    let (status, _) = post(cluster.first(), "/v1/unload_lora_adapter", &json!({"lora_name": "two"}))?;
    assert_eq!(status, 200);
    assert_eq!(cluster.first().json(&["adapters", "list"])?, json!({"adapters": []}));
    Ok(())
}

/// Beside the model and what it reserved, an adapter has what is left of the node's memory: more is refused before it is read.
#[test]
fn story_an_adapter_for_which_there_is_no_memory_is_refused_with_figures() -> Result<()> {
    let cluster = LocalCluster::start_with(1, &["--memory-budget", "120MB"])?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let status = node.json(&["status"])?;
    let of = |name: &str| status["nodes"][0][name].as_u64().with_context(|| format!("{name} in {status}"));
    let left = of("memory_budget_bytes")? - of("memory_used_bytes")?;
    let folder = tempfile::tempdir()?;
    let refused = |name: &str, bytes: u64| -> Result<String> {
        let adapter = folder.path().join(name);
        std::fs::create_dir_all(&adapter)?;
        std::fs::write(adapter.join("adapter_config.json"), "{}")?;
        std::fs::File::create(adapter.join("adapters.safetensors"))?.set_len(bytes)?;
        let output = node.output(&["adapters", "load", "demo", adapter.to_str().context("utf-8")?])?;
        ensure!(!output.status.success(), "{name} was loaded");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let said = refused("large", left + (1 << 20))?;
    for words in ["no memory for the adapter large", "it takes", "is left", "--memory-budget"] {
        ensure!(said.contains(words), "no {words:?} in {said}");
    }
    // What fits is read: of this one nothing but zeros comes.
    let said = refused("small", 1 << 20)?;
    ensure!(!said.contains("no memory"), "{said}");
    let listed = node.json(&["adapters", "list"])?.to_string();
    ensure!(!listed.contains("large") && !listed.contains("small"), "{listed}");
    Ok(())
}
