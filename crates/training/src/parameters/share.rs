//! What one stage of several trains of the whole model's parameters.
//!
//! Which modules have a place for changes only the stage that has loaded them knows, so each says it of its own, as bits over lists that follow
//! from the model's description; out of all bits each stage makes the same plan of the whole model, and takes its own part of it.

use super::{ParameterError, chosen};
use crate::{FineTuneType, TrainingConfig};
use mlxnode_checkpoint::ModelSpec;
use mlxnode_checkpoint::layout::Module;
use mlxnode_compute::LayerRange;
use mlxnode_engine::tuning::{Plan, TuneError, Tuning};
use std::collections::{BTreeMap, BTreeSet};

/// Bits in a number that is exact in double precision.
const BITS: usize = 48;

/// A plan that cannot be carried out in stages.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error(transparent)]
    Parameters(#[from] ParameterError),
    /// A matrix of several stages.
    #[error(
        "{path} would be trained, but more than one stage has it (the embedding is also the head, or layers share it); leave it out of lora_parameters.keys, or train on one node"
    )]
    Common { path: String },
    /// What a stage says is not of this model.
    #[error("the stages of the job do not have the same model")]
    Strange,
}

/// What could be trained of each stage's layers.
pub(crate) struct Held<'a> {
    spec: &'a ModelSpec,
    full: bool,
    modules: Vec<Module>,
    /// Of modules or of tensors.
    names: Vec<String>,
}

/// A stage's part.
#[derive(Debug)]
pub(crate) struct Share {
    /// What it trains.
    pub(crate) plan: Plan,
    /// Which entries of the whole plan (modules, or tensors) its own are.
    pub(crate) entries: Vec<usize>,
    /// The names of all entries.
    pub(crate) names: Vec<String>,
    /// For each array of the whole plan whose it is.
    pub(crate) owners: Vec<usize>,
    /// Has a stage before this one something that is trained?
    pub(crate) before: bool,
}

impl<'a> Held<'a> {
    pub(crate) fn new(spec: &'a ModelSpec, config: &TrainingConfig) -> Self {
        let modules = spec.modules(LayerRange::new(0, spec.layer_count()));
        let full = config.fine_tune_type == FineTuneType::Full;
        let names: BTreeSet<String> = match full {
            false => modules.iter().map(|module| module.path.clone()).collect(),
            true => {
                let tensors = modules.iter().filter_map(|module| module.tensors(None)).flatten();
                tensors.map(|tensor| tensor.name).collect()
            }
        };
        Self { spec, full, modules, names: names.into_iter().collect() }
    }

    /// What `tuning` has of it, as numbers; as many on each stage.
    pub(crate) fn bits(&self, tuning: &Tuning) -> Result<Vec<f64>, TuneError> {
        let own: BTreeSet<String> = match self.full {
            false => tuning.changeable()?,
            true => tuning.weights().map(str::to_owned).collect(),
        };
        let number = |names: &[String]| {
            let bits = names.iter().enumerate().filter(|(_, name)| own.contains(*name));
            bits.map(|(place, _)| 1_u64 << place).sum::<u64>() as f64
        };
        Ok(self.names.chunks(BITS).map(number).collect())
    }

    /// The part of stage `stage`, out of what [`Self::bits`] gave on all of them, which have these layers.
    pub(crate) fn share(
        &self,
        config: &TrainingConfig,
        bits: &[Vec<f64>],
        layers: &[LayerRange],
        stage: usize,
    ) -> Result<Share, ShareError> {
        let mut holders: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        let mut available = BTreeSet::new();
        for (index, bits) in bits.iter().enumerate() {
            for (names, word) in self.names.chunks(BITS).zip(bits) {
                if !(0.0..(1_u64 << BITS) as f64).contains(word) {
                    return Err(ShareError::Strange);
                }
                let word = *word as u64;
                let own = names.iter().enumerate().filter(|(place, _)| (word >> place) & 1 == 1);
                for (_, name) in own {
                    available.insert(name.clone());
                    if self.full {
                        holders.entry(name).or_default().push(index);
                    }
                }
            }
        }
        let of_stages: Vec<Vec<Module>> = layers.iter().map(|range| self.spec.modules(*range)).collect();
        if !self.full {
            for (index, modules) in of_stages.iter().enumerate() {
                for module in modules {
                    let name =
                        self.names.binary_search(&module.path).ok().and_then(|place| self.names.get(place));
                    if let Some(name) = name {
                        holders.entry(name).or_default().push(index);
                    }
                }
            }
        }
        let weights: Vec<&str> = available.iter().map(String::as_str).collect();
        let plan = chosen(self.spec, config, &self.modules, &available, &weights)?;
        let (names, arrays): (Vec<String>, usize) = match &plan {
            Plan::LowRank { modules, .. } => {
                let arrays = if modules.iter().any(|module| module.magnitudes) { 3 } else { 2 };
                (modules.iter().map(|module| module.path.clone()).collect(), arrays)
            }
            Plan::Weights(names) => (names.clone(), 1),
        };
        if names.is_empty() {
            return Err(ParameterError::from(TuneError::Nothing).into());
        }
        let mut owners = Vec::with_capacity(names.len());
        for name in &names {
            match holders.get(name.as_str()).map(Vec::as_slice) {
                Some([owner]) => owners.push(*owner),
                Some([_, _, ..]) => return Err(ShareError::Common { path: name.clone() }),
                _ => return Err(ShareError::Strange),
            }
        }
        let entries: Vec<usize> = (0..names.len()).filter(|entry| owners[*entry] == stage).collect();
        let plan = match plan {
            Plan::LowRank { modules, dropout } => {
                let own = entries.iter().filter_map(|entry| modules.get(*entry).cloned()).collect();
                Plan::LowRank { modules: own, dropout }
            }
            Plan::Weights(names) => {
                Plan::Weights(entries.iter().filter_map(|entry| names.get(*entry).cloned()).collect())
            }
        };
        let before = owners.iter().any(|owner| *owner < stage);
        let owners = owners.into_iter().flat_map(|owner| std::iter::repeat_n(owner, arrays)).collect();
        Ok(Share { plan, entries, names, owners, before })
    }
}
