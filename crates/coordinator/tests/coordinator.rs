//! The coordinator with made-up nodes and a real control log: stories from load to unload, and what goes wrong between.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use mlxnode_checkpoint::TrainingCost;
use mlxnode_cluster::{ControlEpoch, ControlLog, SqliteControlLog};
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::coordinator::{
    Coordinator, CoordinatorHandle, Limits, LinkWorker, LoadAdapter, LoadUpdate, LoadWish, Nodes,
    ProgressSink, StartScheduler, StartWorker, start,
};
use mlxnode_coordinator::deployments::{Attempt, DeploymentView, StartedWorker, State, Usage};
use mlxnode_coordinator::keys::{KeyRole, KeyWish, find};
use mlxnode_coordinator::placement::{LayerCost, ModelCost, Offer, Wish};
use mlxnode_coordinator::{Error, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

#[derive(Default)]
struct Fakes {
    alive: BTreeSet<u8>,
    /// (node, name, epoch, pid)
    workers: Vec<(u8, String, u64, u32)>,
    schedulers: Vec<(u8, String, u64)>,
    stopped: Vec<(u8, Attempt)>,
    next_pid: u32,
    /// Nodes whose workers never finish loading.
    hanging: BTreeSet<u8>,
    /// Nodes whose workers fail to load.
    failing: BTreeSet<u8>,
    /// Nodes that hold another version of the model.
    outdated: BTreeSet<u8>,
    links: Vec<LinkWorker>,
    /// (node, epoch, name)
    adapters: BTreeSet<(u8, u64, String)>,
    /// For adapters, as it was told with each.
    rooms: Vec<ByteCount>,
    usage: BTreeMap<String, Usage>,
    drained: Vec<String>,
}

#[derive(Clone)]
struct FakeNodes(Arc<Mutex<Fakes>>);

impl FakeNodes {
    fn new(nodes: u8) -> Self {
        Self(Arc::new(Mutex::new(Fakes { alive: (0..nodes).collect(), next_pid: 100, ..Fakes::default() })))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Fakes) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }

    fn check(&self, node: NodeId) -> Result<(), Error> {
        let is_there = self.with(|fakes| fakes.alive.contains(&node.as_bytes()[0]));
        if is_there { Ok(()) } else { Err(Error::Unavailable("the node does not answer".into())) }
    }

    fn running(&self) -> usize {
        self.with(|fakes| fakes.workers.len())
    }
}

impl Nodes for FakeNodes {
    fn offers(&self) -> Vec<Offer> {
        let offer = |number: &u8| Offer {
            node: node(*number),
            name: format!("mac-{number}"),
            budget: ByteCount(400 * MIB),
            used: ByteCount(0),
            prompts: ByteCount(0),
            bytes_per_second: None,
            coordinator: *number == 0,
            round_trips: [].into(),
        };
        self.with(|fakes| fakes.alive.iter().map(offer).collect())
    }

