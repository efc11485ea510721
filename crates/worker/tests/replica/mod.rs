//! A replica of simulated stages within the test, over real links: every worker with its own key, listener and compute thread.
#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used)] // a failing test is supposed to stop

use bytes::Bytes;
use mlxnode_cluster::{ConnectOptions, ExpectedKey, Identity, KeyPin, connect};
use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{ByteCount, Dtype, LayerRange, SequenceEnd, SequenceId, SequenceSpec, StageInfo};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::worker_client::WorkerClient;
use mlxnode_worker::{DriveClient, DriveEvent, DriveEvents, LocalWorker, StageFactory, WorkerOptions};
use std::collections::HashMap;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tonic::transport::Channel;

pub(crate) const VOCABULARY: usize = 1000;
pub(crate) const EPOCH: u64 = 5;

/// What the stages of a replica are like.
#[derive(Clone, Copy)]
pub(crate) struct Model {
    pub(crate) hidden: usize,
    pub(crate) step_time: Duration,
    pub(crate) context_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) prefill_chunk: usize,
    /// Tokens that the first stage guesses at once.
    pub(crate) guesses: usize,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            hidden: 4,
            step_time: Duration::ZERO,
            context_tokens: 4096,
            max_sequences: 32,
            prefill_chunk: 512,
            guesses: 0,
        }
    }
}

impl Model {
    pub(crate) fn factory(self) -> StageFactory {
        Box::new(move |shard, progress| {
            progress(1, 2);
            progress(2, 2);
            let info = StageInfo {
                layers: shard.layers,
                layer_count: shard.layer_count,
                hidden: self.hidden,
                dtype: Dtype::F32,
                vocabulary: VOCABULARY,
                weights: ByteCount(1000),
            };
            Ok(Box::new(SimulatedStage::new(info, self.step_time).guessing(self.guesses)))
        })
    }

    pub(crate) fn shard(self, layers: LayerRange, layer_count: usize) -> proto::ShardSpec {
        proto::ShardSpec {
            layer_start: layers.start as u32,
            layer_end: layers.end as u32,
            layer_count: layer_count as u32,
            context_tokens: self.context_tokens as u32,
            max_sequences: self.max_sequences as u32,
            prefill_chunk: self.prefill_chunk as u32,
            prompt_bytes: 0,
            guessing: None,
        }
    }
}

/// One worker and its parent's connection.
pub(crate) struct Member {
    pub(crate) worker: LocalWorker,
    pub(crate) client: WorkerClient<Channel>,
}

impl Member {
    /// Starts a worker that loads with `factory`; `node` is its parent.
    pub(crate) async fn start(node: &Identity, factory: StageFactory, options: WorkerOptions) -> Self {
        Self::start_on(&Handle::current(), node, factory, options).await
    }

    /// As `start`, with the worker's network on a runtime of its own, as it is in a process of its own.
    pub(crate) async fn start_on(
        runtime: &Handle,
        node: &Identity,
        factory: StageFactory,
        options: WorkerOptions,
    ) -> Self {
        let identity = Identity::generate().unwrap();
        let worker = {
            let _within = runtime.enter();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let listener = TcpListener::from_std(listener).unwrap();
            LocalWorker::start(options, listener, identity, node.key_pin(), factory).unwrap()
        };
        let channel = channel(&worker, node).await;
        Self { worker, client: WorkerClient::new(channel) }
    }

    pub(crate) async fn load(
        &mut self,
        shard: proto::ShardSpec,
    ) -> Result<Vec<proto::LoadShardProgress>, tonic::Status> {
        let request = proto::LoadShardRequest {
            folder: "/model".into(),
            shard: Some(shard),
            epoch: EPOCH,
            blocks: None,
        };
        let mut reports = self.client.load(request).await?.into_inner();
        let mut all = Vec::new();
        while let Some(report) = reports.message().await? {
            all.push(report);
        }
        Ok(all)
    }

    pub(crate) fn as_neighbour(&self) -> proto::Neighbour {
        neighbour(&self.worker.address().to_string(), self.worker.key_pin())
    }

    pub(crate) async fn stats(&mut self) -> proto::WorkerStats {
        self.client.stats(proto::StatsRequest {}).await.unwrap().into_inner()
    }
}

pub(crate) fn neighbour(address: &str, pin: KeyPin) -> proto::Neighbour {
    proto::Neighbour { address: address.to_owned(), key_pin: Bytes::copy_from_slice(pin.as_bytes()) }
}

