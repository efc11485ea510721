//! The mesh: one heartbeat link from this node to every other one in the roster, and what follows from it.
//!
//! ```text
//! roster ─▶ [driver] ─ starts and ends ─▶ link task per peer: dial, beats, roster exchange ─┐
//!              ▲  └─▶ views (who is alive), channels (for other services)                   │ reports, bounded
//!              └────────────────────────────── Detector (pure) ◀────────────────────────────┘
//! ```
//! The driver is one task. It owns the detector and the link tasks, and ends with the roster's last word: a peer that is
//! taken out of the roster is told so and loses its link. Everything ends at [`MeshHandle::shutdown`].

mod addresses;
mod link;

use crate::discovery::Discovery;
use crate::facts::NodeFacts;
use crate::identity::Identity;
use crate::membership::{Detector, Effect, Event, PeerState, Timing};
use crate::pin::NodeId;
use crate::roster_store::RosterStore;
use crate::wire;
use addresses::AddressBook;
use mlxnode_proto::PROTOCOL_VERSION;
use mlxnode_proto::internal::v1 as proto;
use proto::peer_client::PeerClient;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;
use tracing::{info, warn};

/// Ticks per heartbeat period.
const TICKS: u32 = 5;
/// Reports that may wait for the driver. When full, link tasks wait; a beat that comes in from outside is dropped, since
/// the next one follows.
const REPORTS: usize = 256;
/// Dials at a time, of all link tasks together: a flood of false hints must not become a flood of dials.
const DIALS: usize = 8;
/// How long another node may take to say whether it reaches a peer.
const ANSWER_TIME: Duration = Duration::from_millis(400);

/// What a mesh needs.
pub struct MeshOptions {
    /// This node's key.
    pub identity: Arc<Identity>,
    /// Who the others are.
    pub roster: Arc<RosterStore>,
    /// Where they may be, beside the addresses in the roster.
    pub discovery: Arc<dyn Discovery>,
    /// What this node says about itself, until [`MeshHandle::set_facts`].
    pub facts: NodeFacts,
    /// How quick it is to suspect.
    pub timing: Timing,
}

/// What is known of another node.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// Its id.
    pub node_id: NodeId,
    /// Its name in the roster.
    pub name: String,
    /// Is it alive?
    pub state: PeerState,
    /// Where the link goes (HOST:PORT), while there is one.
    pub address: Option<String>,
    /// Smoothed round trip time of beats.
    pub rtt: Option<Duration>,
    /// When it was heard last.
    pub heard: Option<Instant>,
    /// What it said about itself.
    pub facts: Option<NodeFacts>,
    /// Random, another one after each restart of the peer; 0 while not heard.
    pub incarnation: u64,
    /// Why there is no link, in words for a person.
    pub problem: Option<String>,
}

impl PeerView {
    /// Would a watcher want to know the difference? Round trip times and memory figures change with every beat.
    fn differs(&self, other: &Self) -> bool {
        (self.node_id, self.state, self.incarnation) != (other.node_id, other.state, other.incarnation)
            || (&self.name, &self.address, &self.problem) != (&other.name, &other.address, &other.problem)
            || self.facts.is_some() != other.facts.is_some()
    }
}

/// The mesh of this node. Cheap to clone.
#[derive(Clone)]
pub struct MeshHandle {
    shared: Arc<Shared>,
    driver: Arc<Mutex<Option<JoinHandle<()>>>>,
    /// Ends everything with the last handle, also when nobody called [`MeshHandle::shutdown`].
    _end_with_last: Arc<DropGuard>,
}

impl MeshHandle {
    /// Starts the mesh. Without a roster it waits for one.
    pub fn start(options: MeshOptions) -> Self {
        let (reports, inbox) = mpsc::channel(REPORTS);
        let shared = Arc::new(Shared {
            own: options.identity.id(),
            identity: options.identity,
            roster: options.roster,
            discovery: options.discovery,
            facts: watch::Sender::new(options.facts),
            timing: options.timing,
            incarnation: rand::random_range(1..=u64::MAX),
            channels: RwLock::default(),
            views: watch::Sender::new(Arc::from([])),
            book: AddressBook::default(),
            dials: Semaphore::new(DIALS),
            reports,
            end: CancellationToken::new(),
        });
        let driver = tokio::spawn(Driver::new(shared.clone(), inbox).run());
        let end = Arc::new(shared.end.clone().drop_guard());
        Self { shared, driver: Arc::new(Mutex::new(Some(driver))), _end_with_last: end }
    }

    /// All other nodes of the roster, by id.
    pub fn peers(&self) -> Arc<[PeerView]> {
        self.shared.views.borrow().clone()
    }

    /// Follows the other nodes: wakes when one joins, leaves, changes its state, its link or its process. Round trip times
    /// and facts are always current when looked at, but do not wake.
    pub fn watch(&self) -> watch::Receiver<Arc<[PeerView]>> {
        self.shared.views.subscribe()
    }

