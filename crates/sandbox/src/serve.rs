//! The child's side: one job after the other, until the parent closes the socket.

use crate::frame::{self, ALLOWANCE, Answer, Job, LARGEST_JOB, Terms, VERSION};
use mlxnode_text::{InProcess, Sandbox as _, TextFiles};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::unistd::{Pid, getppid};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How often a child that has nothing to do looks whether its parent is still there: on macOS the other end of its socket can
/// slip into a process that the parent starts at the same moment.
const PARENT_CHECK: Duration = Duration::from_secs(5);
/// Files that may be open: standard streams, the socket, the time zone.
const MOST_FILES: u64 = 16;

/// Why a child cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A person started it.
    #[error(
        "this command is started by mlxnode itself, which speaks to it over a socket; people have no use for it"
    )]
    NoParent(#[source] io::Error),
    /// Another program of that name, or the same before or after an update.
    #[error("the process that started this one is of another version")]
    Version,
    /// The allocator has handed out more already.
    #[error("this process takes more than the {0} bytes that it may have before it has done anything")]
    Memory(u64),
    /// The socket broke.
    #[error("the process that started this one cannot be understood")]
    Socket(#[source] io::Error),
}

/// Serves the parent at the other end of stdin until it closes that. `limit_memory` bounds what the process's allocator hands out
/// altogether from then on, in bytes, and says whether it could; beyond it an allocation ends the process.
///
/// # Errors
/// [`ServeError`]. What is wrong with a job goes to the parent.
pub fn serve(limit_memory: impl FnOnce(usize) -> bool) -> Result<(), ServeError> {
    let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(ServeError::NoParent)?;
    let socket = UnixStream::from(stdin);
    socket.set_read_timeout(Some(PARENT_CHECK)).map_err(ServeError::NoParent)?;
    let mut parent = Parent { socket, id: getppid() };

    let terms: Option<Terms> = frame::read(&mut parent, ALLOWANCE).map_err(ServeError::NoParent)?;
    let terms = terms.filter(|terms| terms.version == VERSION).ok_or(ServeError::Version)?;
    if !limit_memory(usize::try_from(terms.heap_bytes).unwrap_or(usize::MAX)) {
        return Err(ServeError::Memory(terms.heap_bytes));
    }
    give_up_privileges();
    let sandbox = InProcess::with_stack(usize::try_from(terms.stack_bytes).unwrap_or(usize::MAX));
    parent.answer(&Answer::Done(String::new()))?;
    while let Some(job) = frame::read(&mut parent, LARGEST_JOB).map_err(ServeError::Socket)? {
        limit_processor_time(terms.job_seconds);
        parent.answer(&perform(job, &sandbox))?;
    }
    Ok(())
}

fn perform(job: Job<'static>, sandbox: &InProcess) -> Answer {
    let result = match job {
        Job::Compile { source } => sandbox.compile(&source).map(|()| String::new()),
        Job::Render { source, variables, most_bytes } => {
            sandbox.render(&source, &variables, usize::try_from(most_bytes).unwrap_or(usize::MAX))
        }
        Job::TryTokenizer { files } => {
            let files = files.into_iter().map(|(name, bytes)| (name.into_owned(), bytes.into_owned()));
            match TextFiles::from_map(files.collect()) {
                Ok(files) => sandbox.try_tokenizer(&files).map(|()| String::new()),
                // They are no danger: the parent finds the same error.
                Err(_) => Ok(String::new()),
            }
        }
    };
    result.map_or_else(Answer::Failed, Answer::Done)
}

/// The parent, as a stream that ends with it.
struct Parent {
    socket: UnixStream,
    id: Pid,
}

impl Parent {
    /// Where the parent is gone, nobody wants it.
    fn answer(&mut self, answer: &Answer) -> Result<(), ServeError> {
        frame::write(&mut self.socket, answer).map_err(ServeError::Socket)
    }
}

impl Read for Parent {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.socket.read(into) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if getppid() != self.id {
                        return Ok(0);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(0),
                read => return read,
            }
        }
    }
}

/// What this process never needs, where taking it away is a call: core dumps (they hold prompts), files, more rights.
fn give_up_privileges() {
    let lower = |what: Resource, most: u64| {
        // A system that refuses has a lower limit already.
        let _ = setrlimit(what, most, most);
    };
    lower(Resource::RLIMIT_CORE, 0);
    lower(Resource::RLIMIT_FSIZE, 0);
    lower(Resource::RLIMIT_NOFILE, MOST_FILES);
    #[cfg(target_os = "linux")]
    {
        let _ = nix::sys::prctl::set_no_new_privs();
        let _ = nix::sys::prctl::set_dumpable(false); // nobody else of this user reads its memory
    }
}

/// The parent ends what takes too long. This is for a parent that is gone: a job without an end would run for ever.
fn limit_processor_time(seconds: u64) {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return };
    // The system counts the whole life of a process, so the bound moves with it.
    let used = usage.user_time().tv_sec() + usage.system_time().tv_sec();
    let soft = u64::try_from(used).unwrap_or(0) + seconds + 1;
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_CPU) {
        let _ = setrlimit(Resource::RLIMIT_CPU, soft.min(hard), hard);
    }
}
