//! Records of files, one after the other: lines of JSON, or rows of Parquet. A data set is never in memory as text.

use super::DataError;
use super::parquet::ParquetRows;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A line that is longer is no record of text: 16 million tokens.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// A row before it is tokens.
#[derive(Debug)]
pub(super) struct Record {
    /// File and line, for messages.
    pub(super) place: String,
    pub(super) fields: Map<String, Value>,
}

/// The records of a file.
pub(super) enum Records {
    Lines { path: PathBuf, reader: Box<BufReader<File>>, line: u64 },
    Parquet(Box<ParquetRows>),
}

/// What kind of file this is, if it is data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Lines,
    Parquet,
}

impl Kind {
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" | "json" | "ndjson" => Some(Self::Lines),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

pub(super) fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> DataError + '_ {
    |source| match source.kind() {
        std::io::ErrorKind::NotFound => DataError::NotThere { path: path.into() },
        _ => DataError::Read { path: path.into(), source },
    }
}

impl Records {
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let kind = Kind::of(path).ok_or_else(|| DataError::Kind { path: path.into() })?;
        let file = File::open(path).map_err(unreadable(path))?;
        Ok(match kind {
            Kind::Lines => Self::Lines { path: path.into(), reader: Box::new(BufReader::new(file)), line: 0 },
            Kind::Parquet => Self::Parquet(Box::new(ParquetRows::open(path, file)?)),
        })
    }

    /// The next record; None behind the last.
    pub(super) fn next(&mut self) -> Result<Option<Record>, DataError> {
        match self {
            Self::Parquet(rows) => rows.next(),
            Self::Lines { path, reader, line } => {
                let Some(text) = line_of(path, reader, line)? else { return Ok(None) };
                let place = format!("{} line {line}", path.display());
                let wrong = |problem: String| DataError::Row { place: place.clone(), problem };
                let value: Value = serde_json::from_slice(&text).map_err(|error| {
                    let shown: &[u8] = text.get(..1).unwrap_or_default();
                    match shown {
                        b"[" if *line == 1 => {
                            wrong("the file is one JSON list; each line must be a record".to_owned())
                        }
                        _ => wrong(format!("it is not JSON: {error}")),
                    }
                })?;
                match value {
                    Value::Object(fields) => Ok(Some(Record { place, fields })),
                    _ => Err(wrong("it is not a JSON object".to_owned())),
                }
            }
        }
    }

    /// Goes over so many records without looking into them.
    fn skip(&mut self, count: usize) -> Result<(), DataError> {
        match self {
            Self::Parquet(rows) => rows.skip(count),
            Self::Lines { path, reader, line } => {
                for _ in 0..count {
                    if line_of(path, reader, line)?.is_none() {
                        break;
                    }
                }
                Ok(())
            }
        }
    }
}

/// The next line; None at the end, where empty lines are nothing.
fn line_of(path: &Path, reader: &mut BufReader<File>, line: &mut u64) -> Result<Option<Vec<u8>>, DataError> {
    let mut text = Vec::new();
    let wrong = |line: u64, problem: &str| DataError::Row {
        place: format!("{} line {line}", path.display()),
        problem: problem.to_owned(),
    };
    *line += 1;
    reader.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut text).map_err(unreadable(path))?;
    if text.len() as u64 > MAX_LINE_BYTES {
        return Err(wrong(*line, &format!("it is longer than {} MiB", MAX_LINE_BYTES >> 20)));
    }
    if !text.iter().all(u8::is_ascii_whitespace) {
        return Ok(Some(text));
    }
    let empty = *line;
    while !text.is_empty() {
        text.clear();
        reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut text).map_err(unreadable(path))?;
        if !text.iter().all(u8::is_ascii_whitespace) {
            return Err(wrong(empty, "it is empty"));
        }
    }
    Ok(None)
}

/// How many records a file has.
pub(super) fn count(path: &Path) -> Result<usize, DataError> {
    match Records::open(path)? {
        Records::Parquet(rows) => Ok(rows.count()),
        Records::Lines { path, mut reader, mut line } => {
            let mut count = 0;
            while line_of(&path, &mut reader, &mut line)?.is_some() {
                count += 1;
            }
            Ok(count)
        }
    }
}

/// Gives the records of several files to `take`, in pieces of a few hundred; of all of them those within `range`, if there is one.
pub(super) fn each(
    files: &[PathBuf],
    range: Option<Range<usize>>,
    take: &mut dyn FnMut(Vec<Record>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    const PIECE: usize = 512;
    let (mut skipped, mut left) = match &range {
        Some(range) => (range.start, range.len()),
        None => (0, usize::MAX),
    };
    for file in files {
        if left == 0 {
            break;
        }
        if skipped > 0 {
            let count = count(file)?;
            if count <= skipped {
                skipped -= count;
                continue;
            }
        }
        let mut records = Records::open(file)?;
        records.skip(skipped)?;
        skipped = 0;
        let mut piece = Vec::new();
        while left > 0 {
            let Some(record) = records.next()? else { break };
            left -= 1;
            piece.push(record);
            if piece.len() == PIECE {
                take(std::mem::take(&mut piece))?;
            }
        }
        if !piece.is_empty() {
            take(piece)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(files: &[PathBuf], range: Option<Range<usize>>) -> Result<Vec<String>, DataError> {
        let mut found = Vec::new();
        each(files, range, &mut |records| {
            found.extend(records.iter().map(|record| record.fields["n"].to_string()));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn slices_go_over_files() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = [0..3, 3..3, 3..7]
            .into_iter()
            .enumerate()
            .map(|(index, numbers)| {
                let path = folder.path().join(format!("{index}.jsonl"));
                let lines: Vec<String> = numbers.map(|number| format!("{{\"n\": {number}}}\n")).collect();
                std::fs::write(&path, lines.concat()).unwrap();
                path
            })
            .collect();
        for (range, expected) in
            [(None, 0..7), (Some(0..2), 0..2), (Some(2..5), 2..5), (Some(4..9), 4..7), (Some(3..3), 0..0)]
        {
            let expected: Vec<String> = expected.map(|number: i32| number.to_string()).collect();
            assert_eq!(all(&files, range.clone()).unwrap(), expected, "{range:?}");
        }
        assert_eq!(count(&files[2]).unwrap(), 4);
    }

    #[test]
    fn a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        for (text, expected) in [
            ("{\"n\": 1}\n\n{\"n\": 2}\n", "train.jsonl line 2: it is empty"),
            ("{\"n\": 1}\n{\"n\": \n", "train.jsonl line 2: it is not JSON: EOF"),
            ("[1, 2]\n", "train.jsonl line 1: it is not a JSON object"),
            ("[\n{\"n\": 1}]\n", "train.jsonl line 1: the file is one JSON list"),
            ("{\"n\": 1}\n\"\u{1}\"\n", "train.jsonl line 2: it is not JSON"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = all(std::slice::from_ref(&path), None).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        std::fs::write(&path, "{\"n\": 1}\n\n \n").unwrap();
        assert_eq!(
            all(std::slice::from_ref(&path), None).unwrap(),
            ["1"],
            "empty lines at the end are nothing"
        );
        let error = all(&[folder.path().join("x.csv")], None).unwrap_err().to_string();
        assert!(
            error.ends_with("x.csv is no data that can be read: .jsonl and .parquet files are"),
            "{error}"
        );
    }
}
