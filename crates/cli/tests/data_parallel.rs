//! One fine-tuning in one, two and three processes, with a worker killed on the way and another one joining: the same adapter, bit by bit.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // helpers of tests are test code, too

use mlxnode_cluster::Identity;
use mlxnode_collective::{MemberId, RoundsOptions};
use mlxnode_compute::Advance;
use mlxnode_worker::{GroupConductor, GroupPeer, GroupPlace, GroupWorker, JobProcess, JobSetup};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;

const WORDS: [&str; 6] = ["red", "green", "blue", "cat", "dog", "sun"];
/// Six micro-batches in an update, twelve updates.
const CONFIGURATION: &str = "
model: demo
data: rows
num_layers: 2
batch_size: 2
grad_accumulation_steps: 6
iters: 72
learning_rate: 1e-3
steps_per_eval: 1000
val_batches: 1
lora_parameters: {rank: 4, dropout: 0.1, scale: 8.0}
report_to: [jsonl, tensorboard]
";
const UPDATES: u64 = 12;

/// A job's files, and the model.
struct Ground {
    home: TempDir,
    model: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let home = TempDir::new().unwrap();
        let inputs = home.path().join("inputs");
        std::fs::create_dir_all(&inputs).unwrap();
        for (name, count) in [("train", 24), ("valid", 4)] {
            let rows = (0..count).map(|index| {
                let (word, other) = (WORDS[index % WORDS.len()], WORDS[(index / 2) % WORDS.len()]);
                json!({"prompt": format!("Say {word} twice."), "completion": format!("{word} {word} {other}")})
                    .to_string()
            });
            std::fs::write(inputs.join(format!("{name}.jsonl")), rows.collect::<Vec<_>>().join("\n"))
                .unwrap();
        }
        let mut options = mlxnode_hub::Options::from_lookup(|_| None);
        (options.offline, options.cache) = (true, home.path().join("cache"));
        let demo = mlxnode_hub::ModelSource::parse("demo").unwrap();
        let model = mlxnode_hub::Hub::new(options).resolve(&demo, &|_| ()).unwrap();
        Self { home, model }
    }

    fn setup(&self) -> JobSetup {
        JobSetup {
            kind: "fine-tuning".into(),
            model: Some(self.model.clone()),
            model_name: "demo".into(),
            configuration: CONFIGURATION.into(),
            inputs: self.home.path().join("inputs"),
            resume: None,
        }
    }
}

async fn process(name: String) -> JobProcess {
    let binary = Path::new(env!("CARGO_BIN_EXE_mlxnode"));
    JobProcess::spawn(binary, &["worker".into(), "--job".into()], name).await.unwrap()
}

/// Drives it to its end: the adapter's bytes. `None` when it died.
async fn drive(mut process: JobProcess, folder: PathBuf, updates: Arc<AtomicU64>) -> Option<Vec<u8>> {
    loop {
        match process.advance().await {
            Ok(Advance::Step(step)) => {
                assert!(step.loss.is_finite());
                updates.fetch_add(1, Ordering::AcqRel);
            }
            Ok(Advance::Finished) => break,
            Ok(_) => {}
            Err(_) => return None,
        }
    }
    std::fs::create_dir_all(&folder).unwrap();
    process.publish(folder.clone()).await.unwrap();
    // What is told of the run names nothing of the machine, and its figures lie beside the adapter.
    let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    assert!(config.contains("\"data\": \"data\"") && config.contains("\"model\": \"demo\""), "{config}");
    assert!(!config.contains(&*folder.parent().unwrap().to_string_lossy()), "{config}");
    assert!(folder.join("training.jsonl").is_file() && folder.join("loss.png").is_file());
    // Its process stays until all have what they need: dropping it would end it.
    std::mem::forget(process);
    Some(std::fs::read(folder.join("adapters.safetensors")).unwrap())
}

struct Ready {
    process: JobProcess,
    worker: GroupWorker,
    folder: PathBuf,
}

