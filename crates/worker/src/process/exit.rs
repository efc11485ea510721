//! How a worker process ended, in words.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

/// How a worker process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerExit {
    /// Its process id.
    pub pid: u32,
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// For people: "ended with signal 9".
    pub reason: String,
    /// The last line of its log, which tells a fault's reason.
    pub last_line: Option<String>,
}

impl std::fmt::Display for WorkerExit {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} {}", self.pid, self.reason)?;
        match &self.last_line {
            Some(line) if self.code != Some(0) => write!(out, " ({line})"),
            _ => Ok(()),
        }
    }
}

impl WorkerExit {
    /// Somebody or something outside ended it: a person, the system for want of memory, a shutdown. Not by a fault of its own.
    pub fn was_killed(&self) -> bool {
        use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGKILL, SIGTERM};
        self.signal.is_some_and(|signal| {
            [SIGHUP, SIGINT, SIGKILL, SIGTERM].iter().any(|other| *other as i32 == signal)
        })
    }

    pub(crate) fn new(pid: u32, status: std::io::Result<ExitStatus>, last_line: Option<String>) -> Self {
        let (code, signal, reason) = match status {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => (Some(code), None, format!("ended with code {code}")),
                (None, Some(signal)) => (None, Some(signal), format!("ended with signal {signal}")),
                (None, None) => (None, None, "ended".to_owned()),
            },
            Err(error) => (None, None, format!("cannot be waited for: {error}")),
        };
        Self { pid, code, signal, reason, last_line }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_read_like_a_person_says_them() {
        let exit = |raw| WorkerExit::new(7, Ok(ExitStatus::from_raw(raw)), Some("why".into())).to_string();
        assert_eq!(exit(9), "7 ended with signal 9 (why)");
        assert_eq!(exit(71 << 8), "7 ended with code 71 (why)");
        assert_eq!(exit(0), "7 ended with code 0");
    }

    #[test]
    fn a_process_that_is_killed_has_no_fault_of_its_own() {
        let killed = |raw| WorkerExit::new(7, Ok(ExitStatus::from_raw(raw)), None).was_killed();
        assert!([1, 2, 9, 15].into_iter().all(killed));
        assert!(![0, 1 << 8, 6, 11].into_iter().any(killed), "an end, a refusal, abort, a wrong address");
    }
}
