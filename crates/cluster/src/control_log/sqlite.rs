//! The control log in one SQLite file.
//!
//! WAL with `synchronous=FULL` and `fullfsync` (on a Mac plain fsync leaves the data in the drive's cache), STRICT tables,
//! `quick_check` on opening. Every entry carries the BLAKE3 hash of itself and the entry before, so that a changed, lost or
//! reordered entry is found on opening; the snapshot carries the hash at which the chain goes on.

use super::{
    ControlEntry, ControlEpoch, ControlLog, ControlLogError, ControlSnapshot, MAX_RECORD, MAX_SNAPSHOT,
};
use async_trait::async_trait;
use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS entries (
    position   INTEGER PRIMARY KEY CHECK (position > 0),
    generation INTEGER NOT NULL,
    term       INTEGER NOT NULL,
    record     BLOB NOT NULL CHECK (length(record) <= 65536),
    chain      BLOB NOT NULL CHECK (length(chain) = 32)
) STRICT;
CREATE TABLE IF NOT EXISTS snapshot (
    one        INTEGER PRIMARY KEY CHECK (one = 1),
    position   INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    term       INTEGER NOT NULL,
    state      BLOB NOT NULL,
    state_hash BLOB NOT NULL CHECK (length(state_hash) = 32),
    chain      BLOB NOT NULL CHECK (length(chain) = 32)
) STRICT;
";
/// The layout above. A file with another number was written by another version of mlxnode.
const LAYOUT: i64 = 1;

type Hash = [u8; 32];

/// A [`ControlLog`] with one voter: this process and its disk.
#[derive(Clone)]
pub struct SqliteControlLog {
    log: Arc<Mutex<Log>>,
}

struct Log {
    path: PathBuf,
    connection: Connection,
    last: u64,
    epoch: ControlEpoch,
    chain: Hash,
}

impl SqliteControlLog {
    /// Opens the log in `path`, made now if there is none, and checks all of it. Blocks on the disk.
    ///
    /// # Errors
    /// [`ControlLogError::Damaged`], [`ControlLogError::InUse`], [`ControlLogError::Storage`].
    pub fn open(path: &Path) -> Result<Self, ControlLogError> {
        Log::open(path).map(|log| Self { log: Arc::new(Mutex::new(log)) })
    }

    /// SQLite waits for the disk, so it works on a thread where waiting harms nobody.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Log) -> Result<T, ControlLogError> + Send + 'static,
    ) -> Result<T, ControlLogError> {
        let log = self.log.clone();
        let done = tokio::task::spawn_blocking(move || {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut log)
        });
        done.await.unwrap_or_else(|error| {
            Err(ControlLogError::Storage { path: PathBuf::new(), source: Box::new(error) })
        })
    }
}

#[async_trait]
impl ControlLog for SqliteControlLog {
    async fn append(&self, epoch: ControlEpoch, record: Vec<u8>) -> Result<u64, ControlLogError> {
        self.with(move |log| log.append(epoch, &record)).await
    }

    async fn entries_after(&self, index: u64) -> Result<Vec<ControlEntry>, ControlLogError> {
        self.with(move |log| Ok(log.entries_after(index)?.into_iter().map(|(entry, _)| entry).collect()))
            .await
    }

    async fn snapshot(&self) -> Result<Option<ControlSnapshot>, ControlLogError> {
        self.with(|log| Ok(log.snapshot()?.map(|(snapshot, _)| snapshot))).await
    }

    async fn compact(&self, index: u64, state: Vec<u8>) -> Result<(), ControlLogError> {
        self.with(move |log| log.compact(index, state)).await
    }

    async fn epoch(&self) -> Result<ControlEpoch, ControlLogError> {
        self.with(|log| Ok(log.epoch)).await
    }
}

