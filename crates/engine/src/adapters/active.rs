//! Which tokens of the running batch go with which adapter.

use super::AdapterId;
use mlxnode_mlx::{Error, Result};
use std::cell::{Cell, Ref, RefCell};

/// Consecutive tokens of a batch that go with the same adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// None: the weights as they are.
    pub(crate) adapter: Option<AdapterId>,
    /// How many tokens; at least one.
    pub(crate) tokens: i32,
}

/// The segments of what is being computed now, for all maps of a model.
#[derive(Default)]
pub(crate) struct Active {
    /// Does any segment have an adapter?
    any: Cell<bool>,
    /// The adapter of everything, whatever is computed. Then there are no segments.
    all: Cell<Option<AdapterId>>,
    segments: RefCell<Vec<Segment>>,
}

impl Active {
    /// Everything goes with this adapter from now on, or with none.
    pub(crate) fn set_all(&self, adapter: Option<AdapterId>) {
        self.segments.borrow_mut().clear();
        self.all.set(adapter);
        self.any.set(adapter.is_some());
    }

    /// What is computed from now on has these tokens, in this order. Neighbours with the same adapter become one segment.
    pub(crate) fn set(&self, rows: impl IntoIterator<Item = Segment>) {
        self.all.set(None);
        let mut segments = self.segments.borrow_mut();
        segments.clear();
        for row in rows {
            match segments.last_mut() {
                Some(last) if last.adapter == row.adapter => last.tokens += row.tokens,
                _ => segments.push(row),
            }
        }
        self.any.set(segments.iter().any(|segment| segment.adapter.is_some()));
    }

    /// Is there nothing to do for anybody?
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        !self.any.get()
    }

    /// The segments, which make up `tokens` tokens.
    pub(crate) fn segments(&self, tokens: i32) -> Result<Ref<'_, [Segment]>> {
        if let Some(adapter) = self.all.get() {
            let mut segments = self.segments.borrow_mut();
            segments.clear();
            segments.push(Segment { adapter: Some(adapter), tokens });
        }
        let segments = Ref::map(self.segments.borrow(), Vec::as_slice);
        match segments.iter().map(|segment| segment.tokens).sum::<i32>() == tokens {
            true => Ok(segments),
            false => {
                Err(Error::Mlx(format!("the batch has other tokens than the {tokens} that an adapter got")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_segment() {
        let active = Active::default();
        assert!(active.is_idle());
        let row = |adapter: Option<u32>, tokens| Segment { adapter: adapter.map(AdapterId), tokens };
        active.set([row(None, 1), row(None, 2), row(Some(1), 3), row(Some(2), 1), row(Some(2), 1)]);
        assert!(!active.is_idle());
        let expected = [row(None, 3), row(Some(1), 3), row(Some(2), 2)];
        assert_eq!(active.segments(8).unwrap().to_vec(), expected);
        assert!(active.segments(7).is_err());
        active.set([row(None, 4)]);
        assert!(active.is_idle());
        active.set_all(Some(AdapterId(3)));
        assert_eq!(active.segments(9).unwrap().to_vec(), [row(Some(3), 9)]);
        active.set_all(None);
        assert!(active.is_idle());
    }
}
