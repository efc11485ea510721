//! Where the layers go: a pure problem with its own little model.
//!
//! In go what a model costs ([`ModelCost`]), what each node brings ([`Offer`]) and what the person wants ([`Wish`]); out comes
//! a [`Plan`] (contiguous layer ranges, one worker each) or a [`Refusal`] with the numbers that forbid it and what would fit.
//! Nothing here reads a clock, a file or a node.
//!
//! The rules, in order:
//! 0. Layers that share caches stay together ([`ModelCost::joined`]).
//! 1. Memory is a hard limit: weights + reserved KV cache + [`WORKER_RESERVE`] of each stage stay within the free budget of its node.
//!    What is left then is for blocks of prompts, up to the node's limit: they never keep a model from fitting.
//! 2. As few stages as fit, unless the wish says how many: a further stage adds a hop per token and no speed for one sequence.
//! 3. Among those, the slowest stage is as fast as it can be, because it alone bounds the throughput of the pipeline.
//! 4. Then the lowest latency of one token, then the most even stages, then the coordinator's node first.
//!
//! One node runs one stage of a plan. Who wants several stages on one node (to try a pipeline on one Mac) names it several
//! times: each naming gets an equal part of the node's free memory.

mod cost;
mod explain;
mod refusal;
mod search;

pub use cost::{DraftCost, LayerCost, ModelCost};
pub use refusal::{Advice, Refusal, Shortage};

use crate::NodeId;
use mlxnode_compute::{ByteCount, LayerRange};
use search::{Problem, Slot};
use std::collections::BTreeMap;
use std::time::Duration;

/// What a worker needs besides weights and KV cache: activations of a prefill chunk, logits, and MLX's cache of freed buffers.
/// 64 MiB holds a chunk of 512 tokens of width 8192 in f32 (16 MiB) four times over, and it is the margin that the benchmarks
/// hold each stage to.
pub const WORKER_RESERVE: ByteCount = ByteCount(64 << 20);

/// Context that is reserved when nobody says how much, unless the model allows less.
pub const DEFAULT_CONTEXT_TOKENS: usize = 4096;

/// Sequences at the same time when nobody says how many.
pub const DEFAULT_SEQUENCES: usize = 4;

/// Most sequences at the same time that can be asked for.
pub const MAX_SEQUENCES: usize = 1024;

/// Most stages of a plan. The search visits every subset of the candidate nodes, 2^8 of them.
pub const MAX_STAGES: usize = 8;

/// What a node brings.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// Who.
    pub node: NodeId,
    /// Its name, for people.
    pub name: String,
    /// What mlxnode may use on it.
    pub budget: ByteCount,
    /// What mlxnode uses on it now.
    pub used: ByteCount,
    /// Most that a worker may take there for blocks of prompts, of what the plan leaves free.
    pub prompts: ByteCount,
    /// How fast it reads weights while decoding, in bytes per second (measured, or about 70% of the chip's nominal bandwidth).
    /// `None` when nothing is known.
    pub bytes_per_second: Option<f64>,
    /// Is it the coordinator's node? Preferred when all else is equal: fewest machines to lose.
    pub coordinator: bool,
    /// Round trip times to other nodes, where measured.
    pub round_trips: BTreeMap<NodeId, Duration>,
}

impl Offer {
    /// What is left of the budget.
    pub fn free(&self) -> ByteCount {
        self.budget.saturating_sub(self.used)
    }
}

/// What a person wants. Made from loose input by [`Wish::default`] and the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Wish {
    /// Number of stages; `None`: as few as fit.
    pub stages: Option<usize>,
    /// Only these nodes, by name, id, or a prefix of the id of at least 4 characters. Empty: all.
    pub nodes: Vec<String>,
    /// Tokens of context to reserve KV memory for; `None`: what the model allows, at most [`DEFAULT_CONTEXT_TOKENS`].
    pub context_tokens: Option<usize>,
    /// Sequences at the same time; `None`: [`DEFAULT_SEQUENCES`].
    pub concurrent_sequences: Option<usize>,
    /// How tokens are guessed ahead; `None`: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")] // records of before there was guessing
    pub guessing: Option<Guessing>,
}

