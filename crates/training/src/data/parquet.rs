//! Rows of Parquet files as records: what data sets of the hub mostly are.

use super::DataError;
use super::records::Record;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::reader::RowIter;
use serde_json::{Map, Value};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Bytes of a group of rows before compression, as the file states them. What writers make has some hundred MB; a file that states more
/// wants our memory.
const MAX_GROUP_BYTES: i64 = 8 << 30;

/// An open Parquet file.
pub(super) struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    count: usize,
    /// Rows that were given or gone over.
    done: usize,
}

impl ParquetRows {
    pub(super) fn open(path: &Path, file: File) -> Result<Self, DataError> {
        let reader = guarded(path, || SerializedFileReader::new(file))?;
        let wrong = |reason: &str| DataError::Parquet { path: path.into(), reason: reason.to_owned() };
        let metadata = reader.metadata();
        if metadata.row_groups().iter().any(|group| group.total_byte_size() > MAX_GROUP_BYTES) {
            return Err(wrong("a group of its rows is larger than 8 GiB"));
        }
        let count = usize::try_from(metadata.file_metadata().num_rows())
            .map_err(|_| wrong("it has a negative number of rows"))?;
        let rows = RowIter::from_file_into(Box::new(reader));
        Ok(Self { path: path.into(), rows, count, done: 0 })
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn next(&mut self) -> Result<Option<Record>, DataError> {
        let row = guarded(&self.path, || self.rows.next().transpose())?;
        let Some(row) = row else { return Ok(None) };
        self.done += 1;
        let place = format!("{} row {}", self.path.display(), self.done);
        let fields = match row.to_json_value() {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        Ok(Some(Record { place, fields }))
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), DataError> {
        for _ in 0..count.min(self.count - self.done.min(self.count)) {
            guarded(&self.path, || self.rows.next().transpose())?;
            self.done += 1;
        }
        Ok(())
    }
}

/// The reader's error with the file. Damaged files make it panic in places: that is an error, too.
fn guarded<T>(path: &Path, read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, DataError> {
    let read = catch_unwind(AssertUnwindSafe(read));
    let reason = match read {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the file is damaged".to_owned(),
    };
    Err(DataError::Parquet { path: path.into(), reason })
}
