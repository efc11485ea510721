//! What a stage answers: the node that says who the others are, and these others.
//!
//! TLS lets in only these keys; here each is held to what it may ask.

use super::dialling;
use super::lanes::{outgoing, take};
use super::shared::Shared;
use crate::listening::caller;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::line_frame::Body;
use mlxnode_proto::internal::v1::line_report::Report;
use mlxnode_proto::internal::v1::stage_line_server::StageLine;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// From the beginning of a stream to its first message.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Reports on their way: there are two at most.
const FEW: usize = 2;

/// The service of one stage.
#[derive(Clone)]
pub(super) struct LineService {
    pub(super) shared: Arc<Shared>,
    pub(super) controlled: Arc<AtomicBool>,
}

#[tonic::async_trait]
impl StageLine for LineService {
    type ControlStream = ReceiverStream<Result<proto::LineReport, Status>>;
    type JoinStream = BoxStream<'static, Result<proto::LineFrame, Status>>;

    async fn control(
        &self,
        request: Request<Streaming<proto::LineFormation>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        if caller(&request)? != self.shared.parent {
            return Err(Status::permission_denied("only the node that leads the job may ask this"));
        }
        if self.controlled.swap(true, Ordering::AcqRel) {
            return Err(Status::already_exists("this stage is controlled by another stream"));
        }
        let (shared, mut formations) = (self.shared.clone(), request.into_inner());
        let (reports, stream) = mpsc::channel(FEW);
        self.shared.tasks.spawn(async move {
            let told = async {
                loop {
                    match formations.message().await {
                        Ok(Some(told)) => match dialling::formation(told, shared.stages) {
                            Ok(peers) if shared.peer(0).is_none() => {
                                shared.form(peers);
                                dialling::open(&shared);
                            }
                            Ok(_) => break "its node forms the line a second time".to_owned(),
                            Err(error) => break format!("its node's order is not understood: {error}"),
                        },
                        Ok(None) => break "its node let go of it".to_owned(),
                        Err(status) => break format!("the leading node is gone: {}", status.message()),
                    }
                }
            };
            let reported = async {
                shared.formed().await;
                let formed = Report::Formed(proto::LineFormed {});
                let _ = reports.send(Ok(proto::LineReport { report: Some(formed) })).await;
                std::future::pending::<()>().await;
            };
            let late = async {
                tokio::time::sleep(shared.options.form_within).await;
                let is_formed = *shared.open.borrow() == shared.lane_count();
                if is_formed {
                    std::future::pending::<()>().await;
                }
                "the other stages did not come in time".to_owned()
            };
            tokio::select! {
                reason = told => shared.over.now(reason),
                reason = late => shared.over.now(reason),
                () = reported => {}
                () = shared.over.token().cancelled() => {}
            }
            // The node may be gone.
            let report = proto::LineReport { report: Some(Report::Over(shared.over.why())) };
            let _ = reports.try_send(Ok(report));
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn join(
        &self,
        request: Request<Streaming<proto::LineFrame>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let pin = caller(&request)?;
        let mut frames = request.into_inner();
        let greeting = timeout(GREETING_TIMEOUT, frames.message()).await;
        let greeting = greeting.map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let Some(Body::Greeting(proto::LineGreeting { stage, lane })) = greeting.and_then(|frame| frame.body)
        else {
            return Err(Status::invalid_argument("the first frame of a lane is a greeting"));
        };
        let from = stage as usize;
        if self.shared.peer(from).is_none_or(|peer| peer.key_pin != pin) {
            return Err(Status::permission_denied(format!("this key is not stage {from}")));
        }
        let kind = proto::LineLane::try_from(lane).unwrap_or_default();
        // The stage of the lower number opens a lane.
        let lane = (from < self.shared.stage).then(|| self.shared.take_stream(from, kind)).flatten();
        let lane = lane.ok_or_else(|| {
            Status::already_exists(format!("stage {from} opens no such lane, or has opened it"))
        })?;
        let sending = outgoing(&self.shared, lane.outgoing, None).map(Ok);
        let shared = self.shared.clone();
        self.shared.tasks.spawn(async move {
            shared.opened();
            take(&shared, lane.peer, lane.incoming, frames).await;
        });
        Ok(Response::new(sending.boxed()))
    }
}
