//! OpenAI's official client against the demo model on a node as people start it.

use anyhow::{Context as _, Result};
use mlxnode_testkit::clients;
use mlxnode_testkit::cluster::LocalCluster;

#[test]
fn story_openais_client_talks_to_the_demo_model() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let status = node.json(&["status"])?;
    assert_eq!(status["http"], http.as_str(), "status tells the address");
    clients::run("openai_suite.py", &http, "demo", "demo")
}

/// Through a node that does not coordinate: files are found and jobs are owned wherever somebody asks.
#[test]
fn story_openais_client_fine_tunes_the_demo_model() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo"])?;
    let other = cluster.nodes[1].ready.http.clone().context("an HTTP listener")?;
    clients::run("fine_tuning_suite.py", &other, "demo", "demo")
}
