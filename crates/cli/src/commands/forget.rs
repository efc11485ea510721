//! `mlxnode forget NODE`: removes a node that will not come back.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::output;
use anyhow::{Context as _, Result};
use clap::Args;
use mlxnode_api::picture::NodeFacts;
use mlxnode_proto::v1::ForgetRequest;

/// Remove a node from the cluster.
///
/// For a Mac that is gone or no longer trusted: its key is taken out of the roster, its links are closed within a second, and it needs
/// a new invite to come back.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode forget studio
  mlxnode forget 3fa9c1d2")]
pub struct Forget {
    /// The node's name, or the first digits of its id.
    node: String,
}

impl Forget {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let request = ForgetRequest { node: self.node };
        let node = connection.cluster().forget(request).await?.into_inner().node;
        let node = NodeFacts::from(node.context("the node's answer does not say whom it forgot")?);
        match global.json {
            true => output::json(&node),
            false => output::line(&format!(
                "{} ({}) is out of the cluster.",
                node.name,
                &node.id[..8.min(node.id.len())]
            )),
        }
    }
}
