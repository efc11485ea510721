//! One stream between two stages: what the trainer puts in at one end comes out at the other, in order.

use super::shared::Shared;
use super::wire::{Assembler, Item, frames};
use crate::error::shortened;
use mlxnode_proto::internal::v1 as proto;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Items that wait to be sent: one on its way, one behind it.
const WAITING: usize = 2;
/// Items of a leading lane that the trainer has not taken: orders, numbers, pieces of a file.
const FEW: usize = 8;

/// Frames between the item under way and the stream.
const FRAMES: usize = 2;

/// The trainer's end of a lane.
pub(super) struct Lane {
    /// The stage at the other end.
    pub(super) peer: usize,
    pub(super) outgoing: mpsc::Sender<Item>,
    pub(super) incoming: mpsc::Receiver<Item>,
}

/// The network's end of a lane.
pub(super) struct LaneStream {
    pub(super) peer: usize,
    pub(super) outgoing: mpsc::Receiver<Item>,
    pub(super) incoming: mpsc::Sender<Item>,
}

/// A lane to `peer`. Between neighbours it has room for a window of micro-batches.
pub(super) fn lane(peer: usize, kind: proto::LineLane, stages: usize) -> (Lane, LaneStream) {
    let room = if kind == proto::LineLane::Pass { stages } else { FEW };
    let (outgoing, sent) = mpsc::channel(WAITING);
    let (received, incoming) = mpsc::channel(room);
    (Lane { peer, outgoing, incoming }, LaneStream { peer, outgoing: sent, incoming: received })
}

/// What goes out, `first` before all, until the line is over or the trainer has let go.
pub(super) fn outgoing(
    shared: &Arc<Shared>,
    mut items: mpsc::Receiver<Item>,
    first: Option<proto::LineFrame>,
) -> ReceiverStream<proto::LineFrame> {
    let (sender, frames_out) = mpsc::channel(FRAMES);
    let over = shared.over.token().clone();
    let sending = async move {
        let mut waiting: VecDeque<proto::LineFrame> = first.into_iter().collect();
        loop {
            match waiting.pop_front() {
                Some(frame) => {
                    if sender.send(frame).await.is_err() {
                        return;
                    }
                }
                None => match items.recv().await {
                    Some(item) => waiting.extend(frames(item)),
                    None => return,
                },
            }
        }
    };
    shared.tasks.spawn_on(
        async move {
            tokio::select! {
                () = sending => {}
                () = over.cancelled_owned() => {}
            }
        },
        &shared.runtime,
    );
    ReceiverStream::new(frames_out)
}

/// Takes in what comes until the stream ends; never well, since it lives as long as the line.
pub(super) async fn take(
    shared: &Arc<Shared>,
    peer: usize,
    items: mpsc::Sender<Item>,
    mut stream: Streaming<proto::LineFrame>,
) {
    let (mut assembler, over) = (Assembler::default(), shared.over.token().clone());
    let taking = async move {
        loop {
            let frame = match stream.message().await {
                Ok(Some(frame)) => frame,
                Ok(None) => break format!("stage {peer} has left"),
                Err(status) => break format!("stage {peer} is gone: {}", shortened(status.message())),
            };
            match assembler.accept(frame) {
                Ok(None) => {}
                Ok(Some(item)) => {
                    if items.send(item).await.is_err() {
                        break "the trainer has ended".to_owned();
                    }
                }
                Err(error) => break format!("what stage {peer} sends cannot be used: {error}"),
            }
        }
    };
    tokio::select! {
        reason = taking => shared.over.now(reason),
        () = over.cancelled_owned() => {}
    }
}
