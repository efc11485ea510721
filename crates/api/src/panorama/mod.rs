//! What all nodes of the cluster do now, asked once for everybody who watches.
//!
//! ```text
//! page, `mlxnode top` ─▶ Panorama::look ── at most twice a second ──▶ Sight: this node and every other one that answers
//!                              └─ rates: what changed since the look before
//! ```
//!
//! Nothing is asked while nobody watches, and a hundred who watch cost the other nodes as much as one.

mod rates;
pub(crate) mod wire;

pub use rates::StageRates;
pub use wire::{node_seen, node_seen_to_proto};

use crate::metrics::{LinkSeen, SchedulerSeen, StageSeen};
use async_trait::async_trait;
use mlxnode_cluster::NodeId;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// Looks at all nodes.
#[async_trait]
pub trait Sight: Send + Sync + 'static {
    /// This node and every other one that answers at once.
    async fn look(&self) -> Vec<NodeSeen>;
}

/// One look at a node.
#[derive(Clone, Debug)]
pub struct NodeSeen {
    /// Which.
    pub node: NodeId,
    /// The schedulers on it.
    pub schedulers: Vec<SchedulerSeen>,
    /// The workers on it.
    pub stages: Vec<StageSeen>,
    /// The links from it.
    pub links: Vec<LinkSeen>,
}

/// A look at a node, with what changed since the one before.
#[derive(Clone, Debug)]
pub struct NodeFigures {
    /// The look.
    pub seen: NodeSeen,
    /// For each of its stages; none where there was no look before.
    pub rates: Vec<Option<StageRates>>,
}

/// The shared look at the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Panorama {
    sight: Arc<dyn Sight>,
    last: Arc<Mutex<Option<Look>>>,
}

struct Look {
    at: Instant,
    figures: Arc<Vec<NodeFigures>>,
}

/// A look stays good for so long.
const FRESH: Duration = Duration::from_millis(450);
/// Over a longer time a mean says nothing about now.
const LONGEST_MEAN: Duration = Duration::from_secs(10);

impl Panorama {
    /// Looks by `sight`.
    pub fn new(sight: Arc<dyn Sight>) -> Self {
        Self { sight, last: Arc::default() }
    }

    /// What the nodes do now, or did less than half a second ago.
    pub async fn look(&self) -> Arc<Vec<NodeFigures>> {
        self.look_at(Instant::now()).await
    }

    async fn look_at(&self, at: Instant) -> Arc<Vec<NodeFigures>> {
        let mut last = self.last.lock().await;
        // Who waited for another's look has an older time than that.
        if let Some(look) = last.as_ref().filter(|look| at.saturating_duration_since(look.at) < FRESH) {
            return look.figures.clone();
        }
        let seen = self.sight.look().await;
        let before = last.take().map(|look| (at.duration_since(look.at), look.figures));
        let before = before.filter(|(passed, _)| *passed <= LONGEST_MEAN);
        let figures = seen.into_iter().map(|seen| with_rates(seen, before.as_ref()));
        let figures = Arc::new(figures.collect::<Vec<_>>());
        *last = Some(Look { at, figures: figures.clone() });
        figures
    }
}

fn with_rates(seen: NodeSeen, before: Option<&(Duration, Arc<Vec<NodeFigures>>)>) -> NodeFigures {
    let rates = seen.stages.iter().map(|stage| {
        let (passed, figures) = before?;
        let node = figures.iter().find(|figures| figures.seen.node == seen.node)?;
        let is_it = |other: &&StageSeen| other.model == stage.model && other.layers == stage.layers;
        StageRates::between(node.seen.stages.iter().find(is_it)?, stage, *passed)
    });
    NodeFigures { rates: rates.collect(), seen }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A node whose stage generates ten tokens for each look.
    #[derive(Default)]
    struct Busy {
        looks: AtomicU64,
    }

    #[async_trait]
    impl Sight for Busy {
        async fn look(&self) -> Vec<NodeSeen> {
            let looks = self.looks.fetch_add(1, Ordering::SeqCst) + 1;
            let stage = StageSeen {
                model: "demo".into(),
                layers: "0-4".into(),
                decode_tokens: looks * 10,
                ..StageSeen::default()
            };
            let node = NodeId::from_bytes([1; 32]);
            vec![NodeSeen { node, schedulers: Vec::new(), stages: vec![stage], links: Vec::new() }]
        }
    }

    #[tokio::test]
    async fn who_watches_together_asks_once_and_rates_are_of_the_time_between() {
        let sight = Arc::new(Busy::default());
        let panorama = Panorama::new(sight.clone());
        let tokens = |figures: &[NodeFigures]| figures[0].rates[0].map(|rates| rates.tokens_per_second);
        let start = Instant::now();
        let at = |seconds: f64| panorama.look_at(start + Duration::from_secs_f64(seconds));
        let first = at(0.0).await;
        assert_eq!(tokens(&first), None, "there was no look before");
        let same = at(0.4).await;
        assert!(Arc::ptr_eq(&first, &same));
        assert_eq!(sight.looks.load(Ordering::SeqCst), 1);
        assert_eq!(tokens(&at(2.0).await), Some(5.0));
        assert_eq!(tokens(&at(1.0).await), Some(5.0), "a look from before is taken for this one");
        assert_eq!(tokens(&at(62.0).await), None, "a minute's mean is not now");
    }
}
