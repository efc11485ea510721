//! What schedulers, workers and links do at the moment of the question.

use async_trait::async_trait;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Looks at a node. The node says how.
#[async_trait]
pub trait Observer: Send + Sync + 'static {
    /// As it is now. What does not answer at once is left out.
    async fn observe(&self) -> Observations;
}

/// One look at a node.
#[derive(Clone, Debug, Default)]
pub struct Observations {
    /// Name of the node.
    pub node: String,
    /// Names of all deployments of the cluster.
    pub deployments: Vec<String>,
    /// The schedulers on this node.
    pub schedulers: Vec<SchedulerSeen>,
    /// The workers on this node.
    pub stages: Vec<StageSeen>,
    /// The links from this node.
    pub links: Vec<LinkSeen>,
    /// Nodes of the cluster by their state, as this node sees them.
    pub nodes: BTreeMap<&'static str, usize>,
    /// What models may use on this node.
    pub memory_budget_bytes: u64,
    /// What they hold.
    pub memory_used_bytes: u64,
}

/// A replica's scheduler.
#[derive(Clone, Debug, Default)]
pub struct SchedulerSeen {
    /// Deployment.
    pub model: String,
    /// Requests that are generating.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// How much of the reserved KV memory is promised to sequences, 0 to 1; none when that is not known here.
    pub kv_usage: Option<f64>,
    /// Bytes of remembered prompts in the memory of all its stages.
    pub prompt_memory_bytes: u64,
    /// And on their disks.
    pub prompt_disk_bytes: u64,
    /// How often a sequence gave its memory back for older ones.
    pub preemptions: u64,
}

/// A worker.
#[derive(Clone, Debug, Default)]
pub struct StageSeen {
    /// Deployment.
    pub model: String,
    /// First layer and the one after the last: "0-16".
    pub layers: String,
    /// Steps computed.
    pub steps: u64,
    /// Time in steps.
    pub compute: Duration,
    /// Time that batches waited here before they were computed; none where that is not measured.
    pub wait: Option<Duration>,
    /// Time that messages took to the next stage; none where that is not measured.
    pub send: Option<Duration>,
    /// Sequences that hold memory.
    pub open_sequences: u64,
    /// Memory held now.
    pub active_bytes: u64,
    /// Memory held at most.
    pub peak_bytes: u64,
    /// Tokens of prompts that went through.
    pub prompt_tokens: u64,
    /// Generated tokens that went through.
    pub decode_tokens: u64,
    /// Bytes of the messages to the next stage.
    pub sent_bytes: u64,
    /// On a last stage: tokens that were guessed ahead.
    pub guessed_tokens: u64,
    /// Those of them that were right.
    pub accepted_tokens: u64,
    /// How long steps took; empty where that is not known.
    pub computes: TimeHistogram,
    /// How long batches waited before theirs.
    pub waits: TimeHistogram,
    /// How long messages took to the next stage.
    pub sends: TimeHistogram,
}

/// How often something took how long: upper bounds in seconds, the last one infinite, and how many times were no longer and longer than the
/// bound before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TimeHistogram(pub Vec<(f64, u64)>);

impl TimeHistogram {
    /// Counts by these bounds, and one more for what was longer.
    pub fn new(bounds: &[f64], counts: &[u64]) -> Self {
        Self(bounds.iter().copied().chain([f64::MAX]).zip(counts.iter().copied()).collect())
    }
}

/// A link to another node.
#[derive(Clone, Debug, Default)]
pub struct LinkSeen {
    /// Name of the other node.
    pub to: String,
    /// Its id, in hex.
    pub to_id: String,
    /// Smoothed, of heartbeats; none while unknown.
    pub round_trip: Option<Duration>,
}

/// Name and value of each label.
type Labels<'a> = Vec<(&'static str, &'a str)>;