    fn weigh_training(&self, source: String) -> BoxFuture<'static, Result<TrainingCost, Error>> {
        async move { Err(Error::NotFound(format!("there is no model in {source}"))) }.boxed()
    }

    fn weigh(&self, source: String) -> BoxFuture<'static, Result<ModelCost, Error>> {
        let layers = match source.as_str() {
            "/models/small" => 4,
            "/models/large" => 8,
            "/models/huge" => 100,
            _ => {
                return async move { Err(Error::NotFound(format!("there is no model in {source}"))) }.boxed();
            }
        };
        let layer = LayerCost {
            weights: ByteCount(60 * MIB),
            kv_per_token: ByteCount(0),
            state: ByteCount(0),
            kv_window: None,
        };
        let cost = ModelCost {
            architecture: "llama".into(),
            layers: vec![layer; layers],
            joined: vec![],
            passes: 1,
            embedding: ByteCount(0),
            head: ByteCount(0),
            shared: ByteCount(0),
            context_tokens: 1024,
            weight_bits: Some(16.0),
            draft: None,
        };
        async move { Ok(cost) }.boxed()
    }

    fn prepare(
        &self,
        node: NodeId,
        _source: String,
        progress: ProgressSink,
    ) -> BoxFuture<'static, Result<Vec<u8>, Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            progress.report(ByteCount(5), ByteCount(10));
            Ok(vec![u8::from(nodes.with(|fakes| fakes.outdated.contains(&node.as_bytes()[0])))])
        }
        .boxed()
    }

    fn start_worker(
        &self,
        node: NodeId,
        order: StartWorker,
        progress: ProgressSink,
    ) -> BoxFuture<'static, Result<StartedWorker, Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            let number = node.as_bytes()[0];
            let (fails, hangs, pid) = nodes.with(|fakes| {
                fakes.next_pid += 1;
                let pid = fakes.next_pid;
                fakes.workers.push((number, order.attempt.name.clone(), order.attempt.epoch, pid));
                (fakes.failing.contains(&number), fakes.hanging.contains(&number), pid)
            });
            if hangs {
                futures::future::pending::<()>().await;
            }
            if fails {
                nodes.with(|fakes| fakes.workers.retain(|worker| worker.3 != pid));
                return Err(Error::Failed("the weights of layer 3 are truncated".into()));
            }
            progress.report(ByteCount(10), ByteCount(10));
            let address = format!("10.0.0.{number}:{pid}");
            Ok(StartedWorker { address, key_pin: [number; 32], pid, weights: ByteCount(10) })
        }
        .boxed()
    }

    fn link_worker(&self, node: NodeId, order: LinkWorker) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            nodes.with(|fakes| fakes.links.push(order));
            Ok(())
        }
        .boxed()
    }

    fn load_adapter(&self, node: NodeId, order: LoadAdapter) -> BoxFuture<'static, Result<ByteCount, Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            let LoadAdapter { attempt, adapter, room } = order;
            nodes.with(|fakes| fakes.rooms.push(room));
            if adapter.source == "/adapters/other" {
                return Err(Error::Refused("the adapter is for another model".into()));
            }
            let key = (node.as_bytes()[0], attempt.epoch, adapter.key());
            nodes.with(|fakes| fakes.adapters.insert(key));
            Ok(ByteCount(1 << 20))
        }
        .boxed()
    }

    fn unload_adapter(
        &self,
        node: NodeId,
        attempt: Attempt,
        adapter: String,
    ) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            nodes.with(|fakes| fakes.adapters.remove(&(node.as_bytes()[0], attempt.epoch, adapter)));
            Ok(())
        }
        .boxed()
    }

    fn usage(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<Usage, Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            Ok(nodes.with(|fakes| fakes.usage.get(&attempt.name).copied().unwrap_or_default()))
        }
        .boxed()
    }

    fn drain(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            nodes.with(|fakes| fakes.drained.push(attempt.name));
            Ok(())
        }
        .boxed()
    }

    fn start_scheduler(&self, node: NodeId, order: StartScheduler) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            let attempt = order.attempt;
            nodes.with(|fakes| fakes.schedulers.push((node.as_bytes()[0], attempt.name, attempt.epoch)));
            Ok(())
        }
        .boxed()
    }

    fn stop_workers(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        async move {
            nodes.check(node)?;
            let number = node.as_bytes()[0];
            nodes.with(|fakes| {
                let stays = |at: u8, name: &str, epoch: u64| {
                    !(at == number && name == attempt.name && epoch <= attempt.epoch)
                };
                fakes.workers.retain(|(at, name, epoch, _)| stays(*at, name, *epoch));
                fakes.schedulers.retain(|(at, name, epoch)| stays(*at, name, *epoch));
                fakes.stopped.push((number, attempt));
            });
            Ok(())
        }
        .boxed()
    }
}

struct Story {
    nodes: FakeNodes,
    folder: TempDir,
    handle: CoordinatorHandle,
    coordinator: Coordinator,
}

impl Story {
    async fn new(nodes: u8) -> Self {
        Self::with(FakeNodes::new(nodes), tempfile::tempdir().unwrap(), Limits::default()).await
    }

