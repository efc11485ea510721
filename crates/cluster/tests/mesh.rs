//! Several nodes in one process: who sees whom, and how they part.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // clippy.toml exempts #[test] functions, not their helpers

use mlxnode_cluster::{
    AccessList, Admission, Candidate, ClusterAdmission, ClusterKey, ConnectError, ConnectOptions, Departures,
    ExpectedKey, Identity, MeshHandle, MeshOptions, NodeFacts, NodeId, PeerState, PeerView, Roster,
    RosterEntry, RosterStore, ServeOptions, SignedRoster, StaticDiscovery, Timing, connect, peer_service,
    serve, signed_roster_to_wire,
};
use mlxnode_proto::internal::v1 as proto;
use proto::peer_client::PeerClient;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// Ten times quicker than in life would be too quick for a busy test machine; three times is not.
const TIMING: Timing = Timing {
    period: Duration::from_millis(200),
    suspect_after: Duration::from_millis(600),
    dead_after: Duration::from_millis(1200),
};

struct Leavers(Mutex<Vec<NodeId>>);

#[tonic::async_trait]
impl Departures for Leavers {
    async fn leave(&self, node: NodeId) -> Result<(), String> {
        let mut leavers = self.0.lock().unwrap();
        if leavers.contains(&node) {
            return Err("it left already".into());
        }
        leavers.push(node);
        Ok(())
    }
}