impl Wish {
    /// The draft model, if there is one.
    pub(crate) fn draft(&self) -> Option<String> {
        self.guessing.as_ref().and_then(|guessing| guessing.draft.clone())
    }
}

/// How a deployment guesses tokens ahead: the same answers, sooner.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Guessing {
    /// A smaller model with the same tokens: a folder, a Hugging Face id, or "demo". `None`: what came before in the text says.
    pub draft: Option<String>,
    /// Without a draft model: most tokens that must have come before.
    pub ngram: usize,
    /// Tokens at once.
    pub tokens: usize,
}

/// Which node runs which layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The model's family.
    pub architecture: String,
    /// Layers of the whole model.
    pub layer_count: usize,
    /// Longest sequence that the reserved memory allows, in tokens.
    pub context_tokens: usize,
    /// Sequences of that length for which memory is reserved. Shorter ones share it: there may be more of them at the same time.
    pub concurrent_sequences: usize,
    /// What a sequence takes of it whatever its length, in tokens of a whole context: states, windows. Of the stage where it is most.
    pub fixed_tokens: usize,
    /// In the order of the layers; at least one.
    pub stages: Vec<PlannedStage>,
    /// What every candidate node has and what this plan adds to it.
    pub budgets: Vec<NodeBudget>,
    /// Predicted decode speed of one sequence; `None` when the speed of a node is not known.
    pub tokens_per_second: Option<f64>,
    /// The same model on as few nodes as fit, when that is fewer than wished: how many, and the predicted speed.
    pub fewest: Option<(usize, Option<f64>)>,
}

impl Plan {
    /// Bytes of all weights, as the stages hold them (a tied embedding counts twice when two stages need it).
    pub fn weights(&self) -> ByteCount {
        self.stages.iter().map(|stage| stage.weights).sum()
    }

    /// Bytes of all reserved KV caches.
    pub fn kv(&self) -> ByteCount {
        self.stages.iter().map(|stage| stage.kv).sum()
    }

    /// Sentences for a person: the sums that led to this plan.
    pub fn explain(&self) -> String {
        explain::plan(self)
    }
}

/// One worker's part of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStage {
    /// Who runs it.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// Which layers.
    pub layers: LayerRange,
    /// Their weights, with embedding and head where the stage has them.
    pub weights: ByteCount,
    /// Reserved for the KV cache.
    pub kv: ByteCount,
    /// Reserved for everything else.
    pub reserve: ByteCount,
    /// For blocks of prompts: no reason to place layers elsewhere, so it is what is left, up to the node's limit.
    pub prompts: ByteCount,
}

impl PlannedStage {
    /// All memory that the stage takes from its node's budget.
    pub fn memory(&self) -> ByteCount {
        self.weights + self.kv + self.reserve + self.prompts
    }
}

/// A node's memory before and after a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeBudget {
    /// Who.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// What mlxnode may use.
    pub budget: ByteCount,
    /// What it uses already.
    pub used: ByteCount,
    /// What the plan adds.
    pub planned: ByteCount,
}

impl NodeBudget {
    /// What is left once the plan is carried out.
    pub fn left(&self) -> ByteCount {
        self.budget.saturating_sub(self.used).saturating_sub(self.planned)
    }
}

