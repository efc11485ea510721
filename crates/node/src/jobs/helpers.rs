//! Workers and stages of a job on nodes that do not lead it: the leading node asks for them, the other one runs them.
//!
//! ```text
//! leading node: Asked ◀── where it listens; that its node stops; how it ended ── Helper :another node
//!                 └── dropped: it is not wanted any more ────────────────────────▶
//! ```

use super::client::json;
use super::peer_client::Peers;
use crate::addresses;
use mlxnode_cluster::{KeyPin, NodeId, PeerState};
use mlxnode_collective::MemberId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::RunJob;
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use mlxnode_proto::internal::v1::{HelpJobReport, HelpJobRequest};
use mlxnode_worker::GroupPeer;
use std::net::SocketAddr;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

/// What a node says that was asked to help.
#[derive(Debug)]
pub(super) enum Said {
    /// Its worker can be reached.
    There(Worker),
    /// It stops, and waits a while until it is let go.
    Leaves,
}

/// Where a worker listens.
#[derive(Clone, Debug)]
pub(super) struct Listening {
    /// As the leading node reaches it.
    pub(super) control: SocketAddr,
    /// As the other workers reach it.
    pub(super) peer: GroupPeer,
}

/// A worker that listens.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    /// For the other workers, or for the other stages of its line.
    pub(super) at: Listening,
    /// For the same stage of other lines, where there are some.
    pub(super) exchange: Option<Listening>,
}

/// A node that was asked to help. Dropping it lets the node go.
pub(super) struct Asked {
    peers: Peers,
    node: NodeId,
    told: Streaming<HelpJobReport>,
}

impl Asked {
    /// Has a node run the worker `member` of this job.
    ///
    /// # Errors
    /// When it cannot be reached, or refuses.
    pub(super) async fn to_help(
        peers: &Peers,
        order: &RunJob,
        node: NodeId,
        member: MemberId,
    ) -> Result<Self, Status> {
        let is_there =
            peers.mesh.peers().iter().any(|peer| peer.node_id == node && peer.state == PeerState::Alive);
        let channel = peers.mesh.channel(&node).filter(|_| is_there);
        let channel = channel.ok_or_else(|| Status::unavailable("it cannot be reached"))?;
        let order = json(order).map_err(|error| Status::internal(error.to_string()))?;
        let request = HelpJobRequest { order, member: member.0 };
        let told = JobRunnerClient::new(channel).help(request).await?.into_inner();
        Ok(Self { peers: peers.clone(), node, told })
    }

    /// What it says next; none when its worker has ended.
    ///
    /// # Errors
    /// Why its worker ended, or the connection's end.
    pub(super) async fn next(&mut self) -> Result<Option<Said>, Status> {
        let Some(report) = self.told.message().await? else { return Ok(None) };
        if report.leaves {
            return Ok(Some(Said::Leaves));
        }
        let at = self.listening(&report.address, &report.key_pin).await?;
        let exchange = match report.exchange_address.as_str() {
            "" => None,
            address => Some(self.listening(address, &report.exchange_key_pin).await?),
        };
        Ok(Some(Said::There(Worker { at, exchange })))
    }

    async fn listening(&self, address: &str, key_pin: &[u8]) -> Result<Listening, Status> {
        let pin = <[u8; 32]>::try_from(key_pin);
        let pin = pin.map_err(|_| Status::unavailable("its worker's key is not 32 bytes long"))?;
        let reached = {
            let peers = self.peers.mesh.peers();
            peers.iter().find(|peer| peer.node_id == self.node).and_then(|peer| peer.address.clone())
        };
        let address = addresses::with_host_of(address, reached.as_deref());
        let control = tokio::net::lookup_host(&address).await.ok().and_then(|mut found| found.next());
        let control = control.ok_or_else(|| Status::unavailable(format!("{address} is no address")))?;
        let peer = GroupPeer { address, key_pin: KeyPin::from_bytes(pin) };
        Ok(Listening { control, peer })
    }
}

/// What a node that helps tells the leading one.
pub(crate) enum Helped {
    /// Where its worker listens.
    Joined(Joined),
    /// The node stops.
    Leaves,
}

/// Where a worker listens, and the keys of its listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    /// For the other workers, or for the other stages of its line.
    pub(crate) at: (SocketAddr, KeyPin),
    /// For the same stage of other lines, where there are some.
    pub(crate) exchange: Option<(SocketAddr, KeyPin)>,
}

/// A worker of a job that another node leads. Dropping it ends it.
pub(crate) struct Helper {
    joined: Option<oneshot::Receiver<Joined>>,
    /// Cancelled when its node stops; until that is said.
    leaving: Option<CancellationToken>,
    task: AbortOnDropHandle<Result<(), Error>>,
}

impl Helper {
    /// Begins it. `leaving` is cancelled when its node stops.
    pub(super) fn start<F>(
        leaving: CancellationToken,
        work: impl FnOnce(oneshot::Sender<Joined>) -> F,
    ) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (sender, joined) = oneshot::channel();
        let task = AbortOnDropHandle::new(tokio::spawn(work(sender)));
        Self { joined: Some(joined), leaving: Some(leaving), task }
    }

    /// What there is to say next: where its worker listens, that its node stops; then `None` when it has ended.
    ///
    /// # Errors
    /// Why it ended.
    pub(crate) async fn next(&mut self) -> Result<Option<Helped>, Error> {
        let Self { joined, leaving, task } = self;
        if let (Some(wait), Some(stops)) = (joined.as_mut(), leaving.as_ref()) {
            tokio::select! {
                told = wait => {
                    *joined = None;
                    if let Ok(joined) = told {
                        return Ok(Some(Helped::Joined(joined)));
                    }
                }
                () = stops.cancelled() => {
                    (*joined, *leaving) = (None, None);
                    return Ok(Some(Helped::Leaves));
                }
            }
        }
        if let Some(stops) = leaving.take() {
            tokio::select! {
                ended = &mut *task => return over(ended),
                () = stops.cancelled() => return Ok(Some(Helped::Leaves)),
            }
        }
        over(task.await)
    }
}

fn over(ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<Option<Helped>, Error> {
    ended.unwrap_or_else(|error| Err(Error::Failed(error.to_string()))).map(|()| None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[tokio::test]
    async fn a_helper_says_where_it_is_that_its_node_stops_and_how_it_ended() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 7));
        let there = Joined { at: (address, KeyPin::from_bytes([1; 32])), exchange: None };
        let leaving = CancellationToken::new();
        let (go, wait) = oneshot::channel::<()>();
        let mut helper = Helper::start(leaving.clone(), |joined| async move {
            let _ = joined.send(there);
            let _ = wait.await;
            Err(Error::Unavailable("gone".into()))
        });
        assert!(matches!(helper.next().await, Ok(Some(Helped::Joined(joined))) if joined == there));
        leaving.cancel();
        assert!(matches!(helper.next().await, Ok(Some(Helped::Leaves))));
        drop(go);
        assert!(matches!(helper.next().await, Err(Error::Unavailable(text)) if text == "gone"));

        // Before there is a worker.
        let leaving = CancellationToken::new();
        leaving.cancel();
        let mut helper = Helper::start(leaving, |joined| async move {
            let _never = joined;
            std::future::pending().await
        });
        assert!(matches!(helper.next().await, Ok(Some(Helped::Leaves))));

        // One whose task ends before it is there.
        let mut helper = Helper::start(CancellationToken::new(), |joined| async move {
            drop(joined);
            Err(Error::Invalid("no such stage".into()))
        });
        assert!(matches!(helper.next().await, Err(Error::Invalid(_))));
    }
}
