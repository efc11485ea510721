//! Where a model's modules lie in its maps, and the adapters that are loaded.
//!
//! A module is not always a map of its own: queries, keys and values may be one stacked matrix (and views of it), outputs may be in
//! another order, the embedding may be the head as well. The loader notes for each module where its outputs are; an adapter's
//! changes are put together for each map from that.

use super::{Active, AdapterId, Change, Dropout, EmbeddingChange, EmbeddingSlot, ExpertSlot, Slot, Trained};
use crate::linear::Weight;
use mlxnode_checkpoint::{Adapter, Change as StoredChange, StoredMatrix};
use mlxnode_mlx::{Array, Device, Dtype, Error, TensorFile};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Why an adapter could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterLoadError {
    /// The module exists, but is computed in a way that leaves no place for a change.
    #[error(
        "the adapter changes {path}, which cannot be changed while the model runs; fuse the adapter into the model"
    )]
    Fixed {
        /// The module.
        path: String,
    },
    /// One of that name is there.
    #[error("an adapter named {name:?} is loaded already")]
    Taken {
        /// The name.
        name: String,
    },
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] Error),
}

/// A sequence asks for an adapter that is not loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the adapter {name:?} is not loaded; {loaded}")]
pub struct UnknownAdapter {
    /// What was asked for.
    pub name: String,
    /// A sentence on what there is.
    pub loaded: String,
}

/// Outputs of one module in a linear map.
pub(crate) struct Part {
    /// The module.
    pub(crate) path: String,
    /// Where its outputs begin in the map.
    pub(crate) start: i32,
    /// How many they are.
    pub(crate) count: i32,
    /// Which of the module's outputs these are, in order; None: all.
    pub(crate) rows: Option<Vec<u32>>,
}

/// A map with places for changes.
pub(crate) enum Target {
    /// A linear map and the modules in it.
    Linear { slot: Slot<Change>, weight: Weight, bias: Option<Array>, outputs: i32, parts: Vec<Part> },
    /// The embedding's table.
    Embedding { slot: EmbeddingSlot, path: String },
    /// The embedding's table as the head.
    TiedHead { slot: Slot<Change>, path: String },
    /// A matrix for each expert.
    Experts { slot: ExpertSlot, path: String },
}

/// All of it for one layer range.
#[derive(Default)]
pub(crate) struct Registry {
    pub(crate) active: Rc<Active>,
    targets: Vec<Target>,
    loaded: BTreeMap<String, AdapterId>,
    /// What sequences use that ask for none.
    default: Option<AdapterId>,
    next: u32,
}

/// The matrices of one module's change, read; the scale is in `b`.
pub(crate) struct Matrices {
    pub(crate) a: Array,
    pub(crate) b: Array,
    pub(crate) magnitudes: Option<Array>,
    pub(crate) dropout: Option<Dropout>,
}

/// The id of the one change that is being trained, in a model that has no others.
const TRAINED: AdapterId = AdapterId(u32::MAX);

impl Registry {
    pub(crate) fn push(&mut self, target: Target) {
        self.targets.push(target);
    }

    /// What sequences use from now on that ask for none.
    pub(crate) fn set_default(&mut self, name: Option<&str>) -> Result<(), UnknownAdapter> {
        self.default = None;
        self.default = self.named(name)?;
        Ok(())
    }

    /// Everything that is computed from now on goes with the default.
    pub(crate) fn enter_default(&self) {
        self.active.set_all(self.default);
    }

    /// The adapter of this name; without a name the default, if there is one.
    pub(crate) fn named(&self, name: Option<&str>) -> Result<Option<AdapterId>, UnknownAdapter> {
        let Some(name) = name else { return Ok(self.default) };
        let found = self.loaded.get(name).copied();
        found.map(Some).ok_or_else(|| UnknownAdapter {
            name: name.to_owned(),
            loaded: match self.loaded.is_empty() {
                true => "none is".to_owned(),
                false => format!("loaded: {}", self.names().collect::<Vec<_>>().join(", ")),
            },
        })
    }

