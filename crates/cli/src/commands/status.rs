//! `mlxnode status`: who is here and what runs where.

use crate::arguments::Global;
use crate::commands::data_dir;
use crate::connection::Connection;
use crate::{output, wire};
use anyhow::Result;
use clap::Args;
use mlxnode_api::picture::NodeFacts;
use mlxnode_compute::ByteCount;
use mlxnode_proto::v1::StatusRequest;

/// Show the cluster: nodes, memory, links, models.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode status
  mlxnode status --json | jq '.nodes[].name'")]
pub struct Status {}

impl Status {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let mut status = wire::status(connection.cluster().status(StatusRequest {}).await?.into_inner());
        status.http = data_dir(global)?.read_running().and_then(|running| running.http);
        if global.json {
            return output::json(&status);
        }
        let reachable =
            if status.coordinator.reachable { "" } else { " (cannot be reached; models may be out of date)" };
        output::line(&format!(
            "Cluster {}, coordinator {}{reachable}",
            status.cluster, status.coordinator.name
        ))?;
        match &status.http {
            Some(http) => output::line(&format!("HTTP on this node: {http}\n"))?,
            None => output::line("")?,
        }
        let here = status.nodes.iter().find(|node| node.id == status.node_id);
        let rows: Vec<Vec<String>> = status
            .nodes
            .iter()
            .map(|node| {
                let rtt = here
                    .and_then(|here| here.links.iter().find(|link| link.to == node.id))
                    .and_then(|link| link.rtt_seconds)
                    .map(|seconds| format!("{:.1} ms", seconds * 1000.0));
                vec![
                    node.name.clone(),
                    node.id.chars().take(8).collect(),
                    node.state.to_owned(),
                    memory(node),
                    if node.id == status.node_id { "this node".to_owned() } else { rtt.unwrap_or_default() },
                    node.address.clone(),
                    node.chip.clone(),
                ]
            })
            .collect();
        output::table(&["node", "id", "state", "memory used", "link", "address", "chip"], &rows)?;
        for node in &status.nodes {
            if let Some(problem) = &node.problem {
                output::line(&format!("{}: {problem}", node.name))?;
            }
        }
        if status.deployments.is_empty() {
            return output::line("\nNo model is loaded. `mlxnode load MODEL` loads one.");
        }
        output::line("")?;
        deployments(&status.deployments)
    }
}

fn memory(node: &NodeFacts) -> String {
    format!("{} of {}", ByteCount(node.memory_used_bytes), ByteCount(node.memory_budget_bytes))
}

/// Prints deployments as a table; `mlxnode load` ends with it too.
pub fn deployments(deployments: &[wire::Deployment]) -> Result<()> {
    let rows: Vec<Vec<String>> = deployments
        .iter()
        .map(|deployment| {
            let stages: Vec<String> = deployment
                .stages
                .iter()
                .map(|stage| format!("{} {}..{}", stage.node, stage.layer_start, stage.layer_end))
                .collect();
            let state = match deployment.detail.as_str() {
                "" => deployment.state.to_owned(),
                detail => format!("{}: {detail}", deployment.state),
            };
            let state = match (deployment.pinned, deployment.ttl_seconds) {
                (true, _) => format!("{state}, pinned"),
                (false, Some(ttl)) => format!("{state}, stays {ttl} s without use"),
                (false, None) => state,
            };
            let state = match deployment.guessing.as_ref().map(|guessing| &guessing.draft_model) {
                Some(Some(draft)) => format!("{state}, draft model {draft}"),
                Some(None) => format!("{state}, guesses from the text"),
                None => state,
            };
            let model = match deployment.replicas {
                0 | 1 => deployment.model.clone(),
                all => format!("{} ({} of {all})", deployment.model, deployment.replica),
            };
            vec![
                model,
                stages.join(" → "),
                deployment.context_tokens.to_string(),
                format!("{} + {}", deployment.active_requests, deployment.queued_requests),
                state,
            ]
        })
        .collect();
    output::table(&["model", "layers", "context", "requests + queue", "state"], &rows)
}
