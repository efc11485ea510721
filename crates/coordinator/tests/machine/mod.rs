//! Deployments in a made-up cluster where everything that is asked is done at once, unless a test says otherwise.
#![allow(dead_code)] // each test file uses its part

use mlxnode_compute::ByteCount;
use mlxnode_coordinator::deployments::{
    AdapterWish, Attempt, DeploymentView, DeploymentWish, Deployments, Effect, Event, Record, StartedWorker,
    State, Usage,
};
use mlxnode_coordinator::placement::{LayerCost, ModelCost, Offer, Wish};
use mlxnode_coordinator::{Error, NodeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// What every adapter takes on every node.
pub(crate) const ADAPTER: u64 = 3 * MIB;

pub(crate) fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

/// Deployments and the cluster around them.
pub(crate) struct Machine {
    pub(crate) deployments: Deployments,
    pub(crate) now: Instant,
    pub(crate) log: Vec<Record>,
    /// Where adapters are: node, epoch, name.
    pub(crate) adapters: BTreeSet<(NodeId, u64, String)>,
    /// A node that cannot read adapters, and what it says.
    pub(crate) fails: Option<(NodeId, Error)>,
    pub(crate) records_fail: bool,
    /// What schedulers say, by replica; idle for no time at all when absent.
    pub(crate) usage: BTreeMap<String, Usage>,
    pub(crate) asked: Vec<String>,
    pub(crate) drained: Vec<String>,
    /// What loads came to, by replica.
    pub(crate) loads: Vec<(String, Result<(), Error>)>,
    nodes: u8,
    next_pid: u32,
    settled: Vec<Result<(), Error>>,
}

impl Machine {
    pub(crate) fn new(nodes: u8) -> Self {
        Self {
            deployments: Deployments::default(),
            now: Instant::now(),
            log: Vec::new(),
            adapters: BTreeSet::new(),
            fails: None,
            records_fail: false,
            usage: BTreeMap::new(),
            asked: Vec::new(),
            drained: Vec::new(),
            loads: Vec::new(),
            nodes,
            next_pid: 100,
            settled: Vec::new(),
        }
    }

    /// Loads a model of 400 MiB; one that is called huge has 1200.
    pub(crate) fn load(&mut self, name: &str, stages: Option<usize>) {
        let wish = Wish { stages, ..Wish::default() };
        self.load_wish(DeploymentWish {
            name: name.into(),
            source: format!("/models/{name}"),
            wish,
            ..DeploymentWish::default()
        });
    }

    /// Time passes, and what is due happens.
    pub(crate) fn wait(&mut self, time: Duration) {
        self.now += time;
        let effects = self.deployments.tick(self.now);
        self.run(effects);
    }

    /// All that there is, with its state.
    pub(crate) fn states(&self) -> Vec<(String, State)> {
        let views = self.deployments.view().into_iter();
        views.map(|view| (view.instance(), view.state)).collect()
    }

    pub(crate) fn load_wish(&mut self, wish: DeploymentWish) {
        if let Ok((_, effects)) = self.deployments.load(wish) {
            self.run(effects);
        }
    }

    pub(crate) fn load_adapter(&mut self, name: &str, adapter: AdapterWish) {
        let (_, effects) = self.deployments.load_adapter(name, adapter).unwrap();
        self.run(effects);
    }

    pub(crate) fn view(&self, name: &str) -> DeploymentView {
        self.deployments.find(name).unwrap()
    }

    pub(crate) fn attempt(&self, name: &str) -> Attempt {
        Attempt { name: name.into(), epoch: self.view(name).epoch }
    }

    /// Its last worker dies.
    pub(crate) fn kill(&mut self, name: &str) {
        let stage = self.view(name).stages.pop().unwrap();
        let (attempt, pid) = (self.attempt(name), stage.pid.unwrap());
        let reason = "ended with signal 9".into();
        let effects = self.on(Event::WorkerEnded { attempt, node: stage.node, pid, reason });
        self.run(effects);
    }

    /// What became of adapters since this was asked last.
    pub(crate) fn settled(&mut self) -> Vec<Result<(), Error>> {
        std::mem::take(&mut self.settled)
    }

    pub(crate) fn on(&mut self, event: Event) -> Vec<Effect> {
        self.deployments.on(event, self.now)
    }

    /// What an effect leads to.
    pub(crate) fn step(&mut self, effect: Effect) -> Vec<Effect> {
        self.answer(effect).map(|event| self.on(event)).unwrap_or_default()
    }

    /// Of each node.
    pub(crate) fn budget(&self) -> ByteCount {
        ByteCount(1000 * MIB)
    }

    /// Does all that is asked, and all that follows from it.
    pub(crate) fn run(&mut self, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            if let Some(event) = self.answer(effect) {
                effects.extend(self.on(event));
            }
        }
    }

    fn answer(&mut self, effect: Effect) -> Option<Event> {
        Some(match effect {
            Effect::Record { attempt, record } => {
                self.log.push(record);
                Event::Recorded { attempt, result: Ok(()) }
            }
            Effect::RecordAdapter { name, adapter, record } => {
                if self.records_fail {
                    let result = Err(Error::Failed("the disk is full".into()));
                    return Some(Event::AdapterRecorded { name, adapter, result });
                }
                self.log.push(record);
                Event::AdapterRecorded { name, adapter, result: Ok(()) }
            }
            Effect::Sweep { attempt } => Event::Swept { attempt, nodes: (0..self.nodes).map(node).collect() },
            Effect::Weigh { attempt, source, .. } => {
                let layers = if source.contains("huge") { 12 } else { 4 };
                Event::Weighed { attempt, result: Ok((model(layers), self.offers())) }
            }
            Effect::Prepare { attempt, node, .. } => Event::Prepared { attempt, node, result: Ok(vec![1]) },
            Effect::Start { attempt, stage, node, .. } => {
                self.next_pid += 1;
                let pid = self.next_pid;
                let address = format!("127.0.0.1:{pid}");
                let worker = StartedWorker { address, key_pin: *node.as_bytes(), pid, weights: ByteCount(0) };
                Event::Started { attempt, stage, result: Ok(worker) }
            }
            Effect::Link { attempt, stage, .. } => Event::Linked { attempt, stage, result: Ok(()) },
            Effect::LoadAdapter { attempt, node, adapter } => {
                let failure = self.fails.as_ref().filter(|(failing, _)| *failing == node);
                let result = failure.map_or(Ok(ByteCount(ADAPTER)), |(_, error)| Err(error.clone()));
                if result.is_ok() {
                    self.adapters.insert((node, attempt.epoch, adapter.key()));
                }
                Event::AdapterLoaded { attempt, node, adapter: adapter.name, result }
            }
            Effect::UnloadAdapter { attempt, node, adapter } => {
                self.adapters.remove(&(node, attempt.epoch, adapter.clone()));
                Event::AdapterUnloaded { attempt, node, adapter, result: Ok(()) }
            }
            Effect::AskUsage { attempt, .. } => {
                self.asked.push(attempt.name.clone());
                let usage = self.usage.get(&attempt.name).copied().unwrap_or_default();
                Event::Used { attempt, result: Ok(usage) }
            }
            Effect::Drain { attempt, .. } => {
                self.drained.push(attempt.name.clone());
                Event::Drained { attempt, result: Ok(()) }
            }
            Effect::StartScheduler { attempt, .. } => Event::SchedulerStarted { attempt, result: Ok(()) },
            Effect::Stop { attempt, node } => {
                self.adapters.retain(|(at, epoch, _)| !(*at == node && *epoch <= attempt.epoch));
                Event::Stopped { attempt, node, result: Ok(()) }
            }
            Effect::AdapterSettled { result, .. } => {
                self.settled.push(result);
                return None;
            }
            Effect::Settled { name, result } => {
                self.loads.push((name, result));
                return None;
            }
            Effect::Abandon { .. } | Effect::Gone { .. } => return None,
        })
    }

    fn offers(&self) -> Vec<Offer> {
        let offer = |number: u8| Offer {
            node: node(number),
            name: format!("mac-{number}"),
            budget: ByteCount(1000 * MIB),
            used: ByteCount(0),
            prompts: ByteCount(0),
            bytes_per_second: None,
            coordinator: number == 0,
            round_trips: [].into(),
        };
        (0..self.nodes).map(offer).collect()
    }
}

fn model(layers: usize) -> ModelCost {
    let layer = LayerCost {
        weights: ByteCount(100 * MIB),
        kv_per_token: ByteCount(0),
        state: ByteCount(0),
        kv_window: None,
    };
    ModelCost {
        architecture: "llama".into(),
        layers: vec![layer; layers],
        joined: vec![],
        passes: 1,
        embedding: ByteCount(0),
        head: ByteCount(0),
        shared: ByteCount(0),
        context_tokens: 512,
        weight_bits: None,
        draft: None,
    }
}
