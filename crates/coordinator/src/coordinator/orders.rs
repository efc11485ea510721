//! Carries out the effects that the nodes have a part in, each bounded in time and turned into its answer.

use super::Limits;
use super::nodes::{LinkWorker, LoadAdapter, Nodes, StartScheduler, StartWorker};
use super::progress::{Audience, Phase, Progress, ProgressSink};
use crate::deployments::{Attempt, Effect, Event};
use crate::placement::{DraftCost, ModelCost};
use crate::{Error, NodeId};
use futures::FutureExt;
use futures::future::BoxFuture;
use mlxnode_compute::ByteCount;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

/// What orders need. Cheap to clone.
#[derive(Clone)]
pub(super) struct Orders {
    pub(super) nodes: Arc<dyn Nodes>,
    pub(super) audience: Arc<Audience>,
    pub(super) limits: Limits,
}

impl Orders {
    /// Carries out [`Effect::LoadAdapter`]: the adapter may take what the node has left.
    pub(super) fn load_adapter(&self, node: NodeId, order: LoadAdapter) -> BoxFuture<'static, Event> {
        let (nodes, limit) = (self.nodes.clone(), self.limits.adapter);
        let (attempt, name) = (order.attempt.clone(), order.adapter.name.clone());
        let what = format!("loading the adapter {name} on {}", self.name(node));
        async move {
            let result = within(limit, &what, nodes.load_adapter(node, order)).await;
            Event::AdapterLoaded { attempt, node, adapter: name, result }
        }
        .boxed()
    }

    /// Carries out one effect; `None` for those that are not for the nodes.
    pub(super) fn carry_out(&self, effect: Effect) -> Option<BoxFuture<'static, Event>> {
        let orders = self.clone();
        let limits = self.limits;
        Some(match effect {
            Effect::Sweep { attempt } => async move {
                let nodes = orders.sweep(&attempt).await;
                Event::Swept { attempt, nodes }
            }
            .boxed(),
            Effect::Weigh { attempt, source, draft } => async move {
                orders.announce(&attempt, Phase::Resolving, source.clone());
                let work = weigh(orders.nodes.clone(), source.clone(), draft);
                let result = within(limits.weigh, &format!("reading {source}"), work).await;
                orders.announce(&attempt, Phase::Planning, String::new());
                Event::Weighed { attempt, result: result.map(|cost| (cost, orders.nodes.offers())) }
            }
            .boxed(),
            Effect::Prepare { attempt, node, source, draft } => async move {
                let progress = orders.sink(&attempt, Phase::Downloading, node);
                let work = async {
                    let fingerprint = orders.nodes.prepare(node, source.clone(), progress.clone()).await?;
                    if let Some(draft) = draft {
                        orders.nodes.prepare(node, draft, progress.clone()).await?;
                    }
                    Ok(fingerprint)
                };
                let what = format!("getting {source} onto {}", orders.name(node));
                let result = while_moving(limits.standstill, &what, &progress, work).await;
                Event::Prepared { attempt, node, result }
            }
            .boxed(),
            Effect::Start { attempt, stage, node, source, shard } => async move {
                let name = orders.name(node);
                orders.announce(&attempt, Phase::Starting, format!("layers {} on {name}", shard.layers));
                let progress = orders.sink(&attempt, Phase::Loading, node);
                let what = format!("loading layers {} on {name}", shard.layers);
                let order = StartWorker { attempt: attempt.clone(), source, shard };
                let work = orders.nodes.start_worker(node, order, progress.clone());
                let result = while_moving(limits.standstill, &what, &progress, work).await;
                Event::Started { attempt, stage, result }
            }
            .boxed(),
            Effect::Link { attempt, stage, node, pid, links } => async move {
                orders.announce(&attempt, Phase::Linking, String::new());
                let order = LinkWorker { attempt: attempt.clone(), pid, links };
                let what = format!("linking the worker on {}", orders.name(node));
                let result = within(limits.link, &what, orders.nodes.link_worker(node, order)).await;
                Event::Linked { attempt, stage, result }
            }
            .boxed(),
            Effect::UnloadAdapter { attempt, node, adapter } => async move {
                let what = format!("unloading the adapter {adapter} on {}", orders.name(node));
                let work = orders.nodes.unload_adapter(node, attempt.clone(), adapter.clone());
                let result = within(limits.link, &what, work).await;
                Event::AdapterUnloaded { attempt, node, adapter, result }
            }
            .boxed(),
            Effect::AskUsage { attempt, node } => async move {
                let what = format!("asking {} how busy {} is", orders.name(node), attempt.name);
                let result = within(limits.usage, &what, orders.nodes.usage(node, attempt.clone())).await;
                Event::Used { attempt, result }
            }
            .boxed(),
            Effect::Drain { attempt, node } => async move {
                let what = format!("finishing the requests of {} on {}", attempt.name, orders.name(node));
                let result = within(limits.drain, &what, orders.nodes.drain(node, attempt.clone())).await;
                Event::Drained { attempt, result }
            }
            .boxed(),
            Effect::StartScheduler { attempt, node, source, max_sequences, context_tokens, fixed_tokens } => {
                async move {
                    let order = StartScheduler {
                        attempt: attempt.clone(),
                        source,
                        max_sequences,
                        context_tokens,
                        fixed_tokens,
                    };
                    let what = format!("starting the scheduler on {}", orders.name(node));
                    let result = within(limits.link, &what, orders.nodes.start_scheduler(node, order)).await;
                    Event::SchedulerStarted { attempt, result }
                }
                .boxed()
            }
            Effect::Stop { attempt, node } => async move {
                let result = orders.stop(node, attempt.clone()).await;
                Event::Stopped { attempt, node, result }
            }
            .boxed(),
            // Takes to know the room: see [`Orders::load_adapter`].
            Effect::LoadAdapter { .. }
            | Effect::Record { .. }
            | Effect::RecordAdapter { .. }
            | Effect::Abandon { .. }
            | Effect::AdapterSettled { .. }
            | Effect::Settled { .. }
            | Effect::Gone { .. } => return None,
        })
    }

    async fn stop(&self, node: NodeId, attempt: Attempt) -> Result<(), Error> {
        let what = format!("ending the workers of {} on {}", attempt.name, self.name(node));
        within(self.limits.stop, &what, self.nodes.stop_workers(node, attempt)).await
    }

    /// Tells all nodes, and answers with those that did as they were told.
    async fn sweep(&self, attempt: &Attempt) -> Vec<NodeId> {
        let older = Attempt { name: attempt.name.clone(), epoch: attempt.epoch.saturating_sub(1) };
        let offers = self.nodes.offers();
        let stops = offers.iter().map(|offer| self.stop(offer.node, older.clone()));
        let results = futures::future::join_all(stops).await;
        let mut clean = Vec::new();
        for (offer, result) in offers.iter().zip(results) {
            match result {
                Ok(()) => clean.push(offer.node),
                Err(error) => {
                    let (deployment, node) = (&attempt.name, &offer.name);
                    tracing::warn!(deployment, node, %error, "a node may still run workers from before the restart");
                }
            }
        }
        clean
    }

    fn announce(&self, attempt: &Attempt, phase: Phase, detail: String) {
        let (done, total) = (ByteCount(0), ByteCount(0));
        self.audience.tell(&attempt.name, &Progress { phase, node_name: String::new(), done, total, detail });
    }

    fn sink(&self, attempt: &Attempt, phase: Phase, node: NodeId) -> ProgressSink {
        ProgressSink::new(self.audience.clone(), &attempt.name, phase, self.name(node))
    }

    fn name(&self, node: NodeId) -> String {
        let offers = self.nodes.offers();
        let offer = offers.into_iter().find(|offer| offer.node == node);
        offer.map_or_else(|| node.short(), |offer| offer.name)
    }
}

