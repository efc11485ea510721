//! The node's side of a worker's group: orders to it, reports from it.

use super::wire::{formation_to_proto, halt_to_proto, report_from_proto};
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, Identity, KeyPin, connect};
use mlxnode_collective::{Formation, MemberId, Report};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::collective_client::CollectiveClient;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// For the connection and the answer to the call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Orders that the worker has not taken yet: one or two a formation.
const MOST_ORDERS: usize = 64;

/// Where a member listens, and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPeer {
    /// HOST:PORT, as the other members reach it.
    pub address: String,
    /// Hash of its public key.
    pub key_pin: KeyPin,
}

/// A worker's group cannot be controlled.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// It cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not answer.
    #[error("the worker at {address} did not answer within {} s", CALL_TIMEOUT.as_secs())]
    TimedOut {
        /// Where.
        address: SocketAddr,
    },
    /// It refuses, or is gone.
    #[error("the worker does not take part in its group: {0}")]
    Refused(String),
    /// It does not take orders any more.
    #[error("the worker does not take its group's orders")]
    Deaf,
    /// A formation names somebody whose address is not known.
    #[error("the formation of epoch {epoch} names a worker whose address is not known")]
    Unknown {
        /// Which formation.
        epoch: u64,
    },
}

/// Orders to one worker. Dropping it makes the worker leave its group.
#[derive(Debug)]
pub struct GroupClient {
    orders: mpsc::Sender<proto::GroupOrder>,
}

/// Reports of one worker.
#[derive(Debug)]
pub struct GroupReports {
    reports: Streaming<proto::GroupReport>,
}

impl GroupClient {
    /// Takes control of the group of a worker that this node started.
    ///
    /// # Errors
    /// [`GroupError`] when it cannot be reached or is controlled already.
    pub async fn connect(
        address: SocketAddr,
        key_pin: KeyPin,
        identity: &Identity,
    ) -> Result<(Self, GroupReports), GroupError> {
        let options = ConnectOptions { timeout: CALL_TIMEOUT, ..ConnectOptions::default() };
        let channel = connect(&address.to_string(), identity, ExpectedKey::Pin(key_pin), options).await?;
        let (orders, stream) = mpsc::channel(MOST_ORDERS);
        let mut client = CollectiveClient::new(channel);
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.control(ReceiverStream::new(stream))).await;
        let answer = answer.map_err(|_| GroupError::TimedOut { address })?;
        let answer = answer.map_err(|status| GroupError::Refused(status.message().to_owned()))?;
        Ok((Self { orders }, GroupReports { reports: answer.into_inner() }))
    }

    /// See [`mlxnode_collective::Member::halt`].
    ///
    /// # Errors
    /// [`GroupError::Deaf`].
    pub fn halt(&self, epoch: u64, at: u64) -> Result<(), GroupError> {
        self.orders.try_send(halt_to_proto(epoch, at)).map_err(|_| GroupError::Deaf)
    }

    /// See [`mlxnode_collective::Member::form`]; `peers` says where the members are.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn form(
        &self,
        formation: &Formation,
        peers: &BTreeMap<MemberId, GroupPeer>,
    ) -> Result<(), GroupError> {
        let order = formation_to_proto(formation, peers);
        let order = order.ok_or(GroupError::Unknown { epoch: formation.epoch })?;
        self.orders.try_send(order).map_err(|_| GroupError::Deaf)
    }
}

impl GroupReports {
    /// The next one. `None` when the worker has ended or left.
    ///
    /// # Errors
    /// [`GroupError::Refused`] when it is gone or says what is not understood.
    pub async fn next(&mut self) -> Result<Option<Report>, GroupError> {
        let report = self.reports.message().await;
        let report = report.map_err(|status| GroupError::Refused(status.message().to_owned()))?;
        let report = report.map(report_from_proto).transpose();
        report.map_err(|error| GroupError::Refused(error.to_string()))
    }
}
