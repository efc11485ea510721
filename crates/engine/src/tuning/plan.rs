//! What of a model is trained.

use super::{TuneError, Tuning};
use mlxnode_checkpoint::layout::ModuleKind;
use mlxnode_mlx::Dtype;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Changes of low rank; the model stays as it is.
    LowRank {
        /// The modules, in the order of their arrays.
        modules: Vec<LowRank>,
        /// The probability that a number that goes into a change is set to zero.
        dropout: f32,
    },
    /// Tensors of the model, by our names, in the order of their arrays.
    Weights(Vec<String>),
}

/// The change of one module: its weight `W` becomes `W + scale * (A B)^T`, in DoRA with rows brought to trained lengths.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// The module.
    pub path: String,
    /// The rank.
    pub rank: usize,
    /// Factor on the change.
    pub scale: f32,
    /// The lengths of the rows are trained too (DoRA).
    pub magnitudes: bool,
}

/// An array that is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Its name: the module's path and `lora_a`, `lora_b` or `m`; or the tensor's name.
    pub name: String,
    /// The same as mlx-lm has it, in an adapter's file.
    pub stored: String,
    /// Its dimensions: `A` `[inputs, rank]`, of experts `[experts, rank, inputs]`, of an embedding `[rows, rank]`; `B`
    /// `[rank, outputs]`, of experts `[experts, outputs, rank]`, of an embedding `[rank, width]`; `m` `[outputs]`.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: Dtype,
}

impl Plan {
    /// The arrays that are trained, in their order: of a module `A`, `B` and, with magnitudes, `m`.
    pub(super) fn arrays(&self, tuning: &Tuning) -> Result<Vec<Trained>, TuneError> {
        match self {
            Self::LowRank { modules, .. } => {
                let mut arrays = Vec::new();
                for module in modules {
                    arrays.extend(module.arrays(tuning)?);
                }
                Ok(arrays)
            }
            Self::Weights(names) => names.iter().map(|name| weight(tuning, name)).collect(),
        }
    }
}

impl LowRank {
    fn arrays(&self, tuning: &Tuning) -> Result<Vec<Trained>, TuneError> {
        let path = &self.path;
        let found = tuning.shard.modules.iter().find(|shard| shard.module.path == *path);
        let Some(found) = found else { return Err(TuneError::Unknown { path: path.clone() }) };
        let rank = self.rank;
        let (a, b, lengths) = match found.module.kind {
            ModuleKind::Linear { inputs, outputs, .. } => {
                (vec![inputs, rank], vec![rank, outputs], Some(outputs))
            }
            ModuleKind::Experts { experts, inputs, outputs, .. } => {
                (vec![experts, rank, inputs], vec![experts, outputs, rank], None)
            }
            ModuleKind::Embedding { rows, width } => (vec![rows, rank], vec![rank, width], None),
            _ => return Err(TuneError::NoMatrix { path: path.clone() }),
        };
        let within = tuning.stored.get(path).unwrap_or(path);
        let array = |ending: &str, shape| Trained {
            name: format!("{path}.{ending}"),
            stored: format!("{within}.{ending}"),
            shape,
            dtype: Dtype::F32,
        };
        let mut arrays = vec![array("lora_a", a), array("lora_b", b)];
        match (self.magnitudes, lengths) {
            (true, Some(outputs)) => arrays.push(array("m", vec![outputs])),
            (true, None) => return Err(TuneError::NoMagnitudes { path: path.clone() }),
            (false, _) => {}
        }
        Ok(arrays)
    }
}

fn weight(tuning: &Tuning, name: &str) -> Result<Trained, TuneError> {
    let Some(array) = tuning.tensors.get(name) else {
        return Err(TuneError::Unknown { path: name.to_owned() });
    };
    if !tuning.is_weight(name, array) {
        return Err(TuneError::Packed { name: name.to_owned() });
    }
    let shape = array.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
    let stored = tuning.stored.get(name).cloned().unwrap_or_else(|| name.to_owned());
    Ok(Trained { name: name.to_owned(), stored, shape, dtype: array.dtype() })
}
