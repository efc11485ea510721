//! Figures for monitoring, in the text that Prometheus reads.
//!
//! ```text
//! front ── RequestRecord: one request's life ──▶ Metrics ─┐
//! Observer ── what schedulers, workers and links do now ──┴─▶ text() ─▶ GET /metrics
//! ```
//!
//! What a request experiences has the names that vLLM made well known (`vllm:…`), so that its dashboards work as they are; what only a
//! cluster has is called `mlxnode_…`. Labels are names of deployments, layers, nodes and routes, all of them few: never a prompt, a key
//! or a client. Counters are those of one node: each counts the requests of its own clients, Prometheus adds them up.

mod observations;
mod requests;

pub use observations::{LinkSeen, Observations, Observer, SchedulerSeen, StageSeen, TimeHistogram};
pub use requests::{Finished, RequestRecord};

use crate::gate::Denied;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use requests::Requests;
use std::time::Instant;

/// The kind of text that [`Metrics::text`] writes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why a request was turned away before a model saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rejection {
    /// Too much waits already.
    Overloaded,
    /// The key has used what it may.
    KeyLimit,
    /// No key, or none that is valid.
    NoValidKey,
    /// The key may do less.
    Forbidden,
}

impl Rejection {
    /// Why the gate let nobody in; none when it only does not know yet.
    pub(crate) fn of(denied: &Denied) -> Option<Self> {
        match denied {
            Denied::NoKey | Denied::WrongKey => Some(Self::NoValidKey),
            Denied::WrongRole { .. } => Some(Self::Forbidden),
            Denied::Exhausted(_) => Some(Self::KeyLimit),
            Denied::NotKnownYet => None,
        }
    }
}

impl EncodeLabelValue for Rejection {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        let word = match self {
            Self::Overloaded => "overloaded",
            Self::KeyLimit => "key_limit",
            Self::NoValidKey => "no_valid_key",
            Self::Forbidden => "forbidden",
        };
        word.encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectionLabels {
    reason: Rejection,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    route: String,
    status: u16,
}

/// The figures of one node. A value, not a global: two nodes in one test stay apart.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Requests,
    rejections: Family<RejectionLabels, Counter>,
    answers: Family<AnswerLabels, Counter>,
    resumed: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let requests = Requests::register(&mut registry);
        let rejections = Family::default();
        registry.register(
            "mlxnode_requests_rejected",
            "Requests turned away before a model saw them",
            rejections.clone(),
        );
        let answers = Family::default();
        registry.register("mlxnode_http_answers", "HTTP answers by route and status", answers.clone());
        let resumed = Counter::default();
        registry.register(
            "mlxnode_answers_resumed",
            "Times that an answer lost its replica and went on with another one",
            resumed.clone(),
        );
        Self { registry, requests, rejections, answers, resumed }
    }
}

impl Metrics {
    /// The life of a request to this deployment, from now on.
    pub fn request(&self, model: &str, prompt_tokens: usize, arrived: Instant) -> RequestRecord {
        self.requests.record(model, prompt_tokens, arrived)
    }

    /// A request was turned away.
    pub fn rejected(&self, reason: Rejection) {
        self.rejections.get_or_create_owned(&RejectionLabels { reason }).inc();
    }

    /// An answer goes on after it lost its replica.
    pub fn resumed(&self) {
        self.resumed.inc();
    }

    /// A route (as it is written in the table of routes, not the path that was asked for) answered.
    pub fn answered(&self, route: &'static str, status: u16) {
        self.answers.get_or_create_owned(&AnswerLabels { route: route.to_owned(), status }).inc();
    }

    /// Everything, as Prometheus reads it.
    ///
    /// # Errors
    /// Never in practice: writing into a string does not fail.
    pub fn text(&self, observations: Observations) -> Result<String, std::fmt::Error> {
        self.requests.forget_others(&observations);
        let mut now = Registry::default();
        now.register_collector(Box::new(observations));
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &now)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::time::Duration;

