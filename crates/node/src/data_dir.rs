//! The folder that holds all state of one node, and the lock that keeps a second node out of it.
//!
//! ```text
//! DATA_DIR/
//!   lock            held while a node runs
//!   node.key        the node's identity
//!   cluster.key     only where the coordinator is: signs the roster
//!   roster.pb       the signed roster
//!   control.db      the coordinator's control log
//!   blocks/         what workers computed of prompts, and which those were; may be removed while no node runs
//!   jobs/           files and checkpoints of jobs
//!   client/         for local clients (command line, scripts): their own node.key and node.crt, and server.crt to expect
//!   run/node.json   where the running node listens; removed when it stops
//! ```

use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

/// Paths inside a data directory.
#[derive(Clone, Debug)]
pub struct DataDir {
    root: PathBuf,
}

/// Where the running node of a data directory can be reached.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct RunningNode {
    /// HOST:PORT of the gRPC listener, as a client on this machine dials it.
    pub grpc: String,
    /// URL of the HTTP listener, likewise; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// Hex node id: the key that the client expects.
    pub node_id: String,
    /// Process id.
    pub pid: u32,
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another node runs with it.
    #[error("another node is running with the data directory {0}; give this one its own with --data-dir")]
    InUse(PathBuf),
    /// The file system refused.
    #[error("cannot use the data directory {path}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Holds the lock; dropping it lets the next node in.
#[derive(Debug)]
pub struct DataDirLock {
    _file: File,
    running: PathBuf,
}

impl Drop for DataDirLock {
    fn drop(&mut self) {
        // The file says where a node listens that is gone in a moment. If it cannot be removed, clients find nobody there.
        let _ = fs::remove_file(&self.running);
    }
}

impl DataDir {
    /// Names the directory; nothing is touched.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The identity of local clients.
    pub fn client(&self) -> PathBuf {
        self.root.join("client")
    }

    /// What workers remember of prompts.
    pub(crate) fn blocks(&self) -> PathBuf {
        self.root.join("blocks")
    }

    /// Files and checkpoints of jobs.
    pub(crate) fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// The node's certificate in PEM, for clients of other languages that want a root certificate.
    pub fn node_certificate(&self) -> PathBuf {
        self.client().join("server.crt")
    }

    /// The control log.
    pub fn control_log(&self) -> PathBuf {
        self.root.join("control.db")
    }

    fn running(&self) -> PathBuf {
        self.root.join("run").join("node.json")
    }

    /// Makes the directory (readable by its owner only) and takes the lock.
    pub fn lock(&self) -> Result<DataDirLock, DataDirError> {
        create_private(&self.root)?;
        create_private(&self.root.join("run"))?;
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| DataDirError::Io { path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => Ok(DataDirLock { _file: file, running: self.running() }),
            Err(TryLockError::WouldBlock) => Err(DataDirError::InUse(self.root.clone())),
            Err(TryLockError::Error(source)) => Err(DataDirError::Io { path, source }),
        }
    }

    /// Tells local clients where the node listens.
    pub fn write_running(&self, running: &RunningNode) -> Result<(), DataDirError> {
        let path = self.running();
        let io = |source| DataDirError::Io { path: path.clone(), source };
        let text = serde_json::to_vec(running).map_err(|source| io(source.into()))?;
        let new = path.with_extension("new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).map_err(io)
    }

    /// Puts the node's certificate where clients of other languages find it.
    pub fn write_node_certificate(&self, pem: &str) -> Result<(), DataDirError> {
        let path = self.node_certificate();
        let new = path.with_extension("new");
        fs::write(&new, pem)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| DataDirError::Io { path, source })
    }

    /// Where the running node listens; `None` when no node runs here.
    pub fn read_running(&self) -> Option<RunningNode> {
        let text = fs::read(self.running()).ok()?;
        let running: RunningNode = serde_json::from_slice(&text).ok()?;
        // A node that was killed leaves the file behind, but not the lock.
        let lock = File::options().write(true).open(self.root.join("lock")).ok()?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Some(running),
            _ => None,
        }
    }

    /// Removes what ties this directory to its cluster besides the roster; the node's own key stays. For `leave`.
    pub fn forget_cluster(&self) -> Result<(), DataDirError> {
        // SQLite keeps its journal beside the database.
        for name in ["cluster.key", "control.db", "control.db-wal", "control.db-shm"] {
            let path = self.root.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(DataDirError::Io { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn create_private(path: &Path) -> Result<(), DataDirError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| DataDirError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_a_second_node_out_and_says_where_the_first_one_listens() {
        let folder = tempfile::tempdir().unwrap();
        let dir = DataDir::new(folder.path().join("data"));
        let running = RunningNode { grpc: "127.0.0.1:4".into(), http: None, node_id: "ab".into(), pid: 7 };
        let lock = dir.lock().unwrap();
        dir.write_running(&running).unwrap();
        assert_eq!(dir.read_running(), Some(running));
        assert!(matches!(dir.lock(), Err(DataDirError::InUse(_))));
        drop(lock);
        assert_eq!(dir.read_running(), None);
        dir.lock().unwrap();
    }

    #[test]
    fn a_killed_node_is_not_running() {
        let folder = tempfile::tempdir().unwrap();
        let dir = DataDir::new(folder.path());
        drop(dir.lock().unwrap());
        dir.write_running(&RunningNode {
            grpc: "127.0.0.1:4".into(),
            http: None,
            node_id: "ab".into(),
            pid: 7,
        })
        .unwrap();
        assert_eq!(dir.read_running(), None);
    }
}
