//! Words on stderr that are neither data nor a failure.

use std::io::Write as _;

/// Writes text as it is. That nobody reads stderr is no reason to stop.
pub fn text(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
