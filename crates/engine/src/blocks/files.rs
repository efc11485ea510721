//! Blocks on the disk: a file each, in one folder for all stages of a machine.
//!
//! A thread of its own reads and writes, so that no step waits for a disk; only a sequence that begins with a block waits for that
//! one. Nothing here is ever an error to a client: what cannot be written is not there later, and what is not there, damaged, or
//! another stage's is a miss.
//!
//! The folder keeps a limit on its bytes, whoever wrote them: before a file is written, those that were used least recently go.
//! Times of files say when that was, so the limit and the order outlive the process.

use super::plain::PlainBlock;
use mlxnode_compute::{BlockHash, ByteCount};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// Blocks that wait to be written. What comes when there are more is not written: their copies take memory.
const WAITING_WRITES: usize = 4;
/// How long a stage with nothing to do waits for a disk before it looks whether there is something to do.
const MOMENT: Duration = Duration::from_millis(2);
/// Requests that wait: a long prompt's blocks are read one after the other.
const WAITING: usize = 1024;
const ENDING: &str = ".safetensors";
const UNFINISHED: &str = ".unfinished";
const LOCK: &str = "lock";

/// The files of one stage's blocks.
pub(crate) struct BlockFiles {
    folder: Folder,
    requests: Option<SyncSender<Request>>,
    waiting_writes: Arc<AtomicUsize>,
    /// Hears of blocks that were written.
    written: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

enum Request {
    Write { hash: BlockHash, block: PlainBlock },
    Read { hash: BlockHash, reply: SyncSender<Option<PlainBlock>> },
    Erase { hash: BlockHash },
}

/// A block that is being read.
pub(super) struct Reading(Receiver<Option<PlainBlock>>);

impl Reading {
    /// Waits for it; None when it is not there.
    pub(super) fn wait(self) -> Option<PlainBlock> {
        self.0.recv().ok().flatten()
    }
}

impl BlockFiles {
    /// Files in `folder`, which is made when it is missing, of the stage with this fingerprint, at most `limit` bytes with those of
    /// other stages.
    pub(crate) fn open(folder: &Path, fingerprint: [u8; 32], limit: ByteCount) -> io::Result<Self> {
        // Prompts can be read out of them.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let stage = BlockHash(fingerprint).to_string().chars().take(32).collect();
        let folder = Folder { path: folder.to_owned(), stage, limit: limit.0, bytes: Arc::default() };
        folder.make_room(0)?;
        let (requests, inbox) = sync_channel(WAITING);
        let waiting_writes = Arc::new(AtomicUsize::new(0));
        let (tell, written) = sync_channel(1);
        let (of_thread, waiting) = (folder.clone(), waiting_writes.clone());
        let thread = std::thread::Builder::new().name("blocks".into());
        let thread = thread.spawn(move || of_thread.serve(&inbox, &waiting, &tell))?;
        Ok(Self { folder, requests: Some(requests), waiting_writes, written, thread: Some(thread) })
    }

    /// Most bytes of all files.
    pub(super) fn limit(&self) -> ByteCount {
        ByteCount(self.folder.limit)
    }

    /// Bytes of all files, as of the last one that was written.
    pub(super) fn bytes(&self) -> ByteCount {
        ByteCount(self.folder.bytes.load(Ordering::Relaxed))
    }

    /// Is there a file of this block?
    pub(super) fn has(&self, hash: BlockHash) -> bool {
        self.folder.file(hash).exists()
    }

    /// Do fewer blocks wait to be written than may?
    pub(super) fn has_room(&self) -> bool {
        self.waiting_writes.load(Ordering::Acquire) < WAITING_WRITES
    }

    /// Waits until another block was written, or a moment, in which nobody misses this thread.
    pub(super) fn wait_a_moment(&self) {
        // A timeout is as good as a block: whoever waits looks for itself.
        let _ = self.written.recv_timeout(MOMENT);
    }

    /// Writes a block, later. To be called when there [is room](Self::has_room).
    pub(super) fn write(&self, hash: BlockHash, block: PlainBlock) {
        self.waiting_writes.fetch_add(1, Ordering::AcqRel);
        let request = Request::Write { hash, block };
        if self.requests.as_ref().is_none_or(|requests| requests.try_send(request).is_err()) {
            self.waiting_writes.fetch_sub(1, Ordering::AcqRel);
            tracing::debug!(%hash, "a block is not written: the disk does not keep up");
        }
    }