struct Node {
    identity: Arc<Identity>,
    store: Arc<RosterStore>,
    discovery: Arc<StaticDiscovery>,
    leavers: Arc<Leavers>,
    address: SocketAddr,
    mesh: MeshHandle,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Node {
    async fn start() -> Self {
        Self::start_with(Arc::new(Identity::generate().unwrap()), "127.0.0.1:0".parse().unwrap(), None).await
    }

    async fn start_with(identity: Arc<Identity>, address: SocketAddr, roster: Option<SignedRoster>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(RosterStore::open(folder.path()).unwrap());
        if let Some(roster) = roster {
            store.adopt(roster).unwrap();
        }
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let discovery = Arc::new(StaticDiscovery::new([]));
        let name = format!("node-{}", address.port());
        let mesh = MeshHandle::start(MeshOptions {
            identity: identity.clone(),
            roster: store.clone(),
            discovery: discovery.clone(),
            facts: NodeFacts { name, addresses: vec![address.to_string()], ..NodeFacts::default() },
            timing: TIMING,
        });
        let leavers = Arc::new(Leavers(Mutex::default()));
        let admission: Arc<dyn Admission> = Arc::new(ClusterAdmission::new(
            identity.key_pin(),
            store.clone(),
            Arc::new(AccessList::default()),
        ));
        let routes = Routes::new(peer_service(&mesh, leavers.clone()));
        let shutdown = CancellationToken::new();
        let options = ServeOptions { grace: Duration::from_millis(50), ..ServeOptions::default() };
        let serving = serve(listener, identity.clone(), admission, routes, options, shutdown.clone());
        let serving = tokio::spawn(async move { serving.await.unwrap() });
        Self { identity, store, discovery, leavers, address, mesh, shutdown, serving, _folder: folder }
    }

    fn entry(&self, with_address: bool) -> RosterEntry {
        let addresses = if with_address { vec![self.address.to_string()] } else { vec![] };
        RosterEntry { node_id: self.identity.id(), name: format!("node-{}", self.address.port()), addresses }
    }

    fn view_of(&self, other: &Node) -> Option<PeerView> {
        self.mesh.peers().iter().find(|view| view.node_id == other.identity.id()).cloned()
    }

    async fn sees(&self, other: &Node, state: PeerState) -> Duration {
        self.waits(&format!("{state:?}"), |mesh| {
            mesh.iter().any(|view| view.node_id == other.identity.id() && view.state == state)
        })
        .await
    }

    async fn waits(&self, what: &str, fits: impl Fn(&[PeerView]) -> bool) -> Duration {
        let started = Instant::now();
        let mut views = self.mesh.watch();
        let found = tokio::time::timeout(Duration::from_secs(10), views.wait_for(|views| fits(views))).await;
        assert!(found.is_ok(), "not within ten seconds: {what}; instead {:?}", self.mesh.peers());
        started.elapsed()
    }

    /// As SIGKILL would: no farewell, the port closed, connections reset.
    async fn die(self) -> (Arc<Identity>, SocketAddr) {
        self.serving.abort();
        let _ = self.serving.await;
        self.mesh.shutdown().await;
        (self.identity, self.address)
    }

    async fn stop(self) {
        self.mesh.shutdown().await;
        self.shutdown.cancel();
        self.serving.await.unwrap();
    }
}

/// A cluster of `count` nodes that all know the first roster.
async fn cluster(count: usize, with_addresses: bool) -> (ClusterKey, Roster, Vec<Node>) {
    let key = ClusterKey::generate().unwrap();
    let mut nodes = Vec::new();
    for _ in 0..count {
        nodes.push(Node::start().await);
    }
    let mut roster = Roster::found(&key, "desk", nodes[0].entry(with_addresses));
    for node in &nodes[1..] {
        let entry = node.entry(with_addresses);
        roster.admit(entry.node_id, &entry.name, entry.addresses).unwrap();
    }
    for node in &nodes {
        node.store.adopt(key.sign(roster.clone()).unwrap()).unwrap();
    }
    (key, roster, nodes)
}

async fn all_see_all(nodes: &[Node]) {
    for node in nodes {
        node.waits("everyone alive and linked", |views| {
            views.len() == nodes.len() - 1
                && views.iter().all(|view| view.state == PeerState::Alive && view.address.is_some())
        })
        .await;
    }
}

async fn stop(nodes: Vec<Node>) {
    futures::future::join_all(nodes.into_iter().map(Node::stop)).await;
}

#[tokio::test]
async fn three_nodes_see_each_other_and_what_they_say_of_themselves() {
    let (_, _, nodes) = cluster(3, true).await;
    all_see_all(&nodes).await;
    let facts = NodeFacts { chip: "Apple M9".into(), memory_total_bytes: 1 << 40, ..nodes[1].mesh.facts() };
    nodes[1].mesh.set_facts(facts);
    let told = Instant::now();
    let view = loop {
        let view = nodes[0].view_of(&nodes[1]).unwrap();
        // A heartbeat may meet a busy moment; the next ones do not.
        let is_near = view.rtt.is_some_and(|rtt| !rtt.is_zero() && rtt < Duration::from_millis(200));
        if is_near && view.facts.as_ref().is_some_and(|facts| facts.chip == "Apple M9") {
            break view;
        }
        assert!(told.elapsed() < Duration::from_secs(5), "{view:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_ne!(view.incarnation, 0);

    let channel = nodes[0].mesh.channel(&nodes[2].identity.id()).unwrap();
    let question = proto::CanReachRequest { node_id: nodes[1].identity.id().as_bytes().to_vec().into() };
    assert!(PeerClient::new(channel).can_reach(question).await.unwrap().into_inner().reachable);
    stop(nodes).await;
}

#[tokio::test]
async fn nodes_without_addresses_are_found_by_hints_whosever_they_are() {
    let (_, _, nodes) = cluster(3, false).await;
    let hints: Vec<Candidate> = nodes
        .iter()
        .map(|node| Candidate { id: "x".into(), addresses: vec![node.address.to_string()], pairing: false })
        .collect();
    for node in &nodes {
        node.discovery.set(hints.clone());
    }
    all_see_all(&nodes).await;
    stop(nodes).await;
}

#[tokio::test]
async fn a_killed_node_is_dead_at_once_and_alive_again_when_it_is_back() {
    let (_, roster, mut nodes) = cluster(2, true).await;
    all_see_all(&nodes).await;
    let victim = nodes.pop().unwrap();
    let before = nodes[0].view_of(&victim).unwrap().incarnation;
    let signed = (*victim.store.current().unwrap()).clone();
    let id = victim.identity.id();
    let (identity, address) = victim.die().await;
    let took = nodes[0]
        .waits("the victim dead", |views| {
            views.iter().any(|view| view.node_id == id && view.state == PeerState::Dead)
        })
        .await;
    assert!(took < Duration::from_millis(600), "a reset and a refused dial need no timeout: {took:?}");
    assert!(nodes[0].mesh.channel(&id).is_none());

    let again = Node::start_with(identity, address, Some(signed)).await;
    nodes[0].sees(&again, PeerState::Alive).await;
    assert_ne!(nodes[0].view_of(&again).unwrap().incarnation, before, "a restart shows");
    assert_eq!(roster.version(), 2);
    nodes.push(again);
    all_see_all(&nodes).await;
    stop(nodes).await;
}

#[tokio::test]
async fn a_silent_node_is_suspect_and_then_dead() {
    // The other node answers through a relay, which then stops passing anything on, without a word.
    let (_, _, nodes) = cluster(2, false).await;
    for node in &nodes {
        node.mesh.set_facts(NodeFacts::default()); // no address of their own: the relay is the only way
    }
    let silence = CancellationToken::new();
    let (address, relay) = relay(nodes[1].address, silence.clone()).await;
    nodes[0].discovery.set(vec![Candidate {
        id: "r".into(),
        addresses: vec![address.to_string()],
        pairing: false,
    }]);
    nodes[0].sees(&nodes[1], PeerState::Alive).await;
    silence.cancel();
    let started = Instant::now();
    nodes[0].sees(&nodes[1], PeerState::Suspect).await;
    nodes[0].sees(&nodes[1], PeerState::Dead).await;
    let took = started.elapsed();
    assert!(took > TIMING.suspect_after && took < TIMING.dead_after + Duration::from_secs(2), "{took:?}");
    relay.abort();
    stop(nodes).await;
}

async fn relay(to: SocketAddr, silence: CancellationToken) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut pairs = tokio::task::JoinSet::new();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let silence = silence.clone();
            pairs.spawn(async move {
                let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    () = silence.cancelled() => std::future::pending().await,
                }
            });
        }
    });
    (address, task)
}

