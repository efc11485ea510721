//! The sending end of a link: dials the next stage, and sends what the compute thread puts into the outbox as credits allow.

use super::Frames;
use crate::error::{Fault, Side};
use crate::message::Message;
use crate::progress::Progress;
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, Identity, KeyPin, connect};
use mlxnode_proto::internal::v1::Frame;
use mlxnode_proto::internal::v1::stage_client::StageClient;
use prost::Message as _;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;
use tracing::debug;

/// One attempt to connect.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between attempts. The next stage refuses this one until its own links are set, which happens within milliseconds.
const PAUSE: Duration = Duration::from_millis(25);
/// More credits than any receiver of ours grants; a bound for a receiver that is not.
const MOST_CREDITS: usize = 1 << 16;

/// Where a link goes.
#[derive(Clone, Debug)]
pub(crate) struct LinkTarget {
    pub(crate) address: String,
    pub(crate) pin: KeyPin,
    /// How long to try in all.
    pub(crate) deadline: Duration,
}

/// Runs the link until it ends, which is always a fault: it lives as long as the replica.
pub(crate) async fn send(
    target: LinkTarget,
    identity: Arc<Identity>,
    epoch: u64,
    outbox: mpsc::Receiver<Message>,
    progress: Arc<Progress>,
    end: CancellationToken,
) -> Fault {
    let channel = match reach(&target, &identity, end).await {
        Ok(channel) => channel,
        Err(fault) => return fault,
    };
    let credits = Arc::new(Semaphore::new(0));
    let broken = Arc::new(OnceLock::new());
    let outgoing = Outgoing {
        outbox,
        epoch,
        frames: None,
        credits: credits.clone(),
        broken: broken.clone(),
        progress,
        began: None,
        bytes: 0,
    };
    let mut client = StageClient::new(channel);
    let mut grants = match tokio::time::timeout(ATTEMPT, client.link(outgoing.into_stream())).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return lost(&status),
        Err(_) => return no_link(&target, "it did not answer".into()),
    };
    debug!(address = %target.address, "linked to the next stage");
    loop {
        match grants.message().await {
            Ok(Some(credit)) if credits.available_permits() + credit.frames as usize <= MOST_CREDITS => {
                credits.add_permits(credit.frames as usize);
            }
            Ok(Some(_)) => return Fault::Protocol("the next stage granted too many credits".into()),
            Ok(None) => {
                let reason = broken.get().cloned().unwrap_or_else(|| "it closed the stream".to_owned());
                return Fault::LinkLost(Side::Next, reason);
            }
            Err(status) => return lost(&status),
        }
    }
}

fn lost(status: &Status) -> Fault {
    Fault::LinkLost(Side::Next, status.message().to_owned())
}

fn no_link(target: &LinkTarget, reason: String) -> Fault {
    Fault::NoLink { side: Side::Next, deadline: target.deadline, reason }
}

/// Dials until it succeeds, the deadline passes or another attempt cannot help.
async fn reach(target: &LinkTarget, identity: &Identity, end: CancellationToken) -> Result<Channel, Fault> {
    let deadline = Instant::now() + target.deadline;
    loop {
        let options = ConnectOptions { timeout: ATTEMPT.min(target.deadline), end: end.clone() };
        let expected = ExpectedKey::Pin(target.pin);
        let error = match connect(&target.address, identity, expected, options).await {
            Ok(channel) => return Ok(channel),
            Err(error) => error,
        };
        let hopeless = matches!(
            error,
            ConnectError::WrongKey { .. } | ConnectError::Address { .. } | ConnectError::Ended { .. }
        );
        if hopeless || Instant::now() + PAUSE >= deadline {
            return Err(no_link(target, error.to_string()));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What goes out, as the stream that gRPC reads when it has room: outbox, then credits, then HTTP/2's flow control.
struct Outgoing {
    outbox: mpsc::Receiver<Message>,
    epoch: u64,
    frames: Option<Frames>,
    credits: Arc<Semaphore>,
    /// Why the stream ended from this side.
    broken: Arc<OnceLock<String>>,
    progress: Arc<Progress>,
    /// When the message under way was taken.
    began: Option<Instant>,
    /// Its bytes so far.
    bytes: u64,
}

impl Outgoing {
    fn into_stream(self) -> impl Stream<Item = Frame> + Send + 'static {
        futures::stream::unfold(self, |mut outgoing| async move {
            let frame = outgoing.next_frame().await?;
            Some((frame, outgoing))
        })
    }

    async fn next_frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.frames.as_mut().and_then(Iterator::next) {
                self.credits.acquire().await.ok()?.forget();
                self.bytes += frame.encoded_len() as u64;
                return Some(frame);
            }
            // Asked for more: the transport has taken the message before.
            if let Some(began) = self.began.take() {
                self.progress.sent(std::mem::take(&mut self.bytes), began.elapsed());
            }
            let message = self.outbox.recv().await?;
            self.began = Some(Instant::now());
            match Frames::of(self.epoch, message) {
                Ok(frames) => self.frames = Some(frames),
                Err(error) => {
                    let _ = self.broken.set(error.to_string());
                    return None;
                }
            }
        }
    }
}
