//! What adapters add to the matrices of experts.

use super::low_rank::dropped;
use super::{Active, AdapterId, Dropout};
use mlxnode_mlx::{Array, Device, Dtype, Result};
use std::cell::RefCell;
use std::rc::Rc;

/// The changes of one linear map for each expert. All adapters lie in one stack behind a change that does nothing, so that a batch
/// with rows of several adapters is still one product: place `p * experts + e` is expert `e` as adapter `p` changes it.
#[derive(Clone)]
pub(crate) struct ExpertSlot {
    active: Rc<Active>,
    changes: Rc<RefCell<Changes>>,
    experts: i32,
}

#[derive(Default)]
struct Changes {
    /// `a` as `[experts, inputs, rank]` and `b` as `[experts, rank, outputs]`, the scale included.
    of: Vec<(AdapterId, Array, Array)>,
    stack: Option<Stack>,
    /// The one change that is being trained. Then there are no others.
    trained: Option<Trained>,
}

/// A change that every token goes with.
#[derive(Clone)]
pub(crate) struct Trained {
    /// `[experts, inputs, rank]`.
    pub(crate) a: Array,
    /// `[experts, rank, outputs]`, the scale included.
    pub(crate) b: Array,
    pub(crate) dropout: Option<Dropout>,
}

impl Trained {
    /// `y` is what the experts `chosen` made of `x`; `sorted` when they are in the order of the experts.
    pub(crate) fn apply(
        &self,
        device: &Device,
        x: &Array,
        y: &Array,
        chosen: &Array,
        sorted: bool,
    ) -> Result<Array> {
        let x = device.cast(&dropped(device, self.dropout.as_ref(), x)?, Dtype::F32)?;
        let narrow = device.gather_mm(&x, &self.a, chosen, sorted)?;
        let added = device.gather_mm(&narrow, &self.b, chosen, sorted)?;
        device.add(y, &device.cast(&added, y.dtype())?)
    }
}

/// `[places * experts, inputs, rank]` and `[places * experts, rank, outputs]`.
#[derive(Clone)]
struct Stack {
    a: Array,
    b: Array,
}

impl ExpertSlot {
    /// Without changes.
    pub(crate) fn new(active: Rc<Active>, experts: i32) -> Self {
        Self { active, changes: Rc::default(), experts }
    }

    /// Is there nothing to add in the running batch?
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.active.is_idle() || self.changes.borrow().of.is_empty()
    }

    /// The change that is being trained.
    pub(crate) fn trained(&self) -> Option<Trained> {
        self.changes.borrow().trained.clone()
    }

    /// Has all tokens go with `trained` from now on, or with none.
    pub(crate) fn train(&self, trained: Option<Trained>) {
        self.changes.borrow_mut().trained = trained;
    }

    /// Does the running batch have a row with an adapter?
    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        !self.active.is_idle()
    }

    /// Adds an adapter's change: `a` is `[experts, inputs, rank]`, `b` `[experts, rank, outputs]`.
    pub(crate) fn insert(&self, device: &Device, adapter: AdapterId, a: Array, b: Array) -> Result<()> {
        let mut changes = self.changes.borrow_mut();
        changes.of.push((adapter, a, b));
        changes.restack(device)
    }

    pub(crate) fn remove(&self, device: &Device, adapter: AdapterId) -> Result<()> {
        let mut changes = self.changes.borrow_mut();
        let before = changes.of.len();
        changes.of.retain(|(of, ..)| *of != adapter);
        if changes.of.len() == before { Ok(()) } else { changes.restack(device) }
    }

    /// For each of the batch's tokens, `[tokens]`, where its adapter's changes begin in the stack.
    pub(crate) fn places(&self, tokens: i32) -> Result<Array> {
        let changes = self.changes.borrow();
        let mut places = Vec::with_capacity(usize::try_from(tokens).unwrap_or(0));
        for segment in &*self.active.segments(tokens)? {
            let place = changes.of.iter().position(|(of, ..)| Some(*of) == segment.adapter);
            let place = place.map_or(0, |place| place + 1) as u32 * self.experts.unsigned_abs();
            places.extend((0..segment.tokens).map(|_| place));
        }
        Array::from_u32(&places, &[tokens])
    }

    /// `y` is what the experts `chosen` made of `x`. `places` are those of the choices, shaped like `chosen`.
    pub(crate) fn apply(
        &self,
        device: &Device,
        x: &Array,
        y: Array,
        chosen: &Array,
        places: &Array,
    ) -> Result<Array> {
        let changes = self.changes.borrow();
        let Some(Stack { a, b }) = &changes.stack else { return Ok(y) };
        let indices = device.add(&device.cast(chosen, Dtype::U32)?, places)?;
        // The CPU backend multiplies gathered matrices in single precision only; the adapters are in it anyhow.
        let x = device.cast(x, Dtype::F32)?;
        let narrow = device.gather_mm(&x, a, &indices, false)?;
        let added = device.gather_mm(&narrow, b, &indices, false)?;
        device.add(&y, &device.cast(&added, y.dtype())?)
    }
}

impl Changes {
    /// Puts the adapters one behind the other, brought to the largest rank with zeros.
    fn restack(&mut self, device: &Device) -> Result<()> {
        let Some((_, first, _)) = self.of.first() else {
            self.stack = None;
            return Ok(());
        };
        let experts = first.dim(0);
        let rank = self.of.iter().map(|(_, a, _)| a.dim(2)).max().unwrap_or(1);
        let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
        if let Some((_, a, b)) = self.of.first() {
            all_a.push(device.zeros(&[experts, a.dim(1), rank], Dtype::F32)?);
            all_b.push(device.zeros(&[experts, rank, b.dim(2)], Dtype::F32)?);
        }
        for (_, a, b) in &self.of {
            let (a, b) = (device.cast(a, Dtype::F32)?, device.cast(b, Dtype::F32)?);
            let missing = rank - a.dim(2);
            if missing == 0 {
                all_a.push(a);
                all_b.push(b);
                continue;
            }
            let beside = device.zeros(&[experts, a.dim(1), missing], Dtype::F32)?;
            let below = device.zeros(&[experts, missing, b.dim(2)], Dtype::F32)?;
            all_a.push(device.concatenate([&a, &beside], 2)?);
            all_b.push(device.concatenate([&b, &below], 1)?);
        }
        let stack = Stack { a: device.concatenate(&all_a, 0)?, b: device.concatenate(&all_b, 0)? };
        device.eval([&stack.a, &stack.b])?;
        self.stack = Some(stack);
        Ok(())
    }
}