#[tokio::test]
async fn a_forgotten_node_learns_it_and_is_kept_out_within_a_second() {
    let (key, mut roster, nodes) = cluster(3, true).await;
    all_see_all(&nodes).await;
    let [coordinator, other, forgotten] = nodes.as_slice() else { panic!("three nodes") };
    roster.remove(&forgotten.identity.id()).unwrap();
    let started = Instant::now();
    coordinator.store.adopt(key.sign(roster).unwrap()).unwrap();

    // Everyone has the new roster soon, the forgotten one too.
    for node in &nodes {
        let mut watch = node.store.watch();
        let news =
            watch.wait_for(|signed| signed.as_ref().is_some_and(|signed| signed.roster().version() == 4));
        tokio::time::timeout(Duration::from_secs(5), news).await.expect("the roster spreads").unwrap();
    }
    forgotten.waits("no peers", <[PeerView]>::is_empty).await;
    for node in [coordinator, other] {
        let kept_out = loop {
            let expected = ExpectedKey::Pin(node.identity.key_pin());
            let address = node.address.to_string();
            match connect(&address, &forgotten.identity, expected, ConnectOptions::default()).await {
                Err(error) => break error,
                Ok(_) => assert!(started.elapsed() < Duration::from_secs(5)),
            }
        };
        assert!(matches!(kept_out, ConnectError::Rejected { .. }), "{kept_out}");
        node.waits("one peer", |views| views.len() == 1).await;
    }
    stop(nodes).await;
}

#[tokio::test]
async fn a_newer_roster_spreads_by_heartbeats_and_a_forged_one_does_not() {
    let (key, mut roster, nodes) = cluster(3, true).await;
    all_see_all(&nodes).await;
    let newcomer = NodeId::from_bytes([7; 32]);
    roster.admit(newcomer, "late", vec![]).unwrap();
    let genuine = key.sign(roster.clone()).unwrap();

    // Node 1 hands node 0 a roster with its own friend in it, signed by the wrong key or with a borrowed signature.
    let thief = ClusterKey::generate().unwrap();
    let forged = thief.sign(Roster::found(&thief, "desk", nodes[1].entry(true))).unwrap();
    let mut borrowed = signed_roster_to_wire(&genuine);
    borrowed.signature = signed_roster_to_wire(&nodes[0].store.current().unwrap()).signature;
    for bad in [signed_roster_to_wire(&forged), borrowed, proto::SignedRoster::default()] {
        let channel = nodes[1].mesh.channel(&nodes[0].identity.id()).unwrap();
        let refused = PeerClient::new(channel).put_roster(bad).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    }
    assert_eq!(nodes[0].store.version(), 3);

    nodes[2].store.adopt(genuine).unwrap();
    for node in &nodes {
        node.waits("the newcomer", |views| views.iter().any(|view| view.node_id == newcomer)).await;
    }
    let late = nodes[0].mesh.peers().iter().find(|view| view.node_id == newcomer).cloned().unwrap();
    assert_eq!(late.name, "late");
    stop(nodes).await;
}

#[tokio::test]
async fn only_members_are_answered_and_leaving_goes_to_the_coordinator() {
    let (_, _, nodes) = cluster(2, true).await;
    all_see_all(&nodes).await;
    let channel = nodes[1].mesh.channel(&nodes[0].identity.id()).unwrap();
    let mut peer = PeerClient::new(channel);
    peer.leave(proto::PeerLeaveRequest {}).await.unwrap();
    assert_eq!(*nodes[0].leavers.0.lock().unwrap(), [nodes[1].identity.id()]);
    let twice = peer.leave(proto::PeerLeaveRequest {}).await.unwrap_err();
    assert_eq!(twice.message(), "it left already");

    // The node's own key may connect (its command line does), but is no member that could leave or beat.
    let expected = ExpectedKey::Pin(nodes[0].identity.key_pin());
    let address = nodes[0].address.to_string();
    let own = connect(&address, &nodes[0].identity, expected, ConnectOptions::default()).await.unwrap();
    let refused = PeerClient::new(own).leave(proto::PeerLeaveRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    stop(nodes).await;
}