impl Log {
    fn open(path: &Path) -> Result<Self, ControlLogError> {
        let failed = |error| failure(path, error);
        let connection = Connection::open(path).map_err(failed)?;
        // One process only: with an exclusive lock SQLite also needs no shared-memory file beside the log.
        connection.busy_timeout(Duration::from_millis(200)).map_err(failed)?;
        connection
            .execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE;
                 PRAGMA journal_mode = WAL;
                 PRAGMA synchronous = FULL;
                 PRAGMA fullfsync = 1;
                 PRAGMA checkpoint_fullfsync = 1;
                 PRAGMA trusted_schema = 0;",
            )
            .map_err(failed)?;
        let checked: String =
            connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
        if checked != "ok" {
            return Err(damaged(path, checked));
        }
        let layout: i64 =
            connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
        if layout != 0 && layout != LAYOUT {
            return Err(damaged(
                path,
                format!("it has layout {layout}, this version of mlxnode writes {LAYOUT}"),
            ));
        }
        connection
            .execute_batch(&format!("BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {LAYOUT}; COMMIT;"))
            .map_err(failed)?;
        let mut log = Self {
            path: path.to_path_buf(),
            connection,
            last: 0,
            epoch: ControlEpoch::default(),
            chain: [0; 32],
        };
        log.verify()?;
        Ok(log)
    }

    /// Goes through all that is kept, once, and notes where it ends.
    fn verify(&mut self) -> Result<(), ControlLogError> {
        if let Some((snapshot, chain)) = self.snapshot()? {
            (self.last, self.epoch, self.chain) = (snapshot.index, snapshot.epoch, chain);
        }
        let entries = self.entries_after(0)?;
        for (entry, chain) in entries {
            if entry.index != self.last + 1 {
                let what =
                    format!("entry {} is missing, {} follows {}", self.last + 1, entry.index, self.last);
                return Err(damaged(&self.path, what));
            }
            if entry.epoch < self.epoch || link(&self.chain, &entry) != chain {
                return Err(damaged(&self.path, format!("entry {} is not what was written", entry.index)));
            }
            (self.last, self.epoch, self.chain) = (entry.index, entry.epoch, chain);
        }
        Ok(())
    }

    fn append(&mut self, epoch: ControlEpoch, record: &[u8]) -> Result<u64, ControlLogError> {
        if record.len() > MAX_RECORD {
            return Err(ControlLogError::TooLong { bytes: record.len(), limit: MAX_RECORD });
        }
        if epoch < self.epoch {
            return Err(ControlLogError::StaleEpoch { given: epoch, newest: self.epoch });
        }
        let entry = ControlEntry { index: self.last + 1, epoch, record: record.to_vec() };
        let chain = link(&self.chain, &entry);
        // One statement is one transaction; it returns when the log file is synced.
        self.connection
            .prepare_cached("INSERT INTO entries VALUES (?1, ?2, ?3, ?4, ?5)")
            .and_then(|mut insert| {
                insert.execute(params![
                    entry.index as i64,
                    epoch.generation as i64,
                    epoch.term as i64,
                    entry.record,
                    chain
                ])
            })
            .map_err(|error| failure(&self.path, error))?;
        (self.last, self.epoch, self.chain) = (entry.index, epoch, chain);
        Ok(entry.index)
    }

    fn entries_after(&self, index: u64) -> Result<Vec<(ControlEntry, Hash)>, ControlLogError> {
        let read = || {
            let mut select = self.connection.prepare_cached(
                "SELECT position, generation, term, record, chain FROM entries WHERE position > ?1 ORDER BY position",
            )?;
            let rows = select.query_map([i64::try_from(index).unwrap_or(i64::MAX)], |row| {
                let epoch = ControlEpoch {
                    generation: row.get::<_, i64>(1)? as u64,
                    term: row.get::<_, i64>(2)? as u64,
                };
                Ok((
                    ControlEntry { index: row.get::<_, i64>(0)? as u64, epoch, record: row.get(3)? },
                    row.get(4)?,
                ))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        };
        read().map_err(|error| failure(&self.path, error))
    }

    fn snapshot(&self) -> Result<Option<(ControlSnapshot, Hash)>, ControlLogError> {
        let found = self
            .connection
            .query_row(
                "SELECT position, generation, term, state, state_hash, chain FROM snapshot",
                [],
                |row| {
                    let epoch = ControlEpoch {
                        generation: row.get::<_, i64>(1)? as u64,
                        term: row.get::<_, i64>(2)? as u64,
                    };
                    let snapshot =
                        ControlSnapshot { index: row.get::<_, i64>(0)? as u64, epoch, state: row.get(3)? };
                    Ok((snapshot, row.get::<_, Hash>(4)?, row.get::<_, Hash>(5)?))
                },
            )
            .optional()
            .map_err(|error| failure(&self.path, error))?;
        let Some((snapshot, hash, chain)) = found else { return Ok(None) };
        if blake3::hash(&snapshot.state) != hash {
            return Err(damaged(&self.path, "the snapshot is not what was written".to_owned()));
        }
        Ok(Some((snapshot, chain)))
    }

    fn compact(&mut self, index: u64, state: Vec<u8>) -> Result<(), ControlLogError> {
        if state.len() > MAX_SNAPSHOT {
            return Err(ControlLogError::TooLong { bytes: state.len(), limit: MAX_SNAPSHOT });
        }
        let path = self.path.clone();
        let failed = |error| failure(&path, error);
        let first = self.snapshot()?.map_or(0, |(snapshot, _)| snapshot.index) + 1;
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let at: Option<(i64, i64, Hash)> = transaction
            .query_row(
                "SELECT generation, term, chain FROM entries WHERE position = ?1",
                [index as i64],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
            )
            .optional()
            .map_err(failed)?;
        let Some((generation, term, chain)) = at else {
            return Err(ControlLogError::NoSuchIndex { index, first, last: self.last });
        };
        let hash: Hash = blake3::hash(&state).into();
        transaction
            .execute(
                "INSERT OR REPLACE INTO snapshot VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6)",
                params![index as i64, generation, term, state, hash, chain],
            )
            .and_then(|_| transaction.execute("DELETE FROM entries WHERE position <= ?1", [index as i64]))
            .map_err(failed)?;
        transaction.commit().map_err(failed)
    }
}

fn link(previous: &Hash, entry: &ControlEntry) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous);
    hasher.update(&entry.index.to_le_bytes());
    hasher.update(&entry.epoch.generation.to_le_bytes());
    hasher.update(&entry.epoch.term.to_le_bytes());
    hasher.update(&entry.record);
    hasher.finalize().into()
}

