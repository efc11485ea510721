//! `mlxnode unload MODEL`: takes a model off the nodes.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::output;
use anyhow::Result;
use clap::Args;
use mlxnode_proto::v1::UnloadRequest;
use serde_json::json;

/// Take a model off the cluster and free its memory.
///
/// Running requests end with an error. When the command returns, the workers are gone.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode unload demo")]
pub struct Unload {
    /// The name that `mlxnode status` shows.
    model: String,
}

impl Unload {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        connection.models().unload(UnloadRequest { name: self.model.clone() }).await?;
        match global.json {
            true => output::json(&json!({ "unloaded": self.model })),
            false => output::line(&format!("{} is unloaded.", self.model)),
        }
    }
}
