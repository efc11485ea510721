//! Data sets: from files to rows of token ids.
//!
//! ```text
//! DataFolder ──files──> records ──fields──> Encoder ──tokens──> Dataset
//!  (splits)    (JSON lines, Parquet)   (shape, template, mask)
//! ```
//!
//! Whoever runs a job brings the files here; nothing is downloaded in this crate. [`Sets::read`](crate::Sets::read) reads all that a
//! configuration asks for.

mod dataset;
mod encoder;
mod error;
mod examination;
mod folder;
mod parquet;
mod records;
mod turns;

pub use dataset::{Cut, Dataset, Row, Sequence};
pub use encoder::Encoder;
pub use error::DataError;
pub use examination::{Examination, examine};
pub use folder::DataFolder;

use crate::batches::Sets;
use crate::config::{Features, Split, TrainingConfig};
use records::Record;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Rows are made into tokens on at most so many threads: the sandbox of chat templates serves few at a time.
const MOST_THREADS: usize = 8;

impl Dataset {
    /// The rows of these files, in order; of all of them those within `range`, if there is one. `progress` gets the number of rows
    /// so far.
    ///
    /// # Errors
    /// [`DataError`]: what cannot be read, is malformed, or does not fit the shape that the first row has.
    pub fn read(
        files: &[PathBuf],
        range: Option<Range<usize>>,
        features: &Features,
        encoder: &Encoder,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DataError> {
        let mut dataset = Self::default();
        let mut shape = None;
        records::each(files, range, &mut |records| {
            let Some(first) = records.first() else { return Ok(()) };
            let shape = match shape {
                Some(shape) => shape,
                None => *shape.insert(encoder.shape(first, features)?),
            };
            let rows = in_parallel(&records, |record| encoder.row(record, shape, features));
            for (record, row) in records.iter().zip(rows) {
                dataset.push(row?, encoder::field_count(&record.fields), encoder.max_seq_length);
            }
            progress(dataset.len() as u64);
            Ok(())
        })?;
        Ok(dataset)
    }

    /// The rows of a split of a folder.
    fn of_split(
        folder: &DataFolder,
        split: &Split,
        features: &Features,
        encoder: &Encoder,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DataError> {
        let mut counts = Vec::new();
        for name in split.names() {
            let files = folder.needed(name)?;
            let mut rows = 0;
            for file in files {
                rows += records::count(file)?;
            }
            counts.push((name, rows));
        }
        let count = |name: &str| counts.iter().find(|(known, _)| *known == name).map_or(0, |(_, rows)| *rows);
        let mut dataset = Self::default();
        for (name, range) in split.ranges(count) {
            dataset.append(Self::read(folder.needed(name)?, Some(range), features, encoder, progress)?);
        }
        Ok(dataset)
    }
}

impl Sets {
    /// All that a configuration trains and measures on. `folders` are where its data lie: one for each entry of `hf_dataset`, in order, or
    /// the one that `data` names. Splits that are not asked for are not read; a validation set may be empty, the others not.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn read(
        config: &TrainingConfig,
        folders: &[PathBuf],
        encoder: &Encoder,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DataError> {
        let [mut train, mut valid, mut test] = [Dataset::default(), Dataset::default(), Dataset::default()];
        if config.hf_dataset.is_empty() {
            for path in folders {
                let folder = DataFolder::open(path, None)?;
                let read = |name: &str| match folder.files(name) {
                    None => Ok(Dataset::default()),
                    Some(files) => Dataset::read(files, None, &config.features, encoder, progress),
                };
                if config.train {
                    train.append(read("train")?);
                    valid.append(read("valid")?);
                }
                if config.test {
                    test.append(read("test")?);
                }
            }
        }
        for (dataset, path) in config.hf_dataset.iter().zip(folders) {
            let folder = DataFolder::open(path, dataset.subset.as_deref())?;
            let read =
                |split: &Split| Dataset::of_split(&folder, split, &dataset.features, encoder, progress);
            if config.train {
                train.append(read(&dataset.train_split)?);
                valid.append(read(&dataset.valid_split)?);
            }
            if let Some(split) = dataset.test_split.as_ref().filter(|_| config.test) {
                test.append(read(split)?);
            }
        }
        for (set, is_needed, dataset) in [("training", config.train, &train), ("test", config.test, &test)] {
            if is_needed && dataset.is_empty() {
                return Err(DataError::Empty { set });
            }
        }
        Ok(Self { train: Arc::new(train), valid: Arc::new(valid), test: Arc::new(test) })
    }
}

/// What `work` makes of each record, in order.
fn in_parallel<T: Send>(records: &[Record], work: impl Fn(&Record) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let share = records.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let work = &work;
        let parts: Vec<_> = records
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().map(work).collect::<Vec<T>>()))
            .collect();
        let mut made = Vec::with_capacity(records.len());
        for part in parts {
            match part.join() {
                Ok(part) => made.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        made
    })
}
