//! `mlxnode leave`: takes this node out of its cluster.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::output;
use anyhow::Result;
use clap::Args;
use mlxnode_proto::v1::LeaveRequest;
use serde_json::json;

/// Take this Mac out of its cluster and stop its node.
///
/// Models that had layers here are placed again on the others when they fit. The node's key stays, so the same Mac can be invited
/// again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode leave")]
pub struct Leave {}

impl Leave {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        connection.cluster().leave(LeaveRequest {}).await?;
        match global.json {
            true => output::json(&json!({ "left": true })),
            false => output::line("This node has left its cluster and stops now."),
        }
    }
}
