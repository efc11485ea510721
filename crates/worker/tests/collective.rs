//! Several workers train together over loopback with mutual TLS, each with its own thread for the trainer and one for the network.
//!
//! The trainer is simulated; the sums, streams, states and losses are real.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test that cannot go on stops

use bytes::Bytes;
use mlxnode_cluster::{ConnectOptions, ExpectedKey, Identity, connect};
use mlxnode_collective::{MemberId, RoundsOptions};
use mlxnode_compute::{Alone, MicroBatches, Reduce, ReduceError, StepError, Sum, Tally, Turn, sum_step};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::collective_client::CollectiveClient;
use mlxnode_proto::internal::v1::exchange_frame::Body;
use mlxnode_worker::{
    CollectiveEndpoint, CollectiveOptions, ConductorEvent, GroupConductor, GroupPeer, GroupWorker,
};
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc;

const MICRO_BATCHES: u32 = 6;

/// All that the simulated training changes.
#[derive(Clone, Debug, PartialEq)]
struct State {
    applied: u64,
    parameters: Vec<f32>,
}

impl State {
    fn new(values: usize) -> Self {
        Self { applied: 0, parameters: (0..values).map(|at| (at as f32 * 0.01).sin()).collect() }
    }

    fn apply(&mut self, sum: &Sum) {
        assert_eq!(sum.step, self.applied, "an update was made twice or left out");
        for (parameter, value) in self.parameters.iter_mut().zip(floats(&sum.values)) {
            *parameter -= value / sum.tally.tokens as f32;
        }
        self.applied += 1;
    }

    fn save(&self, folder: &Path) {
        let bytes: Vec<u8> = self.parameters.iter().flat_map(|value| value.to_le_bytes()).collect();
        std::fs::write(folder.join("parameters"), bytes).unwrap();
        std::fs::write(folder.join("applied"), self.applied.to_string()).unwrap();
    }

    fn load(folder: &Path) -> Self {
        let bytes = Bytes::from(std::fs::read(folder.join("parameters")).unwrap());
        let applied = std::fs::read_to_string(folder.join("applied")).unwrap().parse().unwrap();
        Self { applied, parameters: floats(&bytes).collect() }
    }
}

fn floats(bytes: &Bytes) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap()))
}

impl MicroBatches for State {
    type Value = Vec<f32>;
    type Error = Infallible;
    fn gradient(&mut self, step: u64, index: u32) -> Result<(Vec<f32>, Tally), Infallible> {
        let shift = step as f32 * 0.3 + index as f32 * 0.7;
        let values = self.parameters.iter().enumerate().map(|(at, value)| (at as f32 + shift).cos() + value);
        Ok((values.collect(), Tally { loss: f64::from(shift), tokens: u64::from(index) + 3 }))
    }
    fn add(&mut self, left: Vec<f32>, right: Vec<f32>) -> Result<Vec<f32>, Infallible> {
        Ok(left.iter().zip(&right).map(|(left, right)| left + right).collect())
    }
    fn bytes(&mut self, value: &Vec<f32>) -> Result<Bytes, Infallible> {
        Ok(value.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into())
    }
}

/// Trains until `steps`, or until told to die.
fn train(
    group: &mut dyn Reduce,
    mut state: State,
    steps: u64,
    progress: &AtomicU64,
    dies: &AtomicBool,
    pause: Duration,
) -> Result<State, ReduceError> {
    while state.applied < steps {
        std::thread::sleep(pause); // as long as a gradient takes
        if dies.load(Ordering::Acquire) {
            return Err(ReduceError::Left("killed".into()));
        }
        match group.begin(state.applied)? {
            Turn::Save(folder) => state.save(&folder),
            Turn::Load(folder) => state = State::load(&folder),
            Turn::Deal(deal) => {
                let mut work = state.clone();
                match sum_step(group, deal, &mut work) {
                    Ok(Some(sum)) => state.apply(&sum),
                    Ok(None) => {}
                    Err(StepError::Reduce(error)) => return Err(error),
                    Err(StepError::Gradient(never)) => match never {},
                }
                progress.store(state.applied, Ordering::Release);
            }
        }
    }
    Ok(state)
}

fn alone(values: usize, steps: u64) -> State {
    let (progress, dies) = Default::default();
    let mut group = Alone::new(MICRO_BATCHES);
    train(&mut group, State::new(values), steps, &progress, &dies, Duration::ZERO).unwrap()
}

