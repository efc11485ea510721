//! A job whose model is divided among several nodes: the one that leads it has the first layers and brings the stages together, the others
//! have the rest.
//!
//! ```text
//! leading node: Attempt ─▶ stage 0 ══ hidden vectors ══▶ stage 1 ◀─ Helper :another node
//!                  └─ Led: Line ── where the stages are ──▶ both
//!                       └────────── JobRunner.Help ───────────▲
//! ```
//! Several such lines may share the work of a job: then the same stage of all lines exchanges gradients, as single workers do (`team`), and what a stage is
//! part of are a line and a group. The leading node brings all of them together.
//!
//! A stage cannot be replaced on the way: when one is lost, the attempt is over, and the job's next one goes on from its newest checkpoint
//! with the nodes that are there then. The loss of a node or of a process is nobody's fault; a process that ends by itself is its job's.

use super::help_client::{Asked, Listening, Said, Worker};
use super::peer_client::Peers;
use super::store::states_name;
use super::team::Place;
use mlxnode_cluster::{KeyPin, NodeId};
use mlxnode_collective::{MemberId, RoundsOptions};
use mlxnode_compute::{ByteCount, JobError};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{PlannedStage, RunJob};
use mlxnode_worker::{
    ConductorEvent, GroupConductor, GroupPlace, GroupWorker, JobCallError, JobProcess, Line, LinePlace,
    LineWorker, StagePlace,
};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
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
    let (replica, stages) = (own.replica as usize, order.line_length());
    Ok(Some(StagePlace { stage: stage - replica * stages, stages, replica, layers: own.layers, folder }))
}

/// The place of a stage among the same stages of other lines; none when there is one line.
pub(super) fn group_place(
    place: &Place,
    conductor: KeyPin,
    order: &RunJob,
    stage: &StagePlace,
) -> Option<GroupPlace> {
    let member = member(stage.replica * stage.stages + stage.stage);
    let folder = stage.folder.with_file_name("exchange");
    (order.replicas() > 1).then_some(GroupPlace { member, conductor, listen: place.listen, folder })
}

/// A stage's place in its line.
pub(super) fn line_place(place: &Place, conductor: KeyPin, stage: &StagePlace) -> LinePlace {
    let folder = stage.folder.with_file_name("link");
    LinePlace { stage: stage.stage, stages: stage.stages, conductor, listen: place.listen, folder }
}

/// The stages of a job that this node leads. Dropping it ends those on other nodes.
pub(super) struct Led {
    /// The lines, of which the first leads.
    lines: Vec<Line>,
    /// For each stage of a line those that exchange its gradients, where there are several lines.
    groups: Vec<(GroupConductor, mpsc::Receiver<ConductorEvent>)>,
    helpers: JoinSet<Error>,
    /// What the other nodes say while they help.
    said: mpsc::Receiver<(usize, Said)>,
    names: Vec<String>,
    over: Over,
}

/// Why the line is over, as far as that is known.
#[derive(Default)]
struct Over {
    why: Option<Error>,
    /// A node says so, of its own stage.
    is_known: bool,
}

impl Over {
    /// What is somebody's fault counts before what is nobody's; and of that, whoever lost a lane knows less than the node whose stage it was.
    fn hear(&mut self, why: Error, is_known: bool) {
        let counts_more = match &self.why {
            None => true,
            Some(Error::Unavailable(_)) => {
                !matches!(why, Error::Unavailable(_)) || (is_known && !self.is_known)
            }
            Some(_) => false,
        };
        if counts_more {
            (self.why, self.is_known) = (Some(why), is_known);
        }
    }

