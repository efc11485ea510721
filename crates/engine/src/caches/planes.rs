//! The arrays of a cache: keys and values as they are, or packed into words, scales and biases each.
//!
//! All are `[lanes, heads, slots, width]`, with one lane unless several sequences lie side by side, so that which tokens lie where is one matter and how they are stored another.

use super::lanes::are_alike;
use mlxnode_mlx::{Array, Device, Error, Quantized, QuantizedLayout, Result};

/// Arrays that share their slot axis: two as computed, six when packed; none before the first token.
#[derive(Clone, Default)]
pub(crate) struct Planes {
    pub(crate) arrays: Vec<Array>,
}

/// The axis of the slots.
const SLOTS: i32 = 2;

impl Planes {
    /// Keys and values as computed, or packed.
    pub(crate) fn of(
        device: &Device,
        keys: &Array,
        values: &Array,
        packing: Option<QuantizedLayout>,
    ) -> Result<Self> {
        let Some(layout) = packing else { return Ok(Self { arrays: vec![keys.clone(), values.clone()] }) };
        let mut arrays = Vec::with_capacity(6);
        for array in [keys, values] {
            let width = array.dim(3);
            if width % layout.group_size != 0 {
                let group_size = layout.group_size;
                return Err(Error::Mlx(format!(
                    "keys and values of width {width} cannot be packed in groups of {group_size}; take a group size that divides it"
                )));
            }
            let packed = device.quantize(array, layout)?;
            arrays.extend([packed.weight, packed.scales]);
            arrays.extend(packed.biases);
        }
        Ok(Self { arrays })
    }

    /// How many tokens there is room for.
    pub(crate) fn slots(&self) -> i32 {
        self.arrays.first().map_or(0, |array| array.dim(SLOTS))
    }

    /// Is there none?
    pub(crate) fn is_empty(&self) -> bool {
        self.arrays.is_empty()
    }

    /// Slots `start..stop`.
    pub(crate) fn cut(&self, device: &Device, start: i32, stop: i32) -> Result<Self> {
        self.each(|array| cut(device, array, start, stop))
    }

    /// `slots` empty slots of the same kind.
    pub(crate) fn room(&self, device: &Device, slots: i32) -> Result<Self> {
        self.each(|array| device.zeros(&[array.dim(0), array.dim(1), slots, array.dim(3)], array.dtype()))
    }

    /// One lane in memory of its own: a slice would keep the whole buffer alive.
    pub(crate) fn copied(&self, device: &Device, lane: i32) -> Result<Self> {
        self.each(|array| copied(device, &lane_of(device, array, lane)?))
    }

    /// One after the other along the slots. All must be of one kind.
    pub(crate) fn joined(device: &Device, parts: &[Self]) -> Result<Self> {
        let [first, rest @ ..] = parts else { return Ok(Self::default()) };
        if rest.is_empty() {
            return Ok(first.clone());
        }
        let arrays = (0..first.arrays.len())
            .map(|plane| device.concatenate(parts.iter().filter_map(|part| part.arrays.get(plane)), SLOTS));
        Ok(Self { arrays: arrays.collect::<Result<_>>()? })
    }

    /// With `new` written at slot `start`. Takes the arrays over: a buffer that nobody else holds is written in place, one that
    /// another cache shares is copied first.
    pub(crate) fn put(self, device: &Device, new: &Self, start: i32) -> Result<Self> {
        let put = |(buffer, new): (Array, &Array)| {
            let (heads, width) = (buffer.dim(1), buffer.dim(3));
            let stop = [buffer.dim(0), heads, start + new.dim(SLOTS), width];
            device.slice_update(&buffer, new, &[0, 0, start, 0], &stop)
        };
        Ok(Self { arrays: self.arrays.into_iter().zip(&new.arrays).map(put).collect::<Result<_>>()? })
    }

    /// Zeros of the same kind for this many lanes and slots.
    pub(crate) fn empty(&self, device: &Device, lanes: i32, slots: i32) -> Result<Self> {
        self.each(|array| device.zeros(&[lanes, array.dim(1), slots, array.dim(3)], array.dtype()))
    }