    /// The names of the loaded adapters.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.loaded.keys().map(String::as_str)
    }

    /// Reads an adapter's changes of these modules and gives every map its share.
    pub(crate) fn add(
        &mut self,
        device: &Device,
        name: &str,
        adapter: &Adapter,
        changes: &BTreeMap<&str, &StoredChange>,
    ) -> Result<(), AdapterLoadError> {
        if self.loaded.contains_key(name) {
            return Err(AdapterLoadError::Taken { name: name.to_owned() });
        }
        for path in changes.keys() {
            if !self.has(path) {
                return Err(AdapterLoadError::Fixed { path: (*path).to_owned() });
            }
        }
        let mut file = TensorFile::open(device, &adapter.file)?;
        let mut read = BTreeMap::new();
        for (path, change) in changes {
            read.insert(*path, Matrices::read(device, &mut file, change, adapter.scale)?);
        }
        let id = AdapterId(self.next);
        self.next += 1;
        let given = self.targets.iter().try_for_each(|target| target.give(device, id, &read));
        if let Err(error) = given {
            self.take_out(device, id)?;
            return Err(error.into());
        }
        self.loaded.insert(name.to_owned(), id);
        Ok(())
    }

    /// Is there a place for changes of this module?
    pub(crate) fn has(&self, path: &str) -> bool {
        self.targets.iter().any(|target| target.has(path))
    }

    /// Has everything that is computed from now on go with these changes, in a model without adapters: their arrays may be traced.
    pub(crate) fn train(&self, device: &Device, changes: &BTreeMap<&str, Matrices>) -> Result<(), Error> {
        self.active.set_all(Some(TRAINED));
        self.targets.iter().try_for_each(|target| target.give(device, TRAINED, changes))
    }

    /// Ends [`Self::train`] for these modules. With none left, nothing is changed any more.
    pub(crate) fn end_training<'p>(&self, modules: impl Iterator<Item = &'p str> + Clone) {
        for target in &self.targets {
            if !modules.clone().any(|path| target.has(path)) {
                continue;
            }
            match target {
                Target::Linear { slot, .. } | Target::TiedHead { slot, .. } => slot.remove(TRAINED),
                Target::Embedding { slot, .. } => slot.remove(TRAINED),
                Target::Experts { slot, .. } => slot.train(None),
            }
        }
    }

    /// The lengths of the rows of a module's matrix, `[outputs]` in single precision; None where the module is no map of its own.
    pub(crate) fn row_lengths(&self, device: &Device, path: &str) -> Result<Option<Array>, Error> {
        let mut pieces = Vec::new();
        for target in &self.targets {
            let Target::Linear { weight, parts, outputs, .. } = target else { continue };
            let [part] = parts.as_slice() else { continue };
            if part.path == path && part.count == *outputs {
                let matrix = device.cast(&numbers(device, weight)?, Dtype::F32)?;
                let squares = device.sum(&device.square(&matrix)?, 0, false)?;
                pieces.push((part.rows.clone(), device.sqrt(&squares)?));
            }
        }
        if let [(None, lengths)] = pieces.as_slice() {
            return Ok(Some(lengths.clone()));
        }
        let (mut order, mut lengths) = (Vec::new(), Vec::new());
        for (rows, piece) in &pieces {
            let Some(rows) = rows else { return Ok(None) };
            order.extend(rows.iter().copied());
            lengths.push(piece.clone());
        }
        if lengths.is_empty() {
            return Ok(None);
        }
        let order = Array::from_u32(&order, &[order.len() as i32])?;
        let lengths = device.concatenate(&lengths, 0)?;
        device.take(&lengths, &device.argsort(&order, 0)?, 0).map(Some)
    }

    /// Takes an adapter's changes out of all maps. One that is not there is fine.
    pub(crate) fn remove(&mut self, device: &Device, name: &str) -> Result<(), Error> {
        match self.retire(name) {
            Some(id) => self.take_out(device, id),
            None => Ok(()),
        }
    }

    /// Nobody gets an adapter any more by its name; its changes stay for those that have it, until they are taken out.
    pub(crate) fn retire(&mut self, name: &str) -> Option<AdapterId> {
        let id = self.loaded.remove(name)?;
        self.default = self.default.filter(|default| *default != id);
        Some(id)
    }

    /// Takes the changes of a retired adapter out of all maps.
    pub(crate) fn take_out(&self, device: &Device, id: AdapterId) -> Result<(), Error> {
        self.targets.iter().try_for_each(|target| {
            match target {
                Target::Linear { slot, .. } | Target::TiedHead { slot, .. } => slot.remove(id),
                Target::Embedding { slot, .. } => slot.remove(id),
                Target::Experts { slot, .. } => slot.remove(device, id)?,
            }
            Ok(())
        })
    }
}

