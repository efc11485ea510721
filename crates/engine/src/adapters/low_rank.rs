//! What an adapter adds to a linear map or an embedding.

use super::{Active, AdapterId};
use mlxnode_mlx::{Array, Device, Result};
use std::cell::RefCell;
use std::rc::Rc;

/// The change of a linear map by one adapter.
#[derive(Clone)]
pub(crate) struct Change {
    /// `[inputs, rank]`.
    pub(crate) a: Array,
    /// `[rank, outputs]`, the scale included.
    pub(crate) b: Array,
    /// In DoRA the factor on each output before the bias, `[outputs]`: the length a row has over the one it would have.
    pub(crate) factor: Option<Array>,
    /// The map's own bias, needed beside a factor.
    pub(crate) bias: Option<Array>,
    /// In training.
    pub(crate) dropout: Option<Dropout>,
}

/// Sets random numbers to zero, so that no change counts on any of them (Srivastava et al. 2014).
#[derive(Clone)]
pub(crate) struct Dropout {
    /// The probability that a number stays.
    pub(crate) kept: f32,
    /// A random key `[2]`.
    pub(crate) key: Array,
}

impl Dropout {
    /// `x` with some numbers zero, and the others so much larger that the mean stays. In mlx's order.
    pub(crate) fn apply(&self, device: &Device, x: &Array) -> Result<Array> {
        let mask = device.bernoulli(self.kept, x.shape(), &self.key)?;
        let grown = (1.0 / f64::from(self.kept)) as f32;
        let mask = device.multiply(&Array::scalar(grown, x.dtype())?, &device.cast(&mask, x.dtype())?)?;
        device.multiply(&mask, x)
    }
}

/// `x`, through the dropout where there is one.
pub(super) fn dropped(device: &Device, dropout: Option<&Dropout>, x: &Array) -> Result<Array> {
    match dropout {
        Some(dropout) => dropout.apply(device, x),
        None => Ok(x.clone()),
    }
}

impl Change {
    /// `y`, `[.., tokens, outputs]`, is what the map made of `x`; gives what the changed map makes of it. The product is computed in
    /// the adapter's precision and rounded to the model's, as in mlx-lm.
    fn apply(&self, device: &Device, x: &Array, y: &Array) -> Result<Array> {
        let x = dropped(device, self.dropout.as_ref(), x)?;
        let added = device.matmul(&device.matmul(&x, &self.a)?, &self.b)?;
        let added = device.cast(&added, y.dtype())?;
        let Some(factor) = &self.factor else { return device.add(y, &added) };
        let factor = device.cast(factor, y.dtype())?;
        let plain = match &self.bias {
            Some(bias) => device.subtract(y, bias)?,
            None => y.clone(),
        };
        let changed = device.multiply(&factor, &device.add(&plain, &added)?)?;
        match &self.bias {
            Some(bias) => device.add(&changed, bias),
            None => Ok(changed),
        }
    }
}

/// A map's changes, one for each adapter that has one for it.
pub(crate) struct Slot<T> {
    active: Rc<Active>,
    changes: Rc<RefCell<Vec<(AdapterId, T)>>>,
}

/// The slot of an embedding.
pub(crate) type EmbeddingSlot = Slot<EmbeddingChange>;

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self { active: Rc::clone(&self.active), changes: Rc::clone(&self.changes) }
    }
}

impl<T> Slot<T> {
    /// Without changes.
    pub(crate) fn new(active: Rc<Active>) -> Self {
        Self { active, changes: Rc::default() }
    }

    /// Is there nothing to add in the running batch?
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.active.is_idle() || self.changes.borrow().is_empty()
    }

    pub(crate) fn insert(&self, adapter: AdapterId, change: T) {
        self.changes.borrow_mut().push((adapter, change));
    }

    pub(crate) fn remove(&self, adapter: AdapterId) {
        self.changes.borrow_mut().retain(|(of, _)| *of != adapter);
    }

    /// `y` with the segments that have a change of this map changed by `apply`, which gets the segment of `x` and of `y`. Tokens are
    /// on the last axis of `x` but `behind`, and on the last but one of `y`.
    fn changed(
        &self,
        device: &Device,
        x: &Array,
        y: &Array,
        behind: usize,
        apply: impl Fn(&T, &Array, &Array) -> Result<Array>,
    ) -> Result<Array> {
        let (x_axis, y_axis) = (x.shape().len() - 1 - behind, y.shape().len() - 2);
        let changes = self.changes.borrow();
        let change = |adapter: Option<AdapterId>| {
            changes.iter().find(|(of, _)| Some(*of) == adapter).map(|(_, change)| change)
        };
        let segments = self.active.segments(y.shape()[y_axis])?;
        if let [only] = &*segments {
            return match change(only.adapter) {
                Some(change) => apply(change, x, y),
                None => Ok(y.clone()),
            };
        }
        let (mut parts, mut start) = (Vec::with_capacity(segments.len()), 0);
        for segment in &*segments {
            let end = start + segment.tokens;
            let of_y = device.slice_axis(y, y_axis, start, end, 1)?;
            parts.push(match change(segment.adapter) {
                Some(change) => apply(change, &device.slice_axis(x, x_axis, start, end, 1)?, &of_y)?,
                None => of_y,
            });
            start = end;
        }
        device.concatenate(&parts, y_axis as i32)
    }
}

impl Slot<Change> {
    /// `y`, `[.., tokens, outputs]`, is what the map made of `x`, `[.., tokens, inputs]`.
    pub(crate) fn apply(&self, device: &Device, x: &Array, y: Array) -> Result<Array> {
        self.changed(device, x, &y, 1, |change, x, y| change.apply(device, x, y))
    }
}

/// The change of an embedding by one adapter.
pub(crate) struct EmbeddingChange {
    /// `[rows, rank]`.
    pub(crate) a: Array,
    /// `[rank, width]`, the scale included.
    pub(crate) b: Array,
    /// In training, on what it adds.
    pub(crate) dropout: Option<Dropout>,
}

impl Slot<EmbeddingChange> {
    /// `vectors`, `[1, tokens, width]`, are the table's for `ids`, `[1, tokens]`.
    pub(crate) fn apply(&self, device: &Device, ids: &Array, vectors: Array) -> Result<Array> {
        self.changed(device, ids, &vectors, 0, |change, ids, vectors| {
            let added = device.matmul(&device.take(&change.a, ids, 0)?, &change.b)?;
            let added = dropped(device, change.dropout.as_ref(), &added)?;
            device.add(vectors, &device.cast(&added, vectors.dtype())?)
        })
    }
}