/// What a model costs, with its draft model.
pub(super) async fn weigh(
    nodes: Arc<dyn Nodes>,
    source: String,
    draft: Option<String>,
) -> Result<ModelCost, Error> {
    let cost = nodes.weigh(source).await?;
    let draft = match draft {
        Some(draft) => Some(DraftCost::from(nodes.weigh(draft).await?)),
        None => None,
    };
    Ok(ModelCost { draft, ..cost })
}

/// The answer, or that there was none in time. A panic in an order is a bug there; here it is a failed order.
pub(super) async fn within<T>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, AssertUnwindSafe(work).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::Failed(format!("{what} failed: this is a bug in mlxnode"))),
        Err(_) => Err(Error::TimedOut(format!("{what} took longer than {} s", limit.as_secs()))),
    }
}

/// The answer, or that nothing moved for so long. Downloads and loads may take an hour, but not stand still.
async fn while_moving<T>(
    limit: Duration,
    what: &str,
    progress: &ProgressSink,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        result = AssertUnwindSafe(work).catch_unwind() => match result {
            Ok(result) => result,
            Err(_) => Err(Error::Failed(format!("{what} failed: this is a bug in mlxnode"))),
        },
        () = progress.stands_still(limit) => {
            Err(Error::TimedOut(format!("{what} did not move for {} s", limit.as_secs())))
        }
    }
}