impl Collector for Observations {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let out = &mut encoder;
        let by_scheduler = |value: fn(&SchedulerSeen) -> Option<f64>| {
            self.schedulers
                .iter()
                .filter_map(move |seen| Some((vec![("model_name", seen.model.as_str())], value(seen)?)))
        };
        gauges(
            out,
            "vllm:num_requests_running",
            "Requests that are generating, of schedulers on this node",
            by_scheduler(|seen| Some(seen.running as f64)),
        )?;
        gauges(
            out,
            "vllm:num_requests_waiting",
            "Requests that wait, of schedulers on this node",
            by_scheduler(|seen| Some(seen.waiting as f64)),
        )?;
        gauges(
            out,
            "vllm:kv_cache_usage_perc",
            "Part of the reserved KV memory that is promised to sequences, 0 to 1",
            by_scheduler(|seen| seen.kv_usage),
        )?;
        let tiers =
            |seen: &SchedulerSeen| [("memory", seen.prompt_memory_bytes), ("disk", seen.prompt_disk_bytes)];
        gauges(
            out,
            "mlxnode_prompt_cache_bytes",
            "Remembered prompts in the memory and on the disks of all stages, of schedulers on this node",
            self.schedulers.iter().flat_map(|seen| {
                let model = ("model_name", seen.model.as_str());
                tiers(seen).map(|(tier, bytes)| (vec![model, ("tier", tier)], bytes as f64))
            }),
        )?;
        counters(
            out,
            "vllm:num_preemptions",
            "Times that a sequence gave its memory back for older ones, to be computed again",
            by_scheduler(|seen| Some(seen.preemptions as f64)),
        )?;
        let guesses = |value: fn(&StageSeen) -> u64| {
            let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
            for seen in self.stages.iter().filter(|seen| seen.guessed_tokens > 0) {
                *sums.entry(seen.model.as_str()).or_default() += value(seen);
            }
            sums.into_iter().map(|(model, sum)| (vec![("model_name", model)], sum as f64))
        };
        counters(
            out,
            "vllm:spec_decode_num_draft_tokens",
            "Tokens that were guessed ahead, of models whose last stage is on this node",
            guesses(|seen| seen.guessed_tokens),
        )?;
        counters(
            out,
            "vllm:spec_decode_num_accepted_tokens",
            "Those of them that were right",
            guesses(|seen| seen.accepted_tokens),
        )?;
        let by_stage = |value: fn(&StageSeen) -> Option<f64>| {
            self.stages.iter().filter_map(move |seen| Some((stage_labels(&self.node, seen), value(seen)?)))
        };
        counters(
            out,
            "mlxnode_stage_steps",
            "Steps that a stage on this node has computed",
            by_stage(|seen| Some(seen.steps as f64)),
        )?;
        counters(
            out,
            "mlxnode_stage_compute_seconds",
            "Time that a stage on this node has spent computing",
            by_stage(|seen| Some(seen.compute.as_secs_f64())),
        )?;
        counters(
            out,
            "mlxnode_stage_wait_seconds",
            "Time that batches have waited at a stage on this node before they were computed",
            by_stage(|seen| Some(seen.wait?.as_secs_f64())),
        )?;
        counters(
            out,
            "mlxnode_stage_send_seconds",
            "Time that messages of a stage on this node took to the next stage",
            by_stage(|seen| Some(seen.send?.as_secs_f64())),
        )?;
        type Times = fn(&StageSeen) -> (&TimeHistogram, Option<Duration>);
        let times: [(&str, &str, Times); 3] = [
            (
                "mlxnode_stage_step_compute_seconds",
                "How long the steps of a stage on this node took",
                |seen| (&seen.computes, Some(seen.compute)),
            ),
            (
                "mlxnode_stage_step_wait_seconds",
                "How long batches waited at a stage on this node before they were computed",
                |seen| (&seen.waits, seen.wait),
            ),
            (
                "mlxnode_stage_step_send_seconds",
                "How long messages of a stage on this node took to the next stage",
                |seen| (&seen.sends, seen.send),
            ),
        ];
        for (name, help, of) in times {
            let mut metric = out.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for seen in &self.stages {
                let (TimeHistogram(buckets), Some(sum)) = of(seen) else { continue };
                let count: u64 = buckets.iter().map(|(_, count)| count).sum();
                if count > 0 {
                    let labels = stage_labels(&self.node, seen);
                    let mut family = metric.encode_family(&labels)?;
                    family.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), count, buckets, None)?;
                }
            }
        }
        counters(
            out,
            "mlxnode_stage_sent_bytes",
            "Bytes of the messages of a stage on this node to the next stage",
            by_stage(|seen| Some(seen.sent_bytes as f64)),
        )?;
        counters(
            out,
            "mlxnode_stage_prompt_tokens",
            "Tokens of prompts that went through a stage on this node",
            by_stage(|seen| Some(seen.prompt_tokens as f64)),
        )?;
        counters(
            out,
            "mlxnode_stage_decode_tokens",
            "Generated tokens that went through a stage on this node",
            by_stage(|seen| Some(seen.decode_tokens as f64)),
        )?;
        gauges(
            out,
            "mlxnode_stage_open_sequences",
            "Sequences that hold memory in a stage on this node",
            by_stage(|seen| Some(seen.open_sequences as f64)),
        )?;
        gauges(
            out,
            "mlxnode_stage_memory_bytes",
            "Memory that a stage on this node holds",
            by_stage(|seen| Some(seen.active_bytes as f64)),
        )?;
        gauges(
            out,
            "mlxnode_stage_memory_peak_bytes",
            "Memory that a stage on this node has held at most",
            by_stage(|seen| Some(seen.peak_bytes as f64)),
        )?;
        let round_trips = self
            .links
            .iter()
            .filter_map(|link| Some((vec![("to", link.to.as_str())], link.round_trip?.as_secs_f64())));
        gauges(
            out,
            "mlxnode_link_round_trip_seconds",
            "Round trip of heartbeats from this node to another one",
            round_trips,
        )?;
        let nodes = self.nodes.iter().map(|(state, count)| (vec![("state", *state)], *count as f64));
        gauges(out, "mlxnode_nodes", "Nodes of the cluster by state, as this node sees them", nodes)?;
        let alone = |value: u64| std::iter::once((Labels::new(), value as f64));
        gauges(
            out,
            "mlxnode_memory_budget_bytes",
            "Memory that models may use on this node",
            alone(self.memory_budget_bytes),
        )?;
        gauges(
            out,
            "mlxnode_memory_used_bytes",
            "Memory that models hold on this node",
            alone(self.memory_used_bytes),
        )
    }
}

fn stage_labels<'a>(node: &'a str, seen: &'a StageSeen) -> Labels<'a> {
    vec![("model_name", &seen.model), ("layers", &seen.layers), ("node", node)]
}

fn gauges<'a>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels<'a>, f64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counters<'a>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels<'a>, f64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}