pub(crate) fn pins(identity: &Identity) -> Vec<Bytes> {
    vec![Bytes::copy_from_slice(identity.key_pin().as_bytes())]
}

pub(crate) async fn channel(worker: &LocalWorker, identity: &Identity) -> Channel {
    let expected = ExpectedKey::Pin(worker.key_pin());
    let address = worker.address().to_string();
    connect(&address, identity, expected, ConnectOptions::default()).await.unwrap()
}

/// Linked workers, one stage each, two layers a stage.
pub(crate) struct Replica {
    pub(crate) node: Identity,
    pub(crate) members: Vec<Member>,
}

impl Replica {
    pub(crate) async fn start(stages: usize, model: Model) -> Self {
        let factories = (0..stages).map(|_| model.factory()).collect();
        Self::start_with(factories, model).await
    }

    pub(crate) async fn start_with(factories: Vec<StageFactory>, model: Model) -> Self {
        let here = vec![Handle::current(); factories.len()];
        Self::start_on(&here, factories, model).await
    }

    pub(crate) async fn start_on(runtimes: &[Handle], factories: Vec<StageFactory>, model: Model) -> Self {
        let node = Identity::generate().unwrap();
        let stages = factories.len();
        let mut members = Vec::new();
        for (index, (factory, runtime)) in factories.into_iter().zip(runtimes).enumerate() {
            let mut member = Member::start_on(runtime, &node, factory, WorkerOptions::default()).await;
            let layers = LayerRange::new(2 * index, 2 * index + 2);
            let reports = member.load(model.shard(layers, 2 * stages)).await.unwrap();
            assert!(reports.last().unwrap().loaded);
            members.push(member);
        }
        let neighbours: Vec<_> = members.iter().map(Member::as_neighbour).collect();
        for (index, member) in members.iter_mut().enumerate() {
            let at = |offset: usize| (stages > 1).then(|| neighbours[(index + offset) % stages].clone());
            let drivers = if index == 0 { pins(&node) } else { vec![] };
            let links = proto::WorkerLinks { next: at(1), previous: at(stages - 1), drivers };
            member.client.set_links(links).await.unwrap();
        }
        Self { node, members }
    }

    pub(crate) async fn drive(&self) -> (DriveClient, DriveEvents) {
        let first = &self.members[0].worker;
        DriveClient::connect(&first.address().to_string(), first.key_pin(), &self.node).await.unwrap()
    }
}

pub(crate) fn spec(prompt: &[u32], max_tokens: usize) -> SequenceSpec {
    SequenceSpec::new(prompt.len(), max_tokens, Default::default())
}

/// What the scheduler heard of each sequence.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) tokens: HashMap<SequenceId, Vec<u32>>,
    pub(crate) ends: HashMap<SequenceId, SequenceEnd>,
    pub(crate) failures: HashMap<SequenceId, String>,
    pub(crate) closed: Vec<SequenceId>,
}

impl Heard {
    pub(crate) fn hear(&mut self, event: DriveEvent) {
        match event {
            DriveEvent::Started { sequence, .. } => {
                assert!(self.tokens.insert(sequence, vec![]).is_none(), "started once");
            }
            DriveEvent::Token(token) => {
                self.tokens.get_mut(&token.sequence).expect("started").push(token.sampled.token);
                if let Some(end) = token.end {
                    self.ends.insert(token.sequence, end);
                }
            }
            DriveEvent::Failed { sequence, reason } => {
                self.failures.insert(sequence, reason);
            }
            DriveEvent::Closed { sequence } => self.closed.push(sequence),
            DriveEvent::Capacity { stages } => assert!(!stages.is_empty()),
            DriveEvent::Progress { .. } => {}
            DriveEvent::Missing { .. } | DriveEvent::Scores { .. } | DriveEvent::Embedding { .. } => {
                panic!("nobody asked: {event:?}")
            }
        }
    }

    /// Listens until `count` sequences are closed.
    pub(crate) async fn until_closed(&mut self, events: &mut DriveEvents, count: usize) {
        let listening = async {
            while self.closed.len() < count {
                self.hear(events.next().await.unwrap());
            }
        };
        tokio::time::timeout(Duration::from_secs(60), listening).await.expect("the pipeline hangs");
    }
}

/// A fixed prompt of `length` tokens that differs by `seed`.
pub(crate) fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|at| (seed * 7919 + at * 31) % VOCABULARY as u32).collect()
}