    async fn with(nodes: FakeNodes, folder: TempDir, limits: Limits) -> Self {
        let log: Arc<dyn ControlLog> =
            Arc::new(SqliteControlLog::open(&folder.path().join("control.db")).unwrap());
        let (handle, coordinator) = start(limits, log, Arc::new(nodes.clone())).await.unwrap();
        Self { nodes, folder, handle, coordinator }
    }

    async fn load(&self, name: &str, stages: Option<usize>) -> Result<DeploymentView, Error> {
        within(self.handle.load(wish(name, stages)).ready()).await
    }

    async fn load_adapter(&self, source: &str) -> Result<(DeploymentView, String), Error> {
        self.handle.load_adapter("small".into(), source.to_owned(), None).await
    }

    /// Waits until the deployments are as described.
    async fn eventually(&self, what: &str, is_so: impl Fn(&[DeploymentView]) -> bool) -> Vec<DeploymentView> {
        let mut watch = self.handle.watch();
        let found = tokio::time::timeout(Duration::from_secs(10), watch.wait_for(|views| is_so(views))).await;
        let Ok(Ok(views)) = found else { panic!("never {what}: {:?}", self.handle.list()) };
        views.clone()
    }

    async fn restart(self) -> Self {
        let Self { nodes, folder, handle, coordinator } = self;
        coordinator.stop().await;
        drop(handle);
        Self::with(nodes, folder, Limits::default()).await
    }
}

fn wish(name: &str, stages: Option<usize>) -> LoadWish {
    let wish = Wish { stages, ..Wish::default() };
    LoadWish { source: format!("/models/{name}"), wish, ..LoadWish::default() }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), work).await.expect("took too long")
}

#[tokio::test]
async fn a_model_is_loaded_on_one_two_and_three_nodes() {
    for stages in 1..=3 {
        let story = Story::new(3).await;
        let view = story.load("small", Some(stages)).await.unwrap();
        assert_eq!((view.name.as_str(), view.state, view.stages.len()), ("small", State::Ready, stages));
        assert_eq!(story.nodes.running(), stages);
        assert_eq!(story.nodes.with(|fakes| fakes.schedulers.len()), 1);
        assert_eq!(story.handle.list(), [view]);
        story.nodes.with(|fakes| {
            for link in &fakes.links {
                assert_eq!(link.links.next.is_some(), stages > 1);
                assert_eq!(link.links.drivers.len(), 1);
            }
        });
        within(story.handle.unload("small".into())).await.unwrap();
        assert_eq!(story.nodes.running(), 0);
        assert_eq!(story.nodes.with(|fakes| fakes.schedulers.len()), 0);
        assert_eq!(story.handle.list(), []);
        story.coordinator.stop().await;
    }
}

#[tokio::test]
async fn a_load_tells_how_it_comes_along() {
    let story = Story::new(2).await;
    let updates: Vec<_> = within(story.handle.load(wish("large", None)).collect::<Vec<_>>()).await;
    let mut phases: Vec<&str> = Vec::new();
    for update in &updates {
        match update.as_ref().unwrap() {
            LoadUpdate::Progress(progress) => phases.push(progress.phase.name()),
            LoadUpdate::Ready(view) => assert_eq!(view.stages.len(), 2),
        }
    }
    assert!(matches!(updates.last(), Some(Ok(LoadUpdate::Ready(_)))));
    phases.dedup();
    for phase in ["resolving", "planning", "downloading", "starting", "loading", "linking"] {
        assert!(phases.contains(&phase), "{phase} is missing in {phases:?}");
    }
}

#[tokio::test]
async fn loading_again_succeeds_at_once_and_another_model_of_that_name_is_refused() {
    let story = Story::new(1).await;
    let first = story.load("small", None).await.unwrap();
    assert_eq!(story.load("small", None).await.unwrap(), first);
    let other = LoadWish { name: Some("small".into()), ..wish("large", None) };
    let error = within(story.handle.load(other).ready()).await.unwrap_err();
    assert!(matches!(error, Error::NameTaken { .. }), "{error}");
    let bad = LoadWish { name: Some("no spaces".into()), ..wish("large", None) };
    assert!(matches!(within(story.handle.load(bad).ready()).await, Err(Error::Invalid(_))));
    assert_eq!(story.nodes.running(), 1);
}

