//! The node's side: who wants something done waits for the one child, has it for a bounded time, and leaves it ready for
//! the next one or gone.

use crate::child::{Child, Lost};
use crate::frame::{self, Answer, Job, LARGEST_JOB, Terms, VERSION};
use mlxnode_text::{Sandbox, SandboxError, TextFiles};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::warn;

/// What templates may have, their stack included: the limit of the child, not of one rendering.
const TEMPLATE_MEBIBYTES: u64 = 256;
/// Of these the stack.
const STACK_MEBIBYTES: u64 = 64;
/// Tokenizers to remember: more than a node has models.
const MOST_TRIED: usize = 64;
/// Who waits longer than this for its turn is told to come back.
const QUEUE_PATIENCE: Duration = Duration::from_secs(10);

/// How children are started, and what they may have.
#[derive(Clone, Debug)]
pub struct SandboxOptions {
    /// The executable: this program's own.
    pub command: PathBuf,
    /// Its arguments, so that it calls [`crate::serve()`].
    pub arguments: Vec<OsString>,
    /// The longest that a template may run.
    pub template_time: Duration,
    /// Memory that a tokenizer may take while it is built, in MiB.
    pub tokenizer_mebibytes: u64,
    /// The longest that building and trying a tokenizer may take.
    pub tokenizer_time: Duration,
    /// The most that wait for their turn; more are told to come back.
    pub queue: usize,
}

impl SandboxOptions {
    /// `command sandbox`, with the limits that nodes use.
    pub fn new(command: PathBuf) -> Self {
        Self {
            command,
            arguments: vec!["sandbox".into()],
            // Honest renderings take milliseconds, and fuel ends small loops after thirty.
            template_time: Duration::from_secs(2),
            // The largest honest tokenizer.json (35 MiB, 262,000 tokens, 580,000 merges) takes some 400 MiB and a second or two.
            tokenizer_mebibytes: 1024,
            tokenizer_time: Duration::from_secs(20), // of a busy machine
            queue: 64,
        }
    }
}

/// Carries out in another process what strangers wrote. Cheap to clone; all clones share one child, which is started when it is
/// first needed and ends with the last of them. Calls block: asynchronous callers make them on a thread for that.
#[derive(Clone, Debug)]
pub struct SandboxProcess {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: SandboxOptions,
    desk: Mutex<Desk>,
    freed: Condvar,
    tried: Mutex<Tried>,
}

/// Who has the child, and how many want it.
#[derive(Debug, Default)]
struct Desk {
    /// Not here while somebody uses it.
    child: Option<Child>,
    is_used: bool,
    waiting: usize,
}

/// Tokenizers that were found harmless, the newest last, by a hash whose keys nobody knows.
#[derive(Debug, Default)]
struct Tried {
    keys: RandomState,
    hashes: VecDeque<u64>,
}

impl SandboxProcess {
    /// Starts nothing yet.
    pub fn new(options: SandboxOptions) -> Self {
        let (desk, freed, tried) = (Mutex::default(), Condvar::new(), Mutex::default());
        Self { shared: Arc::new(Shared { options, desk, freed, tried }) }
    }

    /// Starts the child now, unless it runs, so that the first rendering finds it ready. What goes wrong shows then.
    pub fn prepare(&self) {
        let Ok(mut turn) = self.turn() else { return };
        if turn.child.is_none() {
            turn.child = Child::start(&self.shared.options, self.template_terms()).ok();
        }
    }

    /// The process id of the child that waits for its next job; none before the first, while it works, and when it is gone.
    pub fn child_id(&self) -> Option<u32> {
        self.desk().child.as_ref().map(Child::id)
    }

    /// Has a template's job done. A child that ended is replaced, and the job done once more if it may not have been its fault.
    fn template(&self, job: &Job<'_>, most_bytes: usize) -> Result<String, SandboxError> {
        let frame = frame_of(job)?;
        let mut turn = self.turn()?;
        let options = &self.shared.options;
        let mut is_second = false;
        loop {
            let mut child = match turn.child.take() {
                Some(child) => child,
                None => Child::start(options, self.template_terms()).map_err(SandboxError::Unavailable)?,
            };
            // Its memory holds nothing of others.
            let is_alone = child.is_fresh() || is_second;
            let error = match child.exchange(&frame, most_bytes, Instant::now() + options.template_time) {
                Ok(answer) => {
                    turn.child = Some(child);
                    return taken(answer);
                }
                Err(Lost::Late) => SandboxError::Work,
                Err(Lost::Memory) if is_alone => SandboxError::Memory { mebibytes: TEMPLATE_MEBIBYTES },
                Err(Lost::Ended(reason)) if is_second => SandboxError::Unavailable(reason),
                Err(_) => {
                    is_second = true;
                    continue;
                }
            };
            warn!(%error, "a chat template was ended");
            return Err(error);
        }
    }

