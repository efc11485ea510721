//! What training a model takes of memory, stage by stage: plain arithmetic over the config and the tensor index, before anything is loaded.
//!
//! A stage holds its layers, what is trained of them with gradients and the optimizer's memory, the inputs of the micro-batches that are on
//! their way (at most as many as there are stages from it on, in the schedule of PipeDream-Flush, Narayanan et al. 2021), and while it computes
//! the results of its layers, of which with gradient checkpointing only those of one layer are kept. The numbers are estimates that lie
//! above what is measured, and below one and a half times that (`training/tests/memory.rs`).

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::layout::ModuleKind;
use crate::profile::ModelProfile;
use crate::spec::{FeedForward, LayerSpec, Mixer, ModelSpec};
use mlxnode_compute::{ByteCount, LayerRange};
use serde::{Deserialize, Serialize};

/// A process that trains, before it has a model.
const PROCESS: u64 = 256 << 20;
/// Low-rank changes, and sums of gradients, are in single precision.
const SINGLE: u64 = 4;
/// Results of a layer besides those of its maps, in hidden vectors, while it is gone through backwards: norms, sums, their gradients.
const OTHER_RESULTS: u64 = 8;
/// Numbers of the size of an attention's scores, each in single precision, while it is gone through backwards.
const SCORES: u64 = 4;
/// What goes to other processes and comes from them has so many numbers for each that is trained, in single precision: the own sums, their
/// parts for others, the whole sum and the one before it.
const EXCHANGED: u64 = 4;
/// Numbers of the logits' size that a loss and its gradient make, each in single precision.
const LOSS_RESULTS: u64 = 5;
/// What results are taken for beyond what they are, in tenths: arrays live on until what needs them is computed, in whatever order.
const MARGIN: u64 = 2;

/// What of a model counts when it is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingCost {
    /// The layers.
    pub layers: Vec<LayerTraining>,
    /// Weights, joined layers and the rest.
    pub profile: ModelProfile,
    /// Elements that travel from stage to stage for each token.
    pub width: usize,
}

/// What of a layer counts when it is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerTraining {
    /// Numbers of low-rank changes of all its matrices, for each rank.
    pub low_rank: u64,
    /// Rows of its linear maps, whose lengths DoRA trains.
    pub rows: u64,
    /// Numbers that are stored as they are, not packed: what `full` trains.
    pub plain: u64,
    /// Numbers that go into its maps for a token.
    pub inputs: u64,
    /// Numbers that go in and come out of them.
    pub results: u64,
    /// Heads that see all tokens before each token.
    pub heads: u64,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainedPart {
    /// Changes of low rank of the layers' matrices.
    LowRank {
        /// The rank.
        rank: u64,
        /// With the lengths of rows (DoRA).
        magnitudes: bool,
        /// The embedding and the head as well.
        tables: bool,
    },
    /// The layers' tensors.
    Full,
}

/// How a model is trained, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingDemand {
    /// What is trained.
    pub part: TrainedPart,
    /// Of so many layers at the end; None: of all.
    pub last_layers: Option<usize>,
    /// Rows of a micro-batch; of pairs of answers both.
    pub rows: usize,
    /// Tokens of a row, at most.
    pub row_tokens: usize,
    /// Micro-batches of an update.
    pub micro_batches: u64,
    /// Arrays of a parameter's size that the optimizer remembers of it.
    pub memories: u64,
    /// Results within layers are computed again instead of kept.
    pub checkpointing: bool,
    /// The unchanged parameters are kept for comparison.
    pub reference: bool,
    /// Other processes have the same layers, and gradients are added up with theirs.
    #[serde(default)]
    pub exchanging: bool,
}

impl Default for TrainingDemand {
    /// mlx-lm's defaults.
    fn default() -> Self {
        Self {
            part: TrainedPart::LowRank { rank: 8, magnitudes: false, tables: false },
            last_layers: Some(16),
            rows: 4,
            row_tokens: 2048,
            micro_batches: 1,
            memories: 2,
            checkpointing: false,
            reference: false,
            exchanging: false,
        }
    }
}

/// What one stage takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageMemory {
    /// Its first layer and the one behind its last.
    pub layers: (usize, usize),
    /// The model's tensors.
    pub weights: ByteCount,
    /// What is trained and not the model's own, and what the optimizer remembers.
    pub trained: ByteCount,
    /// Gradients and their sums, or while an update is made its results.
    pub gradients: ByteCount,
    /// Hidden vectors of micro-batches on their way.
    pub in_flight: ByteCount,
    /// Results of layers for the gradient.
    pub results: ByteCount,
    /// Logits and what the loss makes of them, on the last stage.
    pub logits: ByteCount,
    /// The process itself.
    pub process: ByteCount,
}

