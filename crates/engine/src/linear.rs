//! Linear maps and embeddings, dense or packed.

use crate::adapters::{Change, EmbeddingSlot, Slot};
use crate::products::{DenseMatrix, packed_product};
use crate::turn::Turn;
use mlxnode_mlx::{Array, Device, Dtype, Quantized, Result};
use std::rc::Rc;

/// `x @ weight.T + bias`.
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    /// `[outputs]`.
    pub(crate) bias: Option<Array>,
    /// What adapters add.
    pub(crate) changes: Slot<Change>,
}

/// A matrix `[outputs, inputs]`.
#[derive(Clone)]
pub(crate) enum Weight {
    /// As numbers.
    Dense(DenseMatrix),
    /// Packed.
    Quantized(Quantized),
    /// Packed with scales in single precision, in a model of another type: sums are single precision too, and rounded at the end.
    Rounded(Quantized),
    /// Packed for inputs that are turned.
    Turned(Quantized, Rc<Turn>),
}

impl Weight {
    /// From a matrix `[outputs, inputs]` as it is stored.
    pub(crate) fn dense(device: &Device, matrix: &Array) -> Result<Self> {
        Ok(Self::Dense(DenseMatrix::new(device, matrix)?))
    }
}

impl Linear {
    /// `[.., inputs]` to `[.., outputs]`.
    #[inline]
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let y = self.unchanged(device, x)?;
        if self.changes.is_idle() { Ok(y) } else { self.changes.apply(device, x, y) }
    }

    /// Without what adapters add.
    fn unchanged(&self, device: &Device, x: &Array) -> Result<Array> {
        match (&self.weight, &self.bias) {
            (Weight::Dense(matrix), bias) => matrix.product(device, x, bias.as_ref()),
            (Weight::Quantized(matrix), None) => packed_product(device, x, matrix),
            (Weight::Quantized(matrix), Some(bias)) => device.add(&packed_product(device, x, matrix)?, bias),
            (Weight::Turned(matrix, turn), bias) => {
                let product = packed_product(device, &turn.forward(device, x)?, matrix)?;
                match bias {
                    Some(bias) => device.add(&product, bias),
                    None => Ok(product),
                }
            }
            (Weight::Rounded(matrix), bias) => {
                let product = device.cast(&device.quantized_matmul(x, matrix)?, x.dtype())?;
                match bias {
                    Some(bias) => device.add(&product, bias),
                    None => Ok(product),
                }
            }
        }
    }
}

/// Several linear maps of the same input. Decoding a token is one product with the matrices stacked, which halves the host's work;
/// a prompt goes through the parts, whose results need no slicing. The parts are views: the weights exist once.
pub(crate) struct Stacked {
    /// All outputs one after the other; None when the parts are packed differently or differ in type.
    pub(crate) whole: Option<Linear>,
    /// Views of the rows of `whole`, or matrices of their own.
    pub(crate) parts: Vec<Linear>,
}

/// A matrix for each head, all in one product.
pub(crate) enum OfHeads {
    Dense {
        /// `[heads, outputs, inputs]`.
        stored: Array,
        /// The view `[heads, inputs, outputs]`, made once.
        turned: Array,
    },
    /// Packed `[heads, outputs, inputs]`.
    Quantized(Quantized),
}

impl OfHeads {
    /// `[1, heads or 1, tokens, inputs]` to `[1, heads, tokens, outputs]`.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        match self {
            Self::Dense { turned, .. } => device.matmul(x, turned),
            Self::Quantized(matrices) => device.quantized_matmul(x, matrices),
        }
    }

    /// By the transposed matrices: `[1, heads or 1, tokens, outputs]` to `[1, heads, tokens, inputs]`.
    pub(crate) fn backward(&self, device: &Device, x: &Array) -> Result<Array> {
        match self {
            Self::Dense { stored, .. } => device.matmul(x, stored),
            Self::Quantized(matrices) => device.quantized_product(x, matrices, false),
        }
    }
}

/// Token ids to vectors.
pub(crate) struct Embedding {
    pub(crate) table: Table,
    /// What adapters add.
    pub(crate) changes: EmbeddingSlot,
}

/// A vector for each id.
pub(crate) enum Table {
    /// `[vocabulary, hidden]`.
    Dense(Array),
    /// Packed.
    Quantized(Quantized),
    /// Packed after its vectors were turned; they are taken in half precision.
    Turned(Quantized, Rc<Turn>),
}

impl Embedding {
    /// `[1, tokens]` ids to `[1, tokens, hidden]`. The caller has checked the ids against the vocabulary.
    pub(crate) fn lookup(&self, device: &Device, ids: &Array) -> Result<Array> {
        let vectors = match &self.table {
            Table::Dense(matrix) => device.take(matrix, ids, 0),
            Table::Quantized(matrix) => device.dequantize(&device.take_rows(matrix, ids)?),
            Table::Turned(matrix, turn) => {
                let vectors = device.dequantize(&device.take_rows(matrix, ids)?)?;
                turn.back(device, &device.cast(&vectors, Dtype::F16)?)
            }
        }?;
        if self.changes.is_idle() { Ok(vectors) } else { self.changes.apply(device, ids, vectors) }
    }

    /// The head of a model with tied embeddings: the same weights as a linear map.
    pub(crate) fn as_linear(&self, device: &Device, changes: Slot<Change>) -> Result<Linear> {
        let weight = match &self.table {
            Table::Dense(matrix) => Weight::dense(device, matrix)?,
            Table::Quantized(matrix) => Weight::Quantized(matrix.clone()),
            Table::Turned(matrix, turn) => Weight::Turned(matrix.clone(), Rc::clone(turn)),
        };
        Ok(Linear { weight, bias: None, changes })
    }
}
