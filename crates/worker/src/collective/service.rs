//! What a worker of a job answers: its own node, and the members that its node named.
//!
//! TLS lets in only these keys; here each is held to what it may ask.

use super::shared::Shared;
use super::state_files::StateReader;
use super::wire::{formation_from_proto, frame_from_proto, report_to_proto};
use crate::error::shortened;
use crate::listening::caller;
use mlxnode_cluster::KeyPin;
use mlxnode_collective::MemberId;
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::collective_server::Collective;
use mlxnode_proto::internal::v1::exchange_frame::Body;
use mlxnode_proto::internal::v1::group_order::Order;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// From the beginning of a stream to its greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Reports, receipts and pieces of states on their way.
const FEW: usize = 4;

/// The service of one worker.
#[derive(Clone)]
pub(super) struct CollectiveService {
    pub(super) shared: Arc<Shared>,
    pub(super) controlled: Arc<AtomicBool>,
}

#[tonic::async_trait]
impl Collective for CollectiveService {
    type ControlStream = ReceiverStream<Result<proto::GroupReport, Status>>;
    type ExchangeStream = ReceiverStream<Result<proto::ExchangeReceipt, Status>>;
    type FetchStateStream = ReceiverStream<Result<proto::StatePiece, Status>>;

    async fn control(
        &self,
        request: Request<Streaming<proto::GroupOrder>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        if caller(&request)? != self.shared.parent {
            return Err(Status::permission_denied("only the node that started this worker may ask this"));
        }
        if self.controlled.swap(true, Ordering::AcqRel) {
            return Err(Status::already_exists("this worker's group is controlled by another stream"));
        }
        let (shared, mut orders) = (self.shared.clone(), request.into_inner());
        let (replies, stream) = mpsc::channel(FEW);
        self.shared.tasks.spawn(async move {
            let reporting = async {
                loop {
                    let report = shared.reports.next().await;
                    if replies.send(Ok(report_to_proto(report))).await.is_err() {
                        break "the node does not listen any more".to_owned();
                    }
                }
            };
            let ordered = async {
                loop {
                    match orders.message().await {
                        Ok(Some(order)) => {
                            if let Err(error) = carry_out(&shared, order) {
                                break format!("the node's order is not understood: {error}");
                            }
                        }
                        Ok(None) => break "the node let go of it".to_owned(),
                        Err(status) => break format!("the node is gone: {}", status.message()),
                    }
                }
            };
            let reason = tokio::select! {
                reason = reporting => reason,
                reason = ordered => reason,
                // The node learns it from the end of the stream.
                () = shared.gone.cancelled() => "it has left".to_owned(),
            };
            shared.leave(&reason);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn exchange(
        &self,
        request: Request<Streaming<proto::ExchangeFrame>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let pin = caller(&request)?;
        let mut frames = request.into_inner();
        let greeting = timeout(GREETING_TIMEOUT, frames.message()).await;
        let greeting = greeting.map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let Some(Body::Greeting(proto::ExchangeGreeting { epoch, member })) =
            greeting.and_then(|frame| frame.body)
        else {
            return Err(Status::invalid_argument("the first frame of an exchange is a greeting"));
        };
        let from = MemberId(member);
        self.in_formation(epoch, "the formation did not come", self.shared.until_running(epoch)).await?;
        let end = self.enter(pin, from, epoch)?;
        let (replies, stream) = mpsc::channel(FEW);
        let shared = self.shared.clone();
        self.shared.tasks.spawn(async move {
            let over = tokio::select! {
                () = end.cancelled() => Status::failed_precondition("the formation is over"),
                status = receive(&shared, epoch, from, frames) => {
                    let reason = shortened(status.message());
                    shared.tell(|member| member.broken(epoch, from, reason));
                    status
                }
            };
            // The sender may be gone.
            let _ = timeout(GREETING_TIMEOUT, replies.send(Err(over))).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn fetch_state(
        &self,
        request: Request<proto::FetchStateRequest>,
    ) -> Result<Response<Self::FetchStateStream>, Status> {
        let pin = caller(&request)?;
        let epoch = request.into_inner().epoch;
        self.in_formation(epoch, "the formation did not come", self.shared.until_running(epoch)).await?;
        let (is_member, end) = {
            let inner = self.shared.inner();
            (inner.peers.values().any(|peer| peer.key_pin == pin), inner.formation_end.clone())
        };
        if !is_member {
            return Err(Status::permission_denied("only the members of the formation may have its state"));
        }
        let patience = self.shared.options.state_within;
        match timeout(patience, self.shared.until_saved(epoch)).await {
            Ok(Ok(())) => {}
            Ok(Err(newest)) => return Err(stale(epoch, newest)),
            Err(_) => return Err(Status::deadline_exceeded("the trainer does not write its state")),
        }
        let folder = self.shared.inner().saved.clone();
        let folder = folder.ok_or_else(|| Status::not_found("there is no state here"))?;
        let unreadable = |error: std::io::Error| Status::internal(format!("cannot read the state: {error}"));
        let mut reader = StateReader::new(&folder).map_err(unreadable)?;
        let (pieces, stream) = mpsc::channel(FEW);
        self.shared.tasks.spawn(async move {
            let sending = async {
                loop {
                    // A piece of 1 MiB that was just written is in the system's cache.
                    let piece = match reader.next().map_err(unreadable) {
                        Ok(Some(piece)) => Ok(piece),
                        Ok(None) => return,
                        Err(status) => Err(status),
                    };
                    let failed = piece.is_err();
                    if pieces.send(piece).await.is_err() || failed {
                        return;
                    }
                }
            };
            tokio::select! {
                () = sending => {}
                // Without a status the files would look complete.
                () = end.cancelled() => { let _ = pieces.try_send(Err(Status::aborted("the formation is over"))); }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl CollectiveService {
    async fn in_formation(
        &self,
        epoch: u64,
        late: &str,
        waiting: impl Future<Output = Result<(), u64>>,
    ) -> Result<(), Status> {
        match timeout(self.shared.options.form_within, waiting).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(newest)) => Err(stale(epoch, newest)),
            Err(_) => Err(Status::deadline_exceeded(late)),
        }
    }

    /// Notes the one stream that a member may have in a formation.
    fn enter(&self, pin: KeyPin, from: MemberId, epoch: u64) -> Result<CancellationToken, Status> {
        let mut inner = self.shared.inner();
        let running = inner.member.as_ref().and_then(mlxnode_collective::Member::running_epoch);
        if running != Some(epoch) {
            return Err(stale(epoch, running.unwrap_or(epoch)));
        }
        if inner.peers.get(&from).is_none_or(|peer| peer.key_pin != pin) || from == self.shared.me {
            return Err(Status::permission_denied(format!("this key is not worker {from} of the formation")));
        }
        if !inner.arrived.insert(from) {
            return Err(Status::already_exists(format!(
                "worker {from} has a stream of epoch {epoch} already"
            )));
        }
        Ok(inner.formation_end.clone())
    }
}

fn stale(epoch: u64, newest: u64) -> Status {
    Status::failed_precondition(format!("epoch {epoch} is over: this worker is in {newest}"))
}

fn carry_out(shared: &Arc<Shared>, order: proto::GroupOrder) -> Result<(), String> {
    match order.order {
        Some(Order::Halt(proto::GroupHalt { epoch, at })) => shared.tell(|member| member.halt(epoch, at)),
        Some(Order::Form(form)) => {
            let (formation, peers) = formation_from_proto(form).map_err(|error| error.to_string())?;
            shared.form(formation, peers);
        }
        None => return Err("it is empty".to_owned()),
    }
    Ok(())
}

/// Takes a member's frames until the stream ends; never well, since it lives as long as the formation.
async fn receive(
    shared: &Arc<Shared>,
    epoch: u64,
    from: MemberId,
    mut frames: Streaming<proto::ExchangeFrame>,
) -> Status {
    loop {
        let frame = match frames.message().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Status::cancelled("it closed the stream"),
            Err(status) => return status,
        };
        let frame = match frame_from_proto(frame) {
            Ok(frame) => frame,
            Err(error) => return Status::invalid_argument(error.to_string()),
        };
        let mut wrong = None;
        shared.tell(|member| {
            member.frame(from, epoch, frame).unwrap_or_else(|error| {
                wrong = Some(error);
                vec![]
            })
        });
        if let Some(error) = wrong {
            return Status::invalid_argument(error.to_string());
        }
    }
}
