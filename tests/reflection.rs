//! A client in another language that knows only reflection lists the services and streams a generation.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::oracle;
use serde_json::Value;

#[test]
fn story_a_python_client_that_knows_only_reflection_streams_a_generation() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let folder = node.data_dir().join("client");
    let arguments = [&node.ready.grpc, folder.to_str().context("utf-8")?, "demo", "What is 17 + 25?"];
    let seen: Value = oracle::run("reflection_client.py", &arguments)?;
    let services: Vec<&str> =
        seen["services"].as_array().context("services")?.iter().filter_map(Value::as_str).collect();
    for service in [
        "mlxnode.v1.Inference",
        "mlxnode.v1.Models",
        "mlxnode.v1.Cluster",
        "mlxnode.v1.Keys",
        "mlxnode.v1.Jobs",
        "grpc.health.v1.Health",
    ] {
        ensure!(services.contains(&service), "{service} is not in {services:?}");
    }
    ensure!(seen["text"].as_str().context("text")?.contains("42"), "{seen}");
    ensure!(seen["messages"].as_u64() > Some(1), "the answer came as a stream: {seen}");
    assert_eq!(seen["finish"], "FINISH_REASON_STOP");
    assert_eq!(seen["serving"], 1);
    Ok(())
}
