//! The scheduler's side of `Stage.Drive`.

use crate::message::{DriveCommand, DriveEvent};
use crate::wire::{WireError, drive_command_to_proto, drive_event_from_proto};
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, Identity, KeyPin, connect};
use mlxnode_compute::{BlockPlan, SequenceId, SequenceSpec};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::stage_client::StageClient;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Commands that may wait for the connection. When it is full, `send` waits.
const WAITING_COMMANDS: usize = 64;
/// How long connecting may take, and the first answer after it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// As the worker's.
const LARGEST_MESSAGE: usize = 8 << 20;

/// Why a replica is not driven any more.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The first worker could not be reached.
    #[error("cannot reach the replica's first worker")]
    Connect(#[source] ConnectError),
    /// It did not answer.
    #[error("the replica's first worker did not answer within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout,
    /// It refused, for example because this key may not drive it.
    #[error("the replica's first worker refused: {0}")]
    Refused(String),
    /// A worker of the replica is gone, and with it all its sequences.
    #[error("the replica is lost: {0}")]
    Lost(String),
    /// What was to be sent, or what came, is malformed.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Sends commands to the first worker. Cheap to clone; the stream ends when all clones are gone.
#[derive(Clone, Debug)]
pub struct DriveClient {
    commands: mpsc::Sender<proto::DriveCommand>,
}

/// The events of one replica, in order. Read them all: while nobody does, the replica stops.
#[derive(Debug)]
pub struct DriveEvents {
    events: Streaming<proto::DriveEvent>,
}

impl DriveClient {
    /// Connects to the first worker of a replica. A scheduler that drove it before loses it.
    ///
    /// # Errors
    /// [`DriveError`], within 10 seconds.
    pub async fn connect(
        address: &str,
        pin: KeyPin,
        identity: &Identity,
    ) -> Result<(Self, DriveEvents), DriveError> {
        let options = ConnectOptions { timeout: CONNECT_TIMEOUT, ..ConnectOptions::default() };
        let channel = connect(address, identity, ExpectedKey::Pin(pin), options).await;
        let channel = channel.map_err(DriveError::Connect)?;
        let (commands, outgoing) = mpsc::channel(WAITING_COMMANDS);
        let mut client = StageClient::new(channel).max_encoding_message_size(LARGEST_MESSAGE);
        let opening = client.drive(ReceiverStream::new(outgoing));
        let response =
            tokio::time::timeout(CONNECT_TIMEOUT, opening).await.map_err(|_| DriveError::Timeout)?;
        let events = response.map_err(|status| ended_by(&status))?.into_inner();
        Ok((Self { commands }, DriveEvents { events }))
    }

    /// Sends a command; waits while the worker is not reading.
    ///
    /// # Errors
    /// [`DriveError::Lost`] when the stream has ended; the events tell why.
    pub async fn send(&self, command: DriveCommand) -> Result<(), DriveError> {
        let command = drive_command_to_proto(command)?;
        let sent = self.commands.send(command).await;
        sent.map_err(|_| DriveError::Lost("the stream to its first worker has ended".into()))
    }

    /// Runs a sequence from its first token; `sequence` must be new to the replica.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn open(
        &self,
        sequence: SequenceId,
        prompt: Vec<u32>,
        spec: SequenceSpec,
    ) -> Result<(), DriveError> {
        self.send(DriveCommand::Open { sequence, prompt, spec, blocks: BlockPlan::default() }).await
    }

    /// Stops a sequence; its `Closed` follows.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn cancel(&self, sequence: SequenceId) -> Result<(), DriveError> {
        self.send(DriveCommand::Cancel { sequence }).await
    }
}

impl DriveEvents {
    /// The next event. Cancel-safe.
    ///
    /// # Errors
    /// [`DriveError`] when the stream has ended, which it never does by itself.
    pub async fn next(&mut self) -> Result<DriveEvent, DriveError> {
        match self.events.message().await {
            Ok(Some(event)) => Ok(drive_event_from_proto(event)?),
            Ok(None) => Err(DriveError::Lost("its first worker closed the stream".into())),
            Err(status) => Err(ended_by(&status)),
        }
    }
}

fn ended_by(status: &Status) -> DriveError {
    let reason = status.message().to_owned();
    match status.code() {
        Code::PermissionDenied
        | Code::Unauthenticated
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::Aborted => DriveError::Refused(reason),
        _ => DriveError::Lost(reason),
    }
}