    fn is_nobodys_fault(&self) -> bool {
        matches!(self.why, None | Some(Error::Unavailable(_)))
    }
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
        let own = place.identity.key_pin();
        let (listens, key_pin) = process.join_line(line_place(place, own, stage)).await?;
        let at = place.reached(peers, listens, key_pin);
        let exchange = match group_place(place, own, order, stage) {
            Some(group) => {
                let (listens, key_pin) = process.join(group).await?;
                Some(place.reached(peers, listens, key_pin))
            }
            None => None,
        };
        let mut helpers = JoinSet::new();
        // Each says where its worker is, and perhaps that it stops.
        let (says, mut said) = mpsc::channel(2 * order.stages.len());
        for (stage, planned) in order.stages.iter().enumerate().skip(1) {
            let helping = help(peers.clone(), order.clone(), stage, planned.node, says.clone());
            let name = names[stage].clone();
            helpers.spawn(async move { lost(&name, stage, helping.await) });
        }
        let gathering = async {
            let mut there = BTreeMap::new();
            while there.len() + 1 < order.stages.len() {
                // Nobody listens any more: then the attempt is about to end.
                let _ = tell.send(waiting_for(&order.stages, &names, &there)).await;
                tokio::select! {
                    Some((stage, news)) = said.recv() => match news {
                        Said::There(worker) => drop(there.insert(stage, worker)),
                        Said::Leaves => return Err(stops(&names, stage)),
                    },
                    Some(ended) = helpers.join_next() => return Err(ended.unwrap_or_else(let_go)),
                }
            }
            Ok(there)
        };
        let gathered = timeout(GATHERING, gathering).await;
        let late = |_| Error::Unavailable("the other nodes did not get ready".to_owned());
        let there = gathered.map_err(late).and_then(|gathered| gathered).map_err(Parted::Stage)?;
        let workers: Vec<Worker> =
            std::iter::once(Worker { at, exchange }).chain(there.into_values()).collect();
        let length = order.line_length();
        let forming = workers.chunks(length).enumerate().map(|(replica, workers)| {
            let in_line = |worker: &Worker| {
                let Listening { control, peer } = worker.at.clone();
                LineWorker { control, peer }
            };
            let (workers, names) = (workers.iter().map(in_line).collect::<Vec<_>>(), &names);
            async move {
                Line::form(&workers, &place.identity, FORMING).await.map_err(|error| {
                    let number = replica * length + error.stage;
                    Parted::Stage(Error::Unavailable(format!("{}: {}", named(names, number), error.reason)))
                })
            }
        });
        let lines = futures::future::try_join_all(forming).await?;
        let mut groups = Vec::new();
        for stage in (0..length).filter(|_| lines.len() > 1) {
            groups.push(
                group(place, workers.iter().enumerate().skip(stage).step_by(length), lines.len()).await?,
            );
        }
        Ok(Self { lines, groups, helpers, said, names, over: Over::default() })
    }

    /// Does the node of another stage stop? It waits for a checkpoint.
    pub(super) fn leaving(&mut self) -> Option<Error> {
        while let Ok((stage, news)) = self.said.try_recv() {
            if matches!(news, Said::Leaves) {
                return Some(stops(&self.names, stage));
            }
        }
        None
    }

    /// Waits until a stage is lost: why. When one is lost all end soon, and the first to say so need not be the one that knows.
    pub(super) async fn lost(&mut self) -> Error {
        let Self { lines, groups, helpers, names, over, .. } = self;
        if over.why.is_none() {
            let length = names.len() / lines.len().max(1);
            let ends = lines.iter_mut().enumerate().map(|(replica, line)| {
                Box::pin(async move {
                    let first = line.over().await;
                    (replica * length + first.stage, first.reason)
                })
            });
            let exchanges = groups.iter_mut().map(|(_, events)| Box::pin(events.recv()));
            tokio::select! {
                Some(ended) = helpers.join_next() => over.hear(ended.unwrap_or_else(let_go), true),
                ((number, reason), ..) = futures::future::select_all(ends) => {
                    over.hear(Error::Unavailable(format!("{} is lost: {reason}", named(names, number))), false);
                }
                (event, ..) = first_of(exchanges) => {
                    let (why, is_known) = parted(names, event);
                    over.hear(why, is_known);
                }
            }
        }
        let until = Instant::now() + LAST_WORDS;
        while over.is_nobodys_fault()
            && let Ok(Some(ended)) = timeout_at(until, helpers.join_next()).await
        {
            over.hear(ended.unwrap_or_else(let_go), true);
        }
        over.why.clone().unwrap_or_else(|| Error::Unavailable("a stage is lost".to_owned()))
    }
}

/// The first of these, or never when there are none.
async fn first_of<F: Future + Unpin>(all: impl Iterator<Item = F>) -> (F::Output, usize, Vec<F>) {
    let all: Vec<F> = all.collect();
    match all.is_empty() {
        true => std::future::pending().await,
        false => futures::future::select_all(all).await,
    }
}