    /// The connection to a peer, for calls of other services; `None` while there is no link.
    pub fn channel(&self, node: &NodeId) -> Option<Channel> {
        self.shared.channels.read().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    /// Changes what this node says about itself. Peers know at the next beat.
    pub fn set_facts(&self, facts: NodeFacts) {
        self.shared.facts.send_replace(facts);
    }

    /// What this node says about itself.
    pub fn facts(&self) -> NodeFacts {
        self.shared.facts.borrow().clone()
    }

    /// Ends all links and tasks and waits until they ended.
    pub async fn shutdown(&self) {
        self.shared.end.cancel();
        let driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(driver) = driver {
            let _ = driver.await;
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for MeshHandle {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("MeshHandle").field("own", &self.shared.own).finish_non_exhaustive()
    }
}

/// What the driver, the link tasks and the peer service have in common.
pub(crate) struct Shared {
    pub(crate) own: NodeId,
    identity: Arc<Identity>,
    pub(crate) roster: Arc<RosterStore>,
    discovery: Arc<dyn Discovery>,
    facts: watch::Sender<NodeFacts>,
    timing: Timing,
    incarnation: u64,
    channels: RwLock<HashMap<NodeId, Channel>>,
    views: watch::Sender<Arc<[PeerView]>>,
    book: AddressBook,
    dials: Semaphore,
    reports: mpsc::Sender<Report>,
    pub(crate) end: CancellationToken,
}

impl Shared {
    /// A beat of this node.
    pub(crate) fn beat(&self, sequence: u64, echo_sequence: u64) -> proto::Beat {
        proto::Beat {
            protocol_version: PROTOCOL_VERSION,
            sequence,
            echo_sequence,
            echo_age_micros: 0, // answers are sent at once
            incarnation: self.incarnation,
            roster_version: self.roster.version(),
            facts: Some(wire::facts_to_wire(&self.facts.borrow())),
        }
    }

    /// A peer's beat came in over its link to us.
    pub(crate) fn heard_from(&self, peer: NodeId, beat: proto::Beat) {
        let _ = self.reports.try_send(Report::beat(peer, beat, None));
    }

    /// Is the node alive, as far as this node knows?
    pub(crate) fn reaches(&self, node: &NodeId) -> bool {
        *node == self.own
            || self.views.borrow().iter().any(|view| view.node_id == *node && view.state == PeerState::Alive)
    }
}

/// What link tasks and services tell the driver.
enum Report {
    Beat { peer: NodeId, incarnation: u64, facts: NodeFacts, rtt: Option<Duration> },
    LinkUp { peer: NodeId, address: String },
    LinkLost { peer: NodeId, problem: String },
    DialFailed { peer: NodeId, refused: bool, problem: String },
    Answer { about: NodeId, reachable: bool },
}

impl Report {
    fn beat(peer: NodeId, beat: proto::Beat, rtt: Option<Duration>) -> Self {
        let facts = wire::facts_from_wire(beat.facts.unwrap_or_default());
        Self::Beat { peer, incarnation: beat.incarnation, facts, rtt }
    }
}

/// The task that owns everything of the mesh.
struct Driver {
    inbox: mpsc::Receiver<Report>,
    shared: Arc<Shared>,
    detector: Detector,
    known: HashMap<NodeId, Known>,
    tasks: JoinSet<()>,
}

/// A peer, as far as the detector does not need to know.
struct Known {
    name: String,
    address: Option<String>,
    facts: Option<NodeFacts>,
    incarnation: u64,
    problem: Option<String>,
    /// Tells the link task that the peer may be there again.
    wake: Arc<Notify>,
    /// Ends the link task.
    removed: CancellationToken,
}

impl Driver {
    fn new(shared: Arc<Shared>, inbox: mpsc::Receiver<Report>) -> Self {
        let detector = Detector::new(shared.timing, Instant::now());
        Self { inbox, shared, detector, known: HashMap::new(), tasks: JoinSet::new() }
    }

    async fn run(mut self) {
        let shared = self.shared.clone();
        let mut roster = shared.roster.watch();
        let mut candidates = shared.discovery.candidates();
        let mut tick = tokio::time::interval(shared.timing.period / TICKS);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut clocks = (Instant::now(), SystemTime::now());
        self.follow_roster();
        loop {
            tokio::select! {
                report = self.inbox.recv() => match report {
                    Some(report) => self.note(report),
                    None => break, // cannot be: the driver itself keeps a sender
                },
                _ = tick.tick() => {
                    let event = if slept(&mut clocks) { Event::Woke } else { Event::Tick };
                    self.decide(event);
                    while self.tasks.try_join_next().is_some() {}
                }
                changed = roster.changed() => match changed {
                    Ok(()) => self.follow_roster(),
                    Err(_) => break,
                },
                Ok(()) = candidates.changed() => {
                    for peer in self.known.values() {
                        peer.wake.notify_one();
                    }
                }
                () = shared.end.cancelled() => break,
            }
            self.publish();
        }
        self.shared.end.cancel();
        self.tasks.shutdown().await;
        self.shared.channels.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Starts links to new members and ends those to removed ones.
    fn follow_roster(&mut self) {
        let own = self.shared.own;
        let signed = self.shared.roster.current();
        // Who is not in the roster itself has no business with those who are.
        let members = signed.as_ref().filter(|signed| signed.roster().get(&own).is_some());
        let entries = members.map_or(&[][..], |signed| signed.roster().nodes());
        let others: Vec<_> = entries.iter().filter(|entry| entry.node_id != own).collect();
        self.known.retain(|id, peer| {
            let stays = others.iter().any(|entry| entry.node_id == *id);
            if !stays {
                info!(node = %peer.name, "a node left the cluster");
                peer.removed.cancel();
            }
            stays
        });
        for entry in &others {
            let tasks = &mut self.tasks;
            let shared = &self.shared;
            let known = self.known.entry(entry.node_id).or_insert_with(|| {
                let (wake, removed) = (Arc::new(Notify::new()), CancellationToken::new());
                tasks.spawn(link::keep(shared.clone(), entry.node_id, wake.clone(), removed.clone()));
                Known {
                    name: String::new(),
                    address: None,
                    facts: None,
                    incarnation: 0,
                    problem: None,
                    wake,
                    removed,
                }
            });
            known.name.clone_from(&entry.name);
        }
        self.decide(Event::Roster(others.iter().map(|entry| entry.node_id).collect()));
    }

    fn note(&mut self, report: Report) {
        match report {
            Report::Beat { peer, incarnation, facts, rtt } => {
                let Some(known) = self.known.get_mut(&peer) else { return };
                self.shared.book.claimed(peer, &facts.addresses);
                known.incarnation = incarnation;
                known.facts = Some(facts);
                if known.address.is_none() {
                    known.wake.notify_one(); // it reaches us, so we may reach it
                }
                self.decide(Event::Heard { peer, incarnation, rtt });
            }
            Report::LinkUp { peer, address } => {
                if let Some(known) = self.known.get_mut(&peer) {
                    (known.address, known.problem) = (Some(address), None);
                }
            }
            Report::LinkLost { peer, problem } => {
                if let Some(known) = self.known.get_mut(&peer) {
                    (known.address, known.problem) = (None, Some(problem));
                }
                self.decide(Event::LinkLost { peer });
            }
            Report::DialFailed { peer, refused, problem } => {
                if let Some(known) = self.known.get_mut(&peer) {
                    known.problem = Some(problem);
                }
                self.decide(Event::DialFailed { peer, refused });
            }
            Report::Answer { about, reachable } => self.decide(Event::Answer { about, reachable }),
        }
    }

    fn decide(&mut self, event: Event) {
        for effect in self.detector.on_event(event, Instant::now()) {
            match effect {
                Effect::Changed { peer, state, restarted } => {
                    let name = self.known.get(&peer).map_or("?", |known| known.name.as_str());
                    match state {
                        PeerState::Dead => warn!(node = name, "a node is gone"),
                        PeerState::Suspect => warn!(node = name, "a node is silent"),
                        PeerState::Alive => info!(node = name, restarted, "a node is here"),
                        PeerState::Connecting => {}
                    }
                }
                Effect::Ask { about, of } => {
                    for node in of {
                        self.tasks.spawn(ask(self.shared.clone(), node, about));
                    }
                }
            }
        }
    }

    fn publish(&self) {
        let mut views: Vec<PeerView> = self
            .known
            .iter()
            .map(|(id, known)| PeerView {
                node_id: *id,
                name: known.name.clone(),
                state: self.detector.state(id).unwrap_or(PeerState::Connecting),
                address: known.address.clone(),
                rtt: self.detector.rtt(id),
                heard: self.detector.heard(id),
                facts: known.facts.clone(),
                incarnation: known.incarnation,
                problem: known.problem.clone(),
            })
            .collect();
        views.sort_by_key(|view| view.node_id);
        self.shared.views.send_if_modified(|shown| {
            let news =
                shown.len() != views.len() || shown.iter().zip(&views).any(|(old, new)| old.differs(new));
            *shown = views.into();
            news
        });
    }
}

/// On a Mac the clock behind [`Instant`] stands still while the machine sleeps, the wall clock does not. (A wall clock that
/// was set looks the same; then the detector is lenient once for nothing.)
fn slept(clocks: &mut (Instant, SystemTime)) -> bool {
    let now = (Instant::now(), SystemTime::now());
    let awake = now.0.saturating_duration_since(clocks.0);
    let passed = now.1.duration_since(clocks.1).unwrap_or_default();
    *clocks = now;
    passed > awake + Duration::from_secs(1)
}

/// Asks `node` whether it reaches `about`. No answer is no answer.
async fn ask(shared: Arc<Shared>, node: NodeId, about: NodeId) {
    let channel = shared.channels.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned();
    let Some(channel) = channel else { return };
    let question = proto::CanReachRequest { node_id: wire::id_to_wire(&about) };
    let mut client = PeerClient::new(channel);
    if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER_TIME, client.can_reach(question)).await {
        let reachable = answer.into_inner().reachable;
        let _ = shared.reports.send(Report::Answer { about, reachable }).await;
    }
}
