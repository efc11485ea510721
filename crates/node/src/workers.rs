//! The worker processes of this node: started, linked, watched and ended on the coordinator's orders.
//!
//! Each order names a deployment and an epoch. What is older than the newest epoch seen for a deployment is refused, so that a
//! coordinator which slept cannot disturb its successor's work. The end of a process is told at once to whoever watches.

use crate::adapter_room::{AdapterRoom, NoRoom};
use crate::jobs::Peers;
use mlxnode_checkpoint::Checkpoint;
use mlxnode_cluster::Identity;
use mlxnode_compute::{ByteCount, LayerRange};
use mlxnode_coordinator::deployments::{AdapterWish, Attempt, Links, Shard, StartedWorker};
use mlxnode_coordinator::jobs::parse_artifact_source;
use mlxnode_coordinator::placement::Guessing;
use mlxnode_hub::{Hub, ModelSource};
use mlxnode_traces::Collector;
use mlxnode_worker::{BlockRoom, LoadShard, ProcessError, ShardStats, SpawnWorker, WorkerProcess};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast;
use tokio_util::task::AbortOnDropHandle;

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkersError {
    /// An order of the past.
    #[error("this order is of epoch {ordered} of {deployment}, but epoch {newest} has begun")]
    Stale {
        /// Deployment.
        deployment: String,
        /// What the order says.
        ordered: u64,
        /// What this node has seen.
        newest: u64,
    },
    /// The order came after the one that stopped its epoch.
    #[error("epoch {epoch} of {deployment} was stopped on this node")]
    Stopped {
        /// Deployment.
        deployment: String,
        /// Of the order.
        epoch: u64,
    },
    /// No such worker (any more).
    #[error("there is no worker {pid} of {deployment} on this node")]
    UnknownWorker {
        /// Deployment.
        deployment: String,
        /// Process id.
        pid: u32,
    },
    /// Not a model, or not here.
    #[error("{0}")]
    Model(String),
    /// The hub, the network or the disk fails now: it may be had later.
    #[error("{0}")]
    Away(String),
    /// An adapter does not fit.
    #[error("there is no memory for the adapter {adapter}: {problem}")]
    NoRoom {
        /// Its name.
        adapter: String,
        /// What it takes, and what is left.
        problem: NoRoom,
    },
    /// The process could not be started or loaded.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A worker process that ended, for whatever reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkerEnded {
    /// Of which attempt.
    pub(crate) attempt: Attempt,
    /// Its process id.
    pub(crate) pid: u32,
    /// "ended with signal 9"
    pub(crate) reason: String,
}

/// What a worker has done and holds.
pub(crate) struct SeenWorker {
    /// Deployment.
    pub(crate) deployment: String,
    /// Its part.
    pub(crate) layers: LayerRange,
    /// Since it was loaded.
    pub(crate) stats: ShardStats,
}

/// How workers are started here.
#[derive(Clone, Debug)]
pub(crate) struct WorkersOptions {
    /// The executable: this node's own.
    pub(crate) command: PathBuf,
    /// Where workers listen: the node's own address, a port of their choice.
    pub(crate) listen: IpAddr,
    /// The host under which other nodes reach this one.
    pub(crate) advertised: String,
    /// The folder for blocks of prompts.
    pub(crate) blocks: PathBuf,
    /// Most bytes of it; 0: none are written.
    pub(crate) block_disk: ByteCount,
    /// Where workers send spans of requests.
    pub(crate) collector: Option<Collector>,
}

/// All workers of this node. Cheap to clone; when the last clone is dropped the processes are killed.
#[derive(Clone)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    options: WorkersOptions,
    identity: Arc<Identity>,
    hub: Arc<Hub>,
    state: Mutex<State>,
    ended: broadcast::Sender<WorkerEnded>,
    /// Where adapters that jobs made are found.
    of_jobs: std::sync::OnceLock<Peers>,
}

#[derive(Default)]
struct State {
    /// Newest epoch seen, by deployment.
    newest: BTreeMap<String, u64>,
    /// Newest epoch that was stopped, by deployment: nothing of it may start any more.
    stopped: BTreeMap<String, u64>,
    held: Vec<Held>,
}

impl State {
    fn refuse_stopped(&self, attempt: &Attempt) -> Result<(), WorkersError> {
        match self.stopped.get(&attempt.name) {
            Some(stopped) if attempt.epoch <= *stopped => {
                Err(WorkersError::Stopped { deployment: attempt.name.clone(), epoch: attempt.epoch })
            }
            _ => Ok(()),
        }
    }
}