/// Places a model on the offered nodes.
pub fn plan(model: &ModelCost, offers: &[Offer], wish: &Wish) -> Result<Plan, Refusal> {
    let sizes = Sizes::settle(model, wish)?;
    let candidates = candidates(offers, &wish.nodes)?;
    if candidates.is_empty() {
        return Err(Refusal::NoNodes);
    }
    let slots = slots(&candidates, wish.stages)?;
    let problem = Problem::new(model, sizes.context_tokens, sizes.sequences, slots);
    let fewest = problem.fewest_stages();
    let stages = wish.stages.or(fewest);
    let best = stages.and_then(|stages| problem.best(stages));
    let Some(placed) = best else {
        return Err(refusal::shortage(model, &problem, &sizes, wish.stages));
    };

    let mut stages: Vec<PlannedStage> = placed
        .iter()
        .map(|(slot, layers)| PlannedStage {
            node: problem.slots[*slot].node,
            node_name: problem.slots[*slot].name.clone(),
            layers: *layers,
            weights: ByteCount(problem.weights(*layers)),
            kv: ByteCount(problem.kv(*layers)),
            reserve: WORKER_RESERVE,
            prompts: ByteCount(0),
        })
        .collect();
    give_prompts_what_is_left(&mut stages, &candidates);
    let mut budgets = Vec::new();
    for offer in distinct(&candidates) {
        budgets.push(NodeBudget {
            node: offer.node,
            node_name: offer.name.clone(),
            budget: offer.budget,
            used: offer.used,
            planned: stages.iter().filter(|stage| stage.node == offer.node).map(PlannedStage::memory).sum(),
        });
    }
    let fewest = fewest.filter(|fewest| *fewest < stages.len()).map(|fewest| {
        (fewest, problem.best(fewest).and_then(|placed| problem.predicted_tokens_per_second(&placed)))
    });
    Ok(Plan {
        architecture: model.architecture.clone(),
        layer_count: model.layers.len(),
        context_tokens: sizes.context_tokens,
        concurrent_sequences: sizes.sequences,
        fixed_tokens: stages
            .iter()
            .map(|stage| model.fixed_tokens(stage.layers, sizes.context_tokens))
            .max()
            .unwrap_or(0),
        tokens_per_second: problem.predicted_tokens_per_second(&placed),
        stages,
        budgets,
        fewest,
    })
}

/// Divides what the stages leave free of each node's budget among them, up to the node's limit for each.
fn give_prompts_what_is_left(stages: &mut [PlannedStage], candidates: &[&Offer]) {
    for offer in distinct(candidates) {
        let here = |stage: &&mut PlannedStage| stage.node == offer.node;
        let taken: ByteCount = stages.iter_mut().filter(here).map(|stage| stage.memory()).sum();
        let count = stages.iter_mut().filter(here).count() as u64;
        let share = offer.free().saturating_sub(taken).0 / count.max(1);
        for stage in stages.iter_mut().filter(here) {
            stage.prompts = offer.prompts.min(ByteCount(share));
        }
    }
}

/// The wish's numbers with defaults filled in and bounds checked.
pub(crate) struct Sizes {
    pub(crate) context_tokens: usize,
    pub(crate) sequences: usize,
}

impl Sizes {
    fn settle(model: &ModelCost, wish: &Wish) -> Result<Self, Refusal> {
        if model.layers.is_empty() {
            return Err(Refusal::NoLayers);
        }
        let allowed = model.context_tokens.max(1);
        let context_tokens = match wish.context_tokens {
            Some(asked) if asked == 0 || asked > allowed => {
                return Err(Refusal::Context { asked, allowed });
            }
            Some(asked) => asked,
            None => allowed.min(DEFAULT_CONTEXT_TOKENS),
        };
        let sequences = wish.concurrent_sequences.unwrap_or(DEFAULT_SEQUENCES);
        if sequences == 0 || sequences > MAX_SEQUENCES {
            return Err(Refusal::Sequences { asked: sequences, most: MAX_SEQUENCES });
        }
        if let Some(asked) = wish.stages {
            let (layers, pieces) = (model.layers.len(), model.pieces());
            let most = pieces.min(MAX_STAGES);
            if asked == 0 || asked > most {
                return Err(Refusal::Stages { asked, layers, pieces, most });
            }
        }
        Ok(Self { context_tokens, sequences })
    }
}

/// The offers that the filter names, in its order and as often as it names them; all of them once without a filter.
fn candidates<'a>(offers: &'a [Offer], filter: &[String]) -> Result<Vec<&'a Offer>, Refusal> {
    if filter.is_empty() {
        return Ok(offers.iter().collect());
    }
    filter.iter().map(|wanted| find_node(offers, wanted)).collect()
}

