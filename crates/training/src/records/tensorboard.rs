//! TensorBoard's event files: records of TensorFlow (length, checksum, bytes, checksum) with protocol buffers in them.
//!
//! The format is TensorFlow's (`core/lib/io/record_writer.cc`, `core/util/event.proto`); only what scalars need of it is here. Readers take the files of a
//! folder in the order of their names, and drop of earlier ones what a later one begins again.

use prost::Message;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// What the checksum is turned and moved by, so that checksums of data with checksums in them are none (TensorFlow's `crc32c::Mask`).
const MASK: u32 = 0xa282_ead8;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    /// 1: the run begins at this step.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// An event file that is being written.
#[derive(Debug)]
pub(super) struct EventFile {
    file: File,
}

impl EventFile {
    /// A new one in the folder, of a run that goes on behind `done` steps.
    pub(super) fn create(folder: &Path, done: u64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let now = now();
        // Two within one second of the same process would have one name.
        let mut number = 0;
        let file = loop {
            let name =
                format!("events.out.tfevents.{:010}.mlxnode.{}.{number}", now as u64, std::process::id());
            match File::options().write(true).create_new(true).open(folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
                opened => break opened?,
            }
        };
        let mut events = Self { file };
        let version = Some("brain.Event:2".to_owned());
        events.write(&Event { wall_time: now, file_version: version, ..Event::default() })?;
        if done > 0 {
            let step = i64::try_from(done + 1).unwrap_or(i64::MAX);
            let session_log = Some(SessionLog { status: 1 });
            events.write(&Event { wall_time: now, step, session_log, ..Event::default() })?;
        }
        Ok(events)
    }

    /// Adds values of a step, which were measured at this time, in seconds since 1970; None: now.
    pub(super) fn add(&mut self, step: u64, values: &[(&str, f64)], time: Option<f64>) -> io::Result<()> {
        let scalar =
            |(tag, value): &(&str, f64)| Scalar { tag: (*tag).to_owned(), simple_value: *value as f32 };
        let summary = Some(Summary { value: values.iter().map(scalar).collect() });
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        self.write(&Event { wall_time: time.unwrap_or_else(now), step, summary, ..Event::default() })
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend(length);
        record.extend(masked(&length).to_le_bytes());
        record.extend(&data);
        record.extend(masked(&data).to_le_bytes());
        self.file.write_all(&record)
    }
}

fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(MASK)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a file as TensorBoard does.
    fn events(folder: &Path) -> Vec<Event> {
        let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let mut events = Vec::new();
        for file in files {
            let bytes = fs::read(file).unwrap();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
                let data = &rest[12..12 + length];
                assert_eq!(rest[8..12], masked(&rest[..8]).to_le_bytes());
                assert_eq!(rest[12 + length..16 + length], masked(data).to_le_bytes());
                events.push(Event::decode(data).unwrap());
                rest = &rest[16 + length..];
            }
        }
        events
    }

    #[test]
    fn values_are_read_again_and_a_resumed_run_says_where_it_begins() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = EventFile::create(folder.path(), 0).unwrap();
        first.add(1, &[("loss/train", 2.5), ("learning_rate", 1e-5)], Some(1.5)).unwrap();
        let mut second = EventFile::create(folder.path(), 1).unwrap();
        second.add(2, &[("loss/train", 2.0)], None).unwrap();
        let events = events(folder.path());
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        let value = &events[1].summary.as_ref().unwrap().value[0];
        assert_eq!((events[1].step, value.tag.as_str(), value.simple_value), (1, "loss/train", 2.5));
        assert_eq!((events[3].step, events[3].session_log.as_ref().unwrap().status), (2, 1));
        assert!(events[1].wall_time == 1.5 && events[4].wall_time > 1e9);
        assert_eq!(events.len(), 5);
    }

    /// The check value of CRC-32C (RFC 3720), masked as TensorFlow's own test has it.
    #[test]
    fn the_checksum_is_tensorflows() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked(&[]), MASK);
        assert_eq!(masked(b"123456789"), 0xe306_9283_u32.rotate_right(15).wrapping_add(MASK));
    }
}