    fn names(text: &str) -> BTreeSet<&str> {
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect()
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn what_dashboards_for_vllm_ask_for_is_there() {
        let metrics = Metrics::default();
        let start = Instant::now();
        let mut record = metrics.request("demo", 100, start);
        record.started(40, start + seconds(0.5));
        record.token(start + seconds(1.5));
        record.token(start + seconds(1.6));
        record.ended(Finished::Length, start + seconds(1.6));
        drop(metrics.request("demo", 7, start));
        let scheduler = SchedulerSeen {
            model: "demo".into(),
            running: 2,
            waiting: 3,
            kv_usage: Some(0.25),
            preemptions: 5,
            prompt_disk_bytes: 9,
            ..SchedulerSeen::default()
        };
        let text =
            metrics.text(Observations { schedulers: vec![scheduler], ..Observations::default() }).unwrap();
        for line in [
            "vllm:num_requests_running{model_name=\"demo\"} 2",
            "vllm:num_requests_waiting{model_name=\"demo\"} 3",
            "vllm:kv_cache_usage_perc{model_name=\"demo\"} 0.25",
            "vllm:num_preemptions_total{model_name=\"demo\"} 5",
            "vllm:prompt_tokens_total{model_name=\"demo\"} 100",
            "vllm:generation_tokens_total{model_name=\"demo\"} 2",
            "vllm:prefix_cache_queries_total{model_name=\"demo\"} 100",
            "vllm:prefix_cache_hits_total{model_name=\"demo\"} 40",
            "vllm:request_success_total{model_name=\"demo\",finished_reason=\"length\"} 1",
            "vllm:request_success_total{model_name=\"demo\",finished_reason=\"abort\"} 1",
            "vllm:time_to_first_token_seconds_count{model_name=\"demo\"} 1",
            "vllm:time_to_first_token_seconds_sum{model_name=\"demo\"} 1.5",
            "vllm:request_queue_time_seconds_sum{model_name=\"demo\"} 0.5",
            "vllm:request_prefill_time_seconds_sum{model_name=\"demo\"} 1.0",
            "vllm:e2e_request_latency_seconds_sum{model_name=\"demo\"} 1.6",
            "vllm:e2e_request_latency_seconds_count{model_name=\"demo\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"demo\"} 1",
            "vllm:request_prompt_tokens_count{model_name=\"demo\"} 1",
            "vllm:request_generation_tokens_count{model_name=\"demo\"} 1",
        ] {
            let (name, expected) = line.rsplit_once(' ').unwrap();
            let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let found = found.unwrap_or_else(|| panic!("no {name} in\n{text}"));
            let (found, expected) = (found.parse::<f64>().unwrap(), expected.parse::<f64>().unwrap());
            assert!((found - expected).abs() < 1e-9, "{name} is {found}, not {expected}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_line_is_one_that_prometheus_reads_and_no_name_is_there_twice() {
        let metrics = Metrics::default();
        metrics.request("a\"b\\c\nd", 1, Instant::now()).started(0, Instant::now());
        metrics.rejected(Rejection::KeyLimit);
        metrics.answered("/v1/models", 200);
        let stage = StageSeen {
            model: "demo".into(),
            layers: "0-4".into(),
            steps: 3,
            compute: seconds(1.0),
            computes: TimeHistogram::new(&[0.001], &[2, 1]),
            guessed_tokens: 9,
            accepted_tokens: 6,
            ..StageSeen::default()
        };
        let other = StageSeen { layers: "4-8".into(), ..stage.clone() };
        let observations = Observations {
            stages: vec![stage, other],
            links: vec![LinkSeen {
                to: "studio".into(),
                to_id: "00".into(),
                round_trip: Some(seconds(0.001)),
            }],
            nodes: [("alive", 2), ("dead", 1)].into(),
            memory_budget_bytes: 8,
            ..Observations::default()
        };
        let text = metrics.text(observations).unwrap();
        let types: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let distinct: BTreeSet<&&str> = types.iter().collect();
        assert_eq!(types.len(), distinct.len(), "{types:?}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("0-4")).collect();
        for (name, expected) in [("_bucket", "2"), ("_bucket", "3"), ("_count", "3"), ("_sum", "1.0")] {
            let name = format!("mlxnode_stage_step_compute_seconds{name}");
            let told = |line: &&&str| line.starts_with(&name) && line.ends_with(&format!(" {expected}"));
            assert!(lines.iter().find(told).is_some(), "{name} {expected} is not in {lines:?}");
        }
        let accepted = "vllm:spec_decode_num_accepted_tokens_total{model_name=\"demo\"} 12";
        assert!(text.lines().any(|line| line.starts_with(accepted)), "the sum of a model's replicas: {text}");
        for name in [
            "mlxnode_requests_rejected_total",
            "mlxnode_http_answers_total",
            "mlxnode_answers_resumed_total",
            "mlxnode_stage_compute_seconds_total",
            "mlxnode_link_round_trip_seconds",
            "mlxnode_nodes",
            "mlxnode_memory_budget_bytes",
        ] {
            assert!(names(&text).contains(name), "{name} is not in {text}");
        }
    }

    #[test]
    fn deployments_that_are_long_gone_do_not_pile_up() {
        let metrics = Metrics::default();
        for number in 0..1000 {
            drop(metrics.request(&format!("model{number}"), 1, Instant::now()));
            if number % 50 == 0 {
                metrics.text(Observations::default()).unwrap();
            }
        }
        let text = metrics.text(Observations::default()).unwrap();
        let kept = text.lines().filter(|line| line.starts_with("vllm:request_success_total")).count();
        assert!(kept <= requests::MODELS_KEPT, "{kept}");
        drop(metrics.request("again", 1, Instant::now()));
        assert!(metrics.text(Observations::default()).unwrap().contains("\"again\""));
    }
}
