//! A line of stages over loopback with mutual TLS, each with its own thread for the trainer and one for the network.
//!
//! The trainer is simulated; lanes, orders, files and losses are real.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test that cannot go on stops

use bytes::Bytes;
use mlxnode_cluster::{ConnectOptions, ExpectedKey, Identity, connect};
use mlxnode_compute::{Activation, Advance, Dtype, Job as _, LinkError, StageLink, StageOrder, Way};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::line_frame::Body;
use mlxnode_proto::internal::v1::stage_line_client::StageLineClient;
use mlxnode_worker::{GroupPeer, Line, LineWorker, Rehearsal, StageEndpoint, StageOptions};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// No test waits longer than this for anything.
const SOON: Duration = Duration::from_secs(20);
const HIDDEN: usize = 64;

/// Rows of one number; large enough for two frames when `is_large`.
fn activation(number: f32, is_large: bool) -> Activation {
    let rows = if is_large { 5000 } else { 3 };
    let bytes: Vec<u8> = (0..rows * HIDDEN).flat_map(|_| number.to_le_bytes()).collect();
    Activation::new(rows, HIDDEN, Dtype::F32, bytes.into()).unwrap()
}

fn number(activation: &Activation) -> f32 {
    let numbers: Vec<f32> = activation
        .bytes()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    assert!(numbers.iter().all(|number| *number == numbers[0]), "an activation was mixed up");
    numbers[0]
}

/// The endpoints of a line, and who may form it.
struct Stages {
    node: Arc<Identity>,
    endpoints: Vec<StageEndpoint>,
    folder: tempfile::TempDir,
}

impl Stages {
    fn start(count: usize, patience: Duration) -> Self {
        let node = Arc::new(Identity::generate().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let start = |stage: usize| {
            let own = folder.path().join(stage.to_string());
            let options =
                StageOptions { patience, ..StageOptions::new(IpAddr::from(Ipv4Addr::LOCALHOST), own) };
            StageEndpoint::start(options, stage, count, node.key_pin()).unwrap()
        };
        let endpoints = (0..count).map(start).collect();
        Self { node, endpoints, folder }
    }

    fn workers(&self) -> Vec<LineWorker> {
        let worker = |endpoint: &StageEndpoint| LineWorker {
            control: endpoint.address(),
            peer: GroupPeer { address: endpoint.address().to_string(), key_pin: endpoint.key_pin() },
        };
        self.endpoints.iter().map(worker).collect()
    }

    async fn form(&self) -> Line {
        Line::form(&self.workers(), &self.node, SOON).await.unwrap()
    }
}

/// Counts the calls of a trainer, and ends it before a certain one.
struct Counted<'a> {
    link: &'a mut dyn StageLink,
    calls: u64,
    dies_at: u64,
    made: Arc<AtomicU64>,
}

impl Counted<'_> {
    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut dyn StageLink) -> Result<T, LinkError>,
    ) -> Result<T, LinkError> {
        if self.calls == self.dies_at {
            return Err(LinkError::File("killed".into()));
        }
        self.calls += 1;
        self.made.store(self.calls, Ordering::Release);
        call(self.link)
    }
}

/// What stage `stage` of a simulated training knows at the end.
type Known = (Vec<StageOrder>, Vec<f64>);