    /// Begins to read a block.
    pub(super) fn read(&self, hash: BlockHash) -> Reading {
        let (reply, block) = sync_channel(1);
        if let Some(requests) = &self.requests {
            // The thread ends only with this value.
            let _ = requests.send(Request::Read { hash, reply });
        }
        Reading(block)
    }

    /// Removes a block, later. When too many requests wait it goes when its turn comes.
    pub(super) fn erase(&self, hash: BlockHash) {
        if let Some(requests) = &self.requests {
            let _ = requests.try_send(Request::Erase { hash });
        }
    }
}

impl Drop for BlockFiles {
    fn drop(&mut self) {
        self.requests = None; // what waits is written, then the thread ends
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone)]
struct Folder {
    path: PathBuf,
    /// The first part of each file's name.
    stage: String,
    limit: u64,
    bytes: Arc<AtomicU64>,
}

impl Folder {
    fn serve(&self, inbox: &Receiver<Request>, waiting_writes: &AtomicUsize, written: &SyncSender<()>) {
        while let Ok(request) = inbox.recv() {
            match request {
                Request::Write { hash, block } => {
                    if let Err(error) = self.write(hash, block) {
                        tracing::debug!(%hash, error, "a block is not written");
                    }
                    waiting_writes.fetch_sub(1, Ordering::AcqRel);
                    let _ = written.try_send(()); // one word is enough
                }
                Request::Read { hash, reply } => {
                    let _ = reply.send(self.read(hash)); // the stage may have ended
                }
                Request::Erase { hash } => {
                    let _ = fs::remove_file(self.file(hash));
                }
            }
        }
    }

    /// What a file says of itself is its name.
    fn name(&self, hash: BlockHash) -> String {
        format!("{}-{hash}", self.stage)
    }

    fn file(&self, hash: BlockHash) -> PathBuf {
        self.path.join(format!("{}{ENDING}", self.name(hash)))
    }

    fn write(&self, hash: BlockHash, block: PlainBlock) -> Result<(), String> {
        let (name, file) = (self.name(hash), self.file(hash));
        let unfinished = self.path.join(format!("{name}{UNFINISHED}"));
        let written = block.write(&name, &unfinished).map_err(|error| error.to_string()).and_then(|()| {
            let size = fs::metadata(&unfinished).map_err(|error| error.to_string())?.len();
            if size > self.limit {
                return Err(format!("it has {size} bytes of {} that all may have", self.limit));
            }
            self.take_place(&unfinished, &file, size).map_err(|error| error.to_string())
        });
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written
    }

    /// Gives a file its name after others made room; one process at a time, or two would take the same room.
    fn take_place(&self, unfinished: &Path, file: &Path, size: u64) -> io::Result<()> {
        let lock = fs::File::options().create(true).truncate(false).write(true).open(self.path.join(LOCK))?;
        lock.lock()?; // until it is closed
        self.make_room(size)?;
        fs::rename(unfinished, file)?;
        self.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, hash: BlockHash) -> Option<PlainBlock> {
        let file = self.file(hash);
        let opened = fs::File::open(&file).ok()?;
        if opened.metadata().ok()?.len() > self.limit {
            return None;
        }
        let block = fs::read(&file).ok().and_then(|bytes| PlainBlock::read(&bytes, &self.name(hash)));
        match block.is_some() {
            true => {
                // Used now; a clock or a disk that refuses only makes it look older.
                let _ = opened.set_modified(SystemTime::now());
            }
            false => {
                tracing::debug!(%hash, "the file of a block is damaged and goes");
                let _ = fs::remove_file(&file);
            }
        }
        block
    }

    /// Removes the files that were used least recently until `needed` more bytes fit.
    fn make_room(&self, needed: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let Ok(entry) = entry else { continue };
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            // One of another process goes on as long as it is being written; what a crash left is removed at the next start.
            let is_ours = name.starts_with(&self.stage) && name.ends_with(UNFINISHED) && needed == 0;
            if is_ours {
                let _ = fs::remove_file(entry.path());
            }
            let Some(facts) = entry.metadata().ok().filter(|_| name.ends_with(ENDING)) else { continue };
            files.push((facts.modified().unwrap_or(SystemTime::UNIX_EPOCH), facts.len(), entry.path()));
        }
        files.sort();
        let mut bytes: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in files {
            if bytes.saturating_add(needed) <= self.limit {
                break;
            }
            // Another process may have removed it.
            let _ = fs::remove_file(path);
            bytes -= size;
        }
        self.bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}
