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
    /// Further arguments of every `join`.
    arguments: Vec<String>,
}

impl LocalCluster {
    /// Starts `size` nodes on the loopback and waits until all see each other.
    pub fn start(size: usize) -> Result<Self> {
        Self::start_with(size, &[])
    }

    /// As [`LocalCluster::start`], with further arguments for every `join`.
    pub fn start_with(size: usize, arguments: &[&str]) -> Result<Self> {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut cluster = Self { nodes: Vec::new(), folder: tempfile::tempdir()?, arguments };
        for _ in 0..size {
            cluster.add()?;
        }
        cluster.wait_until_all_alive()?;
        Ok(cluster)
    }

    /// Starts one more node; it joins by a long token and the address of the first one.
    pub fn add(&mut self) -> Result<&NodeProcess> {
        let index = self.nodes.len();
        let mut setup = self.setup(index);
        if let Some(first) = self.nodes.first() {
            let invite = first.json(&["invite"])?;
            setup.invite = Some(invite["token"].as_str().context("an invite has a token")?.to_owned());
            setup.peers = vec![first.ready.grpc.clone()];
        }
        let node = NodeProcess::start(&self.data_dir(index), &setup)?;
        self.nodes.push(node);
        self.nodes.last().context("just added")
    }

    /// Ends a node politely and starts it again; it takes another port.
    pub fn restart(&mut self, index: usize) -> Result<()> {
        self.nodes.remove(index).stop(Duration::from_secs(15))?;
        let node = NodeProcess::start(&self.data_dir(index), &self.setup(index))?;
        self.nodes.insert(index, node);
        Ok(())
    }

    /// Starts a node again that was killed, once it is gone.
    pub fn revive(&mut self, index: usize) -> Result<()> {
        let killed = self.nodes.remove(index);
        let data_dir = killed.data_dir().to_owned();
        drop(killed);
        self.nodes.insert(index, NodeProcess::start(&data_dir, &self.setup(index))?);
        Ok(())
    }

    /// How the node of this number is started again; who was a member needs no invite.
    pub fn setup(&self, index: usize) -> NodeSetup {
        NodeSetup { name: format!("node{index}"), arguments: self.arguments.clone(), ..NodeSetup::default() }
    }

    fn data_dir(&self, index: usize) -> std::path::PathBuf {
        self.folder.path().join(format!("node{index}"))
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
