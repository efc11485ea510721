//! What a worker process writes: its log on stderr, and whatever a library prints on stdout.

use crate::error::shortened;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info};

/// Longest line of the worker's log that is passed on; the rest of it is cut off.
const LONGEST_LOG_LINE: usize = 4096;
/// How long to wait for the rest of the log of a process that has ended.
pub(crate) const LOG_END: Duration = Duration::from_millis(100);

/// Passes the worker's stderr on to this process's log.
#[derive(Debug)]
pub(crate) struct Log {
    last_line: Arc<Mutex<Option<String>>>,
    task: AbortOnDropHandle<()>,
}

impl Log {
    pub(crate) fn follow(pid: u32, name: String, stderr: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let last_line = Arc::new(Mutex::new(None));
        let shared = last_line.clone();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut stderr = BufReader::new(stderr);
            while let Some(line) = next_line(&mut stderr).await {
                info!(target: "mlxnode::worker", pid, name, "{line}");
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(shortened(&line));
            }
        }));
        Self { last_line, task }
    }

    /// The last line, once the rest has been passed on.
    pub(crate) async fn end(mut self) -> Option<String> {
        let _ = tokio::time::timeout(LOG_END, &mut self.task).await;
        self.last_line.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The next line that is not empty, cut off at [`LONGEST_LOG_LINE`]; `None` at the end.
async fn next_line(input: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    loop {
        let available = input.fill_buf().await.ok()?;
        let at_end = available.is_empty();
        let newline = available.iter().position(|byte| *byte == b'\n');
        let taken = newline.unwrap_or(available.len());
        let room = LONGEST_LOG_LINE.saturating_sub(line.len()).min(taken);
        line.extend_from_slice(&available[..room]);
        input.consume(taken + usize::from(newline.is_some()));
        if newline.is_some() || at_end {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if !text.is_empty() {
                return Some(text);
            }
            if at_end {
                return None;
            }
            line.clear();
        }
    }
}

/// Nothing more is expected on stdout; whatever a library prints there must not fill the pipe and stop the worker.
pub(super) async fn drain(mut stdout: impl AsyncBufRead + Unpin) {
    while let Some(line) = next_line(&mut stdout).await {
        debug!(target: "mlxnode::worker", "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn log_lines_are_cut_and_never_lost() {
        let long = "x".repeat(10_000);
        let text = format!("one\n\n{long}\nthree\r\nlast");
        let mut input = BufReader::with_capacity(16, text.as_bytes());
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut input).await {
            lines.push(line);
        }
        assert_eq!(lines, ["one", &long[..LONGEST_LOG_LINE], "three", "last"]);
    }
}
