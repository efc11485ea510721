//! Anthropic's official client against the demo model on two nodes: the one that is asked has no layer of it.

use anyhow::{Context as _, Result};
use mlxnode_testkit::clients;
use mlxnode_testkit::cluster::LocalCluster;

#[test]
fn story_anthropics_client_talks_to_the_demo_model_of_another_node() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo", "--node", "node0"])?;
    let http = cluster.nodes[1].ready.http.clone().context("an HTTP listener")?;
    clients::run("anthropic_suite.py", &http, "demo", "demo")
}