impl Matrices {
    fn read(
        device: &Device,
        file: &mut TensorFile,
        change: &StoredChange,
        scale: f32,
    ) -> Result<Self, Error> {
        let mut matrix = |stored: &StoredMatrix| {
            let matrix = file.take(&stored.name)?;
            if stored.is_turned { device.transpose(&matrix, &[1, 0]) } else { Ok(matrix) }
        };
        let (a, b) = (matrix(&change.a)?, matrix(&change.b)?);
        let b = device.multiply(&b, &Array::scalar(scale, b.dtype())?)?;
        let (a, b) = (device.contiguous(&a)?, device.contiguous(&b)?);
        let magnitudes = change.magnitudes.as_deref().map(|name| file.take(name)).transpose()?;
        device.eval([&a, &b].into_iter().chain(&magnitudes))?;
        Ok(Self { a, b, magnitudes, dropout: None })
    }
}

impl Target {
    fn has(&self, path: &str) -> bool {
        match self {
            Self::Linear { parts, .. } => parts.iter().any(|part| part.path == path),
            Self::Embedding { path: own, .. }
            | Self::TiedHead { path: own, .. }
            | Self::Experts { path: own, .. } => own == path,
        }
    }

    /// Puts the share of an adapter into the slot.
    fn give(&self, device: &Device, id: AdapterId, read: &BTreeMap<&str, Matrices>) -> Result<(), Error> {
        match self {
            Self::Linear { slot, weight, bias, outputs, parts } => {
                let found: Vec<_> =
                    parts.iter().filter_map(|part| Some((part, read.get(part.path.as_str())?))).collect();
                if !found.is_empty() {
                    slot.insert(id, joined(device, &found, weight, bias.as_ref(), *outputs)?);
                }
            }
            Self::Embedding { slot, path } => {
                if let Some(Matrices { a, b, dropout, .. }) = read.get(path.as_str()) {
                    slot.insert(id, EmbeddingChange { a: a.clone(), b: b.clone(), dropout: dropout.clone() });
                }
            }
            Self::TiedHead { slot, path } => {
                if let Some(Matrices { a, b, dropout, .. }) = read.get(path.as_str()) {
                    let (a, b) = (device.transpose(b, &[1, 0])?, device.transpose(a, &[1, 0])?);
                    slot.insert(id, Change { a, b, factor: None, bias: None, dropout: dropout.clone() });
                }
            }
            Self::Experts { slot, path } => {
                if let Some(Matrices { a, b, dropout, .. }) = read.get(path.as_str()) {
                    let (a, b) = (device.transpose(a, &[0, 2, 1])?, device.transpose(b, &[0, 2, 1])?);
                    match id == TRAINED {
                        true => slot.train(Some(Trained { a, b, dropout: dropout.clone() })),
                        false => slot.insert(device, id, a, b)?,
                    }
                }
            }
        }
        Ok(())
    }
}

