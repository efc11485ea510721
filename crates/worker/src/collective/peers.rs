//! The streams that go out to other members.

use super::client::GroupPeer;
use super::outbox::Outbox;
use super::shared::Shared;
use super::state_files::StateWriter;
use super::wire::{frame_to_proto, greeting_to_proto};
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, connect};
use mlxnode_collective::Frame;
use mlxnode_proto::internal::v1::FetchStateRequest;
use mlxnode_proto::internal::v1::collective_client::CollectiveClient;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;

/// One attempt to connect.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between attempts: the other member lets this one in when its own order has come, which takes milliseconds.
const PAUSE: Duration = Duration::from_millis(25);

/// Sends what comes into the outbox until the stream ends, which is always worth a report: it lives as long as the formation.
pub(super) async fn send(
    shared: &Arc<Shared>,
    epoch: u64,
    target: &GroupPeer,
    outbox: Arc<Outbox<Frame>>,
) -> String {
    let channel = match reach(shared, target).await {
        Ok(channel) => channel,
        Err(reason) => return reason,
    };
    let greeting = futures::stream::iter([greeting_to_proto(epoch, shared.me)]);
    let frames = futures::stream::unfold(outbox, |outbox| async move {
        let frame = outbox.next().await;
        Some((frame_to_proto(frame), outbox))
    });
    let frames = futures::StreamExt::chain(greeting, frames);
    // The other member answers once it is in the same formation.
    let mut client = CollectiveClient::new(channel);
    let reason = match timeout(shared.options.form_within, client.exchange(frames)).await {
        Ok(Ok(response)) => {
            let mut receipts = response.into_inner();
            loop {
                match receipts.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => break "it closed the stream".to_owned(),
                    Err(status) => break status.message().to_owned(),
                }
            }
        }
        Ok(Err(status)) => status.message().to_owned(),
        Err(_) => format!("it did not answer within {} s", shared.options.form_within.as_secs()),
    };
    forget(shared, target);
    reason
}

/// The state of another member at the formation's step.
pub(super) async fn fetch(shared: &Arc<Shared>, epoch: u64, target: &GroupPeer) -> Result<PathBuf, String> {
    let channel = reach(shared, target).await?;
    let mut client = CollectiveClient::new(channel);
    // It is asked between two micro-batches of the other's trainer, which then writes.
    let patience = shared.options.state_within;
    let slow = |_| format!("it did not give its state within {} s", patience.as_secs());
    let answer = timeout(patience, client.fetch_state(FetchStateRequest { epoch })).await.map_err(slow)?;
    let mut pieces = answer.map_err(|status| status.message().to_owned())?.into_inner();
    let folder = shared.options.folder.join("state-taken");
    let mut writer = StateWriter::new(folder).map_err(|error| error.to_string())?;
    loop {
        let piece = timeout(patience, pieces.message()).await.map_err(slow)?;
        match piece.map_err(|status| status.message().to_owned())? {
            Some(piece) => {
                // On this thread: gradients cannot flow before the state is here anyway.
                writer.accept(piece).map_err(|error| format!("its state cannot be taken over: {error}"))?;
            }
            None => return writer.finish().map_err(|error| format!("its state is not whole: {error}")),
        }
    }
}

/// Dials until it succeeds, the time is over or another attempt cannot help.
async fn reach(shared: &Arc<Shared>, target: &GroupPeer) -> Result<Channel, String> {
    let known = shared.channels.lock().unwrap_or_else(PoisonError::into_inner).get(&target.key_pin).cloned();
    if let Some(channel) = known {
        return Ok(channel);
    }
    let deadline = Instant::now() + shared.options.form_within;
    loop {
        let options = ConnectOptions {
            timeout: ATTEMPT.min(shared.options.form_within),
            end: shared.end.child_token(),
        };
        let expected = ExpectedKey::Pin(target.key_pin);
        let error = match connect(&target.address, &shared.identity, expected, options).await {
            Ok(channel) => {
                let mut channels = shared.channels.lock().unwrap_or_else(PoisonError::into_inner);
                channels.insert(target.key_pin, channel.clone());
                return Ok(channel);
            }
            Err(error) => error,
        };
        let hopeless = matches!(
            error,
            ConnectError::WrongKey { .. } | ConnectError::Address { .. } | ConnectError::Ended { .. }
        );
        if hopeless || Instant::now() + PAUSE >= deadline {
            return Err(error.to_string());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The next formation dials anew.
fn forget(shared: &Shared, target: &GroupPeer) {
    shared.channels.lock().unwrap_or_else(PoisonError::into_inner).remove(&target.key_pin);
}
