//! What requests experience, by deployment.

use super::Observations;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Deployments whose figures are kept. There are fewer at a time; those that are gone are kept as long as there is room.
pub(super) const MODELS_KEPT: usize = 128;

/// Upper bounds in seconds, as vLLM's, so that quantiles on its dashboards mean the same.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const NEXT_TOKEN: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
    20.0,
];
const WHOLE: &[f64] = &[
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Upper bounds in tokens.
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

/// Why a request ended. The words are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finished {
    /// A stop token or a stop string.
    Stop,
    /// No tokens left to generate.
    Length,
    /// The client went away, or its time was up.
    Abort,
    /// Something failed.
    Error,
}

impl EncodeLabelValue for Finished {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        self.word().encode(encoder)
    }
}

impl Finished {
    /// As figures and traces write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Model {
    model_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelEnd {
    model_name: String,
    finished_reason: Finished,
}

/// Makes a histogram with fixed bounds.
#[derive(Clone, Debug)]
struct Bounds(&'static [f64]);

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

type Histograms = Family<Model, Histogram, Bounds>;

#[derive(Debug)]
struct Families {
    prompt_tokens: Family<Model, Counter>,
    generation_tokens: Family<Model, Counter>,
    prefix_queries: Family<Model, Counter>,
    prefix_hits: Family<Model, Counter>,
    ends: Family<ModelEnd, Counter>,
    first_token: Histograms,
    next_token: Histograms,
    whole: Histograms,
    queue: Histograms,
    prefill: Histograms,
    decode: Histograms,
    prompt_lengths: Histograms,
    answer_lengths: Histograms,
}

/// The figures of all requests.
#[derive(Debug)]
pub(super) struct Requests {
    families: Arc<Families>,
    models: Mutex<BTreeSet<String>>,
}

impl Requests {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let mut counter = |name: &str, help: &str| {
            let family = Family::<Model, Counter>::default();
            registry.register(name, help, family.clone());
            family
        };
        let prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts whose work began");
        let generation_tokens = counter("vllm:generation_tokens", "Tokens generated");
        let prefix_queries =
            counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked up in the prompt cache");
        let prefix_hits = counter(
            "vllm:prefix_cache_hits",
            "Tokens of prompts that needed no work, because they were there",
        );
        let ends = Family::<ModelEnd, Counter>::default();
        registry.register("vllm:request_success", "Requests that ended, by reason", ends.clone());
        let mut histogram = |name: &str, help: &str, bounds: &'static [f64]| {
            let family = Histograms::new_with_constructor(Bounds(bounds));
            registry.register(name, help, family.clone());
            family
        };
        let families = Families {
            prompt_tokens,
            generation_tokens,
            prefix_queries,
            prefix_hits,
            ends,
            first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token",
                FIRST_TOKEN,
            ),
            next_token: histogram(
                "vllm:inter_token_latency_seconds",
                "From one token of an answer to the next",
                NEXT_TOKEN,
            ),
            whole: histogram(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its end",
                WHOLE,
            ),
            queue: histogram(
                "vllm:request_queue_time_seconds",
                "From a request's arrival to its first step",
                WHOLE,
            ),
            prefill: histogram(
                "vllm:request_prefill_time_seconds",
                "From a request's first step to its first token",
                WHOLE,
            ),
            decode: histogram(
                "vllm:request_decode_time_seconds",
                "From a request's first token to its last one",
                WHOLE,
            ),
            prompt_lengths: histogram(
                "vllm:request_prompt_tokens",
                "Tokens of a prompt; of requests that ran to their end",
                TOKENS,
            ),
            answer_lengths: histogram(
                "vllm:request_generation_tokens",
                "Tokens of an answer; of requests that ran to their end",
                TOKENS,
            ),
        };
        Self { families: Arc::new(families), models: Mutex::default() }
    }

    pub(super) fn record(&self, model: &str, prompt_tokens: usize, arrived: Instant) -> RequestRecord {
        {
            let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
            if !models.contains(model) {
                models.insert(model.to_owned());
            }
        }
        let families = self.families.clone();
        let model = Model { model_name: model.to_owned() };
        RequestRecord {
            // Looked up once for all tokens of the answer.
            generation_tokens: families.generation_tokens.get_or_create_owned(&model),
            next_token: families.next_token.get_or_create_owned(&model),
            families,
            model,
            prompt_tokens,
            generated: 0,
            arrived,
            started: None,
            first: None,
            last: None,
            is_over: false,
        }
    }

    /// Drops the figures of deployments that are gone, once there are many of them.
    pub(super) fn forget_others(&self, present: &Observations) {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if models.len() <= MODELS_KEPT / 2 {
            return;
        }
        let is_present = |name: &str| present.deployments.iter().any(|model| model == name);
        models.retain(|name| {
            let stays = is_present(name);
            if !stays {
                self.families.remove(name);
            }
            stays
        });
    }
}

