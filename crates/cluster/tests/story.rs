//! The whole story on one machine: found a cluster, invite, be found by multicast DNS, pair by code, see each other, forget.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // clippy.toml exempts #[test] functions, not their helpers

use mlxnode_cluster::{
    Admission, Admit, ClusterAdmission, ClusterKey, Departures, Discovery, Identity, Inviter, JoinRequest,
    MdnsDiscovery, MdnsOptions, MeshHandle, MeshOptions, NodeFacts, NodeId, PeerState, Refusal, Roster,
    RosterEntry, RosterStore, ServeOptions, SignedRoster, Timing, announce_invites, find_inviters, join,
    peer_service, serve,
};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// The coordinator's part, as small as it can be.
struct Coordinator {
    key: ClusterKey,
    store: Arc<RosterStore>,
}

impl Coordinator {
    fn change<T, E>(&self, change: impl FnOnce(&mut Roster) -> Result<T, E>) -> Result<SignedRoster, E> {
        let mut roster = self.store.current().unwrap().roster().clone();
        change(&mut roster)?;
        let signed = self.key.sign(roster).unwrap();
        self.store.adopt(signed.clone()).unwrap();
        Ok(signed)
    }
}

#[tonic::async_trait]
impl Admit for Coordinator {
    async fn admit(&self, joiner: JoinRequest) -> Result<SignedRoster, Refusal> {
        self.change(|roster| roster.admit(joiner.node_id, &joiner.facts.name, joiner.facts.addresses))
            .map_err(|error| Refusal::Member(error.to_string()))
    }
}

#[tonic::async_trait]
impl Departures for Coordinator {
    async fn leave(&self, node: NodeId) -> Result<(), String> {
        self.change(|roster| roster.remove(&node)).map(drop).map_err(|error| error.to_string())
    }
}

struct Nobody;

#[tonic::async_trait]
impl Departures for Nobody {
    async fn leave(&self, _: NodeId) -> Result<(), String> {
        Err("this node is not the coordinator".into())
    }
}

struct Site {
    identity: Arc<Identity>,
    store: Arc<RosterStore>,
    listener: TcpListener,
    facts: NodeFacts,
}

async fn site(folder: &Path, name: &str) -> Site {
    let identity = Arc::new(Identity::load_or_create(folder).unwrap());
    let store = Arc::new(RosterStore::open(folder).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = vec![listener.local_addr().unwrap().to_string()];
    Site {
        identity,
        store,
        listener,
        facts: NodeFacts { name: name.into(), addresses, ..NodeFacts::default() },
    }
}

#[tokio::test]
async fn a_second_node_is_found_paired_seen_and_forgotten() {
    let (first_folder, second_folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let port = std::net::UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    let mdns = |site: &Site| {
        let listen = site.listener.local_addr().unwrap();
        Arc::new(MdnsDiscovery::start(MdnsOptions { listen, port }).unwrap())
    };
    let (end, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let mut run =
        |site: Site, mesh: &MeshHandle, departures: Arc<dyn Departures>, inviter: Option<Arc<Inviter>>| {
            let own = site.identity.key_pin();
            let admission: Arc<dyn Admission> =
                Arc::new(ClusterAdmission::new(own, site.store, Arc::default()));
            let routes = Routes::new(peer_service(mesh, departures));
            let options = ServeOptions { pairing: inviter, grace: Duration::ZERO, ..ServeOptions::default() };
            let serving = serve(site.listener, site.identity, admission, routes, options, end.clone());
            tasks.spawn(async move { serving.await.unwrap() });
        };
    let mesh_of = |site: &Site, discovery: Arc<MdnsDiscovery>| {
        MeshHandle::start(MeshOptions {
            identity: site.identity.clone(),
            roster: site.store.clone(),
            discovery,
            facts: site.facts.clone(),
            timing: Timing::WIRED,
        })
    };

    // The first Mac makes a cluster and opens an invite.
    let first = site(first_folder.path(), "studio").await;
    let key = ClusterKey::load_or_create(first_folder.path()).unwrap();
    let cluster = key.cluster();
    let founder = RosterEntry { node_id: first.identity.id(), name: "studio".into(), addresses: vec![] };
    first.store.adopt(key.sign(Roster::found(&key, "desk", founder)).unwrap()).unwrap();
    let coordinator = Arc::new(Coordinator { key, store: first.store.clone() });
    let inviter = Arc::new(Inviter::new(first.identity.clone(), coordinator.clone()));
    let first_discovery = mdns(&first);
    let first_mesh = mesh_of(&first, first_discovery.clone());
    run(first, &first_mesh, coordinator.clone(), Some(inviter.clone()));
    let announcing = tokio::spawn(announce_invites(inviter.clone(), first_discovery.clone(), end.clone()));
    let code = inviter.open(cluster, &[]).code.reveal();

    // The second one is told the code and nothing else.
    let second = site(second_folder.path(), "studio").await;
    let second_discovery = mdns(&second);
    let targets = find_inviters(&*second_discovery, Duration::from_secs(10)).await;
    assert_eq!(targets.len(), 1, "{targets:?}");
    let joined = join(&targets, &code.parse().unwrap(), &second.identity, &second.facts).await.unwrap();
    second.store.adopt(joined.roster).unwrap();
    let (second_id, second_store) = (second.identity.id(), second.store.clone());
    let second_mesh = mesh_of(&second, second_discovery.clone());
    run(second, &second_mesh, Arc::new(Nobody), None);

    // They see each other, though the roster has no address of the first one.
    for (mesh, name) in [(&first_mesh, "studio-2"), (&second_mesh, "studio")] {
        let mut views = mesh.watch();
        let seen = views.wait_for(|views| {
            views
                .iter()
                .any(|view| view.name == name && view.state == PeerState::Alive && view.address.is_some())
        });
        tokio::time::timeout(Duration::from_secs(10), seen).await.expect("both see each other").unwrap();
    }

    // The second one is forgotten, and learns it.
    coordinator.leave(second_id).await.unwrap();
    let mut roster = second_store.watch();
    let told = roster.wait_for(|signed| signed.as_ref().unwrap().roster().was_removed(&second_id));
    tokio::time::timeout(Duration::from_secs(5), told).await.expect("it learns it").unwrap();

    tokio::join!(first_mesh.shutdown(), second_mesh.shutdown());
    tokio::join!(first_discovery.shutdown(), second_discovery.shutdown());
    end.cancel();
    announcing.await.unwrap();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
}