fn damaged(path: &Path, what: String) -> ControlLogError {
    ControlLogError::Damaged { path: path.to_path_buf(), what }
}

fn failure(path: &Path, error: rusqlite::Error) -> ControlLogError {
    let path = path.to_path_buf();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            ControlLogError::Damaged { path, what: error.to_string() }
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ControlLogError::InUse { path },
        _ => ControlLogError::Storage { path, source: Box::new(error) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(generation: u64, term: u64) -> ControlEpoch {
        ControlEpoch { generation, term }
    }

    async fn filled(path: &Path, count: u64) -> SqliteControlLog {
        let log = SqliteControlLog::open(path).unwrap();
        for number in 1..=count {
            let index =
                log.append(epoch(1, number / 4), format!("decision {number}").into_bytes()).await.unwrap();
            assert_eq!(index, number);
        }
        log
    }

    fn change(path: &Path, sql: &str) {
        assert_eq!(Connection::open(path).unwrap().execute(sql, []).unwrap(), 1, "{sql}");
    }

    #[tokio::test]
    async fn decisions_survive_reopening_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        drop(filled(&path, 10).await);
        let log = SqliteControlLog::open(&path).unwrap();
        let entries = log.entries_after(7).await.unwrap();
        let texts: Vec<_> = entries.iter().map(|entry| String::from_utf8_lossy(&entry.record)).collect();
        assert_eq!(texts, ["decision 8", "decision 9", "decision 10"]);
        assert_eq!(log.epoch().await.unwrap(), epoch(1, 2));
        assert_eq!(log.append(epoch(2, 0), b"more".to_vec()).await.unwrap(), 11);
    }

    #[tokio::test]
    async fn an_acknowledged_decision_is_there_after_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        let log = filled(&path, 5).await;
        // What a crash leaves: the files as they are now, without SQLite's tidying up on closing.
        let copy = folder.path().join("copy.db");
        for suffix in ["", "-wal"] {
            let name = |base: &Path| PathBuf::from(format!("{}{suffix}", base.display()));
            std::fs::copy(name(&path), name(&copy)).unwrap();
        }
        drop(log);
        assert_eq!(SqliteControlLog::open(&copy).unwrap().entries_after(0).await.unwrap().len(), 5);
    }

    #[tokio::test]
    async fn a_write_cut_off_in_the_middle_loses_only_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        let wal = folder.path().join("control.db-wal");
        let log = filled(&path, 5).await;
        let kept = std::fs::metadata(&wal).unwrap().len();
        log.append(epoch(1, 9), vec![7; 5000]).await.unwrap();
        let whole = std::fs::metadata(&wal).unwrap().len();
        let copy = folder.path().join("copy.db");
        for cut in [kept + 1, kept + 30, (kept + whole) / 2, whole - 1] {
            let content = std::fs::read(&wal).unwrap();
            std::fs::copy(&path, &copy).unwrap();
            std::fs::write(folder.path().join("copy.db-wal"), &content[..cut as usize]).unwrap();
            let reopened = SqliteControlLog::open(&copy).unwrap();
            assert_eq!(reopened.entries_after(0).await.unwrap().len(), 5, "cut at {cut}");
            assert_eq!(reopened.append(epoch(1, 9), vec![8]).await.unwrap(), 6);
        }
    }

    #[tokio::test]
    async fn a_coordinator_of_an_older_epoch_cannot_write() {
        let folder = tempfile::tempdir().unwrap();
        let log = SqliteControlLog::open(&folder.path().join("control.db")).unwrap();
        log.append(epoch(2, 3), vec![1]).await.unwrap();
        for old in [epoch(2, 2), epoch(1, 9)] {
            let refused = log.append(old, vec![2]).await.unwrap_err();
            assert!(matches!(refused, ControlLogError::StaleEpoch { .. }), "{refused}");
        }
        log.append(epoch(3, 0), vec![3]).await.unwrap();
    }

    #[tokio::test]
    async fn a_snapshot_takes_the_place_of_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        let log = filled(&path, 10).await;
        log.compact(7, b"state of seven".to_vec()).await.unwrap();
        let again = log.compact(7, b"again".to_vec()).await.unwrap_err();
        assert!(matches!(again, ControlLogError::NoSuchIndex { index: 7, first: 8, last: 10 }), "{again}");
        drop(log);
        let log = SqliteControlLog::open(&path).unwrap();
        let snapshot = log.snapshot().await.unwrap().unwrap();
        assert_eq!((snapshot.index, snapshot.state.as_slice()), (7, b"state of seven".as_slice()));
        assert_eq!(log.entries_after(snapshot.index).await.unwrap().len(), 3);
        log.compact(10, b"state of ten".to_vec()).await.unwrap();
        drop(log);
        let log = SqliteControlLog::open(&path).unwrap();
        assert_eq!(
            log.append(epoch(1, 3), vec![1]).await.unwrap(),
            11,
            "counting goes on after an empty log"
        );
    }

    #[tokio::test]
    async fn records_have_a_longest_size() {
        let folder = tempfile::tempdir().unwrap();
        let log = SqliteControlLog::open(&folder.path().join("control.db")).unwrap();
        log.append(epoch(0, 0), vec![0; MAX_RECORD]).await.unwrap();
        let long = log.append(epoch(0, 0), vec![0; MAX_RECORD + 1]).await.unwrap_err();
        assert!(matches!(long, ControlLogError::TooLong { .. }));
    }

    #[tokio::test]
    async fn every_kind_of_tampering_is_found_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let original = folder.path().join("original.db");
        let log = filled(&original, 10).await;
        log.compact(4, b"state".to_vec()).await.unwrap();
        drop(log);
        let changes = [
            ("UPDATE entries SET record = x'00' WHERE position = 10", "entry 10 is not"),
            ("UPDATE entries SET term = 9 WHERE position = 7", "entry 7 is not"),
            ("UPDATE entries SET position = 11 WHERE position = 10", "entry 10 is missing"),
            ("DELETE FROM entries WHERE position = 5", "entry 5 is missing"),
            ("UPDATE snapshot SET state = x'00'", "snapshot"),
            ("UPDATE snapshot SET chain = zeroblob(32)", "entry 5 is not"),
            ("DELETE FROM snapshot", "entry 1 is missing"),
        ];
        for (sql, expected) in changes {
            let path = folder.path().join("changed.db");
            std::fs::copy(&original, &path).unwrap();
            change(&path, sql);
            let Err(error) = SqliteControlLog::open(&path) else { panic!("{sql} was not noticed") };
            let text = error.to_string();
            assert!(
                matches!(error, ControlLogError::Damaged { .. }) && text.contains(expected),
                "{sql}: {text}"
            );
        }
    }

    #[test]
    fn a_file_that_is_no_log_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        std::fs::write(&path, b"this is not a database, but it is long enough to look at".repeat(40))
            .unwrap();
        let Err(error) = SqliteControlLog::open(&path) else { panic!("opened") };
        assert!(matches!(error, ControlLogError::Damaged { .. }), "{error}");
    }

    #[test]
    fn two_processes_cannot_have_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        let _first = SqliteControlLog::open(&path).unwrap();
        let Err(error) = SqliteControlLog::open(&path) else { panic!("opened twice") };
        assert!(matches!(error, ControlLogError::InUse { .. }), "{error}");
    }
}
