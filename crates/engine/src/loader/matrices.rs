//! Linear maps, alone and stacked, and the embedding.

use super::{LoadError, Source, arrays, layout, size};
use crate::adapters::{Active, Part, Slot, Target};
use crate::linear::{Embedding, Linear, Stacked, Table, Weight};
use crate::turn::Turn;
use mlxnode_checkpoint::Tensor;
use mlxnode_mlx::{Array, Device, Dtype, Error, Quantized};
use std::rc::Rc;

/// On the CPU backend one token times a dense matrix is a general matrix product. OpenBLAS has a direct kernel for up to 10^6
/// multiplications; beyond it copies the whole matrix first, which took 8% of all CPU time at 400 M parameters. So matrices are
/// stacked only up to 10^6 single-precision elements; below that it saves half the host's work. Packed matrices have no such limit.
const LARGEST_DENSE_STACK_ON_CPU: u64 = 4_000_000;

/// A matrix as it is stored.
pub(super) enum Matrix {
    Dense(Array),
    Quantized(Quantized),
    /// Packed for inputs that are turned.
    Turned(Quantized, Rc<Turn>),
}

impl Matrix {
    /// Some of its rows, or all in another order: what `rows` makes of each array that has them.
    fn with_rows<E>(&self, rows: impl Fn(&Array) -> Result<Array, E>) -> Result<Self, E> {
        let packed = |matrix: &Quantized| {
            Ok::<_, E>(Quantized {
                weight: rows(&matrix.weight)?,
                scales: rows(&matrix.scales)?,
                biases: matrix.biases.as_ref().map(&rows).transpose()?,
                layout: matrix.layout,
            })
        };
        Ok(match self {
            Self::Dense(matrix) => Self::Dense(rows(matrix)?),
            Self::Quantized(matrix) => Self::Quantized(packed(matrix)?),
            Self::Turned(matrix, turn) => Self::Turned(packed(matrix)?, Rc::clone(turn)),
        })
    }

    /// How many outputs it has.
    fn outputs(&self) -> i32 {
        match self {
            Self::Dense(matrix) => matrix.dim(0),
            Self::Quantized(matrix) | Self::Turned(matrix, _) => matrix.weight.dim(0),
        }
    }
}

/// A linear map as it is stored.
pub(super) struct Stored {
    pub(super) matrix: Matrix,
    pub(super) bias: Option<Array>,
    /// The module, and which of its outputs these are; None: all.
    path: String,
    order: Option<Vec<u32>>,
}

impl Stored {
    /// The same map with its outputs in another order: output `i` is what was output `order[i]`.
    pub(super) fn reordered(self, device: &Device, order: &[i32]) -> Result<Self, Error> {
        let numbers: Vec<u32> = order.iter().map(|row| row.unsigned_abs()).collect();
        let order = Array::from_u32(&numbers, &[size(numbers.len())])?;
        let rows = |array: &Array| device.take(array, &order, 0);
        let matrix = self.matrix.with_rows(rows)?;
        let bias = self.bias.as_ref().map(rows).transpose()?;
        Ok(Self { matrix, bias, path: self.path, order: Some(numbers) })
    }

    /// The maps with the outputs up to `first` and after it.
    pub(super) fn split(self, device: &Device, first: i32) -> Result<[Self; 2], Error> {
        let part = |after: bool| {
            let rows = |array: &Array| {
                let (start, stop) = if after { (first, array.dim(0)) } else { (0, first) };
                device.slice_axis(array, 0, start, stop, 1)
            };
            let matrix = self.matrix.with_rows(rows)?;
            let all: Vec<u32> = match &self.order {
                Some(order) => order.clone(),
                None => (0..self.matrix.outputs().unsigned_abs()).collect(),
            };
            let (before, behind) = all.split_at((first.max(0) as usize).min(all.len()));
            let order = Some(if after { behind } else { before }.to_vec());
            let bias = self.bias.as_ref().map(rows).transpose()?;
            Ok::<_, Error>(Self { matrix, bias, path: self.path.clone(), order })
        };
        Ok([part(false)?, part(true)?])
    }
}

/// All of a module's outputs.
fn whole(path: &str, outputs: i32) -> Part {
    Part { path: path.to_owned(), start: 0, count: outputs, rows: None }
}

/// Parts of one map, each behind the one before.
fn one_after_the_other(mut parts: Vec<Part>) -> Vec<Part> {
    let mut start = 0;
    for part in &mut parts {
        part.start = start;
        start += part.count;
    }
    parts
}

