//! A cluster of real nodes that is asked by real clients.

use crate::bench::engine::token_ids;
use crate::bench::models::prompt;
use crate::bench::process::{Measured, cpu_of, measure, peak_memory_of};
use crate::node::{Cli, Node};
use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Name of the only deployment.
const NAME: &str = "bench";
/// Tokens of a client's prompt.
const PROMPT: usize = 16;
/// Longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// Running nodes; the first one made the cluster.
pub(in crate::bench) struct Cluster<'a> {
    nodes: Vec<Node<'a>>,
}

/// A model and how to spread it.
pub(in crate::bench) struct Load<'a> {
    pub(in crate::bench) folder: &'a Path,
    pub(in crate::bench) stages: usize,
    pub(in crate::bench) context: usize,
    pub(in crate::bench) sequences: usize,
}

/// A stage of the deployment, as `load --json` prints it.
#[derive(Clone, Debug, Deserialize)]
pub(in crate::bench) struct Stage {
    node: String,
    layer_start: u32,
    layer_end: u32,
    pub(in crate::bench) weight_bytes: u64,
    pub(in crate::bench) kv_bytes: u64,
    worker_pid: Option<u32>,
}

/// Clients that asked together.
pub(in crate::bench) struct Round {
    /// From the start of the first to the end of the last.
    pub(in crate::bench) wall: Duration,
    /// What each one got.
    pub(in crate::bench) answers: Vec<Vec<u32>>,
    /// CPU time of the node, the worker and the clients that took the most together; none where it is not known.
    pub(in crate::bench) busiest: Option<Duration>,
}

impl Round {
    /// How many tokens were generated.
    pub(in crate::bench) fn tokens(&self) -> f64 {
        self.answers.iter().map(Vec::len).sum::<usize>() as f64
    }
}

impl Stage {
    /// Such as `0..4`.
    pub(in crate::bench) fn layers(&self) -> String {
        format!("{}..{}", self.layer_start, self.layer_end)
    }

    /// The most that its worker held, in bytes.
    pub(in crate::bench) fn peak_memory(&self) -> Option<u64> {
        peak_memory_of(self.worker_pid?)
    }
}

impl<'a> Cluster<'a> {
    /// A node for each of `places`, paired, without mDNS so that clusters of a bench do not meet.
    pub(in crate::bench) fn start(folder: &Path, name: &str, places: &'a [Cli]) -> Result<Self> {
        let mut nodes: Vec<Node<'a>> = Vec::new();
        for (index, cli) in places.iter().enumerate() {
            let node = format!("{name}{index}");
            let data_dir = folder.join(&node);
            let joined = match nodes.first() {
                None => Node::start_with(cli, &data_dir, &node, &["--no-discovery"])?,
                Some(first) => {
                    let invite = first.ask(&["invite", "--json"])?;
                    let token = invite["token"].as_str().context("an invite has a token")?;
                    let peer = first.address();
                    let arguments = ["--no-discovery", "--invite", token, "--peer", peer];
                    Node::start_with(cli, &data_dir, &node, &arguments)?
                }
            };
            nodes.push(joined);
        }
        let cluster = Self { nodes };
        cluster.wait_until_all_alive()?;
        Ok(cluster)
    }

    fn wait_until_all_alive(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.first()?.ask(&["status", "--json"])?;
            let nodes = status["nodes"].as_array().context("status lists nodes")?;
            if nodes.iter().filter(|node| node["state"] == "alive").count() == self.nodes.len() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the nodes do not see each other alive: {status}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The node that made the cluster.
    pub(in crate::bench) fn first(&self) -> Result<&Node<'a>> {
        self.nodes.first().context("a cluster has a node")
    }

    /// Loads a model and returns its stages.
    pub(in crate::bench) fn load(&self, load: &Load) -> Result<Vec<Stage>> {
        let folder = load.folder.to_str().context("the cache folder is UTF-8")?;
        let [stages, context, sequences] =
            [load.stages, load.context, load.sequences].map(|number| number.to_string());
        let arguments = ["load", folder, "--name", NAME, "--stages", &stages, "--context", &context];
        let mut loaded =
            self.first()?.ask(&[&arguments[..], &["--sequences", &sequences, "--json"]].concat())?;
        let found: Vec<Stage> = serde_json::from_value(loaded["stages"].take()).context("stages of load")?;
        ensure!(found.len() == load.stages, "{} stages were asked for, {} loaded", load.stages, found.len());
        Ok(found)
    }

    pub(in crate::bench) fn unload(&self) -> Result<()> {
        self.first()?.ask(&["unload", NAME, "--json"]).map(drop)
    }

    /// Several clients at once, spread over the nodes; each asks another prompt.
    pub(in crate::bench) fn round(
        &self,
        stages: &[Stage],
        clients: usize,
        new_tokens: usize,
    ) -> Result<Round> {
        let before = self.cpu(stages);
        let start = Instant::now();
        let commands: Vec<Command> = (0..clients).map(|client| self.client(client, new_tokens)).collect();
        let measured: Vec<Measured> = std::thread::scope(|scope| {
            let ask = |mut command: Command| scope.spawn(move || measure(&mut command, PATIENCE));
            let asked: Vec<_> = commands.into_iter().map(ask).collect();
            let answers =
                asked.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
            answers.collect::<Result<_>>()
        })
        .map_err(|error| anyhow!("{error:#}\n{}", self.logs()))?;
        let wall = start.elapsed();
        let after = self.cpu(stages);
        let answers: Vec<Vec<u32>> =
            measured.iter().map(|client| token_ids(&client.stdout)).collect::<Result<_>>()?;
        ensure!(
            answers.iter().all(|answer| answer.len() == new_tokens),
            "{new_tokens} tokens were asked for, got {:?}",
            answers.iter().map(Vec::len).collect::<Vec<_>>()
        );
        let clients_of =
            |node: usize| measured.iter().skip(node).step_by(self.nodes.len()).map(|client| client.cpu);
        let busiest = before.zip(after).and_then(|(before, after)| {
            let cores = before.iter().zip(&after).enumerate();
            cores.map(|(node, (before, after))| *after - *before + clients_of(node).sum::<Duration>()).max()
        });
        Ok(Round { wall, answers, busiest })
    }

    fn client(&self, client: usize, new_tokens: usize) -> Command {
        let node = &self.nodes[client % self.nodes.len()];
        let mut command = node.command(&["generate", "--json", "--ignore-chat-template", "--model", NAME]);
        command.arg("--max-tokens").arg(new_tokens.to_string()).arg("--prompt").arg(prompt(PROMPT, client));
        command
    }

    /// CPU time of each node with its workers.
    fn cpu(&self, stages: &[Stage]) -> Option<Vec<Duration>> {
        let of_node = |node: &Node| {
            let own = stages.iter().filter(|stage| stage.node == node.name());
            let workers = own.map(|stage| cpu_of(stage.worker_pid?));
            workers.chain([cpu_of(node.process_id())]).sum::<Option<Duration>>()
        };
        self.nodes.iter().map(of_node).collect()
    }

    fn logs(&self) -> String {
        let log = |node: &Node| format!("the log of {} ends with:\n{}", node.name(), node.log());
        self.nodes.iter().map(log).collect::<Vec<_>>().join("\n")
    }

    /// Ends the nodes; the last one first, so that none is missed.
    pub(in crate::bench) fn stop(mut self) -> Result<()> {
        while let Some(mut node) = self.nodes.pop() {
            node.stop()?;
        }
        Ok(())
    }
}