impl Families {
    fn remove(&self, name: &str) {
        let model = Model { model_name: name.to_owned() };
        for counter in [&self.prompt_tokens, &self.generation_tokens, &self.prefix_queries, &self.prefix_hits]
        {
            counter.remove(&model);
        }
        for histogram in [
            &self.first_token,
            &self.next_token,
            &self.whole,
            &self.queue,
            &self.prefill,
            &self.decode,
            &self.prompt_lengths,
            &self.answer_lengths,
        ] {
            histogram.remove(&model);
        }
        for finished_reason in [Finished::Stop, Finished::Length, Finished::Abort, Finished::Error] {
            self.ends.remove(&ModelEnd { model_name: name.to_owned(), finished_reason });
        }
    }
}

/// The life of one request. Dropped before its end, it counts as aborted: so does whoever hangs up.
#[derive(Debug)]
pub struct RequestRecord {
    families: Arc<Families>,
    model: Model,
    generation_tokens: Counter,
    next_token: Histogram,
    prompt_tokens: usize,
    generated: usize,
    arrived: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    is_over: bool,
}

impl RequestRecord {
    /// The first step begins; so many tokens of the prompt need no work.
    pub fn started(&mut self, cached_tokens: usize, now: Instant) {
        self.started = Some(now);
        let families = &self.families;
        families.prompt_tokens.get_or_create_owned(&self.model).inc_by(self.prompt_tokens as u64);
        families.prefix_queries.get_or_create_owned(&self.model).inc_by(self.prompt_tokens as u64);
        families.prefix_hits.get_or_create_owned(&self.model).inc_by(cached_tokens as u64);
        observe(&families.queue, &self.model, since(self.arrived, now));
    }

    /// The next token is there.
    pub fn token(&mut self, now: Instant) {
        self.generated += 1;
        self.generation_tokens.inc();
        match self.last {
            None => {
                self.first = Some(now);
                observe(&self.families.first_token, &self.model, since(self.arrived, now));
                let started = self.started.unwrap_or(self.arrived);
                observe(&self.families.prefill, &self.model, since(started, now));
            }
            Some(last) => self.next_token.observe(since(last, now).as_secs_f64()),
        }
        self.last = Some(now);
    }

    /// It is over. What follows does not count.
    pub fn ended(&mut self, finished: Finished, now: Instant) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        let Families { ends, whole, decode, prompt_lengths, answer_lengths, .. } = &*self.families;
        let end = ModelEnd { model_name: self.model.model_name.clone(), finished_reason: finished };
        ends.get_or_create_owned(&end).inc();
        if matches!(finished, Finished::Abort | Finished::Error) {
            return;
        }
        observe(whole, &self.model, since(self.arrived, now));
        observe(decode, &self.model, since(self.first.unwrap_or(now), now));
        prompt_lengths.get_or_create_owned(&self.model).observe(self.prompt_tokens as f64);
        answer_lengths.get_or_create_owned(&self.model).observe(self.generated as f64);
    }

    /// It was turned away: no request that ended.
    pub fn was_never_taken(&mut self) {
        self.is_over = true;
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let now = self.last.unwrap_or(self.arrived);
        self.ended(Finished::Abort, now);
    }
}

fn observe(family: &Histograms, model: &Model, time: Duration) {
    family.get_or_create_owned(model).observe(time.as_secs_f64());
}

fn since(earlier: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(earlier)
}