impl Source<'_> {
    /// Which tokens go with which adapter, for the maps that are being made.
    pub(super) fn active(&self) -> Rc<Active> {
        Rc::clone(&self.registry.borrow().active)
    }

    pub(super) fn matrix(&mut self, path: &str) -> Result<Matrix, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        let Some(setting) = self.shard.quantization_of(path) else { return Ok(Matrix::Dense(weight)) };
        let scales = self.tensor(&format!("{path}.scales"))?;
        let biases = self.optional(&format!("{path}.biases"))?;
        let packed = Quantized { weight, scales, biases, layout: layout(setting) };
        Ok(match self.turn(path)? {
            Some(turn) => Matrix::Turned(packed, turn),
            None => Matrix::Quantized(packed),
        })
    }

    /// A table of vectors, read.
    pub(super) fn embedding(&mut self, path: &str) -> Result<Embedding, LoadError> {
        let table = match self.matrix(path)? {
            Matrix::Dense(matrix) => Table::Dense(matrix),
            Matrix::Quantized(matrix) => Table::Quantized(matrix),
            Matrix::Turned(matrix, turn) => Table::Turned(matrix, turn),
        };
        match &table {
            Table::Dense(matrix) => self.queue([matrix]),
            Table::Quantized(matrix) | Table::Turned(matrix, _) => self.queue(arrays(matrix)),
        }
        let changes = Slot::new(self.active());
        let target = Target::Embedding { slot: changes.clone(), path: path.to_owned() };
        self.registry.borrow_mut().push(target);
        Ok(Embedding { table, changes })
    }

    /// A linear map, read.
    pub(super) fn linear(&mut self, path: &str) -> Result<Linear, LoadError> {
        let bias = self.optional(&format!("{path}.bias"))?;
        let matrix = self.matrix(path)?;
        self.queue(bias.iter());
        let parts = vec![whole(path, matrix.outputs())];
        self.linear_of(matrix, bias, parts)
    }

    /// `parts` are the modules whose outputs it has.
    fn linear_of(&self, matrix: Matrix, bias: Option<Array>, parts: Vec<Part>) -> Result<Linear, LoadError> {
        let outputs = matrix.outputs();
        let weight = match matrix {
            Matrix::Dense(matrix) => {
                self.queue([&matrix]);
                let weight = Weight::dense(self.device, &matrix)?;
                if let Weight::Dense(matrix) = &weight {
                    self.queue([matrix.view()]);
                }
                weight
            }
            Matrix::Turned(matrix, turn) => {
                self.queue(arrays(&matrix));
                Weight::Turned(matrix, turn)
            }
            Matrix::Quantized(matrix) => {
                self.queue(arrays(&matrix));
                // A model whose own type counts the scales' is single precision itself.
                match matrix.scales.dtype() == Dtype::F32 && self.dtype != Dtype::F32 {
                    true => Weight::Rounded(matrix),
                    false => Weight::Quantized(matrix),
                }
            }
        };
        let changes = Slot::new(self.active());
        self.registry.borrow_mut().push(Target::Linear {
            slot: changes.clone(),
            weight: weight.clone(),
            bias: bias.clone(),
            outputs,
            parts,
        });
        Ok(Linear { weight, bias, changes })
    }

    /// A map as it is stored, not read yet.
    pub(super) fn stored(&mut self, path: &str) -> Result<Stored, LoadError> {
        let bias = self.optional(&format!("{path}.bias"))?;
        Ok(Stored { matrix: self.matrix(path)?, bias, path: path.to_owned(), order: None })
    }

    /// Maps of the same input with these numbers of outputs, stacked when they are of one kind.
    pub(super) fn stacked(&mut self, parts: &[(String, i32)]) -> Result<Stacked, LoadError> {
        let mut turns = Vec::with_capacity(parts.len());
        for (path, _) in parts {
            turns.push(self.turn(path)?);
        }
        let same_turn = turns.windows(2).all(|pair| match (&pair[0], &pair[1]) {
            (Some(one), Some(other)) => Rc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        });
        if self.given.is_some() || !same_turn || !self.stack_pays(parts) {
            let linears = parts.iter().map(|(path, _)| self.linear(path)).collect::<Result<_, _>>()?;
            return Ok(Stacked { whole: None, parts: linears });
        }
        let path = parts.first().map_or("", |(path, _)| path);
        let bias = self.joined(parts, "bias")?;
        let matrix = match (self.joined(parts, "weight")?, self.shard.quantization_of(path)) {
            (Some(weight), None) => Matrix::Dense(weight),
            (Some(weight), Some(setting)) => {
                let packed = Quantized {
                    weight,
                    scales: self
                        .joined(parts, "scales")?
                        .ok_or_else(|| self.missing(&format!("{path}.scales")))?,
                    biases: self.joined(parts, "biases")?,
                    layout: layout(setting),
                };
                match turns.into_iter().flatten().next() {
                    Some(turn) => Matrix::Turned(packed, turn),
                    None => Matrix::Quantized(packed),
                }
            }
            (None, _) => return Err(self.missing(&format!("{path}.weight"))),
        };
        // Only the stacked matrix and views of it live.
        let parts: Vec<_> = parts.iter().map(|(path, outputs)| whole(path, *outputs)).collect();
        let views = self.views(&parts, &matrix, bias.as_ref())?;
        let stacked = self.linear_of(matrix, bias, one_after_the_other(parts))?;
        Ok(Stacked { whole: Some(stacked), parts: views })
    }

    /// Are the maps of one kind, and does it pay to stack them?
    fn stack_pays(&self, parts: &[(String, i32)]) -> bool {
        let same = |suffix: &str| {
            let tensors = parts.iter().map(|(path, _)| self.shard.tensors.get(&format!("{path}.{suffix}")));
            let kinds: Vec<_> = tensors
                .map(|tensor| {
                    tensor.map(|tensor| (tensor.dtype(), tensor.shape().get(1..).map(<[_]>::to_vec)))
                })
                .collect();
            kinds.windows(2).all(|pair| pair[0] == pair[1])
        };
        let settings: Vec<_> = parts.iter().map(|(path, _)| self.shard.quantization_of(path)).collect();
        let alike = settings.windows(2).all(|pair| pair[0] == pair[1])
            && ["weight", "scales", "biases", "bias"].into_iter().all(same);
        let weights = parts.iter().filter_map(|(path, _)| self.shard.tensors.get(&format!("{path}.weight")));
        let bytes: u64 = weights.map(Tensor::byte_count).sum();
        let is_packed = settings.first().is_some_and(Option::is_some);
        alike && (is_packed || self.device.is_gpu() || bytes <= LARGEST_DENSE_STACK_ON_CPU)
    }

    /// A map at hand, whose outputs were put into another order.
    pub(super) fn reordered_linear(&self, stored: Stored) -> Result<Linear, LoadError> {
        let Stored { matrix, bias, path, order } = stored;
        self.queue(bias.iter());
        let part = Part { path, start: 0, count: matrix.outputs(), rows: order };
        self.linear_of(matrix, bias, vec![part])
    }

    /// The same of maps at hand, whose outputs were put into another order: stacked by a copy.
    pub(super) fn stacked_of(&self, stored: Vec<(Stored, i32)>) -> Result<Stacked, LoadError> {
        let part = |(stored, outputs): &(Stored, i32)| Part {
            path: stored.path.clone(),
            start: 0,
            count: *outputs,
            rows: stored.order.clone(),
        };
        let parts: Vec<Part> = stored.iter().map(part).collect();
        let maps: Vec<Stored> = stored.into_iter().map(|(stored, _)| stored).collect();
        let stacked = if self.given.is_some() { None } else { self.stack(&maps)? };
        let Some((matrix, bias)) = stacked else {
            let mut linears = Vec::with_capacity(maps.len());
            for (Stored { matrix, bias, .. }, part) in maps.into_iter().zip(parts) {
                self.queue(bias.iter());
                linears.push(self.linear_of(matrix, bias, vec![part])?);
            }
            return Ok(Stacked { whole: None, parts: linears });
        };
        let views = self.views(&parts, &matrix, bias.as_ref())?;
        let stacked = self.linear_of(matrix, bias, one_after_the_other(parts))?;
        Ok(Stacked { whole: Some(stacked), parts: views })
    }

    /// The maps one under the other; None when they differ in kind, or when it does not pay.
    fn stack(&self, maps: &[Stored]) -> Result<Option<(Matrix, Option<Array>)>, LoadError> {
        let device = self.device;
        let join = |arrays: &[&Array]| device.concatenate(arrays.iter().copied(), 0);
        let biases: Vec<&Array> = maps.iter().filter_map(|map| map.bias.as_ref()).collect();
        let bias = match biases.len() {
            0 => None,
            count if count == maps.len() => Some(join(&biases)?),
            _ => return Ok(None),
        };
        let (mut dense, mut packed, mut turns) = (Vec::new(), Vec::new(), Vec::new());
        for map in maps {
            match &map.matrix {
                Matrix::Dense(matrix) => dense.push(matrix),
                Matrix::Quantized(matrix) => packed.push(matrix),
                Matrix::Turned(matrix, turn) => {
                    packed.push(matrix);
                    turns.push(turn);
                }
            }
        }
        let same_turn = turns.is_empty()
            || (turns.len() == maps.len() && turns.windows(2).all(|pair| Rc::ptr_eq(pair[0], pair[1])));
        let same_type = dense.windows(2).all(|pair| pair[0].dtype() == pair[1].dtype());
        let bytes: usize = dense.iter().map(|matrix| matrix.byte_size()).sum();
        let pays = device.is_gpu() || bytes as u64 <= LARGEST_DENSE_STACK_ON_CPU;
        let alike = |pair: &[&Quantized]| {
            pair[0].layout == pair[1].layout && pair[0].scales.dtype() == pair[1].scales.dtype()
        };
        let matrix = if dense.len() == maps.len() && same_type && pays {
            Matrix::Dense(join(&dense)?)
        } else if packed.len() == maps.len() && packed.windows(2).all(alike) && same_turn {
            let packed = device.stack_rows(&packed)?;
            match turns.first() {
                Some(turn) => Matrix::Turned(packed, Rc::clone(turn)),
                None => Matrix::Quantized(packed),
            }
        } else {
            return Ok(None);
        };
        match &matrix {
            Matrix::Dense(matrix) => self.queue([matrix].into_iter().chain(&bias)),
            Matrix::Quantized(matrix) | Matrix::Turned(matrix, _) => {
                self.queue(arrays(matrix).chain(&bias));
            }
        }
        Ok(Some((matrix, bias)))
    }

    /// Maps with these numbers of outputs that are stored as one matrix.
    pub(super) fn fused(&mut self, path: &str, outputs: &[i32]) -> Result<Stacked, LoadError> {
        let bias = self.optional(&format!("{path}.bias"))?;
        let matrix = self.matrix(path)?;
        self.queue(bias.iter());
        let pays = match &matrix {
            Matrix::Dense(matrix) => {
                self.queue([matrix]);
                self.device.is_gpu() || matrix.byte_size() as u64 <= LARGEST_DENSE_STACK_ON_CPU
            }
            Matrix::Quantized(matrix) | Matrix::Turned(matrix, _) => {
                self.queue(arrays(matrix));
                true
            }
        };
        let mut first = 0;
        let part = |count: &i32| {
            let rows = first..first + count;
            first += count;
            let rows = Some(rows.map(i32::unsigned_abs).collect());
            Part { path: path.to_owned(), start: 0, count: *count, rows }
        };
        let parts: Vec<Part> = outputs.iter().map(part).collect();
        let views = self.views(&parts, &matrix, bias.as_ref())?;
        let all = vec![whole(path, matrix.outputs())];
        let stacked =
            if pays && self.given.is_none() { Some(self.linear_of(matrix, bias, all)?) } else { None };
        Ok(Stacked { whole: stacked, parts: views })
    }

    /// The maps whose rows lie one under the other in `matrix`.
    pub(super) fn views(
        &self,
        parts: &[Part],
        matrix: &Matrix,
        bias: Option<&Array>,
    ) -> Result<Vec<Linear>, LoadError> {
        let mut views = Vec::new();
        let mut start = 0;
        for part in parts {
            let (matrix, bias) = self.rows(matrix, bias, start, start + part.count)?;
            self.queue(bias.iter());
            let part = Part { path: part.path.clone(), rows: part.rows.clone(), ..*part };
            start += part.count;
            views.push(self.linear_of(matrix, bias, vec![part])?);
        }
        Ok(views)
    }

    /// Views of the rows `start..stop`.
    pub(super) fn rows(
        &self,
        matrix: &Matrix,
        bias: Option<&Array>,
        start: i32,
        stop: i32,
    ) -> Result<(Matrix, Option<Array>), LoadError> {
        let cut = |array: &Array| self.device.slice(array, &[start, 0], &[stop, array.dim(1)]);
        let matrix = matrix.with_rows(cut)?;
        let bias = bias.map(|bias| self.device.slice(bias, &[start], &[stop])).transpose()?;
        Ok((matrix, bias))
    }
}