#[tokio::test]
async fn a_model_that_is_missing_or_too_large_is_refused_and_forgotten() {
    let story = Story::new(2).await;
    assert!(matches!(story.load("missing", None).await, Err(Error::NotFound(_))));
    let Err(Error::DoesNotFit(text)) = story.load("huge", None).await else { panic!("it fits") };
    assert!(text.contains("is missing; what would fit: "), "{text}");
    assert_eq!(story.handle.list(), []);
    assert!(matches!(within(story.handle.unload("huge".into())).await, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_plan_is_told_without_loading() {
    let story = Story::new(2).await;
    let plan = |name: &str, wish: Wish| within(story.handle.plan(format!("/models/{name}"), wish));
    let report = plan("large", Wish::default()).await.unwrap();
    assert_eq!(report.plan.unwrap().stages.len(), 2);
    assert_eq!((report.layers, report.context_tokens), (8, 1024));
    let huge = plan("huge", Wish::default()).await.unwrap();
    assert!(huge.plan.is_none() && huge.explanation.starts_with("the model does not fit"), "{huge:?}");
    assert_eq!(huge.budgets.len(), 2);
    let nine = plan("large", Wish { stages: Some(9), ..Wish::default() }).await;
    assert!(matches!(nine, Err(Error::Invalid(_))));
    let loaded = story.load("small", None).await.unwrap();
    let beside = plan("large", Wish::default()).await.unwrap();
    assert!(beside.plan.is_none(), "the first model counts");
    assert_eq!(beside.budgets[0].used, loaded.stages[0].memory);
    assert_eq!(story.nodes.running(), 1);
}

#[tokio::test]
async fn a_failed_load_ends_the_workers_that_had_started() {
    let story = Story::new(2).await;
    story.nodes.with(|fakes| fakes.failing.insert(1));
    let error = story.load("large", None).await.unwrap_err();
    assert_eq!(error, Error::Failed("the weights of layer 3 are truncated".into()));
    assert_eq!(story.nodes.running(), 0);
    assert_eq!(story.handle.list(), []);
}

#[tokio::test]
async fn nodes_with_different_versions_of_a_model_do_not_run_it_together() {
    let story = Story::new(2).await;
    story.nodes.with(|fakes| fakes.outdated.insert(1));
    let error = story.load("large", None).await.unwrap_err();
    assert!(matches!(&error, Error::Refused(text) if text.contains("another version")), "{error}");
}

#[tokio::test]
async fn a_load_that_is_dropped_is_taken_back() {
    let story = Story::new(2).await;
    story.nodes.with(|fakes| fakes.hanging.insert(1));
    let mut first = story.handle.load(wish("large", None));
    let second = story.handle.load(wish("large", None));
    within(async {
        while let Some(Ok(LoadUpdate::Progress(progress))) = first.next().await {
            if progress.phase.name() == "loading" {
                break;
            }
        }
    })
    .await;
    drop(first);
    story.eventually("loading for the second caller", |views| views.len() == 1).await;
    drop(second);
    story.eventually("empty", |views| views.is_empty()).await;
    assert_eq!(story.nodes.running(), 0);
}

#[tokio::test]
async fn a_node_that_dies_while_loading_ends_the_load_with_its_name() {
    let story = Story::new(2).await;
    story.nodes.with(|fakes| fakes.hanging.insert(1));
    let handle = story.handle.clone();
    let load = tokio::spawn(async move { handle.load(wish("large", None)).ready().await });
    while story.nodes.running() < 2 {
        tokio::task::yield_now().await;
    }
    story.nodes.with(|fakes| {
        fakes.alive.remove(&1);
        fakes.workers.retain(|worker| worker.0 != 1);
    });
    story.handle.node_lost(node(1));
    assert_eq!(within(load).await.unwrap(), Err(Error::Unavailable("mac-1 was lost".into())));
    assert_eq!(story.nodes.running(), 0);
}

#[tokio::test]
async fn a_load_that_stands_still_is_given_up() {
    let limits = Limits { standstill: Duration::from_millis(50), ..Limits::default() };
    let story = Story::with(FakeNodes::new(1), tempfile::tempdir().unwrap(), limits).await;
    story.nodes.with(|fakes| fakes.hanging.insert(0));
    let error = story.load("small", None).await.unwrap_err();
    assert_eq!(error, Error::TimedOut("loading layers 0..4 on mac-0 did not move for 0 s".into()));
    assert_eq!(story.nodes.running(), 0);
}

#[tokio::test]
async fn a_killed_worker_is_replaced_in_a_higher_epoch() {
    let story = Story::new(2).await;
    let before = story.load("large", None).await.unwrap();
    let (number, name, epoch, pid) = story.nodes.with(|fakes| fakes.workers.remove(0));
    let attempt = Attempt { name, epoch };
    story.handle.worker_ended(node(number), attempt, pid, "ended with signal 9".into());
    let views = story
        .eventually("ready again", |views| {
            views.iter().all(|view| view.state == State::Ready && view.epoch > before.epoch)
        })
        .await;
    assert_eq!(views.len(), 1);
    story.nodes.with(|fakes| {
        assert_eq!(fakes.workers.len(), 2);
        assert!(fakes.workers.iter().all(|worker| worker.2 == views[0].epoch), "the old ones are gone");
    });
}

#[tokio::test]
async fn a_lost_node_is_replaced_by_another_or_waited_for() {
    let story = Story::new(2).await;
    story.load("large", None).await.unwrap();
    story.nodes.with(|fakes| fakes.alive.remove(&1));
    story.handle.node_lost(node(1));
    let failed = |views: &[DeploymentView]| views.iter().any(|view| view.state == State::Failed);
    let views = story.eventually("failed", failed).await;
    assert!(views[0].detail.contains("does not fit"), "{}", views[0].detail);
    story.nodes.with(|fakes| fakes.alive.insert(2));
    story.handle.node_joined(node(2));
    let ready = |views: &[DeploymentView]| views.iter().any(|view| view.state == State::Ready);
    let views = story.eventually("ready", ready).await;
    assert_eq!(views[0].stages[1].node, node(2));
}

#[tokio::test]
async fn a_restarted_coordinator_forms_again_what_was_wanted() {
    let story = Story::new(3).await;
    let before = story.load("large", Some(2)).await.unwrap();
    story.load("small", None).await.unwrap();
    within(story.handle.unload("small".into())).await.unwrap();
    let story = story.restart().await;
    let ready = |views: &[DeploymentView]| views.iter().any(|view| view.state == State::Ready);
    let views = story.eventually("ready", ready).await;
    assert_eq!(views.len(), 1);
    assert_eq!((views[0].name.as_str(), views[0].stages.len()), ("large", 2));
    assert!(views[0].epoch > before.epoch);
    story.nodes.with(|fakes| {
        assert_eq!(fakes.workers.len(), 2, "those from before the restart are gone");
        assert!(fakes.workers.iter().all(|worker| worker.2 == views[0].epoch));
    });
}

#[tokio::test]
async fn the_control_log_is_folded_and_still_says_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let story = Story::with(FakeNodes::new(1), folder, Limits::default()).await;
    story.load("small", None).await.unwrap();
    // Each unsuccessful load writes that it is wanted and that it is not.
    for _ in 0..510 {
        assert!(story.load("missing", None).await.is_err());
    }
    let epoch = story.handle.list()[0].epoch;
    let path = story.folder.path().join("control.db");
    let story = story.restart().await;
    let ready = |views: &[DeploymentView]| views.iter().any(|view| view.state == State::Ready);
    let views = story.eventually("ready", ready).await;
    assert!(views[0].epoch > epoch + 1000, "epochs of folded records are not used again");
    story.coordinator.stop().await;
    drop(story.handle);
    let log = SqliteControlLog::open(&path).unwrap();
    assert!(log.snapshot().await.unwrap().is_some());
    assert!(log.entries_after(log.snapshot().await.unwrap().unwrap().index).await.unwrap().len() < 100);
}

#[tokio::test]
async fn adapters_are_read_by_all_stages_and_survive_losses_restarts_and_folds() {
    let story = Story::new(2).await;
    let view = story.load("small", Some(2)).await.unwrap();
    let (loaded, name) = within(story.load_adapter("/adapters/poet")).await.unwrap();
    assert_eq!((loaded.adapters.len(), name.as_str()), (1, "poet"));
    let of_epoch = |story: &Story, epoch: u64| {
        story.nodes.with(|fakes| fakes.adapters.iter().filter(|adapter| adapter.1 == epoch).count())
    };
    assert_eq!(of_epoch(&story, view.epoch), 2);
    // They may take what the layers leave of the nodes, and what others take counts when they are read.
    within(story.load_adapter("/adapters/second")).await.unwrap();
    let rooms = story.nodes.with(|fakes| fakes.rooms.clone());
    assert_eq!((rooms.len(), &rooms[..2]), (4, &rooms[2..]));
    let layers = view.stages.iter().map(|stage| stage.memory).max().unwrap();
    assert!(
        rooms.iter().all(|room| *room == ByteCount(400 * MIB).saturating_sub(layers)),
        "{rooms:?}, {layers}"
    );
    within(story.handle.unload_adapter("small".into(), "second".into())).await.unwrap();
    // Twice is once; a name belongs to one source; what does not fit is nowhere.
    within(story.load_adapter("/adapters/poet")).await.unwrap();
    let taken = within(story.handle.load_adapter("small".into(), "/b".into(), Some("poet".into()))).await;
    assert!(matches!(taken, Err(Error::NameTaken { .. })), "{taken:?}");
    let other = within(story.load_adapter("/adapters/other")).await;
    assert!(matches!(other, Err(Error::Refused(_))), "{other:?}");
    assert_eq!(story.handle.list()[0].adapters.len(), 1);
    for (deployment, adapter) in [("nobody", "poet"), ("small", "nobody")] {
        let gone = within(story.handle.unload_adapter(deployment.into(), adapter.into())).await;
        assert!(matches!(gone, Err(Error::NotFound(_))), "{gone:?}");
    }

    let (node, pid) = (view.stages[1].node, view.stages[1].pid.unwrap());
    let attempt = Attempt { name: "small".into(), epoch: view.epoch };
    story.handle.worker_ended(node, attempt, pid, "ended with signal 9".into());
    let epoch = view.epoch;
    let is_back = move |views: &[DeploymentView]| views[0].epoch > epoch && views[0].state == State::Ready;
    let views = story.eventually("ready again", is_back).await;
    assert_eq!(of_epoch(&story, views[0].epoch), 2, "the workers of the new attempt have it");

    let story = story.restart().await;
    let epoch = views[0].epoch;
    let is_back = move |views: &[DeploymentView]| {
        views.first().is_some_and(|view| view.epoch > epoch && view.state == State::Ready)
    };
    let views = story.eventually("formed again", is_back).await;
    assert_eq!(views[0].adapters[0].source, "/adapters/poet");
    assert_eq!(of_epoch(&story, views[0].epoch), 2);
    within(story.handle.unload_adapter(String::new(), "poet".into())).await.unwrap();
    assert_eq!((story.handle.list()[0].adapters.len(), of_epoch(&story, views[0].epoch)), (0, 0));
    let story = story.restart().await;
    let views = story.eventually("formed once more", |views| views[0].state == State::Ready).await;
    assert!(views[0].adapters.is_empty());
}

#[tokio::test]
async fn keys_are_told_at_once_and_survive_restarts_and_folds() {
    let story = Story::new(1).await;
    let wish = |name: &str| KeyWish { name: name.into(), role: KeyRole::Admin, ..KeyWish::default() };
    let mut told = story.handle.keys();
    let (ann, entry) = story.handle.create_key(wish("ann")).await.unwrap();
    assert_eq!(*told.borrow_and_update(), std::slice::from_ref(&entry));
    let (bob, _) = story.handle.create_key(wish("bob")).await.unwrap();
    assert_ne!(ann, bob);
    assert!(matches!(story.handle.create_key(wish("ann")).await, Err(Error::Refused(_))));
    story.handle.revoke_key("bob".into()).await.unwrap();
    assert!(matches!(story.handle.revoke_key("bob".into()).await, Err(Error::NotFound(_))));
    assert_eq!(*told.borrow(), std::slice::from_ref(&entry));
    let story = story.restart().await;
    assert_eq!(*story.handle.keys().borrow(), std::slice::from_ref(&entry));
    // Enough decisions for a snapshot: the key is in it.
    for _ in 0..500 {
        story.handle.create_key(wish("short-lived")).await.unwrap();
        story.handle.revoke_key("short-lived".into()).await.unwrap();
    }
    let path = story.folder.path().join("control.db");
    let story = story.restart().await;
    let keys = story.handle.keys().borrow().clone();
    assert_eq!(find(&keys, ann.reveal()), Some(&entry));
    assert_eq!(find(&keys, bob.reveal()), None);
    story.coordinator.stop().await;
    drop(story.handle);
    let log = SqliteControlLog::open(&path).unwrap();
    let snapshot = log.snapshot().await.unwrap().unwrap();
    let state = String::from_utf8(snapshot.state).unwrap();
    assert!(!state.contains(&ann.reveal()[4..]), "the text of a key is kept nowhere");
}

#[tokio::test]
async fn a_snapshot_of_before_there_were_keys_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let log = SqliteControlLog::open(&folder.path().join("control.db")).unwrap();
    let epoch = ControlEpoch { generation: 1, term: 1 };
    log.append(epoch, br#"{"deployment":{"kind":"removed","name":"a","epoch":3}}"#.to_vec()).await.unwrap();
    log.compact(1, br#"{"deployments":[{"kind":"epochs","used":3}]}"#.to_vec()).await.unwrap();
    let (handle, _coordinator) =
        start(Limits::default(), Arc::new(log), Arc::new(FakeNodes::new(1))).await.unwrap();
    assert!(handle.keys().borrow().is_empty());
}

#[tokio::test]
async fn a_coordinator_whose_log_belongs_to_another_one_ends() {
    let folder = tempfile::tempdir().unwrap();
    let log = SqliteControlLog::open(&folder.path().join("control.db")).unwrap();
    let nodes = FakeNodes::new(1);
    let (handle, mut coordinator) =
        start(Limits::default(), Arc::new(log.clone()), Arc::new(nodes.clone())).await.unwrap();
    log.append(ControlEpoch { generation: 2, term: 1 }, b"{}".to_vec()).await.unwrap();
    assert!(within(handle.load(wish("small", None)).ready()).await.is_err());
    within(coordinator.ended()).await;
    assert_eq!(nodes.running(), 0);
}

#[tokio::test]
async fn a_log_of_another_version_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let log = SqliteControlLog::open(&folder.path().join("control.db")).unwrap();
    log.append(ControlEpoch { generation: 1, term: 1 }, br#"{"job":{"kind":"wanted"}}"#.to_vec())
        .await
        .unwrap();
    let started = start(Limits::default(), Arc::new(log), Arc::new(FakeNodes::new(1))).await;
    let Err(Error::Failed(text)) = started.map(|_| ()) else { panic!("it started") };
    assert!(text.starts_with("record 1 of the control log cannot be read"), "{text}");
}

#[tokio::test]
async fn calls_to_a_stopped_coordinator_end_with_an_error() {
    let story = Story::new(1).await;
    story.nodes.with(|fakes| fakes.hanging.insert(0));
    let handle = story.handle.clone();
    let load = handle.load(wish("small", None));
    story.coordinator.stop().await;
    assert!(matches!(within(load.ready()).await, Err(Error::Unavailable(_))));
    assert!(matches!(within(handle.unload("small".into())).await, Err(Error::Unavailable(_))));
    assert!(matches!(
        within(handle.plan("/models/small".into(), Wish::default())).await,
        Err(Error::Unavailable(_))
    ));
}