impl StageMemory {
    /// The most at any time: while gradients are computed, or while an update is made.
    pub fn total(&self) -> ByteCount {
        let parts = [
            self.weights,
            self.trained,
            self.gradients,
            self.in_flight,
            self.results,
            self.logits,
            self.process,
        ];
        parts.into_iter().sum()
    }

    /// Its layers.
    pub fn layers(&self) -> LayerRange {
        LayerRange::new(self.layers.0, self.layers.1)
    }
}

impl TrainingCost {
    /// Of a model. Checks all of its tensors first; reads no weights.
    ///
    /// # Errors
    ///
    /// As [`ModelProfile::of`].
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let (spec, profile) = (checkpoint.spec(), ModelProfile::of(checkpoint)?);
        let shard = checkpoint.shard_tensors(LayerRange::new(0, spec.layer_count()))?;
        let packed = |path: &str| shard.quantization_of(path).is_some();
        let layers = spec.layers.iter().enumerate();
        let layers = layers.map(|(index, layer)| LayerTraining::of(spec, index, layer, &packed)).collect();
        Ok(Self { layers, profile, width: spec.activation_width() })
    }

    /// How many layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// What a stage with these layers takes, which is number `stage`, from 0, of `stages`.
    pub fn stage(
        &self,
        demand: &TrainingDemand,
        layers: LayerRange,
        stage: usize,
        stages: usize,
    ) -> StageMemory {
        let count = self.layer_count();
        let element = self.profile.dtype.size() as u64;
        let first_trained = count - demand.last_layers.unwrap_or(count).min(count);
        let own = || {
            (layers.start..layers.end.min(count)).filter_map(|index| Some((index, self.layers.get(index)?)))
        };
        let is_trained = |index: usize| index >= first_trained;
        let (numbers, size) = self.trained(demand, layers, first_trained);
        let tokens = (demand.rows as u64).saturating_mul(demand.row_tokens as u64);
        let copies = if demand.reference { 2 } else { 1 };
        // Of the model's own tensors the parameters are those that are loaded.
        let parameters = match demand.part {
            TrainedPart::Full => numbers * size * (copies - 1),
            TrainedPart::LowRank { .. } => numbers * size * copies,
        };
        let trained = parameters + numbers * size * demand.memories;
        // The sums of a tree that is summed as it grows, and the newest micro-batch's.
        let sums = u64::from(demand.micro_batches.max(1).ilog2()) + 2;
        let exchanged = if demand.exchanging { numbers * SINGLE * EXCHANGED } else { 0 };
        let backward = numbers * SINGLE * sums + exchanged;
        let update = numbers * (SINGLE + size + size * (1 + demand.memories)) + exchanged;
        let kept = |index: usize, layer: &LayerTraining| {
            tokens.saturating_mul(self.kept(demand, layer, is_trained(index)))
        };
        let largest = own().map(|(index, layer)| kept(index, layer)).max().unwrap_or(0);
        let backwards = own().map(|(_, layer)| tokens.saturating_mul(self.passing(demand, layer)));
        let passing = backwards.max().unwrap_or(0);
        let results = if demand.checkpointing {
            let hidden = tokens.saturating_mul(self.width as u64 * element);
            largest.saturating_add(hidden.saturating_mul(layers.len() as u64))
        } else {
            let of_all = own().filter(|(index, _)| *index >= first_trained);
            of_all.map(|(index, layer)| kept(index, layer)).fold(0, u64::saturating_add).max(largest)
        };
        let results = results.saturating_add(passing);
        let results = results.saturating_add(results / 10 * MARGIN);
        let is_last = layers.is_last(count);
        let logits = match is_last {
            true => tokens
                .saturating_mul(self.profile.vocabulary as u64)
                .saturating_mul(element + LOSS_RESULTS * SINGLE),
            false => 0,
        };
        let ways = (stages.saturating_sub(stage) as u64).min(demand.micro_batches.max(1));
        let in_flight = match stages > 1 {
            // Those that wait for their gradients, and one that comes or goes.
            true => tokens.saturating_mul(self.width as u64 * element).saturating_mul(ways + 1),
            false => 0,
        };
        // While an update is made there are no results any more.
        let computing = backward.saturating_add(results).saturating_add(logits);
        let (gradients, results, logits) = match update > computing {
            true => (update, 0, 0),
            false => (backward, results, logits),
        };
        StageMemory {
            layers: (layers.start, layers.end),
            weights: self.profile.stage_bytes(layers),
            trained: ByteCount(trained),
            gradients: ByteCount(gradients),
            in_flight: ByteCount(in_flight),
            results: ByteCount(results),
            logits: ByteCount(logits),
            process: ByteCount(PROCESS),
        }
    }

    /// What all stages take whose first layers are these; the first of all, 0, is not among them.
    pub fn stages(&self, demand: &TrainingDemand, cuts: &[usize]) -> Vec<StageMemory> {
        let ends = cuts.iter().copied().chain([self.layer_count()]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let stages = cuts.len() + 1;
        let ranges = starts.zip(ends).enumerate();
        ranges
            .map(|(stage, (from, to))| self.stage(demand, LayerRange::new(from, to), stage, stages))
            .collect()
    }

    /// Divides the layers among nodes with so much free memory, in their order, each at least one layer: such that the largest share of a
    /// node's memory that is taken is as small as can be. None when they do not fit so.
    pub fn divide(&self, demand: &TrainingDemand, free: &[ByteCount]) -> Option<Vec<StageMemory>> {
        let (count, stages) = (self.layer_count(), free.len());
        if stages == 0 || stages > count {
            return None;
        }
        let may_begin = |layer: usize| layer == 0 || !self.profile.joined.contains(&layer);
        // best[end]: the largest share and the first layers of the stages so far, which hold the layers before `end`.
        let mut best: Vec<Option<(f64, Vec<usize>)>> = vec![None; count + 1];
        best[0] = Some((0.0, Vec::new()));
        for (stage, free) in free.iter().enumerate() {
            let mut next = vec![None; count + 1];
            for (start, before) in best.iter().enumerate() {
                let Some((share, firsts)) = before.as_ref().filter(|_| start < count && may_begin(start))
                else {
                    continue;
                };
                for (end, place) in next.iter_mut().enumerate().skip(start + 1) {
                    let need = self.stage(demand, LayerRange::new(start, end), stage, stages).total();
                    if need > *free {
                        break; // more layers need more
                    }
                    let share = share.max(need.0 as f64 / free.0.max(1) as f64);
                    if place.as_ref().is_none_or(|(known, _): &(f64, Vec<usize>)| share < *known) {
                        *place = Some((share, [firsts.as_slice(), &[start]].concat()));
                    }
                }
            }
            best = next;
        }
        let (_, firsts) = best.pop()??;
        Some(self.stages(demand, firsts.get(1..)?))
    }

    /// As many nodes as it takes, of `most` at most, the ones with the most free memory first: which of them, by their places in `free`, and what each
    /// takes. None when it fits no number of them.
    pub fn fewest(
        &self,
        demand: &TrainingDemand,
        free: &[ByteCount],
        most: usize,
    ) -> Option<Vec<(usize, StageMemory)>> {
        let mut order: Vec<usize> = (0..free.len()).collect();
        order.sort_by_key(|place| std::cmp::Reverse(free[*place]));
        (1..=most.min(free.len())).find_map(|stages| {
            let chosen = &order[..stages];
            let free: Vec<ByteCount> = chosen.iter().map(|place| free[*place]).collect();
            Some(chosen.iter().copied().zip(self.divide(demand, &free)?).collect())
        })
    }

    /// How many numbers of these layers are trained, and the bytes of one.
    fn trained(&self, demand: &TrainingDemand, layers: LayerRange, first_trained: usize) -> (u64, u64) {
        let profile = &self.profile;
        let of_layers = self.layers.iter().take(layers.end).skip(layers.start.max(first_trained));
        match demand.part {
            TrainedPart::LowRank { rank, magnitudes, tables } => {
                let ends = [layers.is_first(), layers.is_last(self.layer_count())]
                    .into_iter()
                    .filter(|end| *end && tables);
                let of_tables = (profile.vocabulary + profile.hidden) as u64 * ends.count() as u64;
                let of_layers =
                    of_layers.map(|layer| layer.low_rank * rank + if magnitudes { layer.rows } else { 0 });
                (of_tables * rank + of_layers.sum::<u64>(), SINGLE)
            }
            TrainedPart::Full => (of_layers.map(|layer| layer.plain).sum(), profile.dtype.size() as u64),
        }
    }

    /// What is kept of a token in a layer for the way back, in bytes.
    fn kept(&self, demand: &TrainingDemand, layer: &LayerTraining, trained: bool) -> u64 {
        let element = self.profile.dtype.size() as u64;
        let of_changes = match demand.part {
            TrainedPart::LowRank { magnitudes, .. } if trained => {
                // Changes are computed in single precision: of what goes in there is a second copy, unless it is in that anyway.
                let copies = if element < SINGLE { layer.inputs * SINGLE } else { 0 };
                copies + if magnitudes { layer.rows * SINGLE } else { 0 }
            }
            _ => 0,
        };
        layer.results * element + of_changes
    }

    /// What else there is of a token while a layer is gone through backwards, in bytes: for one layer at a time.
    fn passing(&self, demand: &TrainingDemand, layer: &LayerTraining) -> u64 {
        let element = match demand.part {
            TrainedPart::LowRank { .. } => SINGLE,
            TrainedPart::Full => self.profile.dtype.size() as u64,
        };
        let results = layer.results + OTHER_RESULTS * self.profile.hidden as u64;
        results * element * 5 / 4 + layer.heads * demand.row_tokens as u64 * SCORES * SINGLE
    }
}

