//! Which nodes compute a job, each with some of the model's layers, and what that takes of their memory.
//!
//! A job that fits one node runs on one. A model that does not is divided: among as few nodes as have room for it, or among as many
//! as was asked for. Where more nodes are wanted than one line of stages has, several lines share the work: each has the whole model, divided
//! in the same places. The arithmetic is [`TrainingCost`]'s; here nodes are chosen.

use super::{JobKind, JobOffer, JobSpec};
use crate::NodeId;
use mlxnode_checkpoint::{StageMemory, TrainedPart, TrainingCost, TrainingDemand};
use mlxnode_compute::{ByteCount, LayerRange};
use serde::{Deserialize, Serialize};

/// Most stages that a model is divided into.
pub const MAX_STAGES: u32 = 8;

/// What a job takes of the memory of nodes.
#[derive(Clone, Debug, PartialEq)]
pub enum Need {
    /// So much of each node that it runs on.
    Fixed(ByteCount),
    /// As the layers are divided.
    Model {
        /// On one node, all layers.
        whole: ByteCount,
        /// Of each part.
        cost: Box<TrainingCost>,
    },
}

/// What one node computes of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Which node.
    pub node: NodeId,
    /// Its layers of the model.
    pub layers: LayerRange,
    /// What that takes of its memory.
    pub memory: ByteCount,
    /// Of several lines of stages that share the work, which one it belongs to, from 0.
    #[serde(default, skip_serializing_if = "is_first")]
    pub replica: u32,
}

fn is_first(replica: &u32) -> bool {
    *replica == 0
}

impl JobSpec {
    /// Can it be divided, if need be?
    fn may_divide(&self) -> bool {
        self.stages != 1 && self.kind != JobKind::Rehearsal
    }
}

impl Need {
    /// What training this model takes. On one node an estimate that holds for rows of usual length, unless all of it is trained: the whole model,
    /// half as much again for what the backward pass keeps, and some for the process. Who knows better says so when submitting.
    pub fn of(spec: &JobSpec, cost: TrainingCost) -> Self {
        let profile = &cost.profile;
        let weights = profile.stage_bytes(LayerRange::new(0, cost.layer_count()));
        let usual = weights + ByteCount(weights.0 / 2) + ByteCount(256 << 20);
        let demand = spec.demand.unwrap_or_default();
        let all = || cost.stage(&demand, LayerRange::new(0, cost.layer_count()), 0, 1).total();
        let whole = match demand.part {
            TrainedPart::Full => usual.max(all()),
            TrainedPart::LowRank { .. } => usual,
        };
        Self::Model { whole, cost: Box::new(cost) }
    }

    /// Which of these nodes compute the job, line by line and stage by stage; the first one leads. `preferred` ranks them: those that have its newest checkpoint, say.
    ///
    /// # Errors
    /// What is missing, for people.
    pub(super) fn plan(
        &self,
        spec: &JobSpec,
        offers: &[&JobOffer],
        preferred: &dyn Fn(NodeId) -> u8,
    ) -> Result<Vec<PlannedStage>, String> {
        let mut by_room = offers.to_vec();
        by_room.sort_by_key(|offer| std::cmp::Reverse((preferred(offer.node), offer.free, offer.node)));
        if spec.stages > 1 {
            return self.divided(spec, spec.stages as usize, &by_room, preferred);
        }
        let whole = match self {
            Self::Fixed(memory) => *memory,
            Self::Model { whole, .. } => *whole,
        };
        let alone = |offer: &&JobOffer, memory| {
            vec![PlannedStage { node: offer.node, layers: LayerRange::new(0, 0), memory, replica: 0 }]
        };
        if let Some(offer) = by_room.iter().find(|offer| offer.free >= whole) {
            return Ok(alone(offer, whole));
        }
        if let Self::Model { cost, .. } = self
            && spec.may_divide()
        {
            let demand = spec.demand.unwrap_or_default();
            let free: Vec<ByteCount> = by_room.iter().map(|offer| offer.free).collect();
            if let Some(stages) = cost.fewest(&demand, &free, MAX_STAGES as usize) {
                if let [(place, stage)] = &stages[..] {
                    return Ok(alone(&by_room[*place], stage.total()));
                }
                if spec.workers as usize >= 2 * stages.len()
                    && let Ok(lines) = self.divided(spec, stages.len(), &by_room, preferred)
                {
                    return Ok(lines);
                }
                let placed = |(place, stage): &(usize, StageMemory)| PlannedStage {
                    node: by_room[*place].node,
                    layers: stage.layers(),
                    memory: stage.total(),
                    replica: 0,
                };
                return Ok(stages.iter().map(placed).collect());
            }
        }
        Err(match offers.iter().max_by_key(|offer| offer.free) {
            None => "no node is there".to_owned(),
            Some(offer) => format!(
                "it needs {whole} of memory; the most that is free is {} on {}{}: unload a model, or give a node more",
                offer.free,
                offer.name,
                match offers.len() > 1 && spec.may_divide() && matches!(self, Self::Model { .. }) {
                    true => ", and all nodes together have no room for it either",
                    false => "",
                }
            ),
        })
    }