/// A folder that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("mlxnode-collective-{name}-{}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A worker with its trainer.
struct Worker {
    worker: GroupWorker,
    endpoint: Arc<CollectiveEndpoint>,
    trainer: JoinHandle<Result<State, ReduceError>>,
    progress: Arc<AtomicU64>,
    dies: Arc<AtomicBool>,
}

/// A job.
struct Job {
    node: Arc<Identity>,
    conductor: GroupConductor,
    events: mpsc::Receiver<ConductorEvent>,
    scratch: Scratch,
    values: usize,
    steps: u64,
    pause: Duration,
    next: u64,
}

impl Job {
    fn new(name: &str, workers: usize, values: usize, steps: u64, pause: Duration) -> Self {
        let node = Arc::new(Identity::generate().unwrap());
        let options = RoundsOptions { expected: workers, ..RoundsOptions::default() };
        let (conductor, events) = GroupConductor::start(options, 0, node.clone());
        Self { node, conductor, events, scratch: Scratch::new(name), values, steps, pause, next: 0 }
    }

    async fn start_worker(&mut self) -> Worker {
        self.next += 1;
        let member = MemberId(self.next);
        let folder = self.scratch.0.join(self.next.to_string());
        let options = CollectiveOptions::new(IpAddr::from(Ipv4Addr::LOCALHOST), folder);
        let endpoint = Arc::new(CollectiveEndpoint::start(options, member, self.node.key_pin()).unwrap());
        let address = endpoint.address();
        let peer = GroupPeer { address: address.to_string(), key_pin: endpoint.key_pin() };
        let worker = GroupWorker { member, control: address, peer };
        self.conductor.add(worker.clone()).await;
        let (progress, dies) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let trainer = std::thread::spawn({
            let (progress, dies, endpoint) = (progress.clone(), dies.clone(), endpoint.clone());
            let (values, steps, pause) = (self.values, self.steps, self.pause);
            move || {
                let mut group = endpoint.join(values, MICRO_BATCHES);
                let trained = train(&mut group, State::new(values), steps, &progress, &dies, pause);
                if trained.is_ok() {
                    // Others may need the last sum from this one: its process would be ended by its node.
                    std::mem::forget(group);
                }
                trained
            }
        });
        Worker { worker, endpoint, trainer, progress, dies }
    }
}