/// The node that a person means by a name, an id, or the beginning of an id.
fn find_node<'a>(offers: &'a [Offer], wanted: &str) -> Result<&'a Offer, Refusal> {
    let names = |offers: &[&Offer]| offers.iter().map(|offer| offer.name.clone()).collect::<Vec<_>>();
    let by_name: Vec<&Offer> = offers.iter().filter(|offer| offer.name == wanted).collect();
    let prefix = wanted.to_ascii_lowercase();
    let is_prefix = prefix.len() >= 4;
    let by_id: Vec<&Offer> =
        offers.iter().filter(|offer| is_prefix && offer.node.to_string().starts_with(&prefix)).collect();
    let found = if by_name.is_empty() { by_id } else { by_name };
    match found.as_slice() {
        [one] => Ok(one),
        [] => Err(Refusal::UnknownNode {
            wanted: wanted.to_owned(),
            known: names(&offers.iter().collect::<Vec<_>>()),
        }),
        several => Err(Refusal::AmbiguousNode {
            wanted: wanted.to_owned(),
            matches: several.iter().map(|offer| format!("{} ({})", offer.name, offer.node)).collect(),
        }),
    }
}

fn distinct<'a>(candidates: &[&'a Offer]) -> Vec<&'a Offer> {
    let mut seen: Vec<&Offer> = Vec::new();
    for offer in candidates {
        if seen.iter().all(|other| other.node != offer.node) {
            seen.push(offer);
        }
    }
    seen
}

/// The places a stage can go to. Each node is one, unless more stages are wished than there are nodes and the wish names
/// nodes several times: then each naming is one, with an equal part of the node's free memory.
fn slots(candidates: &[&Offer], stages: Option<usize>) -> Result<Vec<Slot>, Refusal> {
    let mut nodes = distinct(candidates);
    // The coordinator first, then the fastest, then the one with most room: the order decides between equal plans.
    nodes.sort_by(|left, right| {
        let speed = |offer: &Offer| offer.bytes_per_second.unwrap_or(0.0);
        (right.coordinator.cmp(&left.coordinator))
            .then(speed(right).total_cmp(&speed(left)))
            .then(right.free().cmp(&left.free()))
            .then(left.node.cmp(&right.node))
    });
    let mut times: Vec<usize> = vec![1; nodes.len()];
    if let Some(stages) = stages
        && stages > nodes.len()
    {
        times = nodes
            .iter()
            .map(|node| candidates.iter().filter(|candidate| candidate.node == node.node).count())
            .collect();
        let named: usize = times.iter().sum();
        if named < stages {
            return Err(Refusal::NotEnoughNodes { asked: stages, nodes: nodes.len() });
        }
        // Named more often than needed: the node that is named most gives one up, until they are as many as wished.
        for _ in stages..named {
            let most = (0..times.len()).max_by_key(|index| times[*index]).unwrap_or(0);
            times[most] -= 1;
        }
    }
    let slowest_known =
        nodes.iter().filter_map(|offer| usable_speed(offer)).min_by(f64::total_cmp).unwrap_or(UNKNOWN_SPEED);
    let mut slots = Vec::new();
    for (offer, times) in nodes.iter().zip(times) {
        for _ in 0..times {
            slots.push(Slot {
                node: offer.node,
                name: offer.name.clone(),
                free: offer.free().0 / times as u64,
                speed: usable_speed(offer).unwrap_or(slowest_known),
                speed_is_known: usable_speed(offer).is_some(),
                round_trips: offer.round_trips.clone(),
            });
        }
    }
    if slots.len() > MAX_STAGES {
        // More nodes than a plan has stages: those with least room are left out. Any plan that used one of them would fit
        // as well with one of the others in its place.
        let mut by_room: Vec<usize> = (0..slots.len()).collect();
        by_room.sort_by_key(|index| std::cmp::Reverse(slots[*index].free));
        by_room.truncate(MAX_STAGES);
        let mut index = 0;
        slots.retain(|_| {
            index += 1;
            by_room.contains(&(index - 1))
        });
    }
    Ok(slots)
}

/// Stands for the speed of all nodes when none is known: only ratios matter then.
const UNKNOWN_SPEED: f64 = 100e9;

/// The hint, when it is a number that a machine can have (1 MB/s to 1 PB/s).
fn usable_speed(offer: &Offer) -> Option<f64> {
    offer.bytes_per_second.filter(|speed| (1e6..=1e15).contains(speed))
}
