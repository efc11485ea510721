//! A job whose model is divided among several nodes: the one that leads it has the first layers and brings the stages together, the others
//! have the rest.
//!
//! ```text
//! leading node: Attempt ─▶ stage 0 ══ hidden vectors ══▶ stage 1 ◀─ Helper :another node
//!                  └─ Led: Line ── where the stages are ──▶ both
//!                       └────────── JobRunner.Help ───────────▲
//! ```
//! A stage cannot be replaced on the way: when one is lost, the attempt is over, and the job's next one goes on from its newest checkpoint
//! with the nodes that are there then.

use super::client::json;
use super::peer_client::Peers;
use super::store::states_name;
use super::team::Place;
use crate::addresses;
use mlxnode_cluster::{KeyPin, NodeId, PeerState};
use mlxnode_collective::MemberId;
use mlxnode_compute::{ByteCount, JobError};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{PlannedStage, RunJob};
use mlxnode_proto::internal::v1::HelpJobRequest;
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use mlxnode_worker::{GroupPeer, JobCallError, JobProcess, Line, LinePlace, LineWorker, StagePlace};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Status};

/// For the other nodes to fetch what they need. One that is lost meanwhile is noticed at once.
const GATHERING: Duration = Duration::from_secs(6 * 3600);
/// For stages that are all there to find each other.
const FORMING: Duration = Duration::from_secs(30);
/// From the end of a lane to the word of the node whose stage it was: it knows why.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Is the model divided, and is this one of its stages?
pub(super) fn is_stage(order: &RunJob, stage: usize) -> bool {
    order.stages.len() > 1 && stage < order.stages.len()
}

/// The worker that has a stage; the leading one is 1.
fn member(stage: usize) -> MemberId {
    MemberId(stage as u64 + 1)
}

/// What a worker of a job takes of its node.
pub(super) fn memory(order: &RunJob, worker: MemberId) -> ByteCount {
    let stage = order.stages.iter().enumerate().find(|(stage, _)| member(*stage) == worker);
    stage.map_or(order.memory, |(_, planned)| planned.memory)
}

/// Which part of the model the process of `stage` has; none when the model is not divided.
///
/// # Errors
/// When the disk fails.
pub(super) fn place(peers: &Peers, order: &RunJob, stage: usize) -> std::io::Result<Option<StagePlace>> {
    let Some(own) = order.stages.get(stage).filter(|_| is_stage(order, stage)) else { return Ok(None) };
    let job = peers.store.job(&order.spec.id)?;
    let folder = job.join(states_name(order.epoch, member(stage))).join("own");
    std::fs::create_dir_all(&folder)?;
    Ok(Some(StagePlace { stage, stages: order.stages.len(), layers: own.layers, folder }))
}

/// A stage's place in its line.
pub(super) fn line_place(place: &Place, conductor: KeyPin, stage: &StagePlace) -> LinePlace {
    let folder = stage.folder.with_file_name("link");
    LinePlace { stage: stage.stage, stages: stage.stages, conductor, listen: place.listen, folder }
}

/// The stages of a job that this node leads. Dropping it ends those on other nodes.
pub(super) struct Led {
    line: Line,
    helpers: JoinSet<Error>,
    end: Option<Error>,
    names: Vec<String>,
}