    fn template_terms(&self) -> Terms {
        terms(TEMPLATE_MEBIBYTES, self.shared.options.template_time)
    }

    /// Tries a tokenizer in a child of its own: it may have more, and nobody waits for it.
    fn tokenizer(&self, files: &TextFiles) -> Result<(), SandboxError> {
        let options = &self.shared.options;
        let files = files.iter().map(|(name, bytes)| (Cow::Borrowed(name), Cow::Borrowed(bytes))).collect();
        let frame = frame_of(&Job::TryTokenizer { files })?;
        let terms = terms(options.tokenizer_mebibytes, options.tokenizer_time);
        let mut child = Child::start(options, terms).map_err(SandboxError::Unavailable)?;
        let error = match child.exchange(&frame, 0, Instant::now() + options.tokenizer_time) {
            Ok(answer) => return taken(answer).map(drop),
            Err(Lost::Late) => SandboxError::Work,
            Err(Lost::Memory) => SandboxError::Memory { mebibytes: options.tokenizer_mebibytes },
            Err(Lost::Ended(reason)) => SandboxError::Unavailable(reason),
        };
        warn!(%error, "a tokenizer was ended");
        Err(error)
    }

    /// Waits until the child is free.
    fn turn(&self) -> Result<Turn<'_>, SandboxError> {
        let shared = &*self.shared;
        let mut desk = self.desk();
        if desk.is_used {
            if desk.waiting >= shared.options.queue {
                return Err(SandboxError::Busy);
            }
            desk.waiting += 1;
            let waited = shared.freed.wait_timeout_while(desk, QUEUE_PATIENCE, |desk| desk.is_used);
            desk = waited.unwrap_or_else(PoisonError::into_inner).0;
            desk.waiting -= 1;
            if desk.is_used {
                return Err(SandboxError::Busy);
            }
        }
        desk.is_used = true;
        Ok(Turn { shared, child: desk.child.take() })
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.shared.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tried(&self) -> MutexGuard<'_, Tried> {
        self.shared.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to use the child; gives it back, or what there is of it, when dropped.
struct Turn<'a> {
    shared: &'a Shared,
    child: Option<Child>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut desk = self.shared.desk.lock().unwrap_or_else(PoisonError::into_inner);
        desk.child = self.child.take();
        desk.is_used = false;
        drop(desk);
        self.shared.freed.notify_one();
    }
}

impl Sandbox for SandboxProcess {
    fn compile(&self, source: &str) -> Result<(), SandboxError> {
        self.template(&Job::Compile { source: Cow::Borrowed(source) }, 0).map(drop)
    }

    fn render(&self, source: &str, variables: &str, most_bytes: usize) -> Result<String, SandboxError> {
        let (source, variables) = (Cow::Borrowed(source), Cow::Borrowed(variables));
        self.template(&Job::Render { source, variables, most_bytes: most_bytes as u64 }, most_bytes)
    }

    /// Once for the same files.
    fn try_tokenizer(&self, files: &TextFiles) -> Result<(), SandboxError> {
        let hash = self.tried().keys.hash_one(files.iter().collect::<Vec<_>>());
        if self.tried().hashes.contains(&hash) {
            return Ok(());
        }
        self.tokenizer(files)?;
        let mut tried = self.tried();
        tried.hashes.push_back(hash);
        if tried.hashes.len() > MOST_TRIED {
            tried.hashes.pop_front();
        }
        Ok(())
    }
}

/// Terms of a child that may have so much memory in all.
fn terms(mebibytes: u64, time: Duration) -> Terms {
    Terms {
        version: VERSION,
        heap_bytes: mebibytes.saturating_sub(STACK_MEBIBYTES) << 20,
        stack_bytes: STACK_MEBIBYTES << 20,
        job_seconds: time.as_secs() + 1,
    }
}

fn frame_of(job: &Job<'_>) -> Result<Vec<u8>, SandboxError> {
    let frame = frame::encode(job).map_err(|error| SandboxError::Unavailable(error.to_string()))?;
    match frame.len() <= LARGEST_JOB {
        true => Ok(frame),
        false => Err(SandboxError::Memory { mebibytes: TEMPLATE_MEBIBYTES }),
    }
}

fn taken(answer: Answer) -> Result<String, SandboxError> {
    match answer {
        Answer::Done(text) => Ok(text),
        Answer::Failed(error) => Err(error),
    }
}
