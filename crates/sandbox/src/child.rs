//! One child process: it is started, told its terms, given jobs one after the other, and ended.

use crate::frame::{self, ALLOWANCE, Answer, Terms};
use crate::sandbox::SandboxOptions;
use nix::sys::signal::Signal;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child as System, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tracing::{debug, info};

/// From the start of the process to its first frame. Most of it is the system's, which loads the program.
const START_TIME: Duration = Duration::from_secs(20);
/// A child that closed its socket is about to end by itself, and how is worth more than our SIGKILL.
const END_TIME: Duration = Duration::from_secs(2);

/// A child process that waits for a job. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Child {
    process: System,
    socket: UnixStream,
    /// Jobs it has done.
    jobs: u64,
}

/// Why a child has no answer. It is gone then.
#[derive(Debug)]
pub(crate) enum Lost {
    /// It asked for more memory, or for more stack, than it has: both end it.
    Memory,
    /// It was not done in time.
    Late,
    /// Anything else, such as somebody's signal.
    Ended(String),
}

impl Child {
    /// Starts a child and waits until it is ready; what went wrong in words.
    pub(crate) fn start(options: &SandboxOptions, terms: Terms) -> Result<Self, String> {
        let cannot =
            |what: &dyn std::fmt::Display| format!("cannot start {}: {what}", options.command.display());
        let (socket, theirs) = UnixStream::pair().map_err(|error| cannot(&error))?;
        let mut command = Command::new(&options.command);
        command.args(&options.arguments).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        // Its last words at an allocation too many are the runtime's, to nobody. Its own process group: Ctrl-C in a
        // terminal is for us, and with us it ends.
        command.stderr(Stdio::null()).process_group(0);
        let process = command.spawn().map_err(|error| cannot(&error))?;
        drop(command); // and with it our copy of the child's end
        let mut child = Self { process, socket, jobs: 0 };
        let greeting = frame::encode(&terms).map_err(|error| cannot(&error))?;
        match child.exchange(&greeting, 0, Instant::now() + START_TIME) {
            Ok(Answer::Done(text)) if text.is_empty() => {
                child.jobs = 0;
                debug!(pid = child.id(), "sandbox started");
                Ok(child)
            }
            Ok(answer) => Err(cannot(&format!("it greets with {answer:?}"))),
            Err(Lost::Late) => Err(cannot(&format!("it was not ready within {} s", START_TIME.as_secs()))),
            Err(Lost::Memory) => Err(cannot(&"it took too much memory before it had anything to do")),
            // The file may have been replaced by another version while this process ran.
            Err(Lost::Ended(reason)) => {
                Err(cannot(&format!("{reason}; if it was updated, start this program anew")))
            }
        }
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// It has done nothing yet, so that what ends it is the job.
    pub(crate) fn is_fresh(&self) -> bool {
        self.jobs == 0
    }

    /// Sends a frame and waits for the one that answers it, whose text has at most `most_bytes`.
    pub(crate) fn exchange(
        &mut self,
        frame: &[u8],
        most_bytes: usize,
        deadline: Instant,
    ) -> Result<Answer, Lost> {
        let mut socket = Timed { socket: &self.socket, deadline };
        let answer = socket
            .write_all(frame)
            .and_then(|()| frame::read(&mut socket, most_bytes + ALLOWANCE))
            .and_then(|answer| answer.ok_or_else(|| ErrorKind::UnexpectedEof.into()));
        match answer {
            Ok(answer) => {
                self.jobs += 1;
                Ok(answer)
            }
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// Ends it, and tells why it had no answer.
    fn lost(&mut self, error: &io::Error) -> Lost {
        let lost = match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                self.kill();
                Lost::Late
            }
            ErrorKind::InvalidData => {
                self.kill();
                Lost::Ended(format!("it sent {error}"))
            }
            _ => match self.wait() {
                Some(status) => ended(status),
                None => Lost::Ended("it closed its socket and went on".to_owned()),
            },
        };
        info!(pid = self.id(), ?lost, "sandbox ended");
        lost
    }

    /// Waits for the end of a child that is ending, and ends it when it does not.
    fn wait(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + END_TIME;
        while Instant::now() < deadline {
            match self.process.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                Ok(status) => return status,
                Err(_) => break,
            }
        }
        self.kill();
        None
    }

    fn kill(&mut self) {
        // An error means that it has ended and been waited for already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill(); // it holds nothing that it would have to put in order
    }
}

fn ended(status: ExitStatus) -> Lost {
    // An allocation too many aborts; a stack that is full aborts or is a fault of memory.
    let memory = [Signal::SIGABRT, Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGTRAP];
    match status.signal() {
        Some(signal) if memory.iter().any(|one| *one as i32 == signal) => Lost::Memory,
        Some(signal) if signal == Signal::SIGXCPU as i32 => Lost::Late,
        _ => Lost::Ended(format!("it ended ({status})")),
    }
}

/// A socket whose reads and writes all end at one moment, however many they are.
struct Timed<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(into)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
