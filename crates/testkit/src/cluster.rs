//! Several paired nodes on this machine, each with its own data directory.

use crate::eventually::eventually;
use crate::node::{NodeProcess, NodeSetup};
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;
use tempfile::TempDir;

/// Running nodes; the first one made the cluster. Dropping it kills them and removes their state.
pub struct LocalCluster {
    /// The nodes, in the order they joined.
    pub nodes: Vec<NodeProcess>,
    folder: TempDir,
}

impl LocalCluster {
    /// Starts `size` nodes on the loopback and waits until all see each other.
    pub fn start(size: usize) -> Result<Self> {
        let mut cluster = Self { nodes: Vec::new(), folder: tempfile::tempdir()? };
        for _ in 0..size {
            cluster.add()?;
        }
        cluster.wait_until_all_alive()?;
        Ok(cluster)
    }

    /// Starts one more node; it joins by a long token and the address of the first one.
    pub fn add(&mut self) -> Result<&NodeProcess> {
        let index = self.nodes.len();
        let mut setup = NodeSetup { name: format!("node{index}"), ..NodeSetup::default() };
        if let Some(first) = self.nodes.first() {
            let invite = first.json(&["invite"])?;
            setup.invite = Some(invite["token"].as_str().context("an invite has a token")?.to_owned());
            setup.peers = vec![first.ready.grpc.clone()];
        }
        let node = NodeProcess::start(&self.folder.path().join(format!("node{index}")), &setup)?;
        self.nodes.push(node);
        self.nodes.last().context("just added")
    }

    /// The first node: the one that made the cluster.
    pub fn first(&self) -> &NodeProcess {
        &self.nodes[0]
    }

    /// Waits until every node sees every other one alive.
    pub fn wait_until_all_alive(&self) -> Result<()> {
        for node in &self.nodes {
            eventually(Duration::from_secs(20), || {
                let status = node.json(&["status"])?;
                let alive = status["nodes"]
                    .as_array()
                    .context("nodes")?
                    .iter()
                    .filter(|entry| entry["state"] == "alive")
                    .count();
                ensure!(alive == self.nodes.len(), "{alive} of {} alive: {status}", self.nodes.len());
                Ok(())
            })?;
        }
        Ok(())
    }
}
