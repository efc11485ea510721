//! The loop over the rows of a batch, for mixers that keep states.

use crate::batch::Batch;
use crate::caches::LayerCache;
use mlxnode_mlx::{Array, Device, Result};

/// Cuts arrays `[1, tokens of all rows, ..]` by rows, lets `mix` work on each row's parts and what layer `layer` remembers of it,
/// and puts the results `[1, tokens, ..]` together again. A single row is neither cut nor put together. Of sequences side by side a row
/// has `[lanes, 1, ..]`.
pub(super) fn by_row<const N: usize>(
    device: &Device,
    arrays: [Array; N],
    layer: usize,
    batch: &mut Batch<'_>,
    mut mix: impl FnMut([Array; N], &mut LayerCache) -> Result<Array>,
) -> Result<Array> {
    if let [row] = batch.rows.as_mut_slice()
        && row.cache.lanes() == 1
    {
        return mix(arrays, &mut row.cache.layers[layer]);
    }
    let is_only = batch.rows.len() == 1;
    let mut mixed = Vec::with_capacity(batch.rows.len());
    let mut start = 0;
    for row in &mut batch.rows {
        let (stop, lanes) = (start + row.span(), row.cache.lanes() as i32);
        let mut parts = arrays.clone();
        for part in &mut parts {
            if !is_only {
                *part = tokens(device, part, start, stop)?;
            }
            if lanes > 1 {
                *part = turned(device, part)?;
            }
        }
        let seen = mix(parts, &mut row.cache.layers[layer])?;
        mixed.push(if lanes > 1 { turned(device, &seen)? } else { seen });
        start = stop;
    }
    match mixed.as_slice() {
        [only] => Ok(only.clone()),
        _ => device.concatenate(&mixed, 1),
    }
}

/// `[1, lanes, ..]` as `[lanes, 1, ..]`, and back.
fn turned(device: &Device, array: &Array) -> Result<Array> {
    let mut shape = array.shape().to_vec();
    if let [first, second, ..] = shape.as_mut_slice() {
        std::mem::swap(first, second);
    }
    device.reshape(array, &shape)
}

/// The entries `start..stop` along the second axis.
pub(super) fn tokens(device: &Device, array: &Array, start: i32, stop: i32) -> Result<Array> {
    device.slice_axis(array, 1, start, stop, 1)
}

/// The entries `start..stop` along the last axis.
pub(super) fn channels(device: &Device, array: &Array, start: i32, stop: i32) -> Result<Array> {
    device.slice_axis(array, array.shape().len().saturating_sub(1), start, stop, 1)
}
