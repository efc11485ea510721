//! A layer range as a function of what is trained, so that it can be differentiated.
//!
//! [`Tuning`] holds the tensors of a layer range. What of it is trained is a [`Plan`]: low-rank changes of some modules (LoRA, Hu et
//! al. 2021; DoRA, Liu et al. 2024) or tensors of the model itself. [`Tuner`] then is a pure function of the trained arrays and of a
//! batch. Whole sequences go through it, one behind the other along the token axis, without caches that outlive the call; rows of one
//! length share every operation.
//!
//! Low-rank changes sit in the same places where adapters sit when a model serves (`adapters`). Tensors of the model are put in by
//! making the modules anew from them while the function is traced, so that the loader's own rearrangements are differentiated too.

mod plan;
mod tuner;

pub use plan::{LowRank, Plan, Trained};
pub use tuner::{Backward, Tuner};

use crate::loader::{self, LoadError};
use mlxnode_checkpoint::{Checkpoint, ModelSpec, ShardModule, ShardTensors};
use mlxnode_compute::LayerRange;
use mlxnode_mlx::{Array, Device, Error};
use std::collections::{BTreeSet, HashMap};

/// What is to be trained cannot be.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// The model has no such module or tensor.
    #[error("the model has no {path}")]
    Unknown {
        /// What was named.
        path: String,
    },
    /// The module is computed in a way that leaves no place for a change.
    #[error("{path} is computed together with others and cannot be trained; leave it out")]
    Fixed {
        /// The module.
        path: String,
    },
    /// Only maps, experts and embeddings have low-rank changes.
    #[error("{path} is no linear map, no stack of experts and no embedding; leave it out")]
    NoMatrix {
        /// The module.
        path: String,
    },
    /// Magnitudes of something else than a linear map.
    #[error("{path} is no linear map: DoRA is for linear maps only; leave it out or train it by LoRA")]
    NoMagnitudes {
        /// The module.
        path: String,
    },
    /// A tensor that is packed or no numbers.
    #[error(
        "{name} is quantized and cannot be trained itself; take a model that is not quantized, or train it by LoRA"
    )]
    Packed {
        /// The tensor.
        name: String,
    },
    /// Layers hand more than hidden vectors on.
    #[error(
        "the layers of this model hand more on than hidden vectors, so they cannot be computed again one by one; train without gradient checkpointing"
    )]
    NoChain,
    /// Nothing is trained.
    #[error("nothing of the model would be trained")]
    Nothing,
    /// The tensors do not make a model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] Error),
}

/// The tensors of a layer range, in the device's memory, of which nothing is trained yet. Bound to the thread that loaded it.
pub struct Tuning {
    pub(crate) device: Device,
    pub(crate) spec: ModelSpec,
    pub(crate) shard: ShardTensors,
    pub(crate) tensors: HashMap<String, Array>,
    /// mlx-lm's names of modules and tensors, by ours.
    pub(crate) stored: HashMap<String, String>,
}

impl Tuning {
    /// Reads the tensors of `layers`. `progress` gets the bytes read so far and in all.
    ///
    /// # Errors
    ///
    /// As [`crate::Model::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        layers: LayerRange,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let device = Device::open()?;
        let spec = checkpoint.spec().clone();
        for cut in [layers.start, layers.end] {
            if cut < spec.layer_count() && !spec.can_split_before(cut) {
                return Err(LoadError::Cut { layers, cut });
            }
        }
        let shard = checkpoint.shard_tensors(layers)?;
        let tensors = loader::tensors(&device, &shard, progress)?;
        let names = shard.modules.iter().map(|shard| &shard.module.path).chain(tensors.keys());
        let stored = names.map(|name| (name.clone(), checkpoint.name_in_mlx_lm(name))).collect();
        Ok(Self { device, spec, shard, tensors, stored })
    }

    /// The modules of the layer range, and how each is packed.
    pub fn modules(&self) -> &[ShardModule] {
        &self.shard.modules
    }

    /// The device that holds the tensors.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many numbers the model has, packed or not.
    pub fn parameters(&self) -> u64 {
        let modules = self.shard.modules.iter().filter_map(|shard| shard.module.tensors(None));
        let tensors = modules.flatten();
        tensors.map(|tensor| tensor.shape.iter().map(|size| *size as u64).product::<u64>()).sum()
    }

    /// The whole model as data.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The names of its tensors that hold numbers as they are, which can be trained themselves.
    pub fn weights(&self) -> impl Iterator<Item = &str> {
        let names = self.tensors.iter().filter(|(name, array)| self.is_weight(name, array));
        names.map(|(name, _)| name.as_str())
    }

    /// The paths of the modules that have a place for low-rank changes.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn changeable(&self) -> Result<BTreeSet<String>, TuneError> {
        let (_, registry) = loader::assemble(&self.device, &self.spec, &self.shard, self.tensors.clone())?;
        let paths = self.shard.modules.iter().map(|shard| &shard.module.path);
        Ok(paths.filter(|path| registry.has(path)).cloned().collect())
    }

    /// Numbers as they are, and no scales or biases of packed ones.
    fn is_weight(&self, name: &str, array: &Array) -> bool {
        use mlxnode_mlx::Dtype::{BF16, F16, F32};
        let of_packed = |ending: &str| {
            let module = name.strip_suffix(ending);
            module.is_some_and(|path| self.shard.quantization_of(path).is_some())
        };
        matches!(array.dtype(), F32 | F16 | BF16)
            && ![".weight", ".scales", ".biases"].into_iter().any(of_packed)
            && !name.ends_with(&format!(".{}", mlxnode_checkpoint::layout::SIGNS))
    }

    /// The function of what `plan` trains.
    ///
    /// # Errors
    ///
    /// When the plan does not fit the layer range.
    pub fn tune(self, plan: Plan) -> Result<Tuner, TuneError> {
        let tuner = self.tune_part(plan)?;
        if tuner.trained().is_empty() { Err(TuneError::Nothing) } else { Ok(tuner) }
    }

    /// The same for a layer range of which nothing may be trained, because that of other ranges is.
    ///
    /// # Errors
    ///
    /// When the plan does not fit the layer range.
    pub fn tune_part(self, plan: Plan) -> Result<Tuner, TuneError> {
        Tuner::new(self, plan)
    }

    /// Which layers these are.
    pub fn layers(&self) -> LayerRange {
        self.shard.layers
    }
}