/// The changes of several modules as one of the map that they lie in: their `a` side by side, their `b` on a diagonal.
fn joined(
    device: &Device,
    found: &[(&Part, &Matrices)],
    weight: &Weight,
    bias: Option<&Array>,
    outputs: i32,
) -> Result<Change, Error> {
    let dropout = found.iter().find_map(|(_, matrices)| matrices.dropout.clone());
    if let [(Part { start: 0, rows: None, count, .. }, Matrices { a, b, magnitudes: None, .. })] = found
        && *count == outputs
    {
        return Ok(Change { a: a.clone(), b: b.clone(), factor: None, bias: None, dropout });
    }
    let (mut all_a, mut all_b, mut factors) = (Vec::new(), Vec::new(), Vec::new());
    let is_scaled = found.iter().any(|(_, matrices)| matrices.magnitudes.is_some());
    let mut end = 0;
    for (part, matrices) in found {
        let columns = |array: &Array, axis: i32| match &part.rows {
            None => Ok(array.clone()),
            Some(rows) => device.take(array, &Array::from_u32(rows, &[rows.len() as i32])?, axis),
        };
        let b = columns(&matrices.b, 1)?;
        let zeros = |columns: i32| device.zeros(&[b.dim(0), columns], b.dtype());
        let (before, behind) = (part.start, outputs - part.start - part.count);
        let mut row = Vec::with_capacity(3);
        if before > 0 {
            row.push(zeros(before)?);
        }
        row.push(b.clone());
        if behind > 0 {
            row.push(zeros(behind)?);
        }
        all_b.push(device.concatenate(&row, 1)?);
        all_a.push(matrices.a.clone());
        if is_scaled {
            if part.start > end {
                factors.push(ones(device, part.start - end)?);
            }
            factors.push(match &matrices.magnitudes {
                None => ones(device, part.count)?,
                Some(magnitudes) => {
                    // Their gradient is left out, as in mlx-lm (and in section 4.3 of the paper).
                    let lengths = device.stop_gradient(&lengths(device, weight, part, &matrices.a, &b)?)?;
                    device.divide(&device.cast(&columns(magnitudes, 0)?, Dtype::F32)?, &lengths)?
                }
            });
            end = part.start + part.count;
        }
    }
    if is_scaled && end < outputs {
        factors.push(ones(device, outputs - end)?);
    }
    let factor = if is_scaled { Some(device.concatenate(&factors, 0)?) } else { None };
    let (a, b) = (device.concatenate(&all_a, 1)?, device.concatenate(&all_b, 0)?);
    let bias = bias.filter(|_| is_scaled).cloned();
    if !device.is_tracing() {
        device.eval([&a, &b].into_iter().chain(&factor))?;
    }
    Ok(Change { a, b, factor, bias, dropout })
}

fn ones(device: &Device, count: i32) -> Result<Array, Error> {
    device.add(&device.zeros(&[count], Dtype::F32)?, &Array::scalar(1.0, Dtype::F32)?)
}

/// Lengths of the rows of the changed matrix, `[count]`.
fn lengths(device: &Device, weight: &Weight, part: &Part, a: &Array, b: &Array) -> Result<Array, Error> {
    let matrix = numbers(device, weight)?;
    let own = device.slice_axis(&matrix, 1, part.start, part.start + part.count, 1)?;
    let changed = device.add(&device.cast(&own, Dtype::F32)?, &device.matmul(a, b)?)?;
    device.sqrt(&device.sum(&device.multiply(&changed, &changed)?, 0, false)?)
}

/// A map's matrix as numbers, `[inputs, outputs]`.
fn numbers(device: &Device, weight: &Weight) -> Result<Array, Error> {
    Ok(match weight {
        Weight::Dense(matrix) => matrix.view().clone(),
        // A turn back would change no length of a row, but it would the sum with what an adapter adds.
        Weight::Turned(packed, turn) => {
            device.transpose(&turn.back(device, &device.dequantize(packed)?)?, &[1, 0])?
        }
        Weight::Quantized(packed) | Weight::Rounded(packed) => {
            device.transpose(&device.dequantize(packed)?, &[1, 0])?
        }
    })
}