impl LayerTraining {
    fn of(spec: &ModelSpec, index: usize, layer: &LayerSpec, packed: &dyn Fn(&str) -> bool) -> Self {
        let prefix = format!("model.layers.{}.", spec.stored_layer(index));
        let per_token = match (&layer.feed_forward, &layer.mixer) {
            (FeedForward::Experts(experts), _) => experts.per_token,
            (_, Mixer::Shortcut(shortcut)) => shortcut.experts.per_token,
            _ => 1,
        } as u64;
        let mut made = Self::default();
        let modules = spec.modules(LayerRange::new(index, index + 1)).into_iter();
        for module in modules.filter(|module| module.path.starts_with(&prefix)) {
            match module.kind {
                ModuleKind::Linear { inputs, outputs, .. } => {
                    made.low_rank += (inputs + outputs) as u64;
                    made.rows += outputs as u64;
                    made.inputs += inputs as u64;
                    made.results += (inputs + outputs) as u64;
                }
                ModuleKind::Experts { experts, inputs, outputs, .. } => {
                    made.low_rank += (experts * (inputs + outputs)) as u64;
                    made.inputs += inputs as u64 * per_token;
                    made.results += (inputs + outputs) as u64 * per_token;
                }
                ModuleKind::Embedding { rows, width } => made.low_rank += (rows + width) as u64,
                _ => {}
            }
            let tensors = module.tensors(None).unwrap_or_default().into_iter();
            let plain = tensors.filter(|tensor| !(packed(&module.path) && tensor.name.ends_with(".weight")));
            made.plain += plain
                .map(|tensor| tensor.shape.iter().map(|size| *size as u64).product::<u64>())
                .sum::<u64>();
        }
        let latent = match &layer.mixer {
            Mixer::Latent(latent) => latent.heads,
            Mixer::Shortcut(shortcut) => 2 * shortcut.attention.heads,
            _ => 0,
        };
        made.heads = layer.mixer.attention().map_or(latent, |attention| attention.heads) as u64;
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_compute::Dtype;

    const MB: u64 = 1 << 20;

    /// Eight layers of 100 MB, an embedding and a head of 150 MB each.
    fn cost(joined: Vec<usize>) -> TrainingCost {
        let layer = LayerTraining {
            low_rank: 20_000,
            rows: 9_000,
            plain: 50 * MB,
            inputs: 11_000,
            results: 20_000,
            heads: 16,
        };
        let profile = ModelProfile {
            architecture: "a".to_owned(),
            layer_bytes: vec![ByteCount(100 * MB); 8],
            kv_bytes: vec![ByteCount(0); 8],
            kv_windows: vec![None; 8],
            state_bytes: vec![ByteCount(0); 8],
            joined,
            embedding_bytes: ByteCount(150 * MB),
            entrance_bytes: ByteCount(0),
            passes: 1,
            head_bytes: ByteCount(150 * MB),
            tied_embeddings: false,
            hidden: 2048,
            vocabulary: 32_000,
            context: None,
            dtype: Dtype::BF16,
        };
        TrainingCost { layers: vec![layer; 8], profile, width: 2048 }
    }

    fn demand() -> TrainingDemand {
        TrainingDemand { rows: 2, row_tokens: 256, micro_batches: 4, ..TrainingDemand::default() }
    }

    #[test]
    fn stages_hold_their_parts_and_fewer_micro_batches_the_later_they_come() {
        let (cost, demand) = (cost(Vec::new()), demand());
        let whole = cost.stages(&demand, &[]);
        let three = cost.stages(&demand, &[3, 6]);
        let sum = |of: fn(&StageMemory) -> ByteCount| three.iter().map(of).sum::<ByteCount>();
        assert_eq!(sum(|stage| stage.weights), whole[0].weights);
        assert_eq!(sum(|stage| stage.trained), whole[0].trained);
        assert_eq!(whole[0].in_flight, ByteCount(0));
        let hidden = 2 * 256 * 2048 * 2;
        let in_flight: Vec<ByteCount> = three.iter().map(|stage| stage.in_flight).collect();
        assert_eq!(in_flight, [4, 3, 2].map(|count| ByteCount(count * hidden)));
        assert_eq!(three.iter().map(|stage| stage.logits.0 > 0).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(three[1].layers(), LayerRange::new(3, 6));
        // Adam's two memories beside each parameter, all in single precision.
        assert_eq!(whole[0].trained.0, 8 * 20_000 * 8 * 4 * 3);
        // Where gradients are added up with those of other processes: four more arrays of their size.
        let exchanging = cost.stages(&TrainingDemand { exchanging: true, ..demand }, &[3, 6]);
        for (alone, exchanging) in three.iter().zip(&exchanging) {
            let layers = alone.layers.1 - alone.layers.0;
            assert_eq!(exchanging.gradients.0 - alone.gradients.0, (layers * 20_000 * 8 * 4 * 4) as u64);
        }
    }

    #[test]
    fn what_is_asked_for_shows() {
        let (cost, demand) = (cost(Vec::new()), demand());
        let total = |demand: TrainingDemand| cost.stages(&demand, &[])[0].total();
        let plain = total(demand);
        let part = |rank, magnitudes, tables| TrainedPart::LowRank { rank, magnitudes, tables };
        for more in [
            TrainingDemand { part: TrainedPart::Full, ..demand },
            TrainingDemand { part: part(16, false, false), ..demand },
            TrainingDemand { part: part(8, true, false), ..demand },
            TrainingDemand { part: part(8, false, true), ..demand },
            TrainingDemand { rows: 3, ..demand },
            TrainingDemand { row_tokens: 300, ..demand },
            TrainingDemand { micro_batches: 8, ..demand },
            TrainingDemand { reference: true, ..demand },
        ] {
            assert!(total(more) > plain, "{more:?}");
        }
        for less in [
            TrainingDemand { checkpointing: true, ..demand },
            TrainingDemand { last_layers: Some(2), ..demand },
            TrainingDemand { memories: 1, ..demand },
        ] {
            assert!(total(less) < plain, "{less:?}");
        }
        // The weights, as many numbers in each of Adam's memories, and those in an update, new and old.
        let full = TrainingDemand { part: TrainedPart::Full, ..demand };
        assert!(total(full).0 > 8 * 50 * MB * 2 * 6, "{}", total(full));
    }

    #[test]
    fn layers_are_divided_by_the_memory_that_is_free_and_never_within_joined_ones() {
        let demand = TrainingDemand { rows: 1, row_tokens: 32, ..demand() };
        let ranges = |cost: &TrainingCost, free: &[u64]| {
            let free: Vec<ByteCount> = free.iter().map(|free| ByteCount(free * MB)).collect();
            let stages = cost.divide(&demand, &free)?;
            assert!(stages.iter().zip(&free).all(|(stage, free)| stage.total() <= *free));
            Some(stages.iter().map(|stage| stage.layers).collect::<Vec<_>>())
        };
        let plain = cost(Vec::new());
        assert_eq!(ranges(&plain, &[2000]), Some(vec![(0, 8)]));
        assert_eq!(ranges(&plain, &[2000, 2000]), Some(vec![(0, 4), (4, 8)]));
        let uneven = ranges(&plain, &[1400, 700]).unwrap();
        assert!(uneven[0].1 > 4, "{uneven:?}");
        assert_eq!(ranges(&plain, &[600, 600]), None, "too little");
        assert_eq!(ranges(&plain, &[2000; 9]), None, "more nodes than layers");
        assert_eq!(ranges(&plain, &[]), None);
        let cut = ranges(&cost(vec![3, 4, 5]), &[2000, 2000]).unwrap()[0].1;
        assert!(!(3..=5).contains(&cut), "{cut}");
        let free = [700, 3000, 800].map(|free| ByteCount(free * MB));
        let places = |demand: &TrainingDemand, most| {
            let stages = plain.fewest(demand, &free, most)?;
            Some(stages.iter().map(|(place, _)| *place).collect::<Vec<_>>())
        };
        assert_eq!(places(&demand, 3), Some(vec![1]));
        let large = TrainingDemand { part: TrainedPart::Full, micro_batches: 1, memories: 1, ..demand };
        assert_eq!(places(&large, 1), None);
        assert!(places(&large, 3).is_none_or(|chosen| chosen.len() > 1));
    }
}