    /// So many stages, in as many lines as there are nodes and room for, of those that are wanted.
    fn divided(
        &self,
        spec: &JobSpec,
        count: usize,
        by_room: &[&JobOffer],
        preferred: &dyn Fn(NodeId) -> u8,
    ) -> Result<Vec<PlannedStage>, String> {
        let missing = count.saturating_sub(by_room.len());
        if missing > 0 {
            let nodes = if missing == 1 { "node" } else { "nodes" };
            return Err(format!("waiting for {missing} more {nodes}: the model is divided among {count}"));
        }
        let most = (spec.workers as usize).min(by_room.len()) / count;
        let several =
            (2..=most).rev().find_map(|lines| self.lines(spec, count, lines, by_room, preferred).ok());
        several.map_or_else(|| self.lines(spec, count, 1, by_room, preferred), Ok)
    }

    /// So many lines of so many stages. The same stage of all lines has the same layers: it takes what the smallest of their nodes has room for.
    fn lines(
        &self,
        spec: &JobSpec,
        count: usize,
        lines: usize,
        by_room: &[&JobOffer],
        preferred: &dyn Fn(NodeId) -> u8,
    ) -> Result<Vec<PlannedStage>, String> {
        // Those with the most room; of these one that is preferred first.
        let mut chosen = by_room.to_vec();
        chosen.sort_by_key(|offer| std::cmp::Reverse((offer.free, offer.node)));
        chosen.truncate(count * lines);
        chosen.sort_by_key(|offer| std::cmp::Reverse((preferred(offer.node), offer.free, offer.node)));
        // Nodes of like room have the same stage.
        let of_stages: Vec<&[&JobOffer]> = chosen.chunks(lines).collect();
        let cost = match self {
            Self::Fixed(memory) => {
                let layers = |stage| LayerRange::new(stage, stage + 1);
                return fitting(&of_stages, |stage| (layers(stage), *memory));
            }
            Self::Model { cost, .. } => cost,
        };
        let demand = TrainingDemand { exchanging: lines > 1, ..spec.demand.unwrap_or_default() };
        // Equal rooms without an end: as even as can be.
        let even = cost.divide(&demand, &vec![ByteCount(u64::MAX); count]);
        let even = even.ok_or_else(|| {
            format!("the model cannot be divided into {count} stages: it has {} layers", cost.layer_count())
        })?;
        let least = |nodes: &&[&JobOffer]| nodes.iter().map(|offer| offer.free).min().unwrap_or_default();
        let free: Vec<ByteCount> = of_stages.iter().map(least).collect();
        let as_there_is_room = spec.memory.is_none().then(|| cost.divide(&demand, &free)).flatten();
        let stages = as_there_is_room.unwrap_or(even);
        fitting(&of_stages, |stage| {
            let memory = spec.memory.unwrap_or_else(|| stages[stage].total());
            (stages[stage].layers(), memory)
        })
    }
}