struct Held {
    attempt: Attempt,
    shard: Shard,
    process: Arc<WorkerProcess>,
    memory: Memory,
    open_sequences: u32,
    /// Adapters of the attempt; of several workers the first one counts.
    adapters: AdapterRoom,
    /// Tells of the process's end, and reads its memory now and then.
    _watcher: AbortOnDropHandle<()>,
}

/// What MLX holds in a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Now.
    pub(crate) active: ByteCount,
    /// At most, since the shard was loaded.
    pub(crate) peak: ByteCount,
}

/// How often a worker's memory is read for `status`.
const MEMORY_PERIOD: Duration = Duration::from_secs(2);
/// A step of a healthy worker takes milliseconds, of a huge prefill on a slow machine seconds. Longer than this it is stuck.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// Ends that may wait for a slow watcher. When it misses some it is told so and asks again.
const ENDS: usize = 256;

impl Workers {
    /// No workers yet.
    pub(crate) fn new(options: WorkersOptions, identity: Arc<Identity>, hub: Arc<Hub>) -> Self {
        let (ended, _) = broadcast::channel(ENDS);
        Self {
            shared: Arc::new(Shared {
                options,
                identity,
                hub,
                state: Mutex::default(),
                ended,
                of_jobs: Default::default(),
            }),
        }
    }

    /// Adapters that jobs made are found there. Said once.
    pub(crate) fn take_adapters_of_jobs_from(&self, peers: Peers) {
        let _ = self.shared.of_jobs.set(peers);
    }

    /// Sequences that the workers of this node compute, as last read.
    pub(crate) fn open_sequences(&self) -> u32 {
        self.state().held.iter().map(|held| held.open_sequences).sum()
    }