async fn finished(worker: Worker) -> State {
    let trained = tokio::task::spawn_blocking(move || (worker.trainer.join().unwrap(), worker.endpoint));
    let (trained, _endpoint) = tokio::time::timeout(Duration::from_secs(60), trained).await.unwrap().unwrap();
    trained.unwrap()
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..2000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 20 s: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_two_and_three_workers_give_the_same_bits() {
    let values = mlxnode_collective::CHUNK_VALUES + 1001; // more than one piece for one member
    let expected = alone(values, 3);
    for count in 1..=3 {
        let mut job = Job::new(&format!("bits{count}"), count, values, 3, Duration::ZERO);
        let mut workers = Vec::new();
        for _ in 0..count {
            workers.push(job.start_worker().await);
        }
        // Side by side: whoever is through first stays for the others.
        for state in futures::future::join_all(workers.into_iter().map(finished)).await {
            assert!(state == expected, "{count} workers");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_and_a_new_one_do_not_show_in_the_result() {
    let (values, steps) = (5000, 60);
    let expected = alone(values, steps);
    let mut job = Job::new("lost", 3, values, steps, Duration::from_millis(10));
    let (first, second) = (job.start_worker().await, job.start_worker().await);
    let third = job.start_worker().await;
    until("ten steps", || third.progress.load(Ordering::Acquire) >= 10).await;

    // It ends in the middle of something, with its listener and all its streams.
    third.dies.store(true, Ordering::Release);
    let Worker { worker, trainer, endpoint, .. } = third;
    tokio::task::spawn_blocking(move || {
        drop(endpoint);
        trainer.join().unwrap().unwrap_err()
    })
    .await
    .unwrap();
    let event = tokio::time::timeout(Duration::from_secs(10), job.events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, ConductorEvent::Lost { member, .. } if member == worker.member), "{event:?}");
    let at = first.progress.load(Ordering::Acquire);
    until("two go on", || first.progress.load(Ordering::Acquire) > at + 3).await;

    // Begins from nothing; the others give it their state.
    let fourth = job.start_worker().await;
    let members = job.conductor.summary();
    until("three again", || members.borrow().members == 3 && fourth.progress.load(Ordering::Acquire) > at)
        .await;
    assert!(fourth.progress.load(Ordering::Acquire) <= steps);
    for state in futures::future::join_all([first, second, fourth].map(finished)).await {
        assert!(state == expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_group_ends_with_whoever_controls_it() {
    let mut job = Job::new("orphans", 2, 100, u64::MAX, Duration::from_millis(1));
    let workers = [job.start_worker().await, job.start_worker().await];
    until("steps", || workers[0].progress.load(Ordering::Acquire) > 3).await;
    drop(job.conductor);
    for worker in workers {
        let ended = tokio::task::spawn_blocking(move || worker.trainer.join().unwrap()).await.unwrap();
        assert!(matches!(ended, Err(ReduceError::Left(_))), "{ended:?}");
    }
}

/// Somebody with a key, in the place of a worker.
struct Impostor {
    identity: Identity,
    address: String,
    key: ExpectedKey,
}

impl Impostor {
    async fn exchange(&self, frames: Vec<Body>) -> tonic::Status {
        let channel = connect(&self.address, &self.identity, self.key.clone(), ConnectOptions::default())
            .await
            .unwrap();
        let mut client = CollectiveClient::new(channel);
        let frames = frames.into_iter().map(|body| proto::ExchangeFrame { body: Some(body) });
        // The stream stays open: a worker does not hang up either.
        let frames = futures::StreamExt::chain(futures::stream::iter(frames), futures::stream::pending());
        let answer = async {
            match client.exchange(frames).await {
                Ok(answer) => answer.into_inner().message().await.unwrap_err(),
                Err(status) => status,
            }
        };
        tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refuses_strangers_stale_epochs_and_frames_that_do_not_fit() {
    use mlxnode_collective::{CatchUp, Formation, Order, Report};
    use mlxnode_worker::GroupClient;

    let node = Identity::generate().unwrap();
    let scratch = Scratch::new("refusals");
    let options = CollectiveOptions::new(IpAddr::from(Ipv4Addr::LOCALHOST), scratch.0.clone());
    let endpoint = Arc::new(CollectiveEndpoint::start(options, MemberId(1), node.key_pin()).unwrap());
    let key = ExpectedKey::Pin(endpoint.key_pin());
    let address = endpoint.address().to_string();
    let impostor =
        Impostor { identity: Identity::generate().unwrap(), address: address.clone(), key: key.clone() };

    // A key that nobody named is not let in at all.
    let refused =
        connect(&address, &impostor.identity, key.clone(), ConnectOptions::default()).await.unwrap_err();
    assert!(refused.to_string().contains("refused this key"), "{refused}");

    let (client, mut reports) =
        GroupClient::connect(endpoint.address(), endpoint.key_pin(), &node).await.unwrap();
    let second = GroupClient::connect(endpoint.address(), endpoint.key_pin(), &node).await.unwrap_err();
    assert!(second.to_string().contains("controlled by another stream"), "{second}");

    let trainer = std::thread::spawn({
        let endpoint = endpoint.clone();
        move || {
            let mut group = endpoint.join(10, 2);
            let turn = group.begin(7);
            (group, turn)
        }
    });
    assert_eq!(reports.next().await.unwrap(), Some(Report::Ready { position: 7 }));
    let peer = |identity: &Identity, address: &str| GroupPeer {
        address: address.into(),
        key_pin: identity.key_pin(),
    };
    let own = GroupPeer { address: address.clone(), key_pin: endpoint.key_pin() };
    let peers = [(MemberId(1), own), (MemberId(2), peer(&impostor.identity, "127.0.0.1:1"))].into();
    let orders = [1, 2].map(|id| Order { member: MemberId(id), catch_up: CatchUp::Nothing });
    let form = |epoch| Formation { epoch, step: 7, members: orders.to_vec() };
    let greeting = |epoch, member| Body::Greeting(proto::ExchangeGreeting { epoch, member });
    let part = |step, start, end, offset, length: usize| {
        let values = vec![0; length].into();
        Body::Part(proto::ExchangePart { step, start, end, offset, values })
    };
    // [micro-batch 0: worker 1, micro-batch 1: worker 2; values 0..5: worker 1, 5..10: worker 2]
    let fitting = || part(7, 1, 2, 0, 20);
    let sum = |offset| Body::Sum(proto::ExchangeSum { step: 7, offset, values: vec![0; 20].into() });
    let cases: Vec<(&str, Vec<Body>, tonic::Code)> = vec![
        ("no greeting", vec![fitting()], tonic::Code::InvalidArgument),
        ("a stale epoch", vec![greeting(1, 2)], tonic::Code::FailedPrecondition),
        ("another's name", vec![greeting(0, 1)], tonic::Code::PermissionDenied),
        ("nobody's name", vec![greeting(0, 9)], tonic::Code::PermissionDenied),
        ("two greetings", vec![greeting(0, 2), greeting(0, 2)], tonic::Code::InvalidArgument),
        ("the same twice", vec![greeting(0, 2), fitting(), fitting()], tonic::Code::InvalidArgument),
        ("a later step", vec![greeting(0, 2), part(9, 1, 2, 0, 20)], tonic::Code::InvalidArgument),
        ("an earlier step", vec![greeting(0, 2), part(6, 1, 2, 0, 20)], tonic::Code::InvalidArgument),
        ("another's part", vec![greeting(0, 2), part(7, 0, 1, 0, 20)], tonic::Code::InvalidArgument),
        ("no node", vec![greeting(0, 2), part(7, 1, 1, 0, 20)], tonic::Code::InvalidArgument),
        ("a hostile node", vec![greeting(0, 2), part(7, 5, u32::MAX, 0, 20)], tonic::Code::InvalidArgument),
        ("another's slice", vec![greeting(0, 2), part(7, 1, 2, 5, 20)], tonic::Code::InvalidArgument),
        ("between pieces", vec![greeting(0, 2), part(7, 1, 2, 1, 16)], tonic::Code::InvalidArgument),
        ("beyond the end", vec![greeting(0, 2), part(7, 1, 2, u64::MAX, 20)], tonic::Code::InvalidArgument),
        ("too short", vec![greeting(0, 2), part(7, 1, 2, 0, 19)], tonic::Code::InvalidArgument),
        ("too long", vec![greeting(0, 2), part(7, 1, 2, 0, 24)], tonic::Code::InvalidArgument),
        ("this one's own sum", vec![greeting(0, 2), sum(0)], tonic::Code::InvalidArgument),
        ("a sum twice", vec![greeting(0, 2), sum(5), sum(5)], tonic::Code::InvalidArgument),
        ("not idle", vec![greeting(0, 2), Body::Idle(7)], tonic::Code::InvalidArgument),
    ];
    let mut epoch = 10;
    client.halt(epoch, 0).unwrap();
    client.form(&form(epoch), &peers).unwrap();
    let (_group, turn) = trainer.join().unwrap();
    turn.unwrap();
    for (name, mut frames, code) in cases {
        // Every member has one stream in a formation, and loses it with the first wrong frame.
        epoch += 1;
        client.halt(epoch, 0).unwrap();
        client.form(&form(epoch), &peers).unwrap();
        for frame in &mut frames {
            if let Body::Greeting(greeting) = frame
                && greeting.epoch == 0
            {
                greeting.epoch = epoch;
            }
        }
        if matches!(&frames[0], Body::Greeting(greeting) if greeting.epoch == 1) {
            tokio::time::sleep(Duration::from_millis(100)).await; // the order is there
        }
        let status = impostor.exchange(frames).await;
        assert_eq!(status.code(), code, "{name}: {status:?}");
    }
    // The second stream of a member.
    epoch += 1;
    client.halt(epoch, 0).unwrap();
    client.form(&form(epoch), &peers).unwrap();
    let twice = [impostor.exchange(vec![greeting(epoch, 2)]), impostor.exchange(vec![greeting(epoch, 2)])];
    let (status, _still_open) = futures::future::select_ok(twice.map(|answer| {
        Box::pin(async move {
            let status = answer.await;
            if status.code() == tonic::Code::AlreadyExists { Ok(status) } else { Err(status) }
        })
    }))
    .await
    .unwrap();
    assert!(status.message().contains("has a stream"), "{status:?}");
    // The state goes to members only when there is one.
    let channel =
        connect(&address, &impostor.identity, key.clone(), ConnectOptions::default()).await.unwrap();
    let request = proto::FetchStateRequest { epoch: 1 };
    let refused = CollectiveClient::new(channel.clone()).fetch_state(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    // And nobody but the node gives orders.
    let orders = futures::stream::pending::<proto::GroupOrder>();
    let refused = CollectiveClient::new(channel).control(orders).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
}