impl Led {
    /// Makes `process` the first of several stages, has the other nodes make theirs, and brings them together: then the job can be made, on all of
    /// them at once. `tell` hears what is waited for.
    ///
    /// # Errors
    /// When the own process or another node cannot.
    pub(super) async fn lead(
        place: &Place,
        peers: &Peers,
        order: &RunJob,
        process: &mut JobProcess,
        stage: &StagePlace,
        tell: mpsc::Sender<String>,
    ) -> Result<Self, Parted> {
        let names: Vec<String> = order.stages.iter().map(|stage| peers.name(stage.node)).collect();
        let joins = line_place(place, place.identity.key_pin(), stage);
        let (listens, key_pin) = process.join_line(joins).await?;
        let mut helpers = JoinSet::new();
        let (found, mut workers) = mpsc::channel(order.stages.len());
        for (stage, planned) in order.stages.iter().enumerate().skip(1) {
            let helping = help(peers.clone(), order.clone(), stage, planned.node, found.clone());
            let name = names[stage].clone();
            helpers.spawn(async move { lost(&name, stage, helping.await) });
        }
        let gathering = async {
            let mut there = BTreeMap::new();
            while there.len() + 1 < order.stages.len() {
                // Nobody listens any more: then the attempt is about to end.
                let _ = tell.send(waiting_for(&order.stages, &names, &there)).await;
                tokio::select! {
                    Some((stage, worker)) = workers.recv() => { there.insert(stage, worker); }
                    Some(ended) = helpers.join_next() => return Err(ended.unwrap_or_else(let_go)),
                }
            }
            Ok(there)
        };
        let gathered = timeout(GATHERING, gathering).await;
        let late = |_| Error::Unavailable("the other nodes did not get ready".to_owned());
        let there = gathered.map_err(late).and_then(|gathered| gathered).map_err(Parted::Stage)?;
        let own = own_worker(place, peers, listens, key_pin);
        let workers: Vec<LineWorker> = std::iter::once(own).chain(there.into_values()).collect();
        let line = Line::form(&workers, &place.identity, FORMING).await.map_err(|error| {
            let name = names.get(error.stage).map_or("a node", String::as_str);
            Parted::Stage(Error::Unavailable(format!("{name}, stage {}: {}", error.stage, error.reason)))
        })?;
        Ok(Self { line, helpers, end: None, names })
    }

    /// Waits until a stage is lost: why.
    pub(super) async fn lost(&mut self) -> Error {
        let Self { line, helpers, end, names } = self;
        if end.is_none() {
            let first = tokio::select! {
                Some(ended) = helpers.join_next() => return ended.unwrap_or_else(let_go),
                first = line.over() => first,
            };
            let name = names.get(first.stage).map_or("a node", String::as_str);
            *end = Some(Error::Unavailable(format!(
                "stage {} on {name} is lost: {}",
                first.stage, first.reason
            )));
        }
        match timeout(LAST_WORDS, helpers.join_next()).await {
            Ok(Some(ended)) => ended.unwrap_or_else(let_go),
            _ => end.clone().unwrap_or_else(|| Error::Unavailable("a stage is lost".to_owned())),
        }
    }
}

/// Why a job does not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Parted {
    /// The own process says so.
    #[error(transparent)]
    Own(#[from] JobCallError),
    /// Another stage is lost, or cannot go on.
    #[error("{0}")]
    Stage(Error),
    /// It was told to end.
    #[error("it was told to end")]
    LetGo,
}

impl From<JobError> for Parted {
    fn from(error: JobError) -> Self {
        Self::Own(error.into())
    }
}

/// One call of the process of a job, whose other stages may be lost meanwhile.
pub(super) async fn call<T>(
    led: &mut Option<Led>,
    call: impl Future<Output = Result<T, JobCallError>>,
) -> Result<T, Parted> {
    let Some(led) = led else { return Ok(call.await?) };
    tokio::pin!(call);
    tokio::select! {
        biased;
        done = &mut call => match done {
            // What another stage's loss looks like from here; who lost it knows more.
            Err(JobCallError::Job(error @ JobError::Failed(_))) => {
                match timeout(LAST_WORDS, led.lost()).await {
                    Ok(lost) => Err(Parted::Stage(lost)),
                    Err(_) => Err(error.into()),
                }
            }
            done => Ok(done?),
        },
        lost = led.lost() => Err(Parted::Stage(lost)),
    }
}

fn let_go(error: tokio::task::JoinError) -> Error {
    Error::Failed(error.to_string())
}

/// "waiting for 1 more node: studio (layers 16 to 31)"
fn waiting_for(stages: &[PlannedStage], names: &[String], there: &BTreeMap<usize, LineWorker>) -> String {
    let missing = stages.iter().enumerate().skip(1).filter(|(stage, _)| !there.contains_key(stage));
    let told: Vec<String> = missing
        .map(|(stage, planned)| {
            let name = names.get(stage).map_or("a node", String::as_str);
            format!("{name} (layers {} to {})", planned.layers.start, planned.layers.end.saturating_sub(1))
        })
        .collect();
    let nodes = if told.len() == 1 { "node" } else { "nodes" };
    format!("waiting for {} more {nodes}: {}", told.len(), told.join(", "))
}