/// The same stage of all lines: they exchange gradients from the first update on, and stay as they are.
async fn group(
    place: &Place,
    workers: impl Iterator<Item = (usize, &Worker)>,
    lines: usize,
) -> Result<(GroupConductor, mpsc::Receiver<ConductorEvent>), Parted> {
    // A stage that is lost ends its line, and a line that waits for requests or for room on its disk is not lost.
    let options = RoundsOptions {
        expected: lines,
        gather_within: GATHERING,
        step_within: GATHERING,
        ..RoundsOptions::default()
    };
    let (conductor, events) = GroupConductor::start(options, 0, place.identity.clone());
    for (number, worker) in workers {
        let Some(Listening { control, peer }) = worker.exchange.clone() else {
            let why = "a node does not listen for other lines; is it of another release?";
            return Err(Parted::Stage(Error::Unavailable(why.to_owned())));
        };
        conductor.add(GroupWorker { member: member(number), control, peer }).await;
    }
    Ok((conductor, events))
}

/// What it means that a stage left those that it exchanges gradients with, and whether that is known to be its fault.
fn parted(names: &[String], event: Option<ConductorEvent>) -> (Error, bool) {
    let number = |member: MemberId| usize::try_from(member.0.saturating_sub(1)).unwrap_or(usize::MAX);
    match event {
        Some(ConductorEvent::Lost { member, reason, is_evicted: true }) => {
            (Error::Failed(format!("{} had to go: {reason}", named(names, number(member)))), true)
        }
        Some(ConductorEvent::Lost { member, reason, is_evicted: false }) => {
            (Error::Unavailable(format!("{} is lost: {reason}", named(names, number(member)))), false)
        }
        Some(ConductorEvent::Failed { reason }) => (Error::Failed(reason), true),
        None => (Error::Unavailable("the stages of several lines are no longer together".to_owned()), false),
    }
}

/// "stage 3 on studio": a stage by its number in the order, over all lines.
fn named(names: &[String], number: usize) -> String {
    format!("stage {number} on {}", names.get(number).map_or("a node", String::as_str))
}

/// The node of a stage that is about to go.
fn stops(names: &[String], stage: usize) -> Error {
    Error::Unavailable(format!("the node stops that has {}", named(names, stage)))
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
            Err(JobCallError::Job(error @ JobError::Lost(_))) => {
                match timeout(2 * LAST_WORDS, led.lost()).await {
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
fn waiting_for(stages: &[PlannedStage], names: &[String], there: &BTreeMap<usize, Worker>) -> String {
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
    says: mpsc::Sender<(usize, Said)>,
) -> Result<(), Status> {
    let mut asked = Asked::to_help(&peers, &order, node, member(stage)).await?;
    while let Some(said) = asked.next().await? {
        let _ = says.send((stage, said)).await; // the job may be over
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
            replica: 0,
        };
        let stages = [stage(0, 0, 8), stage(1, 8, 16), stage(2, 16, 24)];
        let names = ["desk", "studio", "mini"].map(str::to_owned);
        let none = waiting_for(&stages, &names, &BTreeMap::new());
        assert_eq!(none, "waiting for 2 more nodes: studio (layers 8 to 15), mini (layers 16 to 23)");
    }

    #[test]
    fn a_lost_node_is_nobodys_fault_and_a_worker_that_fails_counts() {
        let end = |code| lost("studio", 1, Err(Status::new(code, "gone")));
        assert!(matches!(end(Code::Unavailable), Error::Unavailable(text) if text.contains("studio")));
        assert!(matches!(end(Code::Cancelled), Error::Unavailable(_)));
        assert!(matches!(end(Code::FailedPrecondition), Error::Unavailable(_)), "a lost process");
        assert!(matches!(end(Code::Internal), Error::Failed(_)));
        assert!(matches!(end(Code::InvalidArgument), Error::Invalid(_)));
        assert!(matches!(lost("studio", 1, Ok(())), Error::Unavailable(_)));
    }

    #[test]
    fn of_what_the_stages_say_a_fault_counts_most_and_then_the_word_of_the_node_that_had_the_stage() {
        let lane = || Error::Unavailable("a lane broke".into());
        let node = || Error::Unavailable("its process was killed".into());
        let fault = || Error::Failed("its process crashed".into());
        let cases: [(&[(Error, bool)], Error); 5] = [
            (&[(lane(), false)], lane()),
            (&[(lane(), false), (node(), true)], node()),
            (&[(node(), true), (lane(), true)], node()),
            (&[(node(), true), (fault(), true), (node(), true)], fault()),
            (&[(fault(), true), (Error::Invalid("no such row".into()), true)], fault()),
        ];
        for (heard, why) in cases {
            let mut over = Over::default();
            heard.iter().for_each(|(error, is_known)| over.hear(error.clone(), *is_known));
            assert_eq!(over.is_nobodys_fault(), matches!(why, Error::Unavailable(_)));
            assert_eq!(over.why, Some(why));
        }
    }
}
