//! One node's part in jobs without any other node: what it does with its own disk, and with orders.

use super::bundle;
use super::helpers::Helped;
use super::runner::FetchModel;
use super::{Peers, Runners, RunnersOptions, Store};
use futures::FutureExt as _;
use mlxnode_cluster::{Identity, MeshHandle, MeshOptions, NodeFacts, RosterStore, StaticDiscovery, Timing};
use mlxnode_collective::MemberId;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{
    Checkpoint, ContentHash, InputFile, JobKind, JobSpec, RunEnd, RunJob, SavePolicy, Wanted,
};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const FREE: ByteCount = ByteCount(100);

struct Alone {
    _folder: tempfile::TempDir,
    runners: Runners,
}

/// A node of no cluster.
fn alone() -> Alone {
    alone_with(Arc::new(|_| async { Err(Error::Unavailable("no model".into())) }.boxed()))
}

/// The same, which gets models so.
fn alone_with(fetch_model: FetchModel) -> Alone {
    let folder = tempfile::tempdir().unwrap();
    let identity = Arc::new(Identity::generate().unwrap());
    let roster = Arc::new(RosterStore::open(folder.path()).unwrap());
    let mesh = MeshHandle::start(MeshOptions {
        identity: identity.clone(),
        roster: roster.clone(),
        discovery: Arc::new(StaticDiscovery::new([])),
        facts: NodeFacts::default(),
        timing: Timing::WIRED,
    });
    let store = Store::new(folder.path().join("jobs"));
    let peers = Peers { store, mesh, roster, fetching: Arc::default() };
    let options = RunnersOptions {
        command: PathBuf::from("/nonexistent/mlxnode"),
        identity,
        listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
        advertised: "127.0.0.1".into(),
        free: Arc::new(|| FREE),
        is_busy: Arc::new(|| false),
        fetch_model,
    };
    Alone { _folder: folder, runners: Runners::new(options, peers) }
}

fn order(id: &str, epoch: u64) -> RunJob {
    let spec = JobSpec {
        id: id.into(),
        kind: JobKind::Rehearsal,
        model: String::new(),
        configuration: String::new(),
        inputs: Vec::new(),
        memory: None,
        workers: 1,
        stages: 1,
        demand: None,
        share: 25,
        saves: SavePolicy::default(),
        publish: None,
        owner: String::new(),
        labels: Default::default(),
    };
    RunJob { spec, epoch, checkpoints: Vec::new(), stages: Vec::new(), memory: ByteCount(60) }
}

async fn ends(node: &Alone, order: RunJob) -> Result<RunEnd, Error> {
    let mut running = node.runners.run(order).await?;
    let end = async {
        while running.reports.recv().await.is_some() {}
        (&mut running.end).await.unwrap()
    };
    tokio::time::timeout(Duration::from_secs(60), end).await.unwrap()
}

#[tokio::test]
async fn an_attempt_that_was_stopped_before_it_began_ends_at_once() {
    let node = alone();
    node.runners.stop("a", 2, true);
    assert_eq!(ends(&node, order("a", 1)).await, Ok(RunEnd::Yielded));
    node.runners.stop("b", 2, false);
    assert_eq!(ends(&node, order("b", 2)).await, Ok(RunEnd::Yielded));
    // The next one runs, as far as it can here.
    let error = ends(&node, order("a", 3)).await.unwrap_err();
    assert!(matches!(&error, Error::Failed(text) if text.contains("nonexistent")), "{error}");
}

#[tokio::test]
async fn a_node_helps_only_where_there_is_memory_for_it() {
    let node = alone();
    let leader = Identity::generate().unwrap().key_pin();
    let first = node.runners.help(order("a", 1), MemberId(2), leader).unwrap();
    let error = node.runners.help(order("b", 2), MemberId(2), leader).err().unwrap().to_string();
    assert!(error.contains("60") && error.contains("40"), "{error}");
    let small = RunJob { memory: ByteCount(40), ..order("c", 3) };
    let second = node.runners.help(small.clone(), MemberId(2), leader).unwrap();
    drop((first, second));
    // What helped gives its memory back once its task has ended.
    let again = async {
        while node.runners.help(order("b", 4), MemberId(2), leader).is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), again).await.unwrap();
}

fn saved(node: &Alone, id: &str, step: u64) -> (PathBuf, Checkpoint) {
    let job = node.runners.peers().store.job(id).unwrap();
    let draft = bundle::begin(&job, "1").unwrap();
    fs::write(draft.folder().join(bundle::STATE).join("moments"), step.to_string()).unwrap();
    let checkpoint = bundle::seal(&job, draft.folder(), id, step).unwrap();
    (bundle::folder_of(&job, checkpoint.hash), checkpoint)
}

