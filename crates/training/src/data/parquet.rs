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

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;
    use std::sync::Arc;

    /// Two rows: a text, and messages as the hub's data sets have them; the second row's text is null.
    const SCHEMA: &str = "message schema {
        optional binary text (UTF8);
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8);
        } } }
    }";

    fn write(path: &Path, compression: Compression) {
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        // Values, how much of each is there, and at which depth each repeats.
        let columns: [(&[&str], &[i16], &[i16]); 3] = [
            (&["one"], &[1, 0], &[0, 0]),
            (&["user", "assistant", "user"], &[4, 4, 4], &[0, 1, 0]),
            (&["Hi", "Hello", "é"], &[4, 4, 4], &[0, 1, 0]),
        ];
        for (values, present, repeated) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = values.iter().map(|text| ByteArray::from(*text)).collect();
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, Some(present), Some(repeated)).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    fn rows(path: &Path) -> Result<Vec<Value>, DataError> {
        let mut rows = ParquetRows::open(path, File::open(path).unwrap())?;
        let mut found = Vec::new();
        while let Some(record) = rows.next()? {
            found.push(Value::Object(record.fields));
        }
        Ok(found)
    }

    #[test]
    fn rows_are_the_records_that_json_lines_would_have() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::LZ4_RAW] {
            write(&path, compression);
            let messages =
                json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]);
            let expected = [
                json!({"text": "one", "messages": messages}),
                json!({"text": null, "messages": [{"role": "user", "content": "é"}]}),
            ];
            assert_eq!(rows(&path).unwrap(), expected, "{compression:?}");
        }
        let mut open = ParquetRows::open(&path, File::open(&path).unwrap()).unwrap();
        assert_eq!(open.count(), 2);
        open.skip(1).unwrap();
        let record = open.next().unwrap().unwrap();
        assert!(record.place.ends_with("train.parquet row 2"), "{}", record.place);
        open.skip(9).unwrap();
        assert!(open.next().unwrap().is_none());
    }

    #[test]
    fn damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        write(&path, Compression::SNAPPY);
        let whole = std::fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> =
            vec![Vec::new(), b"PAR1".to_vec(), whole[..whole.len() / 2].to_vec(), vec![7; 100]];
        // Every byte of the pages and of the footer once, turned over.
        damaged.extend((0..whole.len()).map(|place| {
            let mut bytes = whole.clone();
            bytes[place] ^= 0xff;
            bytes
        }));
        let (mut refused, all) = (0, damaged.len());
        for bytes in damaged {
            std::fs::write(&path, bytes).unwrap();
            // Whatever comes of it, it is an answer; a changed letter of a text cannot be noticed.
            if let Err(error) = rows(&path) {
                assert!(error.to_string().contains("train.parquet"), "{error}");
                refused += 1;
            }
        }
        assert!(refused > all / 3, "{refused} of {all}");
    }
}