    /// Every end of a worker process from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<WorkerEnded> {
        self.shared.ended.subscribe()
    }

    /// Starts a worker and loads its shard; `progress` hears of (done, total) bytes.
    ///
    /// # Errors
    /// [`WorkersError`]; then no process is left behind.
    pub(crate) async fn start(
        &self,
        attempt: &Attempt,
        source: &str,
        shard: Shard,
        progress: impl Fn(ByteCount, ByteCount) + Send + Sync,
    ) -> Result<StartedWorker, WorkersError> {
        self.fence(attempt)?;
        self.refuse_stopped(attempt)?;
        let folder = self.resolve(source).await?;
        let guessing = match &shard.guessing {
            Some(Guessing { draft, ngram, tokens }) => {
                let draft = match draft {
                    Some(draft) => Some(self.resolve(draft).await?),
                    None => None,
                };
                Some(mlxnode_worker::Guessing { draft, ngram: *ngram, tokens: *tokens })
            }
            None => None,
        };
        let name = format!("{} {}", attempt.name, shard.layers);
        let options = SpawnWorker {
            command: self.shared.options.command.clone(),
            arguments: self.arguments(&name),
            listen: self.shared.options.listen,
            name,
        };
        let process = WorkerProcess::spawn(options, &self.shared.identity).await?;
        let load = LoadShard {
            folder,
            layers: shard.layers,
            layer_count: shard.layer_count,
            context_tokens: shard.context_tokens,
            max_sequences: shard.max_sequences,
            prefill_chunk: shard.prefill_chunk,
            blocks: (shard.prompts.0 > 0).then(|| BlockRoom {
                memory: shard.prompts,
                disk: self.shared.options.block_disk,
                folder: self.shared.options.blocks.clone(),
            }),
            guessing,
        };
        // Until it is held below, dropping `process` (this call was given up) kills it.
        let mut loading = process.load(&load, attempt.epoch).await?;
        let weights = loop {
            let report = loading.next().await?;
            progress(ByteCount(report.done_bytes), ByteCount(report.total_bytes));
            if report.loaded {
                break ByteCount(report.total_bytes);
            }
        };
        let started = StartedWorker {
            address: format!("{}:{}", self.shared.options.advertised, process.address().port()),
            key_pin: *process.key_pin().as_bytes(),
            pid: process.pid(),
            weights,
        };
        self.hold(attempt.clone(), shard, process)?;
        Ok(started)
    }

    /// Tells a worker its neighbours and who may drive it.
    ///
    /// # Errors
    /// [`WorkersError`].
    pub(crate) async fn link(&self, attempt: &Attempt, pid: u32, links: Links) -> Result<(), WorkersError> {
        self.fence(attempt)?;
        let process = self.find(attempt, pid)?;
        Ok(process.set_links(crate::wire::links_to_proto(&links)).await?)
    }

    /// Reads an adapter into the attempt's workers, in place of an earlier one of its name. When one of them cannot, none keeps it.
    /// Answers with the memory that it takes here. `room`: what all adapters of the attempt may take.
    ///
    /// # Errors
    /// [`WorkersError`].
    pub(crate) async fn load_adapter(
        &self,
        attempt: &Attempt,
        adapter: &AdapterWish,
        room: ByteCount,
    ) -> Result<ByteCount, WorkersError> {
        self.fence(attempt)?;
        let folder = self.fetch_adapter(&adapter.source).await?;
        let processes = self.processes_of(attempt)?;
        let key = &adapter.key();
        let needed = self.share_of(attempt, adapter_bytes(&folder));
        self.with_adapters(attempt, |adapters| adapters.take(key, needed, room))
            .map_err(|problem| WorkersError::NoRoom { adapter: adapter.name.clone(), problem })?;
        let loads = processes.iter().map(|process| async {
            process.unload_adapter(key).await?;
            process.load_adapter(key, &folder).await
        });
        let loaded: Result<Vec<()>, ProcessError> =
            futures::future::join_all(loads).await.into_iter().collect();
        if loaded.is_err() {
            // The coordinator hears why it was not loaded; that it was taken out again goes without saying.
            let _ = self.unload_adapter(attempt, key).await;
        }
        loaded?;
        Ok(needed)
    }

    /// Without a worker of the attempt there is nothing to take.
    fn with_adapters<E>(
        &self,
        attempt: &Attempt,
        change: impl FnOnce(&mut AdapterRoom) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.state();
        let held = state.held.iter_mut().find(|held| held.attempt == *attempt);
        held.map_or(Ok(()), |held| change(&mut held.adapters))
    }

    /// Of what an adapter holds, what lies on this node: the layers that the attempt has here.
    fn share_of(&self, attempt: &Attempt, bytes: u64) -> ByteCount {
        let state = self.state();
        let shards = state.held.iter().filter(|held| held.attempt == *attempt).map(|held| &held.shard);
        let share = |shard: &Shard| {
            let (own, all) = (shard.layers.len() as u128, shard.layer_count.max(1) as u128);
            (u128::from(bytes) * own).div_ceil(all)
        };
        ByteCount(u64::try_from(shards.map(share).sum::<u128>()).unwrap_or(u64::MAX))
    }

    /// Takes an adapter out of the attempt's workers.
    ///
    /// # Errors
    /// [`WorkersError`].
    pub(crate) async fn unload_adapter(&self, attempt: &Attempt, name: &str) -> Result<(), WorkersError> {
        self.fence(attempt)?;
        let processes = self.processes_of(attempt)?;
        let unloads = processes.iter().map(|process| process.unload_adapter(name));
        let unloaded: Result<Vec<()>, ProcessError> =
            futures::future::join_all(unloads).await.into_iter().collect();
        unloaded?;
        self.with_adapters(attempt, |adapters| {
            adapters.give_back(name);
            Ok(())
        })
    }

    fn processes_of(&self, attempt: &Attempt) -> Result<Vec<Arc<WorkerProcess>>, WorkersError> {
        let state = self.state();
        let held = state.held.iter().filter(|held| held.attempt == *attempt);
        let processes: Vec<_> = held.map(|held| held.process.clone()).collect();
        match processes.is_empty() {
            true => Err(WorkersError::UnknownWorker { deployment: attempt.name.clone(), pid: 0 }),
            false => Ok(processes),
        }
    }

    /// Ends all workers of the deployment up to this epoch and waits until they are gone.
    ///
    /// # Errors
    /// When a newer epoch has begun.
    pub(crate) async fn stop(&self, attempt: &Attempt) -> Result<(), WorkersError> {
        self.fence(attempt)?;
        let stopping: Vec<Held> = {
            let mut state = self.state();
            state.stopped.insert(attempt.name.clone(), attempt.epoch);
            let all = std::mem::take(&mut state.held);
            let (stopping, staying) = all
                .into_iter()
                .partition(|held| held.attempt.name == attempt.name && held.attempt.epoch <= attempt.epoch);
            state.held = staying;
            stopping
        };
        futures::future::join_all(stopping.iter().map(|held| held.process.stop())).await;
        Ok(())
    }

    /// Ends everything, for the node's own end.
    pub(crate) async fn stop_all(&self) {
        let stopping = std::mem::take(&mut self.state().held);
        futures::future::join_all(stopping.iter().map(|held| held.process.stop())).await;
    }

    /// What the workers of a deployment hold on this node, together.
    pub(crate) async fn memory_of(&self, deployment: &str) -> Memory {
        let processes: Vec<_> = {
            let state = self.state();
            let held = state.held.iter().filter(|held| held.attempt.name == deployment);
            held.map(|held| held.process.clone()).collect()
        };
        let all = futures::future::join_all(processes.iter().map(|process| process.stats())).await;
        all.into_iter().flatten().fold(Memory::default(), |sum, stats| Memory {
            active: sum.active + ByteCount(stats.active_bytes),
            peak: sum.peak + ByteCount(stats.peak_bytes),
        })
    }

    /// Of `mlxnode worker` for this part of a model.
    fn arguments(&self, part: &str) -> Vec<OsString> {
        let mut arguments = vec![OsString::from("worker")];
        if let Some(collector) = &self.shared.options.collector {
            let words = ["--otlp-endpoint", &collector.endpoint, "--node", &collector.node, "--part", part];
            arguments.extend(words.map(OsString::from));
        }
        arguments
    }

    /// All workers that answer within this time.
    pub(crate) async fn look(&self, patience: Duration) -> Vec<SeenWorker> {
        let held: Vec<_> = {
            let state = self.state();
            let held = state.held.iter();
            held.map(|held| (held.attempt.name.clone(), held.shard.layers, held.process.clone())).collect()
        };
        let looks = held.into_iter().map(|(deployment, layers, process)| async move {
            let stats = tokio::time::timeout(patience, process.stats()).await.ok()?.ok()?;
            Some(SeenWorker { deployment, layers, stats })
        });
        futures::future::join_all(looks).await.into_iter().flatten().collect()
    }

    /// What all workers hold, as last read.
    pub(crate) fn memory_used(&self) -> ByteCount {
        self.state().held.iter().map(|held| held.memory.active).sum()
    }

    /// The worker of the first stage, which the scheduler drives.
    ///
    /// # Errors
    /// When it is not on this node.
    pub(crate) fn first_stage(&self, attempt: &Attempt) -> Result<Arc<WorkerProcess>, WorkersError> {
        let state = self.state();
        let found = state.held.iter().find(|held| held.attempt == *attempt && held.shard.layers.is_first());
        found
            .map(|held| held.process.clone())
            .ok_or_else(|| WorkersError::UnknownWorker { deployment: attempt.name.clone(), pid: 0 })
    }

    /// Makes sure that the model is on this machine, downloading it when it has to, and returns its fingerprint: equal on nodes
    /// that hold the same model. `progress` hears of (done, total) bytes.
    ///
    /// # Errors
    /// [`WorkersError::Model`], [`WorkersError::Away`].
    pub(crate) async fn prepare(
        &self,
        source: &str,
        progress: impl Fn(ByteCount, ByteCount) + Send + 'static,
    ) -> Result<[u8; 32], WorkersError> {
        let folder = self.fetch(source, progress).await?;
        let opened =
            tokio::task::spawn_blocking(move || Checkpoint::open(&folder).map(|model| model.fingerprint()))
                .await;
        match opened {
            Ok(Ok(fingerprint)) => Ok(fingerprint),
            Ok(Err(error)) => Err(WorkersError::Model(crate::error::chain(&error))),
            Err(error) => Err(WorkersError::Model(format!("reading {source} failed: {error}"))),
        }
    }

    /// The model's folder on this machine.
    ///
    /// # Errors
    /// [`WorkersError::Model`], [`WorkersError::Away`].
    pub(crate) async fn resolve(&self, source: &str) -> Result<PathBuf, WorkersError> {
        self.fetch(source, |_, _| {}).await
    }

    /// Looks for the model, or downloads it, on a thread of its own.
    async fn fetch(
        &self,
        source: &str,
        progress: impl Fn(ByteCount, ByteCount) + Send + 'static,
    ) -> Result<PathBuf, WorkersError> {
        let parsed =
            ModelSource::parse(source).map_err(|error| WorkersError::Model(crate::error::chain(&error)))?;
        let hub = self.shared.hub.clone();
        let resolved = tokio::task::spawn_blocking(move || {
            hub.resolve(&parsed, &|report| {
                progress(ByteCount(report.done_bytes), ByteCount(report.total_bytes))
            })
        });
        match resolved.await {
            Ok(Ok(folder)) => Ok(folder),
            Ok(Err(error)) if error.may_pass() => Err(WorkersError::Away(crate::error::chain(&error))),
            Ok(Err(error)) => Err(WorkersError::Model(crate::error::chain(&error))),
            Err(error) => Err(WorkersError::Model(format!("looking for {source} failed: {error}"))),
        }
    }

    /// Looks for an adapter, or downloads it, on a thread of its own.
    async fn fetch_adapter(&self, source: &str) -> Result<PathBuf, WorkersError> {
        if let Some((id, hash)) = parse_artifact_source(source) {
            let missing = || WorkersError::Model("this node keeps no files of jobs".to_owned());
            let peers = self.shared.of_jobs.get().ok_or_else(missing)?;
            let folder = peers.result(id, hash).await;
            return folder.map_err(|error| WorkersError::Model(error.to_string()));
        }
        let parsed =
            ModelSource::parse(source).map_err(|error| WorkersError::Model(crate::error::chain(&error)))?;
        let hub = self.shared.hub.clone();
        match tokio::task::spawn_blocking(move || hub.resolve_adapter(&parsed, &|_| {})).await {
            Ok(Ok(folder)) => Ok(folder),
            Ok(Err(error)) => Err(WorkersError::Model(crate::error::chain(&error))),
            Err(error) => Err(WorkersError::Model(format!("looking for {source} failed: {error}"))),
        }
    }

    /// Refuses what is older than the newest epoch, and remembers this one.
    fn fence(&self, attempt: &Attempt) -> Result<(), WorkersError> {
        let mut state = self.state();
        let newest = state.newest.entry(attempt.name.clone()).or_insert(attempt.epoch);
        if attempt.epoch < *newest {
            let (deployment, ordered, newest) = (attempt.name.clone(), attempt.epoch, *newest);
            return Err(WorkersError::Stale { deployment, ordered, newest });
        }
        *newest = attempt.epoch;
        Ok(())
    }

    fn refuse_stopped(&self, attempt: &Attempt) -> Result<(), WorkersError> {
        self.state().refuse_stopped(attempt)
    }

    fn hold(&self, attempt: Attempt, shard: Shard, process: WorkerProcess) -> Result<(), WorkersError> {
        // A stop or a newer epoch may have come while the shard was loading.
        self.fence(&attempt)?;
        let process = Arc::new(process);
        let watcher = tokio::spawn(watch(Arc::downgrade(&self.shared), attempt.clone(), process.clone()));
        let mut state = self.state();
        state.refuse_stopped(&attempt)?;
        state.held.push(Held {
            attempt,
            shard,
            process,
            memory: Memory::default(),
            open_sequences: 0,
            adapters: AdapterRoom::default(),
            _watcher: AbortOnDropHandle::new(watcher),
        });
        Ok(())
    }

    fn find(&self, attempt: &Attempt, pid: u32) -> Result<Arc<WorkerProcess>, WorkersError> {
        let state = self.state();
        let found = state.held.iter().find(|held| held.attempt == *attempt && held.process.pid() == pid);
        found
            .map(|held| held.process.clone())
            .ok_or_else(|| WorkersError::UnknownWorker { deployment: attempt.name.clone(), pid })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a worker's memory until it ends, ends it when a step is stuck, and tells of its end.
async fn watch(shared: std::sync::Weak<Shared>, attempt: Attempt, process: Arc<WorkerProcess>) {
    let mut period = tokio::time::interval(MEMORY_PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let exit = loop {
        tokio::select! {
            exit = process.wait() => break exit,
            _ = period.tick() => {}
        }
        let Ok(stats) = process.stats().await else { continue };
        if stats.step_time > STEP_LIMIT {
            tracing::error!(
                pid = process.pid(),
                seconds = stats.step_time.as_secs(),
                "a step is stuck: ending the worker"
            );
            break process.stop().await;
        }
        let Some(shared) = shared.upgrade() else { return };
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = state.held.iter_mut().find(|held| held.process.pid() == process.pid()) {
            held.open_sequences = stats.open_sequences;
            held.memory = Memory { active: ByteCount(stats.active_bytes), peak: ByteCount(stats.peak_bytes) };
        }
    };
    let Some(shared) = shared.upgrade() else { return };
    let reason = match &exit.last_line {
        Some(line) if exit.code != Some(0) && exit.signal.is_none() => format!("{} ({line})", exit.reason),
        _ => exit.reason.clone(),
    };
    // Nobody listens when the coordinator cannot be reached; it asks again when it can.
    let _ = shared.ended.send(WorkerEnded { attempt, pid: exit.pid, reason });
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    state.held.retain(|held| held.process.pid() != exit.pid);
}

/// The weights in an adapter's folder, as they are kept in memory.
fn adapter_bytes(folder: &std::path::Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let weights = files.filter(|file| file.path().extension().is_some_and(|ending| ending == "safetensors"));
    weights.filter_map(|file| std::fs::metadata(file.path()).ok()).map(|metadata| metadata.len()).sum()
}
