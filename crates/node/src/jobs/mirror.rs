//! Keeps what this node shows of jobs equal to what the coordinator knows, in this process or on another node.

use super::peer_client::Peers;
use crate::coordination::{RETRY, RosterRoute};
use mlxnode_api::jobs::{JobView, WatchedJobs, job_to_wire, jobs_client, shown};
use mlxnode_api::{CoordinatorRoute as _, Route};
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_proto::v1::WatchJobsRequest;
use mlxnode_proto::v1::jobs_client::JobsClient;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::Channel;
use tracing::debug;

/// Between two looks: people see no more.
const PERIOD: Duration = Duration::from_millis(500);

/// Follows the coordinator in this process, until it ends.
pub(crate) async fn mirror(coordinator: CoordinatorHandle, peers: Peers, view: watch::Sender<Vec<JobView>>) {
    let mut jobs = coordinator.jobs();
    loop {
        let now = jobs.borrow_and_update().clone();
        let name = |node| peers.name(node);
        view.send_replace(now.iter().map(|job| shown(job_to_wire(job, &name))).collect());
        tokio::time::sleep(PERIOD).await;
        if jobs.changed().await.is_err() {
            return;
        }
    }
}

/// Follows the coordinator on another node, for ever.
pub(crate) async fn follow(route: Arc<RosterRoute>, view: watch::Sender<Vec<JobView>>) {
    let mut peers = route.mesh.watch();
    loop {
        if let Ok(Route::There(channel)) = route.route()
            && let Err(status) = follow_once(jobs_client(channel), &view).await
        {
            debug!(reason = status.message(), "the coordinator's jobs cannot be followed");
        }
        // A link that comes up wakes at once.
        let _ = tokio::time::timeout(RETRY, peers.changed()).await;
    }
}

async fn follow_once(
    mut client: JobsClient<Channel>,
    view: &watch::Sender<Vec<JobView>>,
) -> Result<(), Status> {
    let mut lists = client.watch(WatchJobsRequest::default()).await?.into_inner();
    let mut watched = WatchedJobs::default();
    while let Some(message) = lists.message().await? {
        if let Some(jobs) = watched.take(message) {
            view.send_replace(jobs.to_vec());
        }
    }
    Ok(())
}