    /// With `new`, which are lanes of the same kind, written at lane `lane` and slot `start`. Takes the arrays over like
    /// [`Self::put`].
    pub(crate) fn put_lanes(self, device: &Device, new: &Self, lane: i32, start: i32) -> Result<Self> {
        let put = |(buffer, new): (Array, &Array)| {
            let stop = [lane + new.dim(0), buffer.dim(1), start + new.dim(SLOTS), buffer.dim(3)];
            device.slice_update(&buffer, new, &[lane, 0, start, 0], &stop)
        };
        Ok(Self { arrays: self.arrays.into_iter().zip(&new.arrays).map(put).collect::<Result<_>>()? })
    }

    /// `count` lanes from lane `first` on.
    pub(crate) fn lanes(&self, device: &Device, first: i32, count: i32) -> Result<Self> {
        self.each(|array| match (first, count) == (0, array.dim(0)) {
            true => Ok(array.clone()),
            false => device.slice_axis(array, 0, first, first + count, 1),
        })
    }

    /// Do they differ in lanes and slots at most?
    pub(crate) fn are_like(&self, other: &Self) -> bool {
        let mut pairs = self.arrays.iter().zip(&other.arrays);
        self.arrays.len() == other.arrays.len()
            && pairs.all(|(one, other)| are_alike(one, other, SLOTS as usize))
    }

    /// The packed form of keys and values as computed.
    pub(crate) fn packed(&self, device: &Device, layout: QuantizedLayout) -> Result<Self> {
        let [keys, values] = self.arrays.as_slice() else { return Ok(self.clone()) };
        Self::of(device, keys, values, Some(layout))
    }

    /// Keys and values, when they are as computed.
    pub(crate) fn plain(&self) -> Option<(&Array, &Array)> {
        match self.arrays.as_slice() {
            [keys, values] => Some((keys, values)),
            _ => None,
        }
    }

    /// Keys and values, when they are packed.
    pub(crate) fn quantized(&self, layout: QuantizedLayout) -> Option<(Quantized, Quantized)> {
        let matrix = |parts: &[Array]| match parts {
            [weight, scales, biases] => Some(Quantized {
                weight: weight.clone(),
                scales: scales.clone(),
                biases: Some(biases.clone()),
                layout,
            }),
            _ => None,
        };
        match self.arrays.len() {
            6 => Some((matrix(&self.arrays[..3])?, matrix(&self.arrays[3..])?)),
            _ => None,
        }
    }

    fn each(&self, mut change: impl FnMut(&Array) -> Result<Array>) -> Result<Self> {
        Ok(Self { arrays: self.arrays.iter().map(&mut change).collect::<Result<_>>()? })
    }
}

/// One of the lanes that lie along the first axis.
pub(super) fn lane_of(device: &Device, array: &Array, lane: i32) -> Result<Array> {
    match array.dim(0) {
        1 => Ok(array.clone()),
        _ => device.slice_axis(array, 0, lane, lane + 1, 1),
    }
}

/// The same elements in memory of their own: two halves put together, since MLX has no copy that always is one (writing all of an array
/// anew gives what was written, and what is contiguous already stays where it is).
pub(super) fn copied(device: &Device, array: &Array) -> Result<Array> {
    let shape = array.shape();
    let Some(axis) = shape.iter().position(|size| *size > 1) else { return device.contiguous(array) };
    let middle = shape[axis] / 2;
    let halves = [
        device.slice_axis(array, axis, 0, middle, 1)?,
        device.slice_axis(array, axis, middle, shape[axis], 1)?,
    ];
    device.concatenate(&halves, axis as i32)
}

/// Slots `start..stop` of `[1, heads, slots, width]`.
fn cut(device: &Device, buffer: &Array, start: i32, stop: i32) -> Result<Array> {
    if start == 0 && stop == buffer.dim(SLOTS) {
        return Ok(buffer.clone());
    }
    device.slice(buffer, &[0, 0, start, 0], &[buffer.dim(0), buffer.dim(1), stop, buffer.dim(3)])
}