/// The own stage, as the others reach it.
fn own_worker(place: &Place, peers: &Peers, listens: std::net::SocketAddr, key_pin: KeyPin) -> LineWorker {
    let seen = peers.mesh.peers();
    let others: Vec<String> = seen.iter().filter_map(|peer| peer.address.clone()).collect();
    let own = place.listen.is_unspecified();
    let own = own.then(|| others.iter().find_map(|address| addresses::source_toward(address))).flatten();
    let advertised = format!("{}:{}", place.advertised, listens.port());
    let address = addresses::with_host_of(&advertised, own.as_deref());
    LineWorker { control: addresses::local(listens), peer: GroupPeer { address, key_pin } }
}

/// What the end of another node's stage is: its fault, the job's own, or nobody's.
fn lost(name: &str, stage: usize, ended: Result<(), Status>) -> Error {
    let told = |reason: &str| format!("stage {stage} on {name}: {reason}");
    match ended {
        Ok(()) => Error::Unavailable(told("its node let go of it")),
        // A connection that broke has a cause of its own; what the other node said has none.
        Err(status) if std::error::Error::source(&status).is_some() => {
            Error::Unavailable(told(status.message()))
        }
        Err(status) => match status.code() {
            Code::InvalidArgument => Error::Invalid(told(status.message())),
            Code::Internal => Error::Failed(told(status.message())),
            // A node that is gone, stops, or has no room: another attempt may have better luck.
            _ => Error::Unavailable(told(status.message())),
        },
    }
}

/// Has a node run a stage, until it ends.
async fn help(
    peers: Peers,
    order: RunJob,
    stage: usize,
    node: NodeId,
    found: mpsc::Sender<(usize, LineWorker)>,
) -> Result<(), Status> {
    let seen = peers.mesh.peers();
    let is_there = seen.iter().any(|peer| peer.node_id == node && peer.state == PeerState::Alive);
    let channel = peers.mesh.channel(&node).filter(|_| is_there);
    let channel = channel.ok_or_else(|| Status::unavailable("it cannot be reached"))?;
    let order = json(&order).map_err(|error| Status::internal(error.to_string()))?;
    let request = HelpJobRequest { order, member: member(stage).0 };
    let mut told = JobRunnerClient::new(channel).help(request).await?.into_inner();
    while let Some(report) = told.message().await? {
        let pin = <[u8; 32]>::try_from(&report.key_pin[..]);
        let pin = pin.map_err(|_| Status::unavailable("its worker's key is not 32 bytes long"))?;
        let reached = {
            let peers = peers.mesh.peers();
            peers.iter().find(|peer| peer.node_id == node).and_then(|peer| peer.address.clone())
        };
        let address = addresses::with_host_of(&report.address, reached.as_deref());
        let control = tokio::net::lookup_host(&address).await.ok().and_then(|mut found| found.next());
        let control = control.ok_or_else(|| Status::unavailable(format!("{address} is no address")))?;
        let peer = GroupPeer { address, key_pin: KeyPin::from_bytes(pin) };
        let _ = found.send((stage, LineWorker { control, peer })).await; // the job may be over
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_compute::LayerRange;

    #[test]
    fn what_is_waited_for_has_names_and_layers() {
        let stage = |number: u8, start, end| PlannedStage {
            node: NodeId::from_bytes([number; 32]),
            layers: LayerRange::new(start, end),
            memory: ByteCount(1),
        };
        let stages = [stage(0, 0, 8), stage(1, 8, 16), stage(2, 16, 24)];
        let names = ["desk", "studio", "mini"].map(str::to_owned);
        let none = waiting_for(&stages, &names, &BTreeMap::new());
        assert_eq!(none, "waiting for 2 more nodes: studio (layers 8 to 15), mini (layers 16 to 23)");
    }

    #[test]
    fn a_lost_node_is_nobodys_fault_and_a_dead_worker_counts() {
        let end = |code| lost("studio", 1, Err(Status::new(code, "gone")));
        assert!(matches!(end(Code::Unavailable), Error::Unavailable(text) if text.contains("studio")));
        assert!(matches!(end(Code::Cancelled), Error::Unavailable(_)));
        assert!(matches!(end(Code::Internal), Error::Failed(_)));
        assert!(matches!(end(Code::InvalidArgument), Error::Invalid(_)));
        assert!(matches!(lost("studio", 1, Ok(())), Error::Unavailable(_)));
    }
}