/// The stages line by line, when each has room on its node. `of_stages`: for each stage its node in every line; `part`: its layers and what it
/// takes.
fn fitting(
    of_stages: &[&[&JobOffer]],
    part: impl Fn(usize) -> (LayerRange, ByteCount),
) -> Result<Vec<PlannedStage>, String> {
    let lines = of_stages.first().map_or(0, |nodes| nodes.len());
    let mut planned = Vec::new();
    for replica in 0..lines {
        for (stage, nodes) in of_stages.iter().enumerate() {
            let (layers, memory) = part(stage);
            let offer = nodes.get(replica).filter(|offer| offer.free >= memory);
            planned.push(offer.map(|offer| PlannedStage {
                node: offer.node,
                layers,
                memory,
                replica: u32::try_from(replica).unwrap_or(u32::MAX),
            }));
        }
    }
    planned.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| {
        let needed: Vec<String> =
            (0..of_stages.len()).map(|stage| part(stage).1.to_string()).collect();
        let nodes = of_stages.iter().flat_map(|nodes| nodes.iter());
        let there: Vec<String> = nodes.map(|offer| format!("{} on {}", offer.free, offer.name)).collect();
        format!(
            "its {} stages need {} of memory; there is {}: unload a model, give a node more, or divide it among more",
            of_stages.len(),
            needed.join(" and "),
            there.join(" and ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::RunJob;
    use super::super::spec::tests::spec;
    use super::*;
    use mlxnode_checkpoint::{LayerTraining, ModelProfile};
    use mlxnode_compute::Dtype;

    const MB: u64 = 1 << 20;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    fn offers(free: &[u64]) -> Vec<JobOffer> {
        let offer = |(place, free): (usize, &u64)| JobOffer {
            node: node(place as u8),
            name: format!("mac-{place}"),
            free: ByteCount(free * MB),
        };
        free.iter().enumerate().map(offer).collect()
    }

    /// Eight layers of 100 MB, an embedding and a head of 100 MB each: 1000 MB, and what training takes.
    fn need() -> Need {
        let profile = ModelProfile {
            architecture: "a".to_owned(),
            layer_bytes: vec![ByteCount(100 * MB); 8],
            kv_bytes: vec![ByteCount(0); 8],
            kv_windows: vec![None; 8],
            state_bytes: vec![ByteCount(0); 8],
            joined: Vec::new(),
            embedding_bytes: ByteCount(100 * MB),
            entrance_bytes: ByteCount(0),
            passes: 1,
            head_bytes: ByteCount(100 * MB),
            tied_embeddings: false,
            hidden: 64,
            vocabulary: 100,
            context: None,
            dtype: Dtype::BF16,
        };
        let cost = TrainingCost { layers: vec![LayerTraining::default(); 8], profile, width: 64 };
        Need::Model { whole: ByteCount(1500 * MB), cost: Box::new(cost) }
    }

    fn plan(stages: u32, free: &[u64]) -> Result<Vec<(u8, usize, usize)>, String> {
        let demand = TrainingDemand { rows: 1, row_tokens: 8, ..TrainingDemand::default() };
        let spec = JobSpec { stages, demand: Some(demand), ..spec() };
        let offers = offers(free);
        let plan = need().plan(&spec, &offers.iter().collect::<Vec<_>>(), &|_| 0)?;
        for stage in &plan {
            let offer = offers.iter().find(|offer| offer.node == stage.node).unwrap();
            assert!(offer.free >= stage.memory, "{stage:?}");
        }
        Ok(plan.iter().map(|it| (it.node.as_bytes()[0], it.layers.start, it.layers.end)).collect())
    }

    #[test]
    fn a_model_is_divided_when_no_node_has_room_for_it_or_when_it_is_asked_for() {
        let unasked = 0;
        assert_eq!(plan(unasked, &[1400, 1600]), Ok(vec![(1, 0, 0)]), "one node is enough");
        let two = plan(unasked, &[800, 1300, 900]).unwrap();
        assert_eq!(
            two.iter().map(|stage| stage.0).collect::<Vec<_>>(),
            [1],
            "the estimate of the stages is closer"
        );
        let two = plan(unasked, &[700, 900, 900]).unwrap();
        assert_eq!(two.len(), 2);
        assert_eq!((two[0].1, two[0].2, two[1].2), (0, two[1].1, 8), "all layers, once");
        assert_eq!(plan(2, &[4000, 4000, 10]).unwrap().len(), 2);
        assert_eq!(plan(3, &[4000; 3]).unwrap().len(), 3);
        for (stages, free, words) in [
            (unasked, vec![], "no node"),
            (unasked, vec![300, 300], "all nodes together"),
            (1, vec![900, 900], "the most that is free is 944 MB"),
            (2, vec![4000], "waiting for 1 more node"),
            (4, vec![4000], "waiting for 3 more nodes"),
            (2, vec![500, 500], "2 stages need"),
            (9, vec![4000; 9], "has 8 layers"),
        ] {
            let error = plan(stages, &free).unwrap_err();
            assert!(error.contains(words), "{words}: {error}");
        }
    }

    #[test]
    fn several_lines_of_stages_share_the_work_as_far_as_there_are_nodes_with_room() {
        let lines = |stages, workers, free: &[u64]| {
            let demand = TrainingDemand { rows: 1, row_tokens: 8, ..TrainingDemand::default() };
            let spec = JobSpec { stages, workers, demand: Some(demand), ..spec() };
            let offers = offers(free);
            let all: Vec<&JobOffer> = offers.iter().collect();
            let plan = need().plan(&spec, &all, &|id| u8::from(id == node(1)))?;
            let nodes: std::collections::BTreeSet<NodeId> = plan.iter().map(|stage| stage.node).collect();
            assert_eq!(nodes.len(), plan.len(), "a node has one stage");
            let order = RunJob {
                spec,
                epoch: 1,
                checkpoints: Vec::new(),
                memory: plan[0].memory,
                stages: if plan.len() > 1 { plan.clone() } else { Vec::new() },
            };
            assert!(order.is_well_divided(), "{plan:?}");
            for stage in &plan {
                let offer = offers.iter().find(|offer| offer.node == stage.node).unwrap();
                assert!(offer.free >= stage.memory, "{stage:?}");
            }
            Ok::<_, String>((plan[0].node, order.replicas(), order.line_length()))
        };
        assert_eq!(lines(2, 4, &[4000; 4]), Ok((node(1), 2, 2)), "whoever has the checkpoint leads");
        assert_eq!(lines(2, 8, &[4000; 7]), Ok((node(1), 3, 2)), "three lines, and a node is left");
        assert_eq!(lines(2, 4, &[4000; 3]), Ok((node(1), 1, 2)), "not enough nodes for two lines");
        assert_eq!(lines(2, 4, &[4000, 4000, 10, 4000]).map(|it| it.1), Ok(1), "nor room");
        assert_eq!(lines(2, 2, &[4000; 4]).map(|it| (it.1, it.2)), Ok((1, 2)));
        assert_eq!(lines(2, 1, &[4000; 4]).map(|it| (it.1, it.2)), Ok((1, 2)));
        // Nobody said how many stages: as few as it takes, and as many lines as that leaves nodes for.
        assert_eq!(lines(0, 4, &[900; 4]).map(|it| (it.1, it.2)), Ok((2, 2)));
        assert_eq!(lines(0, 3, &[900; 4]).map(|it| (it.1, it.2)), Ok((1, 2)));
        assert_eq!(lines(0, 4, &[2000; 4]).map(|it| it.2), Ok(0), "each has the whole model");
        assert!(lines(2, 4, &[4000]).unwrap_err().contains("waiting for 1 more node"));
        // Unlike rooms: the smallest node of a stage decides.
        assert_eq!(lines(2, 4, &[700, 1100, 1000, 650]).map(|it| it.1), Ok(2));
    }

    #[test]
    fn memory_that_was_stated_counts_and_a_checkpoints_holder_leads() {
        let offers = offers(&[4000, 5000, 4500]);
        let all: Vec<&JobOffer> = offers.iter().collect();
        let stated = JobSpec { stages: 2, memory: Some(ByteCount(4200 * MB)), ..spec() };
        let plan = need().plan(&stated, &all, &|id| u8::from(id == node(2))).unwrap();
        assert_eq!(plan.iter().map(|stage| stage.node).collect::<Vec<_>>(), [node(2), node(1)]);
        assert!(plan.iter().all(|stage| stage.memory == ByteCount(4200 * MB)));
        let stated = JobSpec { memory: Some(ByteCount(4600 * MB)), ..stated };
        assert!(need().plan(&stated, &all, &|_| 0).unwrap_err().contains("2 stages need"));
        let rehearsal = JobSpec { kind: JobKind::Rehearsal, ..stated };
        let plan = Need::Fixed(ByteCount(MB)).plan(&rehearsal, &all, &|_| 0).unwrap();
        assert_eq!(plan.len(), 2);
    }
}
