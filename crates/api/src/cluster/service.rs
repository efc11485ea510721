//! `Cluster` over a [`Household`]. Invites and removals are the coordinator's; other nodes hand them on.

use super::view::Household;
use super::wire;
use crate::deployments::DeploymentsView;
use crate::models::Busy;
use crate::panorama::{Panorama, wire as looks};
use crate::picture::{Picture, picture};
use crate::route::{CoordinatorRoute, Route, forwarded, not_answered};
use futures::stream::BoxStream;
use mlxnode_cluster::Role;
use mlxnode_proto::v1::cluster_client::ClusterClient;
use mlxnode_proto::v1::cluster_server::Cluster;
use mlxnode_proto::v1::{
    ClusterFigures, ClusterStatus, FiguresRequest, ForgetRequest, ForgetResponse, InviteRequest,
    InviteResponse, LeaveRequest, LeaveResponse, StatusRequest, WatchClusterRequest,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// The service on one node. Cheap to clone.
#[derive(Clone)]
pub struct ClusterService {
    household: Arc<dyn Household>,
    route: Arc<dyn CoordinatorRoute>,
    deployments: watch::Receiver<DeploymentsView>,
    busy: Arc<dyn Busy>,
    panorama: Panorama,
}

/// Ten minutes: time to walk to the other Mac.
const INVITE_LIFETIME: Duration = Duration::from_secs(600);
/// Longest that a window may stay open.
const MAX_INVITE_LIFETIME: u32 = 3600;
/// Between two messages of `Watch`.
const WATCH_PERIOD: Duration = Duration::from_millis(250);
/// Between two messages of `Figures`, when nothing else is asked for, and the bounds of what may be.
const FIGURES_PERIOD: u32 = 1000;
const FIGURES_PERIODS: std::ops::RangeInclusive<u32> = 500..=60_000;

impl ClusterService {
    /// Serves the members that this household knows.
    pub fn new(
        household: Arc<dyn Household>,
        route: Arc<dyn CoordinatorRoute>,
        deployments: watch::Receiver<DeploymentsView>,
        busy: Arc<dyn Busy>,
        panorama: Panorama,
    ) -> Self {
        Self { household, route, deployments, busy, panorama }
    }

    /// The cluster now, with what every node does.
    pub async fn picture(&self) -> Picture {
        picture(self.figures_now().await)
    }

    async fn figures_now(&self) -> ClusterFigures {
        let figures = self.panorama.look().await;
        let nodes = figures.iter().map(looks::figures_to_proto).collect();
        ClusterFigures { status: Some(self.status_now()), nodes }
    }

    fn status_now(&self) -> ClusterStatus {
        let view = self.deployments.borrow().clone();
        let busy = self.busy.statistics();
        let deployments = view
            .deployments
            .iter()
            .map(|deployment| {
                crate::models::wire::deployment_to_proto(deployment, busy.get(&deployment.instance()))
            })
            .collect();
        wire::status(self.household.view(), deployments, view.is_current)
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    type WatchStream = BoxStream<'static, Result<ClusterStatus, Status>>;
    type FiguresStream = BoxStream<'static, Result<ClusterFigures, Status>>;

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<ClusterStatus>, Status> {
        Ok(Response::new(self.status_now()))
    }

    async fn watch(
        &self,
        _request: Request<WatchClusterRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut members = self.household.changes();
        members.mark_changed(); // the first message comes at once
        let state = (self.clone(), members, self.deployments.clone());
        let stream = futures::stream::unfold(state, |(service, mut members, mut deployments)| async move {
            tokio::select! {
                changed = members.changed() => changed.ok()?,
                changed = deployments.changed() => changed.ok()?,
            }
            members.mark_unchanged();
            deployments.mark_unchanged();
            Some((Ok(service.status_now()), (service, members, deployments)))
        });
        Ok(Response::new(Box::pin(tokio_stream::StreamExt::throttle(stream, WATCH_PERIOD))))
    }

    async fn figures(
        &self,
        request: Request<FiguresRequest>,
    ) -> Result<Response<Self::FiguresStream>, Status> {
        let period = match request.get_ref().period_milliseconds {
            0 => FIGURES_PERIOD,
            period if FIGURES_PERIODS.contains(&period) => period,
            period => {
                let (least, most) = FIGURES_PERIODS.into_inner();
                let text = format!("period_milliseconds is {period}, but must be {least} to {most}");
                return Err(Status::invalid_argument(text));
            }
        };
        let mut ticks = tokio::time::interval(Duration::from_millis(period.into()));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let stream = futures::stream::unfold((self.clone(), ticks), |(service, mut ticks)| async move {
            ticks.tick().await;
            Some((Ok(service.figures_now().await), (service, ticks)))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn invite(&self, request: Request<InviteRequest>) -> Result<Response<InviteResponse>, Status> {
        if let Route::There(channel) = self.route.route()? {
            return ClusterClient::new(channel).invite(forwarded(request)?).await.map_err(not_answered);
        }
        let lifetime = match request.get_ref().lifetime_seconds {
            0 => INVITE_LIFETIME,
            seconds if seconds <= MAX_INVITE_LIFETIME => Duration::from_secs(seconds.into()),
            seconds => {
                let text =
                    format!("lifetime_seconds is {seconds}, but must be at most {MAX_INVITE_LIFETIME}");
                return Err(Status::invalid_argument(text));
            }
        };
        let invite = self.household.invite(lifetime).await.map_err(wire::failure)?;
        Ok(Response::new(wire::invite(&invite)))
    }

    async fn forget(&self, request: Request<ForgetRequest>) -> Result<Response<ForgetResponse>, Status> {
        if let Route::There(channel) = self.route.route()? {
            return ClusterClient::new(channel).forget(forwarded(request)?).await.map_err(not_answered);
        }
        let node = self.household.forget(&request.get_ref().node).await.map_err(wire::failure)?;
        Ok(Response::new(ForgetResponse { node: Some(wire::node(node)) }))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        // Whoever sits at this Mac may take it out; another node removes it by `Forget`.
        crate::access::require(&request, &[Role::Own, Role::Client])?;
        let untold = self.household.leave().await.map_err(wire::failure)?;
        Ok(Response::new(LeaveResponse { untold_coordinator: untold.unwrap_or_default() }))
    }
}
