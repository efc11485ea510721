//! The way from this command to the node that runs with the same data directory.

use crate::arguments::Global;
use crate::commands::data_dir;
use anyhow::{Result, bail};
use mlxnode_proto::v1::cluster_client::ClusterClient;
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::jobs_client::JobsClient;
use mlxnode_proto::v1::keys_client::KeysClient;
use mlxnode_proto::v1::models_client::ModelsClient;
use tonic::transport::Channel;

/// An open connection to the local node.
#[derive(Clone, Debug)]
pub struct Connection {
    channel: Channel,
}

impl Connection {
    /// Connects; says how to start a node when none runs.
    pub async fn open(global: &Global) -> Result<Self> {
        match Self::open_if_running(global).await? {
            Some(connection) => Ok(connection),
            None => bail!(
                "no node runs with the data directory {}; start one with `mlxnode join`",
                data_dir(global)?.root().display()
            ),
        }
    }

    /// Connects when a node runs with this data directory.
    pub async fn open_if_running(global: &Global) -> Result<Option<Self>> {
        let channel = mlxnode_node::connect_to_local_node(&data_dir(global)?).await?;
        Ok(channel.map(|channel| Self { channel }))
    }

    /// `mlxnode.v1.Cluster`
    pub fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel.clone())
    }

    /// `mlxnode.v1.Models`
    pub fn models(&self) -> ModelsClient<Channel> {
        ModelsClient::new(self.channel.clone())
    }

    /// `mlxnode.v1.Jobs`
    pub fn jobs(&self) -> JobsClient<Channel> {
        mlxnode_api::jobs::jobs_client(self.channel.clone())
    }

    /// `mlxnode.v1.Keys`
    pub fn keys(&self) -> KeysClient<Channel> {
        KeysClient::new(self.channel.clone())
    }

    /// `mlxnode.v1.Inference`
    pub fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone())
    }
}
