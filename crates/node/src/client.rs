//! How a program on this machine reaches the node that runs with a data directory.

use crate::data_dir::DataDir;
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, Identity, KeyError, NodeId, connect};
use tonic::transport::Channel;

/// Why the local node cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The client's key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// There is none, although a node runs.
    #[error("the data directory has no client key; was the node started by another user?")]
    NoKey,
    /// What the node wrote about itself cannot be read.
    #[error("run/node.json in the data directory is damaged; stop the node and start it again")]
    Damaged,
    /// The node does not answer.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Connects to the node of this data directory; `None` when none runs.
///
/// # Errors
/// [`ClientError`].
pub async fn connect_to_local_node(data_dir: &DataDir) -> Result<Option<Channel>, ClientError> {
    let Some(running) = data_dir.read_running() else { return Ok(None) };
    let identity = Identity::load(&data_dir.client())?.ok_or(ClientError::NoKey)?;
    let node: NodeId = running.node_id.parse().map_err(|_| ClientError::Damaged)?;
    let expected = ExpectedKey::Pin(node.pin());
    Ok(Some(connect(&running.grpc, &identity, expected, ConnectOptions::default()).await?))
}
