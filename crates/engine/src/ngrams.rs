//! Embeddings of groups of tokens: see [`mlxnode_checkpoint::NgramsSpec`].
//!
//! The last few ids of a sequence are the first state of the stage's first layer, whose mixer keeps none, so that they are taken back and
//! put side by side like all states.

use crate::batch::Batch;
use crate::linear::{Embedding, Linear};
use mlxnode_mlx::{Array, Device, Dtype, Error, Result};

/// Tables beside the token embedding.
pub(crate) struct Ngrams {
    pub(crate) tables: Vec<Table>,
    /// Tokens in the longest group.
    pub(crate) longest: i32,
}

/// One table.
pub(crate) struct Table {
    pub(crate) vectors: Embedding,
    /// To the hidden vectors' width.
    pub(crate) projection: Linear,
    /// Its rows, `[]`.
    pub(crate) rows: Array,
    /// What the id of the token before counts for, of the one before that, and so on, each below `rows`: `[]`.
    pub(crate) places: Vec<Array>,
}

impl Table {
    /// A table of `rows` rows for groups of `tokens` tokens of a vocabulary.
    pub(crate) fn new(
        vectors: Embedding,
        projection: Linear,
        rows: usize,
        tokens: usize,
        vocabulary: usize,
    ) -> Result<Self> {
        let number = |value: u64| Array::from_bytes(&(value as i64).to_le_bytes(), &[], Dtype::I64);
        let (rows, vocabulary) = (rows as u64, vocabulary as u64);
        let mut place = 1;
        let mut places = Vec::new();
        for _ in 1..tokens {
            place = place * vocabulary % rows; // both are below 2^32
            places.push(number(place)?);
        }
        Ok(Self { vectors, projection, rows: number(rows)?, places })
    }

    /// Its arrays that are not weights.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = &Array> {
        self.places.iter().chain([&self.rows])
    }
}

impl Ngrams {
    /// What the embeddings `[1, tokens of all rows, hidden]` of `ids` become.
    pub(crate) fn join(
        &self,
        device: &Device,
        ids: &Array,
        embeddings: Array,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let ids = device.cast(ids, Dtype::I64)?;
        let shifted = self.shifted(device, &ids, batch)?;
        let mut sum = embeddings;
        for table in &self.tables {
            let mut number = ids.clone();
            for (before, place) in shifted.iter().zip(&table.places) {
                number = device.add(&number, &device.multiply(before, place)?)?;
            }
            let row = device.remainder(&number, &table.rows)?;
            let vectors = table.vectors.lookup(device, &row)?;
            sum = device.add(&sum, &table.projection.forward(device, &vectors)?)?;
        }
        let count = (self.tables.len() + 1) as f32;
        device.divide(&sum, &Array::scalar(count, sum.dtype())?)
    }

    /// For each token the id of the one before it, of the one before that, and so on, `[1, tokens of all rows]` each; 0 where there is
    /// none. The rows' caches take the last ids up.
    fn shifted(&self, device: &Device, ids: &Array, batch: &mut Batch<'_>) -> Result<Vec<Array>> {
        let (most, all) = (self.longest - 1, ids.dim(1));
        let mut by_row = Vec::with_capacity(batch.rows.len());
        let mut start = 0;
        for row in &mut batch.rows {
            let (stop, lanes) = (start + row.span(), row.cache.lanes() as i32);
            let own = device.slice(ids, &[0, start], &[1, stop])?;
            let own = device.reshape(&own, &[lanes, row.tokens])?;
            let Some(layer) = row.cache.layers.first_mut() else {
                return Err(Error::Mlx("a stage with an embedding has layers".to_owned()));
            };
            let known = match layer.states.arrays().first() {
                Some(before) => device.concatenate([before, &own], 1)?,
                None => own,
            };
            let kept = known.dim(1).min(most);
            let last = device.slice_axis(&known, 1, known.dim(1) - kept, known.dim(1), 1)?;
            layer.states.replace(vec![device.contiguous(&last)?], row.tokens);
            // As many zeros before the sequence as the longest group reaches back.
            let missing = (most + row.tokens - known.dim(1)).max(0);
            let known = match missing {
                0 => known,
                _ => device.concatenate([&device.zeros(&[lanes, missing], Dtype::I64)?, &known], 1)?,
            };
            let end = known.dim(1);
            let back = |by: i32| {
                let part = device.slice_axis(&known, 1, end - row.tokens - by, end - by, 1)?;
                device.reshape(&part, &[1, stop - start])
            };
            by_row.push((1..=most).map(back).collect::<Result<Vec<_>>>()?);
            start = stop;
        }
        if start != all {
            return Err(Error::Mlx("there are other ids than rows have tokens".to_owned()));
        }
        match by_row.as_slice() {
            [only] => Ok(only.clone()),
            _ => (0..most as usize)
                .map(|by| device.concatenate(by_row.iter().filter_map(|row| row.get(by)), 1))
                .collect(),
        }
    }
}