#[tokio::test]
async fn a_checkpoint_is_not_removed_for_what_is_wrong_with_it() {
    let node = alone();
    let peers = node.runners.peers();
    let (whole, checkpoint) = saved(&node, "a", 1);
    assert_eq!(peers.fetch_checkpoint("a", &checkpoint).await, Ok(whole));
    // It cannot be read: that says nothing about what it holds.
    let (folder, checkpoint) = saved(&node, "a", 2);
    let moments = folder.join(bundle::STATE).join("moments");
    fs::remove_file(&moments).unwrap();
    fs::create_dir(&moments).unwrap();
    let error = peers.fetch_checkpoint("a", &checkpoint).await.unwrap_err();
    assert!(matches!(error, Error::Failed(_)), "{error}");
    assert!(moments.exists());
    // It is damaged, and nobody has a better one.
    let (folder, checkpoint) = saved(&node, "a", 3);
    let moments = folder.join(bundle::STATE).join("moments");
    fs::write(&moments, "x").unwrap();
    let error = peers.fetch_checkpoint("a", &checkpoint).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    assert!(moments.exists(), "not before another one takes its place");
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_now_fails_no_job_and_goes_back_to_no_older_checkpoint() {
    let node = alone();
    let (_, older) = saved(&node, "a", 1);
    let (folder, newer) = saved(&node, "a", 2);
    let moments = folder.join(bundle::STATE).join("moments");
    fs::remove_file(&moments).unwrap();
    fs::create_dir(&moments).unwrap();
    let order = RunJob { checkpoints: vec![newer, older], ..order("a", 1) };
    let error = ends(&node, order).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(text) if text.contains("read")), "{error}");
}

#[tokio::test]
async fn a_node_says_which_of_the_wanted_checkpoints_it_has() {
    let node = alone();
    let (_, checkpoint) = saved(&node, "a", 1);
    let absent = Checkpoint { step: 2, hash: ContentHash::of(b"absent"), bytes: 1 };
    let wanted = Wanted { id: "a".into(), checkpoints: vec![checkpoint.clone(), absent], inputs: Vec::new() };
    let held = node.runners.tidy(vec![wanted]).await.unwrap();
    assert_eq!(held, BTreeSet::from([checkpoint.hash]));
}

#[tokio::test]
async fn a_file_of_another_length_is_noticed() {
    let node = alone();
    let peers = node.runners.peers();
    let hash = ContentHash::of(b"rows");
    assert_eq!(peers.has_length(hash, 4).await, None, "nobody has it");
    let mut incoming = peers.store.receive(hash, 4, 0).unwrap();
    incoming.write(b"rows").unwrap();
    incoming.finish().unwrap();
    assert_eq!(peers.has_length(hash, 4).await, Some(true));
    assert_eq!(peers.has_length(hash, 5).await, Some(false));
    let input = InputFile { name: "train.jsonl".into(), hash, bytes: 4 };
    assert_eq!(peers.fetch_input(&input).await, Ok(()));
}

#[tokio::test]
async fn a_node_that_stops_waits_until_whoever_leads_where_it_helps_lets_go_of_it() {
    let node = alone_with(Arc::new(|_| std::future::pending().boxed()));
    let leader = Identity::generate().unwrap().key_pin();
    let spec = JobSpec { kind: JobKind::FineTuning, model: "demo".into(), workers: 2, ..order("a", 1).spec };
    let wanted = RunJob { spec, ..order("a", 1) };
    let mut helper = node.runners.help(wanted.clone(), MemberId(2), leader).unwrap();
    let runners = node.runners.clone();
    let stopping = tokio::spawn(async move { runners.stop_all().await });
    let said = tokio::time::timeout(Duration::from_secs(60), helper.next()).await.unwrap();
    assert!(matches!(said, Ok(Some(Helped::Leaves))));
    assert!(node.runners.help(wanted, MemberId(3), leader).is_err(), "it helps nobody any more");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!stopping.is_finished(), "it is not let go yet");
    drop(helper);
    tokio::time::timeout(Duration::from_secs(20), stopping).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_helps_an_older_attempt_ends_when_a_newer_one_begins() {
    let node = alone_with(Arc::new(|_| std::future::pending().boxed()));
    let leader = Identity::generate().unwrap().key_pin();
    let spec = JobSpec { kind: JobKind::FineTuning, model: "demo".into(), workers: 2, ..order("a", 1).spec };
    let of = |epoch| RunJob { spec: spec.clone(), ..order("a", epoch) };
    let mut older = node.runners.help(of(1), MemberId(2), leader).unwrap();
    let _newer = node.runners.help(of(2), MemberId(2), leader).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), older.next()).await.unwrap();
    assert!(matches!(ended, Err(Error::Unavailable(_))));
    assert!(node.runners.help(of(1), MemberId(3), leader).is_err(), "of an attempt that is over");
}