/// Every call that there is: two updates of two micro-batches, a measurement, the state given, taken and published.
fn train(link: &mut Counted<'_>, own: &Path) -> Result<Known, LinkError> {
    let (stage, stages) = (link.link.stage(), link.link.stages());
    std::fs::create_dir_all(own).unwrap();
    let part = own.join("part.safetensors");
    let orders = [
        StageOrder::Load,
        StageOrder::Update(0..=1),
        StageOrder::Validate(2),
        StageOrder::Update(2..=3),
        StageOrder::Save,
        StageOrder::Publish,
        StageOrder::Test,
        StageOrder::Finish,
    ];
    let mut known = (Vec::new(), Vec::new());
    let mut due = orders.into_iter();
    loop {
        let order = match stage {
            0 => {
                let order = due.next().unwrap_or(StageOrder::Finish);
                link.call(|link| link.lead(&order))?;
                order
            }
            _ => link.call(|link| link.follow())?,
        };
        known.0.push(order.clone());
        match order {
            StageOrder::Finish => break,
            StageOrder::Load => {
                let state = own.join("state.safetensors");
                // More than one piece.
                let bytes: Vec<u8> = (0..(1 << 20) + 77).map(|at| (at % 253) as u8).collect();
                std::fs::write(&state, &bytes).unwrap();
                let given = (stage == 0).then_some(state.as_path());
                let taken = link.call(|link| link.scatter(given))?;
                assert_eq!(taken.file_name(), state.file_name());
                assert!(std::fs::read(taken).unwrap() == bytes, "the state was changed");
            }
            StageOrder::Update(range) => {
                let mut sum = 0.0;
                for at in range.clone() {
                    // Each stage adds one to what it is given, and to what comes back.
                    let given = match stage {
                        0 => at as f32,
                        _ => number(&link.call(|link| link.receive(Way::Forward, at))?),
                    };
                    let made = activation(given + 1.0, at == 1);
                    let back = match stage + 1 == stages {
                        true => given + 1.0,
                        false => {
                            link.call(|link| link.send(Way::Forward, at, made))?;
                            number(&link.call(|link| link.receive(Way::Backward, at))?)
                        }
                    };
                    if stage > 0 {
                        link.call(|link| link.send(Way::Backward, at, activation(back + 1.0, at == 2)))?;
                    }
                    sum += f64::from(back);
                }
                let all = link.call(|link| link.exchange(&[sum, stage as f64]))?;
                assert_eq!(all.len(), stages);
                for (stage, numbers) in all.iter().enumerate() {
                    assert_eq!((numbers.len(), numbers[1]), (2, stage as f64));
                    known.1.push(numbers[0]);
                }
            }
            StageOrder::Save | StageOrder::Publish => {
                std::fs::write(&part, vec![stage as u8; stage * 700_000]).unwrap();
                let parts = link.call(|link| link.gather(&part))?;
                assert_eq!(parts.len(), if stage == 0 { stages } else { 0 });
                for (stage, part) in parts.iter().enumerate() {
                    assert_eq!(part.file_name(), Some("part.safetensors".as_ref()));
                    assert!(std::fs::read(part).unwrap() == vec![stage as u8; stage * 700_000]);
                }
            }
            StageOrder::Validate(_) | StageOrder::Test => {}
        }
    }
    Ok(known)
}

/// A trainer on a thread of its own that ends before its call `dies_at`, which ends its process too.
fn trainer(
    endpoint: StageEndpoint,
    own: PathBuf,
    dies_at: u64,
) -> (JoinHandle<Result<Known, LinkError>>, Arc<AtomicU64>) {
    let made = Arc::new(AtomicU64::new(0));
    let counted = made.clone();
    let thread = std::thread::spawn(move || {
        let mut link = endpoint.link();
        let mut counted = Counted { link: &mut link, calls: 0, dies_at, made: counted };
        let trained = train(&mut counted, &own);
        if trained.is_ok() {
            // Its process stays until its node ends it: others may still be reading.
            std::thread::sleep(Duration::from_millis(300));
        }
        trained
    });
    (thread, made)
}

async fn joined<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    let joined = tokio::task::spawn_blocking(move || thread.join().unwrap());
    tokio::time::timeout(SOON, joined).await.expect("a stage hangs").unwrap()
}

