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
/// again. When the coordinator cannot be reached this Mac leaves all the same, and has to be forgotten there.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode leave")]
pub struct Leave {}

impl Leave {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let untold = connection.cluster().leave(LeaveRequest {}).await?.into_inner().untold_coordinator;
        let told = untold.is_empty();
        if global.json {
            let untold = if told { None } else { Some(untold) };
            return output::json(&json!({ "left": true, "untold_coordinator": untold }));
        }
        output::line("This node has left its cluster and stops now.")?;
        match told {
            true => Ok(()),
            false => output::line(&format!(
                "The coordinator {untold} could not be told: when it is on again, run `mlxnode forget` there, or it goes on listing this node."
            )),
        }
    }
}
