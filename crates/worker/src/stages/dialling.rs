//! The lanes that this stage opens: the leading ones of stage 0, and the one to the next stage.

use super::endpoint::LARGEST_MESSAGE;
use super::lanes::{LaneStream, outgoing, take};
use super::shared::Shared;
use super::wire::LineWireError;
use crate::collective::GroupPeer;
use crate::error::shortened;
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, connect};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::line_frame::Body;
use mlxnode_proto::internal::v1::stage_line_client::StageLineClient;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// One attempt to connect.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between attempts: the other stage lets this one in when its own formation has come, which takes milliseconds.
const PAUSE: Duration = Duration::from_millis(25);

/// Where all stages are, from the wire.
pub(super) fn formation(
    formation: proto::LineFormation,
    stages: usize,
) -> Result<Vec<GroupPeer>, FormationError> {
    if formation.stages.len() != stages {
        return Err(FormationError::Stages { told: formation.stages.len(), stages });
    }
    let peer = |stage: proto::LineStage| {
        Ok(GroupPeer { address: stage.address, key_pin: super::wire::pin(&stage.key_pin)? })
    };
    formation.stages.into_iter().map(peer).collect::<Result<_, LineWireError>>().map_err(Into::into)
}

/// A formation that this stage cannot be part of.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormationError {
    #[error("it names {told} stages, but there are {stages}")]
    Stages { told: usize, stages: usize },
    #[error(transparent)]
    Wire(#[from] LineWireError),
}

/// Opens all lanes that this stage has to open.
pub(super) fn open(shared: &Arc<Shared>) {
    let mut lanes = Vec::new();
    if shared.stage == 0 {
        lanes.extend((1..shared.stages).map(|peer| (peer, proto::LineLane::Lead)));
    }
    if shared.stage + 1 < shared.stages {
        lanes.push((shared.stage + 1, proto::LineLane::Pass));
    }
    for (peer, kind) in lanes {
        let Some(lane) = shared.take_stream(peer, kind) else { continue };
        let here = shared.clone();
        shared.tasks.spawn_on(run(here, lane, kind), &shared.runtime);
    }
}

async fn run(shared: Arc<Shared>, lane: LaneStream, kind: proto::LineLane) {
    let LaneStream { peer, outgoing: items, incoming } = lane;
    let stage = u32::try_from(shared.stage).unwrap_or(u32::MAX);
    let greeting = proto::LineGreeting { stage, lane: kind.into() };
    let greeting = proto::LineFrame { body: Some(Body::Greeting(greeting)) };
    let sending = outgoing(&shared, items, Some(greeting));
    let over = shared.over.token().clone();
    let opened = tokio::select! {
        opened = join(&shared, peer, sending) => opened,
        () = over.cancelled_owned() => return,
    };
    match opened {
        Ok(stream) => {
            shared.opened();
            take(&shared, peer, incoming, stream).await;
        }
        Err(reason) => shared.over.now(format!("no lane to stage {peer}: {reason}")),
    }
}

async fn join(
    shared: &Arc<Shared>,
    peer: usize,
    sending: ReceiverStream<proto::LineFrame>,
) -> Result<Streaming<proto::LineFrame>, String> {
    let target = shared.peer(peer).ok_or_else(|| "nobody said where it is".to_owned())?;
    let channel = reach(shared, &target).await?;
    let mut client = StageLineClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE);
    match timeout(shared.options.form_within, client.join(sending)).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(shortened(status.message())),
        Err(_) => Err("it does not answer".to_owned()),
    }
}

/// Dials until it succeeds, the time is over or another attempt cannot help.
async fn reach(shared: &Arc<Shared>, target: &GroupPeer) -> Result<Channel, String> {
    let deadline = Instant::now() + shared.options.form_within;
    loop {
        let options = ConnectOptions {
            timeout: ATTEMPT.min(shared.options.form_within),
            end: shared.over.token().child_token(),
        };
        let expected = ExpectedKey::Pin(target.key_pin);
        let error = match connect(&target.address, &shared.identity, expected, options).await {
            Ok(channel) => return Ok(channel),
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