struct Running {
    pid: u32,
    updates: Arc<AtomicU64>,
    adapter: JoinHandle<Option<Vec<u8>>>,
}

/// Several processes of one job.
struct Group<'a> {
    ground: &'a Ground,
    name: String,
    node: Arc<Identity>,
    conductor: GroupConductor,
    next: u64,
}

impl<'a> Group<'a> {
    fn new(ground: &'a Ground, name: &str, workers: usize) -> Self {
        let node = Arc::new(Identity::generate().unwrap());
        let options = RoundsOptions { expected: workers, ..RoundsOptions::default() };
        let (conductor, _events) = GroupConductor::start(options, 0, node.clone());
        Self { ground, name: name.to_owned(), node, conductor, next: 0 }
    }

    async fn start_worker(&mut self) -> Running {
        let ready = self.load_worker().await;
        self.add(ready).await
    }

    /// A worker that has read its model and is not in the group yet.
    async fn load_worker(&mut self) -> Ready {
        self.next += 1;
        let (member, name) = (MemberId(self.next), format!("{}-{}", self.name, self.next));
        let mut process = process(name.clone()).await;
        let folder = self.ground.home.path().join(&name);
        let place = GroupPlace {
            member,
            conductor: self.node.key_pin(),
            listen: [127, 0, 0, 1].into(),
            folder: folder.join("states"),
        };
        let (address, key_pin) = process.join(place).await.unwrap();
        process.begin(self.ground.setup()).await.unwrap();
        let peer = GroupPeer { address: address.to_string(), key_pin };
        Ready {
            process,
            worker: GroupWorker { member, control: address, peer },
            folder: folder.join("adapter"),
        }
    }

    async fn add(&mut self, ready: Ready) -> Running {
        let Ready { process, worker, folder } = ready;
        let pid = process.pid();
        self.conductor.add(worker).await;
        let updates = Arc::new(AtomicU64::new(0));
        let adapter = tokio::spawn(drive(process, folder, updates.clone()));
        Running { pid, updates, adapter }
    }
}

async fn adapters(running: Vec<Running>) -> Vec<Option<Vec<u8>>> {
    let mut adapters = Vec::new();
    for one in running {
        adapters.push(tokio::time::timeout(Duration::from_secs(120), one.adapter).await.unwrap().unwrap());
    }
    adapters
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_workers_and_losses_and_joins_make_the_same_adapter() {
    let ground = Ground::new();
    let mut alone = process("alone".into()).await;
    alone.begin(ground.setup()).await.unwrap();
    let updates = Arc::new(AtomicU64::new(0));
    let expected = drive(alone, ground.home.path().join("alone"), updates.clone()).await.unwrap();
    assert_eq!(updates.load(Ordering::Acquire), UPDATES);

    for count in [1, 2, 3] {
        let mut group = Group::new(&ground, &format!("of{count}"), count);
        let mut running = Vec::new();
        for _ in 0..count {
            running.push(group.start_worker().await);
        }
        for adapter in adapters(running).await {
            assert!(adapter.as_ref() == Some(&expected), "{count} workers");
        }
    }

    // One of three is killed in the middle, and a fourth takes over the state of the others.
    let mut group = Group::new(&ground, "lost", 3);
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(group.start_worker().await);
    }
    let fourth = group.load_worker().await;
    let killed = running.remove(1);
    while killed.updates.load(Ordering::Acquire) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(killed.pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    running.push(group.add(fourth).await);
    assert!(killed.adapter.await.unwrap().is_none(), "it was killed");
    let by_the_fourth = running[2].updates.clone();
    for adapter in adapters(running).await {
        assert!(adapter == Some(expected.clone()));
    }
    let by_the_fourth = by_the_fourth.load(Ordering::Acquire);
    assert!((1..=UPDATES - 2).contains(&by_the_fourth), "it made {by_the_fourth} updates of {UPDATES}");
}