/// All that the stages of a line know, when the stage `victim` ends before its call `dies_at`; and how many calls each made.
async fn run(stages: usize, victim: usize, dies_at: u64) -> (Vec<Result<Known, LinkError>>, Vec<u64>) {
    let line = Stages::start(stages, SOON);
    let formed = line.form().await;
    let Stages { endpoints, folder, .. } = line;
    let trainers: Vec<_> = endpoints
        .into_iter()
        .enumerate()
        .map(|(stage, endpoint)| {
            let dies_at = if stage == victim { dies_at } else { u64::MAX };
            trainer(endpoint, folder.path().join(format!("own-{stage}")), dies_at)
        })
        .collect();
    let (mut known, mut calls) = (Vec::new(), Vec::new());
    for (thread, made) in trainers {
        known.push(joined(thread).await);
        calls.push(made.load(Ordering::Acquire));
    }
    drop(formed);
    (known, calls)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_and_three_stages_train_in_step() {
    for stages in [2, 3] {
        let (known, _) = run(stages, 0, u64::MAX).await;
        let first = known[0].clone().unwrap();
        assert_eq!(first.0.len(), 8);
        // Of micro-batch m the last stage has m + stages, and each stage before it one more.
        let expected: Vec<f64> = [(0, 1), (2, 3)]
            .into_iter()
            .flat_map(|(one, two)| {
                (0..stages).map(move |stage| (one + two + 2 * (2 * stages - 1 - stage)) as f64)
            })
            .collect();
        assert_eq!(first.1, expected);
        for other in known {
            assert_eq!(other.unwrap(), first, "{stages} stages");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stage_that_is_lost_before_any_of_its_calls_ends_the_line_for_all() {
    let (_, calls) = run(3, 0, u64::MAX).await;
    for victim in 0..3 {
        for dies_at in 0..calls[victim] {
            let began = Instant::now();
            let (known, made) = run(3, victim, dies_at).await;
            assert_eq!(made[victim], dies_at);
            for (stage, known) in known.into_iter().enumerate() {
                match known {
                    Err(LinkError::Over(_)) => assert_ne!(stage, victim),
                    Err(LinkError::File(_)) => assert_eq!(stage, victim),
                    // It had all that it needed of the others.
                    Ok(_) => {
                        assert!(dies_at + 2 >= calls[victim], "stage {stage}, {victim} before {dies_at}")
                    }
                    Err(error) => panic!("stage {stage}, {victim} before call {dies_at}: {error}"),
                }
            }
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "{victim} before {dies_at}: {:?}",
                began.elapsed()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_neighbour_makes_the_sender_wait() {
    let mut stages = Stages::start(2, SOON);
    let _line = stages.form().await;
    let (second, first) = (stages.endpoints.pop().unwrap(), stages.endpoints.pop().unwrap());
    let sent = Arc::new(AtomicU64::new(0));
    let counted = sent.clone();
    const ALL: u64 = 60;
    let sender = std::thread::spawn(move || {
        let mut link = first.link();
        for at in 0..ALL {
            link.send(Way::Forward, at, activation(at as f32, true)).unwrap();
            counted.store(at + 1, Ordering::Release);
        }
        // Until all is taken.
        link.receive(Way::Backward, ALL).unwrap();
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let waiting = sent.load(Ordering::Acquire);
    // Two that wait to be sent, one under way, two of a window and one behind it, and what connections hold of 1.2 MB each.
    assert!((2..=30).contains(&waiting), "{waiting}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(sent.load(Ordering::Acquire), waiting, "nothing grows");
    let taker = std::thread::spawn(move || {
        let mut link = second.link();
        for at in 0..ALL {
            assert_eq!(number(&link.receive(Way::Forward, at).unwrap()), at as f32);
        }
        link.send(Way::Backward, ALL, activation(0.0, false)).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    });
    joined(sender).await;
    joined(taker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_is_given_up_and_what_is_not_due_is_refused() {
    type Call = fn(&mut dyn StageLink) -> Result<(), LinkError>;
    // What stage 0 does, what stage 1 does, and what becomes of stage 0.
    let idle: Call = |_| {
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    };
    let cases: [(Call, Call, &str); 8] = [
        (|link| link.receive(Way::Backward, 0).map(drop), idle, "did not answer within 1 s"),
        (|link| link.exchange(&[]).map(drop), idle, "did not answer within 1 s"),
        (
            |link| link.receive(Way::Backward, 3).map(drop),
            |link| link.send(Way::Backward, 2, activation(0.0, false)),
            "where hidden vectors of micro-batch 3 were due",
        ),
        (
            |link| link.gather(Path::new("/dev/null")).map(drop),
            |link| link.exchange(&[1.0]).map(drop),
            "where a file's bytes were due",
        ),
        (|link| link.exchange(&[0.0; 1025]).map(drop), idle, "1025 numbers"),
        (|link| link.send(Way::Backward, 0, activation(0.0, false)), idle, "no neighbour"),
        (|link| link.scatter(None).map(drop), idle, "no file to give"),
        (
            |link| link.gather(Path::new("/nowhere")).map(drop),
            |link| link.gather(Path::new("/nowhere")).map(drop),
            "stage 1",
        ),
    ];
    for (first, second, words) in cases {
        let mut stages = Stages::start(2, Duration::from_secs(1));
        let mut line = stages.form().await;
        let (one, zero) = (stages.endpoints.pop().unwrap(), stages.endpoints.pop().unwrap());
        let other = std::thread::spawn(move || {
            let mut link = one.link();
            let _ = second(&mut link);
            // Its process goes on until its node ends it.
            std::thread::sleep(Duration::from_secs(2));
        });
        let error = joined(std::thread::spawn(move || {
            let mut link = zero.link();
            let error = first(&mut link).unwrap_err();
            // From now on every call fails at once.
            let began = Instant::now();
            assert!(matches!(link.lead(&StageOrder::Test), Err(LinkError::Over(_))));
            assert!(matches!(link.exchange(&[]), Err(LinkError::Over(_))));
            assert!(began.elapsed() < Duration::from_secs(1));
            error
        }))
        .await;
        assert!(error.to_string().contains(words), "{words}: {error}");
        tokio::time::timeout(SOON, line.over()).await.expect("the node hears of it");
        joined(other).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_line_ends_with_its_node_and_never_begins_without_a_stage() {
    let mut stages = Stages::start(2, SOON);
    let line = stages.form().await;
    let follower = stages.endpoints.pop().unwrap();
    let following = std::thread::spawn(move || follower.link().follow());
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(line);
    let error = joined(following).await.unwrap_err();
    assert!(matches!(&error, LinkError::Over(_)), "{error}");

    let mut stages = Stages::start(3, SOON);
    let workers = stages.workers();
    drop(stages.endpoints.pop()); // it has ended before the line is formed
    let formed = Line::form(&workers, &stages.node, SOON).await;
    assert_eq!(formed.unwrap_err().stage, 2);
    let first = stages.endpoints.remove(0);
    drop(stages);
    let late = std::thread::spawn(move || {
        drop(first.link());
        first.link().exchange(&[]).map(drop)
    });
    assert!(matches!(joined(late).await, Err(LinkError::Over(_))));
    for (stage, stages) in [(0, 1), (2, 2), (0, 9)] {
        let options = StageOptions::new(IpAddr::from(Ipv4Addr::LOCALHOST), "unused".into());
        let pin = Identity::generate().unwrap().key_pin();
        assert!(StageEndpoint::start(options, stage, stages, pin).is_err(), "{stage} of {stages}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stage_waits_for_is_known_apart_from_what_it_computes() {
    const COMPUTES: Duration = Duration::from_millis(500);
    let stages = Stages::start(2, SOON);
    let line = stages.form().await;
    let endpoints = stages.endpoints;
    // The first stage computes for a while, and the second one waits for what it says next.
    let pieces = endpoints.into_iter().enumerate().map(|(stage, endpoint)| {
        std::thread::spawn(move || {
            let mut link = endpoint.link();
            link.exchange(&[]).unwrap();
            let before = endpoint.waited();
            match stage {
                0 => {
                    std::thread::sleep(COMPUTES);
                    link.lead(&StageOrder::Test).unwrap();
                }
                _ => assert_eq!(link.follow(), Ok(StageOrder::Test)),
            }
            // Both stay until the other one is through.
            (endpoint.waited() - before, link, endpoint)
        })
    });
    let mut ended = Vec::new();
    for piece in pieces.collect::<Vec<_>>() {
        ended.push(joined(piece).await);
    }
    drop(line);
    let waited: Vec<Duration> = ended.iter().map(|(waited, ..)| *waited).collect();
    assert!(waited[0] < COMPUTES / 5 && waited[1] > COMPUTES / 2, "{waited:?}");
}

/// What a rehearsal of seven steps over four files makes, by one process or by several that save after three steps and go on.
fn rehearsed(folder: &Path, stages: Option<Stages>, resume: Option<&Path>) -> (String, PathBuf) {
    let inputs = folder.join("inputs");
    std::fs::create_dir_all(&inputs).unwrap();
    for name in ["a", "b", "c", "d"] {
        std::fs::write(inputs.join(name), format!("rows of {name}")).unwrap();
    }
    let saved = folder.join(format!("saved-{}", rand::random::<u32>()));
    std::fs::create_dir_all(&saved).unwrap();
    let begin = |link: Option<Box<dyn StageLink>>, inputs: &Path, resume: Option<&Path>| {
        let job = Rehearsal::new("steps: 7", inputs, resume).unwrap();
        match link {
            Some(link) => job.with_stages(link),
            None => job,
        }
    };
    let mut followers = Vec::new();
    let mut endpoints = stages.map(|stages| stages.endpoints).unwrap_or_default().into_iter();
    let first = endpoints.next();
    for endpoint in endpoints {
        let inputs = inputs.clone();
        followers.push(std::thread::spawn(move || {
            let mut job = begin(Some(Box::new(endpoint.link())), &inputs, None);
            while job.advance().is_ok_and(|advance| advance != Advance::Finished) {}
        }));
    }
    let link = first.as_ref().map(|first| Box::new(first.link()) as Box<dyn StageLink>);
    let mut job = begin(link, &inputs, resume);
    loop {
        match job.advance().unwrap() {
            Advance::Finished => break,
            Advance::Step(report) if report.step == 3 => job.save(&saved).unwrap(),
            _ => {}
        }
    }
    let result = folder.join(format!("result-{}", rand::random::<u32>()));
    std::fs::create_dir_all(&result).unwrap();
    job.publish(&result).unwrap();
    drop((job, first));
    followers.into_iter().for_each(|follower| follower.join().unwrap());
    (std::fs::read_to_string(result.join("result.txt")).unwrap(), saved)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rehearsal_comes_to_the_same_with_any_number_of_stages_from_anybodys_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (expected, mut saved) = rehearsed(folder.path(), None, None);
    for count in [2, 3, 2] {
        let stages = Stages::start(count, SOON);
        let line = stages.form().await;
        let (own, from) = (folder.path().to_owned(), saved.clone());
        let rehearsing = tokio::task::spawn_blocking(move || {
            let whole = rehearsed(&own, Some(stages), None);
            (whole, own, from)
        });
        let ((found, newer), own, from) = tokio::time::timeout(SOON, rehearsing).await.unwrap().unwrap();
        assert_eq!(found, expected, "{count} stages");
        drop(line);
        let stages = Stages::start(count, SOON);
        let _line = stages.form().await;
        let rehearsing = tokio::task::spawn_blocking(move || rehearsed(&own, Some(stages), Some(&from)).0);
        let found = tokio::time::timeout(SOON, rehearsing).await.unwrap().unwrap();
        assert_eq!(found, expected, "{count} stages from a checkpoint");
        saved = newer;
    }
}

/// A stage 0 that is not one of ours: keeps the stage's formation open, and opens lanes as it likes.
struct Impostor {
    identity: Identity,
    endpoint: StageEndpoint,
    _orders: mpsc::Sender<proto::LineFormation>,
    _folder: tempfile::TempDir,
}

impl Impostor {
    /// Named as stage 0 of two by the node.
    async fn named() -> Self {
        let Stages { node, mut endpoints, folder } = Stages::start(2, SOON);
        let endpoint = endpoints.pop().unwrap();
        let identity = Identity::generate().unwrap();
        let mut client = client(&endpoint, &node).await.unwrap();
        let stage = |address: String, pin: mlxnode_cluster::KeyPin| proto::LineStage {
            address,
            key_pin: pin.as_bytes().to_vec().into(),
        };
        let own = stage(endpoint.address().to_string(), endpoint.key_pin());
        let formation =
            proto::LineFormation { stages: vec![stage("127.0.0.1:9".into(), identity.key_pin()), own] };
        let (orders, stream) = mpsc::channel(2);
        orders.send(formation).await.unwrap();
        let reports = client.control(ReceiverStream::new(stream)).await.unwrap().into_inner();
        tokio::spawn(async move {
            let mut reports = reports;
            while let Ok(Some(_)) = reports.message().await {}
        });
        Self { identity, endpoint, _orders: orders, _folder: folder }
    }

    async fn lane(
        &self,
        greeting: proto::LineGreeting,
        frames: Vec<Body>,
    ) -> Result<tonic::Streaming<proto::LineFrame>, tonic::Status> {
        // The stage lets it in once the formation has come.
        let mut client = loop {
            match client(&self.endpoint, &self.identity).await {
                Ok(client) => break client,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let (sender, stream) = mpsc::channel(16);
        for body in std::iter::once(Body::Greeting(greeting)).chain(frames) {
            sender.send(proto::LineFrame { body: Some(body) }).await.unwrap();
        }
        tokio::spawn(async move {
            tokio::time::sleep(SOON).await;
            drop(sender);
        });
        Ok(client.join(ReceiverStream::new(stream)).await?.into_inner())
    }
}

async fn client(
    endpoint: &StageEndpoint,
    identity: &Identity,
) -> Result<StageLineClient<tonic::transport::Channel>, mlxnode_cluster::ConnectError> {
    let (address, pin) = (endpoint.address().to_string(), endpoint.key_pin());
    let options = ConnectOptions { timeout: Duration::from_secs(3), ..ConnectOptions::default() };
    connect(&address, identity, ExpectedKey::Pin(pin), options).await.map(StageLineClient::new)
}

fn greeting(stage: u32, lane: proto::LineLane) -> proto::LineGreeting {
    proto::LineGreeting { stage, lane: lane.into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_key_opens_nothing_and_a_named_one_only_its_own_lanes() {
    let impostor = tokio::time::timeout(SOON, Impostor::named()).await.unwrap();
    let stranger = Identity::generate().unwrap();
    if let Ok(mut client) = client(&impostor.endpoint, &stranger).await {
        let (sender, stream) = mpsc::channel(1);
        sender
            .send(proto::LineFrame { body: Some(Body::Greeting(greeting(0, proto::LineLane::Lead))) })
            .await
            .unwrap();
        assert!(client.join(ReceiverStream::new(stream)).await.is_err(), "a stranger was let in");
    }
    // Neither another stage's, nor one that it does not open; and none twice.
    for wrong in [
        greeting(1, proto::LineLane::Pass),
        greeting(7, proto::LineLane::Lead),
        greeting(0, proto::LineLane::Unspecified),
    ] {
        assert!(impostor.lane(wrong, vec![]).await.is_err(), "{wrong:?}");
    }
    let _lead = impostor.lane(greeting(0, proto::LineLane::Lead), vec![]).await.unwrap();
    assert!(impostor.lane(greeting(0, proto::LineLane::Lead), vec![]).await.is_err(), "twice");
    // A node that is not its own does not control it, nor does a stage.
    let mut client = client(&impostor.endpoint, &impostor.identity).await.unwrap();
    let (_sender, stream) = mpsc::channel(1);
    let refused = client.control(ReceiverStream::new(stream)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_sizes_end_the_line_and_take_no_memory() {
    let head = |rows, hidden| {
        Body::Activation(proto::LineActivation {
            micro_batch: 0,
            rows,
            hidden,
            dtype: proto::Dtype::F32.into(),
        })
    };
    let cases = [
        vec![head(u64::MAX, 1 << 40)],
        vec![head(1 << 30, 1)],
        vec![head(1, 2), Body::More(Bytes::from(vec![0; 9]))],
        vec![head(1, 2), head(1, 2)],
        vec![Body::More(Bytes::from(vec![0; 9]))],
        vec![Body::FileHash(Bytes::from(vec![0; 32]))],
    ];
    for (place, frames) in cases.into_iter().enumerate() {
        let impostor = tokio::time::timeout(SOON, Impostor::named()).await.unwrap();
        let _lead = impostor.lane(greeting(0, proto::LineLane::Lead), vec![]).await.unwrap();
        let _pass = impostor.lane(greeting(0, proto::LineLane::Pass), frames).await.unwrap();
        let mut link = impostor.endpoint.link();
        let error = joined(std::thread::spawn(move || link.receive(Way::Forward, 0).unwrap_err())).await;
        assert!(error.to_string().contains("cannot be used"), "{place}: {error}");
    }
}
